# What this needs: python3 (3.11 or later) with venv, a C compiler, make. Everything else goes into .venv.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
LOG := build/build.log
SOURCES := setup.py pyproject.toml _kvmmu_command.py $(shell find kvmmu -type f ! -name '*.py[co]' ! -name '*.so')
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help replay test bench lint docs build matrix asan tsan live long clean

help:
	@echo 'make replay   walk the bundled recording of a real guest (ARGS="DIRECTORY --phase dyn" for another one)'
	@echo 'make test     run the tests (ARGS="-k pae" to choose)'
	@echo 'make bench    race against numpy.take and others, and write docs/performance.md (10 minutes; BENCH_QUICK=1: 1 minute, no docs)'
	@echo 'make lint     ruff, cython-lint, codespell, mypy'
	@echo 'make docs     the documentation, into build/html'
	@echo 'make build    sdist and wheel into dist/'
	@echo 'make matrix   20 million cases of the access matrix (minutes)'
	@echo 'make asan     10 million random walks under AddressSanitizer and UBSan (minutes)'
	@echo 'make tsan     threads over shared tables and machines under ThreadSanitizer (minutes)'
	@echo 'make live     100000 random operations of a guest on a live KVM and here (minutes; needs /dev/kvm)'
	@echo 'make long     matrix, asan, tsan, live, and long differential, equality, live-KVM, machine and damaged-file runs'
	@echo 'make clean    remove everything that make made'

replay: $(VENV)/.kvmmu
	@$(BIN)/kvmmu replay $(ARGS)

test: $(VENV)/.kvmmu $(VENV)/.test
	@$(BIN)/pytest -n auto --dist worksteal $(ARGS)

bench: $(VENV)/.kvmmu $(VENV)/.bench
	@mkdir -p build
	@$(BIN)/pytest benchmarks -q -rs -p no:cacheprovider --benchmark-quiet --benchmark-json=build/bench.json $(ARGS)
	@$(BIN)/python benchmarks/report.py build/bench.json $(if $(filter 1,$(BENCH_QUICK)),,docs)

lint: $(VENV)/.kvmmu $(VENV)/.dev
	@$(BIN)/ruff check .
	@PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint kvmmu
	@$(BIN)/codespell
	@$(BIN)/mypy
	@echo 'lint: clean'

docs: $(VENV)/.kvmmu $(VENV)/.docs
	@$(BIN)/python -P -m sphinx -q -W --keep-going -d build/doctrees docs build/html
	@echo 'docs: build/html/index.html'

# The wheel is packed from what $(VENV)/.kvmmu has compiled; only the headers' place of the compiler's flags is given again.
build: $(VENV)/.kvmmu $(VENV)/.dev
	@CFLAGS="$$(cat $(VENV)/cflags)" $(BIN)/python -m build --no-isolation --sdist --wheel > build/dist.log 2>&1 \
		|| { tail -n 40 build/dist.log; exit 1; }
	@ls dist

matrix: $(VENV)/.kvmmu $(VENV)/.test
	KVMMU_MATRIX_CASES=20000000 $(BIN)/pytest tests/walk/test_access_matrix.py -s

asan: $(VENV)/.kvmmu $(VENV)/.test
	$(BIN)/python tests/support/sanitize.py --walks 10000000
	$(BIN)/python tests/support/sanitize.py --tests tests/vm/test_snapshot.py tests/memory/test_copies.py tests/embed/test_c_extensions.py

tsan: $(VENV)/.kvmmu $(VENV)/.test
	$(BIN)/python tests/support/thread_sanitize.py --walks 10000000 --operations 20000

# Each run has other sequences; the first seed is in the output of a failure, and KVMMU_LIVE_SEED chooses it.
live: $(VENV)/.kvmmu $(VENV)/.test
	KVMMU_LIVE_OPERATIONS=100000 KVMMU_LIVE_SEED=$${KVMMU_LIVE_SEED:-$$(date +%s)} $(BIN)/pytest tests/vm/test_live_machine.py -rs

long: matrix asan tsan live
	KVMMU_DIFF_SEEDS=2000 $(BIN)/pytest tests/walk/test_differential.py
	KVMMU_EQUALITY_ROUNDS=100 $(BIN)/pytest tests/walk/batch/test_batch_equality.py tests/replay/test_replay_writes.py
	KVMMU_LIVE_CASES=100000 $(BIN)/pytest tests/walk/test_live_kvm.py -rs
	KVMMU_MACHINE_OPERATIONS=1000000 $(BIN)/pytest tests/machine/test_machine_random.py
	KVMMU_SNAPSHOT_ROUNDS=20 KVMMU_SNAPSHOT_OPERATIONS=100 $(BIN)/pytest tests/vm/test_snapshot.py
	KVMMU_HOSTILE=1 $(BIN)/pytest tests/traces/test_files_hostile.py
	KVMMU_GARBAGE_GUESTS=4000 KVMMU_WILD_MACHINES=4000 $(BIN)/pytest tests/machine/test_machine_garbage.py tests/machine/test_wild_machines.py

clean:
	rm -rf $(VENV) build dist kvmmu.egg-info
	find kvmmu tests \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +

# ---- the environment: each stamp has the date of its last success -----------------------------------------------------

define CHECK
import os, shlex, shutil, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit(f"kvmmu needs Python 3.11 or later, this is {sys.version.split()[0]}: make PYTHON=python3.12, for example")
if not shutil.which(shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC"))[0]):
    sys.exit("the C compiler is missing: on Debian and Ubuntu install the package gcc")
endef
export CHECK

define BUILD_REQUIRES
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")
endef
export BUILD_REQUIRES

$(VENV)/.created: pyproject.toml
	@$(PYTHON) -c "$$CHECK"
	@echo 'setting up $(VENV) ...'
	@$(PYTHON) -m venv $(VENV) || { echo 'on Debian and Ubuntu install the package python3-venv' >&2; exit 1; }
	@$(BIN)/python -c "$$BUILD_REQUIRES" > $(VENV)/build-requires.txt
	@$(PIP) install --quiet -r $(VENV)/build-requires.txt
	@touch $@

$(VENV)/.kvmmu: $(VENV)/.created $(SOURCES)
	@echo 'building kvmmu (about a minute the first time) ...'
	@mkdir -p build
	@$(PYTHON) tools/python_headers.py $(VENV)/headers > $(VENV)/cflags
	@CFLAGS="$$(cat $(VENV)/cflags)" $(PIP) install --verbose --no-build-isolation '.[cli,zstd]' > $(LOG) 2>&1 \
		|| { tail -n 40 $(LOG); echo 'the whole log is in $(LOG)'; exit 1; }
	@touch $@

# The package is there: these only add what an extra of it names.
$(VENV)/.test $(VENV)/.bench $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: pyproject.toml | $(VENV)/.kvmmu
	@echo "installing what 'kvmmu[$*]' needs ..."
	@$(PIP) install --quiet 'kvmmu[$*]'
	@touch $@
