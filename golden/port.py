"""Token Filtering in NumPy, written from PORTING.md and the golden files alone.

It proves that the two suffice: it uses neither PyTorch nor any other file of this repository.

It takes a batch in chunks of any size. Within a layer it goes through a chunk one token at a time,
so that a chunk is a number of decode steps. Settings are dictionaries, as in files.json.

Shapes: B sequences, T new tokens, S slots of a layer's cache, H query heads, KVH key/value heads, D
head size, C width of the residual stream, L layers, V vocabulary, W scores remembered.
"""

import numpy as np

# ------------------------------------------------------------------------------------- the filter


class Filter:
    """What one layer's filter remembers of B sequences."""

    def __init__(self, B, kv_heads, head_dim, config, dtype):
        # Running averages of keys [:, 0], of values [:, 1], and with fusion "key-query" of queries
        # [:, 2].
        n_sides = 3 if config["fusion"] == "key-query" else 2
        self.anchor = np.zeros((B, n_sides, kv_heads, head_dim), dtype)
        # The latest W scores, NaN where there is none. The score of position p is in column p mod
        # W, since their order does not matter.
        self.history = np.full((B, config["history"]), np.nan, dtype)
        # The same for the two means that the scores of fusion "key-query" are made of, (B, 2, W):
        # of the keys' cosines with average keys [:, 0], and with average queries [:, 1].
        self.mean_history = np.full((B, 2, config["history"]), np.nan, dtype)
        # How many tokens each row has had, so the position of its next one.
        self.count = np.zeros(B, int)


def threshold(score, history, count, ratio):
    """Whether each row's score is high enough for its token to be redundant.

    score (B,); history (B, W), NaN where there is no score; count (B,) int, how many tokens came
    before; ratio (B,) or one number.
    Returns three arrays (B,): how many remembered scores are below, how many must be, and whether
    they are.
    """
    n = np.minimum(count, history.shape[1])
    # A NaN is below nothing.
    below = (history < score[:, None]).sum(1)
    # Without the 1e-9, rounding could lift a whole number to the next one.
    needed = np.ceil((1 - ratio) * n - 1e-9).astype(int)
    is_number = ~np.isnan(score)
    above = (n > 0) & (ratio > 0) & is_number & (below >= needed)
    return below, needed, above


def weight_of_keys(variance, fusion):
    """The weight of the keys' mean cosine in the score: variance (B, 2) -> (B,)."""
    variance_k = variance[:, 0]
    variance_v = variance[:, 1]
    if fusion == "variance":
        return (variance_v + 1e-6) / (variance_k + variance_v + 2e-6)
    if fusion == "equal":
        return np.full_like(variance_k, 0.5)
    if fusion == "key":
        return np.ones_like(variance_k)
    if fusion == "value":
        return np.zeros_like(variance_k)
    raise ValueError(
        f"fusion {fusion!r} is not known here: use variance, equal, key, value or key-query"
    )


def fuse_by_weight(cosine, fusion):
    """The score of all fusions but "key-query": cosine (B, 2, KVH) -> (B,), and its stages."""
    mean = cosine.mean(-1)  # (B, 2)
    variance = cosine.var(-1)  # (B, 2)
    w_k = weight_of_keys(variance, fusion)  # (B,)
    score = w_k * mean[:, 0] + (1 - w_k) * mean[:, 1]  # (B,)
    return score, {"mean": mean, "variance": variance, "w_k": w_k}


def fuse_by_rank(cosine, state):
    """The score of fusion "key-query": cosine (B, 3, KVH) -> (B,), and its stages.

    A key that is like the average key has a high score; less so if it is like the average query.
    """
    mean_k = cosine[:, 0].mean(-1)
    mean_q = cosine[:, 2].mean(-1)
    mean = np.stack((mean_k, mean_q), axis=1)  # (B, 2)

    # Where each mean stands among those remembered. Equal ones count half. NaN has no place.
    below = (state.mean_history < mean[:, :, None]).sum(-1)
    equal = (state.mean_history == mean[:, :, None]).sum(-1)
    place = np.where(np.isnan(mean), np.nan, below + 0.5 * equal)  # (B, 2)

    # Divided once, after the subtraction of exact numbers, so that equal scores are equal exactly.
    # They are rounded as those of the history are, for the same reason.
    n = np.minimum(state.count, state.mean_history.shape[2])
    score = (place[:, 0] - 0.5 * place[:, 1]) / np.maximum(n, 1)  # (B,)
    return score.astype(mean.dtype), {"mean": mean, "place": place}


