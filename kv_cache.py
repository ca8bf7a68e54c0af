"""The ragged KV cache that turns filtering into a saving: each layer and sequence keeps as many tokens as it needs.

Shapes: B sequences, T new tokens, S cache slots, L layers, KVH key/value heads, D head size, R channels of a head that RoPE
turns, C width, N tokens gathered out of a (B, T) chunk. A token's *position* counts from the start of its own sequence; its
*slot* is where a layer's cache keeps it. Filtering makes the two differ: visibility goes by position.

The masks that decide shapes (which tokens are real, kept, attending) live on the host as (B, T) bool tensors, so that a
filtered layer waits for the device once, when token_filter's decisions come back, and an unfiltered one never.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from schedule import Adaptive, layer_ratios
from token_filter import FilterConfig, FilterState, running_average

BLOCK = 32  # a cache grows by this many slots
FAR = 2**62  # a position no text reaches


def wide(dtype) -> torch.dtype:
    """What statistics and angles are computed in: float64 in a float64 model, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def send(x, device):
    """A tensor from the host to the device, without waiting for what the device is at."""
    return x.to(device, non_blocking=True)


class Tokens:
    """Some of the tokens of a (B, T) chunk: `mask` on the host, and what it takes to pick them out of B*T."""

    def __init__(self, mask, device):
        self.mask, self.counts = mask, mask.sum(1)  # (B, T), (B,)
        self.row, self.step = mask.nonzero(as_tuple=True)  # (N,) each, row by row
        self.all = len(self.row) == mask.numel()
        self.index = None if self.all else send(self.row * mask.shape[1] + self.step, device)

    @cached_property
    def nth(self):
        """(N,) how many of its row come before each."""
        return (self.mask.cumsum(1) - 1)[self.row, self.step]

    def __len__(self):
        return len(self.row)

    def pick(self, x):
        """x (B*T, ...) -> (N, ...)"""
        return x if self.all else x[self.index]

    def put(self, y):
        """y (N, ...) -> (B*T, ...), 0 elsewhere"""
        if self.all:
            return y
        x = y.new_zeros(self.mask.numel(), *y.shape[1:])
        x[self.index] = y
        return x


@dataclass
class Chunk:
    """Where the new tokens of a call stand in their sequences. Padding is on the right."""

    n_new: torch.Tensor  # (B,) how many of the T tokens are real
    position: torch.Tensor  # (B, T) host
    at: torch.Tensor  # (B, T) the same on the device
    real: Tokens
    cos: torch.Tensor  # (B*T, 1, R)
    sin: torch.Tensor


