"""Faster decode steps: recorded as CUDA graphs and replayed, and compiled. Put around a model from
outside.

record_decode(model)     # on CUDA, which load() does there
compile_decode(model)    # through torch.compile; the first steps then take a while
"""

import sys
from collections.abc import Callable

import torch

from kv_cache import KVCache
from model import Block, Transformer


class CudaGraph:
    """A recorded decode step: what it launches is recorded once, and launched again as one."""

    def __init__(self, decode_step, tokens, cache: KVCache):
        """decode_step(tokens, cache) -> logits. Raises where it cannot be recorded."""
        self.tokens = tokens.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = decode_step(self.tokens, cache)

    def __call__(self, tokens):
        """tokens (B,) -> logits (B, vocab)"""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits.clone()


class StepRunner:
    """Runs the decode steps of a model: the place for recorded and compiled ones.

    record    what makes a recording of a step, called as CudaGraph is; None: steps are not recorded
    compiled  whether the model's blocks are compiled
    """

    def __init__(self, record: Callable | None, compiled: bool):
        self.record = record
        self.compiled = compiled

    def __call__(self, decode_step: Callable, tokens, cache: KVCache):
        """tokens (B,) -> logits (B, vocab).

        The first step on new tensors is run as it is: kernels are chosen and compiled in it, which
        cannot be recorded. The second is recorded, and that recording serves all further ones.
        """
        if cache.n_steps == 0 and self.compiled:
            mark_slots_dynamic(cache)
        if cache.n_steps == 1 and self.record is not None:
            cache.recorded_step = self.try_to_record(decode_step, tokens, cache)
        if cache.recorded_step is None:
            return decode_step(tokens, cache)
        return cache.recorded_step(tokens)

    def try_to_record(self, decode_step, tokens, cache: KVCache):
        """The recording, or None, after a note on stderr, where it fails; it is not tried again."""
        assert self.record is not None
        try:
            return self.record(decode_step, tokens, cache)
        except Exception as error:  # noqa: BLE001 (drivers fail in many ways)
            self.record = None
            reason = " ".join(str(error).split())[:200]
            print(
                f"note: decoding is not recorded as a CUDA graph, so it is slower: {reason}",
                file=sys.stderr,
            )
            return None


def mark_slots_dynamic(cache: KVCache):
    """Have one compiled block serve any number of slots, so that a cache that grows compiles
    nothing.
    """
    for layer in cache.layers:
        torch._dynamo.mark_dynamic(layer.kv, 3)
        torch._dynamo.mark_dynamic(layer.positions, 1)


def runner_of(model: Transformer) -> StepRunner:
    """The model's StepRunner, made at first use."""
    if model.step_runner is None:
        model.step_runner = StepRunner(record=None, compiled=False)
    assert isinstance(model.step_runner, StepRunner)
    return model.step_runner


def record_decode(model: Transformer, record: Callable | None = CudaGraph):
    """Have decode steps recorded and replayed; record=None: no longer."""
    runner_of(model).record = record


def compile_decode(model: Transformer):
    """Have torch.compile make one graph of a block at decode, for all layers that are alike."""
    # One graph each for layers that filter and that do not, and for each number of rows.
    torch._dynamo.config.recompile_limit = 64
    model.decode_block = torch.compile(Block.forward, fullgraph=True, dynamic=False)
    runner_of(model).compiled = True


def has_fixed_batch(model: Transformer) -> bool:
    """Whether decode steps are made for one number of rows, so that another number takes time."""
    if model.step_runner is None:
        return False
    runner = runner_of(model)
    return runner.compiled or runner.record is not None
