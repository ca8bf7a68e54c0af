"""A LLaMA/Mistral decoder whose layers may filter tokens, and the ragged KV cache that turns filtering into a saving.

Shapes: B sequences, T new tokens, S cache slots, L layers, H query heads, KVH key/value heads (H is a multiple of KVH),
D head size, C width, N tokens gathered out of a (B, T) chunk. A token's *position* counts from the start of its own
sequence; its *slot* is where a layer's cache keeps it. Filtering makes the two differ: visibility goes by position.

The masks that decide shapes (which tokens are real, kept, attending) live on the host as (B, T) bool tensors, so that a
filtered layer waits for the device once, when token_filter's decisions come back, and an unfiltered one never.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from token_filter import FilterConfig, FilterState, adaptive_ratios, layer_ratios, running_average, token_filter

BLOCK = 32  # a cache grows by this many slots
FAR = 2**62  # a position no text reaches


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
    rope_scaling: dict | None = None  # Llama 3.1's four numbers, see rope_frequencies
    rotary_dim: int | None = None  # R: RoPE turns the first R channels of each head (Phi); None: all D
    qkv_bias: bool = False  # biases of the projections: query, key and value (Qwen2),
    o_bias: bool = False  # output,
    mlp_bias: bool = False  # all three of the MLP
    qk_norm: bool = False  # RMSNorm over each query and key head before RoPE (Qwen3)


# ------------------------------------------------------------------------------------------------ rotary positions


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians per position of each channel pair, theta^(-2i/R), (R/2,) float32; with rope_scaling, as in Llama 3.1:
    pairs that turn seldom within the original context are slowed by `factor`, fast ones are not, between is a blend.
    """
    R = config.rotary_dim or config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, R, 2, dtype=torch.float32) / R)
    if config.rope_scaling:
        scaling = config.rope_scaling
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        freq = fast * freq + (1 - fast) * freq / scaling["factor"]
    return freq


