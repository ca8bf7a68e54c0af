"""Token Filtering: decide, while the model runs, which tokens a layer can do without (arXiv
2512.07090).

A token is redundant in a layer when its key and value look like running averages (anchors) of the
tokens just before it, more than for most tokens before it. Preset "cache" goes by another score:
the key looks like the average key, and not like the average query. `token_filter`, at the end of
this file, is the whole method.

Shapes: B sequences, T new tokens, KVH key/value heads, D head size, W scores remembered.
"""

import math
from collections.abc import Callable

import torch

from filter_config import FilterConfig

EPS = 1e-6  # keeps w_k defined, and at 1/2, when both variances are 0


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
        n_sides = 3 if config.needs_queries else 2
        # Running averages of keys [:, 0], of values [:, 1], and with fusion "key-query" of queries
        # [:, 2].
        self.anchor = torch.zeros(B, n_sides, kv_heads, head_dim, dtype=dtype, device=device)
        # The latest W scores: the score of position p is in column p mod W. NaN where there is
        # none.
        W = config.history
        self.history = torch.full((B, W), math.nan, dtype=dtype, device=device)
        # With fusion "key-query" the same for the mean cosines that its scores are made of, (2, B,
        # W): of a key with the average key [0], and with the average query [1]. Else (0, B, W).
        n_cosines = 2 if config.needs_queries else 0
        self.cosine_history = torch.full((n_cosines, B, W), math.nan, dtype=dtype, device=device)
        # How many tokens it has seen, so the position of the next one.
        self.count = torch.zeros(B, dtype=torch.int64, device=device)
        # The layer's number, for filter functions that go by it. A tensor, since a number would
        # have torch.compile compile each layer anew.
        self.layer = torch.full((), layer, device=device)
        # On several devices, each of which has some of the heads: the function that adds a tensor
        # over all of them. None on one device.
        self.sum_over_devices = sum_over_devices
        # Of the latest chunk, for KVCache.decisions(): the cosines (B, T, 2, KVH) and w_k (B, T).
        # With fusion "key-query" the cosines are (B, T, 3, KVH), and there is no w_k.
        self.latest_cosine: torch.Tensor | None = None
        self.latest_w_k: torch.Tensor | None = None

    def select(self, rows):
        """Keep these rows, an int64 tensor, in this order. A row named twice is copied."""
        self.anchor = self.anchor[rows]
        self.history = self.history[rows]
        self.cosine_history = self.cosine_history[:, rows]
        self.count = self.count[rows]
        self.latest_cosine = None
        self.latest_w_k = None

    def nbytes(self) -> int:
        histories = self.history.nbytes + self.cosine_history.nbytes
        return self.anchor.nbytes + histories + self.count.nbytes


def running_averages(x, start, gamma, block=64):
    """A_0 = start (B, ...), A_{t+1} = gamma A_t + (1-gamma) x_t for x (B, T, ...).

    Returns A_0 .. A_T, (B, T+1, ...). Within a block of tokens
        A_t = gamma^t A_0 + (1-gamma) sum_{s<t} gamma^(t-1-s) x_s,
    which is one matrix product. For three tokens, with b = 1 - gamma, the matrix is
                A_0      x_0        x_1      x_2
        A_1     gamma    b          0        0
        A_2     gamma^2  b gamma    b        0
        A_3     gamma^3  b gamma^2  b gamma  b
    """
    T = x.shape[1]
    t = torch.arange(1, block + 1, device=x.device)
    lag = t[:, None] - t  # (block, block): the power of gamma
    of_x = torch.where(lag >= 0, (1 - gamma) * gamma ** lag.clamp(min=0).double(), 0)
    of_start = gamma ** t.double()
    weight = torch.cat((of_start[:, None], of_x), dim=1).to(x.dtype)  # (block, block+1)

    # Each x is replaced by the average after it, block by block.
    averages = torch.cat((start[:, None], x), dim=1).flatten(2)
    for first in range(0, T, block):
        part = averages[:, first : first + block + 1]  # A_0 of the block, then its x
        n = part.shape[1] - 1
        part[:, 1:] = weight[:n, : n + 1] @ part
    return averages.view(len(x), T + 1, *x.shape[2:])


