# Two commands need nothing but Python 3.11 to 3.13, pip and make:
#
#   make demo     install into .venv, then train, export, encode and search on made-up images
#   make test     the same with what the tests need, then run them
#
#   make demo PYTHON=python3.12                      another Python
#   make demo EXTRAS=gpu,export,serve                on an NVIDIA machine (after `make clean`)
#   make test ARGS='-k codes'                        arguments for pytest (or for `vsc demo`)

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
EXTRAS = cpu,export,serve
ARGS =
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

help:
	@sed -n 's/^#   //p' Makefile
	@echo 'make lint types imports wheel container photos   one part of `bash .ci/run`'
	@echo 'make clean    remove .venv, caches and what the demo made'

demo: $(VENV)/installed
	$(BIN)/vsc demo --force $(ARGS)

test: $(VENV)/developed
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/developed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/developed
	$(BIN)/mypy

imports: $(VENV)/developed
	PYTHONPATH=.:training:export $(BIN)/lint-imports

# Everything that only a GPU can show, in under nine minutes; docs/gpu.md. On a CPU: ARGS=--dry
gpu: $(VENV)/developed
	$(BIN)/python -m benchmarks.gpu $(ARGS)

wheel container photos: $(VENV)/developed
	bash .ci/run $@

install: $(VENV)/developed

# An editable install: a change of the code needs no second one.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else "make: vsc-serve needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d. Give another: make PYTHON=python3.12" % v[:2])'
	@echo 'Installing into $(VENV): a minute or two, once.'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/developed: $(VENV)/installed
	@echo 'Installing what the tests need.'
	@$(PIP) --editable '.[$(EXTRAS),dev]'
	@touch $@

# The model that comes with the package, from the photographs that docs/development.md names.
builtin: $(VENV)/installed
	mkdir -p build && tar -xJf $(VSC_DATA)/photos.tar.xz -C build
	$(BIN)/vsc train build/photos --out build/photos32 --force --threads 1 --set hidden=256 --set latent_dim=256 \
		--set alpha=0.06 --set steps=4000 --set validation_share=0.05
	$(BIN)/vsc export build/photos32 --out vsc_serve/models/photos32 --force --name photos32 \
		--about vsc_serve/models/photos32.md

clean:
	rm -rf $(VENV) vsc-demo dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find vsc_serve training export tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help demo test lint types imports gpu wheel container photos builtin install clean