def rotate(x, cos, sin):
    """RoPE in Hugging Face's layout, channel i paired with i + R/2: x (..., heads, D), cos and sin (..., 1, R).

    The pair (a, b) becomes (a cos - b sin, b cos + a sin): each channel takes its partner's times a sin whose sign, minus
    in the first half, is in the table already. Channels from R on stay as they are.
    """
    R = cos.shape[-1]
    if R < x.shape[-1]:
        return torch.cat((rotate(x[..., :R], cos, sin), x[..., R:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(R // 2, dims=-1), sin)


# ------------------------------------------------------------------------------------------------------- the cache


class Tokens:
    """Some of the tokens of a (B, T) chunk: `mask` on the host, and what it takes to pick them out of B*T."""

    def __init__(self, mask, device):
        self.mask, self.counts = mask, mask.sum(1)  # (B, T), (B,)
        self.row, self.step = mask.nonzero(as_tuple=True)  # (N,) each, row by row
        self.all = len(self.row) == mask.numel()
        self.index = None if self.all else (self.row * mask.shape[1] + self.step).to(device)

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
    warm: Tokens  # those in the warm-up
    cos: torch.Tensor  # (B*T, 1, R)
    sin: torch.Tensor


class LayerCache:
    """What one layer remembers of B sequences: K, V and who may see them, the filter's state, the anchor output.

    The first `ring` slots hold redundant tokens in their grace period, at position mod ring. Each row's kept tokens
    follow in order, length[b] of them. A token at position j can be seen by those at j .. j + reach - 1, where reach is
    the sliding window if it is kept and grace + 1 if not; `until` is the last of them.
    """

    def __init__(self, config: ModelConfig, B, layer, ratio, filter: FilterConfig | None, criterion, dtype, device):
        stats = torch.float64 if dtype == torch.float64 else torch.float32
        self.filter, self.ratio, self.criterion = filter, ratio, criterion
        # ratio 1: past the warm-up no token queries or is stored, so none is projected or scored either
        self.closed = filter is not None and ratio == 1 and filter.mode == "attention"
        self.filters = filter is not None and ratio > 0 and not self.closed
        self.window = config.window or FAR
        self.grace_reach = min(filter.grace + 1, self.window) if filter is not None else 1
        self.ring = 0
        if self.filters:
            self.ring = filter.grace + (filter.mode == "cache")  # there a redundant token must find itself
        self.k = torch.zeros(B, config.kv_heads, 0, config.head_dim, dtype=dtype, device=device)  # (B, KVH, S, D)
        self.v = torch.zeros_like(self.k)
        self.until = torch.zeros(B, 0, dtype=torch.int64, device=device)  # (B, S), -1 where the slot is empty
        self.length = torch.zeros(B, dtype=torch.int64)  # kept slots in use; host
        self.kept = torch.zeros(B, dtype=torch.int64)  # tokens ever kept: length and what the window has dropped; host
        self.state = self.anchor_output = self.departure = None
        if self.filters:
            self.state = FilterState.new(B, config.kv_heads, config.head_dim, filter, layer, stats, device)
        adaptive = self.filters and filter.schedule == "adaptive"
        if adaptive or (self.filters or self.closed) and filter.fill == "anchor":
            self.anchor_output = torch.zeros(B, config.width, dtype=stats, device=device)
        if adaptive:
            self.ratio = torch.full((B,), ratio, dtype=torch.float64, device=device)
            self.departure = torch.zeros(B, 2, dtype=stats, device=device)  # see measure()
        self.grow(self.ring)
        self.redundant = self.score = None  # the latest decisions, (B, T), for whoever wants to look

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
        gone = ((until >= 0) & (until < seen.to(until.device)[:, None])).sum(1)  # (B,), the oldest come first
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
        row, slot = torch.stack((tokens.row, slot)).to(k.device)
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
        y, rows = y.to(self.anchor_output.dtype), torch.arange(len(keep.counts), device=y.device)
        before = keep.mask.cumsum(1) - keep.mask.long()  # how many of this chunk were kept before each
        packed = y.new_zeros(len(rows), max(1, int(keep.counts.max())), y.shape[1])  # (B, most kept in a row, C)
        packed[keep.row.to(y.device), keep.nth.to(y.device)] = y
        first = (chunk.position[:, :1] == 0).to(y.device)  # a sequence's first token is always kept
        start = torch.where(first, packed[:, 0], self.anchor_output)
        averages = running_average(packed, start, self.filter.gamma)
        self.anchor_output = averages[rows, keep.counts.to(y.device)]
        return averages[rows[:, None], before.to(y.device)]

    def measure(self, output, anchor_output, residual, chunk: Chunk, keep: Tokens):
        """For schedule="adaptive": what attention adds beyond the anchor output, relative to the residual stream, summed
        over each sequence's kept tokens from position 4 on; and how many tokens they stand for. All three (B*T, C).

        Where only a share 1 - r_l is kept, a kept token stands for 1 / (1 - r_l). Otherwise a layer that happened to look
        idle at first would be skipped from then on and, with few tokens left to show better, go on looking idle.
        """
        counted = (keep.mask & (chunk.position >= 4)).to(output.device)
        weight = (1 / (1 - self.ratio.to(self.departure.dtype)))[:, None].where(chunk.at >= max(self.filter.warmup, 1), 1)
        weight = weight.masked_fill(~counted, 0)  # (B, T)
        size = residual.to(self.departure.dtype).norm(dim=-1).clamp(min=1e-30)
        share = ((output - anchor_output).norm(dim=-1) / size).view(weight.shape).masked_fill(~counted, 0)
        self.departure = self.departure + torch.stack(((weight * share).sum(1), weight.sum(1)), dim=1)

    def select(self, rows):
        self.length, self.kept = self.length[rows], self.kept[rows]
        rows = rows.to(self.k.device)
        S = math.ceil((self.ring + max(self.length.tolist(), default=0)) / BLOCK) * BLOCK
        self.k, self.v, self.until = self.k[rows, :, :S], self.v[rows, :, :S], self.until[rows, :S]
        if self.state is not None:
            self.state.select(rows)
        if self.anchor_output is not None:
            self.anchor_output = self.anchor_output[rows]
        if self.departure is not None:
            self.ratio, self.departure = self.ratio[rows], self.departure[rows]
        self.redundant = self.score = None

    def fixed_bytes(self) -> int:
        tensors = [t for t in (self.anchor_output, self.departure, self.ratio) if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors) + (0 if self.state is None else self.state.nbytes())

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.until)) + self.fixed_bytes()

    def live_bytes(self, seen) -> int:
        slot = 2 * self.k.shape[1] * self.k.shape[3] * self.k.element_size() + self.until.element_size()
        graced = int((self.until[:, : self.ring] >= seen.to(self.until.device)[:, None]).sum())  # by the next token
        return (int(self.length.sum()) + graced) * slot + self.fixed_bytes()


class KVCache:
    """All a model remembers of B sequences. Transformer.new_cache makes one, Transformer.forward moves it on."""

    def __init__(self, config: ModelConfig, B, filter: FilterConfig | None, criterion, dtype, device):
        ratios = layer_ratios(filter, config.n_layers) if filter is not None else [0.0] * config.n_layers
        self.layers = [LayerCache(config, B, i, r, filter, criterion, dtype, device) for i, r in enumerate(ratios)]
        self.seen = torch.zeros(B, dtype=torch.int64)  # tokens so far, so the position of the next; host
        self.warmup = max(filter.warmup, 1) if filter is not None else 0
        self.filter, self.adaptive = filter, any(layer.departure is not None for layer in self.layers)

    def pieces(self, n_new):
        """Cut a chunk where its rows' ratios change: [(tokens of each row before the piece, tokens in it), ...], (B,)s.

        With schedule="adaptive" that is at positions warmup, 2 warmup, 4 warmup, ...; otherwise there is one piece.
        """
        done, pieces = torch.zeros_like(n_new), []
        while not pieces or (done < n_new).any():
            count = n_new - done
            if self.adaptive:
                count = torch.minimum(count, self.next_change(self.seen + done) - self.seen - done)
            pieces.append((done, count))
            done = done + count
        return pieces

    def next_change(self, position):
        """The first of warmup, 2 warmup, 4 warmup, ... beyond position (B,), host."""
        due = torch.full_like(position, self.warmup)
        while (due <= position).any():
            due = torch.where(due <= position, 2 * due, due)
        return due

    def update_ratios(self):
        """Where a row has come to a change, set its layers' ratios by what their attention has contributed so far."""
        if not self.adaptive:
            return
        due = (self.seen >= self.warmup) & (self.next_change(self.seen - 1) == self.seen)
        if due.any():
            total, number = torch.stack([layer.departure for layer in self.layers], dim=1).unbind(2)  # (B, L) each
            ratios = adaptive_ratios(total / number.clamp(min=1), self.filter.prune)
            due = due.to(ratios.device)
            for layer, ratio in zip(self.layers, ratios.unbind(1)):
                layer.ratio = torch.where(due, ratio, layer.ratio)

    def select(self, rows):
        """Keep these rows (a list or int64 tensor), in this order; a row named twice is copied: a forked prefix."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        self.seen = self.seen[rows]
        for layer in self.layers:
            layer.select(rows)

    def kept(self):
        """Of each row's seen * L (token, layer) pairs, how many were not redundant: (B,) int64."""
        return torch.stack([layer.kept for layer in self.layers]).sum(0)

    def nbytes(self) -> int:
        """Bytes allocated: slots, ring included, filter state and anchor outputs."""
        return sum(layer.nbytes() for layer in self.layers)

    def live_bytes(self) -> int:
        """Bytes in use: the same, but only the slots that hold a visible token."""
        return sum(layer.live_bytes(self.seen) for layer in self.layers)


# ------------------------------------------------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """x W^T + b for x (..., in) -> (..., out); without b unless bias is asked for."""

    def __init__(self, n_in, n_out, bias=False):
        super().__init__(n_in, n_out, bias)

    def forward(self, x):
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # oneDNN instead of the default library, on some CPUs twice as fast
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


class Attention(nn.Module):
    """Grouped-query attention, for the tokens that remain."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q = Linear(config.width, config.heads * config.head_dim, config.qkv_bias)
        self.k = Linear(config.width, config.kv_heads * config.head_dim, config.qkv_bias)
        self.v = Linear(config.width, config.kv_heads * config.head_dim, config.qkv_bias)
        self.o = Linear(config.heads * config.head_dim, config.width, config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, residual, chunk: Chunk, cache: LayerCache):
        """x (B, T, C), the residual stream after its norm -> what attention adds to it, (B, T, C)."""
        (B, T, C), filter = x.shape, cache.filter
        x, out = x.flatten(0, 1), None  # (B*T, C)
        keep, redundant = chunk.real, None
        if cache.closed:
            keep, redundant = chunk.warm, chunk.real.mask & ~chunk.warm.mask

        if len(keep):
            # keys and values
            raw_k = keep.put(self.k(keep.pick(x))).unflatten(1, (self.kv_heads, self.head_dim))  # (B*T, KVH, D)
            v = keep.put(self.v(keep.pick(x))).unflatten(1, (self.kv_heads, self.head_dim))
            raw_k = self.k_norm(raw_k)
            k = rotate(raw_k, chunk.cos, chunk.sin)

            # filter
            if cache.filters:
                compared = (k if filter.keys == "rotated" else raw_k).unflatten(0, (B, T))
                found, cache.score = cache.criterion(
                    compared, v.unflatten(0, (B, T)), chunk.n_new, cache.state, cache.ratio, filter
                )
                redundant = found.cpu()
                if redundant.any():
                    keep = Tokens(chunk.real.mask & ~redundant, x.device)
            attends = keep if filter is not None and filter.mode == "attention" else chunk.real

            # queries, attention and output, of the tokens that remain
            if T == 1:
                cache.store(k, v, chunk, keep)  # a single token is to find itself among the slots
            if len(attends):
                q = self.q(attends.pick(x)).unflatten(1, (self.heads, self.head_dim))  # (N, H, D)
                q = rotate(self.q_norm(q), attends.pick(chunk.cos), attends.pick(chunk.sin))
                if T == 1:
                    y = self.attend_decode(q, chunk, cache, attends)
                else:
                    y = self.attend_prefill(q, k, v, chunk, cache, attends, keep)
                out = attends.put(self.o(y.flatten(1)))  # (B*T, C)
            if T > 1:
                cache.store(k, v, chunk, keep)

        # what the others add instead
        out = x.new_zeros(B * T, C) if out is None else out
        if cache.anchor_output is not None:
            anchor_output = cache.anchor_outputs(keep.pick(out), chunk, keep).flatten(0, 1)  # (B*T, C)
            if cache.departure is not None:
                cache.measure(out, anchor_output, residual.flatten(0, 1), chunk, keep)
            if filter.fill == "anchor":
                out = torch.where(keep.mask.flatten().to(x.device)[:, None], out, anchor_output.to(x.dtype))
        cache.redundant = redundant if redundant is not None else torch.zeros_like(chunk.real.mask)
        return out.view(B, T, C)

    def attend_prefill(self, q, k, v, chunk: Chunk, cache: LayerCache, attends: Tokens, keep: Tokens):
        """Row by row, as each has its own tokens left: q (N, H, D) over the row's slots and its chunk -> (N, H, D)."""
        T, share, outputs = keep.mask.shape[1], self.heads // self.kv_heads, []
        candidates = chunk.real if cache.ring else keep  # the other redundant ones can be seen by nobody
        for b, row_q in enumerate(q.split(attends.counts.tolist())):
            if not len(row_q):
                continue
            new = candidates.mask[b].nonzero()[:, 0]
            index = (b * T + new).to(k.device)
            row_k, row_v, until = cache.slots(b)  # (KVH, S, D) twice, (S,)
            mask = None  # nothing cached, nothing graced, no window: plain causal attention among the kept
            if len(until) or cache.window < T:
                query, key = chunk.position[b, attends.mask[b]].to(k.device)[:, None], chunk.at.flatten()[index]
                reach = torch.where(keep.mask[b, new], cache.window, cache.grace_reach).to(k.device)
                mask = torch.cat((query <= until, (key <= query) & (query < key + reach)), dim=1)
            row_k = torch.cat((row_k, k[index].transpose(0, 1)), dim=1).repeat_interleave(share, 0)[None]
            row_v = torch.cat((row_v, v[index].transpose(0, 1)), dim=1).repeat_interleave(share, 0)[None]
            row_q = row_q.transpose(0, 1)[None]  # (1, H, T, D)
            y = F.scaled_dot_product_attention(row_q, row_k, row_v, attn_mask=mask, is_causal=mask is None)
            outputs.append(y[0].transpose(0, 1))
        return torch.cat(outputs)

    def attend_decode(self, q, chunk: Chunk, cache: LayerCache, attends: Tokens):
        """One query a row, its own token stored already: q (N, H, D) over the rows' slots -> (N, H, D)."""
        attention, q = F.scaled_dot_product_attention, q.unflatten(1, (self.kv_heads, -1))
        # (N, KVH, H/KVH, D): query heads that share a kv head are queries of one head, so that k, v are read once
        k, v, until = cache.slots()
        lengths, mask = cache.length.tolist(), None
        by_row = not attends.all and not q.is_cuda  # there, gathering rows of k, v costs more than it saves
        if cache.ring or cache.window < FAR or (min(lengths) < max(lengths) and not by_row):
            mask = (chunk.at <= until)[:, None, None]  # (B, 1, 1, S)
        if by_row:
            outputs = []
            for q_b, b in zip(q.split(1), attends.row.tolist()):
                b, used = slice(b, b + 1), slice(cache.ring + lengths[b])
                mask_b = None if mask is None else mask[b, :, :, used]
                outputs.append(attention(q_b, k[b, :, used], v[b, :, used], attn_mask=mask_b))
            return torch.cat(outputs).flatten(1, 2)
        if not attends.all:
            k, v, mask = k[attends.index], v[attends.index], None if mask is None else mask[attends.index]
        return attention(q, k, v, attn_mask=mask).flatten(1, 2)


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
        self.attn_norm, self.attn = RMSNorm(config.width, config.norm_eps), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.width, config.norm_eps), MLP(config)

    def forward(self, x, chunk: Chunk, cache: LayerCache):
        x = x + self.attn(self.attn_norm(x), x, chunk, cache)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The whole decoder, for inference: tokens in, logits out, everything remembered in the cache."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # not nn.Embedding(...), which on the meta device, where loading starts, takes seconds to import what draws its weights
        self.embed = nn.Embedding.from_pretrained(torch.randn(config.vocab_size, config.width), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = Linear(config.width, config.vocab_size)
        if config.tied:
            self.head.weight = self.embed.weight

    def kv_bytes_per_token(self) -> int:
        """Bytes of the K and V of one token in all layers."""
        c = self.config
        return 2 * c.n_layers * c.kv_heads * c.head_dim * self.embed.weight.element_size()

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
        pieces = cache.pieces(n_new)
        x = self.feed(tokens, cache, n_new) if len(pieces) == 1 else self.feed_pieces(tokens, cache, pieces)
        if last:
            x = x[torch.arange(B), (n_new - 1).clamp(min=0)]
        return self.head(self.norm(x))

    def feed(self, tokens, cache: KVCache, n_new):
        """All layers, on tokens (B, T) during which no ratio changes: (B, T, C)."""
        cache.update_ratios()
        x = self.embed(tokens.to(self.embed.weight.device))  # (B, T, C)
        step = torch.arange(tokens.shape[1])
        position, real = cache.seen[:, None] + step, step < n_new[:, None]
        warm = real & (position < cache.warmup)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        angle = position.flatten().to(x.device, wide)[:, None, None] * rope_frequencies(self.config).to(x.device, wide)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        chunk = Chunk(
            n_new.to(x.device),
            position,
            position.to(x.device),
            Tokens(real, x.device),
            Tokens(warm, x.device),
            torch.cat((cos, cos), dim=-1),
            torch.cat((-sin, sin), dim=-1),
        )
        for block, layer in zip(self.blocks, cache.layers):
            x = block(x, chunk, layer)
        cache.seen = cache.seen + n_new
        return x

    def feed_pieces(self, tokens, cache: KVCache, pieces):
        """The same in several pieces, each row's cut where its own ratios change, put together again: (B, T, C)."""
        x = self.embed.weight.new_zeros(*tokens.shape, self.config.width)
        redundant = torch.zeros(len(cache.layers), *tokens.shape, dtype=torch.bool)
        stats = torch.promote_types(x.dtype, torch.float32)
        score = torch.full(redundant.shape, math.nan, dtype=stats, device=x.device)
        for done, count in pieces:
            row, step = (torch.arange(int(count.max())) < count[:, None]).nonzero(as_tuple=True)
            piece = tokens.new_zeros(len(tokens), int(count.max()))
            piece[row, step] = tokens[row, done[row] + step]
            x[row, done[row] + step] = self.feed(piece, cache, count)[row, step]
            for i, layer in enumerate(cache.layers):
                redundant[i, row, done[row] + step] = layer.redundant[row, step]
                score[i, row, done[row] + step] = layer.score[row, step].to(score.dtype)
        for i, layer in enumerate(cache.layers):
            layer.redundant, layer.score = redundant[i], score[i]
        return x

    def prefill(self, prompts: list[list[int]], cache: KVCache, chunk=512):
        """Feed one prompt a row, of any lengths, `chunk` tokens at a time: logits (B, vocab) after each one's end."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        if not lengths.all():
            raise ValueError("a prompt is empty")
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        logits = None
        for start in range(0, tokens.shape[1], chunk):
            n_new = (lengths - start).clamp(0, chunk)
            latest = self(tokens[:, start : start + chunk], cache, n_new, last=True)
            ends = (n_new > 0).to(latest.device)[:, None]
            logits = latest if logits is None else torch.where(ends, latest, logits)
        return logits
