# carnet's daily commands. They work on a machine that has make, bash and Python 3.11 or newer, and nothing else.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo dist test test-vllm test-kernels test-quantized fuzz check format docs bench clean

PYTHON ?= python3# the interpreter that the environments are made from
SECONDS_EACH ?= 120
ARGS ?=# more words for pytest: make test ARGS='-k plan -x'
FULL := .venv
LIGHT := .venv-demo
DOCS := .venv-docs
VLLM := .venv-vllm
BUILD := .venv-build
BUILD_NEEDS := build==1.6.1 hatchling==1.33.0 hatch-fancy-pypi-readme==25.1.0
TWINE := 7.0.0# looks at what PyPI would show, with 25 packages of its own
NEWEST := 0.19.2# the newest megatron-core, beside the one in constraints.txt
TRITON := 3.9.0# 1 GB
MODELEXPRESS := 0.7.0# what takes deltas: 0.6 MB without what its readers do not need
MERGEKIT := 0.1.5# whose sums are compared with ours, with what it imports: 16 MB
MERGEKIT_NEEDS := peft==0.21.2 immutables==0.21 datasets==5.2.0
CONFIGS := 0.12.0# aiconfigurator-core, for the configs of published models that it brings: 82 MB
AZURITE := 3.37.0# the emulator of Azure's store; where there is no npm its test is skipped
PIP := bin/pip --disable-pip-version-check --no-input --quiet --quiet

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(LIGHT)/.ready  ## take a small model across, hear it speak on both sides, and prove it; under a minute on a fresh machine
	@PATH="$(CURDIR)/$(LIGHT)/bin:$$PATH" demo/run

dist: $(BUILD)/.ready $(BUILD)/twine-$(TWINE)  ## build the wheel and the sdist into dist, the same bytes for the same commit, and look at them
	@rm -f dist/.ready && $(MAKE) --no-print-directory dist/.ready
	@PYTHONPATH=$(CURDIR)/$(BUILD)/twine-$(TWINE) $(BUILD)/bin/python -m twine check --strict dist/carnet-*
	@cd dist && sha256sum carnet-*

test: $(FULL)/.ready $(FULL)/megatron-core-$(NEWEST) $(FULL)/aiconfigurator-core-$(CONFIGS) $(FULL)/azurite-$(AZURITE) $(FULL)/modelexpress-$(MODELEXPRESS) $(FULL)/mergekit-$(MERGEKIT)  ## run every test, the referees included
	@$(FULL)/bin/pytest -n 2 --dist worksteal $(ARGS)

test-vllm: $(VLLM)/.ready  ## let vLLM run on the CPU what carnet wrote; the first time installs 3.4 GB
	@$(VLLM)/bin/pytest tests/vllm $(ARGS)

test-kernels: $(FULL)/triton-$(TRITON)  ## let Triton's interpreter run the kernels of GPUs, and its compiler build them; 1 GB
	@TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/$< $(FULL)/bin/pytest tests/kernels $(ARGS)

check: $(FULL)/.ready $(FULL)/aiconfigurator-core-$(CONFIGS)  ## format, lint, types, import contracts, file sizes, one door to the disk, docs current
	@$(FULL)/bin/ruff format --check --quiet --output-format concise . || { echo "not formatted: run make format"; exit 1; }
	@$(FULL)/bin/ruff check --quiet --output-format concise .
	@$(FULL)/bin/mypy
	@$(FULL)/bin/lint-imports --no-logo --no-cache
	@$(FULL)/bin/python tools/check_sizes.py
	@$(FULL)/bin/python tools/check_doors.py
	@$(FULL)/bin/python tools/check_names.py
	@$(FULL)/bin/python tools/draw.py
	@PATH="$(CURDIR)/$(FULL)/bin:$$PATH" python tools/check_docs.py

format: $(FULL)/.ready $(FULL)/aiconfigurator-core-$(CONFIGS)  ## format the code, mend what lint can mend, refresh outputs in the docs
	@$(FULL)/bin/ruff format --quiet .
	@$(FULL)/bin/ruff check --fix --exit-zero --quiet --output-format concise .
	@$(FULL)/bin/python tools/draw.py --write
	@PATH="$(CURDIR)/$(FULL)/bin:$$PATH" python tools/check_docs.py --write

test-quantized: $(FULL)/.ready  ## let transformers run every family in every style and scheme; some minutes
	@$(FULL)/bin/pytest -n 2 --dist worksteal -m '' tests/referees/test_quantized_families.py $(ARGS)

fuzz: $(FULL)/.ready  ## run each test of strange files for SECONDS_EACH=120, where `make test` has 50 turns
	@CARNET_FUZZ_SECONDS=$(SECONDS_EACH) $(FULL)/bin/pytest -n 2 --dist worksteal tests/attacks/test_fuzz_shapes.py $(ARGS)

docs: $(DOCS)/.ready  ## build the documentation site into build/docs; a warning or a link within it that leads nowhere stops it
	@$(DOCS)/bin/python tools/make_site.py

