"""A LLaMA/Mistral decoder whose layers may filter tokens, with the KV cache that makes a saving of it.

Read from the top; to see the filter at work, follow one token through Attention.forward.

Shapes: B sequences, T new tokens, S slots of a layer's cache, L layers, H query heads, KVH key/value heads (H is a multiple of
KVH), D head size, C width, R channels of a head that RoPE turns, N tokens gathered out of a (B, T) chunk. A token's
*position* counts from the start of its own sequence; its *slot* is where a layer's cache keeps it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attend import attention_for
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
    """cos and sin of every angle at position (B, T), (B, T, 1, R) each, as rotate wants them."""
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

BLOCK = 32  # decode steps between two looks at how long the rows have become


def send(x, device):
    """A tensor from the host to the device, without waiting for what the device is at."""
    return x.to(device, non_blocking=True)


def front_slot(position, sinks, ring):
    """The slot that a token has, or had, among sinks and ring."""
    return torch.where(position < sinks, position, sinks + (position - sinks) % max(ring, 1))


@dataclass
class Chunk:
    """Where the new tokens of a call stand in their sequences. Padding is on the right."""

    seen: torch.Tensor  # (B,) host: how many tokens came before
    n_new: torch.Tensor  # (B,) host: how many of the T tokens are real
    n: torch.Tensor | None  # (B,) the same on the device; None at decode, where every row has one token, a real one
    position: torch.Tensor  # (B, T)
    cos: torch.Tensor  # (B, T, 1, R)
    sin: torch.Tensor
    row: torch.Tensor  # (B,) 0 .. B-1
    slot: torch.Tensor  # (B,) of the first token, in the layers that filter,
    front: torch.Tensor  # (B,) and how many slots of sinks and ring are filled with it
    windowed: bool  # whether a sliding window may hide something


@dataclass
class Tape:
    """A chunk in one layer, as prefill needs it: the ring's tokens in order of position, then the new ones."""

    kv: torch.Tensor  # (B, G+1+T, 2, KVH, D)
    position: torch.Tensor  # (B, G+1+T) host, from here on; negative where there is no such token
    kept: torch.Tensor  # (B, G+1+T) bool
    far: torch.Tensor  # (B,) how many far tokens each row had before


