# `make demo` runs the main job, `make test` the tests, `make lint` the checks of style and types,
# `make smoke` the making of a model, small.
# Each sets up a virtual environment of its own on first use.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
CORES  ?= 2
RUN    := $(VENV)/.run-ready
DEV    := $(VENV)/.dev-ready

.PHONY: demo test smoke lint format clean

demo: $(RUN)
	$(BIN)/python -m agent run examples/question.wav reply.wav --trace trace.json

test: $(DEV)
	$(BIN)/python -m pytest -m 'not (broker or realtime)' --numprocesses $(CORES) --dist loadfile
	$(BIN)/python -m pytest -m broker --numprocesses $(CORES) --dist loadfile
	$(BIN)/python -m pytest -m realtime

# The whole chain of recipes on a few recordings, from nothing to a model: some five minutes.
smoke: $(DEV)
	rm -rf build/smoke
	$(BIN)/python -m recipes all smoke --work build/smoke

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable .
	$(PIP) install --quiet --no-deps torchfcpe==0.0.4
	touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --no-deps torchfcpe==0.0.4
	$(PIP) install --quiet --no-deps speechmos==0.0.1.1
	-$(PIP) install --quiet --no-deps pipecat-ai==1.14.0  # Python 3.11 and later; its tests skip
	touch $@ $(RUN)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