class LayerCache:
    """What one layer remembers of B sequences: K, V and who may see them, the filter's state, the anchor output.

    The first `ring` slots hold redundant tokens in their grace period, at position mod ring. Each row's kept tokens
    follow in order, length[b] of them. A token at position j can be seen by those at j .. j + reach - 1, where reach is
    the sliding window if it is kept and grace + 1 if not; `until` is the last of them.
    """

    def __init__(self, config, B, layer, ratio, filter: FilterConfig, criterion, adaptive, dtype, device):
        self.layer, self.filter, self.ratio, self.criterion = layer, filter, ratio, criterion
        # ratio 1: past the warm-up no token queries or is stored, so none is projected or scored either
        self.closed = ratio == 1 and filter.mode == "attention"
        self.filters = ratio > 0 and not self.closed
        self.window = config.window or FAR
        self.grace_reach = min(filter.grace + 1, self.window)
        self.ring = 0
        if self.filters:
            self.ring = filter.grace + (filter.mode == "cache")  # there a redundant token must find itself
        self.k = torch.zeros(B, config.kv_heads, 0, config.head_dim, dtype=dtype, device=device)  # (B, KVH, S, D)
        self.v = torch.zeros_like(self.k)
        self.until = torch.zeros(B, 0, dtype=torch.int64, device=device)  # (B, S), -1 where the slot is empty
        self.length = torch.zeros(B, dtype=torch.int64)  # kept slots in use; host
        self.kept = torch.zeros(B, dtype=torch.int64)  # tokens ever kept: length and what the window has dropped; host
        self.state = self.anchor_output = self.adaptive = None
        if self.filters:
            self.state = FilterState.new(B, config.kv_heads, config.head_dim, filter, layer, wide(dtype), device)
            self.adaptive = adaptive
        if self.adaptive is not None or (filter.fill == "anchor" and ratio > 0):
            self.anchor_output = torch.zeros(B, config.width, dtype=wide(dtype), device=device)
        self.grow(self.ring)
        self.redundant = torch.zeros(B, 0, dtype=torch.bool)  # for whoever wants to look: the latest decisions, (B, T) on the
        self.score: torch.Tensor | None = None  # host, and scores, (B, T)

    def grow(self, slots):
        missing = math.ceil((slots - self.k.shape[2]) / BLOCK) * BLOCK
        if missing > 0:
            B, heads, _, D = self.k.shape
            self.k = torch.cat((self.k, self.k.new_zeros(B, heads, missing, D)), dim=2)
            self.v = torch.cat((self.v, self.v.new_zeros(B, heads, missing, D)), dim=2)
            self.until = torch.cat((self.until, self.until.new_full((B, missing), -1)), dim=1)

    def expire(self, seen):
        """Drop the kept tokens that the window hides from position seen[b] on, and close the gap they leave."""
        k, v, until = self.k[:, :, self.ring :], self.v[:, :, self.ring :], self.until[:, self.ring :]  # views
        gone = ((until >= 0) & (until < send(seen, until.device)[:, None])).sum(1)  # (B,), the oldest come first
        source = gone[:, None] + torch.arange(until.shape[1], device=until.device)
        beyond = source >= until.shape[1]
        source = source.masked_fill(beyond, 0)
        for kv in (k, v):
            kv.copy_(kv.gather(2, source[:, None, :, None].expand_as(kv)))
        until.copy_(until.gather(1, source).masked_fill(beyond, -1))
        self.length = self.length - gone.cpu()

    def store(self, k, v, chunk: Chunk, keep: Tokens):
        """Put a chunk's k, v (B*T, KVH, D) in place: kept tokens in the next slots, redundant ones in the ring."""
        longest = int((self.length + keep.counts).max())
        if self.window < FAR and self.ring + longest > self.k.shape[2]:
            self.expire(chunk.position[:, 0])
            longest = int((self.length + keep.counts).max())
        self.grow(self.ring + longest)
        self.write(k, v, chunk, keep, self.ring + self.length[keep.row] + keep.nth, self.window)
        if self.ring and len(keep) < len(chunk.real):
            oldest = chunk.position[:, :1] + chunk.real.counts[:, None] - self.ring  # the ring has room from here on
            graced = Tokens(chunk.real.mask & ~keep.mask & (chunk.position >= oldest), k.device)
            self.write(k, v, chunk, graced, chunk.position[graced.row, graced.step] % self.ring, self.grace_reach)
        self.length, self.kept = self.length + keep.counts, self.kept + keep.counts

    def write(self, k, v, chunk: Chunk, tokens: Tokens, slot, reach):
        row, slot = send(torch.stack((tokens.row, slot)), k.device)
        self.k[row, :, slot], self.v[row, :, slot] = tokens.pick(k), tokens.pick(v)
        self.until[row, slot] = tokens.pick(chunk.at.flatten()) + (reach - 1)

    def slots(self, b=slice(None)):
        """The slots of row b (or of all rows, up to the longest): views of k, v and until."""
        S = self.ring + int(self.length[b].max())
        return self.k[b, :, :S], self.v[b, :, :S], self.until[b, :S]

    def anchor_outputs(self, y, chunk: Chunk, keep: Tokens):
        """For fill="anchor": what each token of the chunk adds if it is skipped, (B, T, C).

        The running average of the attention outputs of the tokens kept before it in the sequence, started at the first
        one's own. y (N, C): the outputs of this chunk's kept tokens.
        """
        past = self.anchor_output
        assert past is not None
        y, rows = y.to(past.dtype), torch.arange(len(keep.counts), device=y.device)
        before = keep.mask.cumsum(1) - keep.mask.long()  # how many of this chunk were kept before each
        packed = y.new_zeros(len(rows), max(1, int(keep.counts.max())), y.shape[1])  # (B, most kept in a row, C)
        packed[send(keep.row, y.device), send(keep.nth, y.device)] = y
        first = send(chunk.position[:, :1] == 0, y.device)  # a sequence's first token is always kept
        start = torch.where(first, packed[:, 0], past)
        averages = running_average(packed, start, self.filter.gamma)
        self.anchor_output = averages[rows, send(keep.counts, y.device)]
        return averages[rows[:, None], send(before, y.device)]

    def select(self, rows):
        self.length, self.kept = self.length[rows], self.kept[rows]
        rows = rows.to(self.k.device)
        S = math.ceil((self.ring + max(self.length.tolist(), default=0)) / BLOCK) * BLOCK
        self.k, self.v, self.until = self.k[rows, :, :S], self.v[rows, :, :S], self.until[rows, :S]
        if self.state is not None:
            self.state.select(rows)
        if self.anchor_output is not None:
            self.anchor_output = self.anchor_output[rows]
        self.redundant, self.score = self.redundant[:0], None

    def fixed_bytes(self) -> int:
        """Of the filter's state and the anchor output."""
        output = self.anchor_output
        return (0 if self.state is None else self.state.nbytes()) + (0 if output is None else output.numel() * output.element_size())

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.until)) + self.fixed_bytes()

    def live_bytes(self, seen) -> int:
        slot = 2 * self.k.shape[1] * self.k.shape[3] * self.k.element_size() + self.until.element_size()
        graced = int((self.until[:, : self.ring] >= seen.to(self.until.device)[:, None]).sum())  # by the next token
        return (int(self.length.sum()) + graced) * slot + self.fixed_bytes()


