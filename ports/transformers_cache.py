"""Token Filtering inside Hugging Face transformers: a cache that holds what the filter keeps.

    cache = TokenFilterCache(model, preset("cache", prune=0.5))
    model.generate(**inputs, past_key_values=cache)

    attach(model, preset("cache", prune=0.5))   # or: every call from here on has such a cache
    model.generate(**inputs)

transformers calls, in each layer: the attention module's forward, which makes keys and values; the
cache's update(), which is handed those; then the attention function, which is handed the module.
No one of them knows all that the filter needs, so three registered functions work together:
`before_attention` finds the cache's layer and RoPE's angles, `attention` runs the filter and
attends, `after_attention` sees to it that a token that skips gets nothing, o's bias neither.

Shapes: B sequences, T new tokens, K tokens to look at, KVH key/value heads, D head size.
A token's *position* counts the real tokens of its sequence, so padding has none.
"""

import functools
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from filter_config import FilterConfig, layer_ratios
from token_filter import FilterState, token_filter

NAME = "token_filter"  # of the attention function and its mask, as registered with transformers
EMPTY = -1  # the position of padding, and of a slot without a token
NO_WINDOW = 2**62  # a sliding window longer than any text
SPARE_SLOTS = 32  # slots by which a layer grows


@dataclass
class Tokens:
    """Tokens of B sequences in K columns. Their order is free, as each has its position."""

    kv: torch.Tensor  # (2, B, KVH, K, D): keys, rotated, and values
    positions: torch.Tensor  # (B, K) int64, EMPTY where a column holds no token
    kept: torch.Tensor  # (B, K) bool: not redundant

    def columns(self, index):
        """The columns index (B, K') of each row."""
        _, B, KVH, _, D = self.kv.shape
        kv_index = index[:, None, :, None].expand(2, B, KVH, index.shape[1], D)
        kv = self.kv.gather(3, kv_index)
        return Tokens(kv, self.positions.gather(1, index), self.kept.gather(1, index))

    def rows(self, index):
        return Tokens(self.kv[:, index], self.positions[index], self.kept[index])

    def followed_by(self, other: "Tokens"):
        kv = torch.cat((self.kv, other.kv), dim=3)
        positions = torch.cat((self.positions, other.positions), dim=1)
        return Tokens(kv, positions, torch.cat((self.kept, other.kept), dim=1))

    def with_spare_columns(self, n):
        kv = F.pad(self.kv, (0, 0, 0, n))
        return Tokens(kv, F.pad(self.positions, (0, n), value=EMPTY), F.pad(self.kept, (0, n)))

    def nbytes(self) -> int:
        return self.kv.nbytes + self.positions.nbytes + self.kept.nbytes


