# `make demo` and `make test` need python3 (>= 3.11) and nothing else: the first run makes .venv.
PYTHON ?= python3
# Constraints for pip. With a GPU: `make demo CONSTRAINTS=` takes the ordinary torch build (choose at the first make;
# `make distclean` to choose again).
CONSTRAINTS ?= constraints-cpu.txt
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=

# Which benchmarks to run (all where empty): network, data, preparation, epochs, slide, int8, recommended, scaling.
PARTS ?=

# What the demo runs on: nothing (a synthetic cohort), or a folder of real sections, and where its results go.
DATA ?=
SECTIONS ?= C2,C3,C4,C5
OUT ?= build/demo$(if $(DATA),-data)

BIN := .venv/bin
HIFUSION := $(BIN)/hifusion
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help venv demo bench docs test lint types format clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(READY)  ## .venv with torch, the package and its tools (again only when their lists change)

# torch goes first and alone: the CPU index is then asked for one package only, and where it cannot be reached pip goes
# on with what its own configuration offers.
$(READY): pyproject.toml $(CONSTRAINTS)
	@echo "installing into .venv: about 3 GB, some three minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifneq ($(strip $(CONSTRAINTS)),)
	$(BIN)/python -m pip install -q --retries 1 --no-deps -c $(CONSTRAINTS) --extra-index-url $(TORCH_INDEX) torch
endif
	$(BIN)/python -m pip install -q $(if $(strip $(CONSTRAINTS)),-c $(CONSTRAINTS)) -e '.[dev]'
	@touch $@

demo: $(READY)  ## raw data to report and gene maps; DATA=folder for real sections, OUT=folder for the results
ifeq ($(strip $(DATA)),)
	test -d $(OUT)/raw || $(HIFUSION) synth $(OUT)/raw
	$(HIFUSION) prepare $(OUT)/raw $(OUT)/store --recipe tiny
	$(HIFUSION) evaluate --data $(OUT)/store --protocol leave_one_patient_out --model hifusion --recipe tiny -o $(OUT)/evaluation
else
	$(HIFUSION) prepare $(DATA) $(OUT)/store --sections $(SECTIONS)
	$(HIFUSION) evaluate --data $(OUT)/store --protocol first_section -o $(OUT)/evaluation
endif
	$(HIFUSION) plot $(OUT)/evaluation -o $(OUT)/maps.png
	@echo "report: $(OUT)/evaluation/report.md   gene maps: $(OUT)/maps.png"

bench: $(READY)  ## speed against the published recipe and the processor (quiet machine, 15 minutes); PARTS=network,...
	$(BIN)/python -m benchmarks $(if $(strip $(PARTS)),--parts $(PARTS))

docs: $(READY)  ## the documentation as HTML in build/docs, warnings as errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

test: lint types  ## lint, types and the fast tests (PYTEST_ARGS="-m slow" for the slow ones)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)  ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/mypy

format: $(READY)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove results and caches
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf .venv
