# `make train` and `make test` work on a machine that has nothing but Python 3.11 or later and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Arguments for the commands: make train ARGS="--epochs=5", make test ARGS="-k layers".
ARGS ?=
WORKERS ?= 2
# A worker that dies fails the run; with another in its place xdist can wait for ever.
SPREAD = -n $(WORKERS) --max-worker-restart 0

.PHONY: train test slow lint docs clean

train: $(VENV)/.installed
	$(BIN)/nfnet train $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SPREAD) --dist loadfile -m "not slow" $(ARGS)
	KERAS_BACKEND=jax $(BIN)/python -m pytest $(SPREAD) --dist loadfile -m "not slow" $(PORTABLE) $(ARGS)
	KERAS_BACKEND=torch $(BIN)/python -m pytest $(SPREAD) --dist loadfile -m "not slow" $(PORTABLE) $(ARGS)

# What runs on every backend is tested on every backend.
PORTABLE := tests/layers tests/optimizers tests/test_model.py tests/test_sam.py tests/test_compile.py \
	tests/test_complexity.py tests/applications/test_parity.py \
	tests/checkpoints/test_haiku.py tests/checkpoints/test_loading.py tests/checkpoints/test_stem.py

# The same of what takes long to compile.
LATER := tests/test_remat.py tests/test_folding.py tests/diagnostics tests/exporting \
	tests/applications/test_nfnet.py tests/applications/test_battery.py

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SPREAD) --dist loadfile --no-loadscope-reorder -m slow tests $(ARGS)
	KERAS_BACKEND=jax $(BIN)/python -m pytest $(SPREAD) --dist worksteal -m slow tests/applications/test_parity.py $(ARGS)
	KERAS_BACKEND=torch $(BIN)/python -m pytest $(SPREAD) --dist worksteal -m slow tests/applications $(ARGS)
	KERAS_BACKEND=jax $(BIN)/python -m pytest $(SPREAD) --dist worksteal -m "not slow" $(LATER) $(ARGS)
	KERAS_BACKEND=torch $(BIN)/python -m pytest $(SPREAD) --dist worksteal -m "not slow" $(LATER) $(ARGS)

docs: $(VENV)/.installed-test
	$(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.installed-test
	$(BIN)/pip install --quiet -e ".[dev]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "nfnet-keras needs Python 3.11 or later; name one: make train PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
