"""What filtering costs: perplexity of a text, ablations, perplexity by position, and finding a pass key in a long text.

    python eval_ppl.py [CHECKPOINT] --text FILE --window 768 --prune 0.3 0.5 0.7 --preset local cache
    python eval_ppl.py [CHECKPOINT] --text FILE --window 768 --prune 0.3 --ablate
    python eval_ppl.py [CHECKPOINT] --text FILE --window 768 --prune 0.3 --rivals
    python eval_ppl.py [CHECKPOINT] --text FILE --window 4096 --prune 0.3 --by-position
    python eval_ppl.py [CHECKPOINT] --passkey --lengths 1024 2048 --prune 0.3

The text is tokenised whole, cut into windows, and each window is scored alone from an empty cache, as real decoding
would: filtering is causal and chunk-free, so one forward pass gives the same figures as token by token.
"""

import csv
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from command_line import (
    Parser,
    add_filter_arguments,
    add_model_arguments,
    as_process,
    check_output,
    fail,
    filter_from,
    overflow,
    read_text,
)

import torch
import torch.nn.functional as F
from tqdm import tqdm

from generate import Stats, generate
from load_weights import CheckpointError, Tokenizer, load
from model import Transformer
from token_filter import CHOICES, PRESETS, FilterConfig, above_threshold, preset, token_filter

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
    model: Transformer,
    windows: list[list[int]],
    filter: FilterConfig | None,
    batch: int = 4,
    chunk: int = 128,
    overlap: int = 0,
    criterion=token_filter,
) -> Iterator[Score]:
    """Score every token of every window but its first; yields the running Score after each chunk of a batch.

    Each window is a text of its own: fresh cache, positions from 0. In all windows but the first, the leading `overlap`
    tokens are context only, not scored. `chunk` bounds the memory the logits take. `criterion` as in model.new_cache.
    Raises FloatingPointError where logits are not finite.
    """
    longest = max(map(len, windows))
    score = Score(torch.zeros(longest).double(), torch.zeros(longest).long(), torch.zeros(5).double())
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch]
        lengths = torch.tensor([len(row) for row in rows])
        first = torch.tensor([max(overlap if start + i else 0, 1) for i in range(len(rows))])  # scored, of each row
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        cache = model.new_cache(len(rows), filter, criterion)
        for lo in range(0, tokens.shape[1], chunk):
            logits = model(tokens[:, lo : lo + chunk], cache, (lengths - lo).clamp(0, chunk))  # (B, T, V)
            targets = tokens[:, lo + 1 : lo + 1 + chunk]  # as many, but at the text's end one fewer
            position = torch.arange(lo + 1, lo + 1 + targets.shape[1])
            scored = (position >= first[:, None]) & (position < lengths[:, None])  # (B, T)
            real = (torch.arange(lo, lo + logits.shape[1]) < lengths[:, None]).to(logits.device)
            if not (finite := logits.isfinite().all(-1) | ~real).all():
                raise FloatingPointError(overflow(model, rows[int(finite.all(1).int().argmin())], filter))
            losses = F.cross_entropy(
                logits[:, : targets.shape[1]].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
                targets.flatten().to(logits.device),
                reduction="none",
            )
            score.losses[position] += losses.cpu().double().view(targets.shape).masked_fill(~scored, 0).sum(0)
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


# ------------------------------------------------------------- what else one could do: rivals of token_filter
# Each has token_filter's signature and promises: k, v (B, T, KVH, D), n_new (B,) or None, state, ratio, config -> redundant, score.

SINKS = 16  # first tokens that StreamingLLM keeps, as many as our warm-up


def past_warmup(k, n_new, state, config):
    """Move state.count past a chunk. Returns the positions of its tokens, and which are real and past the warm-up, (B, T) both."""
    position = state.count[:, None] + torch.arange(k.shape[1], device=k.device)
    state.count += k.shape[1] if n_new is None else n_new
    return position, (position >= max(config.warmup, 1)) & (position < state.count[:, None])


