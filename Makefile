# Everything from a clean checkout on Debian or Ubuntu: `make quickstart`, `make test`, `make bench`.
VENV ?= .venv
# the newest Python that torch has wheels for
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
RUN = $(VENV)/bin/
# a worker for each core, and one for Slurm, which needs about 1 GB; in the order of tests/conftest.py
PYTEST = $(RUN)python -m pytest --numprocesses auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

.PHONY: quickstart speedrun test alltests quicktest durations lint docs lock mutants bench

quickstart: $(VENV)/.installed
	$(RUN)ssl-bench experiment=quickstart

test: $(VENV)/.installed-test
	$(PYTEST) -m "not exhaustive"

# each night, and before a release: every method compiled, benchmarks and the fault campaign in small, too
alltests: $(VENV)/.installed-test
	$(PYTEST)

quicktest: $(VENV)/.installed-test
	$(PYTEST) -m "not slow and not seconds"

# which tests `make quicktest` leaves out, measured anew: tests/durations.json
durations: $(VENV)/.installed-test
	rm -f /tmp/durations.jsonl
	TEST_DURATIONS=/tmp/durations.jsonl $(PYTEST) -m "not exhaustive" || true  # a failed test costs, too
	$(RUN)python tests/durations.py /tmp/durations.jsonl

lint: $(VENV)/.installed-test
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

# site/index.html, which opens without a network; a link that leads nowhere is an error. The variable mutes an advertisement.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN)mkdocs build --strict

# the newest versions of everything that is needed to run, on any platform: requirements.lock, which Dockerfile installs
lock: $(VENV)/bin/python
	$(RUN)python -m pip install --quiet uv
	$(RUN)uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate \
		--extra search --extra timm --extra onnx --extra dashboard --extra huggingface --extra tensorboard --extra mlflow \
		--custom-compile-command "make lock" --output-file requirements.lock setup.cfg

# does the suite notice? small faults, one after the other, in a copy of the program: benchmarks/results/mutants.md
mutants: $(VENV)/.installed-test
	$(RUN)python tests/mutants/run.py --out benchmarks/results

# of use only on a machine that does nothing else meanwhile
bench: $(VENV)/.installed-bench
	$(RUN)python benchmarks/speed.py

# from nothing to an accuracy: the newest record, five seeds, on a machine that does nothing else meanwhile
speedrun: $(VENV)/.installed
	$(RUN)python benchmarks/speedrun.py

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found: apt-get install python3"; exit 1; }
	@# Debian and Ubuntu ship venv apart from Python
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		[ "$$(id -u)" = 0 ] && sudo= || sudo=sudo; \
		$$sudo apt-get update && $$sudo apt-get install -y "$$(basename $(PYTHON))-venv"; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.cfg pyproject.toml
	$(RUN)python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/python setup.cfg pyproject.toml
	$(RUN)python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/bin/python setup.cfg pyproject.toml
	$(RUN)python -m pip install --quiet --editable ".[docs]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(VENV)/bin/python setup.cfg pyproject.toml
	$(RUN)python -m pip install --quiet --editable ".[bench]"
	touch $@ $(VENV)/.installed
