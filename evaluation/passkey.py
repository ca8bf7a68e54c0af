"""Finding a pass key hidden in a long text, dense and filtered.

python -m evaluation.passkey [CHECKPOINT] --lengths 1024 2048 --prune 0.3 --preset local cache
"""

import math
import random
import sys

from tqdm import tqdm

from cli.arguments import (
    Parser,
    add_filter_arguments,
    add_model_arguments,
    check_filter_arguments,
    filters_from,
    share,
)
from cli.process import fail, run_command
from cli.report import COLUMNS, Report, add_report_arguments, check_report_arguments
from filter_config import PRESETS, FilterConfig
from generation import Stats, generate
from load_weights import CheckpointError, Tokenizer, load
from model import Transformer

FILLER = (
    "The tide comes in and the tide goes out.",
    "A gull sits on the harbour wall.",
    "The boats are tied up for the night.",
    "Somewhere a door is closed and a lamp is lit.",
    "It will rain again before morning.",
)
NEEDLE = "The pass key is {0}. Remember it: the pass key is {0}."
REQUEST = " The pass key is"  # what a plain text ends with
QUESTION = (
    "There is a pass key hidden in this text. Find it and remember it.\n\n{}\n\n"
    "What is the pass key?"
)
ANSWER = 12  # tokens that the model may say: enough for "The pass key is 12345."


def passkey_prompt(
    tokenizer: Tokenizer, key: str, length: int, depth: float, chat=False
) -> list[int]:
    """Filler with the key in it, and a request for the key, in at most length - ANSWER tokens.

    depth: where the key is, from 0, the filler's start, to 1, its end. With chat, the request is a
    question in the checkpoint's chat template; otherwise the prompt is a plain text to continue.
    Raises ValueError if not even one sentence fits.
    """

    def prompt(n_sentences):
        text = [FILLER[i % len(FILLER)] for i in range(n_sentences)]
        text.insert(round(depth * n_sentences), NEEDLE.format(key))
        haystack = " ".join(text)
        if chat:
            return tokenizer.chat([{"role": "user", "content": QUESTION.format(haystack)}])
        return tokenizer.encode(haystack + REQUEST)

    # A guess that is too high by no more than a round of the filler, then downwards.
    n_empty = len(prompt(0))
    n_round = len(prompt(len(FILLER))) - n_empty
    n_sentences = (length - ANSWER - n_empty) * len(FILLER) // n_round + len(FILLER)
    n_sentences = max(n_sentences, 1)
    while len(prompt(n_sentences)) > length - ANSWER:
        n_sentences -= 1
        if n_sentences == 0:
            raise ValueError(f"a pass key needs a text of more tokens than {length}")
    return prompt(n_sentences)


def passkey(
    model: Transformer,
    tokenizer: Tokenizer,
    length: int,
    depths: list[float],
    trials: int,
    filter: FilterConfig | None,
    chat=False,
    seed=0,
) -> dict[str, float]:
    """The share of `trials` keys that greedy decoding reproduces: {column: value}.

    A column for each depth, one for all of them, and those that cli.report.COLUMNS explains. The
    same seed and length give the same texts, whatever the filter. A trial is a batch of all depths.
    """
    rng = random.Random(f"{seed} {length}")
    n_found = [0] * len(depths)
    shares = {"skipped": 0.0, "KV held": 0.0, "KV read": 0.0}
    for _ in tqdm(range(trials), f"{length} tokens", unit=" trials", leave=False, disable=None):
        keys = [str(rng.randrange(10000, 100000)) for _ in depths]
        prompts = [
            passkey_prompt(tokenizer, key, length, depth, chat) for key, depth in zip(keys, depths)
        ]
        answers: list[list[int]] = [[] for _ in depths]
        stats = Stats()
        for row, token in generate(model, prompts, ANSWER, filter, tokenizer.eos_ids, stats=stats):
            answers[row].append(token)
        for row, answer in enumerate(answers):
            if keys[row] in tokenizer.decode(answer):
                n_found[row] += 1
        shares["skipped"] += stats.skip_ratio
        shares["KV held"] += stats.kv_held
        shares["KV read"] += stats.kv_read

    figures = {f"depth {depth:g}": n / trials for depth, n in zip(depths, n_found)}
    figures["found"] = sum(n_found) / len(depths) / trials
    for name, total in shares.items():
        figures[name] = total / trials
    return figures


# ------------------------------------------------------------------------------------ picture


