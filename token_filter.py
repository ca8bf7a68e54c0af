"""Token Filtering: decide, while the model runs, which tokens a layer can do without (arXiv 2512.07090).

A token is redundant in a layer when its key and value look like running averages (anchors) of the latest before it.
The function `token_filter`, at the end, decides; schedule.py says what share of its tokens a layer is to find redundant.

Shapes: B sequences, T new tokens, KVH key/value heads, D head size, W scores remembered.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch

EPS = 1e-6  # keeps w_k defined, and at 1/2, when the heads agree perfectly on both sides


@dataclass(frozen=True)
class FilterConfig:
    """How to filter; the defaults are preset "paper". A value out of range raises ValueError, naming the field."""

    prune: float = 0.5  # p in [0, 1): the share of (token, layer) pairs to find redundant
    # a redundant token does not attend | attends to the first and the latest tokens alone | to all; it is never cached for long
    mode: Literal["skip", "local", "cache"] = "skip"
    recent: int = 0  # G: a token and the G before it are in sight of whatever attends, redundant or not
    schedule: Literal["tail", "uniform", "head", "last"] = "tail"  # how p is spread over the layers: schedule.py
    gamma: float = 0.9  # decay of the running averages, in [0, 1)
    warmup: int = 16  # the first max(warmup, 1) tokens of a sequence, its sinks, are always kept and in sight
    history: int = 64  # W: how many past scores a new score is ranked among
    fusion: Literal["variance", "equal", "key", "value"] = "variance"  # key and value similarity -> one score
    keys: Literal["rotated", "unrotated"] = "rotated"  # keys are compared as the cache holds them, after RoPE | before it

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("prune", "gamma"):
            if not isinstance(value := getattr(self, name), (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} is not a number in [0, 1)")
        for name, least in (("recent", 0), ("warmup", 0), ("history", 1)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name}={value!r} is not a whole number of at least {least}")


CHOICES = {name: get_args(hint) for name, hint in get_type_hints(FilterConfig).items() if get_args(hint)}
PRESETS: dict[str, dict] = {
    "paper": {},
    "local": {"mode": "local", "recent": 32, "schedule": "uniform"},
    "cache": {"mode": "cache", "recent": 32, "schedule": "uniform", "fusion": "key", "keys": "unrotated"},
}


def preset(name, **overrides) -> FilterConfig:
    """The named preset with some fields changed, preset("cache", prune=0.3); ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return FilterConfig(**PRESETS[name] | overrides)


class FilterState:
    """What one layer's filter remembers of each sequence; float32, or float64 in a float64 model."""

    var_mean = staticmethod(lambda cosine: torch.var_mean(cosine, dim=-1, correction=0))  # over all heads: see parallel.py

    def __init__(self, B, kv_heads, head_dim, config: FilterConfig, layer, dtype, device):
        self.anchor = torch.zeros(B, 2, kv_heads, head_dim, dtype=dtype, device=device)  # averages of keys [:, 0], of values [:, 1]
        # the latest scores, that of position p in column p mod W; NaN where there is none yet
        self.history = torch.full((B, config.history), math.nan, dtype=dtype, device=device)
        self.count = torch.zeros(B, dtype=torch.int64, device=device)  # tokens seen = position of the next
        self.layer = torch.full((), layer, device=device)  # for criteria that go by it; a number would be compiled in, layer by layer
        self.latest: tuple | None = None  # for whoever wants to look: cosine and w_k of the latest chunk

    def select(self, rows):
        """Keep these rows, an int64 tensor, in this order."""
        self.anchor, self.history, self.count = self.anchor[rows], self.history[rows], self.count[rows]

    def nbytes(self) -> int:
        return self.anchor.nbytes + self.history.nbytes + self.count.nbytes


def running_average(x, start, gamma):
    """A_0 = start (B, ...), A_{t+1} = gamma A_t + (1-gamma) x_t: all of A_0..A_T, (B, T+1, ...), for x (B, T, ...).

    Unrolled, A_t = gamma^t (A_0 + (1-gamma) sum_{s<t} gamma^-(s+1) x_s): a running sum, in which no token reaches back to an
    earlier one. Its terms grow, and roundings with them, so that those of A_t stay small; it starts anew every `most` tokens.
    """
    gamma, average = max(gamma, 1e-25), torch.cat((start[:, None], x), dim=1)  # at 0 there would be 0 times infinity
    most = max(1, int(60 / -math.log(gamma)))  # until terms are e^60, 1e26, times larger: float32 ends at 3e38
    power = (gamma ** torch.arange(min(most, x.shape[1]) + 1, device=x.device).double()).to(x.dtype).view(-1, *[1] * (x.ndim - 2))
    for first in range(0, x.shape[1], most):
        part = average[:, first : first + most + 1]  # A_first, then x
        part[:, 1:] *= (1 - gamma) / power[1 : part.shape[1]]
        part.cumsum_(1).mul_(power[: part.shape[1]])
    return average


