"""A LLaMA/Mistral decoder whose layers may filter tokens.

To see the filter at work, follow one token through Attention.forward. kv_cache.py says what a
redundant token loses in each mode and what a layer remembers, token_filter.py how it decides.

Shapes: B sequences, T new tokens in each, N real ones among the B * T (the rest is padding), L
layers, H query heads, KVH key/value heads (H is a multiple of KVH), D head size, C width, R
channels of a head that RoPE rotates, K columns of a context (kv_cache.Context), T' columns of a
grid that holds only the tokens that attend.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from decode_attention import decode_attention
from filter_config import FilterConfig
from kv_cache import EMPTY, DecodeStep, KVCache, LayerCache, Packing, PrefillChunk
from token_filter import token_filter

# Torch's attention kernels, without cuDNN's, which plans for a second for every new shape.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
    max_positions: int  # the context: the longest text that the model was made for, in tokens
    tied: bool  # the output projection shares the embedding's weights
    # Sliding window (Mistral v0.1): token t sees positions > t - window alone, sinks included.
    window: int | None = None
    rope_scaling: dict | None = None  # see rope_frequencies
    rotary_dim: int | None = None  # R: RoPE rotates the first R channels (Phi); None: all D
    qkv_bias: bool = False  # biases of the query, key and value projections (Qwen2)
    o_bias: bool = False  # bias of attention's output projection
    mlp_bias: bool = False  # biases of the MLP's three projections
    qk_norm: bool = False  # RMSNorm over each query and key head before RoPE (Qwen3)


# ---------------------------------------------------------------------------- rotary positions


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians per position of each channel pair, theta^(-2i/R): (R/2,) float32.

    config.rope_scaling divides frequencies by `factor`: all of them ("linear"), or as in Llama 3.1
    the slow ones, which make few turns within the original context; fast ones stay as they are, and
    in between is a linear blend.
    """
    R = config.rotary_dim or config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, R, 2, dtype=torch.float32) / R)
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    if list(scaling) == ["factor"]:  # linear scaling has nothing else
        return frequencies / scaling["factor"]
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    fast = ((turns - low) / (high - low)).clamp(0, 1)  # 1: keeps its frequency, 0: slowed
    return fast * frequencies + (1 - fast) * frequencies / scaling["factor"]


