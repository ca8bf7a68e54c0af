"""Token Filtering: decide, while the model runs, which tokens a layer can do without (arXiv 2512.07090).

A token is redundant in a layer when its key and value look like the running averages (anchors) of those before it.
The method needs no calibration and changes no weight; `token_filter` at the end of this file is all of it.

Shapes: B sequences, T new tokens, KVH key/value heads, D head size, W scores remembered (`history`), L layers.
"""

import math
from dataclasses import dataclass, fields

import torch

CHOICES = {
    "mode": ("attention", "cache"),
    "fill": ("zero", "anchor"),
    "schedule": ("tail", "uniform", "head", "last"),
    "fusion": ("variance", "equal", "key", "value", "random"),
    "keys": ("rotated", "unrotated"),
}
EPS = 1e-6  # keeps w_k defined (and 1/2) when the heads agree perfectly on both sides


@dataclass(frozen=True)
class FilterConfig:
    """How to filter. The defaults are the paper's method; `mode="cache"`, `fill="anchor"` and `grace` are ours.

    Raises ValueError, naming the field, when a value is out of range.
    """

    prune: float = 0.5  # p, the share of (token, layer) pairs to make redundant, in [0, 1)
    mode: str = "attention"  # a redundant token skips attention and is not cached | "cache": it is only not cached
    fill: str = "zero"  # what a skipped attention adds: nothing | "anchor": the average output of the tokens kept
    grace: int = 0  # a redundant token's k, v stay visible to tokens at most this many positions younger
    schedule: str = "tail"  # how p is spread over the layers, see layer_ratios
    gamma: float = 0.9  # decay of the running averages, in [0, 1)
    warmup: int = 16  # the first max(warmup, 1) tokens of a sequence are always kept
    history: int = 256  # W, how many past scores a new score is ranked against
    fusion: str = "variance"  # how key and value similarity become one score; the others are for ablation
    keys: str = "rotated"  # compare keys with RoPE applied, as the cache holds them | "unrotated": before RoPE
    seed: int = 0  # of fusion="random"

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("prune", "gamma"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} is not a number in [0, 1)")
        for name, least in (("grace", 0), ("warmup", 0), ("history", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r} is not a whole number of at least {least}")
        if self.mode == "cache" and self.fill != "zero":
            raise ValueError(f"fill={self.fill!r} has no meaning in mode='cache', where every token attends")


PRESETS: dict[str, dict] = {
    "paper": {},
    "anchored": {"fill": "anchor", "grace": 32},
    "cache": {"mode": "cache", "grace": 32, "schedule": "uniform"},
}


def preset(name, **overrides) -> FilterConfig:
    """The named preset with some fields changed: preset("cache", prune=0.3). Raises ValueError for unknown names."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    unknown = overrides.keys() - {field.name for field in fields(FilterConfig)}
    if unknown:
        raise ValueError(f"FilterConfig has no field {', '.join(sorted(unknown))}")
    return FilterConfig(**{**PRESETS[name], **overrides})


def layer_ratios(config: FilterConfig, n_layers: int) -> list[float]:
    """Each layer's target ratio r_l in [0, 1]; their mean is p.

    tail: r_l = min(1, a*l/(L-1)), growing towards the later layers.  head: tail reversed.  uniform: r_l = p.
    last: max(0.9, p) in the last layers only, the layer before them taking the remainder.
    """
    p, L = config.prune, n_layers
    if config.schedule == "uniform":
        return [p] * L
    if config.schedule == "last":
        top = max(0.9, p)
        full = math.floor(p * L / top + 1e-9)
        return ([0.0] * (L - full - 1) + [max(0.0, p * L - full * top)] + [top] * full)[-L:]
    for full in range(L - 1):  # how many layers the min() holds at 1: the fewest that leave the next one at most 1
        ramp = L - 1 - full  # the last layer below them
        a = (p * L - full) * (L - 1) / (ramp * (ramp + 1) / 2)
        if a * ramp <= L - 1:
            ratios = [a * l / (L - 1) for l in range(ramp + 1)] + [1.0] * full
            break
    else:  # p > (L-1)/L
        ratios = [p * L - (L - 1)] + [1.0] * (L - 1)
    return ratios[::-1] if config.schedule == "head" else ratios


@dataclass
class FilterState:
    """What one layer's filter remembers of each sequence; float32, or float64 in a float64 model."""

    anchor: torch.Tensor  # (B, 2, KVH, D) running averages of keys [:, 0] and of values [:, 1]
    history: torch.Tensor  # (B, W) the latest scores, newest last; NaN where there is none yet
    count: torch.Tensor  # (B,) int64, tokens seen so far = position of the next one
    layer: int  # only for fusion="random"

    @staticmethod
    def new(B, kv_heads, head_dim, config: FilterConfig, layer, dtype, device) -> "FilterState":
        """The state of B sequences of which nothing has been seen."""
        return FilterState(
            anchor=torch.zeros(B, 2, kv_heads, head_dim, dtype=dtype, device=device),
            history=torch.full((B, config.history), math.nan, dtype=dtype, device=device),
            count=torch.zeros(B, dtype=torch.int64, device=device),
            layer=layer,
        )

    def select(self, rows):
        """Keep these rows (B',) int64, in this order."""
        self.anchor, self.history, self.count = self.anchor[rows], self.history[rows], self.count[rows]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.anchor, self.history, self.count))


