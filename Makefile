# Each command does its own set-up: a fresh machine needs make and python3 (>= 3.11) with venv, nothing else.
PYTHON_IN := .venv/bin/python
READY := .venv/.ready
NAME ?= stream
WORKERS ?= 2

export HF_HUB_OFFLINE ?= 1

.PHONY: help stream test lint bench peers readme clean

help:
	@echo "make stream             the main job: a video in, an accelerated diffusion stream out, and what it cost"
	@echo "make test               every test"
	@echo "make lint               ruff and pyright"
	@echo "make bench NAME=stream  one benchmark, written to benchmarks/results/"
	@echo "make peers              the isolated environments of other people's software that benchmarks compare with"
	@echo "make readme             README's tables and pictures from benchmarks/results/"
	@echo "make clean              removes what the commands made (out/, .venv/, .peers/)"

$(READY): pyproject.toml .ci/setup
	@sh .ci/setup
	@touch $@

stream: $(READY)
	@$(PYTHON_IN) -m fastdiff_app.cli stream --demo

test: $(READY)
	@$(PYTHON_IN) -m pytest -n $(WORKERS) --dist loadfile

lint: $(READY)
	@$(PYTHON_IN) -m ruff check .
	@$(PYTHON_IN) -m ruff format --check .
	@$(PYTHON_IN) -m pyright

bench: $(READY)
	@$(PYTHON_IN) -m fastdiff_app.cli bench $(NAME) --json benchmarks/results/$(NAME).json

peers: $(READY)
	@$(PYTHON_IN) -m benchmarks.peers.environments

readme: $(READY)
	@$(PYTHON_IN) -m benchmarks.readme
	@$(PYTHON_IN) -m benchmarks.card
	@$(PYTHON_IN) -m benchmarks.more_cards

clean:
	rm -rf out .venv .peers
