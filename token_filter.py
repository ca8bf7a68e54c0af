"""Token Filtering: decide, while the model runs, which tokens a layer can do without (arXiv
2512.07090).

A token is redundant in a layer when its key and value look like running averages (anchors) of the
tokens just before it. `token_filter`, at the end of this file, is the whole method.

Shapes: B sequences, T new tokens, KVH key/value heads, D head size, W scores remembered.
"""

import math
from collections.abc import Callable

import torch

from filter_config import FilterConfig

EPS = 1e-6  # keeps w_k defined, and at 1/2, when the heads agree perfectly on both sides


class FilterState:
    """What one layer's filter remembers of B sequences, in float32 (float64 in a float64 model)."""

    def __init__(
        self,
        B,
        kv_heads,
        head_dim,
        config: FilterConfig,
        layer,
        dtype,
        device,
        sum_over_devices: Callable | None = None,
    ):
        # Running averages of keys [:, 0] and of values [:, 1].
        self.anchor = torch.zeros(B, 2, kv_heads, head_dim, dtype=dtype, device=device)
        # The latest W scores, that of position p in column p mod W. NaN where there is none yet.
        self.history = torch.full((B, config.history), math.nan, dtype=dtype, device=device)
        # How many tokens it has seen, so the position of the next one.
        self.count = torch.zeros(B, dtype=torch.int64, device=device)
        # The layer's number, for filter functions that go by it. It is a tensor because
        # torch.compile would compile a plain number in, and so compile every layer anew.
        self.layer = torch.full((), layer, device=device)
        # On several devices, each of which has some of the heads: the function that adds a tensor
        # over all of them. None on one device.
        self.sum_over_devices = sum_over_devices
        # Of the latest chunk, for whoever wants to look: the cosines (B, T, 2, KVH) and w_k (B, T).
        self.latest_cosine: torch.Tensor | None = None
        self.latest_w_k: torch.Tensor | None = None

    def select(self, rows):
        """Keep these rows, an int64 tensor, in this order. A row named twice is copied."""
        self.anchor = self.anchor[rows]
        self.history = self.history[rows]
        self.count = self.count[rows]
        self.latest_cosine = None
        self.latest_w_k = None

    def nbytes(self) -> int:
        return self.anchor.nbytes + self.history.nbytes + self.count.nbytes


def running_averages(x, start, gamma, block=64):
    """A_0 = start (B, ...), A_{t+1} = gamma A_t + (1-gamma) x_t for x (B, T, ...).

    Returns A_0 .. A_T, (B, T+1, ...). Within a block of tokens
        A_t = gamma^t A_0 + (1-gamma) sum_{s<t} gamma^(t-1-s) x_s,
    which is one matrix product. For three tokens its matrix is, times (1-gamma):
        1        0      0
        gamma    1      0
        gamma^2  gamma  1
    """
    t = torch.arange(1, block + 1, device=x.device)
    lag = t[:, None] - t  # (block, block): how many tokens before A_t's latest one x_s stands
    # Powers are taken in float64, as in a chunk of another length they must come out the same.
    weight = torch.where(lag >= 0, (1 - gamma) * gamma ** lag.clamp(min=0).double(), 0).to(x.dtype)
    decay = (gamma ** t.double()).to(x.dtype)  # of A_0 in A_t
    averages = [start[:, None]]
    for part in x.split(block, dim=1):
        n = part.shape[1]
        first = averages[-1][:, -1:]  # (B, 1, ...)
        old = decay[:n].view(n, *[1] * (x.ndim - 2)) * first
        new = torch.einsum("ts,bs...->bt...", weight[:n, :n], part)
        averages.append(old + new)
    return torch.cat(averages, dim=1)


def exceeds_quantile(score, past, n, ratio):
    """Which scores are above the (1-ratio) quantile of the n scores before them: (B, T) bool.

    If `below` of the n scores are strictly below, n - below are as high or higher. The score
    exceeds the quantile if those are at most ratio * n. So ties do not exceed, NaN never does, and
    nothing does at ratio 0 or with n = 0.

    score, n (B, T); past (B, T, W), of which all but n are NaN; ratio: a float, or a float64 tensor
    () or (B, 1).
    """
    below = (past < score[..., None]).sum(-1)
    allowed = n.double() * ratio  # how many may be as high or higher
    # 1e-9: ratio * n is a little off a whole number where ratio is, say, 1 - 23/26.
    return (n - below <= allowed + 1e-9) & (allowed > 0) & ~score.isnan()


def rank_scores(score, lengths, state: FilterState, ratio, config: FilterConfig):
    """Say which new scores (B, T) are redundant ones, and move state.history and state.count on.

    Returns redundant (B, T) bool and the scores, with NaN at padding. Other arguments as in
    token_filter. A filter function with a score of its own ends with this call.
    """
    T = score.shape[1]
    W = config.history
    count = state.count[:, None]  # (B, 1), the position of the first new token

    if lengths is None:  # decode: one new score replaces the oldest
        position = count
        past = state.history[:, None]  # (B, 1, W)
        columns = count % W
        latest = score
        n_new = 1
    else:
        step = torch.arange(T, device=score.device)
        position = count + step  # (B, T)
        score = score.masked_fill(step >= lengths[:, None], math.nan)
        offset = torch.arange(W, device=score.device)
        oldest_first = state.history.gather(1, (count + offset) % W)
        scores = torch.cat((oldest_first, score), dim=1)  # (B, W + T)
        past = scores[:, :-1].unfold(1, W, 1)  # (B, T, W): the W scores before each new one
        last_W = lengths[:, None] + offset  # (B, W): where the latest W scores of each row are
        columns = (count + last_W) % W
        latest = scores.gather(1, last_W)
        n_new = lengths

    n_past = position.clamp(max=W)
    past_warmup = position >= config.n_sinks
    redundant = exceeds_quantile(score, past, n_past, ratio) & past_warmup
    state.history.scatter_(1, columns, latest)
    state.count += n_new
    return redundant, score


