"""The KV cache of a decoder whose layers filter tokens: each layer stores other tokens.

In each layer a token is either *redundant* or *kept*. The mode says what a redundant token attends
to:
    skip    nothing
    local   the first tokens (sinks) and the latest ones (recent) only
    cache   all that is stored, like a kept token
In all three a redundant token is stored only while it is one of the recent tokens: the latest one
and the filter.recent before it. Sinks are never redundant.

Read LayerCache first: its docstring says where a token is stored. A decode step uses `append`. A
prompt uses `context`, `visible` and `rebuild`.

Shapes: B sequences, T new tokens, N real ones among the B * T (the rest is padding), S slots of a
layer's cache, K columns of a context (see Context), L layers, KVH key/value heads, D head size, R
channels of a head that RoPE rotates.

A token's *position* counts from the start of its sequence; its *slot* is where a layer stores it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from filter_config import FilterConfig, layer_ratios
from token_filter import FilterState, token_filter

EMPTY = -1  # the position of a slot without a token
NO_WINDOW = 2**62  # a sliding window longer than any text
UNLIMITED = 2**62  # more steps than any text has
DROPPED = 2**62  # a sort key that comes after every slot
SPARE_SLOTS = 32  # slots, at least, by which a layer's cache grows

# The columns of KVCache.usage(), which explains them.
USAGE = ("pairs", "redundant", "held", "read", "dense_read")


class Packing:
    """Where the tokens of a right-padded (B, T) grid are: `unpad` picks them, `pad` puts them back.

    For lengths [3, 1] and T = 3, with x for padding:
        pad    [[a, b, c], [d, x, x]]
        unpad  [a, b, c, d]
    Linear layers run on the N packed tokens, so that padding costs them nothing. The filter and
    attention work on the padded grid.
    """

    def __init__(self, lengths, T, device):
        """lengths (B,) int64, on the host: row b holds tokens in its first lengths[b] columns."""
        holds_token = torch.arange(T) < lengths[:, None]
        self.shape = holds_token.shape
        self.index = holds_token.flatten().nonzero()[:, 0].to(device)  # (N,)
        self.is_full = len(self.index) == holds_token.numel()

    def unpad(self, x):
        """(B, T, ...) -> (N, ...)"""
        flat = x.flatten(0, 1)
        return flat if self.is_full else flat[self.index]

    def pad(self, x, fill=0):
        """(N, ...) -> (B, T, ...), with `fill` at padding."""
        if self.is_full:
            return x.unflatten(0, self.shape)
        padded = x.new_full((math.prod(self.shape), *x.shape[1:]), fill)
        padded[self.index] = x
        return padded.unflatten(0, self.shape)


@dataclass
class DecodeStep:
    """One new token in every row, N = B."""

    position: torch.Tensor  # (B,) of the token in its sequence
    near_slot: torch.Tensor  # (B,) where a layer that filters puts it
    near_filled: torch.Tensor  # (B,) how many near slots hold tokens after this step
    row: torch.Tensor  # (B,) 0 .. B-1
    cos: torch.Tensor | None = None  # (B, 1, R), set by the model: see model.rope_table
    sin: torch.Tensor | None = None
    lengths: None = None  # unlike a PrefillChunk: every row has one token

    def by_row(self, x):
        """(N, ...) -> (B, 1, ...)"""
        return x[:, None]


@dataclass
class PrefillChunk:
    """Up to T new tokens in every row, right-padded."""

    position: torch.Tensor  # (B, T) of each token in its sequence
    lengths: torch.Tensor  # (B,) how many of a row's T tokens are real, on the device
    host_lengths: torch.Tensor  # (B,) the same on the host
    longest: int  # how many tokens the longest row has with these
    packing: Packing
    # The number of tokens before this chunk, if it is the same in every row and no row is padded
    # now; else None. A layer that stores all tokens can then use a causal attention kernel.
    n_before: int | None
    cos: torch.Tensor | None = None  # (N, 1, R), set by the model: see model.rope_table
    sin: torch.Tensor | None = None

    def by_row(self, x):
        """(N, ...) -> (B, T, ...), 0 at padding"""
        return self.packing.pad(x)


@dataclass
class Context:
    """Prefill: the keys and values that a chunk's queries look at.

    Its K columns are the far slots, the near slots and the new tokens. (In the cache near slots
    come first. Here far ones do, so that without_far() is a slice.) Which columns a query sees,
    LayerCache.visible() says.
    """

    kv: torch.Tensor  # (2, B, KVH, K, D): keys, values
    positions: torch.Tensor  # (B, K), EMPTY where there is no token
    kept: torch.Tensor  # (B, K) bool: not redundant
    n_far_columns: int  # how many of the K columns are far slots

    def without_far(self):
        """What a redundant token may see in mode "local": sinks and recent tokens.

        With no token kept, visible() shows those two kinds only.
        """
        kv = self.kv[:, :, :, self.n_far_columns :]
        positions = self.positions[:, self.n_far_columns :]
        none_kept = torch.zeros_like(positions, dtype=torch.bool)
        return Context(kv, positions, none_kept, n_far_columns=0)


@dataclass
class Decisions:
    """What one layer decided about the tokens of the model's latest call: see KVCache.decisions."""

    redundant: torch.Tensor  # (B, T) bool; False at padding
    score: torch.Tensor  # (B, T); NaN at padding, and everywhere in a layer that does not filter
    # (B, T, 2, KVH) similarity of keys and of values, by head; with fusion "key-query" (B, T, 3,
    # KVH), the last of keys to queries.
    cosine: torch.Tensor | None
    w_k: torch.Tensor | None  # (B, T) the weight of the keys' side; None with fusion "key-query"


