# SPO, arXiv 2405.00747. `make` alone lists the targets.
#
# Settings are given on the command line, in capitals: make train ALGO=dpo BETA=0.3. One that is not given has the
# program's default (.venv/bin/python spo.py --help); one that the target does not read is an error. Every other flag
# goes into ARGS: make train ARGS="--lr 4e-4 --num_rollouts 32"
ALGO =
ALPHA =
BETA =
GAMMA =
DELTA =
MODEL =
SOURCE =
DATA =
OUT =
SEED =
STEPS =
RESUME =
CHECKPOINT =
PROMPT =
N =
TEMPERATURE =
RUNS =
ARGS =

# The interpreter; PY=python3 uses an environment of your own
PY = .venv/bin/python

# What each target reads. Any other variable on make's command line, a misspelt one for example, ends with an error
train_reads = ALGO ALPHA BETA GAMMA DELTA MODEL SOURCE DATA OUT SEED STEPS RESUME ARGS
data_reads = MODEL SOURCE DATA SEED ARGS
evaluate_reads = MODEL DATA SEED CHECKPOINT N ARGS
sample_reads = MODEL DATA SEED CHECKPOINT PROMPT N TEMPERATURE ARGS
plot_reads = RUNS OUT
report_reads = MODEL
bench_reads = MODEL ARGS
reads = PY $(foreach target,$(MAKECMDGOALS),$($(target)_reads))
given = $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
$(if $(filter-out $(reads),$(given)),$(error `make $(MAKECMDGOALS)` does not read $(filter-out $(reads),$(given)), only $(reads)))
needs = $(if $(filter sample evaluate,$(MAKECMDGOALS)),CHECKPOINT) $(if $(filter plot,$(MAKECMDGOALS)),RUNS)
$(foreach name,$(needs),$(if $($(name)),,$(error `make $(MAKECMDGOALS)` needs $(name)=, see `make help`)))
$(if $(filter-out 0 1,$(RESUME)),$(error RESUME is $(RESUME): give RESUME=1 to continue a run))

# $(call flag,OUT,--out) is --out 'VALUE' if OUT is given, else nothing; quotes in VALUE are escaped for the shell
flag = $(if $($(1)),$(2) '$(subst ','\'',$($(1)))')

# The first target, so that `make` alone shows what there is
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 16 | \
	  fold -s -w $${COLUMNS:-80}

# The main job. It creates its data on first use, so that one command is enough. ALGO is spo, best_of_n,
# ranked, dpo, hypo, ipo or slic
train: data  ## align the model: ALGO=spo ALPHA=0.01 (BETA GAMMA DELTA MODEL OUT SEED STEPS RESUME ARGS)
	@$(PY) spo.py $(call flag,ALGO,--algo) $(call flag,ALPHA,--alpha) $(call flag,BETA,--beta) \
	  $(call flag,GAMMA,--gamma) $(call flag,DELTA,--delta) $(call flag,MODEL,--model) $(call flag,DATA,--data) \
	  $(call flag,OUT,--out) $(call flag,SEED,--seed) $(call flag,STEPS,--steps) $(if $(filter 1,$(RESUME)),--resume) $(ARGS)

# What train reads; a folder that is complete stays as it is. SEED and ARGS of `make train` are not meant for it
data: .venv/ready  ## the SFT model and its preference data: MODEL=stories15M SOURCE=made
	@$(PY) prepare_data.py $(or $(MODEL),toy) $(call flag,DATA,--data) $(call flag,SOURCE,--source) \
	  $(if $(filter data,$(MAKECMDGOALS)),$(call flag,SEED,--seed) $(ARGS))

# A few seconds, apart from the other tests: the theorems are what a reader wants to see first
theory: .venv/ready  ## Theorems 1 to 4 as a table
	@$(PY) test_spo.py

# Everything, as CI runs it
test: .venv/ready  ## run all tests
	@$(PY) -m pytest -q test_spo.py extras/tests

# To read what a model writes is the first thing to do with it
sample: .venv/ready  ## print samples: CHECKPOINT=out/.../best.pt PROMPT="Once" N=3 TEMPERATURE=0.8
	@$(PY) model.py $(call flag,CHECKPOINT) $(call flag,PROMPT,--prompt) $(call flag,N,-n) $(call flag,TEMPERATURE,--temperature) \
	  $(call flag,SEED,--seed) $(if $(filter-out toy toy-naive,$(MODEL)),--tokenizer $(or $(DATA),data/$(MODEL))/tokenizer.model) $(ARGS)

# Training evaluates on few samples and picks the best: evaluate the pick again
evaluate: data  ## a checkpoint's win rate on fresh samples: CHECKPOINT=out/.../best.pt N=1000
	@$(PY) -m extras.judge $(call flag,CHECKPOINT) $(call flag,N,--n) $(call flag,MODEL,--model) $(call flag,DATA,--data) \
	  $(call flag,SEED,--seed) $(ARGS)

# Figures need matplotlib, which nothing else does
plot: .venv/matplotlib  ## win rate and KL against steps as plot.png: RUNS="out/a out/b" (OUT=plot.png)
	@$(PY) -m extras.tables $(RUNS) $(call flag,OUT,--out)

# The numbers of docs/results.md. Toy worlds are made by the report, one for each seed
report: $(if $(filter stories%,$(MODEL)),data) .venv/matplotlib  ## E.2's sweep and Table 1, hours; resumes (MODEL=toy-naive)
	@$(PY) -m extras.report $(call flag,MODEL,--model)

# The first comparison: both methods beyond their peaks, one seed
compare: data .venv/matplotlib  ## SPO and DPO side by side: a table and out/compare/compare.png, 4 minutes
	@$(PY) -m extras.report --compare

ablations: .venv/matplotlib  ## after `make report`: why SPO is stable, feedback, noise, sizes, hours; resumes
	@$(PY) -m extras.report --ablations

# The numbers of docs/performance.md; one thread, because shares of a core's peak are what compares
bench: .venv/ready  ## speed against this machine's limits (MODEL=stories15M)
	@$(PY) -m extras.bench $(call flag,MODEL,--model) --threads 1 $(ARGS)

# Not data/, which may hold verdicts that were paid for: remove a folder of it by hand
clean:  ## remove out/, the runs
	rm -rf out

# The environment, on first use
.venv/ready: requirements.txt
ifneq ($(filter .venv/%,$(PY)),)
	python3 -m venv .venv
	.venv/bin/python -m pip install -r requirements.txt
	@touch $@
endif

.venv/matplotlib: .venv/ready
ifneq ($(filter .venv/%,$(PY)),)
	.venv/bin/python -m pip install matplotlib==3.11.2
	@touch $@
endif

.PHONY: help train data theory test sample evaluate plot report compare ablations bench clean
