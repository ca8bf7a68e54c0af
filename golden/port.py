"""Token Filtering in NumPy, written from PORTING.md and the golden files alone: the proof that they
suffice.

For batches fed in any chunks, a token at a time within a layer: a chunk is so many decode steps.
Settings are dicts, as in files.json. Neither PyTorch nor any other file of this repository is used.

Shapes: B sequences, T new tokens, S slots, H heads, KVH key/value heads, D head size, L layers, W
scores remembered.
"""

import numpy as np


class Filter:
    """What one layer's filter remembers of B sequences."""

    def __init__(self, B, kv_heads, head_dim, config, dtype):
        self.anchor = np.zeros((B, 2, kv_heads, head_dim), dtype)
        self.history = np.full(
            (B, config["history"]), np.nan, dtype
        )  # a ring: the order does not matter
        self.count = np.zeros(B, int)


def threshold(score, history, count, ratio):
    """score, count, ratio (B,), history (B, W): how many scores are below, how many must be,
    whether they are.
    """
    n = np.minimum(count, history.shape[1])
    below = (history < score[:, None]).sum(1)
    needed = np.ceil((1 - ratio) * n - 1e-9).astype(int)
    return below, needed, (n > 0) & (ratio > 0) & ~np.isnan(score) & (below >= needed)


def filter_chunk(k, v, n_new, state, ratio, config):
    """k, v (B, T, KVH, D), of which row b has n_new[b] real tokens: every stage by name, (B, T,
    ...). Moves state.
    """
    steps = []
    for t in range(k.shape[1]):
        real = t < n_new
        g = config["gamma"]
        x = np.stack((k[:, t], v[:, t]), 1).astype(state.anchor.dtype)  # (B, 2, KVH, D)
        anchor = np.where((state.count == 0)[:, None, None, None], x, state.anchor)
        after = g * anchor + (1 - g) * x
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(anchor, axis=-1)
        cosine = np.where(
            norms == 0, 0, (x * anchor).sum(-1) / np.where(norms == 0, 1, norms)
        )  # (B, 2, KVH)
        # (B, 2)
        mean = cosine.mean(-1)
        variance = cosine.var(-1)
        w_k = (variance[:, 1] + 1e-6) / (variance.sum(1) + 2e-6)
        w_k = (
            w_k
            if config["fusion"] == "variance"
            else np.full_like(w_k, {"equal": 0.5, "key": 1, "value": 0}[config["fusion"]])
        )
        score = w_k * mean[:, 0] + (1 - w_k) * mean[:, 1]
        below, needed, above = threshold(score, state.history, state.count, ratio)
        redundant = real & above & (state.count >= max(config["warmup"], 1))
        steps.append(
            {
                "anchors": anchor,
                "cosine": cosine,
                "mean": mean,
                "variance": variance,
                "w_k": w_k,
                "score": score,
                "below": below,
                "needed": needed,
                "redundant": redundant,
            }
        )
        state.anchor[real] = after[real]
        state.history[real, (state.count % config["history"])[real]] = score[real]
        state.count += real
    return {name: np.stack([step[name] for step in steps], 1) for name in steps[0]}


def layer_ratios(schedule, p, L):
    """(L,)"""
    if schedule == "uniform":
        return np.full(L, p)
    if schedule == "last":
        top = max(0.9, p)
        return np.clip(p * L - top * np.arange(L), 0, top)[::-1]
    layer = np.arange(L)
    full = np.zeros(L, bool)
    a = 0.0
    for _ in range(L):  # what is above 1 goes to the others
        a = (p * L - full.sum()) / max(1, layer[~full].sum())
        full |= a * layer >= 1 - 1e-12
    tail = np.where(full, 1.0, a * layer)
    tail[0] = max(0.0, p * L - (L - 1))
    return tail[::-1] if schedule == "head" else tail


def apply_rope(x, position, theta):
    """RoPE: x (B, T, heads, D), position (B, T)."""
    half = x.shape[-1] // 2
    angle = position[:, :, None, None] * theta ** (-np.arange(half) / half)
    cos = np.cos(angle).astype(x.dtype)
    sin = np.sin(angle).astype(x.dtype)
    a = x[..., :half]
    b = x[..., half:]
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


class LayerCache:
    """A layer's keys and values: each row's slots are sinks, ring, far tokens, and what a token may
    see is the first n.
    """

    def __init__(self, B, shape, config, filters, dtype):
        self.mode = config["mode"]
        self.sinks = max(config["warmup"], 1) if filters else 0
        self.ring = config["recent"] + 1 if filters else 0
        slots = (
            self.sinks + self.ring + shape["max_positions"] + 1
        )  # a real one grows as the far tokens do
        self.kv = np.zeros((2, B, slots, shape["kv_heads"], shape["head_dim"]), dtype)
        self.far = np.zeros(B, int)  # how many far tokens each row has
        self.kept = np.zeros((B, self.sinks + self.ring), bool)  # who of them will be a far token
        self.state = Filter(B, shape["kv_heads"], shape["head_dim"], config, dtype)

    def put(self, b, kv, redundant, position):
        """One token of each of the rows b, kv (2, rows, KVH, D), into its slot; returns how many
        slots each of them may see.
        """
        front = self.sinks + self.ring
        end = self.sinks + self.ring + self.far[b]
        if self.ring:
            slot = np.where(
                position < self.sinks, position, self.sinks + (position - self.sinks) % self.ring
            )
            self.kv[:, b, end] = self.kv[
                :, b, slot
            ]  # the one that leaves: if it was not kept, far does not grow over it
            self.far[b] += self.kept[b, slot]
            self.kept[b, slot] = ~redundant
        else:
            slot = end
            self.far[b] += 1
        self.kv[:, b, slot] = kv
        near = np.minimum(position + 1, front)
        far = self.far[b]
        return np.where(
            redundant, {"skip": 0, "local": near, "cache": near + far}[self.mode], near + far
        )


