# The environment is created if it is missing or older than the files that it is created from. READY marks a folder as
# made here; it is older than those files until the packages of the demo are installed. No other folder is replaced or
# deleted. DEV marks that the packages for tests and development are installed, too, and DOCS those for the site.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev
DOCS := $(VENV)/.ready-docs
UV := $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),uv pip install --quiet --python $(RUN),$(RUN) -m pip install --quiet)
# For a machine without a GPU: the package index with torch's CPU wheels, from PyTorch's installation page. It saves 5 GB.
TORCH_INDEX ?=

# The networks of the demo and the tests are so small that a second thread costs more than it gains.
export OMP_NUM_THREADS ?= 1
# If this is set, each of the tests' many processes compiles torch and timm again, for most of a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test fuzz test-slow test-floors test-portable docs docs-test test-slurm test-netns lint soak reproduce clean
setup: $(DEV)

$(READY): pyproject.toml constraints.txt
	@if [ -e $(VENV) ] && [ ! -e $(READY) ]; then \
		echo "setup: $(VENV) was not made by make: move it away" >&2; exit 1; \
	fi
	@echo "setup: creating $(VENV) with $(if $(UV),uv,pip (several minutes))"
	@$(if $(UV),uv venv --quiet --clear --python $(PYTHON),$(PYTHON) -m venv --clear) $(VENV) && touch -t 200001010000 $@
	@[ -z "$(TORCH_INDEX)" ] || \
		$(INSTALL) --constraint constraints.txt --no-deps --index-url "$(TORCH_INDEX)" torch torchvision
	@$(INSTALL) --constraint constraints.txt --editable '.[demo]'
	@touch $@

$(DEV): $(READY)
	@echo "setup: adding the packages for tests to $(VENV)"
	@$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	@$(RUN) -m indistill demo

# Four processes also on two cores: the tests wait for half of the time. Each takes more than 1 GB.
test: $(DEV) lint
	@$(RUN) -m pytest --numprocesses 4 --dist worksteal

# Run the long tests that `make test` leaves out; most are variants of others.
test-slow: $(DEV)
	@$(RUN) -m pytest -m slow --numprocesses 4 --dist worksteal

# Feed each parser mutated input for FUZZ_SECONDS. `make test` runs a few dozen inputs of each.
FUZZ_SECONDS ?= 60
fuzz: $(DEV)
	@FUZZ_SECONDS=$(FUZZ_SECONDS) $(RUN) -m pytest tests/fuzz --numprocesses 4 $(ARGS)

# Run the core of the tests with the lowest versions that pyproject.toml allows, in an environment of its own (6 GB).
FLOORS := .venv-floors
CORE := tests/config tests/models tests/data tests/commands tests/hostile \
	$(patsubst %,tests/training/test_%.py,loop checkpoint optim guard feature_runs teachers unlabelled)
$(FLOORS)/.ready: pyproject.toml tests/project/floors.py
	@if command -v uv >/dev/null 2>&1; then \
		echo "test-floors: creating $(FLOORS) with uv" && \
		uv venv --quiet --clear --python $(PYTHON) $(FLOORS) && \
		uv pip install --quiet --python $(FLOORS)/bin/python --resolution lowest-direct --editable '.[dev]'; \
	else \
		echo "test-floors: creating $(FLOORS) with pip (several minutes)" && \
		$(PYTHON) -m venv --clear $(FLOORS) && \
		$(PYTHON) tests/project/floors.py > $(FLOORS)/constraints.txt && \
		$(FLOORS)/bin/python -m pip install --quiet --constraint $(FLOORS)/constraints.txt --editable '.[dev]'; \
	fi
	@touch $@

test-floors: $(FLOORS)/.ready
	@$(FLOORS)/bin/python -m pytest $(CORE) --numprocesses 4 --dist worksteal

# Run the tests marked `portable` with the arithmetic of other processors. Each value of each variable occurs at least
# once; a variable that is not named has the processor's own value. Torch's cache of compiled code is disabled, because
# it does not distinguish these settings.
PORTABLE := "OMP_NUM_THREADS=1" "OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2" \
	"OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE"
test-portable: $(DEV)
	@failed=0; outcomes=; \
	for values in $(PORTABLE); do \
		echo "test-portable: $$values"; outcome=passed; \
		env -u ATEN_CPU_CAPABILITY -u ONEDNN_MAX_CPU_ISA -u MKL_CBWR $$values \
			TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 $(RUN) -m pytest -m portable \
			--numprocesses 4 --dist worksteal || { outcome=FAILED; failed=1; }; \
		outcomes="$$outcomes$$outcome  $$values\n"; \
	done; printf "\n$$outcomes"; exit $$failed

$(DOCS): $(READY)
	@$(INSTALL) --constraint constraints.txt --editable '.[docs]'
	@touch $@

# Build the documentation as a site in site/, from docs/ and README.md. A broken link is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)
	@$(RUN) -m mkdocs build --strict

# Run every command of README.md and docs/, in ten minutes on two cores.
docs-test: $(DEV)
	@$(RUN) docs/run_commands.py $(ARGS)

# A few minutes, as root, with Debian's slurmctld slurmd slurm-client munge; prints which of them are missing.
test-slurm: $(DEV)
	@$(RUN) -m pytest -m slurm -rs tests/cluster/test_slurm.py

# A few minutes, as root, with iproute2. Two network namespaces simulate two hosts.
test-netns: $(DEV)
	@$(RUN) -m pytest -m netns -rs tests/cluster/test_netns.py

lint: $(DEV)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(RUN) -m bandit --quiet --configfile pyproject.toml --recursive indistill launch benchmarks docs setup.py

# Train for an hour with kills, and measure what grows (benchmarks/soak.py).
soak: $(DEV)
	@OMP_NUM_THREADS=1 $(RUN) benchmarks/soak.py $(ARGS)

# Run every study of the method with one seed and little training, in ten minutes on two cores. DATA is the folder of the
# data sets; benchmarks/README.md lists its contents, and how to run the studies in full.
reproduce: $(DEV)
	@for study in benchmarks/studies/*.yaml; do $(RUN) benchmarks/study.py $$study --quick --jobs 2 $(ARGS) || exit; done

# Delete what these commands made of files that can be downloaded or computed again: the environment and caches. Runs stay.
clean:
	@[ ! -e $(READY) ] || rm -rf $(VENV)
	@[ ! -e $(FLOORS)/.ready ] || rm -rf $(FLOORS)
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find indistill tests docs benchmarks launch -name __pycache__ -prune -exec rm -rf {} +
