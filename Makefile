# Two commands matter: `make demo` and `make test`. Both set up first; set-up is skipped once done.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test unit fuzz kills lint types serve lock clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup:  ## create .venv and .engine, or do nothing when they are up to date
	@$(PYTHON) -m serve.bootstrap

demo: setup  ## three days and two nights on the real parts
	@$(BIN)/nightschool demo

serve: setup  ## the OpenAI-compatible endpoint on 127.0.0.1:8000
	@$(BIN)/nightschool serve

test: setup lint types  ## everything CI runs
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

unit: lint  ## the tests that need no engine
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not engine and not slow"

fuzz: setup  ## 5,000 generated requests over the OpenAPI document
	@$(BIN)/python -m tests.serve.fuzz --cases 5000

kills: setup  ## the tests too long for `make test`: nights killed at every boundary and at 20 moments, two real engines
	@$(BIN)/python -m pytest -m slow

lint:
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types:
	@$(BIN)/pyright

lock:  ## renew requirements.lock from pyproject.toml (needs uv)
	uv pip compile --universal --python-version 3.11 --extra dev --extra train pyproject.toml \
	  -q --no-header --no-annotate -o requirements.lock
	sed -i -E '/^(torch|triton|nvidia-|cuda-)/d' requirements.lock
	sed -i '1i # Every package of .venv except torch, which serve/bootstrap.py chooses by machine. Renew with `make lock`.' requirements.lock

clean:  ## remove what set-up made (the data folder stays)
	rm -rf .venv .engine
