"""A LLaMA/Mistral decoder whose layers may filter tokens, with the KV cache that makes a saving of it.

Read from the top; to see the filter at work, follow one token through Attention.forward.

Shapes: B sequences, T new tokens, S slots of a layer's cache, L layers, H query heads, KVH key/value heads (H is a multiple of
KVH), D head size, C width, R channels of a head that RoPE turns, N real tokens, without padding, of a (B, T) chunk. A token's
*position* counts from the start of its own sequence; its *slot* is where a layer's cache keeps it.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attend import attend
from schedule import layer_ratios
from token_filter import FilterConfig, FilterState, token_filter


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    width: int  # C
    n_layers: int  # L
    heads: int  # H
    kv_heads: int  # KVH
    head_dim: int  # D
    mlp_width: int
    rope_theta: float
    norm_eps: float
    max_positions: int  # the context: longest text the model was made for, in tokens
    tied: bool  # the output projection shares the embedding's weights
    window: int | None = None  # sliding window (Mistral v0.1): token t sees positions > t - window
    rope_scaling: dict | None = None  # see rope_frequencies
    rotary_dim: int | None = None  # R: RoPE turns the first R channels of each head (Phi); None: all D
    qkv_bias: bool = False  # biases of the projections: query, key and value (Qwen2),
    o_bias: bool = False  # output,
    mlp_bias: bool = False  # all three of the MLP
    qk_norm: bool = False  # RMSNorm over each query and key head before RoPE (Qwen3)


# ------------------------------------------------------------------------------------------------ rotary positions


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians per position of each channel pair, theta^(-2i/R), (R/2,) float32. With rope_scaling, all are slowed by `factor`
    ("linear"), or as in Llama 3.1: pairs that turn seldom within the original context are, fast ones not, between is a blend.
    """
    R = config.rotary_dim or config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, R, 2, dtype=torch.float32) / R)
    scaling = config.rope_scaling or {}
    if list(scaling) == ["factor"]:
        freq = freq / scaling["factor"]
    elif scaling:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        freq = fast * freq + (1 - fast) * freq / scaling["factor"]
    return freq


