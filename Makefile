# Two commands matter: `make demo` trains on the built-in data, `make test` runs the tests. Both set up .venv.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO := --preset gut-small
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest
TEST_LOG := .venv/test-ray.log
.PHONY: install demo test test-ray test-other lint clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	rm -rf demo
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python jobs/pipeline.py --output-dir demo $(DEMO)
	@echo "That was SYNTHETIC data. The curves:   .venv/bin/tensorboard --logdir demo"
	@echo "Your own data next:                    .venv/bin/python jobs/pipeline.py --help"

# Two processes: tests with Ray wait for processes to start most of the time, in which the others find a CPU. The
# output of the first is shown when both have ended.
test: install
	$(MAKE) --jobs=2 --no-print-directory test-ray test-other RAY_LOG=$(TEST_LOG); \
	code=$$?; cat $(TEST_LOG); exit $$code

test-ray: install
	$(PYTEST) -m ray $(if $(RAY_LOG),> $(RAY_LOG) 2>&1)

test-other: install
	$(PYTEST) -m "not ray"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv demo runs