def running_average(x, start, gamma, block=128):
    """A_0 = start, A_{t+1} = gamma*A_t + (1-gamma)*x_t for a whole chunk: x (B, T, ...) -> A_0..A_T (B, T+1, ...).

    Closed form, A_t = gamma^t A_0 + (1-gamma) sum_{s<t} gamma^(t-1-s) x_s: a product with a small triangular matrix
    per block of tokens, so that time and memory grow linearly with T.
    """
    averages = [start[:, None]]
    for part in x.split(block, dim=1):
        t = torch.arange(part.shape[1] + 1, device=x.device, dtype=torch.float64)
        decay = torch.tril(gamma ** (t[:, None] - t).clamp(min=0))
        decay[:, 1:] *= 1 - gamma
        terms = torch.cat((averages[-1][:, -1:], part), dim=1).flatten(2)
        averages.append((decay[1:].to(x.dtype) @ terms).unflatten(2, x.shape[2:]))
    return torch.cat(averages, dim=1)


def above_threshold(score, history, count, ratio):
    """Which scores lie above the (1-ratio) quantile of the n <= W scores before them: (B, T) bool.

    With c of those n strictly below a score, it is above when n > 0 and c >= ceil((1-ratio)*n - 1e-9). Strictly, so
    that ties keep the token. NaN is below nothing and above nothing. score (B, T), history (B, W), count (B,) as in
    FilterState, ratio a float or (B,) tensor, one for each sequence; 0 is above nothing.
    """
    W, T = history.shape[1], score.shape[1]
    recent = torch.cat((history, score), dim=1)[:, :-1].unfold(1, W, 1)  # (B, T, W), a view: the W scores before each
    below = (recent < score[..., None]).sum(-1)  # (B, T)
    n = (count[:, None] + torch.arange(T, device=score.device)).clamp(max=W)
    ratio = torch.as_tensor(ratio, dtype=torch.float64, device=score.device).reshape(-1, 1)
    needed = torch.ceil((1 - ratio) * n - 1e-9)
    return (ratio > 0) & (n > 0) & (below >= needed) & ~score.isnan()


def pseudo_random(position, layer, seed):
    """Uniform numbers in [0, 1), float64, that depend on (seed, layer, position) alone: an integer hash."""
    x = (position + 0x9E3779B1 * (layer + 1) + 0x85EBCA6B * seed) & 0xFFFFFFFF
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (x ^ (x >> 16)).double() / 2**32


def token_filter(k, v, n_new, state: FilterState, ratio, config: FilterConfig):
    """Score a chunk of new tokens of one layer and say which are redundant; `state` moves on past the chunk.

    For token t, with anchors A before t is averaged in, means and population variances over the KVH heads:
        c_k[h] = cos(k_t[h], A_K[h]),  c_v[h] = cos(v_t[h], A_V[h]);  0 where either vector is 0
        w_k    = (var(c_v) + eps) / (var(c_k) + var(c_v) + 2 eps);    the side whose heads agree counts more
        s_t    = w_k mean(c_k) + (1 - w_k) mean(c_v)
        t is redundant when past the warm-up and s_t is above the (1 - ratio) quantile of the W scores before it
        A     <- gamma A + (1-gamma) (k_t, v_t);                      started at the first token's own k, v

    k, v (B, T, KVH, D); n_new (B,) int64: row b's first n_new[b] tokens are real, the rest padding; ratio: the layer's
    r_l, a float or (B,) tensor. Returns redundant (B, T) bool and score (B, T), where padding is False and NaN.
    """
    B, T = k.shape[:2]
    step = torch.arange(T, device=k.device)
    real = step < n_new[:, None]  # (B, T)
    position = state.count[:, None] + step

    # anchors, before each token and after the chunk
    x = torch.stack((k, v), dim=2).to(state.anchor.dtype)  # (B, T, 2, KVH, D)
    start = torch.where(state.count.view(B, 1, 1, 1) == 0, x[:, 0], state.anchor)
    anchors = running_average(x, start, config.gamma)  # (B, T+1, 2, KVH, D)
    before, after = anchors[:, :-1], anchors[torch.arange(B, device=k.device), n_new]

    # cosine similarity, 0 where a norm is 0
    norms = x.norm(dim=-1) * before.norm(dim=-1)
    similarity = torch.where(norms > 0, (x * before).sum(-1) / norms, 0)  # (B, T, 2, KVH)

    # fusion over heads
    mean_k, mean_v = similarity.mean(-1).unbind(-1)  # (B, T) each
    var_k, var_v = similarity.var(-1, correction=0).unbind(-1)
    if config.fusion == "variance":
        w_k = (var_v + EPS) / (var_k + var_v + 2 * EPS)
    else:
        w_k = {"equal": 0.5, "key": 1.0, "value": 0.0, "random": 0.5}[config.fusion]
    score = w_k * mean_k + (1 - w_k) * mean_v
    if config.fusion == "random":
        score = pseudo_random(position, state.layer, config.seed).to(score.dtype)
    score = score.masked_fill(~real, math.nan)

    # threshold, warm-up
    redundant = above_threshold(score, state.history, state.count, ratio)
    redundant &= real & (position >= max(config.warmup, 1))

    # the state after the chunk
    newest = n_new[:, None] + torch.arange(config.history, device=k.device)  # the W scores that end at the last real one
    state.history = torch.cat((state.history, score), dim=1).gather(1, newest)
    state.anchor, state.count = after, state.count + n_new
    return redundant, score
