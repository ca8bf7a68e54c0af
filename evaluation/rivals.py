"""What else one could do with the same budget, and what each choice of ours is worth.

    python -m evaluation.rivals [CHECKPOINT] --text FILE --window 768 --prune 0.3          baselines
    python -m evaluation.rivals [CHECKPOINT] --text FILE --window 768 --prune 0.3 --ablate

Baselines are filter functions: each has token_filter's signature and keeps its contract. With
--ablate one field of FilterConfig is changed at a time. Windows and columns are those of
eval_ppl.py.

Shapes: B sequences, T new tokens, KVH key/value heads, H query heads, D head size, L layers, C
width.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from cli.arguments import (
    Parser,
    add_filter_arguments,
    check_filter_arguments,
    filter_options,
    filters_from,
    share,
)
from cli.process import N_RANKS, fail, run_command
from cli.report import Report
from eval_ppl import (
    Setting,
    add_text_arguments,
    check_text_arguments,
    draw_reads,
    label_width,
    load_windows,
    measure,
    note_short_windows,
)
from filter_config import CHOICES, PRESETS, FilterConfig, preset
from model import Block, Transformer, apply_rope, rope_frequencies, rope_table
from token_filter import rank_scores, token_filter

# ---------------------------------------------------------------------------------- baselines

SINKS = 16  # first tokens that StreamingLLM keeps, as many as our warm-up


def past_warmup(k, lengths, state, config):
    """Move state.count past a chunk. Returns which tokens are real and past the warm-up, (B, T)."""
    T = k.shape[1]
    position = state.count[:, None] + torch.arange(T, device=k.device)
    state.count += T if lengths is None else lengths
    is_real = position < state.count[:, None]
    return is_real & (position >= config.n_sinks)


def recent_only(k, v, lengths, state, ratio, config, q=None):
    """StreamingLLM (arXiv 2309.17453), to run with mode="cache": every token past the warm-up is
    redundant.

    So only the sinks, a token itself and the config.recent before it are visible. Keys keep their
    positions in the text.
    """
    redundant = past_warmup(k, lengths, state, config)
    return redundant, torch.full(redundant.shape, math.nan, device=k.device)


def without_attention_from(first_layer):
    """Depth pruning: from this layer on no token past the first attends, whatever the text."""

    def filter_fn(k, v, lengths, state, ratio, config, q=None):
        redundant = past_warmup(k, lengths, state, config) & (state.layer >= first_layer)
        return redundant, torch.full(redundant.shape, math.nan, device=k.device)

    return filter_fn


def key_distance(k, v, lengths, state, ratio, config, q=None):
    """KeyDiff (arXiv 2504.15364): drop the tokens whose keys look most like the mean of all keys,
    each scaled to length 1.

    The original ranks what is cached, per head, when the cache is full. Here a token is ranked
    once, on arrival, by the mean over heads of its cosine with the mean before it, against the same
    threshold as token_filter's. state.anchor[:, 0] holds the sum, whose direction is the mean's.
    """
    unit = F.normalize(k.to(state.anchor.dtype), dim=-1)  # (B, T, KVH, D)
    # Before each token, and after the last: (B, T+1, KVH, D).
    sums = torch.cat((state.anchor[:, :1], unit), dim=1).cumsum(1)
    n_new = torch.ones_like(state.count) if lengths is None else lengths
    state.anchor[:, 0] = sums[torch.arange(len(k), device=k.device), n_new]
    score = F.cosine_similarity(unit, sums[:, :-1], dim=-1).mean(-1)  # (B, T)
    return rank_scores(score, lengths, state, ratio, config)


def by_chance(k, v, lengths, state, ratio, config, q=None, seed=0):
    """Random tokens: a token's score is a hash of seed, layer, position and its values' signs.

    The signs have texts draw differently, whatever rows they are in, and a text the same however it
    is fed.
    """
    signs = (v.flatten(2)[..., :31] > 0).long()  # (B, T, 31) or fewer, of 0 and 1
    bits = torch.arange(signs.shape[-1], device=k.device)
    position = state.count[:, None] + torch.arange(k.shape[1], device=k.device)
    x = (signs << bits).sum(-1) * 0xC2B2AE35
    x += position
    x += 0x9E3779B1 * (state.layer + 1) % 2**32
    x += 0x85EBCA6B * seed % 2**32
    x &= 0xFFFFFFFF
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    score = (x ^ (x >> 16)).double() / 2**32
    return rank_scores(score.to(state.history.dtype), lengths, state, ratio, config)


STEP = 0.1  # of the adjusted threshold, in units of the scores' spread


def adjusted_threshold(k, v, lengths, state, ratio, config, q=None):
    """token_filter's scores against a threshold as the paper words it, "adjusted continuously so
    that the achieved ratio tracks the target", with O(1) memory.

    The threshold rises by STEP (1 - r) spreads when a score is above it, and falls by STEP r when
    not, so it stands still where a share r is above. It starts at the mean of the warm-up's scores.
    The spread is the standard deviation of about the latest 64 scores.

    state.tracked (B, 3): threshold, and the running mean and variance of the scores. As it is not
    one of FilterState's own tensors, rows cannot be selected.
    """
    # Before token_filter moves it on.
    position = state.count[:, None] + torch.arange(k.shape[1], device=k.device)
    _, score = token_filter(k, v, lengths, state, torch.zeros_like(ratio), config, q)
    if not hasattr(state, "tracked"):
        first = score[:, 0]
        state.tracked = torch.stack((first, first, torch.zeros_like(first)), dim=1)
    tracked = state.tracked
    above = torch.zeros_like(score, dtype=torch.bool)
    for t, s in enumerate(score.unbind(1)):
        threshold, mean, variance = tracked.unbind(1)
        above[:, t] = s > threshold
        step = STEP * variance.sqrt() * (above[:, t].to(s) - ratio.to(s))
        # A plain mean at first, then the latest scores count more.
        weight = 1 / (position[:, t] + 1).clamp(max=64)
        new_variance = (1 - weight) * (variance + weight * (s - mean) ** 2)
        new_mean = mean + weight * (s - mean)
        in_warmup = position[:, t] < config.warmup
        new_threshold = torch.where(in_warmup, new_mean, threshold + step)
        moved = torch.stack((new_threshold, new_mean, new_variance), dim=1)
        tracked = torch.where(s.isnan()[:, None], tracked, moved)
    state.tracked = tracked
    return above & (position >= config.n_sinks), score


# --------------------------------------------------------------------------------- the oracle


@torch.inference_mode()
def oracle(model: Transformer, rows: list[list[int]], filter: FilterConfig):
    """A filter function for these texts alone, rows of one batch, that knows what comes.

    A token is worth the attention that it will get, in the dense model, from the queries that no
    longer have it among their recent tokens: their mean, times the norm of its value, averaged over
    the heads. It shows how far any choice of tokens can go, with the threshold that all others
    have. (Ranked among the whole text's, early tokens would win, as more queries read them.)

    Takes memory for the attention of a whole text in one layer, H * T * T numbers.
    """
    config = model.config
    device = model.embed.weight.device
    dtype = torch.promote_types(model.embed.weight.dtype, torch.float32)
    longest = max(len(ids) for ids in rows)
    worth = torch.zeros(config.n_layers, len(rows), longest, device=device, dtype=dtype)
    for row, ids in enumerate(rows):
        worth[:, row, : len(ids)] = future_attention(model, ids, filter.recent)

    def filter_fn(k, v, lengths, state, ratio, config, q=None):
        position = state.count[:, None] + torch.arange(k.shape[1], device=device)
        known = position.clamp(max=worth.shape[2] - 1)  # padding may lie beyond
        score = -worth[state.layer].gather(1, known)
        return rank_scores(score.to(state.history.dtype), lengths, state, ratio, config)

    return filter_fn


def future_attention(model: Transformer, ids: list[int], recent: int):
    """How much attention each token will get from queries more than `recent` after it: (L, T)."""
    config = model.config
    device = model.embed.weight.device
    dtype = model.embed.weight.dtype
    group = config.heads // config.kv_heads
    t = torch.arange(len(ids), device=device)
    distance = t[:, None] - t  # (T, T): how long before a query a token came
    hidden = (distance < 0) | (distance >= (config.window or math.inf))
    n_queries = (distance > recent).sum(0).clamp(min=1)  # (T,)

    exact = torch.promote_types(dtype, torch.float32)
    frequencies = rope_frequencies(config).to(device, exact)
    cos, sin = rope_table(t, frequencies, dtype)  # (T, 1, D)
    x = model.embed(torch.tensor(ids, device=device))  # (T, C)
    worth = []
    for block in model.blocks:
        assert isinstance(block, Block)
        attn = block.attn
        h = block.attn_norm(x)
        k = attn.k_norm(attn.k(h).view(-1, config.kv_heads, config.head_dim))  # (T, KVH, D)
        k = apply_rope(k, cos, sin).repeat_interleave(group, dim=1)  # (T, H, D)
        v = attn.v(h).view(-1, config.kv_heads, config.head_dim)
        v = v.repeat_interleave(group, dim=1)
        q = attn.queries(h, cos, sin)
        logits = torch.einsum("qhd,khd->hqk", q, k) / config.head_dim**0.5
        attention = logits.masked_fill(hidden, -math.inf).softmax(-1)  # (H, T, T)
        later = attention.masked_fill(distance <= recent, 0).sum(1) * v.norm(dim=-1).T  # (H, T)
        worth.append(later.mean(0) / n_queries)
        x = x + attn.o(torch.einsum("hqk,khd->qhd", attention, v).flatten(1))
        x = x + block.mlp(block.mlp_norm(x))
    return torch.stack(worth)


# ------------------------------------------------------------------------- what is compared


def no_attention_in_last_layers(label, p, n_layers) -> Setting:
    """Depth pruning of a share p of the layers, the last ones."""
    first_layer = n_layers - round(p * n_layers)
    all_but_first = FilterConfig(prune=p, schedule="uniform", warmup=0)
    return Setting(label, all_but_first, without_attention_from(first_layer))


def baselines(p, n_layers, window, seeds=(0,)) -> Iterator[Setting]:
    """Each baseline at ratio p; then every preset with random redundant tokens, for each seed.

    StreamingLLM has a fixed budget where the others keep a share, so it is there twice. With the
    same cache at a window's end it may see B = (1-p) W tokens. With the same read over the window,
    the min(t, B) tokens that are seen at t add up to (1-p) of the t that dense sees:
    B = (1 - sqrt(p)) W.
    """
    yield no_attention_in_last_layers("no attention in last layers", p, n_layers)

    for label, budget in (("held", 1 - p), ("read", 1 - math.sqrt(p))):
        n_recent = max(1, round(budget * window) - SINKS)  # a token itself is one of them
        config = preset("cache", prune=p, warmup=SINKS, recent=n_recent - 1)
        yield Setting(f"StreamingLLM, as much {label}", config, recent_only)

    yield Setting("cache, keys alone", preset("cache", prune=p, fusion="key"))
    cache = preset("cache", prune=p)
    yield Setting("KeyDiff, online", cache, key_distance)
    yield Setting("cache, adjusted threshold", cache, adjusted_threshold)
    yield Setting("oracle", cache, prepare=oracle)

    for name in PRESETS:
        for seed in seeds:
            label = f"{name}, random tokens"
            if len(seeds) > 1:
                label += f", seed {seed}"
            yield Setting(label, preset(name, prune=p), partial(by_chance, seed=seed))


VARIED: dict[str, tuple] = {
    "schedule": CHOICES["schedule"],
    "fusion": CHOICES["fusion"],
    "keys": CHOICES["keys"],
    "gamma": (0.5, 0.7, 0.9, 0.95, 0.99),
    "warmup": (0, 4, 16, 64),
    "history": (32, 64, 128, 256, 512, 1024),
    "recent": (0, 8, 16, 32, 64, 128),
}


def variations(base: FilterConfig) -> Iterator[tuple[str, FilterConfig]]:
    """(label, FilterConfig) with one field of the base changed, to each other value of VARIED.

    Fusion "key-query" is left out where the base's mode refuses it.
    """
    for name, values in VARIED.items():
        for value in values:
            if value == "key-query" and base.mode == "skip":
                continue
            if value != getattr(base, name):
                yield f"{name}={value}", replace(base, **{name: value})


# ---------------------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(description="Perplexity of baselines, beside the presets, or of ablations.")
    add_text_arguments(parser)
    parser.add_argument(
        "--prune",
        type=share,
        nargs="+",
        metavar="P",
        help="shares of (token, layer) pairs to skip (default: 0.1 0.2 0.3 0.5; with --ablate "
        "0.3); dense is always measured first",
    )
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="no baselines: change one thing at a time from each --preset, at one ratio",
    )
    parser.add_argument(
        "--seed",
        type=int,
        nargs="+",
        metavar="N",
        help="of the baselines that draw tokens at random; several: each in turn (default: 0)",
    )
    add_filter_arguments(parser, several=True, default="all of them; with --ablate local cache")
    return parser


def read_arguments(argv=None):
    """The arguments and the text. Fails in one line where they make no sense."""
    args = make_parser().parse_args(argv)
    if N_RANKS > 1:  # baselines look at the heads of one process alone
        fail("python -m evaluation.rivals is for one process: leave out torchrun")
    if args.ablate:
        args.prune = args.prune or [0.3]
        args.preset = args.preset or ["local", "cache"]
        if len(args.prune) > 1 or args.prune == [0] or args.plot:
            fail("--ablate takes one --prune above 0, and draws no --plot")
        if args.seed:
            fail("--seed does nothing with --ablate")
    else:
        args.prune = args.prune or [0.1, 0.2, 0.3, 0.5]
        args.preset = args.preset or list(PRESETS)
        for name in filter_options(args):
            fail(f"baselines are compared with the presets as they are: leave out --{name}")
        if args.seed and min(args.seed) < 0:
            fail("--seed must be at least 0")
    check_filter_arguments(args)
    return args, check_text_arguments(args)


def main(argv=None):
    args, text = read_arguments(argv)
    filters = filters_from(args, args.preset, args.prune)
    settings = [Setting("dense"), *(Setting(label, config) for label, config in filters)]
    if args.ablate:
        for label, base in filters:
            for change, config in variations(base):
                settings.append(Setting(f"{label}, {change}", config))

    model, windows, overlap, protocol = load_windows(args, text)
    note_short_windows(windows, settings)
    if not args.ablate:
        longest = max(len(window) for window in windows)
        for p in args.prune:
            if p > 0:
                settings += baselines(p, model.config.n_layers, longest, args.seed or [0])
    report = Report(args, protocol, draw_reads, label_width(settings))
    measure(args, model, windows, overlap, settings, report)


if __name__ == "__main__":
    run_command(main)