def last_layers(first):
    """Depth pruning: layers first .. L-1 have no attention, for no token past the warm-up, whatever the text."""

    def criterion(k, v, n_new, state, ratio, config):
        _, free = past_warmup(k, n_new, state, config)
        return free & (state.layer >= first), torch.full(free.shape, math.nan, device=k.device)

    return criterion


def recent_only(k, v, n_new, state, ratio, config):
    """StreamingLLM (arXiv 2309.17453), to run with mode="cache": past the warm-up every token is redundant, so that only the
    sinks, a token itself and the config.recent before it are visible. Keys keep their positions in the text."""
    _, free = past_warmup(k, n_new, state, config)
    return free, torch.full(free.shape, math.nan, device=k.device)


def key_distance(k, v, n_new, state, ratio, config):
    """KeyDiff (arXiv 2504.15364): drop the tokens whose keys look most like the mean of all keys, each scaled to length 1.

    The original ranks what is cached, per head, when the cache is full. Here a token is ranked once, on arrival, by the mean
    over heads of its cosine with the mean before it, against the same threshold as token_filter's. state.anchor[:, 0] holds
    the sum, whose direction is the mean's.
    """
    W = config.history
    position, free = past_warmup(k, n_new, state, config)
    n = state.count - position[:, 0]  # (B,) how many are real
    unit = F.normalize(k.to(state.anchor.dtype), dim=-1)  # (B, T, KVH, D)
    sums = torch.cat((state.anchor[:, :1], unit), dim=1).cumsum(1)  # (B, T+1, KVH, D) before each, and after the last
    score = F.cosine_similarity(unit, sums[:, :-1], dim=-1).mean(-1).masked_fill(position >= state.count[:, None], math.nan)
    state.anchor[:, 0] = sums[torch.arange(len(k), device=k.device), n]

    ring = position[:, :1] + torch.arange(W, device=k.device)  # mod W, the columns of the W tokens before, oldest first
    scores = torch.cat((state.history.gather(1, ring % W), score), dim=1)  # (B, W+T)
    redundant = above_threshold(score, scores[:, :-1].unfold(1, W, 1), position.clamp(max=W), ratio) & free
    latest = n[:, None] + torch.arange(W, device=k.device)
    state.history.scatter_(1, (ring + n[:, None]) % W, scores.gather(1, latest))
    return redundant, score


STEP = 0.1  # of the adjusted threshold, in units of the scores' spread


def adjusted_threshold(k, v, n_new, state, ratio, config):
    """token_filter's scores against a threshold as the paper words it, "adjusted continuously so that the achieved ratio tracks
    the target", with O(1) memory: T rises by STEP (1 - r) spreads when a score is above it, and falls by STEP r when not, so it
    stands still where a share r is above. It starts at the mean of the warm-up's. The spread is the standard deviation of the
    latest scores, about 64 of them.

    state.tracked (B, 3): T, and the running mean and variance of the scores; rows cannot be selected.
    """
    position = state.count[:, None] + torch.arange(k.shape[1], device=k.device)  # before token_filter moves it on
    _, score = token_filter(k, v, n_new, state, torch.zeros_like(ratio), config)
    tracked = getattr(state, "tracked", torch.stack((score[:, 0], score[:, 0], torch.zeros_like(score[:, 0])), dim=1))
    above = torch.zeros_like(score, dtype=torch.bool)
    for t, s in enumerate(score.unbind(1)):
        threshold, mean, variance = tracked.unbind(1)
        above[:, t] = s > threshold
        weight = 1 / (position[:, t] + 1).clamp(max=64)  # a plain mean at first, then the latest count more
        step = STEP * variance.sqrt() * (above[:, t].to(s) - ratio.to(s))
        variance, mean = (1 - weight) * (variance + weight * (s - mean) ** 2), mean + weight * (s - mean)
        moved = torch.where(position[:, t] < config.warmup, mean, threshold + step), mean, variance
        tracked = torch.where(s.isnan()[:, None], tracked, torch.stack(moved, dim=1))
    state.tracked = tracked
    return above & (position >= max(config.warmup, 1)), score


