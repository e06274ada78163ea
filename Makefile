# make demo    trains baseline and EIM on the embedded miniature world, ends with a score table and report.html
# make test    runs the tests (make exhaustive: further cases of them)
# make install installs alone, e.g. on the hosts of a cluster
# make docs    builds the documentation into site/
# They make .venv in this folder and install into it what they need, pinned by constraints.txt.
# EXTRAS=cuda or EXTRAS=tpu installs JAX for that accelerator too.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
EXTRAS ?=
BIN := .venv/bin
DEMO := $(BIN)/python -m eim_jax.main --config=configs/miniature.py --workdir=runs/miniature

# XLA maps and unmaps its temporaries in every step on the CPU: in huge pages the kernel has less to clear
# (benchmarks/huge_pages.py). Without glibc 2.35 or newer it means nothing.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Containers often forbid Python to keep what it compiled: each of the many processes here would compile all it imports
# again, which takes as long as the rest of their import. It is kept in .venv and beside the sources, as Python does by itself.
unexport PYTHONDONTWRITEBYTECODE

comma := ,
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e

.PHONY: install demo test exhaustive isa parity topology browser harness lint docs clean

install: .venv/run$(EXTRAS)

demo: .venv/run$(EXTRAS)
	@echo
	@echo "$$ $(DEMO)"
	@$(DEMO)

# Most of the time goes to compiling programs that run for milliseconds: LLVM's costly passes are left out here, and
# the fusion emitters, whose code takes longer to compile, and each program is compiled as one piece: both cores have
# a worker. `make isa` and `make parity` keep the emitters. Eight devices share two cores: where these are lent to others
# for a while, one device lags behind, and XLA ends the process after 40 seconds unless it is told to wait longer.
# Flags that the installed XLA does not know (newer ones have only the fusion emitters) are left out: KNOWN.
BRIEF := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
	--xla_cpu_collective_call_terminate_timeout_seconds=300
QUICK := $(BRIEF) --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
KNOWN := $(BIN)/python scripts/xla_flags.py
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=tests/,parity harness)

test: .venv/test$(EXTRAS)
	flags="$$($(KNOWN) $(QUICK))" && XLA_FLAGS="$$flags" $(TESTS) -m "not topology and not exhaustive"

# More cases of what `make test` claims as well: every mesh of every stage, and the like.
CASES ?= exhaustive
FILES ?=
exhaustive: .venv/test$(EXTRAS)
	flags="$$($(KNOWN) $(QUICK))" && XLA_FLAGS="$$flags" $(TESTS) -m "$(CASES)" $(FILES)

# What is compared in numbers, as processors with other vector instructions compute it (tests/close.py).
ISA ?= AVX2
NUMERIC := $(addprefix tests/test_,$(addsuffix .py,decode xent dense connector))
isa: .venv/test$(EXTRAS)
	flags="$$($(KNOWN) $(BRIEF))" && XLA_FLAGS="$$flags --xla_cpu_max_isa=$(ISA)" $(BIN)/python -m pytest -n 2 --dist loadfile $(NUMERIC)

# The live comparison with PyTorch and transformers, full-size towers included.
parity: .venv/parity$(EXTRAS)
	flags="$$($(KNOWN) $(BRIEF))" && XLA_FLAGS="$$flags" $(BIN)/python -m pytest -n 2 --dist loadfile tests/parity

# Full-size stages compiled for TPUs that are not here: one config a recipe; FITS=topology takes all.
FITS ?= topology and not slow
topology: .venv/test$(EXTRAS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check libtpu==0.0.51
	$(BIN)/python -m pytest -n 0 -m "$(FITS)"

# The page of `--mode=serve` in a real browser, where there is one or apt-get may install one; else it says so.
browser: .venv/test$(EXTRAS)
	flags="$$($(KNOWN) $(QUICK))" && XLA_FLAGS="$$flags" scripts/browser.sh

# lmms-eval, as published, scores a run by its own command line; it is installed beside, in .venv/lmms_eval.
harness: .venv/parity$(EXTRAS)
	flags="$$($(KNOWN) $(QUICK))" && XLA_FLAGS="$$flags" scripts/harness.sh

lint: .venv/test$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Strictly: a dead link or a name that is not there fails. Nothing is fetched.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf .venv runs site

.venv/uv:
	@test -n "$(PYTHON)" || { echo "eim_jax needs Python 3.11, 3.12 or 3.13; none found. Set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

.venv/run$(EXTRAS): .venv/uv pyproject.toml constraints.txt
	@echo "installing eim_jax into .venv (about 1.4 GB, once)"
	$(INSTALL) '.[train$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@

.venv/test$(EXTRAS): .venv/run$(EXTRAS)
	$(INSTALL) '.[train,serve,test$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@

.venv/docs: .venv/run$(EXTRAS)
	$(INSTALL) '.[docs$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@

# pip, not uv: it also looks where the machine's own settings point for a CPU build of PyTorch.
.venv/parity$(EXTRAS): .venv/test$(EXTRAS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'peft==0.21.2' 'gguf==0.19.0'
	@touch $@