def exceeds_quantile(score, past, n, ratio):
    """Which scores are above the (1-ratio) quantile of the n scores before them: (B, T) bool.

    If `below` of the n scores are strictly below, n - below are as high or higher. The score
    exceeds the quantile if those are at most ratio * n. So a score that equals the quantile does
    not exceed it, NaN never does, and nothing does at ratio 0 or with n = 0.

    score, n (B, T); past (B, T, W), of which all but n are NaN; ratio: a float, or a float64 tensor
    () or (B, 1).
    """
    below = (past < score[..., None]).sum(-1)
    allowed = n.double() * ratio  # how many may be as high or higher
    # 1e-9: ratio * n may round to a little below a whole number, as 31/58 * 58 does.
    return (n - below <= allowed + 1e-9) & (allowed > 0) & ~score.isnan()


def past_and_latest(history, new, lengths, count):
    """What a history holds of the W values before each new one, and what it should hold next.

    history (..., B, W), the value of position p in column p mod W; new (..., B, T), of which row
    b's first lengths[b] are real (None: a decode step); count (B, 1): the position of the first.
    Returns past (..., B, T, W), the W values before each new one; columns (B, W'), in which the
    history is to hold latest (..., B, W'). It is to be written to after `past` has been used, which
    may be a view of it.
    """
    W = history.shape[-1]
    if lengths is None:  # decode: one new value replaces the oldest
        return history.unsqueeze(-2), count % W, new

    offset = torch.arange(W, device=new.device)
    oldest = (count + offset) % W  # (B, W): the columns, oldest value first
    oldest_first = history.gather(-1, oldest.expand_as(history))
    # (..., B, W + T): column i is the value of position count - W + i.
    values = torch.cat((oldest_first, new), dim=-1)
    past = values[..., :-1].unfold(-1, W, 1)
    last_W = lengths[:, None] + offset  # (B, W): where the latest W values of each row are
    columns = (count + last_W) % W
    return past, columns, values.gather(-1, last_W.expand_as(history))


def rank_scores(score, lengths, state: FilterState, ratio, config: FilterConfig):
    """Say whose new scores (B, T) make them redundant; move state.history and state.count on.

    Returns redundant (B, T) bool and the scores, with NaN at padding. Other arguments as in
    token_filter. A filter function with a score of its own ends with this call.
    """
    T = score.shape[1]
    # The position of the first new token, (B, 1). This and `past` below are views of the state, so
    # all that is read from them comes before the state is written to.
    count = state.count[:, None]
    if lengths is None and T > 1:
        lengths = torch.full_like(state.count, T)

    if lengths is None:  # decode
        position = count
        n_new = 1
    else:
        step = torch.arange(T, device=score.device)
        position = count + step  # (B, T)
        score = score.masked_fill(step >= lengths[:, None], math.nan)
        n_new = lengths

    past, columns, latest = past_and_latest(state.history, score, lengths, count)
    n_past = position.clamp(max=config.history)
    past_warmup = position >= config.n_sinks  # the warm-up is the first n_sinks tokens
    redundant = exceeds_quantile(score, past, n_past, ratio) & past_warmup
    state.history.scatter_(1, columns, latest)
    state.count += n_new
    return redundant, score


QUERY_WEIGHT = 0.5  # of the rank of c_q in the score of fusion "key-query"


