# Everything a person needs from a fresh clone. `make` alone lists the targets.
SLIPSTREAM := .venv/bin/slipstream
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
BENCH := $(addprefix examples/,$(addsuffix .yaml,fashion fashion-compared fashion-keras onnx-model sentiment scenes-detection scenes-segmentation))
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-docker test-k8s lint images bench lock clean

help: ## List the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: ## Install: one virtual environment per framework (again only where something changed)
	@scripts/setup

demo: setup ## Optimize and release the example, live, and show its report
	@$(SLIPSTREAM) up
	@$(SLIPSTREAM) run examples/fashion.yaml --watch || code=$$?; $(SLIPSTREAM) report fashion; exit $${code:-0}

lint: setup ## Lint, spelling and types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@git ls-files -z | xargs -0 .venv/bin/codespell
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-logo
	@.venv/bin/hadolint --no-color containers/*/Dockerfile

test: lint ## Lint, types and tests; `make test-torch` runs one part of the tests
	@.venv/bin/python scripts/test.py

test-slow: setup ## Tier: the tests that take longest (minutes); CI runs them too
	@.venv/bin/python scripts/test.py slow

test-docker: setup ## Tier: build the container images, test them, and run steps in containers (minutes)
	@.venv/bin/python scripts/test.py images docker kfp

test-k8s: setup ## Tier: chart, steps and traffic in the cluster that KUBECONFIG names (minutes)
	@.venv/bin/python scripts/test.py k8s

images: setup ## Build the container images; docs/containers.md says how to build some
	@.venv/bin/python scripts/images.py

test-%: setup
	@.venv/bin/python scripts/test.py $*

bench: setup ## Measure the engines of the examples that were run: against eager, and against their own FP32
	@$(SLIPSTREAM) bench $(BENCH) --out docs/benchmark.md

lock: setup ## Resolve the pins of all environments again
	@scripts/lock

clean: ## Stop the platform; remove its state and the environments
	@if [ -x $(SLIPSTREAM) ]; then $(SLIPSTREAM) down; fi
	rm -rf .venv .envs .slipstream