def rope_table(position, frequencies, dtype):
    """cos and sin of every angle at position (...), (..., 1, R) each, as rotate wants them."""
    angle = position[..., None, None] * frequencies
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """RoPE in Hugging Face's layout, channel i paired with i + R/2: x (..., heads, D), cos and sin (..., 1, R).

    The pair (a, b) becomes (a cos - b sin, b cos + a sin): each channel takes its partner's times a sin whose sign, minus
    in the first half, is in the table already. Channels from R on stay as they are.
    """
    R = cos.shape[-1]
    if R < x.shape[-1]:
        return torch.cat((rotate(x[..., :R], cos, sin), x[..., R:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(R // 2, dims=-1), sin)


# --------------------------------------------------------------------------------------------------- the KV cache

FAR = 2**62  # beyond any position
BLOCK = 32  # slots, at least, by which a layer's cache grows
# of torch's kernels not cuDNN's, which takes a second to plan for every new shape, and every chunk of every layer has one
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def front_slot(position, sinks, ring):
    """The slot that a token has, or had, among sinks and ring."""
    return torch.where(position < sinks, position, sinks + (position - sinks) % max(ring, 1))


def to_front(attends, count):
    """Moves tokens of a chunk that attend together, attends (B, T), to the front of their rows, so that little of the (B, T') queries
    they make is padding; count: how many each row has, on the host. Returns which of the B * T they are, and which of the B * T', (N',)
    both, and T'.
    """
    longest, row = max(count), torch.arange(len(attends), device=attends.device)[:, None]
    step = attends.flatten().byte().argsort(descending=True, stable=True)[: sum(count)]
    return step, (row * longest + attends.cumsum(1) - 1).flatten()[step], longest


@dataclass
class Step:
    """Decode: where the new token of every row stands."""

    position: torch.Tensor  # (B, 1) in its sequence,
    start: torch.Tensor  # (B,) the same,
    cos: torch.Tensor  # (B, 1, R)
    sin: torch.Tensor
    slot: torch.Tensor  # (B,) in the cache of a layer that filters,
    front: torch.Tensor  # (B,) how many slots of sinks and ring are filled with it,
    row: torch.Tensor  # (B,) and its row, 0 .. B-1

    def by_row(self, x):
        """(N, KVH, D) -> (B, T, KVH, D), at padding anything."""
        return x[:, None]


@dataclass
class Chunk:
    """Prefill: where up to T new tokens of every row stand; the rest of the row is padding."""

    position: torch.Tensor  # (B, T)
    cos: torch.Tensor  # (N, 1, R)
    sin: torch.Tensor
    n: torch.Tensor  # (B,) how many tokens a row has,
    real: torch.Tensor  # (B, T) which they are,
    packed: torch.Tensor  # (N,) which of the B * T, counted through, the real ones are,
    token: torch.Tensor  # (B, T) and which of the real ones each is, at padding any
    end: int  # the most tokens that a row has with these

    def by_row(self, x):
        return x[self.token]


class LayerCache:
    """What one layer remembers of B sequences. A row's slots are, in this order,

        sinks   w = max(warmup, 1) slots for the first tokens: token t in slot t
        ring    G + 1 slots for the latest, kept or not: token t in slot w + (t - w) mod (G + 1)
        far     the kept tokens that have left the ring, one after another; under a sliding window the i-th in slot i mod window

    so that what a token may see is a prefix of them: sinks and ring, as far as they are filled, then far. At decode nothing moves
    but a kept token that leaves the ring. Without a filter (or at ratio 0, or 1 where that leaves nothing to do) all is far.
    """

    def __init__(self, config: ModelConfig, B, layer, ratio, filter: FilterConfig, sinks, criterion, dtype, device):
        self.filter, self.criterion, self.window, self.share = filter, criterion, config.window or FAR, ratio
        # ratio 1: past the warm-up no token queries or is stored, so none is scored either
        self.closed = ratio == 1 and filter.mode == "skip" and filter.recent == 0
        self.filters = ratio > 0 and not self.closed
        self.sinks: int
        self.sinks, self.ring = (sinks, filter.recent + 1) if self.filters else (0, 0)
        self.front = self.sinks + self.ring
        self.most = sinks if self.closed else self.front + self.window  # slots that may ever be needed
        slots = max(self.front, BLOCK) + 1  # the last stays empty: for what goes nowhere
        self.kv = torch.zeros(2, B, config.kv_heads, slots, config.head_dim, dtype=dtype, device=device)  # (2, B, KVH, S, D)
        self.at = torch.full((B, slots), -1, device=device)  # the positions of the tokens in the slots, -1 where there is none
        self.kept = torch.zeros(B, self.front, dtype=torch.bool, device=device)  # who of the sinks and the ring
        self.far = torch.zeros(B, dtype=torch.int64, device=device)  # how many are far ones, or under a window have been
        self.skipped, self.read = torch.zeros_like(self.far), torch.zeros_like(self.far)  # redundant tokens; slots that queries have read
        self.state = self.ratio = self.redundant = self.score = None  # the last two for whoever wants to look: (B, T), the latest
        if self.filters:
            exact = torch.promote_types(dtype, torch.float32)
            self.state = FilterState(B, config.kv_heads, config.head_dim, filter, layer, exact, device)
            self.ratio = torch.full((), ratio, dtype=torch.float64, device=device)  # a number would be compiled in, layer by layer

    def free(self, used):
        """How many more tokens there are slots for, whatever is kept, when `used` slots are filled in the longest row."""
        return self.at.shape[1] - 1 - used if self.at.shape[1] <= self.most else FAR

    def wanted(self, used, rest):
        """How many slots to have then: for what is known to follow, `rest` tokens a row, at the layer's ratio, or for an eighth more."""
        more = math.ceil((1 - self.share) * rest) + (BLOCK // 2 if self.share else 0) if rest else max(used // 8, BLOCK)
        return max(min(used + more, self.most), self.front) + 1

    def resize(self, slots):
        n = slots - self.at.shape[1]  # a negative number cuts
        self.kv, self.at = F.pad(self.kv, (0, 0, 0, n)), F.pad(self.at, (0, n), value=-1)

    def put(self, k, v, redundant, step: Step):
        """Decode: one token a row, k, v (B, KVH, D), redundant (B,) or None, into its slot. Returns how many slots it may see,
        itself included, (B,), and under a sliding window which of them, (B, S).
        """
        row, slot, front, position = step.row, step.slot, step.front if self.ring else 0, step.start
        last = front + (self.far if self.window == FAR else self.far % self.window)
        if self.ring:
            kept = self.kept[row, slot]
            self.kv[:, row, :, last] = self.kv[:, row, :, slot]  # the one that leaves; if it was not kept, it is never looked at
            self.at[row, last] = self.at[row, slot].masked_fill(~kept, -1)
            self.far += kept
            self.kept[row, slot] = ~redundant
            self.skipped += redundant
        else:
            slot = last
            self.far += 1 if redundant is None else ~redundant
            position = position if redundant is None else position.masked_fill(redundant, -1)
        self.kv[:, row, :, slot] = torch.stack((k, v), dim=1)
        self.at[row, slot] = position
        far, mask = self.far, None
        if self.window < FAR:
            far, mask = far.clamp(max=self.window), self.at > step.position - self.window
        if redundant is not None and self.filter.mode == "local":
            far = far.masked_fill(redundant, 0)
        n = front + far
        if redundant is not None and self.filter.mode == "skip":
            n = n.masked_fill(redundant, 0)
        self.read += n if mask is None else (mask & (torch.arange(mask.shape[1], device=n.device) < n[:, None])).sum(1)
        return n, mask

    def in_reach(self, kv, redundant, chunk: Chunk):
        """Prefill: what the new tokens, kv (2, B, KVH, T, D), may look at: far slots, sinks and ring, the new, in this order. Returns
        keys and values (2, B, KVH, K, D); their positions (B, K), -1 where there is none; whether they are kept, (B, K); and their
        place when all are stored, (B, K): that of a slot in order, FAR for what nobody will see any more.
        """

        def joined(old, new, dim):
            near, far = old.tensor_split((self.front,), dim)
            return torch.cat((far, near, new), dim)

        end = (chunk.position[:, 0] + chunk.n)[:, None]
        at = joined(self.at, chunk.position.masked_fill(~chunk.real, -1), 1)
        kept = joined(F.pad(self.kept, (0, self.at.shape[1] - self.front), value=True), chunk.real if redundant is None else ~redundant, 1)
        near = (at < self.sinks) | (at >= end - self.ring)
        stays = (at >= 0) & (near | (kept & (at >= end - self.window)))
        place = torch.where(near, front_slot(at, self.sinks, self.ring), self.front + at)
        return joined(self.kv, kv, 3), at, kept, place.masked_fill(~stays, FAR)

    def visible(self, query, at, kept, near):
        """Prefill: (B, T', K), which tokens at (B, K) those at query (B, T') may look at; near: no far one."""
        query, at = query[..., None], at.masked_fill(at < 0, FAR)[:, None]
        always = (at < self.sinks) | (kept[:, None] & (not near))
        mask = (at <= query) & (always | (at > query - self.ring))
        return mask & (at > query - self.window) if self.window < FAR else mask

    def store(self, kv, at, kept, place, used):
        """Prefill: lay out anew what in_reach() gave, of which at most `used` of a row stay."""
        stays = (place < FAR).sum(1, keepdim=True)
        order = place.argsort(1)[:, : max(used, self.front) + 1]  # no slot between filled ones is empty
        self.kv = kv.gather(3, order[:, None, :, None].expand(2, -1, kv.shape[2], -1, kv.shape[4]))
        self.at = at.gather(1, order).masked_fill(torch.arange(order.shape[1], device=at.device) >= stays, -1)
        self.kept = kept.gather(1, order[:, : self.front]) & (self.at[:, : self.front] >= 0)
        self.far = (stays[:, 0] - self.front).clamp(min=0)

    def select(self, rows, slots):
        """Keep these rows, an int64 tensor, in this order, and no more slots than that."""
        for name in ("kept", "skipped", "read"):
            setattr(self, name, getattr(self, name)[rows])
        self.kv, self.at = self.kv[:, rows, :, :slots], self.at[rows, :slots]
        self.redundant = self.score = None
        if self.state is not None:
            self.state.select(rows)

    def usage(self, seen):
        """(3, B): tokens that were not redundant, slots in use, slots that queries have read."""
        kept = seen.clamp(max=self.most) if self.closed else seen - self.skipped
        return torch.stack((kept, (self.at >= (seen - self.window).clamp(min=0)[:, None]).sum(1), self.read))

    def nbytes(self) -> int:
        own = sum(t.nbytes for t in (self.kv, self.at, self.kept, self.far, self.skipped, self.read))
        return own + (0 if self.state is None else self.state.nbytes())


class KVCache:
    """All a model remembers of B sequences. Transformer.new_cache makes one, Transformer.forward moves it on."""

    def __init__(self, config: ModelConfig, B, filter: FilterConfig | None, length, criterion, dtype, device):
        self.filter = filter = filter or FilterConfig(prune=0.0)
        self.window, self.sinks, self.length = config.window or FAR, min(max(filter.warmup, 1), config.max_positions), length
        self.frequencies = rope_frequencies(config).to(device, torch.promote_types(dtype, torch.float32))
        self.seen = torch.zeros(B, dtype=torch.int64)  # tokens so far, so the position of the next; on the host,
        self.position = self.seen.to(device, copy=True)  # and on the device
        self.fed = self.seen, 0  # the latest: n_new and T
        self.idle = False  # whether all rows are past the warm-up, so that layers of ratio 1 have nothing to do
        self.room = BLOCK  # decode steps that every layer has slots for
        self.steps = 0  # decode steps since a tensor of the cache was replaced,
        self.replay: Callable | None = None  # and their recording
        ratios = layer_ratios(filter, config.n_layers)
        self.layers = [LayerCache(config, B, *layer, filter, self.sinks, criterion, dtype, device) for layer in enumerate(ratios)]
        self.slot_bytes = 2 * config.kv_heads * config.head_dim * dtype.itemsize  # K and V of one token in one layer

    def step(self, dtype) -> Step:
        """Decode: one more token of each row."""
        ring, row = self.filter.recent + 1, torch.arange(len(self.position), device=self.position.device)
        slot, front = front_slot(self.position, self.sinks, ring), (self.position + 1).clamp(max=self.sinks + ring)
        cos, sin = rope_table(self.position, self.frequencies, dtype)
        return Step(self.position[:, None], self.position, cos, sin, slot, front, row)

    def advance(self, n_new, T, dtype) -> Chunk:
        """Prefill: n_new[b] more tokens of each row (host), in T columns."""
        for layer, used, _ in self.look():
            if layer.free(used):
                layer.resize(max(used, layer.front) + 1)  # no query is to look at empty slots
        self.room, self.steps, self.replay = 0, 0, None  # all tensors are about to be replaced
        real = torch.arange(T) < n_new[:, None]
        token = (real.flatten().cumsum(0) - 1).clamp(min=0).view(real.shape)
        packed = real.flatten().nonzero()[:, 0]  # still on the host
        n, real, token, packed = (x.to(self.position.device) for x in (n_new, real, token, packed))
        position = self.position[:, None] + torch.arange(T, device=n.device)
        cos, sin = rope_table(position.flatten()[packed], self.frequencies, dtype)
        self.idle = int(self.seen.min()) >= self.sinks
        self.seen, self.position = self.seen + n_new, self.position + n
        return Chunk(position, cos, sin, n, real, packed, token, int(self.seen.max()))

    def look(self):
        """(layer, slots filled in its longest row, slots that it should have) of each layer: the one wait of decode."""
        seen = max(self.seen.tolist(), default=0)
        far = torch.stack([F.pad(layer.far, (0, 1)).max() for layer in self.layers]).cpu().tolist()
        used = [min(seen, layer.front) + min(n, self.window) for layer, n in zip(self.layers, far)]
        return [(layer, n, layer.wanted(n, max(self.length - seen, 0))) for layer, n in zip(self.layers, used)]

    def make_room(self):
        """Let every layer have slots for some steps of decode."""
        looked = self.look()
        if min(layer.free(used) for layer, used, _ in looked) < 1:
            for layer, _, slots in looked:
                layer.resize(slots)
            self.steps, self.replay = 0, None
        self.room = min(layer.free(used) for layer, used, _ in looked)

    @torch.inference_mode()
    def select(self, rows):
        """Keep these rows (a list or int64 tensor), in this order; a row named twice is copied: a forked prefix."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        on_device = rows.to(self.position.device)
        self.seen, self.position = self.seen[rows.cpu()], self.position[on_device]
        for layer in self.layers:
            layer.far = layer.far[on_device]
        for layer, _, slots in self.look():
            layer.select(on_device, slots)
        self.room, self.steps, self.replay = 0, 0, None

    def usage(self):
        """(B, 5) int64 on the host, of each row: (token, layer) pairs fed, those found redundant, slots in use; slots that all queries
        so far have read, and those that a dense model's would have: min(t + 1, window) at position t.
        """
        seen, L = self.seen, len(self.layers)
        kept, held, read = torch.stack([layer.usage(self.position) for layer in self.layers]).sum(0).cpu()
        m = seen.clamp(max=self.window)
        return torch.stack((L * seen, L * seen - kept, held, read, L * (m * (m + 1) // 2 + (seen - m) * m)), dim=1)

    def nbytes(self) -> int:
        """Bytes allocated: slots, and all that the filter remembers."""
        return sum(layer.nbytes() for layer in self.layers)

    def live_bytes(self) -> int:
        """Bytes in use: the same, without the slots that hold no token, or one that a window hides from all to come."""
        empty = sum(layer.at.numel() for layer in self.layers) - int(self.usage()[:, 2].sum())
        return self.nbytes() - empty * (self.slot_bytes + 8)  # a slot has a position, too


# ------------------------------------------------------------------------------------------------------- the model


ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # private to torch, so it may be gone one day


class Linear(nn.Linear):
    """x W^T + b."""

    def forward(self, x):
        if ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
            # oneDNN in place of the default library: a product with few rows takes a tenth less time
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


class Attention(nn.Module):
    """Grouped-query attention, of each token over what it may see."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q = Linear(config.width, config.heads * config.head_dim, config.qkv_bias)
        self.k = Linear(config.width, config.kv_heads * config.head_dim, config.qkv_bias)
        self.v = Linear(config.width, config.kv_heads * config.head_dim, config.qkv_bias)
        self.o = Linear(config.heads * config.head_dim, config.width, config.o_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, chunk: Step | Chunk, cache: LayerCache):
        """x (N, C), the residual stream after its norm -> what attention adds to it, (N, C)."""
        # keys and values
        raw_k = self.k_norm(self.k(x).unflatten(-1, (self.kv_heads, self.head_dim)))  # (N, KVH, D)
        k, v = rotate(raw_k, chunk.cos, chunk.sin), self.v(x).unflatten(-1, (self.kv_heads, self.head_dim))

        # filter
        redundant = chunk.position >= cache.most if cache.closed else None  # (B, T)
        if cache.filters:
            compared, n = k if cache.filter.keys == "rotated" else raw_k, chunk.n if isinstance(chunk, Chunk) else None
            compared, values = chunk.by_row(compared), chunk.by_row(v)  # (B, T, KVH, D)
            redundant, score = cache.criterion(compared, values, n, cache.state, cache.ratio, cache.filter)  # (B, T) both
            cache.redundant, cache.score = redundant, score

        # store, attend, and add
        if isinstance(chunk, Chunk):
            kv = chunk.by_row(torch.stack((k, v), dim=1)).permute(2, 0, 3, 1, 4)  # (2, B, KVH, T, D)
            return self.prefill(x, kv, redundant, chunk, cache)
        n, mask = cache.put(k, v, None if redundant is None else redundant[:, 0], chunk)
        q = self.queries(x, chunk.cos, chunk.sin)[:, :, None]  # (B, H, 1, D)
        added = self.o(attend(q, cache.kv[0], cache.kv[1], n, mask).flatten(1))
        return added if redundant is None or cache.filter.mode != "skip" else added.masked_fill(redundant, 0)

    def queries(self, x, cos, sin):
        """(N, H, D)"""
        return rotate(self.q_norm(self.q(x).unflatten(-1, (self.heads, self.head_dim))), cos, sin)

    def prefill(self, x, kv, redundant, chunk: Chunk, cache: LayerCache):
        """The same for any number of tokens a row: those that skip are left out of the products with q and o too."""
        (B, T), (kv, at, kept, place) = chunk.position.shape, cache.in_reach(kv, redundant, chunk)
        groups, used, added = [(chunk.packed, chunk.packed, T)], min(chunk.end, cache.window), torch.zeros_like(x)  # all, as they stand
        if redundant is not None:
            attends = {"skip": [~redundant], "local": [~redundant, redundant], "cache": [chunk.real]}[cache.filter.mode]
            attends = [some & chunk.real for some in attends]
            *counts, stay = torch.stack([some.sum(1) for some in (*attends, place < FAR)]).cpu().tolist()  # the one wait of a layer
            groups, used = [to_front(some, count) for some, count in zip(attends, counts)], max(stay)
            cache.skipped += redundant.sum(1)
        for (step, seat, longest), near in zip(groups, (False, True)):  # near: redundant ones in mode "local", which read no far key
            if longest:
                token, far = chunk.token.flatten()[step], at.shape[1] - T - cache.front if near else 0
                q = self.queries(x[token], chunk.cos[token], chunk.sin[token])  # (N', H, D)
                position, queries = at.new_full((B * longest,), -1), q.new_zeros(B * longest, *q.shape[1:])
                position[seat], queries[seat] = chunk.position.flatten()[step], q
                mask = cache.visible(position.view(B, longest), at[:, far:], kept[:, far:], near)  # (B, T', K)
                cache.read += mask.sum(2, dtype=torch.int32).sum(1)  # in int64 it takes eight times as long
                y = self.attend_all(queries.view(B, longest, *q.shape[1:]), kv[0, :, :, far:], kv[1, :, :, far:], mask)
                added[token] = self.o(y.flatten(0, 1)[seat])
        cache.store(kv, at, kept, place, used)
        return added

    def attend_all(self, q, k, v, mask):
        """q (B, T', H, D) over those of k, v (B, KVH, K, D) that mask (B, T', K) shows -> (B, T', H * D)."""
        mask = torch.where(mask, 0.0, -math.inf).to(q.dtype)[:, None]
        q = q.unflatten(2, (self.kv_heads, -1)).permute(3, 0, 2, 1, 4)  # the H/KVH query heads of a key/value head take turns
        y = torch.stack([F.scaled_dot_product_attention(part, k, v, attn_mask=mask) for part in q], dim=3)  # (B, KVH, T', H/KVH, D)
        return y.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Linear(config.width, config.mlp_width, config.mlp_bias)
        self.up = Linear(config.width, config.mlp_width, config.mlp_bias)
        self.down = Linear(config.mlp_width, config.width, config.mlp_bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm, self.attn = nn.RMSNorm(config.width, config.norm_eps), Attention(config)
        self.mlp_norm, self.mlp = nn.RMSNorm(config.width, config.norm_eps), MLP(config)

    def forward(self, x, chunk: Step | Chunk, cache: LayerCache, idle=False):
        """x (N, C), the residual stream -> the same after this layer; idle: no token attends."""
        if not idle:
            x = x + self.attn(self.attn_norm(x), chunk, cache)
        return x + self.mlp(self.mlp_norm(x))


class Replay:
    """A decode step as a CUDA graph: what it launches is recorded once, and launched again as one. Raises where that cannot be."""

    def __init__(self, step, tokens, cache):
        self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(self.tokens, cache)

    def __call__(self, tokens):
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits.clone()


class Transformer(nn.Module):
    """The whole decoder, for inference: tokens in, logits out, everything remembered in the cache."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # not nn.Embedding(...), which on the meta device, where loading starts, takes seconds to import what draws its weights
        self.embed = nn.Embedding.from_pretrained(torch.randn(config.vocab_size, config.width), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.decode_block: Callable = Block.forward
        self.capture: Callable | None = Replay  # what makes a decode step repeatable, on CUDA; None: nothing

    def compile_decode(self):
        """Have torch.compile make one graph of a block at decode, for all layers alike; the first steps then take a while."""
        torch._dynamo.config.recompile_limit = 64  # a graph each for layers that filter and that do not, and for each batch size
        self.decode_block = torch.compile(Block.forward, fullgraph=True, dynamic=False)  # but for the slots: see decode

    @torch.inference_mode()
    def new_cache(self, B, filter: FilterConfig | None = None, criterion=token_filter, length=0) -> KVCache:
        """An empty cache for B sequences; what is fed with it is filtered, if `filter` is given.

        `criterion` decides which tokens are redundant: token_filter, or a rival with the same signature. `length`: how many tokens a
        row will have in the end, if known, so that slots for them are there from the start; otherwise the cache grows.
        """
        return KVCache(self.config, B, filter, length, criterion, self.embed.weight.dtype, self.embed.weight.device)

    @torch.inference_mode()
    def forward(self, tokens, cache: KVCache, n_new=None, last=False):
        """Feed tokens (B, T) int64, of which row b's first n_new[b] are real (default: all), and move the cache on.

        Returns logits (B, T, vocab), meaningless at padding; with last=True those after each row's last real token
        only, (B, vocab). Prefill and decode are this same call. Raises ValueError beyond the model's context.
        """
        (B, T), weight = tokens.shape, self.embed.weight
        n_new = torch.full((B,), T) if n_new is None else torch.as_tensor(n_new, dtype=torch.int64, device="cpu")
        longest = max((cache.seen + n_new).tolist(), default=0)
        if longest > self.config.max_positions:
            raise ValueError(f"{longest} tokens are more than the model's context of {self.config.max_positions}")
        tokens, cache.fed = tokens.to(weight.device), (n_new, T)
        if not n_new.any():  # there is nothing to feed
            for layer in cache.layers:
                layer.redundant = layer.score = None
            return weight.new_zeros(B, *(() if last else (T,)), self.config.vocab_size)
        if T == 1 and n_new.all():
            logits = self.decode(tokens, cache)
            return logits if last else logits[:, None]
        chunk = cache.advance(n_new, T, weight.dtype)
        x = self.embed(tokens.flatten()[chunk.packed])  # (N, C)
        with sdpa_kernel(KERNELS):
            for block, layer in zip(self.blocks, cache.layers):
                x = block(x, chunk, layer, layer.closed and cache.idle)
        if last:
            return self.head(self.norm(x[(n_new.cumsum(0) - 1).clamp(min=0).to(x.device)]))
        return chunk.by_row(self.head(self.norm(x)))

    def captures(self) -> bool:
        return self.capture is not None and self.embed.weight.is_cuda

    def fixed_batch(self) -> bool:
        """Whether steps are made for one number of rows: compiled or captured, so that another takes time."""
        return self.decode_block is not Block.forward or self.captures()

    def decode(self, tokens, cache: KVCache):
        """One token for every row, (B, 1) -> logits (B, vocab): by step, or on CUDA, from the second time on, by its replay."""
        if cache.room == 0:
            cache.make_room()
        if cache.idle != (idle := int(cache.seen.min()) >= cache.sinks):
            cache.idle, cache.steps, cache.replay = idle, 0, None
        if cache.steps == 0 and self.decode_block is not Block.forward:
            for layer in cache.layers:  # numbers of slots alone are no numbers to the compiler: it makes one graph for all of them
                for tensor, slots in ((layer.kv, 3), (layer.at, 1)):
                    torch._dynamo.mark_dynamic(tensor, slots)
        if cache.steps == 1 and self.capture and self.captures():
            try:
                cache.replay = self.capture(self.step, tokens, cache)
            except Exception as e:  # noqa: BLE001 (kernels, compilers and drivers fail in many ways)
                self.capture = None
                print(f"note: decoding is not captured as a CUDA graph, so it is slower: {' '.join(str(e).split())[:200]}", file=sys.stderr)
        cache.seen, cache.room, cache.steps = cache.seen + 1, cache.room - 1, cache.steps + 1
        return self.step(tokens, cache) if cache.replay is None else cache.replay(tokens)

    def step(self, tokens, cache: KVCache):
        """A decode step: nothing in it comes from the host or waits for the device, and no tensor that the next one needs is replaced."""
        x = self.embed(tokens[:, 0])  # (B, C)
        here = cache.step(x.dtype)
        for block, layer in zip(self.blocks, cache.layers):
            x = self.decode_block(block, x, here, layer, layer.closed and cache.idle)
        cache.position += 1
        return self.head(self.norm(x))

    def prefill(self, prompts: list[list[int]], cache: KVCache, chunk=512):
        """Feed one prompt a row, of any lengths, `chunk` tokens at a time: logits (B, vocab) after each one's end."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        if not lengths.all():
            raise ValueError("a prompt is empty")
        if (highest := max(map(max, prompts))) >= self.config.vocab_size:
            raise ValueError(f"a prompt has the token {highest}, but the model only {self.config.vocab_size} embeddings")
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        logits = None
        for start in range(0, tokens.shape[1], chunk):
            n_new = (lengths - start).clamp(0, chunk)
            latest = self(tokens[:, start : start + chunk], cache, n_new, last=True)
            ends = (n_new > 0).to(latest.device)[:, None]
            logits = latest if logits is None else torch.where(ends, latest, logits)
        return logits
