"""What filtering costs: the perplexity of a text, dense and filtered.

    python eval_ppl.py [CHECKPOINT] --text FILE --window 768 --prune 0.3 0.5 --preset local cache
    python eval_ppl.py [CHECKPOINT] --text FILE --window 4096 --prune 0.3 --by-position

The text is tokenised whole and cut into windows. Each window is scored alone, from an empty cache.
As filtering is causal and chunk-free, a forward pass over a window gives the same figures as
decoding it token by token. Baselines and ablations: python -m evaluation.rivals.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
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
from cli.report import (
    COLUMNS,
    Report,
    add_report_arguments,
    check_report_arguments,
    read_text,
)
from filter_config import PRESETS, FilterConfig
from generation import overflow
from load_weights import CheckpointError, load
from model import Transformer
from token_filter import token_filter

# --------------------------------------------------------------------------------- perplexity


@dataclass
class Score:
    """Sums over the tokens scored so far."""

    losses: torch.Tensor  # (window,) float64: negative log-likelihood in nats, summed by position
    counts: torch.Tensor  # (window,) int64: how many tokens were scored at each position
    usage: torch.Tensor  # (5,) float64: sums of cache.usage() over the windows completed

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; NaN before the first."""
        return self.between(0, len(self.counts))

    def between(self, start, stop) -> float:
        """Perplexity of the tokens at positions start .. stop-1 of windows; NaN without any."""
        mean_loss = self.losses[start:stop].sum() / self.counts[start:stop].sum()
        return float(mean_loss.exp())

    @property
    def shares(self) -> dict[str, float]:
        """The columns that cli.report.COLUMNS explains; NaN until a batch is complete."""
        pairs, redundant, held, read, dense_read = self.usage
        return {
            "skipped": float(redundant / pairs),
            "KV held": float(held / pairs),
            "KV read": float(read / dense_read),
        }


@dataclass
class Setting:
    """One row of a table: how to filter, and what decides."""

    label: str
    filter: FilterConfig | None = None
    filter_fn: Callable = token_filter
    # Makes filter_fn for the texts to come, called with model, rows (lists of ids) and filter.
    prepare: Callable | None = None


@torch.no_grad()
def evaluate(
    model: Transformer,
    windows: list[list[int]],
    setting: Setting,
    batch=4,
    chunk=128,
    overlap=0,
) -> Iterator[Score]:
    """Score every token of every window but its first; yields the running Score after each chunk.

    Each window is a text of its own: fresh cache, positions from 0. In all windows but the first,
    the leading `overlap` tokens are context only and not scored. batch: windows at a time; chunk:
    tokens of each at a time, which bounds the memory that the logits take. Raises
    FloatingPointError where logits are not finite.
    """
    longest = max((len(window) for window in windows), default=0)
    score = Score(
        losses=torch.zeros(longest, dtype=torch.float64),
        counts=torch.zeros(longest, dtype=torch.int64),
        usage=torch.zeros(5, dtype=torch.float64),
    )
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch]
        lengths = torch.tensor([len(row) for row in rows])
        # The first position that is scored in each row.
        first = torch.tensor([max(overlap if start + i > 0 else 0, 1) for i in range(len(rows))])
        ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)

        filter_fn = setting.filter_fn
        if setting.prepare is not None:
            filter_fn = setting.prepare(model, rows, setting.filter)
        cache = model.new_cache(len(rows), setting.filter, filter_fn)
        for lo in range(0, tokens.shape[1], chunk):
            in_chunk = (lengths - lo).clamp(0, chunk)
            logits = model(tokens[:, lo : lo + chunk], cache, in_chunk)  # (B, T, V)
            # What follows each of them: at the text's end there is one less.
            targets = tokens[:, lo + 1 : lo + 1 + chunk]
            position = torch.arange(lo + 1, lo + 1 + targets.shape[1])
            scored = (position >= first[:, None]) & (position < lengths[:, None])  # (B, T)
            losses = token_losses(logits[:, : targets.shape[1]], targets)
            losses = losses.masked_fill(~scored, 0)
            is_finite = losses.isfinite().all(1)
            if not is_finite.all():
                row = rows[int(is_finite.int().argmin())]
                raise FloatingPointError(overflow(model, row, setting.filter))
            score.losses[position] += losses.sum(0)
            score.counts[position] += scored.sum(0)
            yield score
        score.usage += cache.usage().sum(0)


