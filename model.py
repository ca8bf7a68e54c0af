"""A LLaMA/Mistral decoder whose layers may filter tokens. To see the filter at work, read Attention.forward.

Shapes: B sequences, T new tokens, S cache slots, L layers, H query heads, KVH key/value heads (H is a multiple of KVH),
D head size, C width, R channels of a head that RoPE turns, N tokens gathered out of a (B, T) chunk.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from kv_cache import FAR, Chunk, KVCache, LayerCache, Tokens, send, wide
from token_filter import FilterConfig, token_filter


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


def rope_table(position, config: ModelConfig, dtype):
    """cos and sin of every angle at position (B, T), (B*T, 1, R) each, as rotate wants them."""
    angle = position.flatten().to(wide(dtype))[:, None, None] * send(rope_frequencies(config), position.device)
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


# ------------------------------------------------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """x W^T + b."""

    def forward(self, x):
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # oneDNN instead of the default library, on some CPUs twice as fast
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


def idle_rows_ride_along(device) -> bool:
    """Whether a batch's attention at decode reads the rows whose token is skipped too, and drops their result: not on the
    CPU; elsewhere one call for all beats many, or copying the other rows out.
    """
    return device.type != "cpu"


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
        x = x.flatten(0, 1)  # (B*T, C)
        keep, out, cache.score = chunk.real, None, None
        if cache.closed:
            keep = Tokens(keep.mask & (chunk.position < max(filter.warmup, 1)), x.device)

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
                if (found := found.cpu()).any():
                    keep = Tokens(keep.mask & ~found, x.device)
            attends = keep if filter.mode == "attention" else chunk.real

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
            if cache.adaptive is not None:
                size = residual.flatten(0, 1).to(anchor_output.dtype).norm(dim=-1).clamp(min=1e-30)
                departure = ((out - anchor_output).norm(dim=-1) / size).view(B, T)
                cache.adaptive.measure(cache.layer, departure, send(keep.mask, x.device), chunk.at)
            if filter.fill == "anchor":
                out = torch.where(send(keep.mask.flatten(), x.device)[:, None], out, anchor_output.to(x.dtype))
        cache.redundant = chunk.real.mask & ~keep.mask
        return out.view(B, T, C)

    def attend_prefill(self, q, k, v, chunk: Chunk, cache: LayerCache, attends: Tokens, keep: Tokens):
        """Row by row, as each has its own tokens left: q (N, H, D) over the row's slots and its chunk -> (N, H, D)."""
        T, share, outputs = keep.mask.shape[1], self.heads // self.kv_heads, []
        candidates = chunk.real if cache.ring else keep  # the other redundant ones can be seen by nobody
        for b, row_q in enumerate(q.split(attends.counts.tolist())):
            if not len(row_q):
                continue
            new = candidates.mask[b].nonzero()[:, 0]
            index = send(b * T + new, k.device)
            row_k, row_v, until = cache.slots(b)  # (KVH, S, D) twice, (S,)
            mask = None  # nothing cached, nothing graced, no window: plain causal attention among the kept
            if len(until) or cache.window < T:
                query, key = send(chunk.position[b, attends.mask[b]], k.device)[:, None], chunk.at.flatten()[index]
                reach = send(torch.where(keep.mask[b, new], cache.window, cache.grace_reach), k.device)
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
        if cache.ring or cache.window < FAR or min(lengths) < max(lengths):
            mask = (chunk.at <= until)[:, None, None]  # (B, 1, 1, S)
        if attends.all or idle_rows_ride_along(q.device):
            return attends.pick(attention(attends.put(q), k, v, attn_mask=mask)).flatten(1, 2)
        outputs = []
        for pair, rows in zip(q.split(2), attends.row.split(2)):  # any two rows are a view, of some stride
            first, last = rows[0].item(), rows[-1].item()
            rows, used = slice(first, last + 1, max(1, last - first)), slice(cache.ring + max(lengths[first], lengths[last]))
            pair_mask = None if mask is None else mask[rows, :, :, used]
            outputs.append(attention(pair, k[rows, :, used], v[rows, :, used], attn_mask=pair_mask))
        return torch.cat(outputs).flatten(1, 2)


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
        self.head = Linear(config.width, config.vocab_size, bias=False)
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
        parts, decisions = [], []
        for first, end in pairwise([0, *cache.cuts(n_new), T]):  # one part, but for schedule="adaptive"
            parts.append(self.feed(tokens[:, first:end], cache, (n_new - first).clamp(0, end - first)))
            decisions.append([(layer.redundant, layer.score) for layer in cache.layers])
        x = torch.cat(parts, dim=1)
        if len(parts) > 1:
            for layer, found in zip(cache.layers, zip(*decisions)):
                layer.redundant, layer.score = (torch.cat(part, dim=1) for part in zip(*found))
        if last:
            x = x[torch.arange(B), (n_new - 1).clamp(min=0)]
        return self.head(self.norm(x))

    def feed(self, tokens, cache: KVCache, n_new):
        """All layers, on tokens (B, T) during which no ratio changes: (B, T, C)."""
        if cache.adaptive is not None:
            cache.adaptive.update(cache.seen)
        x = self.embed(tokens.to(self.embed.weight.device))  # (B, T, C)
        step = torch.arange(tokens.shape[1])
        position = cache.seen[:, None] + step
        at, real = send(position, x.device), Tokens(step < n_new[:, None], x.device)
        chunk = Chunk(send(n_new, x.device), position, at, real, *rope_table(at, self.config, x.dtype))
        for block, layer in zip(self.blocks, cache.layers):
            x = block(x, chunk, layer)
        cache.seen = cache.seen + n_new
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