class TokenFilterLayer(CacheLayerMixin):
    """What one layer remembers of B sequences: sinks, recent tokens and kept ones."""

    is_sliding = False  # a window is applied here, by position, and not by transformers' masks

    def __init__(self, filter: FilterConfig, layer: int, ratio: float, window: int | None):
        super().__init__()
        self.filter = filter
        self.layer = layer
        self.ratio = ratio
        self.window = window or NO_WINDOW
        # A layer that does not filter keeps every token, so it needs no sinks and no recent ones.
        self.n_sinks = filter.n_sinks if ratio > 0 else 0
        self.ring_size = filter.recent + 1 if ratio > 0 else 0
        self.reset()

    def reset(self):
        """Forget everything."""
        self.is_initialized = False
        self.n_columns = 0  # tokens fed, padding included
        self.free_slots = 0  # for how many decode steps there are slots
        self.is_announced = False  # between before_attention and after_attention
        self.is_pending = False  # between update and attention
        self.position_embeddings = None  # cos and sin of RoPE, where keys are compared before it

        # Of the latest chunk, (B, T) each.
        self.redundant: torch.Tensor | None = None  # False at padding
        self.score: torch.Tensor | None = None  # NaN at padding; None in a layer of ratio 0
        self.gets_nothing: torch.Tensor | None = None  # padding, and tokens that skip attention

    def lazy_initialization(self, k, v):
        B, KVH, _, D = k.shape
        if v.shape != k.shape:
            raise NotImplementedError("keys and values of different sizes are not supported")
        self.device = k.device
        exact = torch.promote_types(k.dtype, torch.float32)
        self.state = FilterState(B, KVH, D, self.filter, self.layer, exact, k.device)
        self.count = torch.zeros(B, dtype=torch.int64, device=k.device)  # real tokens so far
        self.n_redundant = torch.zeros_like(self.count)
        positions = torch.empty(B, 0, dtype=torch.int64, device=k.device)
        no_kv = k.new_zeros(2, B, KVH, 0, D)
        self.stored = Tokens(no_kv, positions, kept=positions.bool())
        self.is_initialized = True

    # ------------------------------------------------------------------- what transformers asks

    def update(self, k, v, *args, **kwargs):
        """Nothing yet: attention(), which comes next, knows what is missing here."""
        if not self.is_announced:
            raise NotImplementedError(
                "this model's attention is not one that the token filter knows, or detach() was "
                "called while this cache was in use; make a new TokenFilterCache"
            )
        self.n_columns += k.shape[2]
        self.is_pending = True
        return k, v

    def get_seq_length(self):
        return self.n_columns

    def get_mask_sizes(self, T):
        # Of transformers' mask only one thing is needed: which of the new tokens are padding.
        return T, self.n_columns

    def get_max_length(self):
        return -1  # no limit

    def activate_past_recording(self):
        raise NotImplementedError(
            "a filter cannot take tokens back, so assisted decoding is not possible with it; "
            "generate without an assistant and without prompt_lookup_num_tokens"
        )

    def crop(self, tokens_to_remove):
        if tokens_to_remove != 0:
            self.activate_past_recording()

    def batch_select_indices(self, rows):
        """Keep these rows in this order. A row named twice is copied."""
        if not self.is_initialized:
            return
        index = torch.as_tensor(rows, device=self.device)
        self.state.select(index)
        self.stored = self.stored.rows(index)
        self.count = self.count[index]
        self.n_redundant = self.n_redundant[index]

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats):
        if self.is_initialized:
            rows = torch.arange(len(self.count))
            self.batch_select_indices(rows.repeat_interleave(repeats))

    # ------------------------------------------------------------------------------- the method

    @torch.no_grad()
    def take(self, module, q, k, v, is_real):
        """Filter and store new tokens. No gradients flow through what is stored.

        q (B, heads, T, D); k, v (B, KVH, T, D); queries and keys rotated; is_real (B, T) bool:
        which are no padding (None: all).
        Returns the Tokens to look at and the mask (B, T, K) of those that each new one may see.
        """
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        self.is_pending = False

        # Decide.
        T = k.shape[2]
        count = self.count[:, None]
        if is_real is None:
            lengths = torch.full_like(self.count, T)
            positions = count + torch.arange(T, device=k.device)  # (B, T)
        else:
            lengths = is_real.sum(1)
            positions = (count + is_real.cumsum(1) - 1).masked_fill(~is_real, EMPTY)
        redundant = self.find_redundant(module, q, k, v, is_real)
        self.redundant = redundant
        self.n_redundant += redundant.sum(1)
        self.count = self.count + lengths

        # Store. A decode step stores before it attends, a longer chunk looks at all of its tokens.
        new = Tokens(torch.stack((k, v)), positions, kept=~redundant)
        if T == 1:
            self.append(new)
            context = self.stored
        else:
            context = self.stored.followed_by(new)
            self.rebuild(context)
        mask = self.visible(positions, redundant, context)
        self.gets_nothing = ~mask.any(-1)
        return context, mask

    def find_redundant(self, module, q, k, v, is_real):
        """Run the filter on new tokens, as in take() -> (B, T) bool, False at padding."""
        B, KVH, T, _ = k.shape
        if self.ratio == 0:
            return torch.zeros(B, T, dtype=torch.bool, device=k.device)

        compared = [self.as_compared(module, k), v]
        if self.filter.needs_queries:
            mean_q = q.unflatten(1, (KVH, -1)).mean(2)  # over the heads that share a key head
            compared.append(self.as_compared(module, mean_q))
        compared = [x.transpose(1, 2) for x in compared]  # (B, T, KVH, D) each
        if is_real is None:
            redundant, self.score = self.call_filter(compared, None)
            return redundant

        # The filter wants the real tokens of each row first.
        order = is_real.byte().argsort(dim=1, descending=True, stable=True)  # (B, T)
        index = order[..., None, None].expand_as(compared[0])
        packed = [x.gather(1, index) for x in compared]
        redundant, score = self.call_filter(packed, lengths=is_real.sum(1))
        self.score = score.scatter(1, order, score)
        return redundant.scatter(1, order, redundant)

    def as_compared(self, module, x):
        """Rotated keys or queries (B, KVH, T, D), as they are or rotated back."""
        if self.filter.keys == "rotated":
            return x
        return unrotate(module, x.to(self.state.anchor.dtype), self.position_embeddings)

    def call_filter(self, compared, lengths):
        """compared: keys, values and, where the filter needs them, queries, (B, T, KVH, D) each."""
        k, v, *q = compared
        return token_filter(k, v, lengths, self.state, self.ratio, self.filter, *q)

    def visible(self, query, redundant, tokens: Tokens):
        """Who may see whom: queries at positions (B, T), EMPTY at padding -> (B, T, K) bool."""
        query = query[..., None]  # (B, T, 1)
        position = tokens.positions[:, None]  # (B, 1, K)
        in_sight = tokens.kept[:, None]
        if self.filter.mode == "local":
            in_sight = in_sight & ~redundant[..., None]
        is_sink = position < self.n_sinks
        is_recent = position > query - self.ring_size
        mask = (position != EMPTY) & (position <= query) & (is_sink | is_recent | in_sight)
        if self.window < NO_WINDOW:
            mask &= position > query - self.window
        if self.filter.mode == "skip":
            mask &= ~redundant[..., None]
        return mask

    def stays(self, tokens: Tokens):
        """Which tokens those still to come may see: (B, K) bool."""
        position = tokens.positions
        end = self.count[:, None]  # the position of the next token
        is_sink = position < self.n_sinks
        is_recent = position >= end - self.ring_size
        in_window = position >= end - self.window
        return (position != EMPTY) & in_window & (is_sink | is_recent | tokens.kept)

    def rebuild(self, context: Tokens):
        """Store what stays of a chunk and all before it, without gaps but for shorter rows."""
        stays = self.stays(context)
        longest = int(stays.sum(1).max())
        order = stays.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
        self.stored = context.columns(order)
        self.stored.positions.masked_fill_(~stays.gather(1, order), EMPTY)
        self.free_slots = 0

    def append(self, new: Tokens):
        """Store one token a row, in a slot whose token is out of sight by now or in a new one."""
        positions = self.stored.positions
        positions.masked_fill_(~self.stays(self.stored), EMPTY)
        if self.free_slots == 0:  # the one time that the host waits for the device
            n_free = (positions == EMPTY).sum(1)
            self.free_slots = int(n_free.min())
        if self.free_slots == 0:
            self.stored = self.stored.with_spare_columns(SPARE_SLOTS)
            self.free_slots = SPARE_SLOTS
        self.free_slots -= 1

        stored = self.stored
        row = torch.arange(len(self.count), device=self.device)
        slot = (stored.positions == EMPTY).byte().argmax(1)  # (B,) the first that is free
        stored.kv[:, row, :, slot] = new.kv[:, :, :, 0].transpose(0, 1)
        stored.positions[row, slot] = new.positions[:, 0]
        stored.kept[row, slot] = new.kept[:, 0]