def token_losses(logits, targets):
    """Negative log-likelihood of targets (B, T) under logits (B, T, V): (B, T) float64, on host."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(
        logits.flatten(0, 1).to(exact), targets.flatten().to(logits.device), reduction="none"
    )
    return losses.cpu().double().view(targets.shape)


def cut(
    ids: list[int], window: int, stride: int | None = None, bos: int | None = None
) -> tuple[list[list[int]], int]:
    """Windows of up to `window` tokens, `stride` apart (default: end to end), `bos` before each.

    Returns the windows and the overlap: how many tokens of each window but the first are only
    context, so that all windows together score every token once (without BOS and overlap: all but
    each window's first).
    """
    head = [] if bos is None else [bos]
    room = window - len(head)
    stride = stride or room
    overlap = len(head) + room - stride
    # Tokens of the text that open a window and are not scored there.
    n_unscored = max(overlap, 1) - len(head)
    starts = range(0, max(1, len(ids) - n_unscored), stride)
    return [head + ids[start : start + room] for start in starts], overlap


# ----------------------------------------------------------------------------------- pictures


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
    """Perplexity against KV read, by which presets can be compared: a line for each preset."""
    figure, axes = perplexity_figure(
        "KV read: keys and values read, over those read without a filter"
    )
    for name in dict.fromkeys(row["setting"] for row in rows):
        points = sorted(
            (row["KV read"], row["perplexity"]) for row in rows if row["setting"] == name
        )
        if name == "dense":
            dense = points[0][1]
            axes.axhline(dense, color="black", linestyle="--", label=f"dense: {dense:.1f}")
        else:
            axes.plot(*zip(*points), marker="o", label=name)
    axes.set_xlim(0, 1)
    axes.legend()
    return figure


def draw_positions(rows):
    """Perplexity against position: a line a setting, a point at the middle of each bucket."""
    figure, axes = perplexity_figure("position in the window (logarithmic)")
    spans = [name for name in rows[0] if name[0].isdigit()]  # "0-63", "64-127", ...
    middles = [sum(map(int, span.split("-"))) / 2 for span in spans]
    for row in rows:
        if row["setting"] == "dense":
            label = "dense"
            style = "k--"
        else:
            label = f"{row['setting']} {row['prune']:g}"
            style = "-"
        axes.plot(middles, [row[span] for span in spans], style, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(middles, spans, rotation=30, fontsize=8)
    figure.legend(loc="outside right center")
    return figure


# ---------------------------------------------------------------------------- the command line


def add_text_arguments(parser):
    """What is measured, on which windows of which text: also for python -m evaluation.rivals."""
    add_model_arguments(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text, tokenised whole")
    parser.add_argument(
        "--window",
        type=int,
        default=768,
        metavar="N",
        help="tokens scored together (default: %(default)s)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from a window to the next (default: end to end); where windows overlap, a "
        "token is scored in the first of them only",
    )
    parser.add_argument(
        "--offsets",
        type=int,
        nargs="+",
        metavar="N",
        help="instead, windows that start at these tokens",
    )
    parser.add_argument(
        "--bos",
        action="store_true",
        help="begin every window with the BOS token, as one of its N",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="use only the text's first N tokens"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=4,
        metavar="N",
        help="windows at a time (default: %(default)s)",
    )
    add_report_arguments(parser)


def check_text_arguments(args) -> str:
    """The text of --text. Fails where the flags of add_text_arguments make no sense."""
    too_few_tokens = args.max_tokens is not None and args.max_tokens < 2
    if args.window < 2 or too_few_tokens or args.batch < 1:
        fail("--window and --max-tokens must be at least 2, --batch at least 1")
    if args.stride is not None:
        most = args.window - int(args.bos)
        if args.offsets or not 1 <= args.stride <= most:
            fail(
                "--stride must be at least 1 and not more than --window (less the BOS token), "
                "and goes without --offsets"
            )
    if not args.text:
        fail("no text: give --text FILE")
    text = read_text(args.text)
    if not text.strip():
        fail(f"{args.text}: the text is empty")
    check_report_arguments(args)
    return text


def make_parser() -> Parser:
    parser = Parser(description="What filtering costs: the perplexity of a text.")
    add_text_arguments(parser)
    parser.add_argument(
        "--prune",
        type=share,
        nargs="+",
        default=[0.1, 0.2, 0.3, 0.5],
        metavar="P",
        help="shares of (token, layer) pairs to skip (default: 0.1 0.2 0.3 0.5); dense is always "
        "measured first",
    )
    parser.add_argument(
        "--by-position",
        action="store_true",
        help="also perplexity by position in the window",
    )
    add_filter_arguments(parser, several=True, default="all of them")
    return parser


def load_windows(args, text) -> tuple[Transformer, list[list[int]], int, str]:
    """The model, the windows, the tokens they overlap by, and how they lie, in words for a table.

    Fails in one line where there is no checkpoint, or the text and the windows do not fit it.
    """
    try:
        model, tokenizer = load(
            args.checkpoint, args.device, args.dtype, progress=sys.stderr.isatty()
        )
        ids = tokenizer.encode(text, bos=False)[: args.max_tokens]
    except CheckpointError as error:
        fail(error)
    context = model.config.max_positions
    if args.window > context:
        fail(f"--window {args.window} is longer than the model's context of {context}")
    if len(ids) < 2:
        fail(
            f"{args.text}: the text is too short: perplexity needs at least two tokens, "
            f"and it has {len(ids)}"
        )
    if args.bos and tokenizer.bos_id is None:
        fail("--bos: the checkpoint's tokenizer has no BOS token")
    bos = tokenizer.bos_id if args.bos else None

    windows, overlap = cut(ids, args.window, args.stride, bos)
    if args.offsets:
        if not all(0 <= offset < len(ids) - 1 for offset in args.offsets):
            fail(
                f"--offsets must lie in the text's {len(ids)} tokens, at least one before the last"
            )
        windows = [cut(ids[offset:], args.window, None, bos)[0][0] for offset in args.offsets]
        layout = f"starting at {', '.join(map(str, args.offsets))}"
    elif args.stride:
        layout = f"{args.stride} apart, each token scored once"
    else:
        layout = "end to end"

    n_losses = count_losses(windows, overlap)
    protocol = (
        f"{Path(args.text).name}: {len(ids)} tokens, "
        f"{'BOS before each window' if args.bos else 'no BOS'}; "
        f"windows of up to {args.window}, {layout}: {len(windows)}; losses: {n_losses}; "
        f"{str(model.embed.weight.dtype)[6:]}\n{COLUMNS}"
    )
    return model, windows, overlap, protocol


def count_losses(windows, overlap) -> int:
    """How many tokens evaluate() scores."""
    return sum(len(window) - max(overlap if i > 0 else 0, 1) for i, window in enumerate(windows))


def note_short_windows(windows, settings: list[Setting]):
    """A note on stderr if no window is longer than the warm-up, so that nothing is filtered."""
    longest = max(len(window) for window in windows)
    warmup = max((setting.filter.warmup for setting in settings if setting.filter), default=0)
    if longest <= warmup:
        print(
            f"note: the first {warmup} tokens of a window (the warm-up) are not filtered, "
            "and no window is longer",
            file=sys.stderr,
        )


def measure(args, model, windows, overlap, settings: list[Setting], report: Report, edges=()):
    """Add each setting's row to the report; the first is dense. Ctrl-C shows what is known by then.

    edges: positions between which perplexity gets columns of its own.
    """
    n_losses = count_losses(windows, overlap)
    dense = None
    for setting in settings:
        n_done = 0
        with tqdm(
            total=n_losses, desc=setting.label, unit=" tokens", leave=False, disable=None
        ) as bar:
            try:
                for score in evaluate(model, windows, setting, args.batch, overlap=overlap):
                    bar.set_postfix_str(f"perplexity {score.perplexity:.2f}")
                    bar.update(score.tokens - n_done)
                    n_done = score.tokens
            except KeyboardInterrupt:
                bar.close()
                if n_done > 0:
                    print(
                        f"interrupted: {setting.label}: perplexity {score.perplexity:.3f} "
                        f"over the first {score.tokens} of {n_losses} losses"
                    )
                raise
            except FloatingPointError as error:
                fail(error)
        if dense is None:
            dense = score.perplexity
        row = {
            "setting": setting.label,
            "prune": float(setting.filter.prune) if setting.filter else 0.0,
            "perplexity": score.perplexity,
            "x dense": score.perplexity / dense,
            **score.shares,
        }
        for lo, hi in pairwise(edges):
            row[f"{lo}-{hi - 1}"] = score.between(lo, hi)
        report.add(row)


def label_width(settings: list[Setting]) -> int:
    return 2 + max(len(setting.label) for setting in settings)


def main(argv=None):
    args = make_parser().parse_args(argv)
    check_filter_arguments(args)
    text = check_text_arguments(args)
    filters = filters_from(args, args.preset or list(PRESETS), args.prune)
    settings = [Setting("dense"), *(Setting(label, filter) for label, filter in filters)]

    model, windows, overlap, protocol = load_windows(args, text)
    note_short_windows(windows, settings)
    edges = []
    draw = draw_reads
    if args.by_position:
        doubling = [64 * 2**i for i in range(30)]
        edges = [0, *(edge for edge in doubling if edge < args.window), args.window]
        draw = draw_positions
    report = Report(args, protocol, draw, label_width(settings))
    measure(args, model, windows, overlap, settings, report, edges)


if __name__ == "__main__":
    run_command(main)
