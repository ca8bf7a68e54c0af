"""Token Filtering in NumPy, written from PORTING.md and the golden files alone: the proof that they suffice.

For batches fed in any chunks; nothing is gained by skipping (step 8 of PORTING.md is left out). Settings are dicts, as in
files.json. Neither PyTorch nor any other file of this repository is used.

Shapes: B sequences, T new tokens, S cached keys, H heads, KVH key/value heads, D head size, L layers, W scores remembered.
"""

import numpy as np

FAR = 2**40  # a position no text reaches

class Filter:
    """What one layer's filter remembers of B sequences."""

    def __init__(self, B, kv_heads, head_dim, config, dtype):
        self.anchor = np.zeros((B, 2, kv_heads, head_dim), dtype)
        self.history = np.full((B, config["history"]), np.nan, dtype)  # newest last
        self.count = np.zeros(B, int)


def threshold(score, history, count, ratio):
    """score, count, ratio (B,), history (B, W): how many scores are below, how many must be, whether they are."""
    n = np.minimum(count, history.shape[1])
    below = (history < score[:, None]).sum(1)
    needed = np.ceil((1 - ratio) * n - 1e-9).astype(int)
    return below, needed, (n > 0) & (ratio > 0) & ~np.isnan(score) & (below >= needed)


def filter_chunk(k, v, n_new, state, ratio, config):
    """k, v (B, T, KVH, D), of which row b has n_new[b] real tokens: every stage by name, (B, T, ...). Moves state."""
    steps = []
    for t in range(k.shape[1]):
        real, g = t < n_new, config["gamma"]
        x = np.stack((k[:, t], v[:, t]), 1).astype(state.anchor.dtype)  # (B, 2, KVH, D)
        anchor = np.where((state.count == 0)[:, None, None, None], x, state.anchor)
        after = g * anchor + (1 - g) * x
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(anchor, axis=-1)
        cosine = np.where(norms == 0, 0, (x * anchor).sum(-1) / np.where(norms == 0, 1, norms))  # (B, 2, KVH)
        mean, variance = cosine.mean(-1), cosine.var(-1)  # (B, 2)
        w_k = (variance[:, 1] + 1e-6) / (variance.sum(1) + 2e-6)
        score = w_k * mean[:, 0] + (1 - w_k) * mean[:, 1]
        below, needed, above = threshold(score, state.history, state.count, ratio)
        redundant = real & above & (state.count >= max(config["warmup"], 1))
        steps.append({"anchors": anchor, "cosine": cosine, "mean": mean, "variance": variance, "w_k": w_k,
                      "score": score, "below": below, "needed": needed, "redundant": redundant})  # fmt: skip
        state.anchor = np.where(real[:, None, None, None], after, state.anchor)
        history = np.concatenate((state.history[:, 1:], score[:, None]), 1)
        state.history = np.where(real[:, None], history, state.history)
        state.count = state.count + real
    return {name: np.stack([step[name] for step in steps], 1) for name in steps[0]}


def shares(weight, total, cap):
    """min(cap, a * weight), a such that they sum to total: what is above the cap goes to the others."""
    capped = np.zeros(len(weight), bool)
    while True:
        a = (total - cap * capped.sum()) / weight[~capped].sum()
        if (a * weight[~capped] <= cap).all():
            return np.where(capped, cap, a * weight)
        capped |= a * weight > cap


def layer_ratios(schedule, p, L):
    """(L,) ratios that a sequence starts with."""
    if schedule in ("uniform", "adaptive"):
        return np.full(L, p)
    if schedule == "last":
        top = max(0.9, p)
        return np.clip(p * L - top * np.arange(L), 0, top)[::-1]
    tail = shares(np.arange(L), p * L, 1.0) if p <= (L - 1) / L else np.array([p * L - (L - 1)] + [1.0] * (L - 1))
    return tail[::-1] if schedule == "head" else tail


def adaptive_ratios(contribution, p):
    """(L,) -> (L,)"""
    return shares(np.asarray(contribution, np.float64) ** -8, p * len(contribution), 0.95)