bench: $(FULL)/.ready $(FULL)/aiconfigurator-core-$(CONFIGS)  ## compare with cp on a checkpoint of 2 GB; needs 10 GB of disk and some minutes
	@PATH="$(CURDIR)/$(FULL)/bin:$$PATH" python -m bench.startup
	@PATH="$(CURDIR)/$(FULL)/bin:$$PATH" python -m bench.plan
	@PATH="$(CURDIR)/$(FULL)/bin:$$PATH" python -m bench.published
	@PATH="$(CURDIR)/$(FULL)/bin:$$PATH" python -m bench.growth
	@PATH="$(CURDIR)/$(FULL)/bin:$$PATH" python -m bench.cross
	@PATH="$(CURDIR)/$(FULL)/bin:$$PATH" python -m bench.quantize
	@PATH="$(CURDIR)/$(FULL)/bin:$$PATH" python -m bench.adapters

clean:  ## remove the environments, caches and benchmark data
	rm -rf $(FULL) $(LIGHT) $(DOCS) $(VLLM) $(BUILD) .bench .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find src tests bench tools -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments: made once, and again when what they are made from changes -------------------------------------------------

define fresh
@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(\
	"carnet needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12" % v[:2])'
@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
endef

$(FULL)/.ready: pyproject.toml constraints.txt
	$(fresh)
	@echo "preparing $(@D) (torch is large; this happens once)"
	@$(@D)/$(PIP) install --constraint constraints.txt --editable '.[test,check]'
	@touch $@

# plain Python of a later version than some machines have: tests put it first on the path
$(FULL)/megatron-core-$(NEWEST): $(FULL)/.ready
	@rm -rf $(FULL)/megatron-core-*
	@$(FULL)/$(PIP) install --target $@ --no-deps --ignore-requires-python --python-version 3.12 --only-binary :all: megatron-core==$(NEWEST)
	@touch $@

# its own requirements are gigabytes of engines and stores
$(FULL)/modelexpress-$(MODELEXPRESS): $(FULL)/.ready
	@rm -rf $(FULL)/modelexpress-*
	@$(FULL)/$(PIP) install --target $@ --no-deps modelexpress==$(MODELEXPRESS)
	@touch $@

# run with the environment's own torch and transformers
$(FULL)/mergekit-$(MERGEKIT): $(FULL)/.ready
	@rm -rf $(FULL)/mergekit-*
	@$(FULL)/$(PIP) install --target $@ --no-deps mergekit==$(MERGEKIT) $(MERGEKIT_NEEDS)
	@touch $@

# torch's CPU build comes without it, and other programs behave otherwise where it is
$(FULL)/triton-$(TRITON): $(FULL)/.ready
	@rm -rf $(FULL)/triton-*
	@$(FULL)/$(PIP) install --target $@ --no-deps triton==$(TRITON)
	@touch $@

# without what it asks for, and not on the path: tests look at its data alone
$(FULL)/aiconfigurator-core-$(CONFIGS): $(FULL)/.ready
	@rm -rf $(FULL)/aiconfigurator-core-*
	@$(FULL)/$(PIP) install --target $@ --no-deps --only-binary :all: aiconfigurator-core==$(CONFIGS)
	@touch $@

$(FULL)/azurite-$(AZURITE): $(FULL)/.ready
	@rm -rf $(FULL)/azurite-*
	@mkdir $@.new
	@! command -v npm > /dev/null || npm install --silent --no-audit --no-fund --prefix $@.new azurite@$(AZURITE) \
	    || echo "Azurite could not be installed: the test of az:// is skipped"
	@mv $@.new $@

# pinned, since the builder's release is written into what it builds
$(BUILD)/.ready: Makefile
	$(fresh)
	@$(@D)/$(PIP) install $(BUILD_NEEDS)
	@touch $@

$(BUILD)/twine-$(TWINE): $(BUILD)/.ready
	@rm -rf $(BUILD)/twine-*
	@$(BUILD)/$(PIP) install --target $@ twine==$(TWINE)
	@touch $@

dist/.ready: $(BUILD)/.ready tools/build_dist.py pyproject.toml README.md CHANGELOG.md $(shell find src -name '*.py' -o -name '*.j2' -o -name '*.css' 2>/dev/null)
	@echo "building the wheel"
	@$(BUILD)/bin/python tools/build_dist.py
	@touch $@

# the demo runs the wheel that a user would get
$(LIGHT)/.ready: dist/.ready constraints.txt
	$(fresh)
	@echo "preparing $(@D)"
	@$(@D)/$(PIP) install --constraint constraints.txt --force-reinstall --no-deps dist/carnet-*.whl
	@$(@D)/$(PIP) install --constraint constraints.txt "$$(ls dist/carnet-*.whl)[report]"
	@touch $@

# the core and what builds the site: Sphinx, with the API from docstrings
$(DOCS)/.ready: pyproject.toml constraints.txt
	$(fresh)
	@echo "preparing $(@D)"
	@$(@D)/$(PIP) install --constraint constraints.txt --editable '.[docs]'
	@touch $@

# vLLM wants releases of its own, torch's among them, so it lives apart
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(fresh)
	@echo "preparing $(@D) (3.4 GB; this happens once)"
	@$(@D)/$(PIP) install --no-deps --requirement constraints-vllm.txt
	@$(@D)/$(PIP) install --no-deps --editable .
	@touch $@