class LayerCache:
    """What one layer remembers of B sequences. A row's slots are, in this order,

        sinks   w = max(warmup, 1) slots for the first tokens: token t in slot t
        ring    G + 1 slots for the latest, kept or not: token t in slot w + (t - w) mod (G + 1)
        far     `far[b]` slots, for the kept tokens that have left the ring, in order

    so that what a token may see is a prefix of them: sinks and ring, as far as they are filled, then far. Nothing moves but
    a kept token that leaves the ring. Without a filter (or at ratio 0, or 1 where that leaves nothing to do) all is far.
    """

    def __init__(self, config: ModelConfig, B, layer, ratio, filter: FilterConfig, sinks, criterion, dtype, device):
        self.filter, self.criterion, self.window = filter, criterion, config.window
        # ratio 1: past the warm-up no token queries or is stored, so none is projected or scored either
        self.closed = ratio == 1 and filter.mode == "skip" and filter.recent == 0
        self.filters = ratio > 0 and not self.closed
        self.sinks: int
        self.sinks, self.ring = (sinks, filter.recent + 1) if self.filters else (0, 0)
        self.front = self.sinks + self.ring
        self.attend = attention_for(torch.device(device), dtype)
        self.kv = torch.zeros(2, B, config.kv_heads, BLOCK + 1, config.head_dim, dtype=dtype, device=device)  # (2, B, KVH, S, D)
        self.far = torch.zeros(B, dtype=torch.int64, device=device)
        self.kept = torch.zeros(B, self.front + 1, dtype=torch.bool, device=device)  # who of the ring; its last column is for the rest
        self.at = self.far.new_full((B, BLOCK + 1 if self.window else 0), -1)  # (B, S) positions in the slots; for a window only
        self.read, self.expired = torch.zeros_like(self.far), torch.zeros_like(self.far)  # slots that queries read; far tokens dropped
        self.state = self.ratio = self.redundant = self.score = None  # the last two for whoever wants to look: (B, T), the latest
        if self.filters:
            exact = torch.promote_types(dtype, torch.float32)
            self.state = FilterState(B, config.kv_heads, config.head_dim, filter, layer, exact, device)
            self.ratio = torch.full((), ratio, dtype=torch.float64, device=device)  # a number would be compiled in, layer by layer

    def resize(self, slots):
        """Allocate so many slots, no fewer and hardly more."""
        missing = slots - self.kv.shape[3]
        if not -BLOCK <= missing <= 0:
            self.kv = F.pad(self.kv, (0, 0, 0, missing)).contiguous()  # a negative number cuts
            self.at = F.pad(self.at, (0, missing if self.window else 0), value=-1).contiguous()

    def in_sight(self, redundant, front, far):
        """How many slots a token may see, a prefix: all tensors alike, front and far counted with itself in place."""
        if redundant is None or self.filter.mode == "cache":
            return front + far
        if self.filter.mode == "local":
            return front + far.masked_fill(redundant, 0)
        return (front + far).masked_fill(redundant, 0)

    def put(self, kv, redundant, chunk: Chunk):
        """Decode: one token a row, kv (B, 1, 2, KVH, D), into its slot; returns how many slots it may see, itself included, (B,)."""
        row, slot, end = chunk.row, chunk.slot, self.far + (0 if redundant is None else chunk.front)
        if redundant is None:
            slot, n = end, self.far.add_(1)
        else:
            redundant = redundant[:, 0]
            self.kv[:, row, :, end] = self.kv[:, row, :, slot]  # the one that leaves; if it was not kept, it is never looked at
            self.far += self.kept[row, slot]
            self.kept[row, slot] = ~redundant
            n = self.in_sight(redundant, chunk.front, self.far)
        self.kv[:, row, :, slot] = kv[:, 0]
        if self.window:
            self.at[row, end] = self.at[row, slot]
            self.at[row, slot] = chunk.position[:, 0]
        self.read += n if self.window is None else n.clamp(max=self.window)
        return n

    def tape(self, kv, redundant, chunk: Chunk) -> Tape:
        """Prefill: any number of tokens of each row, kv (B, T, 2, KVH, D). Waits for the device once, unless the host knows already."""
        if self.window:
            self.expire(chunk.position[:, :1])
        row, T = chunk.row[:, None], kv.shape[1]
        position = (chunk.seen - self.ring)[:, None] + torch.arange(self.ring + T)
        kept, far = (position >= 0) & (position < (chunk.seen + chunk.n_new)[:, None]), chunk.seen
        if self.filters or self.window:
            slot = send(front_slot(position[:, : self.ring].clamp(min=0), self.sinks, self.ring), kv.device)
            parts = [self.far[:, None], self.kept[row, slot], *([] if redundant is None else [~redundant])]
            known = torch.cat(parts, dim=1).cpu()  # the wait
            far, kept = known[:, 0], kept & (known[:, 1:] > 0) if self.filters else kept
            kv = torch.cat((self.kv[:, row, :, slot], kv), dim=1)
        return Tape(kv, position, kept, far)

    def extend(self, tape: Tape, chunk: Chunk):
        """Prefill: store what the tape brings."""
        p, end = tape.position, (chunk.seen + chunk.n_new)[:, None]  # all on the host, (B, G+1+T)
        stays = (p >= 0) & (p < end) & ((p < self.sinks) | (p >= end - self.ring))
        leaves = tape.kept & (p >= self.sinks) & (p < end - self.ring)
        far = tape.far[:, None] + leaves.cumsum(1)
        self.resize(int((far[:, -1:] + end.clamp(max=self.front)).max()) + 1)
        slot = torch.where(leaves, self.front + far - 1, self.kv.shape[3] - 1)  # the last is for what goes nowhere
        slot = torch.where(stays, front_slot(p, self.sinks, self.ring), slot)
        t, redundant, device = p[:, self.ring :], ~tape.kept[:, self.ring :], self.far.device
        n = self.in_sight(redundant, (t + 1).clamp(max=self.front), far[:, : t.shape[1]]).clamp(max=self.window or 2**62)
        self.read += send(n.masked_fill(t >= end, 0).sum(1), device)
        self.far = send(tape.far + leaves.sum(1), device)
        row, slot = chunk.row[:, None], send(slot, device)
        self.kv[:, row, :, slot] = tape.kv
        self.kept[row, slot.clamp(max=self.front)] = send(tape.kept, device)
        if self.window:
            self.at[row, slot] = send(p, device)

    def expire(self, position):
        """Drop the far tokens that the window hides from positions (B, 1) on, and close the gap they leave."""
        far = self.at[:, self.front :]  # (B, S'), in order of position
        slot = torch.arange(far.shape[1], device=far.device)
        gone = ((far <= position - self.window) & (slot < self.far[:, None])).sum(1)
        source = (gone[:, None] + slot).clamp(max=far.shape[1] - 1)
        far.copy_(far.gather(1, source))
        for kv in self.kv[:, :, :, self.front :]:
            kv.copy_(kv.gather(2, source[:, None, :, None].expand_as(kv)))
        self.far, self.expired = self.far - gone, self.expired + gone

    def select(self, rows):
        """Keep these rows, an int64 tensor, in this order."""
        for name in ("far", "kept", "at", "read", "expired"):
            setattr(self, name, getattr(self, name)[rows])
        self.kv, self.redundant, self.score = self.kv[:, rows], None, None
        if self.state is not None:
            self.state.select(rows)

    def usage(self, seen):
        """(3, B): tokens that were not redundant, slots in use, slots that queries have read."""
        seen = send(seen, self.far.device)
        kept = self.far + self.expired + self.kept[:, self.sinks : self.front].sum(1) + seen.clamp(max=self.sinks)
        return torch.stack((kept, self.far + seen.clamp(max=self.front), self.read))

    def nbytes(self) -> int:
        own = sum(t.nbytes for t in (self.kv, self.far, self.kept, self.at, self.read, self.expired))
        return own + (0 if self.state is None else self.state.nbytes())


