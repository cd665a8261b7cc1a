# make demo: everything, offline, on a small real data set.   make test: the test suite.
# make data, make shards: mini-imagenet (7 GB) and its tar shards.   make help: the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
UV_VERSION := 0.13.9

SRC ?= mini-imagenet
OUT ?= data
SHARDS_OPTIONS ?=
# Threads that wait for others sleep: by default they spin, which takes cores from the other tests.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal
PYTEST_OPTIONS ?=

# What a machine with torch, torchvision, timm and click alone lacks for a training.
CARRIED := timm simplejpeg braceexpand xxhash tqdm tensorboard absl-py protobuf
CARRIED_PYTHON ?= 3.12

.PHONY: help install demo test test-quick torture lint data shards carried clean

help:
	@echo "make demo        convert, train and evaluate on a small real data set, offline"
	@echo "make test        all tests (make test-quick: those that take a moment)"
	@echo "make data        download timm/mini-imagenet (7 GB)"
	@echo "make shards      images in SRC=$(SRC) to tar shards in OUT=$(OUT)"
	@echo "make torture     kill and resume a run dozens of times, compare bit for bit"
	@echo "make carried     packages for tools/bench/bench_step.py on a GPU without a network"
	@echo "make lint        checks of lint, format and types"
	@echo "make clean       delete the demo's folder"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "Python %d.%d found, 3.11 or newer needed. Name one: make PYTHON=python3.11" % v[:2])'
	@echo "Installing into $(VENV) (once; torch is large, so this takes a while)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  $(if $(UV_DEFAULT_INDEX),--index-url $(UV_DEFAULT_INDEX)) uv==$(UV_VERSION)
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python \
	  -r requirements-dev.txt --editable .
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python tools/make_sample.py demo/digits
	@$(MAKE) --no-print-directory shards SRC=demo/digits OUT=demo/data
	$(BIN)/wds-convnext train --recipe digits --shards 'demo/data/train-<000..002>.tar' \
	  --out demo/runs/digits --overwrite
	$(BIN)/wds-convnext eval --checkpoint demo/runs/digits --shards 'demo/data/test-<000..001>.tar'
	@echo
	@echo "The accuracy above is on the test split, which training never saw."
	@echo "The run is in demo/runs/digits. Its curves: $(BIN)/tensorboard --logdir demo/runs"
	@echo "The article's run on mini-imagenet (7 GB; wants a GPU):"
	@echo "  make data && make shards"
	@echo "  $(BIN)/wds-convnext train --shards 'data/train-<000..012>.tar'"

test: $(INSTALLED)
	@$(PYTEST) $(PYTEST_OPTIONS)

test-quick: $(INSTALLED)
	@$(PYTEST) -m "not slow"

carried: $(INSTALLED)
	@$(BIN)/uv pip install --quiet --no-deps --only-binary :all: --python-version $(CARRIED_PYTHON) \
	  --target carried $(CARRIED)

torture: $(INSTALLED)
	@$(BIN)/python tools/make_sample.py demo/digits
	@$(BIN)/python tools/torture.py demo/digits

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

data: $(INSTALLED)
	@$(BIN)/python tools/download_data.py

shards: $(INSTALLED)
	$(BIN)/python tools/make_shards.py $(SRC) --out $(OUT) $(SHARDS_OPTIONS)

clean:
	rm -rf demo