def above_threshold(score, past, n, ratio):
    """Which scores are above the (1-ratio) quantile of the n scores before them: (B, T) bool.

    That is n > 0 and c >= ceil((1-ratio) n - 1e-9), c of the n being strictly below, so ties are not above. NaN is
    neither above nor below anything; nothing is above at ratio 0. score, n (B, T); past (B, T, W): the n scores, in any
    order, and NaN; ratio: a float, or a float64 tensor, () or (B, 1).
    """
    below, above = (past < score[..., None]).sum(-1), n.double() * ratio  # c, and how many may be above
    return (n - below <= above + 1e-9) & (above > 0) & (score == score)


def rank(score, n_new, state: FilterState, ratio, config: FilterConfig):
    """Which new scores (B, T) are above the threshold past the warm-up, (B, T) bool, and the scores, NaN at padding. `state`
    remembers them. Other arguments as in token_filter, n_new None only for one token a row.
    """
    (_, T), W, count = score.shape, config.history, state.count[:, None]
    if n_new is None:
        position, past, column, latest = count, state.history[:, None], count % W, score  # past (B, 1, W)
    else:
        window, step = torch.arange(W, device=score.device), torch.arange(T, device=score.device)
        position, score = count + step, score.masked_fill(step >= n_new[:, None], math.nan)
        scores = torch.cat((state.history.gather(1, (count + window) % W), score), dim=1)  # oldest first
        past, last = scores[:, :-1].unfold(1, W, 1), n_new[:, None] + window  # (B, T, W); (B, W), where the latest are
        column, latest = (count + last) % W, scores.gather(1, last)
    redundant = above_threshold(score, past, position.clamp(max=W), ratio) & (position >= max(config.warmup, 1))
    state.history.scatter_(1, column, latest)
    state.count += 1 if n_new is None else n_new
    return redundant, score


def token_filter(k, v, n_new, state: FilterState, ratio, config: FilterConfig):
    """Score a chunk of one layer's new tokens, say which are redundant, and move `state` past them.

    For token t, with A_K and A_V as they are before t, means and population variances over the KVH heads:
        c_k[h] = cos(k_t[h], A_K[h]),  c_v[h] = cos(v_t[h], A_V[h]);  0 where a norm is 0
        w_k    = (var(c_v) + eps) / (var(c_k) + var(c_v) + 2 eps);    the side whose heads agree counts more
        s_t    = w_k mean(c_k) + (1 - w_k) mean(c_v)
        t is redundant if past the warm-up and s_t is above the (1 - ratio) quantile of the W scores before it
        A     <- gamma A + (1-gamma) (k_t, v_t);                      started at the first token's own k, v

    k, v (B, T, KVH, D); n_new (B,) int64: row b's first n_new[b] tokens are real, the rest is padding; None: all are.
    ratio: r_l, as above_threshold takes it. Returns redundant (B, T) bool and score (B, T); padding is False and NaN.
    """
    # anchors: before each token, and after the last real one
    n_new = torch.full_like(state.count, k.shape[1]) if n_new is None and k.shape[1] > 1 else n_new
    x = torch.stack((k, v), dim=2).to(state.anchor.dtype)  # (B, T, 2, KVH, D)
    start = torch.where((state.count == 0).view(-1, 1, 1, 1), x[:, 0], state.anchor)
    if n_new is None:
        before, after = start[:, None], start.lerp(x[:, 0], 1 - config.gamma)
    else:
        anchors = running_average(x, start, config.gamma)  # (B, T+1, 2, KVH, D)
        before, after = anchors[:, :-1], anchors[torch.arange(len(k), device=k.device), n_new]

    # similarity
    norms = x.norm(dim=-1) * before.norm(dim=-1)
    cosine = ((x * before).sum(-1) / norms).masked_fill(norms == 0, 0)  # (B, T, 2, KVH)

    # fusion
    var, mean = state.var_mean(cosine)
    (var_k, var_v), (mean_k, mean_v) = (var + EPS).unbind(-1), mean.unbind(-1)  # (B, T) each
    w_k = var_v / (var_k + var_v)
    if config.fusion != "variance":
        w_k = torch.full_like(w_k, {"equal": 0.5, "key": 1.0, "value": 0.0}[config.fusion])
    score = torch.lerp(mean_v, mean_k, w_k)

    # threshold
    state.anchor.copy_(after)
    state.latest = cosine, w_k
    return rank(score, n_new, state, ratio, config)