def attend(q, k, v, n):
    """q (B, H, D) of one token a row over its row's first n[b] slots, k, v (B, S, KVH, D) -> (B, H,
    D), 0 where n[b] is 0.
    """
    share = q.shape[1] // k.shape[2]
    seen = np.arange(k.shape[1]) < n[:, None, None]
    logit = np.einsum("bhd,bshd->bhs", q, k.repeat(share, 2)) / q.dtype.type(np.sqrt(q.shape[2]))
    logit = np.where(seen, logit, -1e9)
    weight = seen * np.exp(logit - logit.max(-1, keepdims=True))
    weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-30)
    return np.einsum("bhs,bshd->bhd", weight, v.repeat(share, 2))


class Model:
    """weights by name, shape and config as in files.json; B sequences, all at their start."""

    def __init__(self, weights, shape, config, B, dtype):
        self.w = {name: w.astype(dtype) for name, w in weights.items()}
        self.shape = shape
        self.config = config
        self.dtype = dtype
        self.ratio = layer_ratios(config["schedule"], config["prune"], shape["n_layers"])
        self.layers = [LayerCache(B, shape, config, filters, dtype) for filters in self.ratio > 0]
        self.seen = np.zeros(B, int)

    def norm(self, x, name):
        return (
            self.w[name]
            * x
            / np.sqrt((x * x).mean(-1, keepdims=True) + self.dtype(self.shape["norm_eps"]))
        )

    def project(self, x, l, projection):
        """W x, and b where there is a bias, of one of attention's four projections."""
        name = f"blocks.{l}.attn.{projection}"
        return x @ self.w[name + ".weight"].T + self.w.get(name + ".bias", self.dtype(0))

    def feed(self, tokens, n_new):
        """tokens (B, T), row b's first n_new[b] real: {"logits": (B, T, V)} and, by (B, T, L), what
        else is expected.
        """
        step = np.arange(tokens.shape[1])
        real = step < n_new[:, None]
        position = self.seen[:, None] + step
        x = self.w["embed.weight"][tokens]
        traces = list[dict]()
        for l, cache in enumerate(self.layers):
            added, trace = self.attention(x, l, cache, real, position, n_new)
            traces = [*traces, trace]
            x = x + added
            normed = self.norm(x, f"blocks.{l}.mlp_norm.weight")
            gate, up = (
                normed @ self.w[f"blocks.{l}.mlp.{part}.weight"].T for part in ("gate", "up")
            )
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"blocks.{l}.mlp.down.weight"].T
        self.seen = self.seen + n_new
        logits = self.norm(x, "norm.weight") @ self.w["head.weight"].T
        return {"logits": logits} | {
            name: np.stack([trace[name] for trace in traces], 2) for name in traces[0]
        }

    def attention(self, x, l, cache, real, position, n_new):
        """x (B, T, C), the residual stream -> what attention adds to it, and a dict of (B, T)."""
        normed = self.norm(x, f"blocks.{l}.attn_norm.weight")
        D = self.shape["head_dim"]
        q, k, v = (self.project(normed, l, part) for part in "qkv")
        raw_k, q, v = (y.reshape(*y.shape[:2], -1, D) for y in (k, q, v))
        k, q = (apply_rope(y, position, self.shape["rope_theta"]) for y in (raw_k, q))

        # who is redundant
        score = np.full(real.shape, np.nan)
        redundant = np.zeros(real.shape, bool)
        if cache.ring:
            compared = k if self.config["keys"] == "rotated" else raw_k
            found = filter_chunk(compared, v, n_new, cache.state, self.ratio[l], self.config)
            score = found["score"]
            redundant = found["redundant"]

        # store and attend
        n = np.zeros(real.shape, int)
        y = np.zeros_like(q)
        for t in range(real.shape[1]):
            b = np.flatnonzero(real[:, t])
            n[b, t] = cache.put(b, np.stack((k[b, t], v[b, t])), redundant[b, t], position[b, t])
            y[:, t] = attend(q[:, t], cache.kv[0], cache.kv[1], n[:, t])
        added = self.project(y.reshape(*real.shape, -1), l, "o")
        added[n == 0] = 0  # who sees nothing gets nothing, o's bias neither
        return added, {"score": score, "redundant": redundant, "n": n}