def filter_token(x, is_real, state, ratio, config):
    """Run the filter on one token of each row, and move its state on.

    x (B, 2, KVH, D): keys and values, or with fusion "key-query" (B, 3, KVH, D): keys, values and
    queries; is_real (B,) bool, False where a row has no token.
    Returns every stage by the name that files.json gives it, (B, ...) each.
    """
    # The first token of a sequence is its own anchor.
    is_first = state.count == 0
    anchor = np.where(is_first[:, None, None, None], x, state.anchor)  # (B, 2 or 3, KVH, D)

    # It is the key that is compared with the average query.
    compared = x.copy()
    if config["fusion"] == "key-query":
        compared[:, 2] = x[:, 0]

    # The cosine is 0 where a norm is 0.
    dot = (compared * anchor).sum(-1)
    norms = np.linalg.norm(compared, axis=-1) * np.linalg.norm(anchor, axis=-1)
    divisor = np.where(norms == 0, 1, norms)
    cosine = np.where(norms == 0, 0, dot / divisor)  # (B, 2 or 3, KVH)

    if config["fusion"] == "key-query":
        score, parts = fuse_by_rank(cosine, state)
    else:
        score, parts = fuse_by_weight(cosine, config["fusion"])

    below, needed, above = threshold(score, state.history, state.count, ratio)
    is_past_warmup = state.count >= max(config["warmup"], 1)
    redundant = is_real & is_past_warmup & above

    # Whatever was decided, the token enters the anchors, and its score and means the histories.
    gamma = config["gamma"]
    next_anchor = gamma * anchor + (1 - gamma) * x
    column = state.count % config["history"]
    state.anchor[is_real] = next_anchor[is_real]
    state.history[is_real, column[is_real]] = score[is_real]
    state.mean_history[is_real, :, column[is_real]] = parts["mean"][is_real]
    state.count += is_real
    return {
        "anchors": anchor,
        "cosine": cosine,
        **parts,
        "score": score,
        "below": below,
        "needed": needed,
        "redundant": redundant,
    }


def filter_chunk(k, v, lengths, state, ratio, config, q=None):
    """Run the filter on a chunk, and move its state on.

    k, v (B, T, KVH, D), of which row b has lengths[b] real tokens, then padding; q the same shape,
    used with fusion "key-query" alone: queries, their mean over the heads that share a key head.
    Returns every stage by the name that files.json gives it, (B, T, ...) each.
    """
    sides = [k, v]
    if config["fusion"] == "key-query":
        if q is None:
            raise ValueError("fusion 'key-query' needs the queries: give q")
        sides.append(q)
    # What comes in half precision is compared in float32: the anchors' dtype.
    x = np.stack(sides, axis=2).astype(state.anchor.dtype)  # (B, T, 2 or 3, KVH, D)
    steps = []
    for t in range(k.shape[1]):
        is_real = t < lengths
        steps.append(filter_token(x[:, t], is_real, state, ratio, config))
    stages = {}
    for name in steps[0]:
        stages[name] = np.stack([step[name] for step in steps], axis=1)
    return stages


# ----------------------------------------------------------------------------- ratios and rotation


def layer_ratios(schedule, p, L):
    """Each layer's target ratio, (L,), with mean p: PORTING.md says which schedules there are."""
    if schedule == "uniform":
        return np.full(L, p)
    if schedule == "last":
        top = max(0.9, p)
        left_for_layer = p * L - top * np.arange(L)  # counted from the last layer backwards
        return np.clip(left_for_layer, 0, top)[::-1]

    # "tail" is min(1, slope * l). What a layer would have above 1 goes to the others, so their
    # slope grows, until no more layers come above 1.
    layer = np.arange(L)
    is_full = np.zeros(L, bool)
    slope = 0.0
    for _ in range(L):
        left = p * L - is_full.sum()
        slope = left / max(1, layer[~is_full].sum())
        is_full = is_full | (slope * layer >= 1 - 1e-12)
    tail = np.where(is_full, 1.0, slope * layer)
    # Layer 0 gets something only if all the others are full.
    tail[0] = max(0.0, p * L - (L - 1))
    if schedule == "head":
        return tail[::-1]
    return tail