def unrotate(module, k, position_embeddings):
    """Keys (or queries) as they were before RoPE, by the model's own function with the angles
    negated.

    k (B, KVH, T, D); position_embeddings: the cos and sin that have turned them, or None.
    Raises NotImplementedError where the rotation cannot be undone.
    """
    modeling_file = sys.modules[type(module).__module__]
    knows_rope = any("rotary" in name.lower() for name in vars(modeling_file))
    if position_embeddings is None and not knows_rope:
        return k  # GPT-2 and others
    apply_rope = getattr(modeling_file, "apply_rotary_pos_emb", None)
    if position_embeddings is None or apply_rope is None or position_embeddings[0].ndim != 3:
        raise NotImplementedError(
            f"the rotation of {type(module).__name__} cannot be undone, but this filter compares "
            'keys before it; compare rotated ones: preset("cache", keys="rotated")'
        )
    cos, sin = (part.to(k.dtype) for part in position_embeddings)
    # YaRN makes both longer, by one factor. (B, T, 1), its square.
    scale = (cos.square() + sin.square())[..., :1]
    R = getattr(module, "rotary_ndims", k.shape[-1])  # how many channels are rotated
    rotated = k[..., :R]
    _, unrotated = apply_rope(rotated, rotated, cos / scale, -sin / scale)
    return torch.cat((unrotated, k[..., R:]), dim=-1)


