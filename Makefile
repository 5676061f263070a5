# make demo   the four scripts on the bundled miniature: pictures and a table under outputs/
# make test   the tests, offline
# make check  ruff, ruff format, mypy
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format clean
demo: .venv/installed
	$(BIN)/python examples/demo.py --output_dir outputs/demo

test: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv outputs
