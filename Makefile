# Every target sets up .venv first. The stamp is named by what is to be installed, so a second call
# starts at once and a changed dependency installs itself.
#
#   PYTHON       the interpreter to build .venv with, 3.11 or newer (default: python3)
#   TORCH_INDEX  another package index for the torch step alone, for example PyTorch's CPU wheels
#   SUBMISSIONS  what `make grade` grades
#   ORDER        `make test ORDER=random` shuffles the tests and prints the seed; ORDER=<seed> repeats
#   WORKERS      processes of `make test` and `make check` (default: 2)
#   ARGS         passed on:  make run ARGS="--max-seconds 60"   make test ARGS="-k ssd -x"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
WORKERS ?= 2
ORDERED = $(if $(ORDER),--random-order $(patsubst %,--random-order-seed=%,$(filter-out random,$(ORDER))))

export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup run lite test check lab progress notebooks grade bench lint clean

help:  ## list the targets
	@echo "make TARGET [ARGS=\"...\"]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## install everything into .venv; the other targets do it on their own

run: $(STAMP)  ## watch the shipped model write, and a small one learn, in under three minutes
	$(BIN)/nemotron-lite run $(ARGS)

lite: $(STAMP)  ## train the shipped model anew, in about 80 minutes; the same call continues it
	$(BIN)/nemotron-lite train-lite $(ARGS)

# Workers and the kernels of their notebooks share the cores: idle threads give theirs back at once.
test check: export GOMP_SPINCOUNT ?= 100
test: $(STAMP)  ## run every test, on WORKERS processes (2); ORDER=random shuffles them
	$(BIN)/python -m pytest -n $(WORKERS) $(ORDERED) $(ARGS)

check: $(STAMP) lint  ## lint, and the fast tests: 4 minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests $(ORDERED) $(ARGS)

lab: $(STAMP)  ## copy the chapters to work/, or update the copies, and open them in JupyterLab
	$(BIN)/python -m nemotron_lite.course.lab $(ARGS)

progress: $(STAMP)  ## show which exercises and questions in work/ are done
	$(BIN)/python -m nemotron_lite.course.progress_report work

notebooks: $(STAMP)  ## execute chapters and clean them to be committed: ARGS="01 03", or all
	$(BIN)/python -m nemotron_lite.authoring.publish $(ARGS)

grade: $(STAMP)  ## grade a folder of submitted coursework: SUBMISSIONS=folder
	@test -n "$(SUBMISSIONS)" || { \
	  echo "Say which: make grade SUBMISSIONS=folder (exercises/README.md shows its layout)"; exit 1; }
	$(BIN)/python -m nemotron_lite.coursework.grade "$(SUBMISSIONS)" --out exercises/grades $(ARGS)

bench: $(STAMP)  ## measure, and write records under benchmarks/records
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(STAMP)  ## style of code and notebooks, types, and which module imports which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove .venv and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no '$(PYTHON)' here. Install Python 3.11 or newer, or say" \
	       "make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "'$(PYTHON)' is $$($(PYTHON) --version 2>&1); nemotron_lite needs Python 3.11 or newer." \
	       "Say make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Setting up $(VENV), once. torch is the large part."
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -e '.[lab,dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@
