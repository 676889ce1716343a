# Two commands for a newcomer: `make demo` and `make test`. PYTHON chooses the interpreter that .venv is made from.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Whose reader has to read our data, and the other side of the data's benchmark. Its dependencies are not needed for that.
MEGATRON := megatron-core==0.16.1

.PHONY: demo test test-full chaos bench lint clean

demo: $(VENV)/.installed
	./launch_scripts/demo.sh

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow"

# On a machine where SLURM (Debian: slurm-wlm, munge) cannot run: `make test-full MEGAMTP_REQUIRE_SLURM=`.
test-full: export MEGAMTP_REQUIRE_SLURM ?= 1
test-full: $(VENV)/.installed-test
	MEGAMTP_REQUIRE_CHROMIUM=1 $(BIN)/python -m pytest

chaos: $(VENV)/.installed-test
	$(BIN)/python -m pytest -s -m chaos tests/chaos

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/preprocess.py
	$(BIN)/python benchmarks/dataset.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/pipeline_balance.py
	$(BIN)/python benchmarks/heads_memory.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/checkpoint.py
	[ ! -d runs/demo ] || $(BIN)/python benchmarks/decode.py runs/demo --text data/demo/validation.jsonl

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A stamp, written last: an interrupted set-up is done again.
$(VENV)/.installed: setup.py requirements/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/cpu.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/cpu.txt -e .[cpu,plot,data]
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/cpu.txt -e .[cpu,plot,data,data-formats,test]
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MEGATRON)
	touch $@

clean:
	rm -rf $(VENV) data/demo runs/demo
