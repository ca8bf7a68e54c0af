"""The method as a literal loop, one token and one head at a time.

It is what token_filter.py is tested against (test_filter.py), and what the golden files are made
with (make.py). `filter_token` is the whole method, for one token; README quotes it.
`filter_token_by_queries` is fusion "key-query".

Shapes: B sequences, T tokens, KVH key/value heads, D head size, W scores remembered, L layers.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch

EPS = 1e-6  # of the fusion
QUERY_WEIGHT = 0.5  # of queries in fusion "key-query"


def filter_token(k, v, past, ratio, config):
    """Whether one token is redundant in one layer, and its score: k, v (KVH, D) arrays.

    past: what the layer remembers of the sequence, moved on: anchors A_K and A_V, and all scores.
    """
    if not past.scores:  # the first token is its own anchor
        past.A_K = k
        past.A_V = v
    c_k = [cosine(k[h], past.A_K[h]) for h in range(len(k))]
    c_v = [cosine(v[h], past.A_V[h]) for h in range(len(v))]
    score = fuse(c_k, c_v, config.fusion)

    is_past_warmup = len(past.scores) >= max(config.warmup, 1)
    recent = past.scores[-config.history :]
    redundant = is_past_warmup and is_above(score, recent, ratio)

    past.scores.append(score)
    past.A_K = config.gamma * past.A_K + (1 - config.gamma) * k
    past.A_V = config.gamma * past.A_V + (1 - config.gamma) * v
    return redundant, score


def filter_token_by_queries(k, q, past, ratio, config):
    """filter_token with fusion "key-query": q (KVH, D), the mean of each key head's queries.

    past: anchors A_K and A_Q, all mean cosines to them, c_k and c_q, and all scores.
    """
    if not past.scores:  # the first token is its own anchor
        past.A_K = k
        past.A_Q = q
    c_k = sum(cosine(k[h], past.A_K[h]) for h in range(len(k))) / len(k)
    c_q = sum(cosine(k[h], past.A_Q[h]) for h in range(len(k))) / len(k)
    place_k = place(c_k, past.c_k[-config.history :])
    place_q = place(c_q, past.c_q[-config.history :])
    recent = past.scores[-config.history :]
    score = (place_k - QUERY_WEIGHT * place_q) / max(len(recent), 1)

    is_past_warmup = len(past.scores) >= max(config.warmup, 1)
    redundant = is_past_warmup and is_above(score, recent, ratio)

    past.scores.append(score)
    past.c_k.append(c_k)
    past.c_q.append(c_q)
    past.A_K = config.gamma * past.A_K + (1 - config.gamma) * k
    past.A_Q = config.gamma * past.A_Q + (1 - config.gamma) * q
    return redundant, score


def place(x, recent):
    """How many of the recent values are below x; those that are equal count half. NaN has none."""
    if math.isnan(x):
        return math.nan
    below = sum(1 for other in recent if other < x)
    equal = sum(1 for other in recent if other == x)
    return below + 0.5 * equal


def cosine(x, y):
    """0 where either norm is 0; no epsilon, so that scale does not matter."""
    norm_x = math.sqrt(sum(x * x))
    norm_y = math.sqrt(sum(y * y))
    if norm_x == 0 or norm_y == 0:
        return 0.0
    return sum(x * y) / norm_x / norm_y


def fuse(c_k, c_v, fusion):
    """The heads' cosines of one token (two lists of KVH numbers) -> its score."""
    mean_k = sum(c_k) / len(c_k)
    mean_v = sum(c_v) / len(c_v)
    var_k = sum((c - mean_k) ** 2 for c in c_k) / len(c_k)
    var_v = sum((c - mean_v) ** 2 for c in c_v) / len(c_v)
    if fusion == "variance":
        w_k = (var_v + EPS) / (var_k + var_v + 2 * EPS)
    elif fusion == "equal":
        w_k = 0.5
    elif fusion == "key":
        w_k = 1.0
    else:
        w_k = 0.0
    return w_k * mean_k + (1 - w_k) * mean_v


def is_above(score, recent, ratio):
    """The threshold rule on scores: recent holds the last n <= W scores before this one."""
    n = len(recent)
    if n == 0 or ratio == 0 or math.isnan(score):
        return False
    below = sum(1 for other in recent if other < score)  # NaN is below nothing, and ties are not
    return below >= math.ceil((1 - ratio) * n - 1e-9)


def is_settled(score, recent, ratio):
    """Whether the decision would be the same if the score were a little higher or lower."""
    return is_above(score - 1e-12, recent, ratio) == is_above(score + 1e-12, recent, ratio)


def filter_loop(k, v, lengths, ratio, config, state=None, q=None):
    """filter_token for every token of a batch, in float64.

    k, v: (B, T, KVH, D) arrays, of which row b has lengths[b] real tokens, then padding; ratio: B
    numbers; state: what an earlier call returned; q: as k, for fusion "key-query".
    Returns redundant (B, T), score (B, T), settled (B, T: see is_settled) and state, one namespace
    for each sequence.
    """
    B, T = k.shape[:2]
    redundant = np.zeros((B, T), bool)
    settled = np.ones((B, T), bool)
    score = np.full((B, T), np.nan)
    if state is None:
        state = [
            SimpleNamespace(A_K=None, A_V=None, A_Q=None, c_k=[], c_q=[], scores=[])
            for _ in range(B)
        ]
    for b, past in enumerate(state):
        for t in range(lengths[b]):
            is_past_warmup = len(past.scores) >= max(config.warmup, 1)
            recent = past.scores[-config.history :]
            if config.fusion == "key-query":
                redundant[b, t], score[b, t] = filter_token_by_queries(
                    k[b, t], q[b, t], past, ratio[b], config
                )
                continue  # always settled: its scores are exact, as they are made of ranks
            redundant[b, t], score[b, t] = filter_token(k[b, t], v[b, t], past, ratio[b], config)
            if is_past_warmup:
                settled[b, t] = is_settled(score[b, t], recent, ratio[b])
    return redundant, score, settled, state


def tail_by_bisection(p, L):
    """min(1, a*l/(L-1)) with the a whose mean over l = 0 .. L-1 is p <= (L-1)/L."""
    slope = np.arange(L) / (L - 1)
    low = 0.0
    high = L - 1.0
    for _ in range(100):
        a = (low + high) / 2
        if np.minimum(1, a * slope).mean() < p:
            low = a
        else:
            high = a
    return np.minimum(1, a * slope)


def drift(B, T, KVH, D, seed=0):
    """Keys and values (B, T, KVH, D) that drift slowly, with noise on top, as those of text do."""
    rng = torch.Generator().manual_seed(seed)

    def normal(n):
        return torch.randn(2, B, n, KVH, D, generator=rng, dtype=torch.float64)

    start = normal(1)
    steps = normal(T)
    noise = normal(T)
    return start + 0.2 * steps.cumsum(2) + 0.5 * noise
