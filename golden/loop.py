"""The method as a literal loop, one token and one head at a time: what token_filter.py is tested against (test_filter.py), and what the
golden files are made with (make.py).

Shapes: B sequences, T tokens, KVH key/value heads, D head size, W scores remembered, L layers.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch

EPS = 1e-6  # of the fusion


def cosine(x, y):
    """0 where either norm is 0; no epsilon, so that scale does not matter."""
    norm_x, norm_y = math.sqrt(sum(x * x)), math.sqrt(sum(y * y))
    return 0.0 if norm_x == 0 or norm_y == 0 else sum(x * y) / norm_x / norm_y


def fuse(c_k, c_v, fusion):
    """The heads' cosines of one token (two lists of KVH numbers) -> its score."""
    mean_k, mean_v = sum(c_k) / len(c_k), sum(c_v) / len(c_v)
    var_k = sum((c - mean_k) ** 2 for c in c_k) / len(c_k)
    var_v = sum((c - mean_v) ** 2 for c in c_v) / len(c_v)
    w_k = {"variance": (var_v + EPS) / (var_k + var_v + 2 * EPS), "equal": 0.5, "key": 1.0, "value": 0.0}[fusion]
    return w_k * mean_k + (1 - w_k) * mean_v


def is_above(score, recent, ratio):
    """The threshold rule on scores: recent holds the last n <= W scores before this one."""
    n = len(recent)
    below = sum(1 for other in recent if other < score)  # strictly, so ties keep; NaN is below nothing
    return n > 0 and ratio > 0 and not math.isnan(score) and below >= math.ceil((1 - ratio) * n - 1e-9)


def filter_loop(k, v, n_new, ratio, config, state=None):
    """The method, one token and one head at a time, in float64.

    k, v: (B, T, KVH, D) arrays, row b has n_new[b] real tokens, then padding; ratio: B numbers; state: what an earlier
    call returned. Returns redundant (B, T), score (B, T), settled (B, T) and state, one namespace per sequence.
    A decision is settled when moving the score by 1e-12 would not change it.
    """
    B, T, KVH, _ = k.shape
    redundant, settled, score = np.zeros((B, T), bool), np.ones((B, T), bool), np.full((B, T), np.nan)
    state = state or [SimpleNamespace(A_K=None, A_V=None, scores=[]) for _ in range(B)]
    for b, past in enumerate(state):
        for t in range(n_new[b]):
            if not past.scores:  # (1) the anchors start at the first token's own k, v
                past.A_K, past.A_V = k[b, t].copy(), v[b, t].copy()
            c_k = [cosine(k[b, t, h], past.A_K[h]) for h in range(KVH)]  # (2) before t is averaged in
            c_v = [cosine(v[b, t, h], past.A_V[h]) for h in range(KVH)]
            s = score[b, t] = fuse(c_k, c_v, config.fusion)  # (3)
            if len(past.scores) >= max(config.warmup, 1):  # (5)
                recent = past.scores[-config.history :]
                redundant[b, t] = is_above(s, recent, ratio[b])  # (4)
                settled[b, t] = is_above(s - 1e-12, recent, ratio[b]) == is_above(s + 1e-12, recent, ratio[b])
            past.scores.append(s)  # warm-up or redundant, every score enters the history
            for h in range(KVH):  # (1) and every token enters the anchors
                past.A_K[h] = config.gamma * past.A_K[h] + (1 - config.gamma) * k[b, t, h]
                past.A_V[h] = config.gamma * past.A_V[h] + (1 - config.gamma) * v[b, t, h]
    return redundant, score, settled, state


def tail_by_bisection(p, L):
    """min(1, a*l/(L-1)) with the a whose mean over l = 0 .. L-1 is p <= (L-1)/L."""
    slope, low, high = np.arange(L) / (L - 1), 0.0, L - 1.0
    for _ in range(100):
        a = (low + high) / 2
        low, high = (a, high) if np.minimum(1, a * slope).mean() < p else (low, a)
    return np.minimum(1, a * slope)


def drift(B, T, KVH, D, seed=0):
    """Keys and values (B, T, KVH, D) that drift slowly, with noise on top, as those of text do."""
    rng = torch.Generator().manual_seed(seed)
    start, steps, noise = (torch.randn(2, B, n, KVH, D, generator=rng, dtype=torch.float64) for n in (1, T, T))
    return start + 0.2 * steps.cumsum(2) + 0.5 * noise