def draw(rows):
    """A panel for each setting, presets down, ratios across.

    In a panel: the share of keys that were found, lengths down, depths across.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["setting"] for row in rows))
    # Dense, which comes first, is at ratio 0, and stands in the first column.
    ratios = list(dict.fromkeys(row["prune"] for row in rows if row["setting"] != "dense")) or [0.0]
    depths = [name for name in rows[0] if name.startswith("depth ")]
    lengths = list(dict.fromkeys(row["length"] for row in rows))

    width = 3.2 * len(ratios) + 1
    height = (0.7 + 0.3 * len(lengths)) * len(names) + 0.7
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(names), len(ratios), squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat:
        panel.set_visible(False)  # until there is something to show in it

    settings = dict.fromkeys((row["setting"], row["prune"]) for row in rows)
    for name, ratio in settings:
        column = 0 if name == "dense" else ratios.index(ratio)
        panel = panels[names.index(name), column]
        panel.set_visible(True)
        panel.set_title(name if name == "dense" else f"{name}, prune {ratio:g}", fontsize=9)
        panel.set_xticks(
            range(len(depths)), [depth.removeprefix("depth ") for depth in depths], fontsize=8
        )
        panel.set_yticks(range(len(lengths)), lengths, fontsize=8)

        # What is not measured yet stays white.
        found = [[math.nan] * len(depths) for _ in lengths]
        for row in rows:
            if (row["setting"], row["prune"]) == (name, ratio):
                found[lengths.index(row["length"])] = [row[depth] for depth in depths]
        image = panel.imshow(found, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        write_shares(panel, found)
    figure.supxlabel("depth of the key (0: start of the text, 1: end)", fontsize=9)
    figure.supylabel("length in tokens", fontsize=9)
    figure.colorbar(image, ax=panels, label="share of keys found")
    return figure


def write_shares(panel, found):
    """Each share in its cell, in a colour that can be read on it."""
    for y, line in enumerate(found):
        for x, value in enumerate(line):
            if not math.isnan(value):
                colour = "white" if value > 0.6 else "black"
                panel.text(x, y, f"{value:.0%}", color=colour, ha="center", va="center", fontsize=8)


# ---------------------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(description="Find a pass key hidden in filler text, dense and filtered.")
    add_model_arguments(parser)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[1024, 2048],
        metavar="N",
        help="tokens of prompt and answer together (default: 1024 2048)",
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="X",
        help="where the key is, from 0, the start, to 1 (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=1,
        metavar="N",
        help="keys for each length and depth (default: %(default)s)",
    )
    parser.add_argument("--chat", action="store_true", help="ask in the chat template")
    parser.add_argument(
        "--prune",
        type=share,
        nargs="+",
        default=[0.3],
        metavar="P",
        help="shares of (token, layer) pairs to skip (default: 0.3); dense is always measured too",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the pass keys (default: %(default)s)"
    )
    add_report_arguments(parser)
    add_filter_arguments(parser, several=True, default="all of them")
    return parser


def read_arguments(argv=None):
    """The arguments. Fails in one line where they make no sense."""
    args = make_parser().parse_args(argv)
    if min(args.trials, *args.lengths) < 1:
        fail("--trials and --lengths must be at least 1")
    if not all(0 <= depth <= 1 for depth in args.depths):
        fail("--depths must lie between 0 and 1")
    check_filter_arguments(args)
    check_report_arguments(args)
    return args


def main(argv=None):
    args = read_arguments(argv)
    filters = filters_from(args, args.preset or list(PRESETS), args.prune)
    settings: list[tuple[str, FilterConfig | None]] = [("dense", None), *filters]
    try:
        model, tokenizer = load(
            args.checkpoint, args.device, args.dtype, progress=sys.stderr.isatty()
        )
        # Raises where there is no chat template, or the text is too short.
        passkey_prompt(tokenizer, "00000", min(args.lengths), 0, args.chat)
    except (CheckpointError, ValueError) as error:
        fail(error)
    context = model.config.max_positions
    if max(args.lengths) > context:
        fail(f"--lengths {max(args.lengths)} is longer than the model's context of {context}")

    form = f'plain text to be continued after "{REQUEST.strip()}"'
    if args.chat:
        form = "question in the chat template"
    protocol = (
        f"pass key of five digits, {args.trials} for each length and depth, {form}; "
        f"greedy decoding; {str(model.embed.weight.dtype)[6:]}\n{COLUMNS}"
    )
    width = 2 + max(len(label) for label, _ in settings)
    report = Report(args, protocol, draw, max(width, 10))
    for label, filter in settings:
        for length in args.lengths:
            try:
                figures = passkey(
                    model,
                    tokenizer,
                    length,
                    args.depths,
                    args.trials,
                    filter,
                    args.chat,
                    args.seed,
                )
            except FloatingPointError as error:
                fail(error)
            prune = filter.prune if filter else 0.0
            report.add({"setting": label, "prune": prune, "length": length, **figures})


if __name__ == "__main__":
    run_command(main)
