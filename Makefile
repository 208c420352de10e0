# make demo   sets up, makes a video, asks longvlm-tiny about it and prints the answers next to the truth
# make test   sets up, then runs the tests (SLOW=1: slow ones as well, as CI does)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.longvlm-installed
FLOOR  := 5.17
OLD    := $(CURDIR)/.cache/transformers-$(FLOOR)
PYTEST  = $(BIN)/python -m pytest $(if $(SLOW),--slow) $(ARGS)

.PHONY: help setup demo test test-floor test-newest test-matrix test-kills test-suites test-quantizers lint style types bench smollm2 tiny ablations clean

help:
	@sed -n 's/^# make /make /p' Makefile
	@echo "also: make lint | style | test-matrix | test-kills | test-suites | test-quantizers | bench | tiny | ablations | smollm2 | clean"

setup: $(STAMP)

# The stamp lets setup run once, and again only when the dependencies change.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: $(STAMP)
	$(PYTEST)

# 86 kills at random moments, about 3 minutes on 2 idle cores; part of the slow tests.
test-kills: $(STAMP)
	$(BIN)/python -m pytest --slow tests/test_kills.py $(ARGS)

# The oldest supported transformers is installed into a folder of its own, which goes in front of the environment's.
$(OLD)/.complete: Makefile | $(STAMP)
	test -d $(OLD)/transformers || $(BIN)/python -m pip install --quiet --target $(OLD) 'transformers==$(FLOOR).*'
	touch $@

test-floor: $(OLD)/.complete
	PYTHONPATH=$(OLD) $(BIN)/python -c "import transformers as t; v = t.__version__; assert v.startswith('$(FLOOR).'), v"
	PYTHONPATH=$(OLD) $(PYTEST)

test-newest: $(STAMP)
	$(BIN)/python -c "import transformers as t; v = t.__version__; assert not v.startswith('$(FLOOR).'), v"
	$(PYTEST)

test-matrix: test-floor test-newest

# transformers' own tests of models and processors, with the oldest and the newest: about a minute each on 2 cores. Each
# version's are downloaded once, in its source archive.
SUITES = $(BIN)/python -m tests.helpers.transformers_suites && $(BIN)/python -m pytest tests/transformers_suites
test-suites: $(OLD)/.complete
	export PYTHONPATH=$(OLD) && $(SUITES) $(ARGS)
	$(SUITES) $(ARGS)

# Further libraries that quantise weights. They are in a folder of their own: transformers imports torchao wherever it
# finds it, which takes seconds.
QUANTIZERS := $(CURDIR)/.cache/quantizers
$(QUANTIZERS)/.complete: Makefile | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(QUANTIZERS) torchao optimum-quanto ninja
	touch $@

test-quantizers: $(QUANTIZERS)/.complete
	PYTHONPATH=$(QUANTIZERS) $(BIN)/python -c "import torchao, optimum.quanto"
	PYTHONPATH=$(QUANTIZERS) $(BIN)/python -m pytest tests/modeling_longvlm/test_quantized.py

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see through an editable install, so it gets the namespace as a tree of links.
PARTS := modeling_longvlm processing features conversion publishing training evaluation
types: $(STAMP)
	@rm -rf .cache/types && mkdir -p .cache/types/longvlm
	@ln -sfn $(addprefix $(CURDIR)/,$(PARTS)) $(CURDIR)/longvlm/*.py .cache/types/longvlm/
	@ln -sfn $(CURDIR)/longvlm/cli .cache/types/longvlm_cli && ln -sfn $(CURDIR)/recipes .cache/types/recipes
	cd .cache/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p longvlm -p longvlm_cli -p recipes

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Trains a real language model on Storyline: about 50 minutes on 2 cores; resumes an interrupted run.
smollm2: $(STAMP)
	$(BIN)/python -m recipes.smollm2.run --out .cache/smollm2 --report docs/smollm2.md

# Trains longvlm-tiny from scratch: about 2 hours on 2 cores; resumes an interrupted run.
tiny: $(STAMP)
	$(BIN)/python -m recipes.tiny.build --out longvlm/longvlm-tiny --work .cache/tiny

# Trains and compares ways to condense a video (about an hour on 2 cores); table and plot in docs/.
ablations: $(STAMP)
	$(BIN)/python -m recipes.ablations.run --out .cache/ablations --report docs

bench: $(STAMP)
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