def key_query_score(cosines, lengths, state: FilterState):
    """The score of fusion "key-query" (see token_filter); moves state.cosine_history on.

    cosines (2, B, T): the means of c_k and of c_q. To be called before rank_scores, which moves the
    count. Returns (B, T).
    """
    T = cosines.shape[-1]
    W = state.cosine_history.shape[-1]
    count = state.count[:, None]
    past, columns, latest = past_and_latest(state.cosine_history, cosines, lengths, count)
    value = cosines[..., None]  # (2, B, T, 1)
    below = (past < value).sum(-1, dtype=value.dtype)  # (2, B, T)
    equal = (past == value).sum(-1, dtype=value.dtype)
    state.cosine_history.scatter_(2, columns.expand_as(latest), latest)

    place = (below + 0.5 * equal).masked_fill(cosines.isnan(), math.nan)
    place_k, place_q = place.unbind(0)
    n_past = (count + torch.arange(T, device=value.device)).clamp(min=1, max=W)
    # Divided once, after the subtraction of exact numbers, so that equal scores are equal exactly.
    return (place_k - QUERY_WEIGHT * place_q) / n_past


def mean_and_variance(cosine, sum_over_devices):
    """Mean and population variance of cosine (..., KVH) over all devices' heads: (...) each."""
    if sum_over_devices is None:
        variance, mean = torch.var_mean(cosine, dim=-1, correction=0)
        return mean, variance
    # The variance is the mean square less the square of the mean. Where both are nearly equal this
    # is inexact in float32, but exact enough in float64.
    wide = cosine.double()
    sums = torch.stack((torch.ones_like(wide), wide, wide.square())).sum(-1)
    n_heads, total, squares = sum_over_devices(sums)
    mean = total / n_heads
    variance = (squares / n_heads - mean.square()).clamp(min=0)
    return mean.to(cosine.dtype), variance.to(cosine.dtype)