def rivals(p, n_layers, window):
    """(label, FilterConfig, criterion) of each rival at ratio p. The last two have other tokens found redundant: by chance, or by
    an adjusted threshold.

    StreamingLLM has a fixed budget where the others keep a share, so it is there twice: with the same cache at a window's
    end, B = (1-p) W tokens; and with the same read over the window, where the min(t, B) tokens that are seen at t add up to
    (1-p) of the t that dense sees. KeyDiff ranks among 32 scores only: its scores fall while the mean settles, and among
    256 it would skip a third where p is half.
    """
    config = FilterConfig(prune=p, schedule="uniform", warmup=0)
    yield "no attention in last layers", config, last_layers(n_layers - round(p * n_layers))
    for label, share in (("held", 1 - p), ("read", 1 - math.sqrt(p))):
        latest = max(1, round(share * window) - SINKS)  # a token itself is one of them
        yield f"StreamingLLM, as much {label}", preset("cache", prune=p, warmup=SINKS, recent=latest - 1), recent_only
    yield "KeyDiff, online", preset("cache", prune=p, history=32), key_distance
    yield "cache, random tokens", preset("cache", prune=p, fusion="random"), token_filter
    yield "cache, adjusted threshold", preset("cache", prune=p), adjusted_threshold


VARIED: dict[str, tuple] = {
    **{name: CHOICES[name] for name in ("schedule", "fusion", "keys")},
    "gamma": (0.5, 0.7, 0.9, 0.95, 0.99),
    "warmup": (0, 4, 16, 64),
    "history": (64, 128, 256, 512, 1024),
    "recent": (0, 8, 16, 32, 64, 128),
}


def variations(base: FilterConfig):
    """(label, FilterConfig) with one field of the base changed at a time, to each other value of VARIED."""
    for name, values in VARIED.items():
        for value in values:
            if value != getattr(base, name):
                yield f"{name}={value}", replace(base, **{name: value})


# --------------------------------------------------------------------------------------------------- pass key

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
            raise ValueError(f"a pass key needs a text of more than {length} tokens")
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


# --------------------------------------------------------------------------------- tables, files and pictures

COLUMNS = """\
skipped  redundant (token, layer) pairs over all pairs
KV held  keys and values in the cache at the end of a text over those of all its tokens in all layers
KV read  keys and values that all queries of a text have read over those that they read without a filter"""