def apply_rope(x, position, theta):
    """RoPE: x (B, T, heads, D), rotated by its position (B, T)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half)  # (D/2,)
    angle = position[:, :, None, None] * frequency  # (B, T, 1, D/2)
    cos = np.cos(angle).astype(x.dtype)
    sin = np.sin(angle).astype(x.dtype)
    a = x[..., :half]
    b = x[..., half:]
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    return np.concatenate((rotated_a, rotated_b), axis=-1)


# -------------------------------------------------------------------------------------- the cache


class LayerCache:
    """One layer's keys and values. A row's slots are, in this order:

        sinks   the first n_sinks tokens: token t in slot t
        ring    the latest ring_size tokens, kept or redundant: token t in slot
                n_sinks + (t - n_sinks) mod ring_size
        far     the tokens that left the ring and were kept, oldest first

    Sinks and ring are the *near* slots. What a token may see is always the first n slots of its
    row. A layer that does not filter has no near slots: all its tokens are far.
    """

    def __init__(self, B, shape, config, filters, dtype):
        self.mode = config["mode"]
        self.filters = filters
        if filters:
            self.n_sinks = max(config["warmup"], 1)
            self.ring_size = config["recent"] + 1
        else:
            self.n_sinks = 0
            self.ring_size = 0
        self.n_near = self.n_sinks + self.ring_size
        # Far slots for the longest text, and one for a copy that nobody sees: see append. A cache
        # for real use would grow as the far tokens do.
        n_slots = self.n_near + shape["max_positions"] + 1
        self.kv = np.zeros((2, B, n_slots, shape["kv_heads"], shape["head_dim"]), dtype)
        # How many far tokens each row has.
        self.n_far = np.zeros(B, int)
        # Which near slots hold kept tokens.
        self.kept = np.zeros((B, self.n_near), bool)
        self.state = Filter(B, shape["kv_heads"], shape["head_dim"], config, dtype)

    def append(self, row, kv, redundant, position):
        """Store one token of each of some rows, and say how many slots it may see.

        row (rows,) int: which rows; kv (2, rows, KVH, D): their keys and values; redundant (rows,)
        bool; position (rows,) int.
        Returns (rows,) int: the token may see that many slots, the first ones of its row.
        """
        first_free = self.n_near + self.n_far[row]
        if not self.filters:
            self.kv[:, row, first_free] = kv
            self.n_far[row] += 1
            return self.n_far[row]

        in_ring = self.n_sinks + (position - self.n_sinks) % self.ring_size
        slot = np.where(position < self.n_sinks, position, in_ring)

        # The token that was in the slot becomes a far token, if it was kept. If it was not, n_far
        # stays as it is: nobody sees the copy, and the next one overwrites it.
        self.kv[:, row, first_free] = self.kv[:, row, slot]
        self.n_far[row] += self.kept[row, slot]
        self.kv[:, row, slot] = kv
        self.kept[row, slot] = ~redundant

        near_filled = np.minimum(position + 1, self.n_near)
        all_filled = near_filled + self.n_far[row]
        if self.mode == "skip":
            n_if_redundant = np.zeros_like(all_filled)
        elif self.mode == "local":
            n_if_redundant = near_filled
        else:
            n_if_redundant = all_filled
        return np.where(redundant, n_if_redundant, all_filled)


def attend(q, k, v, n_visible):
    """Attention of one token a row, over the first n_visible[b] slots of row b.

    q (B, H, D); k, v (B, S, KVH, D); n_visible (B,) int -> (B, H, D), 0 where n_visible is 0.
    """
    # Each key/value head serves this many query heads.
    group = q.shape[1] // k.shape[2]
    k = k.repeat(group, axis=2)  # (B, S, H, D)
    v = v.repeat(group, axis=2)
    visible = np.arange(k.shape[1]) < n_visible[:, None, None]  # (B, 1, S)
    scale = q.dtype.type(np.sqrt(q.shape[2]))
    logit = np.einsum("bhd,bshd->bhs", q, k) / scale
    logit = np.where(visible, logit, -1e9)
    weight = visible * np.exp(logit - logit.max(-1, keepdims=True))
    # Where nothing is visible all weights are 0, and stay so.
    total = np.maximum(weight.sum(-1, keepdims=True), 1e-30)
    return np.einsum("bhs,bshd->bhd", weight / total, v)


# -------------------------------------------------------------------------------------- the model


class Model:
    """The decoder and its cache: B sequences, all at their start.

    weights: arrays by the names of model.safetensors; shape, config: as in files.json.
    """

    def __init__(self, weights, shape, config, B, dtype):
        self.weights = {name: w.astype(dtype) for name, w in weights.items()}
        self.shape = shape
        self.config = config
        self.dtype = dtype
        self.ratio = layer_ratios(config["schedule"], config["prune"], shape["n_layers"])
        self.layers = []
        for ratio in self.ratio:
            self.layers.append(LayerCache(B, shape, config, ratio > 0, dtype))
        # How many tokens each row has had.
        self.lengths = np.zeros(B, int)

    def norm(self, x, name):
        """RMS norm over the last dimension."""
        mean_square = (x * x).mean(-1, keepdims=True)
        eps = self.dtype(self.shape["norm_eps"])
        return self.weights[name + ".weight"] * x / np.sqrt(mean_square + eps)

    def linear(self, x, name):
        """W x, and b where the projection has a bias."""
        y = x @ self.weights[name + ".weight"].T
        if name + ".bias" in self.weights:
            y = y + self.weights[name + ".bias"]
        return y

    def feed(self, tokens, lengths):
        """Run the model on a chunk: tokens (B, T), of which row b has lengths[b] real ones.

        Returns {"logits": (B, T, V)} and, by the names of files.json, what attention did in each
        layer, (B, T, L, ...) each. At padding these mean nothing.
        """
        column = np.arange(tokens.shape[1])
        is_real = column < lengths[:, None]  # (B, T)
        position = self.lengths[:, None] + column  # (B, T)
        x = self.weights["embed.weight"][tokens]  # (B, T, C)
        by_layer = []
        for l in range(len(self.layers)):
            added, found = self.attention(x, l, is_real, position, lengths)
            x = x + added
            x = x + self.mlp(x, l)
            by_layer.append(found)
        self.lengths = self.lengths + lengths

        out = {"logits": self.linear(self.norm(x, "norm"), "head")}
        for name in by_layer[0]:
            out[name] = np.stack([found[name] for found in by_layer], axis=2)
        return out

    def mlp(self, x, l):
        """What layer l's MLP adds to the residual stream x (B, T, C)."""
        normed = self.norm(x, f"blocks.{l}.mlp_norm")
        gate = self.linear(normed, f"blocks.{l}.mlp.gate")
        up = self.linear(normed, f"blocks.{l}.mlp.up")
        silu = gate / (1 + np.exp(-gate))
        return self.linear(silu * up, f"blocks.{l}.mlp.down")

    def attention(self, x, l, is_real, position, lengths):
        """What layer l's attention adds to the residual stream x (B, T, C).

        is_real (B, T) bool; position (B, T) int; lengths (B,) int, how many tokens of a row are
        real.
        Returns what it adds, and {"mean", "score", "redundant", "n"}, (B, T, ...) each.
        """
        cache = self.layers[l]
        B, T = is_real.shape
        D = self.shape["head_dim"]
        normed = self.norm(x, f"blocks.{l}.attn_norm")
        unrotated_q = self.linear(normed, f"blocks.{l}.attn.q").reshape(B, T, -1, D)
        unrotated_k = self.linear(normed, f"blocks.{l}.attn.k").reshape(B, T, -1, D)
        v = self.linear(normed, f"blocks.{l}.attn.v").reshape(B, T, -1, D)
        theta = self.shape["rope_theta"]
        q = apply_rope(unrotated_q, position, theta)
        k = apply_rope(unrotated_k, position, theta)

        # 1. Decide which tokens are redundant.
        if cache.filters:
            if self.config["keys"] == "rotated":
                compared_k = k
                compared_q = q
            else:
                compared_k = unrotated_k
                compared_q = unrotated_q
            # Query heads 0 .. group - 1 share key head 0, the next ones key head 1, and so on.
            by_group = compared_q.reshape(B, T, self.shape["kv_heads"], -1, D)
            mean_q = by_group.mean(3)  # (B, T, KVH, D)
            ratio = self.ratio[l]
            stages = filter_chunk(compared_k, v, lengths, cache.state, ratio, self.config, mean_q)
            mean = stages["mean"]
            score = stages["score"]
            redundant = stages["redundant"]
        else:
            mean = np.full((B, T, 2), np.nan)
            score = np.full((B, T), np.nan)
            redundant = np.zeros((B, T), bool)

        # 2. Store each token, then let it attend: it sees itself.
        n_visible = np.zeros((B, T), int)
        attended = np.zeros_like(q)  # (B, T, H, D)
        for t in range(T):
            row = np.flatnonzero(is_real[:, t])
            kv = np.stack((k[row, t], v[row, t]))
            n_visible[row, t] = cache.append(row, kv, redundant[row, t], position[row, t])
            attended[:, t] = attend(q[:, t], cache.kv[0], cache.kv[1], n_visible[:, t])

        # 3. A token that sees nothing gets nothing, not even o's bias.
        added = self.linear(attended.reshape(B, T, -1), f"blocks.{l}.attn.o")
        added[n_visible == 0] = 0
        return added, {"mean": mean, "score": score, "redundant": redundant, "n": n_visible}
