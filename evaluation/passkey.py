"""Finding a pass key hidden in a long text, dense against filtered.

    python eval_passkey.py [CHECKPOINT] --lengths 1024 2048 --prune 0.3 --preset local cache
"""

import math
import random
import sys

from filter_config import PRESETS
from cli.arguments import Parser, add_filter_arguments, add_model_arguments, check_filter_arguments, share
from cli.process import fail, run_command

from cli.report import COLUMNS, Report, add_report_arguments, check_report_arguments


def read_arguments(argv=None):
    """The command's arguments, checked as far as they can be without the model."""
    parser = Parser(description="Find a pass key hidden in filler text, dense against filtered.")
    add_model_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], metavar="N",
                        help="tokens of prompt and answer together (default: 1024 2048)")  # fmt: skip
    parser.add_argument("--depths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1], metavar="X",
                        help="where the key is, from 0, the start, to 1 (default: 0 0.25 0.5 0.75 1)")  # fmt: skip
    parser.add_argument("--trials", type=int, default=1, metavar="N", help="keys for each length and depth (default: 1)")
    parser.add_argument("--chat", action="store_true", help="ask in the chat template")
    parser.add_argument("--prune", type=share, nargs="+", default=[0.3], metavar="P",
                        help="shares of (token, layer) pairs to skip (default: 0.3); dense is always measured first")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the pass keys (default: 0)")
    add_report_arguments(parser)
    add_filter_arguments(parser, several=True, default="all of them")
    args = parser.parse_args(argv)

    if min(args.trials, *args.lengths) < 1:
        fail("--trials and --lengths must be at least 1")
    if not all(0 <= depth <= 1 for depth in args.depths):
        fail("--depths must lie between 0 and 1")
    check_filter_arguments(args)
    check_report_arguments(args)
    return args


if __name__ == "__main__":
    given = run_command(read_arguments)  # before torch is imported, which takes seconds

from cli.arguments import filters_from

import torch
from tqdm import tqdm

from generation import Stats, generate
from load_weights import CheckpointError, Tokenizer, load

FILLER = (
    "The tide comes in and the tide goes out.",
    "A gull sits on the harbour wall.",
    "The boats are tied up for the night.",
    "Somewhere a door is closed and a lamp is lit.",
    "It will rain again before morning.",
)
NEEDLE = "The pass key is {0}. Remember it: the pass key is {0}."
ANSWER = 12  # tokens that the model may say: enough for "The pass key is 12345."


