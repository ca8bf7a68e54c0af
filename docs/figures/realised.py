"""What share of (token, layer) pairs is really skipped, against what was asked for:

    python -m docs.figures.realised --text FILE

Of the demo model: 768 tokens each of the file, of this project's code and of counted numbers;
answers of 300 tokens to a question, and to a beginning that goes on to repeat itself.
"""

from pathlib import Path

import torch

from cli.arguments import DEMO, Parser
from cli.process import run_command
from cli.report import read_text
from evaluation.rivals import adjusted_threshold
from filter_config import preset
from generation import Stats, generate
from kv_cache import USAGE
from load_weights import load
from token_filter import token_filter

ROOT = Path(__file__).resolve().parent.parent.parent
WINDOW = 768  # tokens of a text
ANSWER = 300  # tokens of an answer
COLUMNS = ("prose", "code", "numbers", "answer", "repeats itself")

# How the threshold is found: a name, the history, the filter function.
THRESHOLDS = (
    ("rank among 64", 64, token_filter),
    ("rank among 256", 256, token_filter),
    ("adjusted", 64, adjusted_threshold),
)


def shares_of_texts(model, texts, filter, filter_fn) -> list[float]:
    """The share of redundant pairs in each of these texts, lists of tokens, fed as one batch."""
    cache = model.new_cache(len(texts), filter, filter_fn)
    model.prefill(texts, cache)
    usage = cache.usage().double()
    redundant = usage[:, USAGE.index("redundant")]
    pairs = usage[:, USAGE.index("pairs")]
    return (redundant / pairs).tolist()


def shares_of_answers(model, prompts, filter, filter_fn) -> list[float]:
    """The share of redundant pairs in each of these prompts with its answer."""
    longest = max(len(prompt) for prompt in prompts)
    cache = model.new_cache(len(prompts), filter, filter_fn, longest + ANSWER)
    stats = Stats()
    for _ in generate(model, prompts, ANSWER, filter, stats=stats, cache=cache):
        pass
    return [row["skipped"] / row["pairs"] for row in stats.rows]


def tokens_of_texts(tokenizer, prose) -> list[list[int]]:
    """The first WINDOW tokens of prose, of code and of numbers."""
    names = ("token_filter.py", "model.py")
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    numbers = ", ".join(str(n) for n in range(1, 400))
    return [tokenizer.encode(text, bos=False)[:WINDOW] for text in (prose, code, numbers)]


def print_row(name, threshold, asked, cells):
    line = f"{name:8}{threshold:16}{asked:>8}"
    for cell in cells:
        line += f"{cell:>16}"
    print(line, flush=True)


@torch.inference_mode()
def main(argv=None):
    parser = Parser(
        description="What share of (token, layer) pairs is really skipped, against what was asked "
        "for."
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="prose, UTF-8 (-: stdin)")
    prose = read_text(parser.parse_args(argv).text)
    model, tokenizer = load(DEMO, "cpu")
    texts = tokens_of_texts(tokenizer, prose)
    question = {"role": "user", "content": "Why is the sky blue?"}
    prompts = [
        tokenizer.chat([question]),
        tokenizer.encode("The history of the city begins in the year"),
    ]

    print_row("preset", "threshold", "asked", COLUMNS)
    for name in ("paper", "local", "cache"):
        for threshold, history, filter_fn in THRESHOLDS:
            for prune in (0.2, 0.5, 0.8):
                filter = preset(name, prune=prune, history=history)
                shares = shares_of_texts(model, texts, filter, filter_fn)
                shares += shares_of_answers(model, prompts, filter, filter_fn)
                cells = [f"{share:.3f}" for share in shares]
                print_row(name, threshold, f"{prune:.3f}", cells)


if __name__ == "__main__":
    run_command(main)
