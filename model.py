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

FAR = 2**62  # beyond any position
BLOCK = 32  # slots, at least, by which a layer's cache grows
QUERIES = 256  # of each row, that prefill attends with at a time
# of torch's kernels not cuDNN's, which takes a second to plan for every new shape, and every chunk of every layer has one
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def front_slot(position, sinks, ring):
    """The slot that a token has, or had, among sinks and ring."""
    return torch.where(position < sinks, position, sinks + (position - sinks) % max(ring, 1))


@dataclass
class Group:
    """Tokens of a chunk that attend together: those of each row moved to its front make (B, T') queries, little of it padding."""

    step: torch.Tensor  # (N',) which of the chunk's (B, T) tokens they are,
    token: torch.Tensor  # (N',) which of its N real ones,
    seat: torch.Tensor  # (N',) and which of the queries
    longest: int  # T'
    ends: list[int]  # up to which of the T new tokens each QUERIES of them can see


def grouped(attends, token, *numbers):
    """attends (G, B, T) bool, token as in Chunk -> G Groups; and the numbers, 0-dim tensors, as ints. Waits once for the device."""
    T, row = attends.shape[2], torch.arange(attends.shape[1], device=attends.device)[:, None]
    nth, end = attends.cumsum(2), attends * torch.arange(1, T + 1, device=attends.device)  # nth: 1 for a row's first
    ends = [(end * (nth <= last)).amax((1, 2)) for last in range(QUERIES, T + QUERIES, QUERIES)]
    table = torch.stack((attends.sum((1, 2)), nth[:, :, -1].amax(1), *ends), dim=1)
    known, groups = torch.cat((table.flatten(), *(number.view(1) for number in numbers))).cpu(), []  # the wait
    for some, count, (N, longest, *ends) in zip(attends, nth, known[: table.numel()].view(table.shape).tolist()):
        step = some.flatten().byte().argsort(descending=True, stable=True)[:N]
        groups.append(Group(step, token.flatten()[step], (row * longest + count - 1).flatten()[step], longest, ends))
    return groups, known[table.numel() :].tolist()


@dataclass
class Step:
    """Where the new tokens stand in their sequences: at decode, where every row has one, (B, 1)."""

    position: torch.Tensor  # (B, T)
    cos: torch.Tensor  # (N, 1, 1, R)
    sin: torch.Tensor
    start: torch.Tensor  # (B,) the first one's position,
    slot: torch.Tensor  # (B,) its slot in the layers that filter,
    front: torch.Tensor  # (B,) how many slots of sinks and ring are filled with it,
    row: torch.Tensor  # (B,) and its row, 0 .. B-1

    def by_row(self, x):
        """(N, 1, KVH, D) -> (B, T, KVH, D), at padding anything."""
        return x


