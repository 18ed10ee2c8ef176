# Each target sets up what it needs in .venv (once, and again when pyproject.toml or constraints.txt
# change), then runs. `make PYTHON=python3.12 test` chooses the Python that .venv is made with.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := .venv/bin

.PHONY: help demo test zoo examples lint format bench wheel clean

help:
	@echo "make demo     train on MNIST: BatchNorm against Batch Renormalization (DEMO_ARGS=--quick: a short run)"
	@echo "make test     all tests; without a GPU the kernels run in Triton's interpreter"
	@echo "make zoo      networks of torchvision, timm, MONAI and others train as with BatchNorm"
	@echo "make examples every program in examples/, a short run each"
	@echo "make lint     ruff and mypy"
	@echo "make format   ruff's formatting and safe fixes"
	@echo "make bench    times against torch.nn.BatchNorm and others (BENCH_ARGS=--quick: two inputs)"
	@echo "make wheel    build dist/*.whl"
	@echo "make clean    remove .venv and everything that was built"

demo: .venv/.demo
	$(BIN)/python -m triton_brn demo $(DEMO_ARGS)

test: .venv/.test,demo,bench,examples,zoo
	$(BIN)/python -m pytest $(PYTEST_ARGS)

zoo: .venv/.test,zoo
	$(BIN)/python -m pytest -m zoo $(PYTEST_ARGS)

examples: .venv/.test,examples
	$(BIN)/python -m pytest -s tests/test_examples.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.bench
	$(BIN)/python -m triton_brn bench $(BENCH_ARGS)
	$(BIN)/python -m pytest bench

wheel: .venv/.made
	rm -rf build dist
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks

.venv/.made:
	$(PYTHON) -m venv .venv || { echo "This Python cannot make virtual environments: Debian and Ubuntu need python3-venv." >&2; exit 1; }
	touch $@

# .venv/.EXTRAS: the project, editable, with these extras.
.venv/.%: pyproject.toml constraints.txt | .venv/.made
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@
