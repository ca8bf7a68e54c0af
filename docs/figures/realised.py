"""What share of (token, layer) pairs is really skipped, against what was asked for: python -m docs.figures.realised --text FILE

Of the demo model: 768 tokens of the file, of this project's code and of counted numbers; answers of 300 tokens to a question and to a
beginning that goes on to repeat itself.
"""

import argparse
from pathlib import Path

from cli.arguments import DEMO

import torch

from generation import Stats, generate
from load_weights import load
from evaluation.rivals import adjusted_threshold
from filter_config import preset
from token_filter import token_filter

ROOT = Path(__file__).resolve().parent.parent.parent
WINDOW, ANSWER = 768, 300  # tokens
TEXTS = ("prose", "code", "numbers", "answer", "repeats itself")


def realised(model, texts, prompts, filter, criterion):
    """The share of each of the texts, then of the answer to each of the prompts."""
    cache, stats = model.new_cache(len(texts), filter, criterion), Stats()
    model.prefill(texts, cache)
    pairs, skipped, *_ = cache.usage().unbind(1)
    cache = model.new_cache(len(prompts), filter, criterion, max(map(len, prompts)) + ANSWER)
    for _ in generate(model, prompts, ANSWER, filter, stats=stats, cache=cache):
        pass
    return [*(skipped / pairs).tolist(), *(row["skipped"] / row["pairs"] for row in stats.rows)]


def main():
    parser = argparse.ArgumentParser(description="What share of (token, layer) pairs is really skipped, against what was asked for.")
    parser.add_argument("--text", required=True, help="prose, UTF-8")
    prose = Path(parser.parse_args().text).read_text(encoding="utf-8")
    model, tokenizer = load(DEMO, "cpu")
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("token_filter.py", "model.py"))
    numbers = ", ".join(str(n) for n in range(1, 400))
    ids = [tokenizer.encode(text, bos=False)[:WINDOW] for text in (prose, code, numbers)]
    question = tokenizer.chat([{"role": "user", "content": "Why is the sky blue?"}])
    prompts = [question, tokenizer.encode("The history of the city begins in the year")]

    print(f"{'preset':8}{'threshold':16}{'asked':>8}" + "".join(f"{name:>16}" for name in TEXTS))
    for name in ("paper", "local", "cache"):
        for label, history, criterion in (("rank among 64", 64, token_filter), ("rank among 256", 256, token_filter),
                                          ("adjusted", 64, adjusted_threshold)):  # fmt: skip
            for prune in (0.2, 0.5, 0.8):
                with torch.inference_mode():
                    shares = realised(model, ids, prompts, preset(name, prune=prune, history=history), criterion)
                print(f"{name:8}{label:16}{prune:8.3f}" + "".join(f"{share:16.3f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