class Report:
    """A table that grows row by row. Each row is printed, and the files that were asked for are written anew, at once."""

    def __init__(self, args, protocol: str, draw: Callable, width: int):
        self.args, self.protocol, self.draw, self.width = args, protocol, draw, width
        self.rows: list[dict] = []
        print(protocol)

    def add(self, row: dict):
        """A row: column names to strings or numbers, the same names every time."""
        widths = [self.width, *(max(len(name), 9) + 2 for name in list(row)[1:])]
        if not self.rows:
            print("\n" + "".join(f"{name:{'>' if i else '<'}{w}}" for i, (name, w) in enumerate(zip(row, widths))))
        cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
        print("".join(f"{cell:{'>' if i else '<'}{w}}" for i, (cell, w) in enumerate(zip(cells, widths))), flush=True)
        self.rows.append(row)
        if self.args.json:
            rows = [{k: None if v != v else v for k, v in each.items()} for each in self.rows]  # JSON has no NaN
            table = {"command": sys.argv, "protocol": self.protocol, "rows": rows}
            Path(self.args.json).write_text(json.dumps(table, indent=1, allow_nan=False), encoding="utf-8")
        if self.args.csv:
            with open(self.args.csv, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
                writer.writerows(self.rows)
        if self.args.plot:
            figure = self.draw(self.rows)
            figure.suptitle(self.protocol.splitlines()[0], fontsize=8, wrap=True)
            figure.savefig(self.args.plot, dpi=120)


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


def draw_passkey(rows):
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


# ------------------------------------------------------------------------------------------- the command line

Setting = tuple[str, FilterConfig | None, Callable]  # label, filter, criterion


def sweep(model, windows, overlap, settings: list[Setting], losses, args, report: Report):
    """Perplexity of each setting; the first is dense. Ctrl-C shows what is known by then."""
    edges = [0, *(64 << i for i in range(30) if 64 << i < args.window), args.window]
    dense = None
    for label, config, criterion in settings:
        with tqdm(total=losses, desc=label, unit=" tokens", leave=False) as bar:
            try:
                for score in evaluate(model, windows, config, args.batch, overlap=overlap, criterion=criterion):
                    bar.set_postfix_str(f"perplexity {score.perplexity:.2f}")
                    bar.update(score.tokens - bar.n)
            except KeyboardInterrupt:
                bar.close()
                if bar.n:
                    print(f"interrupted: {label}: perplexity {score.perplexity:.3f} over the first {score.tokens} of {losses} losses")
                raise
        dense = dense or score.perplexity
        row = {"setting": label, "prune": float(config.prune) if config else 0.0}
        row |= {"perplexity": score.perplexity, "x dense": score.perplexity / dense, **score.shares}
        if args.by_position:
            row |= {f"{lo}-{hi - 1}": score.between(lo, hi) for lo, hi in pairwise(edges)}
        report.add(row)


def sweep_passkeys(model, tokenizer, settings: list[Setting], args, report: Report):
    """Pass keys found, of each setting at each length."""
    for label, config, _ in settings:
        for length in args.lengths:
            figures = passkey(model, tokenizer, length, args.depths, args.trials, config, args.chat, args.seed)
            report.add({"setting": label, "prune": config.prune if config else 0.0, "length": length, **figures})


def main(argv=None):
    parser = Parser(description="What filtering costs: perplexity of a text, ablations, finding a pass key.")
    add_model_arguments(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text, tokenised whole")
    parser.add_argument("--window", type=int, default=768, metavar="N", help="tokens scored together (default: %(default)s)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from a window to the next (default: end to end); where "
                        "windows overlap, a token is scored in the first of them only")  # fmt: skip
    parser.add_argument("--offsets", type=int, nargs="+", metavar="N", help="instead, windows that start at these tokens")
    parser.add_argument("--bos", action="store_true", help="begin every window with the BOS token, as one of its N")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use only the text's first N tokens")
    parser.add_argument("--prune", type=float, nargs="+", metavar="P", help="shares of (token, layer) pairs to skip (default: 0.1 0.2 "
                        "0.3 0.5; with --ablate or --passkey 0.3); dense is always measured first")  # fmt: skip
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="windows at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --fusion random and of the pass keys (default: 0)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ablate", action="store_true", help="change one thing at a time from each --preset at one ratio")
    what.add_argument("--rivals", action="store_true", help="also what else one could do with the same budget, at each ratio")
    what.add_argument("--by-position", action="store_true", help="also perplexity by position in the window")
    what.add_argument("--passkey", action="store_true", help="hide a five-digit key in filler text, and ask for it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], metavar="N",
                        help="of --passkey: tokens of prompt and answer together (default: 1024 2048)")  # fmt: skip
    parser.add_argument("--depths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1], metavar="X",
                        help="of --passkey: where the key is, from 0, the start, to 1 (default: 0 0.25 0.5 0.75 1)")  # fmt: skip
    parser.add_argument("--trials", type=int, default=1, metavar="N", help="of --passkey: keys for each length and depth (default: 1)")
    parser.add_argument("--chat", action="store_true", help="of --passkey: ask in the chat template")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON, after each row")
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV, after each row")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the table (needs matplotlib); not with --ablate")
    add_filter_arguments(parser, several=True, default="all of them; with --ablate local cache")
    args = parser.parse_args(argv)

    if min(args.window, args.max_tokens or 2) < 2 or args.max_tokens == 0 or min(args.batch, args.trials, *args.lengths) < 1:
        fail("--window and --max-tokens must be at least 2, --batch, --trials and --lengths at least 1")
    if not all(0 <= depth <= 1 for depth in args.depths):
        fail("--depths must lie between 0 and 1")
    if args.stride is not None and (args.offsets or not 1 <= args.stride <= args.window - args.bos):
        fail("--stride must be at least 1 and not more than --window (less the BOS token), and goes without --offsets")
    names = args.preset or (["local", "cache"] if args.ablate else list(PRESETS))
    prunes = args.prune or ([0.3] if args.ablate or args.passkey else [0.1, 0.2, 0.3, 0.5])
    if args.ablate and (len(prunes) > 1 or prunes == [0] or args.plot):
        fail("--ablate takes one --prune above 0, and draws no --plot")
    if not args.passkey and not args.text:
        fail("no text: give --text FILE (or --passkey)")
    filters = [(name, config) for name in names for p in prunes if (config := filter_from(args, name, p))]  # 0 is the dense row
    settings: list[Setting] = [("dense", None, token_filter), *((name, config, token_filter) for name, config in filters)]
    text = "" if args.passkey else read_text(args.text)
    if not args.passkey and (not text.strip() or "\0" in text):
        fail(f"{args.text}: {'is a binary file, not text' if text.strip() else 'the text is empty'}")
    for flag, path, endings in (("--json", args.json, ()), ("--csv", args.csv, ()), ("--plot", args.plot, (".png", ".svg", ".pdf"))):
        if path:
            check_output(flag, path, endings)

    try:
        model, tokenizer = load(args.checkpoint, args.device, args.dtype, progress=True)
        ids = tokenizer.encode(text, bos=False)[: args.max_tokens]
    except CheckpointError as e:
        fail(e)
    context, dtype = model.config.max_positions, str(model.embed.weight.dtype).removeprefix("torch.")

    if args.passkey:
        if max(args.lengths) > context:
            fail(f"--lengths {max(args.lengths)} is longer than the model's context of {context}")
        try:
            passkey_prompt(tokenizer, "00000", min(args.lengths), 0, args.chat)
        except (CheckpointError, ValueError) as e:  # no chat template; too short
            fail(e)
        form = "question in the chat template" if args.chat else 'plain text to be continued after "The pass key is"'
        protocol = f"pass key of five digits, {args.trials} for each length and depth, {form}; greedy decoding; {dtype}\n{COLUMNS}"
        try:
            sweep_passkeys(model, tokenizer, settings, args, Report(args, protocol, draw_passkey, 10))
        except FloatingPointError as e:
            fail(e)
        return

    if args.window > context:
        fail(f"--window {args.window} is longer than the model's context of {context}")
    if len(ids) < 2:
        fail(f"{args.text}: {len(ids)} tokens are too few: perplexity needs at least two")
    if args.bos and tokenizer.bos_id is None:
        fail("--bos: the checkpoint's tokenizer has no BOS token")
    bos = tokenizer.bos_id if args.bos else None
    windows, overlap = cut(ids, args.window, args.stride, bos)
    if args.offsets:
        if not all(0 <= offset < len(ids) - 1 for offset in args.offsets):
            fail(f"--offsets must lie in the text's {len(ids)} tokens, at least one before the last")
        windows = [cut(ids[offset:], args.window, None, bos)[0][0] for offset in args.offsets]
    if args.rivals:
        for p in filter(None, prunes):
            settings += rivals(p, model.config.n_layers, max(map(len, windows)))
    if args.ablate:
        settings += [(f"{name}, {label}", config, token_filter) for name, base in filters for label, config in variations(base)]
    losses = sum(len(window) - max(overlap if i else 0, 1) for i, window in enumerate(windows))
    if args.offsets:
        layout = f"at tokens {', '.join(map(str, args.offsets))}"
    else:
        layout = f"{args.stride} apart, each token scored once" if args.stride else "end to end"
    protocol = (
        f"{Path(args.text).name}: {len(ids)} tokens, {'BOS before each window' if args.bos else 'no BOS'}; "
        f"{len(windows)} windows of up to {args.window} {layout}; {losses} losses; {dtype}\n{COLUMNS}"
    )
    longest, warmup = max(map(len, windows)), max((config.warmup for _, config in filters), default=0)
    if longest <= warmup:
        note = f"note: the first {warmup} tokens of a window (the warm-up) are not filtered, and no window is longer"
        print(note, file=sys.stderr)
    report = Report(args, protocol, draw_positions if args.by_position else draw_reads, 2 + max(len(s[0]) for s in settings))
    try:
        sweep(model, windows, overlap, settings, losses, args, report)
    except FloatingPointError as e:
        fail(e)


if __name__ == "__main__":
    as_process(main)
