"""What filtering costs: perplexity of a text, by position in it, with one thing changed at a time, beside rival methods.

    python eval_ppl.py [CHECKPOINT] --text FILE --window 768 --prune 0.3 0.5 0.7 --preset local cache
    python eval_ppl.py [CHECKPOINT] --text FILE --window 768 --prune 0.3 --ablate
    python eval_ppl.py [CHECKPOINT] --text FILE --window 768 --prune 0.3 --rivals
    python eval_ppl.py [CHECKPOINT] --text FILE --window 4096 --prune 0.3 --by-position

The text is tokenised whole, cut into windows, and each window is scored alone from an empty cache, as real decoding
would: filtering is causal and chunk-free, so one forward pass gives the same figures as token by token.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from command_line import KNOBS, PRESETS, PRUNE, Parser, add_filter_arguments, add_model_arguments, alone, as_process, check_filter, fail

from report import COLUMNS, Report, add_report_arguments, check_report_arguments, read_text


def flags() -> Parser:
    parser = Parser(description="What filtering costs: perplexity of a text, ablations, rival methods.")
    add_model_arguments(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text, tokenised whole")
    parser.add_argument("--window", type=int, default=768, metavar="N", help="tokens scored together (default: %(default)s)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from a window to the next (default: end to end); where "
                        "windows overlap, a token is scored in the first of them only")  # fmt: skip
    parser.add_argument("--offsets", type=int, nargs="+", metavar="N", help="instead, windows that start at these tokens")
    parser.add_argument("--bos", action="store_true", help="begin every window with the BOS token, as one of its N")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use only the text's first N tokens")
    parser.add_argument("--prune", type=PRUNE, nargs="+", metavar="P", help="shares of (token, layer) pairs to skip (default: 0.1 0.2 "
                        "0.3 0.5; with --ablate 0.3); dense is always measured first")  # fmt: skip
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="windows at a time (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ablate", action="store_true", help="change one thing at a time from each --preset at one ratio")
    what.add_argument("--rivals", action="store_true", help="also what else one could do with the same budget, at each ratio, beside "
                      "presets as they are")  # fmt: skip
    what.add_argument("--by-position", action="store_true", help="also perplexity by position in the window")
    parser.add_argument("--seed", type=int, nargs="+", metavar="N", help="of the rivals that draw tokens at random; several: each in turn "
                        "(default: 0)")  # fmt: skip
    add_report_arguments(parser)
    add_filter_arguments(parser, several=True, default="all of them; with --ablate local cache")
    return parser


def read_arguments(argv=None):
    """The command's arguments, checked as far as they can be without the model, and the text."""
    args = flags().parse_args(argv)
    if min(args.window, args.max_tokens or 2) < 2 or args.max_tokens == 0 or args.batch < 1:
        fail("--window and --max-tokens must be at least 2, --batch at least 1")
    if args.stride is not None and (args.offsets or not 1 <= args.stride <= args.window - args.bos):
        fail("--stride must be at least 1 and not more than --window (less the BOS token), and goes without --offsets")
    args.prune = args.prune or ([0.3] if args.ablate else [0.1, 0.2, 0.3, 0.5])
    check_filter(args)
    args.preset = args.preset or (["local", "cache"] if args.ablate else list(PRESETS))
    if args.ablate and (len(args.prune) > 1 or args.prune == [0] or args.plot):
        fail("--ablate takes one --prune above 0, and draws no --plot")
    alone(rivals=args.rivals)  # which know the heads of one process
    if args.rivals and (given := [name for name in KNOBS if getattr(args, name) is not None]):
        fail(f"--rivals are compared with the presets as they are: leave out --{given[0]}")
    if args.seed and (not args.rivals or min(args.seed) < 0):
        fail("--seed must be at least 0, and does nothing without --rivals")
    if not args.text:
        fail("no text: give --text FILE")
    text = read_text(args.text)
    if not text.strip() or "\0" in text:
        fail(f"{args.text}: {'is a binary file, not text' if text.strip() else 'the text is empty'}")
    check_report_arguments(args)
    return args, text


if __name__ == "__main__":
    given = as_process(read_arguments)  # before torch is imported, which takes seconds

from command_line import filters_from

import torch
import torch.nn.functional as F
from tqdm import tqdm

from generate import overflow
from load_weights import CheckpointError, load
from model import Transformer
from rivals import oracle, rivals
from token_filter import CHOICES, FilterConfig, token_filter

# ------------------------------------------------------------------------------------------------- perplexity