def near_slot(position, n_sinks, ring_size):
    """The slot that a token has, or had, among sinks and ring.

    ring_size is 0 in a layer that does not filter, which has no use for the result.
    """
    in_ring = n_sinks + (position - n_sinks) % max(ring_size, 1)
    return torch.where(position < n_sinks, position, in_ring)


class LayerCache:
    """What one layer remembers of B sequences. A row's slots are, in this order:

        sinks   the first n_sinks tokens: token t in slot t
        ring    the recent tokens, kept or redundant: the latest one and the filter.recent before
                it, so ring_size = recent + 1; token t in slot n_sinks + (t - n_sinks) mod ring_size
        far     the tokens that left the ring and were kept, oldest first (under a sliding window
                these slots are a ring too, of the window's size)

    Sinks and ring are the *near* slots. With 2 sinks, recent = 2, and token 4 redundant, they hold

        after token 4    0 1 | 2 3 4 |        the ring is full
        after token 5    0 1 | 5 3 4 | 2      5 took the slot of 2, which was kept: it is far now
        after token 6    0 1 | 5 6 4 | 2 3    6 took the slot of 3, which was kept too
        after token 7    0 1 | 5 6 7 | 2 3    7 took the slot of 4, which was redundant: it is gone

    So whatever a query may see is the first n slots of its row: none for a redundant token in mode
    skip, the filled near slots for a redundant token in mode local, all filled slots for any other.
    That is why decode needs no mask. Only a sliding window needs one, since it hides tokens within
    those n, sinks included. And a decode step moves one token at most.

    In a layer that does not filter (ratio 0) there are no near slots, and every token is far.
    Each row has one slot more than it can fill, for a copy that nobody sees: see _leave_ring.
    """

    def __init__(
        self, config, B, layer, ratio, filter, n_sinks, filter_fn, sum_over_devices, dtype, device
    ):
        self.filter = filter
        self.filter_fn = filter_fn
        self.filters = ratio > 0
        self.ratio = ratio
        self.window = config.window or NO_WINDOW
        self.n_sinks = n_sinks if self.filters else 0
        self.ring_size = filter.recent + 1 if self.filters else 0
        self.n_near = self.n_sinks + self.ring_size
        self.max_slots = self.n_near + self.window  # no row ever fills more

        n_slots = max(self.n_near, SPARE_SLOTS) + 1
        kv_shape = (2, B, config.kv_heads, n_slots, config.head_dim)
        self.kv = torch.zeros(kv_shape, dtype=dtype, device=device)
        self.positions = torch.full((B, n_slots), EMPTY, device=device)
        # Which near slots hold kept tokens.
        self.kept = torch.zeros(B, self.n_near, dtype=torch.bool, device=device)
        # How many far tokens there are. Under a window this counts on when the oldest ones are
        # overwritten, until the next rebuild().
        self.n_far = torch.zeros(B, dtype=torch.int64, device=device)

        # Counted for usage(): redundant tokens, and slots that queries have read, (B,) each.
        self.n_redundant = torch.zeros_like(self.n_far)
        self.n_read = torch.zeros_like(self.n_far)

        # Of the latest chunk, (B, T) each. KVCache.decisions() is the place to look at them.
        self.redundant: torch.Tensor | None = None
        self.score: torch.Tensor | None = None

        self.state: FilterState | None = None
        self.ratio_tensor: torch.Tensor | None = None
        if self.filters:
            exact = torch.promote_types(dtype, torch.float32)
            self.state = FilterState(
                B, config.kv_heads, config.head_dim, filter, layer, exact, device, sum_over_devices
            )
            # A tensor, since a number would have torch.compile compile each layer anew.
            self.ratio_tensor = torch.full((), ratio, dtype=torch.float64, device=device)

    def find_redundant(self, k, v, lengths, q=None):
        """Run the filter: k, v, q (B, T, KVH, D), lengths as in token_filter -> (B, T) bool."""
        redundant, score = self.filter_fn(
            k, v, lengths, self.state, self.ratio_tensor, self.filter, q
        )
        self.n_redundant += redundant.sum(1)
        self.redundant = redundant
        self.score = score
        return redundant

    # ---------------------------------------------------------------------------------- decode

    def append(self, k, v, redundant, step: DecodeStep):
        """Store one token a row, and say what its query may see.

        k, v (B, KVH, D); redundant (B,) bool, or None in a layer that does not filter.

        Returns two things: the number of slots that each query may see, (B,) int64, always the
        first ones of its row; and, under a sliding window only, which of those are within it, (B,
        S) bool (else None).
        """
        near_filled: torch.Tensor | int = 0
        if redundant is None:
            slot = self.n_far % self.window  # before this token is counted
            self.n_far += 1
        else:
            slot = step.near_slot
            near_filled = step.near_filled
            self._leave_ring(slot, near_filled, step)
            self.kept[step.row, slot] = ~redundant
        # Two index tensors with a slice between them: torch puts their dimension first, (B, 2,
        # ...).
        self.kv[:, step.row, :, slot] = torch.stack((k, v), dim=1)
        self.positions[step.row, slot] = step.position

        # In mode "cache" a redundant token sees as much as a kept one.
        n_far = self.n_far.clamp(max=self.window)
        if redundant is not None and self.filter.mode == "local":
            n_far = n_far.masked_fill(redundant, 0)
        n_visible = near_filled + n_far
        if redundant is not None and self.filter.mode == "skip":
            n_visible = n_visible.masked_fill(redundant, 0)

        if self.window == NO_WINDOW:
            self.n_read += n_visible
            return n_visible, None
        in_window = self.positions > step.position[:, None] - self.window
        first_n = torch.arange(in_window.shape[1], device=k.device) < n_visible[:, None]
        self.n_read += (in_window & first_n).sum(1)
        return n_visible, in_window

    def _leave_ring(self, slot, near_filled, step: DecodeStep):
        """The token in `slot`, if there is one, gives way. If it was kept, it becomes a far token.

        It is copied to the next far slot in any case, so that the host need not know whether it was
        kept. If it was not, n_far stays as it is, so the next copy overwrites this one. Its
        position is EMPTY. Nobody sees it: it lies behind the filled slots, or, where a window's far
        slots are all in use, in the place of a token that the window hides already.
        """
        was_kept = self.kept[step.row, slot]
        far_slot = near_filled + self.n_far % self.window
        self.kv[:, step.row, :, far_slot] = self.kv[:, step.row, :, slot]
        position = self.positions[step.row, slot]
        self.positions[step.row, far_slot] = position.masked_fill(~was_kept, EMPTY)
        self.n_far += was_kept

    # --------------------------------------------------------------------------------- prefill

    def is_causal(self, chunk: PrefillChunk) -> bool:
        """Whether every query sees all tokens up to its own, so that attention needs no mask."""
        return not self.filters and self.window == NO_WINDOW and chunk.n_before is not None

    def context(self, k, v, redundant, chunk: PrefillChunk) -> Context:
        """All that new tokens may be able to see: k, v (B, T, KVH, D), redundant (B, T) or None."""
        new_kv = torch.stack((k, v)).transpose(2, 3)  # (2, B, KVH, T, D)
        # For a causal kernel just the filled slots, so that K = n_before + T.
        n_slots = chunk.n_before if self.is_causal(chunk) else self.positions.shape[1]
        kv = self.kv[:, :, :, :n_slots]
        positions = self.positions[:, :n_slots]
        near_kv, far_kv = kv.tensor_split((self.n_near,), dim=3)
        near_positions, far_positions = positions.tensor_split((self.n_near,), dim=1)

        is_real = torch.arange(k.shape[1], device=k.device) < chunk.lengths[:, None]
        new_positions = chunk.position.masked_fill(~is_real, EMPTY)
        new_kept = is_real if redundant is None else is_real & ~redundant
        return Context(
            kv=torch.cat((far_kv, near_kv, new_kv), dim=3),
            positions=torch.cat((far_positions, near_positions, new_positions), dim=1),
            kept=torch.cat((far_positions != EMPTY, self.kept, new_kept), dim=1),
            n_far_columns=far_positions.shape[1],
        )

    def visible(self, query, context: Context):
        """Which columns queries see: positions (B, T'), EMPTY at padding -> (B, T', K) bool."""
        query = query[..., None]  # (B, T', 1)
        token = context.positions[:, None]  # (B, 1, K)
        is_sink = token < self.n_sinks
        is_recent = token > query - self.ring_size
        is_kept = context.kept[:, None]
        mask = (token != EMPTY) & (token <= query) & (is_sink | is_recent | is_kept)
        if self.window < NO_WINDOW:
            mask &= token > query - self.window
        return mask

    def rebuild(self, context: Context, chunk: PrefillChunk):
        """Lay the slots out anew after a chunk, in the order that LayerCache's docstring gives.

        What stays are the sinks, the ring, and the kept tokens within the window.
        """
        position = context.positions
        end = (chunk.position[:, 0] + chunk.lengths)[:, None]  # the position of the next token
        is_near = (position < self.n_sinks) | (position >= end - self.ring_size)
        is_far = context.kept & (position >= end - self.window)
        stays = (position != EMPTY) & (is_near | is_far)

        # The tokens that stay are sorted: near ones by their slot, then far ones by position.
        own_slot = near_slot(position, self.n_sinks, self.ring_size)
        sort_key = torch.where(is_near, own_slot, self.n_near + position)
        sort_key = sort_key.masked_fill(~stays, DROPPED)
        n_stay = stays.sum(1)
        if self.filters:
            most = int(n_stay.max().cpu())  # waits for the device
        else:
            # The latest `window` tokens stay, a number that the host knows.
            most = min(chunk.longest, self.window)
        n_slots = max(most, self.n_near) + 1
        # Where in the context each slot's token is, (B, S).
        order = sort_key.argsort(1)[:, :n_slots]
        # The context may be one column too short, as the last slot holds no token: repeat any.
        order = F.pad(order, (0, n_slots - order.shape[1]))
        is_filled = torch.arange(n_slots, device=order.device) < n_stay[:, None]
        _, B, KVH, _, D = self.kv.shape
        self.kv = context.kv.gather(3, order[:, None, :, None].expand(2, B, KVH, n_slots, D))
        self.positions = position.gather(1, order).masked_fill(~is_filled, EMPTY)
        kept = context.kept.gather(1, order[:, : self.n_near])
        self.kept = kept & is_filled[:, : self.n_near]
        self.n_far = (n_stay - self.n_near).clamp(min=0)

    # ------------------------------------------------------------------------------------ slots

    def free_slots(self, n_used):
        """The number of decode steps that there are slots for, if `n_used` are filled."""
        n_slots = self.positions.shape[1] - 1  # the last one stays empty
        if n_slots >= self.max_slots:
            return UNLIMITED  # slots are used again and again
        return n_slots - n_used

    def capacity_for(self, n_used, n_more):
        """How many slots to have when n_used are filled and n_more tokens are known to follow.

        n_more = 0 means that nothing is known. In a layer that does not filter all tokens need a
        slot. In one that filters about a share 1 - ratio does; a few slots more are for the case
        that fewer tokens than expected are redundant.
        """
        if n_more == 0:
            growth = max(n_used // 8, SPARE_SLOTS)
        elif not self.filters:
            growth = n_more
        else:
            growth = math.ceil((1 - self.ratio) * n_more) + SPARE_SLOTS // 2
        return max(min(n_used + growth, self.max_slots), self.n_near) + 1

    def resize(self, n_slots):
        """Grow or cut each row to n_slots slots. Tokens stay where they are."""
        extra = n_slots - self.positions.shape[1]  # a negative number cuts
        self.kv = F.pad(self.kv, (0, 0, 0, extra))
        self.positions = F.pad(self.positions, (0, extra), value=EMPTY)

    def select(self, rows, n_slots):
        """Keep these rows, an int64 tensor, in this order, and at most n_slots slots of each."""
        self.kv = self.kv[:, rows, :, :n_slots]
        self.positions = self.positions[rows, :n_slots]
        self.kept = self.kept[rows]
        self.n_redundant = self.n_redundant[rows]
        self.n_read = self.n_read[rows]
        self.redundant = None
        self.score = None
        if self.state is not None:
            self.state.select(rows)

    def nbytes(self) -> int:
        tensors = (self.kv, self.positions, self.kept, self.n_far, self.n_redundant, self.n_read)
        of_state = 0 if self.state is None else self.state.nbytes()
        return sum(tensor.nbytes for tensor in tensors) + of_state


class KVCache:
    """All that a model remembers of B sequences. Transformer.new_cache makes it.

    filter    the FilterConfig of all layers; prune 0 means that nothing is filtered
    lengths   (B,) int64, on the host: how many tokens each row has had so far
    position  (B,) the same on the device: the position of each row's next token
    layers    a LayerCache for each layer

    Memory, in each layer:
        a new cache      as many slots as there are near ones, SPARE_SLOTS at least
        a prompt's chunk for a while, old slots and new tokens side by side; then as many slots as
                         the row that fills most needs
        a decode step    nothing, but when a layer has no free slot: then all are resized, for what
                         is known to follow (`length`), else by an eighth, SPARE_SLOTS at least
                         (the first step after a prompt or select() always looks)
        select()         frees the rows that it leaves out
    """

    def __init__(
        self,
        config,
        B,
        filter: FilterConfig | None = None,
        filter_fn: Callable = token_filter,
        length: int = 0,
        dtype=torch.float32,
        device="cpu",
        sum_over_devices: Callable | None = None,
    ):
        self.config = config
        self.filter = filter or FilterConfig(prune=0.0)
        self.filter_fn = filter_fn
        self.window = config.window or NO_WINDOW
        self.n_sinks = min(self.filter.n_sinks, config.max_positions)
        # How many tokens a row will have in the end, 0 if unknown.
        self.length = length
        self.lengths = torch.zeros(B, dtype=torch.int64)
        self.position = self.lengths.to(device, copy=True)
        self.latest_T = 0  # columns of the latest chunk
        # K and V of one token in one layer, in bytes.
        self.slot_bytes = 2 * config.kv_heads * config.head_dim * dtype.itemsize
        self.layers = [
            LayerCache(
                config,
                B,
                layer,
                ratio,
                self.filter,
                self.n_sinks,
                filter_fn,
                sum_over_devices,
                dtype,
                device,
            )
            for layer, ratio in enumerate(layer_ratios(self.filter, config.n_layers))
        ]
        # Decode steps until reserve() must look again whether there are slots.
        self.free_steps = SPARE_SLOTS
        # For runtime/cuda_graph.py: decode steps since a tensor of the cache was replaced by
        # another,
        self.n_steps = 0
        # and a recording of such a step, which knows the addresses of the tensors.
        self.recorded_step: Callable | None = None

    def begin_decode(self) -> DecodeStep:
        """One more token in each row. Takes nothing from the host, so that it can be recorded."""
        ring_size = self.filter.recent + 1
        return DecodeStep(
            position=self.position,
            near_slot=near_slot(self.position, self.n_sinks, ring_size),
            near_filled=(self.position + 1).clamp(max=self.n_sinks + ring_size),
            row=torch.arange(len(self.position), device=self.position.device),
        )

    def begin_prefill(self, lengths, T) -> PrefillChunk:
        """Count lengths (B,) more tokens, int64 on the host, in T columns; say where they stand."""
        device = self.position.device
        packing = Packing(lengths, T, device)
        n_before = int(self.lengths[0])
        is_even = packing.is_full and bool((self.lengths == n_before).all())
        chunk = PrefillChunk(
            position=self.position[:, None] + torch.arange(T, device=device),
            lengths=lengths.to(device),
            host_lengths=lengths,
            longest=int((self.lengths + lengths).max()),
            packing=packing,
            n_before=n_before if is_even else None,
        )
        self.lengths = self.lengths + lengths
        self.position = self.position + chunk.lengths
        self.latest_T = T
        self._tensors_replaced()
        return chunk

    def _tensors_replaced(self):
        self.free_steps = 0
        self.n_steps = 0
        self.recorded_step = None

    # ------------------------------------------------------------------------------------ slots

    def used_slots(self) -> list[int]:
        """How many slots are filled, in each layer, in the row that fills most. Waits for the
        device.
        """
        longest = max(self.lengths.tolist(), default=0)
        # A 0 is appended, as the cache may have no rows.
        n_far = torch.stack([F.pad(layer.n_far, (0, 1)).max() for layer in self.layers])
        return [
            min(longest, layer.n_near) + min(n, self.window)
            for layer, n in zip(self.layers, n_far.cpu().tolist())
        ]

    def wanted_slots(self, used_slots) -> list[int]:
        """How many slots each layer should have for what is known to follow."""
        longest = max(self.lengths.tolist(), default=0)
        n_more = max(self.length - longest, 0)
        return [layer.capacity_for(n, n_more) for layer, n in zip(self.layers, used_slots)]

    def reserve(self):
        """Before a decode step: see to it that every layer has slots for some more steps.

        Waits for the device, to learn how many slots are filled, and adds slots only if needed.
        """
        used = self.used_slots()
        if self.possible_steps(used) < 1:
            for layer, n_slots in zip(self.layers, self.wanted_slots(used)):
                layer.resize(n_slots)
            self._tensors_replaced()
        self.free_steps = self.possible_steps(used)

    def possible_steps(self, used_slots) -> int:
        """For how many decode steps every layer has slots, whatever is kept."""
        return min(layer.free_slots(n) for layer, n in zip(self.layers, used_slots))

    @torch.inference_mode()
    def select(self, rows):
        """Keep these rows, a list or an int64 tensor, in this order; a row named twice is copied.

        So finished rows leave the batch, and a prompt that several rows share is fed once.
        """
        rows = torch.as_tensor(rows, dtype=torch.int64)
        on_device = rows.to(self.position.device)
        self.lengths = self.lengths[rows.cpu()]
        self.position = self.position[on_device]
        for layer in self.layers:
            layer.n_far = layer.n_far[on_device]  # first, since used_slots() looks at these
        for layer, n_slots in zip(self.layers, self.wanted_slots(self.used_slots())):
            layer.select(on_device, n_slots)
        self._tensors_replaced()

    # ---------------------------------------------------------------------------- what it did

    def decisions(self) -> list[Decisions]:
        """What each layer decided about the tokens of the model's latest call, for whoever looks.

        The share of redundant tokens of that call, by layer, in a batch without padding:
            [decided.redundant.float().mean().item() for decided in cache.decisions()]
        Over all calls so far: redundant_share(). After select() nothing is known of a latest call:
        then no token is redundant, and all scores are NaN, as in layers that do not filter.
        """
        B = len(self.position)
        shape = (B, self.latest_T)
        device = self.position.device
        all_decisions = []
        for layer in self.layers:
            if layer.redundant is None or layer.score is None or layer.state is None:
                all_false = torch.zeros(shape, dtype=torch.bool, device=device)
                all_nan = torch.full(shape, math.nan, device=device)
                decisions = Decisions(all_false, all_nan, None, None)
            else:
                state = layer.state
                decisions = Decisions(
                    layer.redundant, layer.score, state.latest_cosine, state.latest_w_k
                )
            all_decisions.append(decisions)
        return all_decisions

    def redundant_share(self):
        """The share of each row's tokens so far that each layer found redundant: (L, B) float64."""
        n_redundant = torch.stack([layer.n_redundant for layer in self.layers])
        return n_redundant.double() / self.position.clamp(min=1)

    def usage(self):
        """What each row has used so far: (B, 5) int64 on the host, with columns named in USAGE:

        pairs       (token, layer) pairs fed
        redundant   those of them that were found redundant
        held        slots in use: not empty, and not outside a sliding window by now
        read        slots that all queries so far have read
        dense_read  slots that a dense model's queries would have: min(t + 1, window) at position t
        """
        n_layers = len(self.layers)
        redundant = torch.stack([layer.n_redundant for layer in self.layers]).sum(0)
        read = torch.stack([layer.n_read for layer in self.layers]).sum(0)
        # Slots that hold an older position are empty (-1), or hold what the window hides by now.
        oldest = (self.position - self.window).clamp(min=0)[:, None]
        held = torch.stack([(layer.positions >= oldest).sum(1) for layer in self.layers]).sum(0)
        redundant, held, read = torch.stack((redundant, held, read)).cpu()

        n = self.lengths
        # The sum of min(t + 1, window) over positions t: first a triangle, then a rectangle.
        in_window = n.clamp(max=self.window)
        dense_read = in_window * (in_window + 1) // 2 + (n - in_window) * in_window
        return torch.stack((n_layers * n, redundant, held, read, n_layers * dense_read), dim=1)

    def nbytes(self) -> int:
        """Bytes allocated: the slots, and all that the filter remembers."""
        return sum(layer.nbytes() for layer in self.layers)

    def live_bytes(self) -> int:
        """Bytes in use: nbytes() less slots that hold nothing, or what a window hides by now."""
        n_slots = sum(layer.positions.numel() for layer in self.layers)
        n_held = int(self.usage()[:, USAGE.index("held")].sum())
        return self.nbytes() - (n_slots - n_held) * (self.slot_bytes + self.position.itemsize)
