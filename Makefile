# SPO, arXiv 2405.00747. `make` alone prints the targets.
#
# Any setting of spo.py can be given, in capitals; what is not given is not passed on:
#     make train ALGO=spo ALPHA=0.01
#     make train ALGO=dpo BETA=0.1 SEED=1 STEPS=1500
# RESUME=1 goes on from the run's last checkpoint, RANKS=2 shares the work among two processes or GPUs,
# COMPILE=1 compiles the sampling.
# PY=python3 uses the interpreter at hand, not .venv.

PY = .venv/bin/python
READY = $(if $(filter .venv/%,$(PY)),.venv/ready)
SETTINGS = ALGO ALPHA BETA GAMMA DELTA R K MODEL DATA INIT TOKENIZER OUT SEED STEPS BATCH LR WARMUP \
           MICRO MAX_NEW EVAL_EVERY EVAL_STORIES LOG_EVERY DEVICE DTYPE KL JUDGE
# what the environment calls by one of these names is not meant for us
$(foreach s,$(SETTINGS) PAIRS MORE N CHECKPOINT RESUME RANKS THREADS COMPILE,$(eval $s =))
flag = --$(if $(filter R,$1),R,$(shell echo $1 | tr A-Z a-z))
given = $(foreach s,$(SETTINGS),$(if $($s),$(call flag,$s) $($s))) $(if $(RESUME),--resume) $(if $(COMPILE),--compile)

# print this
help:
	@grep -B1 -E '^[a-z]+:' Makefile | grep -v '^--' | sed 'N;s/# \(.*\)\n\([a-z]*\):.*/make \2\t\1/' | expand -t 16

# align the story writer, e.g. ALGO=spo ALPHA=0.01
train: data
	@$(PY) $(if $(RANKS),-m torch.distributed.run --standalone --nproc_per_node $(RANKS)) spo.py $(strip $(given))

# make what train needs, once: the toy world, or MODEL=stories15M PAIRS=made
data: $(READY)
	@$(PY) prepare_data.py $(or $(MODEL),toy) $(if $(DATA),--data $(DATA)) $(if $(PAIRS),--source $(PAIRS)) $(MORE)

# Table 1 and Figure 1 on the toy world, or MODEL=toy-naive: an hour
report: data
	@$(if $(READY),$(PY) -m pip install -q matplotlib==3.11.2)
	@$(PY) report.py $(if $(MODEL),--model $(MODEL))

# one setting of SPO changed at a time, and the KL's estimators: 10 minutes
questions: data
	@$(PY) report.py --questions

# a checkpoint's win-rate: CHECKPOINT=out/.../best.pt JUDGE=llm N=1000
evaluate: data
	@$(PY) evaluate.py $(CHECKPOINT) $(if $(N),--n $(N)) $(strip $(given))

# seconds, tokens per second and share of this machine's peak
bench: $(READY)
	@for m in toy stories260K stories15M; do $(PY) bench.py --model $$m --threads $(or $(THREADS),1) || exit; done

# run every test
test: $(READY)
	@$(PY) -m pytest -q test_spo.py

# print Theorems 1 to 4 as a table
theory: $(READY)
	@$(PY) test_spo.py

# remove data/ and out/
clean:
	rm -rf data out

# the environment, on first use
.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	@touch $@

.PHONY: help train data report questions evaluate bench test theory clean
