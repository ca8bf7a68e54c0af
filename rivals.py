"""What else one could do with the same budget: rivals of token_filter.

Each has token_filter's signature and promises: k, v (B, T, KVH, D), n_new (B,) or None, state, ratio, config -> redundant, score.
But for the oracle, which makes a criterion of the texts it is to know.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from model import rope_frequencies, rope_table, rotate
from token_filter import PRESETS, FilterConfig, preset, rank, token_filter

SINKS = 16  # first tokens that StreamingLLM keeps, as many as our warm-up


def past_warmup(k, n_new, state, config):
    """Move state.count past a chunk. Returns the positions of its tokens, and which are real and past the warm-up, (B, T) both."""
    position = state.count[:, None] + torch.arange(k.shape[1], device=k.device)
    state.count += k.shape[1] if n_new is None else n_new
    return position, (position >= max(config.warmup, 1)) & (position < state.count[:, None])


def last_layers(p, n_layers):
    """Depth pruning, (FilterConfig, criterion): a share p of the layers, the last, have no attention past the first token, whatever
    the text."""
    first = n_layers - round(p * n_layers)

    def criterion(k, v, n_new, state, ratio, config):
        _, free = past_warmup(k, n_new, state, config)
        return free & (state.layer >= first), torch.full(free.shape, math.nan, device=k.device)

    return FilterConfig(prune=p, schedule="uniform", warmup=0), criterion


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
    unit = F.normalize(k.to(state.anchor.dtype), dim=-1)  # (B, T, KVH, D)
    sums = torch.cat((state.anchor[:, :1], unit), dim=1).cumsum(1)  # (B, T+1, KVH, D) before each, and after the last
    n = torch.ones_like(state.count) if n_new is None else n_new
    state.anchor[:, 0] = sums[torch.arange(len(k), device=k.device), n]
    return rank(F.cosine_similarity(unit, sums[:, :-1], dim=-1).mean(-1), n_new, state, ratio, config)


def by_chance(k, v, n_new, state, ratio, config, seed=0):
    """Any token is as good as another: its score is a hash of seed, layer, position and the signs of its values. The last have
    texts draw differently, whatever rows they are, and a text the same however it is fed.
    """
    signs = (v.flatten(2)[..., :31] > 0).long()  # (B, T, 31) or fewer, of 0 and 1
    x = (signs << torch.arange(signs.shape[-1], device=k.device)).sum(-1) * 0xC2B2AE35
    x += state.count[:, None] + torch.arange(k.shape[1], device=k.device)
    x = (x + 0x9E3779B1 * (state.layer + 1) % 2**32 + 0x85EBCA6B * seed % 2**32) & 0xFFFFFFFF
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return rank(((x ^ (x >> 16)).double() / 2**32).to(state.history.dtype), n_new, state, ratio, config)


@torch.inference_mode()
def oracle(model, rows, filter):
    """A criterion for these lists of ids alone, rows of one batch, that knows what comes: a token is worth the attention it will get
    from the queries that have it in their recent window no longer, their mean and that over heads, times its value's norm, all
    in the dense model. It says how far a choice of tokens can go, with the threshold that all others have. (Ranked among the
    whole text's, early tokens win, which more queries read.)

    Takes memory for the attention of a whole text in one layer, H T T numbers.
    """
    c, device, dtype = model.config, model.embed.weight.device, model.embed.weight.dtype
    worth = torch.zeros(c.n_layers, len(rows), max(map(len, rows)), device=device, dtype=torch.promote_types(dtype, torch.float32))
    for row, ids in enumerate(rows):
        t, x = torch.arange(len(ids), device=device), model.embed(torch.tensor([ids], device=device))  # (1, T, C)
        cos, sin = rope_table(t, rope_frequencies(c).to(device, worth.dtype), dtype)  # (T, 1, R)
        ago = t[:, None] - t  # (T, T)
        hidden = (ago < 0) | (ago >= (c.window or math.inf))
        for layer, block in enumerate(model.blocks):
            attn, h = block.attn, block.attn_norm(x)
            k, v = (part(h).view(-1, c.kv_heads, c.head_dim) for part in (attn.k, attn.v))  # (T, KVH, D)
            k, v = rotate(attn.k_norm(k), cos, sin), v.repeat_interleave(c.heads // c.kv_heads, dim=1)
            k, q = k.repeat_interleave(c.heads // c.kv_heads, dim=1), attn.queries(h[0], cos, sin)  # (T, H, D)
            attention = (torch.einsum("qhd,khd->hqk", q, k) / c.head_dim**0.5).masked_fill(hidden, -math.inf).softmax(-1)
            got = attention.masked_fill(ago <= filter.recent, 0).sum(1) * v.norm(dim=-1).T  # (H, T)
            worth[layer, row, : len(ids)] = got.mean(0) / (ago > filter.recent).sum(0).clamp(min=1)
            x = x + attn.o(torch.einsum("hqk,khd->qhd", attention, v).flatten(1)[None])
            x = x + block.mlp(block.mlp_norm(x))

    def criterion(k, v, n_new, state, ratio, config):
        position = state.count[:, None] + torch.arange(k.shape[1], device=device)
        score = -worth[state.layer].gather(1, position.clamp(max=worth.shape[2] - 1))
        return rank(score.to(state.history.dtype), n_new, state, ratio, config)

    return criterion


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


def rivals(p, n_layers, window, seeds=(0,)):
    """(label, FilterConfig, criterion) of each rival at ratio p; the oracle's is made for the texts first. The last have tokens
    found redundant by chance, under every preset, once for each seed.

    StreamingLLM has a fixed budget where the others keep a share, so it is there twice: with the same cache at a window's
    end, B = (1-p) W tokens; and with the same read over the window, where the min(t, B) tokens that are seen at t add up to
    (1-p) of the t that dense sees.
    """
    yield "no attention in last layers", *last_layers(p, n_layers)
    for label, share in (("held", 1 - p), ("read", 1 - math.sqrt(p))):
        latest = max(1, round(share * window) - SINKS)  # a token itself is one of them
        yield f"StreamingLLM, as much {label}", preset("cache", prune=p, warmup=SINKS, recent=latest - 1), recent_only
    yield "KeyDiff, online", preset("cache", prune=p), key_distance
    yield "cache, adjusted threshold", preset("cache", prune=p), adjusted_threshold
    yield "oracle", preset("cache", prune=p), oracle
    for name in PRESETS:
        for seed in seeds:
            label = f"{name}, random tokens" + (f", seed {seed}" if len(seeds) > 1 else "")
            yield label, preset(name, prune=p), partial(by_chance, seed=seed)
