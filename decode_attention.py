"""Attention of a decode step: one query a row, over the first n[b] slots of its row of the cache.

Shapes: B sequences, S slots, H query heads, KVH key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # slots that FlexAttention reads, or leaves out, together


def decode_attention(q, k, v, n, mask=None):
    """One query a row over the slots that it may see.

    q (B, H, D); k, v (B, KVH, S, D); n (B,) int64: row b may see its first n[b] slots; mask (B, S)
    bool: of those, the ones to look at (None: all).
    Returns (B, H, D). Where a query sees nothing, its output means nothing and may be NaN.
    """
    # The query heads that share a key head become queries of that head: (B, KVH, H/KVH, D).
    grouped = q.unflatten(1, (k.shape[1], -1))
    compiling = torch.compiler.is_compiling()
    if q.device.type == "cpu":
        attention = row_by_row_op if compiling else row_by_row
    elif compiling and q.dtype != torch.float64:  # FlexAttention knows no float64
        attention = block_by_block
    else:
        attention = all_slots
    return attention(grouped, k, v, n, mask).flatten(1, 2)


def all_slots(q, k, v, n, mask=None):
    """All rows in one call, which reads every slot: q (B, KVH, H/KVH, D)."""
    visible = torch.arange(k.shape[2], device=k.device) < n[:, None]  # (B, S)
    if mask is not None:
        visible &= mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None])


def row_by_row(q: Tensor, k: Tensor, v: Tensor, n: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each row reads its own slots alone: for the CPU, where a call costs little. 0 where n[b] is
    0.
    """
    lengths = n.tolist()
    longest = max(lengths)
    if min(lengths) > 0.8 * longest:  # hardly any slots to leave out, so all rows in one call
        k = k[:, :, :longest]
        v = v[:, :, :longest]
        if mask is None and min(lengths) == longest:
            return F.scaled_dot_product_attention(q, k, v)
        return all_slots(q, k, v, n, None if mask is None else mask[:, :longest])
    y = torch.zeros_like(q)
    for b, length in enumerate(lengths):
        if length > 0:
            row = slice(b, b + 1)
            visible = None if mask is None else mask[row, None, None, :length]
            y[row] = F.scaled_dot_product_attention(
                q[row], k[row, :, :length], v[row, :, :length], attn_mask=visible
            )
    return y


# The same as one opaque operation: a compiled graph cannot look at lengths.
row_by_row_op = torch.library.custom_op("token_filtering::row_by_row", row_by_row, mutates_args=())
row_by_row_op.register_fake(lambda q, k, v, n, mask=None: torch.empty_like(q))


def block_by_block(q, k, v, n, mask=None):
    """FlexAttention: each row reads the blocks of slots below n[b] alone. 0 where n[b] is 0."""
    B, KVH, group, D = q.shape
    n_slots = k.shape[2]
    n_blocks = (n_slots + BLOCK - 1) // BLOCK
    block = torch.arange(n_blocks, dtype=torch.int32, device=k.device)

    # The first blocks of a row are full: all their slots can be seen. The next ones are partial:
    # FlexAttention asks `visible` for each of their slots.
    if mask is None:
        n_full = (n // BLOCK).to(torch.int32)
    else:
        n_full = torch.zeros_like(n).to(torch.int32)
    n_used = ((n + BLOCK - 1) // BLOCK).to(torch.int32)
    n_partial = n_used - n_full
    full = block.expand(B, n_blocks).contiguous()
    partial = (n_full[:, None] + block).clamp(max=n_blocks - 1)

    def visible(b, h, query, slot):
        if mask is None:
            return slot < n[b]
        return (slot < n[b]) & mask[b, slot]

    blocks = BlockMask.from_kv_blocks(
        n_partial.view(B, 1, 1),
        partial[:, None, None],
        n_full.view(B, 1, 1),
        full[:, None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(1, n_slots),
        compute_q_blocks=False,
    )
    query = q.reshape(B, KVH * group, 1, D)
    y = flex_attention(query, k, v, block_mask=blocks, enable_gqa=group > 1)
    return y.view(B, KVH, group, D)