@dataclass
class Score:
    """Sums over the tokens scored so far."""

    losses: torch.Tensor  # (window,) float64: negative log-likelihood, in nats, of the tokens at each position
    counts: torch.Tensor  # (window,) int64: how many they are
    usage: torch.Tensor  # (5,) float64: what cache.usage() says of the windows completed

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; NaN before the first."""
        return self.between(0, len(self.counts))

    def between(self, start, stop) -> float:
        """Perplexity of the tokens at positions start .. stop-1 of their windows; NaN if there are none."""
        return float((self.losses[start:stop].sum() / self.counts[start:stop].sum()).exp())

    @property
    def shares(self) -> dict[str, float]:
        """The columns that COLUMNS explains; NaN until a batch is complete."""
        pairs, redundant, held, read, dense_read = self.usage
        return {"skipped": float(redundant / pairs), "KV held": float(held / pairs), "KV read": float(read / dense_read)}


@torch.no_grad()
def evaluate(
    model: Transformer, windows: list[list[int]], filter: FilterConfig | None, batch=4, chunk=128, overlap=0, criterion=token_filter
) -> Iterator[Score]:
    """Score every token of every window but its first; yields the running Score after each chunk of a batch.

    Each window is a text of its own: fresh cache, positions from 0. In all windows but the first, the leading `overlap`
    tokens are context only, not scored. `chunk` bounds the memory the logits take. `criterion` as in model.new_cache, or
    rivals.oracle. Raises FloatingPointError where logits are not finite.
    """
    longest = max(map(len, windows), default=0)
    score = Score(torch.zeros(longest).double(), torch.zeros(longest).long(), torch.zeros(5).double())
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch]
        lengths = torch.tensor([len(row) for row in rows])
        first = torch.tensor([max(overlap if start + i else 0, 1) for i in range(len(rows))])  # scored, of each row
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
        cache = model.new_cache(len(rows), filter, criterion(model, rows, filter) if criterion is oracle else criterion)
        for lo in range(0, tokens.shape[1], chunk):
            logits = model(tokens[:, lo : lo + chunk], cache, (lengths - lo).clamp(0, chunk))  # (B, T, V)
            targets = tokens[:, lo + 1 : lo + 1 + chunk]  # as many, but at the text's end one fewer
            position = torch.arange(lo + 1, lo + 1 + targets.shape[1])
            scored = (position >= first[:, None]) & (position < lengths[:, None])  # (B, T)
            losses = F.cross_entropy(
                logits[:, : targets.shape[1]].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
                targets.flatten().to(logits.device),
                reduction="none",
            )
            losses = losses.cpu().double().view(targets.shape).masked_fill(~scored, 0)
            if not (finite := losses.isfinite().all(1)).all():
                raise FloatingPointError(overflow(model, rows[int(finite.int().argmin())], filter))
            score.losses[position] += losses.sum(0)
            score.counts[position] += scored.sum(0)
            yield score
        score.usage += cache.usage().sum(0)


def cut(ids: list[int], window: int, stride: int | None = None, bos: int | None = None) -> tuple[list[list[int]], int]:
    """Windows of up to `window` tokens, `stride` apart (default: end to end), each with `bos`, if given, as its first.

    Returns the windows and the overlap: how many tokens of each but the first are only context, so that all windows
    together score every token once (without BOS and overlap: all but each window's first).
    """
    head = [] if bos is None else [bos]
    room = window - len(head)
    overlap = len(head) + room - (stride or room)
    unscored = max(overlap, 1) - len(head)  # tokens of the text that open a window and are not scored there
    starts = range(0, max(1, len(ids) - unscored), stride or room)
    return [head + ids[start : start + room] for start in starts], overlap


# ------------------------------------------------------------------------------------------------- ablations

VARIED: dict[str, tuple] = {
    **{name: CHOICES[name] for name in ("schedule", "fusion", "keys")},
    "gamma": (0.5, 0.7, 0.9, 0.95, 0.99),
    "warmup": (0, 4, 16, 64),
    "history": (32, 64, 128, 256, 512, 1024),
    "recent": (0, 8, 16, 32, 64, 128),
}


def variations(base: FilterConfig):
    """(label, FilterConfig) with one field of the base changed at a time, to each other value of VARIED."""
    for name, values in VARIED.items():
        for value in values:
            if value != getattr(base, name):
                yield f"{name}={value}", replace(base, **{name: value})


# ------------------------------------------------------------------------------------------------- pictures


def perplexity_figure(xlabel):
    """An empty figure with perplexity on its logarithmic y axis, labelled 20, 50, 100 and so on."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel="perplexity (logarithmic)", yscale="log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)
    return figure, axes


def draw_reads(rows):
    """Perplexity against KV read, which presets can be compared by, a line for each preset."""
    figure, axes = perplexity_figure("KV read: keys and values read, over those read without a filter")
    for name in dict.fromkeys(row["setting"] for row in rows):
        points = sorted((row["KV read"], row["perplexity"]) for row in rows if row["setting"] == name)
        if name == "dense":
            axes.axhline(points[0][1], color="black", linestyle="--", label=f"dense: {points[0][1]:.1f}")
        else:
            axes.plot(*zip(*points), marker="o", label=name)
    axes.set_xlim(0, 1)
    axes.legend()
    return figure