# ------------------------------------------------------------- the three functions of attention


def before_attention(module, args, kwargs):
    """Find the cache's layer, for attention(), which is told the module but not the cache."""
    module.token_filter_layer = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, TokenFilterCache):
            layer = value.layers[module.layer_idx]
            if module.training:
                raise NotImplementedError("a filter is for inference: call model.eval() first")
            layer.is_announced = True
            layer.position_embeddings = kwargs.get("position_embeddings")
            module.token_filter_layer = layer


def attention(module, query, key, value, attention_mask, **kwargs):
    """The registered attention function: transformers' own where no filtering cache is in use."""
    layer = getattr(module, "token_filter_layer", None)
    if layer is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    is_real = real_tokens(attention_mask, len(key))
    context, mask = layer.take(module, query, key, value, is_real)
    keys, values = context.kv.unbind()
    y, weights = attend(module, query, keys, values, mask[:, None], **kwargs)  # y (B, T, heads, D)
    # A query that sees nothing may have become NaN.
    return y.masked_fill(layer.gets_nothing[..., None, None], 0), weights


def after_attention(module, args, kwargs, output):
    """Tokens that skip attention get nothing from it, nor from its output projection's bias."""
    layer = module.token_filter_layer
    module.token_filter_layer = None
    if layer is None:
        return output
    if layer.is_pending:
        raise RuntimeError(
            "the model's attn_implementation was changed while a TokenFilterCache was in use; "
            "make a new one"
        )
    layer.is_announced = False
    layer.position_embeddings = None
    hidden, *others = output
    return hidden.masked_fill(layer.gets_nothing[..., None], 0), *others


def attend(module, query, key, value, mask, **kwargs):
    """Attention by torch's kernels, or by the model's own plain function with a softcap or sinks of
    logits, which they do not know. mask (B, 1, T, K) bool, or None: causal.
    """
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    T = query.shape[2]
    K = key.shape[2]
    if mask is None:
        mask = torch.ones(T, K, dtype=torch.bool, device=key.device).tril(K - T)[None, None]
    bias = torch.zeros_like(mask, dtype=query.dtype)
    bias = bias.masked_fill(~mask, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, bias, **kwargs)


def real_tokens(attention_mask, B):
    """Which new tokens are no padding, (B, T) bool, or None: all. A token of transformers' mask
    (B or 1, 1, T, T) sees itself unless it is padding.
    """
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.bool:
        raise NotImplementedError("an attention_mask must be (B, tokens) of 1 and 0")
    return attention_mask[:, 0].diagonal(dim1=1, dim2=2).expand(B, -1)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


# ------------------------------------------------------------------------ what people call


class Usage(NamedTuple):
    """What a cache has used so far."""

    pairs: torch.Tensor  # (B,) (token, layer) pairs fed
    redundant: torch.Tensor  # (B,) those of them that were found redundant
    held: torch.Tensor  # (B,) tokens stored, over all layers
    nbytes: int  # bytes allocated, for slots and for what the filter remembers


