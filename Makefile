# From a bare Python 3.11 with pip: `make bench` and `make test` make their own environment.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: bench test web-test demo gpu fuzz compile-baseline clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

bench: $(VENV)/.ready
	$(BIN)/python bench/run.py --suite quick --out bench/out

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests

# The page of `igpt web` in Debian's chromium (apt-get install chromium chromium-driver); screenshots in build/web.
web-test: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check selenium
	$(BIN)/python -m pytest -q -x tests/browser.py

# On a machine with a GPU and its own torch and triton: no environment is made, nothing is installed.
gpu:
	$(PYTHON) -m bench.gpu $(if $(HALF),--half $(HALF)) --out bench/out

# The readers of checkpoints against 5,000 mutated files, new ones each time.
fuzz: $(VENV)/.ready
	IGPT_FUZZ=5000 $(BIN)/python -m pytest -q tests/test_fuzz_readers.py

# Renews bench/compiled/baseline.jsonl: on purpose, and looking at its diff.
compile-baseline: $(VENV)/.ready
	$(BIN)/python -m bench.compiled --renew

demo: $(VENV)/.ready
	$(BIN)/python -m igpt demo

clean:
	rm -rf $(VENV) build dist *.egg-info bench/out