def rotate(x, position, theta):
    """RoPE: x (B, T, heads, D), position (B, T)."""
    half = x.shape[-1] // 2
    angle = position[:, :, None, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


class LayerCache:
    """A layer's visible keys and values: `at` and `until` are the first and last position that sees each."""

    def __init__(self, B, shape, config, dtype):
        self.k = self.v = np.zeros((B, 0, shape["kv_heads"], shape["head_dim"]), dtype)
        self.at = self.until = np.zeros((B, 0), int)
        self.state = Filter(B, shape["kv_heads"], shape["head_dim"], config, dtype)
        self.anchor_output = np.zeros((B, shape["width"]), dtype)
        self.departure = np.zeros((2, B))  # sum and number, for D_l


class Model:
    """weights by name, shape and config as in files.json; B sequences, all at their start."""

    def __init__(self, weights, shape, config, B, dtype):
        self.w = {name: w.astype(dtype) for name, w in weights.items()}
        self.shape, self.config, self.dtype = shape, config, dtype
        self.layers = [LayerCache(B, shape, config, dtype) for _ in range(shape["n_layers"])]
        self.seen = np.zeros(B, int)
        ratios = layer_ratios(config["schedule"], config["prune"], shape["n_layers"])
        self.ratio = np.repeat(ratios[:, None], B, 1)  # (L, B)
        self.warmup = max(config["warmup"], 1)
        self.changes = self.warmup * 2 ** np.arange(40)  # where schedule adaptive sets the ratios anew

    def norm(self, x, name):
        return self.w[name] * x / np.sqrt((x * x).mean(-1, keepdims=True) + self.dtype(self.shape["norm_eps"]))

    def feed(self, tokens, n_new):
        """tokens (B, T), row b's first n_new[b] real: {"logits": (B, T, V)} and, by (B, T, L), what else is expected."""
        done, out = np.zeros(len(tokens), int), dict[str, np.ndarray]()
        while (done < n_new).any():
            count = np.minimum(n_new - done, [min(self.changes[self.changes > seen]) - seen for seen in self.seen])
            row, step = np.nonzero(np.arange(count.max()) < count[:, None])
            piece = np.take_along_axis(tokens, np.minimum(done[:, None] + np.arange(count.max()), tokens.shape[1] - 1), 1)
            for name, x in self.feed_piece(piece, count).items():
                whole = out.setdefault(name, np.zeros(tokens.shape + x.shape[2:], x.dtype))
                whole[row, done[row] + step] = x[row, step]
            done = done + count
        return out

    def feed_piece(self, tokens, n_new):
        """The same, while no ratio changes."""
        for b in np.flatnonzero(np.isin(self.seen, self.changes)):
            if self.config["schedule"] == "adaptive":
                total, number = np.array([layer.departure[:, b] for layer in self.layers]).T
                self.ratio[:, b] = adaptive_ratios(total / number, self.config["prune"])
        step = np.arange(tokens.shape[1])
        real, position = step < n_new[:, None], self.seen[:, None] + step
        x, traces = self.w["embed.weight"][tokens], list[dict]()
        for l, cache in enumerate(self.layers):
            added, trace = self.attention(x, l, cache, real, position, n_new)
            traces, x = [*traces, trace], x + added
            normed = self.norm(x, f"blocks.{l}.mlp_norm.weight")
            gate, up = (normed @ self.w[f"blocks.{l}.mlp.{part}.weight"].T for part in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"blocks.{l}.mlp.down.weight"].T
        self.seen = self.seen + n_new
        logits = self.norm(x, "norm.weight") @ self.w["head.weight"].T
        return {"logits": logits} | {name: np.stack([trace[name] for trace in traces], 2) for name in traces[0]}

    def attention(self, x, l, cache, real, position, n_new):
        """x (B, T, C), the residual stream -> what attention or its replacement adds, and a dict of (B, T)."""
        config, ratio, D = self.config, self.ratio[l], self.shape["head_dim"]
        normed = self.norm(x, f"blocks.{l}.attn_norm.weight")
        q, k, v = (normed @ self.w[f"blocks.{l}.attn.{part}.weight"].T for part in "qkv")
        raw_k, q, v = (y.reshape(*y.shape[:2], -1, D) for y in (k, q, v))
        k, q = (rotate(y, position, self.shape["rope_theta"]) for y in (raw_k, q))

        # who is redundant
        score, redundant = np.full(real.shape, np.nan), np.zeros(real.shape, bool)
        if (ratio == 1).all() and config["mode"] == "attention":
            redundant = real & (position >= self.warmup)
        elif (ratio > 0).any():
            found = filter_chunk(k, v, n_new, cache.state, ratio, config)
            score, redundant = found["score"], found["redundant"]
        keep = real & ~redundant
        attends = keep if config["mode"] == "attention" else real
        length = (cache.until == FAR).sum(1, keepdims=True) + keep.cumsum(1)

        # attention over what is cached and the chunk, (B, T, heads, S)
        until = np.where(keep, FAR, np.where(real, position + config["grace"], -1))
        keys, values, at, until = (np.concatenate(pair, 1) for pair in
                                   ((cache.k, k), (cache.v, v), (cache.at, position), (cache.until, until)))  # fmt: skip
        seen = (at[:, None] <= position[:, :, None]) & (position[:, :, None] <= until[:, None])
        share = q.shape[2] // k.shape[2]
        logit = np.einsum("bthd,bshd->bths", q, keys.repeat(share, 2)) / self.dtype(np.sqrt(D))
        weight = np.where(seen[:, :, None], np.exp(logit - logit.max(-1, keepdims=True)), 0)
        weight = weight / np.maximum(weight.sum(-1, keepdims=True), self.dtype(1e-30))  # 0 for a pad that sees nobody
        y = np.einsum("bths,bshd->bthd", weight, values.repeat(share, 2)).reshape(*real.shape, -1)
        out = y @ self.w[f"blocks.{l}.attn.o.weight"].T

        # what the others add, and D_l
        added = np.where(attends[:, :, None], out, 0)
        for t in range(real.shape[1]):
            before = np.where(position[:, t, None] == 0, out[:, t], cache.anchor_output)
            if config["fill"] == "anchor":
                added[:, t] = np.where(attends[:, t, None], out[:, t], before)
            departure = np.linalg.norm(out[:, t] - before, axis=-1) / np.linalg.norm(x[:, t], axis=-1)
            stands_for = np.where(position[:, t] < self.warmup, 1, 1 / (1 - np.minimum(ratio, 0.95)))
            counted = keep[:, t] & (position[:, t] >= 4)
            cache.departure += np.where(counted, [stands_for * departure, stands_for], 0)
            after = config["gamma"] * before + (1 - config["gamma"]) * out[:, t]
            cache.anchor_output = np.where(keep[:, t, None], after, cache.anchor_output)

        # drop what no later token can see
        visible = until >= (self.seen + n_new)[:, None]
        order = np.argsort(~visible, axis=1, kind="stable")[:, : visible.sum(1).max()]
        cache.k, cache.v = (np.take_along_axis(y, order[:, :, None, None], 1) for y in (keys, values))
        cache.at, cache.until = (np.take_along_axis(y, order, 1) for y in (at, until))
        return added, {"score": score, "redundant": redundant, "length": length,
                       "visible": np.where(attends, seen.sum(-1), 0),
                       "ratio": np.repeat(ratio[:, None], real.shape[1], 1)}  # fmt: skip