def rope_table(position, frequencies, dtype):
    """cos and sin of every angle at positions (...): (..., 1, R) each, as apply_rope wants them."""
    angle = position[..., None, None] * frequencies
    cos = angle.cos().to(dtype)
    sin = angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x, cos, sin):
    """RoPE in Hugging Face's layout, channel i paired with i + R/2: x (..., heads, D).

    The pair (a, b) becomes (a cos - b sin, b cos + a sin). So each channel becomes itself times cos
    plus its partner times sin, where the sin of the table is negative in the first half. Channels
    from R on stay as they are.
    """
    R = cos.shape[-1]
    if R < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :R], cos, sin), x[..., R:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(R // 2, dims=-1), sin)


# ---------------------------------------------------------------------------------- the layers

ONEDNN = hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)  # private to torch, so it may be gone one day


class Linear(nn.Linear):
    """x W^T + b. On the CPU in float32 it goes through oneDNN.

    Torch's default takes 1.21 to 1.26 times as long for 1 to 32 rows, 1.07 to 1.14 times for 512.
    """

    def forward(self, x):
        use_onednn = ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
        if use_onednn and not torch.compiler.is_compiling():
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


class Attention(nn.Module):
    """Grouped-query attention of each token over what the cache lets it see."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C = config.width
        D = config.head_dim
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_dim = D
        self.q = Linear(C, config.heads * D, config.qkv_bias)
        self.k = Linear(C, config.kv_heads * D, config.qkv_bias)
        self.v = Linear(C, config.kv_heads * D, config.qkv_bias)
        self.o = Linear(config.heads * D, C, config.o_bias)
        self.q_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, batch: DecodeStep | PrefillChunk, cache: LayerCache):
        """x (N, C), the residual stream after its norm -> what is added to the stream, (N, C)."""
        # Keys and values.
        k_unrotated = self.k_norm(self.k(x).unflatten(-1, (self.kv_heads, self.head_dim)))
        k = apply_rope(k_unrotated, batch.cos, batch.sin)  # (N, KVH, D)
        v = self.v(x).unflatten(-1, (self.kv_heads, self.head_dim))

        # Filter. Keys are compared as the cache holds them, or as they are before RoPE.
        q = None  # (N, H, D) if the filter needs the queries; else they are projected to attend
        redundant = None  # (B, T) bool in a layer that filters
        if cache.filters:
            is_rotated = cache.filter.keys == "rotated"
            compared = batch.by_row(k if is_rotated else k_unrotated)
            if cache.filter.needs_queries:
                q_unrotated = self.unrotated_queries(x)
                q = apply_rope(q_unrotated, batch.cos, batch.sin)
                mean_q = self.mean_of_groups(q if is_rotated else q_unrotated)
                redundant = cache.find_redundant(
                    compared, batch.by_row(v), batch.lengths, batch.by_row(mean_q)
                )
            else:
                redundant = cache.find_redundant(compared, batch.by_row(v), batch.lengths)

        # Store and attend.
        if isinstance(batch, DecodeStep):
            return self.decode(x, q, k, v, redundant, batch, cache)
        return self.prefill(x, q, k, v, redundant, batch, cache)

    def queries(self, x, cos, sin):
        """x (N, C) -> (N, H, D)"""
        return apply_rope(self.unrotated_queries(x), cos, sin)

    def unrotated_queries(self, x):
        """x (N, C) -> (N, H, D)"""
        return self.q_norm(self.q(x).unflatten(-1, (self.heads, self.head_dim)))

    def mean_of_groups(self, q):
        """The mean over the query heads that share a key head: (N, H, D) -> (N, KVH, D)."""
        return q.unflatten(1, (self.kv_heads, -1)).mean(2)

    # ---------------------------------------------------------------------------------- decode

    def decode(self, x, q, k, v, redundant, step: DecodeStep, cache: LayerCache):
        """One token a row, N = B. q (B, H, D), or None if it is yet to be projected.

        A redundant token's query reads nothing in mode skip, the near slots in mode local, all in
        mode cache. q and o are computed for every row: the host does not know which are redundant,
        and the other rows need the weights of q and o anyway.
        """
        if redundant is not None:
            redundant = redundant[:, 0]
        n_visible, in_window = cache.append(k, v, redundant, step)
        if q is None:
            q = self.queries(x, step.cos, step.sin)  # (B, H, D)
        keys, values = cache.kv
        output = self.o(decode_attention(q, keys, values, n_visible, in_window).flatten(1))
        if redundant is not None and cache.filter.mode == "skip":
            # With no slot read it is undefined, and o's bias was added.
            output = output.masked_fill(redundant[:, None], 0)
        return output

    # --------------------------------------------------------------------------------- prefill

    def prefill(self, x, q, k, v, redundant, chunk: PrefillChunk, cache: LayerCache):
        """Up to T tokens a row. Tokens that skip attention do not go through q and o at all.

        q (N, H, D), or None if it is yet to be projected.
        """
        k = chunk.by_row(k)  # (B, T, KVH, D)
        v = chunk.by_row(v)
        context = cache.context(k, v, redundant, chunk)
        output = torch.zeros_like(x)
        mode = cache.filter.mode
        if redundant is None or mode == "cache":
            everyone = slice(None)
            self.attend(x, q, everyone, chunk.packing, context, chunk, cache, output)
        else:
            is_kept = chunk.packing.unpad(~redundant)  # (N,)
            n_redundant = redundant.sum(1).cpu()  # (B,), waits for the device, as rebuild does
            n_kept = chunk.host_lengths - n_redundant
            self.attend_some(x, q, is_kept, n_kept, context, chunk, cache, output)
            if mode == "local":
                local = context.without_far()
                self.attend_some(x, q, ~is_kept, n_redundant, local, chunk, cache, output)
        cache.rebuild(context, chunk)
        return output

    def attend_some(self, x, q, attends, counts, context, chunk: PrefillChunk, cache, output):
        """The same as attend() for the tokens where attends (N,) is True.

        counts (B,), on the host: how many tokens of each row attend. They are moved to the front of
        their rows, so that there is little padding.
        """
        n = int(counts.sum())
        if n == 0:
            return
        # Their indices among the N tokens. True sorts before False, and a stable sort keeps the
        # order; nonzero() would wait for the device to say how many there are.
        tokens = attends.byte().argsort(descending=True, stable=True)[:n]
        packing = Packing(counts, int(counts.max()), x.device)
        self.attend(x, q, tokens, packing, context, chunk, cache, output)

    def attend(self, x, q, tokens, packing: Packing, context, chunk, cache: LayerCache, output):
        """Attention for some of the N tokens; writes their rows of `output` (N, C).

        tokens: their indices, or slice(None) for all N; packing: where they are in a (B, T') grid.
        """
        if q is None:
            own_q = self.queries(x[tokens], chunk.cos[tokens], chunk.sin[tokens])
        else:
            own_q = q[tokens]
        own_q = packing.pad(own_q)  # (B, T', H, D)
        keys, values = context.kv
        if cache.is_causal(chunk):
            y = causal_attention(own_q, keys, values)
            T = own_q.shape[1]  # the i-th of them, from 0, sees n_before + i + 1 tokens
            cache.n_read += T * chunk.n_before + T * (T + 1) // 2
        else:
            position = chunk.packing.unpad(chunk.position)[tokens]
            mask = cache.visible(packing.pad(position, fill=EMPTY), context)  # (B, T', K)
            y = masked_attention(own_q, keys, values, mask)
            # In int64 the first sum would take 8 times as long.
            cache.n_read += mask.sum(2, dtype=torch.int32).sum(1)
        output[tokens] = self.o(packing.unpad(y))


def masked_attention(q, k, v, mask):
    """Attention over the tokens that a mask shows.

    q (B, T', H, D); k, v (B, KVH, K, D); mask (B, T', K) bool -> (B, T', H * D).
    """
    bias = torch.where(mask, 0.0, -math.inf).to(q.dtype)[:, None]
    return attention_by_group(q, k, v, attn_mask=bias)


def causal_attention(q, k, v):
    """Attention of the last T of K tokens over themselves and all before them.

    q (B, T, H, D); k, v (B, KVH, K, D) -> (B, T, H * D). Without an explicit mask torch's kernels
    skip later keys. On a CPU that saves 9% of the time of a prompt of 1024 tokens.
    """
    T = q.shape[1]
    K = k.shape[2]
    if T == K:
        return attention_by_group(q, k, v, is_causal=True)
    # Lower right: the last query sees all K keys.
    return attention_by_group(q, k, v, attn_mask=causal_lower_right(T, K))


def attention_by_group(q, k, v, **options):
    """Query heads that share a key head take turns, since torch would copy k and v for each."""
    by_group = q.unflatten(2, (k.shape[1], -1)).permute(3, 0, 2, 1, 4)  # (H/KVH, B, KVH, T', D)
    y = [F.scaled_dot_product_attention(part, k, v, **options) for part in by_group]
    return (
        torch.stack(y, dim=3).transpose(1, 2).flatten(2)
    )  # (B, KVH, T', H/KVH, D) -> (B, T', H * D)


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
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, batch: DecodeStep | PrefillChunk, cache: LayerCache):
        """x (N, C), the residual stream -> the same after this layer."""
        x = x + self.attn(self.attn_norm(x), batch, cache)
        return x + self.mlp(self.mlp_norm(x))


# ----------------------------------------------------------------------------------- the model


class Transformer(nn.Module):
    """The whole decoder, for inference: tokens in, logits out, everything remembered in the cache.

    cache = model.new_cache(1, preset("cache", prune=0.5))
    logits = model(torch.tensor([[1, 15, 7]]), cache)     # (1, 3, vocab): a prompt,
    logits = model(torch.tensor([[22]]), cache)           # (1, 1, vocab): then token by token
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Not nn.Embedding(...): its own random weights take seconds of imports on the meta device,
        # where loading starts.
        weight = torch.randn(config.vocab_size, config.width)
        self.embed = nn.Embedding.from_pretrained(weight, freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

        # What runtime/ puts around the model, from outside:
        self.decode_block: Callable = (
            Block.forward
        )  # a block of a decode step, or the same compiled
        self.step_runner: Callable | None = None  # runs decode_step, or a recording of it
        self.sum_over_devices: Callable | None = None  # see FilterState

        self._frequencies: torch.Tensor | None = None  # see rope

    @torch.inference_mode()
    def new_cache(
        self, B, filter: FilterConfig | None = None, filter_fn: Callable = token_filter, length=0
    ) -> KVCache:
        """An empty cache for B sequences. Tokens fed with it are filtered if `filter` is given.

        filter_fn  decides which tokens are redundant: see the contract in token_filter
        length     how many tokens a row will have in the end, if known, so that the cache usually
                   grows once only, after the prompt
        """
        weight = self.embed.weight
        return KVCache(
            self.config,
            B,
            filter,
            filter_fn,
            length,
            weight.dtype,
            weight.device,
            self.sum_over_devices,
        )

    @torch.inference_mode()
    def forward(self, tokens, cache: KVCache, lengths=None, last=False):
        """Feed tokens and move the cache on. A prompt and a decode step are this same call.

        tokens (B, T) int64, of which row b's first lengths[b] are real (default: all).
        Returns logits (B, T, vocab), meaningless at padding; with last=True those after each row's
        last real token only, (B, vocab), meaningless in a row without any.
        Raises ValueError beyond the model's context, and for a cache that was made for other rows,
        another model, dtype or device.
        """
        B, T = tokens.shape
        self.check_cache(cache, B)
        if lengths is None:
            lengths = torch.full((B,), T)
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
        longest = max((cache.lengths + lengths).tolist(), default=0)
        limit = self.config.max_positions
        if longest > limit:
            raise ValueError(f"{longest} tokens are more than the model's context of {limit}")
        tokens = tokens.to(self.embed.weight.device)

        if not lengths.any():
            return self.feed_nothing(cache, B, T, last)
        if T == 1 and lengths.all():  # a step in which a row has no token is a chunk
            logits = self.decode(tokens[:, 0], cache)
            return logits if last else logits[:, None]
        return self.feed_chunk(tokens, cache, lengths, last)

    def check_cache(self, cache: KVCache, B):
        """Raise ValueError, naming both sides, if the cache was made for something else."""
        n_rows = len(cache.lengths)
        if B != n_rows:
            raise ValueError(f"tokens have {B} rows, but the cache was made for {n_rows}")
        if cache.config is not self.config and cache.config != self.config:
            differing = [
                f"{name} {theirs!r} for {getattr(self.config, name)!r}"
                for name, theirs in dataclasses.asdict(cache.config).items()
                if theirs != getattr(self.config, name)
            ]
            raise ValueError(f"the cache was made for another model: {', '.join(differing)}")
        weight = self.embed.weight
        kv = cache.layers[0].kv
        if kv.dtype != weight.dtype:
            raise ValueError(f"the cache is in {kv.dtype}, but the model in {weight.dtype}")
        if kv.device != weight.device:
            raise ValueError(f"the cache is on {kv.device}, but the model on {weight.device}")

    def feed_nothing(self, cache: KVCache, B, T, last):
        """A call without a single token."""
        cache.latest_T = T
        for layer in cache.layers:
            layer.redundant = None
            layer.score = None
        shape = (B, self.config.vocab_size) if last else (B, T, self.config.vocab_size)
        return self.embed.weight.new_zeros(shape)

    def feed_chunk(self, tokens, cache: KVCache, lengths, last):
        """Prefill: tokens (B, T), lengths (B,) on the host -> logits as in forward."""
        chunk = cache.begin_prefill(lengths, tokens.shape[1])
        chunk.cos, chunk.sin = self.rope(chunk.packing.unpad(chunk.position))
        x = self.embed(chunk.packing.unpad(tokens))  # (N, C)
        with sdpa_kernel(KERNELS):
            for block, layer in zip(self.blocks, cache.layers):
                x = block(x, chunk, layer)
        if last:
            # The index among the N tokens of each row's last one.
            ends = (lengths.cumsum(0) - 1).clamp(min=0).to(x.device)
            return self.head(self.norm(x[ends]))
        return chunk.packing.pad(self.head(self.norm(x)))

    def decode(self, tokens, cache: KVCache):
        """One token for every row, (B,) -> logits (B, vocab)."""
        if cache.free_steps == 0:
            cache.reserve()  # waits for the device; nothing after this in a step does
        cache.free_steps -= 1
        cache.lengths = cache.lengths + 1
        cache.latest_T = 1
        if self.step_runner is None:
            logits = self.decode_step(tokens, cache)
        else:
            logits = self.step_runner(self.decode_step, tokens, cache)
        cache.n_steps += 1
        return logits

    def decode_step(self, tokens, cache: KVCache):
        """tokens (B,) -> logits (B, vocab).

        So that it can be recorded (runtime/cuda_graph.py), it takes nothing from the host but the
        tokens, waits for nothing, and replaces no tensor that the next step needs.
        """
        x = self.embed(tokens)  # (B, C)
        step = cache.begin_decode()
        step.cos, step.sin = self.rope(step.position)
        for block, layer in zip(self.blocks, cache.layers):
            x = self.decode_block(block, x, step, layer)
        cache.position += 1
        return self.head(self.norm(x))

    def rope(self, position):
        """cos and sin at positions (N,): (N, 1, R) each."""
        weight = self.embed.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        frequencies = self._frequencies
        if frequencies is None or (frequencies.device, frequencies.dtype) != (weight.device, dtype):
            frequencies = rope_frequencies(self.config).to(weight.device, dtype)
            self._frequencies = frequencies
        return rope_table(position, frequencies, weight.dtype)

    def prefill(self, prompts: list[list[int]], cache: KVCache, chunk=512):
        """Feed one prompt a row, of any lengths, `chunk` tokens at a time.

        Returns logits (B, vocab) after each prompt's end. Raises ValueError for an empty prompt,
        and for a token that the model does not know.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        if not lengths.all():
            raise ValueError("a prompt is empty")
        highest = max(max(prompt) for prompt in prompts)
        vocab_size = self.config.vocab_size
        if highest >= vocab_size:
            raise ValueError(
                f"a prompt has the token {highest}, but the model only {vocab_size} embeddings"
            )
        rows = [torch.tensor(prompt) for prompt in prompts]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logits = None
        for start in range(0, tokens.shape[1], chunk):
            in_chunk = (lengths - start).clamp(0, chunk)
            part = tokens[:, start : start + chunk]
            latest = self(part, cache, in_chunk, last=True)
            # The last chunk in which a row has tokens sets its logits.
            has_tokens = (in_chunk > 0).to(latest.device)[:, None]
            logits = latest if logits is None else torch.where(has_tokens, latest, logits)
        return logits
