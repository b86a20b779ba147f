# The doors of distilrepro. A recipe calls one program after another and decides nothing: the logic lives in distilrepro/, docs/ and tests/.
PYTHON ?= $(or $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done),python3)
PRESET ?= quick
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
SOURCES := settings.ini setup.py pyproject.toml constraints.txt
BENCHES := $(patsubst nbs/stages/%.ipynb,bench-%,$(wildcard nbs/stages/b*.ipynb))

# $(call quoted,VARIABLE): its value, which neither make nor the shell reads; $(call option,name,VARIABLE): --name='value' when it is set
quoted = '$(subst ','\'',$(value $(1)))'
option = $(if $(value $(2)),--$(1)=$(call quoted,$(2)))
BENCH_RUN = $(if $(value RUN),$(call quoted,RUN),runs/quick)
unexport PRESET SCALE DATA RUN

.DEFAULT_GOAL := help
.PHONY: help reproduce test torture docs docs-test bench export check clean lock

help: ## list the doors
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile

reproduce: .venv/run ## the whole story, to runs/RUN/report.html (PRESET=quick SCALE= DATA= RUN= DRY=1 to see what is due)
	@$(BIN)/distilrepro reproduce $(call option,preset,PRESET) $(call option,scale,SCALE) $(call option,data,DATA) $(call option,run,RUN) $(if $(DRY),--dry-run)

test: .venv/dev ## lint, types, notebooks, pytest; prints how many and how long
	@$(BIN)/python tests/run.py

torture: .venv/dev ## the tests of faults with many faults; prints a table and writes results/torture/faults.jsonl
	@$(BIN)/python -m pytest --torture -n 2 --dist load -rs $(sort $(wildcard tests/test_faults_*.py))

docs: .venv/dev ## the site, to _docs/index.html
	@$(BIN)/python docs/build.py

docs-test: .venv/dev ## the built site in a browser: links, search, formulas, contrast, phones (needs Chromium)
	@$(BIN)/python -m pytest -m site -n 2 -rs tests/test_site.py

bench: $(BENCHES) ## the benchmark notebooks, one by one, into RUN, a prepared run folder (runs/quick)

bench-%: nbs/stages/%.ipynb .venv/bench
	@mkdir -p -- $(BENCH_RUN)/notebooks
	$(BIN)/papermill --log-output --kernel python3 -p run $(BENCH_RUN) -- $< $(BENCH_RUN)/notebooks/$*.ipynb

export: .venv/dev ## notebooks -> distilrepro/*.py and README.md; clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python docs/readme.py

check: .venv/dev ## lint; is everything generated as the notebooks say? changes nothing
	$(BIN)/ruff check
	$(BIN)/python -m pytest tests/test_generated.py

clean: ## remove what was built (never runs/ nor .venv/)
	rm -rf _proc _docs docs/_nb docs/_extra build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

lock: ## resolve all dependencies anew, to constraints.txt
	rm -rf .venv/lock
	$(PYTHON) -m venv .venv/lock
	.venv/lock/bin/python -m pip install --quiet 'torch==2.13.0' --editable '.[minilm,bench,export,dev,docs]'
	.venv/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable > .venv/lock/frozen.txt
	sed -n '/^#/p' constraints.txt > .venv/lock/constraints.txt
	sed 's/+[a-z0-9.]*$$//' .venv/lock/frozen.txt >> .venv/lock/constraints.txt
	mv .venv/lock/constraints.txt constraints.txt
	rm -rf .venv/lock

# Three installations, made once and again when what they are made from changes: to run, (with test and site tools) to work on it,
# and (with the peers) to measure. A peer asks for torchvision, which breaks transformers where it was built for another torch; text needs none.
.venv/run: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("distilrepro needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@echo 'installing distilrepro into .venv (minutes the first time)'
	@$(PYTHON) -m venv .venv
	@$(INSTALL) '.[minilm,export]'
	@touch $@

.venv/dev: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("distilrepro needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@echo 'installing distilrepro and its tools into .venv (minutes the first time)'
	@$(PYTHON) -m venv .venv
	@$(INSTALL) '.[minilm,export,dev,docs]'
	@touch .venv/run $@

.venv/bench: .venv/dev
	@echo 'installing the peers that are measured'
	@$(INSTALL) '.[bench]'
	@$(BIN)/python -c 'import torchvision' 2> /dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	@touch $@
