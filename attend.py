"""Attention of a decode step: one query a row, over the first n[b] slots of its row of the cache. Shapes: B sequences, S slots,
H query heads, KVH key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # slots that compiled attention reads, or leaves out, together


def attend(q, k, v, n, mask=None):
    """One query a row over the first n[b] slots of its row: q (B, H, 1, D); k, v (B, KVH, S, D); n (B,) int64; mask (B, S) bool: of
    those slots, the ones to look at. Returns (B, H, 1, D), where n[b] is 0 anything, NaN included.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and q.device.type != "cpu" and q.dtype != torch.float64:  # which FlexAttention does not know
        return attend_compiled(q, k, v, n, mask)
    way = attend_masked if q.device.type != "cpu" else attend_rows_op if compiling else attend_rows
    return way(q.view(len(q), k.shape[1], -1, q.shape[3]), k, v, n, mask).reshape(q.shape)


def attend_masked(q, k, v, n, mask=None):
    """In one call, which reads all slots: q (B, KVH, H/KVH, D), the heads that share k, v as queries of one, so that it reads them once."""
    seen = n.view(-1, 1, 1, 1) > torch.arange(k.shape[2], device=k.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen if mask is None else seen & mask[:, None, None])


def attend_rows(q: Tensor, k: Tensor, v: Tensor, n: Tensor, mask: Tensor | None = None) -> Tensor:
    """On the CPU: all rows at once if about as long, else by twos of like length, which keeps more threads busy; 0 where n[b] is 0."""
    y, lengths = torch.zeros_like(q), n.tolist()
    order = sorted((b for b, length in enumerate(lengths) if length), key=lengths.__getitem__)
    groups: list = [sorted(order[i : i + 2]) for i in range(0, len(order), 2)]
    if min(lengths) > 0.8 * max(lengths):
        groups = [range(len(lengths))]
    for group in groups:
        rows = slice(group[0], group[-1] + 1, max(1, group[-1] - group[0]) if len(group) == 2 else 1)  # any two rows are a view
        S, part = max(lengths[b] for b in group), None if mask is None else mask[rows]
        if part is None and S == min(lengths[b] for b in group):
            y[rows] = F.scaled_dot_product_attention(q[rows], k[rows, :, :S], v[rows, :, :S])
        else:
            y[rows] = attend_masked(q[rows], k[rows, :, :S], v[rows, :, :S], n[rows], None if part is None else part[:, :S])
    return y


attend_rows_op = torch.library.custom_op("token_filtering::attend_rows", attend_rows, mutates_args=())  # as a part of a compiled graph
attend_rows_op.register_fake(lambda q, k, v, n, mask=None: torch.empty_like(q))


def attend_compiled(q, k, v, n, mask=None):
    """With FlexAttention: of a row's blocks of slots those below n[b] are read, and no others."""
    block = torch.arange((k.shape[2] + BLOCK - 1) // BLOCK, dtype=torch.int32, device=k.device)
    n_full = (n // BLOCK if mask is None else torch.zeros_like(n)).to(torch.int32)  # blocks that need no look at single slots,
    n_part = ((n + BLOCK - 1) // BLOCK).to(torch.int32) - n_full  # and those that do: which, in the first n_part[b] of a row
    part, full = (n_full[:, None] + block).clamp(max=len(block) - 1), block.expand(len(n), len(block)).contiguous()
    seen = (lambda b, h, i, s: s < n[b]) if mask is None else (lambda b, h, i, s: (s < n[b]) & mask[b, s])
    blocks = BlockMask.from_kv_blocks(n_part.view(-1, 1, 1), part[:, None, None], n_full.view(-1, 1, 1), full[:, None, None],
                                      BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(1, k.shape[2]), compute_q_blocks=False)  # fmt: skip
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] > k.shape[1])