def mean_and_variance(cosine, sum_over_devices):
    """Mean and population variance of cosine (..., KVH) over all devices' heads: (...) each."""
    if sum_over_devices is None:
        variance, mean = torch.var_mean(cosine, dim=-1, correction=0)
        return mean, variance
    # In float64 the difference of two squares is exact enough.
    wide = cosine.double()
    sums = torch.stack((torch.ones_like(wide), wide, wide.square())).sum(-1)
    n_heads, total, squares = sum_over_devices(sums)
    mean = total / n_heads
    variance = (squares / n_heads - mean.square()).clamp(min=0)
    return mean.to(cosine.dtype), variance.to(cosine.dtype)


def token_filter(k, v, lengths, state: FilterState, ratio, config: FilterConfig):
    """Score a chunk of one layer's new tokens, say which are redundant, and move `state` past them.

    For token t, with anchors A_K and A_V as they are before t, over the KVH heads h:
        c_k[h] = cos(k_t[h], A_K[h]),  c_v[h] = cos(v_t[h], A_V[h]);  0 where a norm is 0
        w_k    = (var(c_v) + eps) / (var(c_k) + var(c_v) + 2 eps)
        s_t    = w_k mean(c_k) + (1 - w_k) mean(c_v)
        t is redundant if it is past the warm-up and s_t exceeds the (1 - ratio) quantile of the
        latest W scores before it
        A     <- gamma A + (1-gamma) (k_t, v_t), started at the first token's own k, v

    k, v (B, T, KVH, D), any float dtype. lengths (B,) int64: the first lengths[b] tokens of row b
    are real, the rest is padding, of any value; None: all are (decode: T = 1). ratio: r_l, a float,
    or a float64 tensor () or (B, 1). Returns redundant (B, T) bool and score (B, T); padding is
    False and NaN.

    The contract of a filter function. Any function with this signature can take this one's place
    (`model.new_cache(B, config, filter_fn=...)`). It must
    - decide on a token from that token and those before it in its row alone, so that chunks and
      neighbours change nothing: what it remembers between two calls is in `state`;
    - add each row's number of new tokens to state.count, which is the position of the next token;
    - write into the tensors of `state` in place (copy_, scatter_, +=), as a recorded decode step
      knows their addresses, and select() finds rows in them by name;
    - read nothing back from the device (no .item(), no `if` on a tensor);
    - return False for padding and for a row's first config.n_sinks tokens.
    Ranking among past scores is done by rank_scores, which also moves count and history on:

        def long_values(k, v, lengths, state, ratio, config):
            '''Tokens with long values are redundant.'''
            if lengths is None and k.shape[1] > 1:
                lengths = torch.full_like(state.count, k.shape[1])
            score = v.to(state.history.dtype).norm(dim=-1).mean(-1)  # (B, T)
            return rank_scores(score, lengths, state, ratio, config)
    """
    B, T = k.shape[:2]
    if lengths is None and T > 1:
        lengths = torch.full_like(state.count, T)
    x = torch.stack((k, v), dim=2).to(state.anchor.dtype)  # (B, T, 2, KVH, D)
    if lengths is not None:
        is_padding = torch.arange(T, device=k.device) >= lengths[:, None]
        x = x.masked_fill(is_padding.view(B, T, 1, 1, 1), 0)  # whatever it was, NaN included

    # 1. Anchors, before each token and after the last real one.
    is_first = (state.count == 0).view(B, 1, 1, 1)
    start = torch.where(is_first, x[:, 0], state.anchor)
    if lengths is None:  # decode
        anchor = start[:, None]
        last = start.lerp(x[:, 0], 1 - config.gamma)
    else:
        averages = running_averages(x, start, config.gamma)  # (B, T+1, 2, KVH, D)
        anchor = averages[:, :-1]
        last = averages[torch.arange(B, device=k.device), lengths]
    state.anchor.copy_(last)

    # 2. Similarity: a cosine for each side and head.
    norms = x.norm(dim=-1) * anchor.norm(dim=-1)
    cosine = ((x * anchor).sum(-1) / norms).masked_fill(norms == 0, 0)  # (B, T, 2, KVH)

    # 3. Fusion: where the heads of one side agree more than those of the other, it has more weight.
    mean, variance = mean_and_variance(cosine, state.sum_over_devices)  # (B, T, 2) each
    mean_k, mean_v = mean.unbind(-1)
    var_k, var_v = (variance + EPS).unbind(-1)
    if config.fusion == "variance":
        w_k = var_v / (var_k + var_v)
    elif config.fusion == "equal":
        w_k = torch.full_like(var_k, 0.5)
    elif config.fusion == "key":
        w_k = torch.ones_like(var_k)
    else:
        w_k = torch.zeros_like(var_k)
    score = torch.lerp(mean_v, mean_k, w_k)
    state.latest_cosine = cosine
    state.latest_w_k = w_k

    # 4. Threshold: the rank among the latest scores.
    return rank_scores(score, lengths, state, ratio, config)
