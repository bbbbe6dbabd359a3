# Every target makes its own environment: `make test` and `make quickstart` work on a fresh machine with Python and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart

.PHONY: quickstart test check format docs benchmark-gpu clean

quickstart: $(VENV)/installed
	$(BIN)/vit-linearizer quickstart --out $(OUT)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# On a machine with a CUDA device: the kernels' tests, then every figure of docs/benchmarks.md that needs one.
benchmark-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --editable ".[gpu]"
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python benchmarks/scan_gpu.py --out benchmarks/results/scan-gpu-bf16.json
	for preset in imagenet ade20k cityscapes long; do \
		$(BIN)/vit-linearizer benchmark --device cuda --precision bf16 --attention fused eager --preset $$preset \
			--out benchmarks/results/gpu-$$preset || exit 1; done
	$(BIN)/vit-linearizer benchmark --device cuda --precision bf16 --attention fused eager --train --batch-size 128 \
		--image-sizes 224 --out benchmarks/results/gpu-training
	$(BIN)/python benchmarks/write_docs.py

docs: $(VENV)/installed-docs
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs build dist site .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@ $(VENV)/installed
