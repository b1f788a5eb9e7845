# Two commands matter: `make demo` and `make test`. PYTHON chooses the interpreter, ARGS goes to the command.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup setup-dev setup-builder demo demo-text test test-devices test-board-boot check bench lock clean

setup: .venv/.run

demo: setup
	@$(BIN)/kinflow demo $(ARGS)

# A language model; built first where it is not there, from published weights, without training.
demo-text: setup families/smollm2/bundle
	@$(BIN)/kinflow demo-text $(ARGS)

families/smollm2/bundle:
	@$(MAKE) --no-print-directory .venv/.text
	@$(BIN)/kinflow build families/smollm2

# As root a worker for each core, each on a network of its own; else one after the other. In the files' order: the
# longest come first.
test: setup-dev setup-builder
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# Emulated boards (docs/boards.md): root, Debian or Ubuntu.
test-devices: setup-dev
	sh devices/test.sh $(ARGS)

# A whole emulated machine with systemd; slower.
test-board-boot: setup-dev
	$(BIN)/python -m pytest devices/tests/boot.py -s --timeout 3600 $(ARGS)

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	@for name in local offload throughput footprint; do $(BIN)/kinflow bench $$name $(ARGS) || exit 1; done

setup-dev: .venv/.dev

# The builder's tests need a CPU build of torch; where none is to be had for this Python they are skipped.
setup-builder: .venv/.builder

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 13) and f"Python 3.10 to 3.13 is needed, {v[0]}.{v[1]} is here: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv

.venv/.run: locks/run.txt pyproject.toml | .venv/bin/python
	@echo "setting up .venv (once)"
	@$(PIP) install --quiet -r locks/run.txt
	@$(PIP) install --quiet --no-deps -e .
	@touch $@

# A text family is built of trained branches: no torch.
.venv/.text: locks/text.txt .venv/.run
	@$(PIP) install --quiet -r locks/text.txt
	@touch $@

.venv/.dev: locks/dev.txt .venv/.run
	@$(PIP) install --quiet -r locks/dev.txt
	@touch $@

.venv/.builder: locks/builder.txt .venv/.dev
	@$(PIP) install --quiet -r locks/builder.txt || echo "no CPU build of torch for this Python: the builder's tests will be skipped"
	@touch $@

# Needs uv. One file for all supported Pythons and processors; torch is pinned by hand to its CPU build.
lock:
	uv pip compile --quiet --universal --python-version 3.10 --no-emit-index-url --no-header pyproject.toml --extra tflite --extra bench -c locks/constraints.txt -o locks/run.txt
	uv pip compile --quiet --universal --python-version 3.10 --no-emit-index-url --no-header pyproject.toml --extra dev -c locks/run.txt -o locks/dev.txt
	uv pip compile --quiet --universal --python-version 3.10 --no-emit-index-url --no-header pyproject.toml --extra builder-text -c locks/run.txt -o locks/text.txt
	uv pip compile --quiet --universal --python-version 3.10 --no-emit-index-url --no-header locks/builder.in -c locks/run.txt -c locks/text.txt -o locks/builder.txt
	echo "torch==2.13.0+cpu" >> locks/builder.txt

clean:
	rm -rf .venv
