"""Attention of a decode step: one query a row, over the first n[b] slots of its row of the cache. One function for every device.

Shapes: B sequences, S slots, H query heads, KVH key/value heads, D head size.
"""

from functools import partial

import torch
import torch.nn.functional as F


def attend_masked(q, k, v, n, mask=None):
    """One query a row over the first n[b] slots of its row: q (B, KVH, H/KVH, D), the query heads that share a key/value head
    being queries of one head, so that k, v are read once; k, v (B, KVH, S, D); n (B,) int64; mask (B, S) bool: of those slots,
    the ones to look at. Returns (B, KVH, H/KVH, D), where n[b] is 0 anything, NaN included.
    """
    seen = n.view(-1, 1, 1, 1) > torch.arange(k.shape[2], device=k.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen if mask is None else seen & mask[:, None, None])


def attend_varlen(varlen_attn, q, k, v, n, mask=None):
    """The same on a GPU, where nothing but these slots is read: every (row, key/value head) is a sequence of its own."""
    if mask is not None:
        return attend_masked(q, k, v, n, mask)
    B, heads, S, D = k.shape
    starts = torch.arange(B * heads + 1, dtype=torch.int32, device=k.device)  # each has one query, and S slots
    used = n.to(torch.int32)[:, None].expand(B, heads).reshape(-1)
    q, k, v = q.flatten(0, 1), k.view(-1, 1, D), v.view(-1, 1, D)
    return varlen_attn(q, k, v, starts, starts * S, 1, S, enable_gqa=True, seqused_k=used).unflatten(0, (B, heads))


@torch.library.custom_op("token_filtering::attend_rows", mutates_args=())  # so that it can be part of a compiled graph
def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The same on the CPU: all rows at once if they are about as long, otherwise by twos of about the same length, which keeps
    more threads busy than one row; a row with n[b] = 0 is left out, and gets 0.
    """
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


attend_rows.register_fake(lambda q, k, v, n, mask=None: torch.empty_like(q))


def attention_for(device, dtype):
    """The one of these that is best there."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and torch.__version__ >= "2.12":  # the first with seqused_k
        from torch.nn.attention.varlen import varlen_attn  # takes a second to import

        return partial(attend_varlen, varlen_attn)
    return attend_rows if device.type == "cpu" else attend_masked
