"""A model on several devices: torchrun --nproc-per-node N generate.py CHECKPOINT ..., one process (rank) for each.

Every rank has 1/N of the query and key/value heads and of the MLP's columns, so 1/N of those weights and of the cache, and takes part in
two sums a layer: of what attention, and of what the MLP adds to the residual stream, which so is the same everywhere, bit for bit. The
filter needs all heads: the ranks add up the sums of its cosines, and all take the same decision. The output's rows are divided too,
and put together, so every rank has the same logits and chooses the same token. Rank 0 speaks for all (command_line.py).
"""

import math
import os
import time
from contextlib import suppress
from dataclasses import replace

from command_line import RANK, RANKS

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from model import Linear, ModelConfig, Transformer
from token_filter import FilterState

STORE: list[dist.Store] = []  # what all ranks can write to, once they have met


def meet(device: torch.device):
    """Join the other ranks, with NCCL on CUDA, with gloo on the CPU."""
    if not STORE:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # which "cuda" then means
        store, rank, size = next(rendezvous("env://"))
        STORE.append(store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)


def leave():
    """Part from them at the end: a process that only ends may be aborted by threads that still run."""
    if STORE:
        dist.destroy_process_group()


def first_to_fail() -> bool:
    """Whether no other rank has said why all of them end."""
    with suppress(RuntimeError):  # the store may be gone
        return STORE[0].add("failed", 1) == 1 if STORE else RANK == 0
    return True


def divided(config: ModelConfig) -> Transformer:
    """The model of one rank's part. Raises ValueError where there are no equal parts."""
    if RANKS == 1:
        return Transformer(config)
    common = math.gcd(config.kv_heads, config.mlp_width)
    if common % RANKS:
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(f"its {config.kv_heads} key/value heads cannot be divided by {RANKS}: --nproc-per-node may be {fitting}")
    heads, kv_heads, mlp_width = (n // RANKS for n in (config.heads, config.kv_heads, config.mlp_width))
    model = Transformer(replace(config, heads=heads, kv_heads=kv_heads, mlp_width=mlp_width))
    if config.vocab_size % RANKS == 0 and not config.tied:  # else every rank has all of the output, as of the embedding
        model.head = Linear(config.width, config.vocab_size // RANKS, bias=False)
    return model


def part(whole: torch.Size, own: torch.Size, row=0) -> tuple[slice, ...]:
    """Where this rank's part of a weight lies in a tensor that has the weight from a row on, given the shapes of weight and part."""
    starts = (RANK * n if n < full else 0 for full, n in zip(whole, own))
    return tuple(slice(start + row * (not i), start + row * (not i) + n) for i, (start, n) in enumerate(zip(starts, own)))


class Summed(nn.Module):
    """A projection of which each rank has some columns: the sum over all ranks."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        if RANK and linear.bias is not None:  # is added once
            linear.register_parameter("bias", None)

    def forward(self, x):
        y = self.linear(x)
        dist.all_reduce(y)
        return y


class Joined(nn.Module):
    """A projection of which each rank has some rows: all of them, side by side."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        own = self.linear(x)
        parts = own.new_zeros(RANKS, *own.shape)
        parts[RANK] = own
        dist.all_reduce(parts)
        return parts.movedim(0, -2).flatten(-2)


def var_mean(cosine):
    """Population variance and mean over the heads of all ranks; added in float64, where a difference of squares is exact enough."""
    sums = torch.stack((cosine.double().sum(-1), cosine.double().square().sum(-1)))
    dist.all_reduce(sums)
    mean, square = sums / (RANKS * cosine.shape[-1])
    return (square - mean.square()).clamp(min=0).to(cosine.dtype), mean.to(cosine.dtype)


def seconds_of_sums(model: Transformer, B) -> float:
    """What the sums of a dense step of B rows take, alone."""
    x = model.embed.weight.new_zeros(B, model.config.width)
    started = time.perf_counter()
    for _ in range(2 * len(model.blocks)):
        dist.all_reduce(x)
    x.sum().item()  # waits for the device
    return time.perf_counter() - started


def join(model: Transformer):
    """Make what divided() gave, with its weights, one part of the whole model."""
    for block in model.blocks:
        for module, name in ((block.attn, "o"), (block.mlp, "down")):
            setattr(module, name, Summed(getattr(module, name)))
    if model.head.out_features < model.config.vocab_size:
        setattr(model, "head", Joined(model.head))  # noqa: B010
    FilterState.var_mean = staticmethod(var_mean)