def draw_positions(rows):
    """Perplexity against position, a line for each setting; a point stands at its bucket's middle."""
    figure, axes = perplexity_figure("position in the window (logarithmic)")
    for row in rows:
        spans = [name for name in row if name[0].isdigit()]
        middles = [sum(map(int, span.split("-"))) / 2 for span in spans]
        label, style = (row["setting"], "k--") if row["setting"] == "dense" else (f"{row['setting']} {row['prune']:g}", "-")
        axes.plot(middles, [row[span] for span in spans], style, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(middles, spans, rotation=30, fontsize=8)
    figure.legend(loc="outside right center")
    return figure


# ------------------------------------------------------------------------------------------- the command line

Setting = tuple[str, FilterConfig | None, Callable]  # label, filter, criterion


def sweep(model, windows, overlap, settings: list[Setting], losses, args, report: Report):
    """Perplexity of each setting; the first is dense. Ctrl-C shows what is known by then."""
    edges = [0, *(64 << i for i in range(30) if 64 << i < args.window), args.window]
    dense = None
    for label, config, criterion in settings:
        done = 0
        with tqdm(total=losses, desc=label, unit=" tokens", leave=False) as bar:
            try:
                for score in evaluate(model, windows, config, args.batch, overlap=overlap, criterion=criterion):
                    bar.set_postfix_str(f"perplexity {score.perplexity:.2f}")
                    bar.update(score.tokens - done)
                    done = score.tokens
            except KeyboardInterrupt:
                bar.close()
                if done:
                    print(f"interrupted: {label}: perplexity {score.perplexity:.3f} over the first {score.tokens} of {losses} losses")
                raise
        dense = dense or score.perplexity
        row = {"setting": label, "prune": float(config.prune) if config else 0.0}
        row |= {"perplexity": score.perplexity, "x dense": score.perplexity / dense, **score.shares}
        if args.by_position:
            row |= {f"{lo}-{hi - 1}": score.between(lo, hi) for lo, hi in pairwise(edges)}
        report.add(row)


def read_windows(args, ids, bos) -> tuple[list[list[int]], int, str]:
    """The windows, how many tokens they overlap by, and how they lie, in words."""
    windows, overlap = cut(ids, args.window, args.stride, bos)
    if not args.offsets:
        return windows, overlap, f"{args.stride} apart, each token scored once" if args.stride else "end to end"
    if not all(0 <= offset < len(ids) - 1 for offset in args.offsets):
        fail(f"--offsets must lie in the text's {len(ids)} tokens, at least one before the last")
    windows = [cut(ids[offset:], args.window, None, bos)[0][0] for offset in args.offsets]
    return windows, overlap, f"starting at {', '.join(map(str, args.offsets))}"


def main(argv=None, given=None):
    args, text = given or read_arguments(argv)
    filters = filters_from(args, args.preset, args.prune)
    settings: list[Setting] = [("dense", None, token_filter), *((name, config, token_filter) for name, config in filters)]

    try:
        model, tokenizer = load(args.checkpoint, args.device, args.dtype, progress=sys.stderr.isatty())
        ids = tokenizer.encode(text, bos=False)[: args.max_tokens]
    except CheckpointError as e:
        fail(e)
    if args.window > model.config.max_positions:
        fail(f"--window {args.window} is longer than the model's context of {model.config.max_positions}")
    if len(ids) < 2:
        fail(
            f"{args.text}: the text is too short: perplexity needs at least two tokens, "
            f"and it has {len(ids)}"
        )
    if args.bos and tokenizer.bos_id is None:
        fail("--bos: the checkpoint's tokenizer has no BOS token")
    windows, overlap, layout = read_windows(args, ids, tokenizer.bos_id if args.bos else None)
    longest, warmup = max(map(len, windows)), max((config.warmup for _, config in filters), default=0)
    if longest <= warmup:
        note = f"note: the first {warmup} tokens of a window (the warm-up) are not filtered, and no window is longer"
        print(note, file=sys.stderr)

    for p in filter(None, args.prune if args.rivals else []):
        settings += rivals(p, model.config.n_layers, longest, args.seed or [0])
    if args.ablate:
        settings += [(f"{name}, {label}", config, token_filter) for name, base in filters for label, config in variations(base)]
    losses = sum(len(window) - max(overlap if i else 0, 1) for i, window in enumerate(windows))
    protocol = (
        f"{Path(args.text).name}: {len(ids)} tokens, {'BOS before each window' if args.bos else 'no BOS'}; "
        f"windows of up to {args.window}, {layout}: {len(windows)}; losses: {losses}; "
        f"{str(model.embed.weight.dtype)[6:]}\n{COLUMNS}"
    )
    report = Report(args, protocol, draw_positions if args.by_position else draw_reads, 2 + max(len(s[0]) for s in settings))
    try:
        sweep(model, windows, overlap, settings, losses, args, report)
    except FloatingPointError as e:
        fail(e)


if __name__ == "__main__":
    as_process(main, None, given)
