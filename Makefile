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

train_reads = ALGO ALPHA BETA GAMMA DELTA MODEL SOURCE DATA OUT SEED STEPS RESUME ARGS
data_reads = MODEL SOURCE DATA SEED ARGS
evaluate_reads = MODEL DATA SEED CHECKPOINT N ARGS
sample_reads = MODEL SEED CHECKPOINT PROMPT N TEMPERATURE ARGS
plot_reads = RUNS OUT
report_reads = MODEL
bench_reads = MODEL ARGS
given = $(foreach name,$(.VARIABLES),$(if $(findstring command,$(origin $(name))),$(name)))
unread = $(filter-out PY $(foreach goal,$(MAKECMDGOALS),$($(goal)_reads)),$(given))
$(if $(unread),$(error `make $(MAKECMDGOALS)` does not read $(unread). Settings: $(foreach goal,$(MAKECMDGOALS),$($(goal)_reads))))
$(if $(filter-out 0 1,$(RESUME)),$(error RESUME is $(RESUME): give RESUME=1 to continue a run))

# glibc gives the memory of large tensors back to the kernel and takes it again page by page: a fifth of a step of the
# 15M model. With these two it keeps what it has; other C libraries ignore them.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 2147483647

# The first target, so that `make` alone shows what there is
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 16

# The main job. It creates its data on first use, so that one command is enough
train: data  ## align the model: ALGO=spo ALPHA=0.01 (BETA GAMMA DELTA MODEL OUT SEED STEPS RESUME ARGS)
	@$(PY) spo.py $(if $(ALGO),--algo "$(ALGO)") $(if $(ALPHA),--alpha "$(ALPHA)") $(if $(BETA),--beta "$(BETA)") \
	  $(if $(GAMMA),--gamma "$(GAMMA)") $(if $(DELTA),--delta "$(DELTA)") $(if $(MODEL),--model "$(MODEL)") \
	  $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)") $(if $(SEED),--seed "$(SEED)") \
	  $(if $(STEPS),--steps "$(STEPS)") $(if $(filter 1,$(RESUME)),--resume) $(ARGS)

# What train reads; a folder that is complete is left as it is. ARGS and SEED of train are not for it
data: .venv/ready  ## the SFT model and its preference data: MODEL=stories15M SOURCE=made
	@$(PY) prepare_data.py $(or $(MODEL),toy) $(if $(DATA),--data "$(DATA)") $(if $(SOURCE),--source "$(SOURCE)") \
	  $(if $(filter data,$(MAKECMDGOALS)),$(if $(SEED),--seed "$(SEED)") $(ARGS))

# A few seconds, apart from the other tests: the theorems are what a reader wants to see first
theory: .venv/ready  ## Theorems 1 to 4 as a table
	@$(PY) test_spo.py

# Everything, as CI runs it
test: .venv/ready  ## run all tests
	@$(PY) -m pytest -q test_spo.py extras/tests

# To read what a model writes is the first thing to do with it
sample: .venv/ready  ## print samples: CHECKPOINT=out/.../best.pt PROMPT="Once" N=3 TEMPERATURE=0.8
	@$(PY) model.py $(if $(CHECKPOINT),"$(CHECKPOINT)") $(if $(PROMPT),--prompt "$(PROMPT)") $(if $(N),-n "$(N)") \
	  $(if $(TEMPERATURE),--temperature "$(TEMPERATURE)") $(if $(SEED),--seed "$(SEED)") \
	  $(if $(filter-out toy%,$(MODEL)),--tokenizer "data/$(MODEL)/tokenizer.model") $(ARGS)

# Training evaluates on few samples and picks the best: evaluate the pick again
evaluate: data  ## a checkpoint's win rate on fresh samples: CHECKPOINT=out/.../best.pt N=1000
	@$(PY) -m extras.judge $(if $(CHECKPOINT),"$(CHECKPOINT)") $(if $(N),--n "$(N)") $(if $(MODEL),--model "$(MODEL)") \
	  $(if $(DATA),--data "$(DATA)") $(if $(SEED),--seed "$(SEED)") $(ARGS)

# Figures need matplotlib, which nothing else does
plot: .venv/ready  ## win rate and KL against steps as plot.png: RUNS="out/a out/b" (OUT=plot.png)
	@$(if $(filter .venv/%,$(PY)),$(PY) -m pip install -q matplotlib==3.11.2)
	@$(PY) -m extras.report --plot $(RUNS) $(if $(OUT),--out "$(OUT)")

# The numbers of docs/results.md
report: data  ## Table 1 and Figure 1 on the toy world, about an hour (MODEL=toy-naive)
	@$(if $(filter .venv/%,$(PY)),$(PY) -m pip install -q matplotlib==3.11.2)
	@$(PY) -m extras.report $(if $(MODEL),--model "$(MODEL)")

ablations: data  ## one setting of SPO changed at a time, about 10 minutes
	@$(PY) -m extras.report --ablations

# The numbers of docs/performance.md; one thread, because shares of a core's peak are what compares
bench: .venv/ready  ## speed against this machine's limits (MODEL=stories15M)
	@$(PY) -m extras.bench $(if $(MODEL),--model "$(MODEL)") --threads 1 $(ARGS)

# out/ holds runs and data/ may hold verdicts that were paid for: both are removed only on request
clean:  ## remove data/ and out/
	rm -rf data out

# The environment, on first use
.venv/ready: requirements.txt
ifneq ($(filter .venv/%,$(PY)),)
	python3 -m venv .venv
	.venv/bin/python -m pip install -r requirements.txt
	@touch $@
endif

.PHONY: help train data theory test sample evaluate plot report ablations bench clean