class KVCache:
    """All a model remembers of B sequences. Transformer.new_cache makes one, Transformer.forward moves it on."""

    def __init__(self, config, B, filter: FilterConfig | None, criterion, dtype, device):
        filter = filter or FilterConfig(prune=0.0)
        self.seen = torch.zeros(B, dtype=torch.int64)  # tokens so far, so the position of the next; host
        self.adaptive = None
        if filter.schedule == "adaptive" and filter.prune > 0:
            self.adaptive = Adaptive(filter, B, config.n_layers, wide(dtype), device)
        self.layers = [
            LayerCache(config, B, layer, ratio, filter, criterion, self.adaptive, dtype, device)
            for layer, ratio in enumerate(layer_ratios(filter, config.n_layers))
        ]
        self.share_ratios()

    def share_ratios(self):
        if self.adaptive is not None:
            for layer, ratio in zip(self.layers, self.adaptive.ratio.unbind(1)):
                layer.ratio = ratio  # (B,), a view

    def cuts(self, n_new):
        """Where the ratios of some row change within its next n_new[b] tokens: the steps, 1 or more, that a chunk is cut before."""
        if self.adaptive is None:
            return []
        step = torch.arange(1, max(1, int(n_new.max())))
        return (1 + (self.adaptive.changes(self.seen[:, None] + step) & (step < n_new[:, None])).any(0).nonzero()[:, 0]).tolist()

    def select(self, rows):
        """Keep these rows (a list or int64 tensor), in this order; a row named twice is copied: a forked prefix."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        self.seen = self.seen[rows]
        for layer in self.layers:
            layer.select(rows)
        if self.adaptive is not None:
            self.adaptive.select(rows.to(self.adaptive.ratio.device))
            self.share_ratios()

    def kept(self):
        """Of each row's seen * L (token, layer) pairs, how many were not redundant: (B,) int64."""
        return torch.stack([layer.kept for layer in self.layers]).sum(0)

    def nbytes(self) -> int:
        """Bytes allocated: slots, ring included, and all that the filter remembers."""
        return sum(layer.nbytes() for layer in self.layers) + (0 if self.adaptive is None else self.adaptive.nbytes())

    def live_bytes(self) -> int:
        """Bytes in use: the same, but only the slots that hold a visible token."""
        return self.nbytes() - sum(layer.nbytes() - layer.live_bytes(self.seen) for layer in self.layers)