class KVCache:
    """All a model remembers of B sequences. Transformer.new_cache makes one, Transformer.forward moves it on."""

    def __init__(self, config: ModelConfig, B, filter: FilterConfig | None, criterion, dtype, device):
        self.filter = filter = filter or FilterConfig(prune=0.0)
        self.window, self.sinks, self.device = config.window, min(max(filter.warmup, 1), config.max_positions), torch.device(device)
        self.frequencies = rope_frequencies(config).to(device, torch.promote_types(dtype, torch.float32))
        self.seen = torch.zeros(B, dtype=torch.int64)  # tokens so far, so the position of the next; host
        self.room = BLOCK  # decode steps that every layer has slots for
        ratios = layer_ratios(filter, config.n_layers)
        self.layers = [LayerCache(config, B, *layer, filter, self.sinks, criterion, dtype, device) for layer in enumerate(ratios)]
        self.chunk: Chunk | None = None  # the latest
        self.slot_bytes = 2 * config.kv_heads * config.head_dim * dtype.itemsize  # K and V of one token in one layer

    def advance(self, n_new, T, dtype) -> tuple[Chunk, Chunk | None]:
        """Make room for n_new[b] more tokens of each row (host), in T columns, and say where they stand: all of them, and those
        within the warm-up (None if no row has any).
        """
        warm: Chunk | None
        chunk = warm = self.chunk = self.describe(self.seen, n_new, T, dtype)
        if chunk.n is None and self.room == 0:
            self.make_room()
        self.room = self.room - 1 if chunk.n is None else 0
        early = torch.minimum(n_new, (self.sinks - self.seen).clamp(min=0))
        if not torch.equal(early, n_new):
            longest = int(early.max())
            warm = self.describe(self.seen.clamp(max=self.sinks), early, longest, dtype) if longest else None
        self.seen = self.seen + n_new
        return chunk, warm

    def describe(self, seen, n_new, T, dtype) -> Chunk:
        start, ring = send(seen, self.device), self.filter.recent + 1
        n = None if T == 1 and bool((n_new == 1).all()) else send(n_new, self.device)
        position = start[:, None] + torch.arange(T, device=self.device)
        cos, sin = rope_table(position, self.frequencies, dtype)
        slot = front_slot(start, self.sinks, ring)
        # on the CPU the mask costs nothing, and its coming later would be one more graph to compile
        windowed = bool(self.window) and (self.device.type == "cpu" or int(seen.max()) + T > self.window)
        row, front = torch.arange(len(seen), device=self.device), (start + 1).clamp(max=self.sinks + ring)
        return Chunk(seen, n_new, n, position, cos, sin, row, slot, front, windowed)

    def make_room(self):
        """Let every layer have as many slots as BLOCK steps of decode can fill: the one wait of decode."""
        if self.window is not None:
            for layer in self.layers:
                layer.expire(send(self.seen, self.device)[:, None])
        seen = int(F.pad(self.seen, (0, 1)).max())
        longest = torch.stack([F.pad(layer.far, (0, 1)).max() for layer in self.layers]).cpu().tolist()
        for layer, far in zip(self.layers, longest):
            filled = far + min(seen, layer.front)
            layer.resize(min(filled + BLOCK, self.sinks) if layer.closed else filled + BLOCK + (seen < layer.front))
        self.room = BLOCK

    @torch.inference_mode()
    def select(self, rows):
        """Keep these rows (a list or int64 tensor), in this order; a row named twice is copied: a forked prefix."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        self.seen = self.seen[rows]
        for layer in self.layers:
            layer.select(rows.to(self.device))
        self.make_room()

    def usage(self):
        """(B, 5) int64 on the host, of each row: (token, layer) pairs fed, those found redundant, slots in use; slots that all queries
        so far have read, and those that a dense model's would have: min(t + 1, window) at position t.
        """
        seen, L = self.seen, len(self.layers)
        kept, held, read = torch.stack([layer.usage(seen) for layer in self.layers]).sum(0).cpu()
        m = seen if self.window is None else seen.clamp(max=self.window)
        dense = m * (m + 1) // 2 + (seen - m) * m
        return torch.stack((L * seen, L * seen - kept, held, read, L * dense), dim=1)

    def nbytes(self) -> int:
        """Bytes allocated: slots, and all that the filter remembers."""
        return sum(layer.nbytes() for layer in self.layers)

    def live_bytes(self) -> int:
        """Bytes in use: the same, without the slots that hold no token."""
        empty = sum(layer.kv.shape[1] * layer.kv.shape[3] for layer in self.layers) - int(self.usage()[:, 2].sum())
        return self.nbytes() - empty * (self.slot_bytes + (0 if self.window is None else 8))


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

    def forward(self, x, chunk: Chunk, cache: LayerCache):
        """x (B, T, C), the residual stream after its norm -> what attention adds to it, (B, T, C)."""
        # keys and values
        raw_k = self.k_norm(self.k(x).unflatten(-1, (self.kv_heads, self.head_dim)))  # (B, T, KVH, D)
        k, v = rotate(raw_k, chunk.cos, chunk.sin), self.v(x).unflatten(-1, (self.kv_heads, self.head_dim))

        # filter
        redundant = None
        if cache.filters:
            compared = k if cache.filter.keys == "rotated" else raw_k
            redundant, score = cache.criterion(compared, v, chunk.n, cache.state, cache.ratio, cache.filter)  # (B, T) both
            cache.redundant, cache.score = redundant, score

        # store, attend, and add
        kv = torch.stack((k, v), dim=2)  # (B, T, 2, KVH, D)
        if chunk.n is not None:
            return self.prefill(x, kv, redundant, chunk, cache)
        n = cache.put(kv, redundant, chunk)
        q = self.queries(x, chunk.cos, chunk.sin)  # (B, 1, H, D)
        mask = cache.at > chunk.position - (cache.window or 0) if chunk.windowed else None  # (B, S)
        y = cache.attend(q.view(len(x), self.kv_heads, -1, self.head_dim), *cache.kv, n, mask)
        added = self.o(y.view(len(x), 1, -1))
        return added if redundant is None or cache.filter.mode != "skip" else added.masked_fill(redundant[..., None], 0)

    def queries(self, x, cos, sin):
        return rotate(self.q_norm(self.q(x).unflatten(-1, (self.heads, self.head_dim))), cos, sin)

    def prefill(self, x, kv, redundant, chunk: Chunk, cache: LayerCache):
        """The same for any number of tokens a row: those that skip are left out of the products with q and o too."""
        (B, T, C), tape = x.shape, cache.tape(kv, redundant, chunk)
        attends = tape.kept[:, cache.ring :] if cache.filter.mode == "skip" else torch.arange(T) < chunk.n_new[:, None]
        index = send(attends.flatten().nonzero()[:, 0], x.device)  # (N,)
        q = self.queries(*(part.flatten(0, 1)[index] for part in (x, chunk.cos, chunk.sin)))  # (N, H, D)
        rows = enumerate(q.split(attends.sum(1).tolist()))
        y = torch.cat([self.attend_row(q, b, attends[b].nonzero()[:, 0], tape, chunk, cache) for b, q in rows])
        cache.extend(tape, chunk)
        return x.new_zeros(B * T, C).index_copy_(0, index, self.o(y.flatten(1))).view(B, T, C)

    def attend_row(self, q, b, steps, tape: Tape, chunk: Chunk, cache: LayerCache):
        """The queries (N, H, D) of row b at these steps of the chunk (N,) host, a block at a time -> (N, H, D)."""
        seen, n_new, far, ring, front = int(chunk.seen[b]), int(chunk.n_new[b]), int(tape.far[b]), cache.ring, cache.front
        sinks, p = min(seen, cache.sinks), tape.position[b]
        column = ((p >= sinks) & (p < seen + n_new)).nonzero()[:, 0]
        if alone := cache.filter.mode == "skip" and ring <= 1:  # who skips is in nobody's sight
            column = column[tape.kept[b, column]]
        # what is before them: far tokens, sinks, the ring as far as it is filled; then the new ones
        index, past = send(column, q.device), cache.kv[:, b]
        kv = torch.cat((past[:, :, front : front + far], past[:, :, :sinks], tape.kv[b, index].permute(1, 2, 0, 3)), dim=2)
        kv = kv.repeat_interleave(self.heads // self.kv_heads, dim=1)[:, None]  # (2, 1, H, S, D)
        old = column.new_full((far,), cache.sinks) if cache.window is None else cache.at[b, front : front + far]
        position = torch.cat((send(old, q.device), send(torch.cat((torch.arange(sinks), p[column])), q.device)))
        kept = send(F.pad(tape.kept[b, column], (far + sinks, 0), value=True), q.device)
        local = ~tape.kept[b, ring + steps] & (cache.filter.mode == "local")
        y = torch.empty_like(q)
        for near in (False, True):  # near: redundant ones in mode "local", which read no far key
            for block in (local == near).nonzero()[:, 0].split(256):
                if len(block):
                    sight = slice(far if near else 0, far + sinks + int((column <= ring + steps[block[-1]]).sum()))
                    key, query = position[sight], send(seen + steps[block], q.device)[:, None]
                    mask = key <= query
                    if not alone:
                        mask &= (key > query - ring) | ((key < cache.sinks) if near else kept[sight])
                    if cache.window:
                        mask &= key > query - cache.window
                    (k, v), block = kv[:, :, :, sight], send(block, q.device)
                    y[block] = F.scaled_dot_product_attention(q[block].transpose(0, 1)[None], k, v, attn_mask=mask)[0].transpose(0, 1)
        return y


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

    def forward(self, x, chunk: Chunk | None, cache: LayerCache):
        """x (B, T, C), the residual stream -> the same after this layer; only the chunk's tokens attend, T or fewer."""
        if chunk is not None:
            T, new = x.shape[1], chunk.position.shape[1]
            added = self.attn(self.attn_norm(x if new == T else x[:, :new]), chunk, cache)
            x = x + (added if new == T else F.pad(added, (0, 0, 0, T - new)))
        return x + self.mlp(self.mlp_norm(x))


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

    def compile_decode(self):
        """Have torch.compile make one graph of a block at decode, for all layers alike; the first steps then take a while."""
        torch._dynamo.config.recompile_limit = 64  # a graph each for layers that filter and that do not, one row and many
        self.decode_block = torch.compile(Block.forward, fullgraph=True)

    @torch.inference_mode()
    def new_cache(self, B, filter: FilterConfig | None = None, criterion=token_filter) -> KVCache:
        """An empty cache for B sequences; what is fed with it is filtered, if `filter` is given.

        `criterion` decides which tokens are redundant: token_filter, or a rival with the same signature.
        """
        return KVCache(self.config, B, filter, criterion, self.embed.weight.dtype, self.embed.weight.device)

    @torch.inference_mode()
    def forward(self, tokens, cache: KVCache, n_new=None, last=False):
        """Feed tokens (B, T) int64, of which row b's first n_new[b] are real (default: all), and move the cache on.

        Returns logits (B, T, vocab), meaningless at padding; with last=True those after each row's last real token
        only, (B, vocab). Prefill and decode are this same call. Raises ValueError beyond the model's context.
        """
        B, T = tokens.shape
        n_new = torch.full((B,), T) if n_new is None else torch.as_tensor(n_new, dtype=torch.int64, device="cpu")
        longest = int((cache.seen + n_new).max())
        if longest > self.config.max_positions:
            raise ValueError(f"{longest} tokens are more than the model's context of {self.config.max_positions}")
        x = self.embed(tokens.to(self.embed.weight.device))  # (B, T, C)
        chunk, warm = cache.advance(n_new, T, x.dtype)
        for block, layer in zip(self.blocks, cache.layers):
            part = warm if layer.closed else chunk
            x = self.decode_block(block, x, part, layer) if part is chunk and chunk.n is None else block(x, part, layer)
        if last:
            x = x[chunk.row, send((n_new - 1).clamp(min=0), x.device)] if T > 1 else x[:, 0]
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