@dataclass
class Chunk(Step):
    """In prefill, where a row has up to T of them, and then padding."""

    n: torch.Tensor  # (B,) how many it has
    token: torch.Tensor  # (B, T) which of the N it is; at padding any
    everyone: Group
    end: int  # the most tokens that a row has with these,
    rest: int  # and how many more are known to follow

    def by_row(self, x):
        return x[self.token].squeeze(2)


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
        self.kv = torch.zeros(2, B, config.kv_heads, BLOCK + 1, config.head_dim, dtype=dtype, device=device)  # (2, B, KVH, S, D)
        self.at = torch.full((B, BLOCK + 1), -1, device=device)  # the positions of the tokens in the slots, -1 where there is none
        self.kept = torch.zeros(B, self.front, dtype=torch.bool, device=device)  # who of the sinks and the ring
        self.far = torch.zeros(B, dtype=torch.int64, device=device)  # how many are far ones, or under a window have been
        self.skipped, self.read = torch.zeros_like(self.far), torch.zeros_like(self.far)  # redundant tokens; slots that queries have read
        self.used = 0  # slots filled in the longest row, when the host last looked
        self.state = self.ratio = self.redundant = self.score = None  # the last two for whoever wants to look: (B, T), the latest
        if self.filters:
            exact = torch.promote_types(dtype, torch.float32)
            self.state = FilterState(B, config.kv_heads, config.head_dim, filter, layer, exact, device)
            self.ratio = torch.full((), ratio, dtype=torch.float64, device=device)  # a number would be compiled in, layer by layer

    def slots_for(self, used, rest):
        """How many slots to have when `used` are filled, and `rest` more tokens are known to come."""
        more = math.ceil((1 - self.share) * rest) + (BLOCK // 2 if self.share else 0) if rest else max(used // 8, BLOCK)
        return min(used + more, self.most) + 1  # the last: for what goes nowhere

    def free(self):
        """How many more tokens there are slots for, whatever is kept."""
        return self.at.shape[1] - 1 - self.used if self.at.shape[1] <= self.most else FAR

    def resize(self, slots):
        n = slots - self.at.shape[1]  # a negative number cuts
        self.kv, self.at = F.pad(self.kv, (0, 0, 0, n)), F.pad(self.at, (0, n), value=-1)

    def put(self, k, v, redundant, step: Step):
        """Decode: one token a row, k, v (B, 1, KVH, D), redundant (B,) or None, into its slot. Returns how many slots it may see,
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
        self.kv[:, row, :, slot] = torch.stack((k, v), dim=2)[:, 0]
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
        front, far = min(self.front, self.used), max(self.used - self.front, 0)

        def joined(old, new, dim):
            near, beyond = old.narrow(dim, 0, self.used).split((front, far), dim)
            return torch.cat((beyond, near, new), dim)

        end = (chunk.start + chunk.n)[:, None]
        at = joined(self.at, chunk.position.masked_fill(chunk.position >= end, -1), 1)
        kept = torch.cat((self.kept[:, :front], torch.ones_like(chunk.position > 0) if redundant is None else ~redundant), dim=1)
        kept, near = F.pad(kept, (far, 0), value=True), (at < self.sinks) | (at >= end - self.ring)
        stays = (at >= 0) & (near | (kept & (at >= end - self.window)))
        place = torch.where(near, front_slot(at, self.sinks, self.ring), self.front + at)
        return joined(self.kv, kv, 3), at, kept, place.masked_fill(~stays, FAR)

    def visible(self, query, at, kept, near):
        """Prefill: (B, T', K), which tokens at (B, K) those at query (B, T') may look at; near: no far one."""
        query, at, kept = query[..., None], at[:, None], kept[:, None]
        sight = (at > query - self.ring) | (at < self.sinks)
        return (at >= 0) & (at <= query) & (at > query - self.window) & (sight if near else sight | kept)

    def store(self, kv, at, kept, place, used, rest):
        """Prefill: lay out anew what in_reach() gave, of which at most `used` of a row stay, with slots for some of `rest` to come."""
        slots, stays = self.slots_for(used, rest), (place < FAR).sum(1, keepdim=True)
        order = F.pad(place.argsort(1)[:, :used], (0, slots - used))  # no slot between filled ones is empty
        self.kv = kv.gather(3, order[:, None, :, None].expand(2, -1, kv.shape[2], -1, kv.shape[4]))
        self.at = at.gather(1, order).masked_fill(torch.arange(slots, device=at.device) >= stays, -1)
        self.kept = F.pad(kept.gather(1, order) & (self.at >= 0), (0, self.front - slots))
        self.far, self.used = (stays[:, 0] - self.front).clamp(min=0), used

    def select(self, rows):
        """Keep these rows, an int64 tensor, in this order."""
        for name in ("at", "kept", "far", "skipped", "read"):
            setattr(self, name, getattr(self, name)[rows])
        self.kv, self.redundant, self.score = self.kv[:, rows], None, None
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

    def place(self, position, packed, dtype) -> Step:
        """Of tokens at position (B, T), of which the real ones are packed (N,)."""
        ring, front = self.filter.recent + 1, self.position + 1
        slot, row = front_slot(self.position, self.sinks, ring), torch.arange(len(position), device=position.device)
        cos, sin = rope_table(packed[:, None], self.frequencies, dtype)
        return Step(position, cos, sin, self.position, slot, front.clamp(max=self.sinks + ring), row)

    def advance(self, n_new, T, dtype) -> Chunk:
        """Prefill: n_new[b] more tokens of each row (host), in T columns."""
        self.look()
        self.replaced()
        device, real = self.position.device, torch.arange(T) < n_new[:, None]
        token = (real.flatten().cumsum(0) - 1).clamp(min=0).view(real.shape)
        (everyone,), _ = grouped(real[None], token)  # on the host, so this waits for nothing
        everyone.step, everyone.token, everyone.seat = (x.to(device) for x in (everyone.step, everyone.token, everyone.seat))
        position, n = self.position[:, None] + torch.arange(T, device=device), n_new.to(device)
        place = self.place(position, position.flatten()[everyone.step], dtype)
        self.idle, self.room = int(self.seen.min()) >= self.sinks, 0
        self.seen, self.position = self.seen + n_new, self.position + n
        end = int(self.seen.max())
        return Chunk(**vars(place), n=n, token=token.to(device), everyone=everyone, end=end, rest=max(self.length - end, 0))

    def replaced(self):
        """A recorded step would not see the new tensors."""
        self.steps, self.replay = 0, None

    def look(self):
        """Have the host know how many slots are filled: the one wait of decode."""
        seen = max(self.seen.tolist(), default=0)
        far = torch.stack([F.pad(layer.far, (0, 1)).max() for layer in self.layers]).cpu().tolist()
        for layer, n in zip(self.layers, far):
            layer.used = min(seen, layer.front) + min(n, self.window)

    def make_room(self):
        """Let every layer have slots for some steps of decode to come, and hardly more than it needs."""
        self.look()
        rest, short = max(self.length - max(self.seen.tolist(), default=0), 0), min(layer.free() for layer in self.layers) < 1
        for layer in self.layers:
            slots, wanted = layer.at.shape[1], layer.slots_for(layer.used, rest)
            if slots > 1.1 * wanted or (short and layer.free() < BLOCK):
                layer.resize(wanted)
                self.replaced()
        self.room = min(layer.free() for layer in self.layers)

    @torch.inference_mode()
    def select(self, rows):
        """Keep these rows (a list or int64 tensor), in this order; a row named twice is copied: a forked prefix."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        on_device = rows.to(self.position.device)
        self.seen, self.position = self.seen[rows.cpu()], self.position[on_device]
        for layer in self.layers:
            layer.select(on_device)
        self.replaced()
        self.make_room()

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

    def forward(self, x, chunk: Step, cache: LayerCache):
        """x (N, C), the residual stream after its norm -> what attention adds to it, (N, C)."""
        # keys and values
        raw_k = self.k_norm(self.k(x).unflatten(-1, (1, self.kv_heads, self.head_dim)))  # (N, 1, KVH, D)
        k, v = rotate(raw_k, chunk.cos, chunk.sin), self.v(x).unflatten(-1, (1, self.kv_heads, self.head_dim))
        k, v = chunk.by_row(k), chunk.by_row(v)  # (B, T, KVH, D)

        # filter
        redundant = chunk.position >= cache.most if cache.closed else None  # (B, T)
        if cache.filters:
            compared = k if cache.filter.keys == "rotated" else chunk.by_row(raw_k)
            n = chunk.n if isinstance(chunk, Chunk) else None
            redundant, score = cache.criterion(compared, v, n, cache.state, cache.ratio, cache.filter)  # (B, T) both
            cache.redundant, cache.score = redundant, score

        # store, attend, and add
        if isinstance(chunk, Chunk):
            return self.prefill(x, k, v, redundant, chunk, cache)
        n, mask = cache.put(k, v, None if redundant is None else redundant[:, 0], chunk)
        added = self.o(attend(self.queries(x, chunk.cos, chunk.sin), cache.kv[0], cache.kv[1], n, mask).flatten(1))
        return added if redundant is None or cache.filter.mode != "skip" else added.masked_fill(redundant, 0)

    def queries(self, x, cos, sin):
        """(N, H, 1, D)"""
        return rotate(self.q_norm(self.q(x).unflatten(-1, (self.heads, 1, self.head_dim))), cos, sin)

    def prefill(self, x, k, v, redundant, chunk: Chunk, cache: LayerCache):
        """The same for any number of tokens a row: those that skip are left out of the products with q and o too."""
        kv, at, kept, place = cache.in_reach(torch.stack((k, v)).transpose(2, 3), redundant, chunk)
        groups, used, added = [chunk.everyone], min(chunk.end, cache.window), torch.zeros_like(x)
        if redundant is not None:
            real = chunk.position < (chunk.start + chunk.n)[:, None]
            attends = {"skip": [real & ~redundant], "local": [real & ~redundant, redundant], "cache": [real]}[cache.filter.mode]
            groups, (used,) = grouped(torch.stack(attends), chunk.token, (place < FAR).sum(1).max())
            cache.skipped += redundant.sum(1)
        for group, near in zip(groups, (False, True)):  # near: redundant ones in mode "local", which read no far key
            if group.longest:
                q = self.queries(x[group.token], chunk.cos[group.token], chunk.sin[group.token])
                added[group.token] = self.o(self.attend_group(q, group, near, kv, at, kept, chunk, cache))
        cache.store(kv, at, kept, place, used, chunk.rest)
        return added

    def attend_group(self, q, group: Group, near, kv, at, kept, chunk: Chunk, cache: LayerCache):
        """The queries q (N', H, 1, D) of a group over what is in reach, QUERIES of each row at a time -> (N', H * D)."""
        (B, T), longest, far = chunk.position.shape, group.longest, max(cache.used - cache.front, 0) if near else 0
        position, queries = at.new_full((B * longest,), -1), q.new_zeros(B * longest, *q.shape[1:])
        position[group.seat], queries[group.seat] = chunk.position.flatten()[group.step], q
        position, queries = position.view(B, longest), queries.view(B, longest, self.kv_heads, -1, self.head_dim)
        queries, (keys, values), y = queries.permute(0, 2, 3, 1, 4), kv, []  # (B, KVH, H/KVH, T', D)
        for start, end in zip(range(0, longest, QUERIES), group.ends):
            some, sight = slice(start, start + QUERIES), slice(far, at.shape[1] - T + end)
            mask = cache.visible(position[:, some], at[:, sight], kept[:, sight], near)
            cache.read += mask.sum((1, 2))
            mask = mask.repeat(1, queries.shape[2], 1)[:, None]  # query heads that share a key/value head are queries of one head
            q = queries[:, :, :, some].flatten(2, 3)
            part = F.scaled_dot_product_attention(q, keys[:, :, sight], values[:, :, sight], attn_mask=mask)
            y.append(part.unflatten(2, (queries.shape[2], -1)))
        return torch.cat(y, dim=3).permute(0, 3, 1, 2, 4).reshape(B * longest, -1)[group.seat]


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

    def forward(self, x, chunk: Step, cache: LayerCache, idle=False):
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
        x = self.embed(tokens.flatten()[chunk.everyone.step])  # (N, C)
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
            cache.idle = idle
            cache.replaced()
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
        here = cache.place(cache.position[:, None], cache.position, x.dtype)
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