def passkey_prompt(tokenizer: Tokenizer, key: str, length: int, depth: float, chat=False) -> list[int]:
    """Filler with the key at `depth` (0 start .. 1 end) of it and a request for it: as many sentences as fit `length` - ANSWER.

    With chat, the request is a question in the checkpoint's chat template; else a plain text to continue.
    Raises ValueError if not even one sentence fits.
    """

    def prompt(sentences):
        text = [FILLER[i % len(FILLER)] for i in range(sentences)]
        text.insert(round(depth * sentences), NEEDLE.format(key))
        if not chat:
            return tokenizer.encode(" ".join(text) + " The pass key is")
        task = "There is a pass key hidden in this text. Find it and remember it.\n\n{}\n\nWhat is the pass key?"
        return tokenizer.chat([{"role": "user", "content": task.format(" ".join(text))}])

    empty, cycle = len(prompt(0)), len(prompt(len(FILLER))) - len(prompt(0))
    sentences = max(1, (length - ANSWER - empty) * len(FILLER) // cycle + len(FILLER))
    while len(prompt(sentences)) > length - ANSWER:
        sentences -= 1
        if sentences == 0:
            raise ValueError(f"a pass key needs a text of more tokens than {length}")
    return prompt(sentences)


def passkey(model, tokenizer: Tokenizer, length, depths, trials, filter, chat=False, seed=0) -> dict:
    """The share of `trials` keys that greedy decoding reproduces, at each depth and overall, and the columns of COLUMNS.

    The same seed and length give the same texts whatever the filter. Each trial is a batch of all depths.
    """
    rng, found, shares = random.Random(f"{seed} {length}"), [0] * len(depths), torch.zeros(3, dtype=torch.float64)
    for _ in tqdm(range(trials), f"{length} tokens", unit=" trials", leave=False):
        keys = [str(rng.randrange(10000, 100000)) for _ in depths]
        prompts = [passkey_prompt(tokenizer, key, length, depth, chat) for key, depth in zip(keys, depths)]
        answers: list[list[int]] = [[] for _ in depths]
        stats = Stats()
        for row, token in generate(model, prompts, ANSWER, filter, tokenizer.eos_ids, stats=stats):
            answers[row].append(token)
        for row, (key, answer) in enumerate(zip(keys, answers)):
            found[row] += key in tokenizer.decode(answer)
        shares += torch.tensor([stats.skip_ratio, stats.kv_held, stats.kv_read])
    return {
        **{f"depth {depth:g}": n / trials for depth, n in zip(depths, found)},
        "found": sum(found) / len(depths) / trials,
        **dict(zip(("skipped", "KV held", "KV read"), (shares / trials).tolist())),
    }


def draw(rows):
    """A panel for each setting, presets down, ratios across: in each, lengths down, depths across, the share of keys found."""
    from matplotlib.figure import Figure

    settings = dict.fromkeys((row["setting"], row["prune"]) for row in rows)
    depths = [name for name in rows[0] if name.startswith("depth ")]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    names, ratios = (list(dict.fromkeys(part)) for part in zip(*settings))
    ratios = ratios[1:] or ratios  # of dense, which comes first, only the name
    figure = Figure(figsize=(3.2 * len(ratios) + 1, (0.7 + 0.3 * len(lengths)) * len(names) + 0.7), layout="constrained")
    panels = figure.subplots(len(names), len(ratios), squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat:
        panel.set_visible(False)
    for setting in settings:
        panel = panels[names.index(setting[0]), ratios.index(setting[1]) if setting[1] in ratios else 0]
        panel.set_visible(True)
        mine = {row["length"]: [row[d] for d in depths] for row in rows if (row["setting"], row["prune"]) == setting}
        shares = [mine.get(length, [math.nan] * len(depths)) for length in lengths]
        image = panel.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for y, line in enumerate(shares):
            for x, share in enumerate(line):
                label, colour = "" if math.isnan(share) else f"{share:.0%}", "white" if share > 0.6 else "black"
                panel.text(x, y, label, color=colour, ha="center", va="center", fontsize=8)
        panel.set_title(setting[0] if setting[0] == "dense" else f"{setting[0]}, prune {setting[1]:g}", fontsize=9)
        panel.set_xticks(range(len(depths)), [d.removeprefix("depth ") for d in depths], fontsize=8)
        panel.set_yticks(range(len(lengths)), lengths, fontsize=8)
    figure.supxlabel("depth of the key (0: start of the text, 1: end)", fontsize=9)
    figure.supylabel("length in tokens", fontsize=9)
    figure.colorbar(image, ax=panels, label="share of keys found")
    return figure


def main(argv=None, given=None):
    args = given or read_arguments(argv)
    settings = [("dense", None), *filters_from(args, args.preset or PRESETS, args.prune)]
    try:
        model, tokenizer = load(args.checkpoint, args.device, args.dtype, progress=sys.stderr.isatty())
        passkey_prompt(tokenizer, "00000", min(args.lengths), 0, args.chat)
    except (CheckpointError, ValueError) as e:  # no chat template; too short
        fail(e)
    context, dtype = model.config.max_positions, str(model.embed.weight.dtype).removeprefix("torch.")
    if max(args.lengths) > context:
        fail(f"--lengths {max(args.lengths)} is longer than the model's context of {context}")
    form = "question in the chat template" if args.chat else 'plain text to be continued after "The pass key is"'
    protocol = f"pass key of five digits, {args.trials} for each length and depth, {form}; greedy decoding; {dtype}\n{COLUMNS}"
    report = Report(args, protocol, draw, max(10, 2 + max(len(label) for label, _ in settings)))
    try:
        for label, config in settings:
            for length in args.lengths:
                figures = passkey(model, tokenizer, length, args.depths, args.trials, config, args.chat, args.seed)
                report.add({"setting": label, "prune": config.prune if config else 0.0, "length": length, **figures})
    except FloatingPointError as e:
        fail(e)


if __name__ == "__main__":
    run_command(main, None, given)