def token_filter(k, v, lengths, state: FilterState, ratio, config: FilterConfig, q=None):
    """Score a chunk of one layer's new tokens, say which are redundant, and move `state` past them.

    For token t, with anchors A_K and A_V as they are before t, over the KVH heads h:
        c_k[h] = cos(k_t[h], A_K[h]),  c_v[h] = cos(v_t[h], A_V[h]);  0 where a norm is 0
        w_k    = (var(c_v) + eps) / (var(c_k) + var(c_v) + 2 eps)
        s_t    = w_k mean(c_k) + (1 - w_k) mean(c_v)
        t is redundant if it is not one of the first n_sinks tokens (the warm-up) and s_t exceeds
        the (1 - ratio) quantile of the latest W scores before it, or of fewer at the start
        A     <- gamma A + (1-gamma) (k_t, v_t), started at the first token's own k, v
    Other fusions have another w_k: 1/2 ("equal"), 1 ("key"), 0 ("value").

    With fusion "key-query" a key is compared with the average query too, since a key that is like
    what queries look for is worth keeping. The anchor A_Q is made of q_t as A_K is of k_t:
        c_q[h]  = cos(k_t[h], A_Q[h])
        rank(x) = of the latest n <= W values of x before t, the share that is below x_t; those that
                  are equal count half; 0 where n = 0
        s_t     = rank(mean(c_k)) - rank(mean(c_q)) / 2

    k, v     (B, T, KVH, D), any float dtype
    q        the same shape: the queries, averaged over the query heads that share a key head, and
             rotated or not as k is; used, and needed, with fusion "key-query" alone
    lengths  (B,) int64: the first lengths[b] tokens of row b are real, the rest is padding, of any
             value; None: all are real, as in a decode step, where T = 1
    ratio    r_l, a float, or a float64 tensor () or (B, 1)
    Returns redundant (B, T) bool and score (B, T); padding is False and NaN. Raises ValueError for
    queries that are missing.

    The contract of a filter function. Any function with this signature can take this one's place
    (`model.new_cache(B, config, filter_fn=...)`). It is called in layers whose ratio is above 0.
    - It is handed q with fusion "key-query", which preset "cache" has, else None.
    - It decides on a token from that token and those before it in its row alone. So chunks and
      neighbours change nothing (but for rounding).
    - What it remembers between two calls is in state.anchor, state.history and
      state.cosine_history, to be used in any way, and in state.count, the number of tokens so far.
      Other tensors are lost on select(), and are not moved on by a recorded step.
    - It writes into these tensors in place (copy_, scatter_, +=), as a recorded decode step knows
      their addresses.
    - It adds each row's number of new tokens to state.count.
    - On several devices k, v and q hold some of the heads. Means over all heads are taken by
      mean_and_variance(x, state.sum_over_devices), so that all devices decide alike.
    - It reads nothing back from the device (no .item(), no `if` on a tensor).
    - It returns redundant = False for padding and for a row's first config.n_sinks tokens. The
      score is for whoever looks; it may be NaN.
    rank_scores ranks a score among past ones, and does all of that with history and count:

        def long_values(k, v, lengths, state, ratio, config, q=None):
            '''Tokens with long values are redundant.'''
            lengths_of_values = v.to(state.history.dtype).norm(dim=-1)  # (B, T, KVH)
            score, _ = mean_and_variance(lengths_of_values, state.sum_over_devices)  # (B, T)
            return rank_scores(score, lengths, state, ratio, config)
    """
    B, T = k.shape[:2]
    if lengths is None and T > 1:
        lengths = torch.full_like(state.count, T)
    sides = [k, v]
    if config.needs_queries:
        if q is None:
            raise ValueError(f"fusion={config.fusion!r} needs the queries: give q")
        sides.append(q)
    x = torch.stack(sides, dim=2).to(state.anchor.dtype)  # (B, T, 2 or 3, KVH, D)
    if lengths is not None:
        is_padding = torch.arange(T, device=k.device) >= lengths[:, None]
        x = x.masked_fill(is_padding.view(B, T, 1, 1, 1), 0)  # it may be NaN, which 0 times keeps

    # 1. Anchors, before each token and after the last real one.
    is_first = (state.count == 0).view(B, 1, 1, 1)
    start = torch.where(is_first, x[:, 0], state.anchor)
    if lengths is None:  # decode
        anchor = start[:, None]
        last = start.lerp(x[:, 0], 1 - config.gamma)
    else:
        averages = running_averages(x, start, config.gamma)  # (B, T+1, 2 or 3, KVH, D)
        anchor = averages[:, :-1]
        last = averages[torch.arange(B, device=k.device), lengths]
    state.anchor.copy_(last)

    # 2. Similarity: a cosine for each side and head. It is the key that is compared with queries.
    if config.needs_queries:
        compared = torch.cat((x[:, :, :2], x[:, :, :1]), dim=2)  # k, v, k
    else:
        compared = x
    norms = compared.norm(dim=-1) * anchor.norm(dim=-1)
    cosine = ((compared * anchor).sum(-1) / norms).masked_fill(norms == 0, 0)  # (B, T, 2 or 3, KVH)
    state.latest_cosine = cosine

    # 3. Fusion: one score of all cosines. With fusion "variance" the side whose heads agree more
    # gets more weight; with "key-query" ranks are subtracted.
    mean, variance = mean_and_variance(cosine, state.sum_over_devices)  # (B, T, 2 or 3) each
    if config.needs_queries:
        mean_k, _, mean_q = mean.unbind(-1)  # of c_k, of c_v (which has no part in it), of c_q
        score = key_query_score(torch.stack((mean_k, mean_q)), lengths, state)
        return rank_scores(score, lengths, state, ratio, config)
    mean_k, mean_v = mean.unbind(-1)
    var_k, var_v = (variance + EPS).unbind(-1)
    if config.fusion == "variance":
        w_k = var_v / (var_k + var_v)
    elif config.fusion == "equal":
        w_k = torch.full_like(var_k, 0.5)
    elif config.fusion == "key":
        w_k = torch.ones_like(var_k)
    else:  # "value"
        w_k = torch.zeros_like(var_k)
    score = torch.lerp(mean_v, mean_k, w_k)
    state.latest_w_k = w_k

    # 4. Threshold: the rank among the latest scores.
    return rank_scores(score, lengths, state, ratio, config)
