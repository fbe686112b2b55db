# The environment is made when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

# The demo's and the tests' networks are so small that a second thread costs more than it gives.
export OMP_NUM_THREADS ?= 1
# Where this is set, each of the tests' many processes would compile torch and timm anew, for most of a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test docs-test test-slurm test-netns lint reproduce clean
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
		echo "setup: creating $(VENV) with uv" && \
		uv venv --quiet --clear --python $(PYTHON) $(VENV) && \
		uv pip install --quiet --python $(RUN) --constraint constraints.txt --editable '.[dev]'; \
	else \
		echo "setup: creating $(VENV) with pip (several minutes)" && \
		$(PYTHON) -m venv --clear $(VENV) && \
		$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $@

demo: $(READY)
	@$(RUN) -m indistill.demo

# A process a core, at most 4: each imports torch and takes more than 1 GB, and some tests start processes of their own.
test: $(READY) lint
	@$(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# Every command of README.md and docs/: ten minutes on two cores.
docs-test: $(READY)
	@$(RUN) docs/run_commands.py $(ARGS)

# A few minutes, as root, with Debian's slurmctld slurmd slurm-client munge; says what is missing.
test-slurm: $(READY)
	@$(RUN) -m pytest -m slurm -rs tests/cluster/test_slurm.py

# A few minutes, as root, with iproute2: two hosts as network namespaces.
test-netns: $(READY)
	@$(RUN) -m pytest -m netns -rs tests/cluster/test_netns.py

lint: $(READY)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

# Every study of the method, with one seed and little training: ten minutes on two cores. DATA names the folder of the data
# sets; benchmarks/README.md says what has to be there, and how the studies run in full.
reproduce: $(READY)
	@for study in benchmarks/studies/*.yaml; do $(RUN) benchmarks/study.py $$study --quick --jobs 2 $(ARGS) || exit; done

clean:
	rm -rf $(VENV) runs
