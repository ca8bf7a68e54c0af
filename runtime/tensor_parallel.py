"""A model on several devices: torchrun --nproc-per-node N generate.py CHECKPOINT ...

torchrun starts N processes (ranks), one for each device. Each rank holds 1/N of the query and
key/value heads and of the MLP's columns, so 1/N of those weights and of the cache. Ranks meet in
three places:

- twice a layer they add up what attention and what the MLP add to the residual stream, which so is
  the same on all of them, bit for bit;
- in a layer that filters they add up sums over the heads' cosines (see
  token_filter.mean_and_variance), so that all of them take the same decision;
- the rows of the output projection are divided too: its parts are put together, so that every rank
  has all logits and chooses the same token.

Rank 0 reads, prints and writes for all (cli/process.py).
"""

import math
import os
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from cli.process import N_RANKS, RANK, Ranks
from model import Linear, ModelConfig, Transformer

# -------------------------------------------------------------------------- meeting and parting


def init_distributed(device: torch.device):
    """Join the other ranks, through NCCL on CUDA and gloo on the CPU.

    Calls after the first do nothing.
    """
    if dist.is_initialized():
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from now on
    store, rank, n_ranks = next(rendezvous("env://"))

    def is_first_to_fail() -> bool:
        try:
            return store.add("failed", 1) == 1
        except RuntimeError:
            # The store is gone, as another rank has ended. Then nobody has said why.
            return True

    # A process that only ends may be aborted by threads of the others that still run.
    Ranks.leave = dist.destroy_process_group
    Ranks.is_first_to_fail = is_first_to_fail
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks)


# ----------------------------------------------------------------------------- dividing a model


def shard_config(config: ModelConfig) -> ModelConfig:
    """The dimensions of one rank's part. Raises ValueError where there are no equal parts."""
    common = math.gcd(config.kv_heads, config.mlp_width)
    if common % N_RANKS != 0:
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(
            f"its {config.kv_heads} key/value heads cannot be divided by {N_RANKS}: "
            f"--nproc-per-node may be {fitting}"
        )
    return replace(
        config,
        heads=config.heads // N_RANKS,
        kv_heads=config.kv_heads // N_RANKS,
        mlp_width=config.mlp_width // N_RANKS,
    )


def shard(config: ModelConfig) -> Transformer:
    """The part of the model that this rank holds: to be loaded with weights, then connected.

    With one rank this is the whole model. Raises ValueError where there are no equal parts.
    """
    if N_RANKS == 1:
        return Transformer(config)
    model = Transformer(shard_config(config))
    # Tied weights stay whole, as the embedding does: every rank needs all rows of it.
    if config.vocab_size % N_RANKS == 0 and not config.tied:
        model.head = Linear(config.width, config.vocab_size // N_RANKS, bias=False)
    return model


def shard_slices(whole: torch.Size, own: torch.Size, first_row: int = 0) -> tuple[slice, ...]:
    """Where this rank's part of a weight lies in a stored tensor.

    whole, own: the shapes of the weight and of the part; first_row: the row of the stored tensor at
    which the weight begins (several weights may lie in one tensor, one below the other).
    """
    slices = []
    for dim, (n_whole, n_own) in enumerate(zip(whole, own)):
        start = RANK * n_own if n_own < n_whole else 0
        if dim == 0:
            start += first_row
        slices.append(slice(start, start + n_own))
    return tuple(slices)


class RowParallelLinear(nn.Module):
    """A projection whose input channels are divided: the ranks' outputs are added up."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        if RANK > 0 and linear.bias is not None:
            linear.register_parameter("bias", None)  # rank 0 adds it, once

    def forward(self, x):
        y = self.linear(x)
        dist.all_reduce(y)
        return y


class ColumnParallelLinear(nn.Module):
    """A projection whose output channels are divided: the ranks' outputs are put side by side."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        own = self.linear(x)
        # A sum with zeros: unlike all_gather, it has the same bits with every backend and layout.
        parts = own.new_zeros(N_RANKS, *own.shape)
        parts[RANK] = own
        dist.all_reduce(parts)
        return parts.movedim(0, -2).flatten(-2)


def sum_over_ranks(x):
    """x, a tensor of its own, added up over all ranks."""
    dist.all_reduce(x)
    return x


def connect(model: Transformer, vocab_size: int):
    """Make what shard() gave, with its weights, one part of the whole model."""
    for layer in range(model.config.n_layers):
        for name in (f"blocks.{layer}.attn.o", f"blocks.{layer}.mlp.down"):
            projection = model.get_submodule(name)
            assert isinstance(projection, nn.Linear)
            model.set_submodule(name, RowParallelLinear(projection))
    if model.head.out_features < vocab_size:
        model.set_submodule("head", ColumnParallelLinear(model.head))
    model.sum_over_devices = sum_over_ranks


def seconds_of_sums(model: Transformer, B) -> float:
    """How long the sums of one dense decode step of B rows take, alone: for the bench."""
    x = model.embed.weight.new_zeros(B, model.config.width)
    started = time.perf_counter()
    for _ in range(2 * len(model.blocks)):
        dist.all_reduce(x)
    x.sum().item()  # waits for the device
    return time.perf_counter() - started