class TokenFilterCache(Cache):
    """A cache for model.generate(past_key_values=...), and for the model itself.

    It makes the model attend through attention() above, which leaves calls with other caches as
    they are; detach(model) undoes that. Raises NotImplementedError for a model that cannot be
    filtered.
    """

    def __init__(self, model, filter: FilterConfig):
        check_supported(model)
        layers = DynamicCache(config=model.config).layers  # transformers knows which have windows
        filtered = [
            index
            for index, layer in enumerate(layers)
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        ]
        for index, ratio in zip(filtered, layer_ratios(filter, len(filtered))):
            window = getattr(layers[index], "sliding_window", None)
            layers[index] = TokenFilterLayer(filter, index, ratio, window)
        super().__init__(layers=layers)
        install(model, filtered)

    def usage(self) -> Usage:
        layers = [layer for layer in self.layers if isinstance(layer, TokenFilterLayer)]
        layers = [layer for layer in layers if layer.is_initialized]
        pairs = [layer.count.cpu() for layer in layers]
        redundant = [layer.n_redundant.cpu() for layer in layers]
        held = [(layer.stored.positions != EMPTY).sum(1).cpu() for layer in layers]
        nbytes = sum(layer.stored.nbytes() + layer.state.nbytes() for layer in layers)
        return Usage(sum_of(pairs), sum_of(redundant), sum_of(held), nbytes)


def sum_of(counts):
    """The sum of tensors (B,), (0,) where there are none yet."""
    if not counts:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack(counts).sum(0)


def check_supported(model):
    """Raise NotImplementedError, saying why, for a model whose attention cannot be filtered."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if not model._supports_attention_backend or model.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} attends in a way of its own that cannot be filtered")
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise NotImplementedError(f"{name} has chunked attention, which cannot be filtered")
    if getattr(config, "kv_lora_rank", None):
        raise NotImplementedError(f"{name} caches latents (MLA), which cannot be filtered")
    if getattr(config, "num_kv_shared_layers", 0):
        raise NotImplementedError(f"{name} shares keys between layers, which cannot be filtered")


@dataclass
class Installed:
    """What install() and attach() did to a model, for detach() to undo."""

    attn_implementation: str  # as it was before
    handles: list  # of hooks


def install(model, layers):
    """Make the model attend through attention(). layers: the numbers of those that must do so."""
    if getattr(model, "token_filter_installed", None) is None:
        modules = [
            module
            for module in model.modules()
            if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
        ]
        missing = set(layers) - {module.layer_idx for module in modules}
        if missing:
            raise NotImplementedError(
                f"{type(model).__name__} attends in a way of its own in layers {sorted(missing)}"
            )
        installed = Installed(model.config._attn_implementation, handles=[])
        for module in modules:
            before = module.register_forward_pre_hook(before_attention, with_kwargs=True)
            after = module.register_forward_hook(after_attention, with_kwargs=True)
            installed.handles += [before, after]
        model.token_filter_installed = installed
    model.set_attn_implementation(NAME)


def attach(model, filter: FilterConfig):
    """Give every call of the model that begins a text a TokenFilterCache of its own.

    So pipelines, lm_eval's HFLM and other scripts filter without a change. A call's cache is in its
    output, past_key_values. Raises NotImplementedError for a model that cannot be filtered.
    """
    detach(model)
    TokenFilterCache(model, filter)  # checks the model, and makes it attend through attention()
    supply = functools.partial(supply_cache, filter)
    handle = model.register_forward_pre_hook(supply, with_kwargs=True)
    model.token_filter_installed.handles.append(handle)


def supply_cache(filter, model, args, kwargs):
    """Before a call of the model: put a filtering cache in the place of none or of an empty one."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, TokenFilterCache):
        return args, kwargs
    if cache is not None and type(cache) is not DynamicCache:
        raise NotImplementedError(
            f"a filter is attached, which replaces transformers' DynamicCache, but not a "
            f"{type(cache).__name__}: leave cache_implementation alone, or detach(model) first"
        )
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("this cache was filled without the filter: begin with an empty one")
    return args, kwargs | {"past_key_values": TokenFilterCache(model, filter), "use_cache": True}


def detach(model):
    """Leave the model as it was before attach() or its first TokenFilterCache."""
    installed = getattr(model, "token_filter_installed", None)
    if installed is None:
        return
    for handle in installed.handles:
        handle.remove()
    model.set_attn_implementation(installed.attn_implementation)
    model.token_filter_installed = None
