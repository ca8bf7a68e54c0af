"""The same on a GPU: the CPU's decisions and logits, captured or not, compiled or not.

Without a GPU what can be tested of it here is: a step that is recorded must touch the same tensors
every time and take nothing from the host, and what repeats it (here a stand-in that runs the step
again) must be dropped when a tensor is replaced.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import decode_attention
import generate as generate_module
from filter_config import PRESETS, preset
from model import Block, ModelConfig, Transformer
from runtime.cuda_graph import CudaGraph, compile_decode, record_decode
from test_decode import on_meta, step
from test_filter import small

NAMES = [None, *PRESETS]  # None: dense
WINDOWS = [None, 9, 50]  # none; shorter than the recent tokens; longer
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# What a step gives anew each time.
LATEST = ("redundant", "score", "lengths", "latest_cosine", "latest_w_k")


def addresses(cache):
    """Of all that a cache keeps from step to step: what the latest step gave is not."""
    holders = [cache, *cache.layers, *(layer.state for layer in cache.layers if layer.state)]
    own = [
        (i, key, t)
        for i, holder in enumerate(holders)
        for key, t in vars(holder).items()
        if isinstance(t, torch.Tensor)
    ]
    return {(i, key): t.data_ptr() for i, key, t in own if key not in LATEST}


class Again:
    """CudaGraph's stand-in: the step once more, on the tensors that it was recorded with, or it
    fails.
    """

    made = 0

    def __init__(self, step, tokens, cache):
        self.step = step
        self.cache = cache
        self.tokens = tokens.clone()
        self.recorded = addresses(cache)
        Again.made += 1

    def __call__(self, tokens):
        assert addresses(self.cache) == self.recorded  # a graph knows no others
        self.tokens.copy_(tokens)
        return self.step(self.tokens, self.cache)


def filter_of(name, warmup=16):
    return name and preset(name, prune=0.5, warmup=warmup)


def feed(model, filter, length=0, lengths=(12, 3, 40), steps=70):
    """Prompts of these lengths, steps in which rows fork and leave, a second chunk, more steps:
    logits, decisions, usage.
    """
    tokens = torch.randint(
        0, 97, (3, max(lengths) + steps), generator=torch.Generator().manual_seed(5)
    )
    cache = model.new_cache(3, filter, length=length)
    logits = []
    redundant = []
    model(tokens[:, : max(lengths)], cache, lengths)
    for t in range(steps):
        logits.append(model(tokens[:, max(lengths) + t, None], cache)[:, 0].cpu())
        redundant.append([layer.redundant.tolist() for layer in cache.decisions()])
        if t in (36, 50):  # by 36 the cache has grown, unless its length was known
            cache.select([2, 0, 1] if t == 36 else [1, 1, 0])
        if t == 60:
            logits.append(model(tokens[:, :7], cache, [7, 2, 5], last=True).cpu())
    return torch.stack(logits), redundant, cache.usage()


def assert_same(one, other, atol=1e-9):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=atol)
    assert one[1] == other[1] and torch.equal(one[2], other[2])


# --------------------------------------------------------------------------------------- on a GPU


@cuda
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", NAMES)
def test_in_float64_a_gpu_does_what_the_cpu_does(name, window, captured):
    filter = filter_of(name, 3 if window == 9 else 16)
    model = small("gqa", window)
    length = 120 if window else 0
    on_gpu = copy.deepcopy(model).to("cuda")
    record_decode(on_gpu, CudaGraph if captured else None)
    assert_same(feed(model, filter, length), feed(on_gpu, filter, length))
    assert (on_gpu.step_runner.record is not None) == captured  # nothing failed


@cuda
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_captured_is_uncaptured_in_every_dtype_and_batch(dtype, heads):
    torch.manual_seed(1)
    model = (
        Transformer(ModelConfig(97, heads[0] * 64, 3, *heads, 64, 48, 1e4, 1e-5, 512, False))
        .requires_grad_(False)
        .to("cuda", dtype)
    )
    for name in NAMES:
        for lengths in ([40], [12, 40], [5, 40, 12, 3, 17, 20, 31, 2])[
            :: 1 if name == "paper" else 2
        ]:
            runs = []
            tokens = torch.randint(0, 97, (len(lengths), 80))
            for record in (CudaGraph, None):
                record_decode(model, record)
                cache = model.new_cache(len(lengths), filter_of(name, 3))
                model(tokens[:, :40], cache, lengths)
                runs.append(
                    torch.stack([model(tokens[:, t, None], cache)[:, 0] for t in range(25)])
                )
            assert runs[0].isfinite().all()
            torch.testing.assert_close(*runs, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


@cuda
@pytest.mark.parametrize("name, window", [(None, None), ("paper", None), ("cache", 20)])
def test_compiled_is_eager_captured_or_not_and_for_two_shapes(name, window):
    torch._dynamo.reset()
    for heads in ((8, 2), (4, 4))[: 2 if name == "paper" else 1]:
        torch.manual_seed(1)
        config = ModelConfig(97, heads[0] * 64, 3, *heads, 64, 48, 1e4, 1e-5, 512, False, window)
        model = Transformer(config).requires_grad_(False).to("cuda")
        runs = []
        tokens = torch.randint(0, 97, (2, 200))
        for way in ("eager", "compiled", "both"):
            model.decode_block = Block.forward
            model.step_runner = None
            if way != "eager":
                compile_decode(model)
            if way == "both":
                record_decode(model)
            cache = model.new_cache(2, filter_of(name, 3), length=200)
            model(tokens[:, :40], cache, [12, 40])
            runs.append(torch.stack([model(tokens[:, t, None], cache)[:, 0] for t in range(120)]))
        for other in runs[1:]:
            torch.testing.assert_close(other, runs[0], rtol=0, atol=1e-3)
    torch._dynamo.reset()


@cuda
@pytest.mark.parametrize("flags", ["", "--compile", "--no-graph"])
def test_the_command(checkpoint, capsys, flags):
    """Rows of which one ends early: the same texts as on the CPU."""
    run = [
        str(checkpoint),
        "--prompt",
        "the quick",
        "--prompt",
        "brown",
        "--prompt",
        "fox " * 9,
        "--dtype",
        "float32",
        "--ignore-eos",
        "--max-new-tokens",
        "30",
        "--prune",
        "0.5",
        "--preset",
        "cache",
        *flags.split(),
    ]
    texts = []
    for device in ("cuda", "cpu"):
        generate_module.main([*run, "--device", device])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@cuda
def test_rows_that_have_ended_ride_along_until_half_have():
    model = copy.deepcopy(small()).to("cuda")
    sizes = []
    prompts = [[1, 2, 3], [4, 5], [6] * 20, [7] * 9]
    whole = list(generate_module.generate(small(), prompts, 40, filter_of("cache")))
    ends = {token for row, token in whole if row in (0, 2)}
    expected = list(generate_module.generate(small(), prompts, 40, filter_of("cache"), ends))
    forward = model.forward
    model.forward = lambda tokens, *rest, **more: (
        sizes.append(len(tokens)) or forward(tokens, *rest, **more)
    )
    assert list(generate_module.generate(model, prompts, 40, filter_of("cache"), ends)) == expected
    assert set(sizes) <= {4, 2, 1}


@cuda
def test_out_of_memory_is_one_line(capsys):
    from evaluation import bench

    bench.main(
        [
            "--shape",
            "llama-2-7b",
            "--batch",
            "3000",
            "--context",
            "2000",
            "--repeat",
            "1",
            "--distinct",
            "1",
            "--preset",
            "cache",
        ]
    )
    assert "out of memory" in capsys.readouterr().err


# ----------------------------------------------------------------------- without one, as with one


@pytest.mark.parametrize("length", [0, 120])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", NAMES)
def test_repeated_steps_are_those_that_are_run(name, window, length):
    model = small("gqa", window)
    Again.made = 0
    repeated = copy.deepcopy(model)
    record_decode(repeated, Again)
    assert_same(feed(model, filter_of(name), length), feed(repeated, filter_of(name), length))
    assert Again.made >= 4  # after the prompt, each select, and the second chunk


@pytest.mark.parametrize("length", [0, 120])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_replaces_no_tensor(name, length):
    model = small()
    cache = model.new_cache(3, filter_of(name, 3), length=length)
    model(torch.arange(120).view(3, 40) % 97, cache, [12, 3, 40])
    step(model, cache)  # makes room
    before = addresses(cache)
    for t in range(20):
        step(model, cache, t)
    assert addresses(cache) == before and len(before) > 20


class NoHost(TorchDispatchMode):
    """Refuses what takes a tensor of the host, or makes one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", function
        return result


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_takes_nothing_from_the_host(name, window):
    model = on_meta(window)
    cache = model.new_cache(3, filter_of(name, 3))
    tokens = torch.zeros(3, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        model.rope(tokens)  # makes the table of frequencies, on the host, once
    with torch.inference_mode(), NoHost():
        model.decode_step(tokens, cache)


@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_may_return_its_result_in_any_order(name, shape, monkeypatch):
    model = small(shape)
    attention = F.scaled_dot_product_attention
    expected = feed(model, filter_of(name))

    def transposed(*args, **options):
        return attention(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    for way in (decode_attention.row_by_row, decode_attention.all_slots):
        monkeypatch.setattr(decode_attention, "row_by_row", way)
        assert_same(feed(model, filter_of(name)), expected)


@pytest.mark.parametrize("n", [[5], [0, 300], [128, 1, 256, 0]], ids=str)
def test_the_compiled_kernel_is_given_contiguous_int32(n, monkeypatch):
    def strict(q, k, v, block_mask, enable_gqa):
        for x in (
            block_mask.kv_num_blocks,
            block_mask.kv_indices,
            block_mask.full_kv_num_blocks,
            block_mask.full_kv_indices,
        ):
            assert x.dtype == torch.int32 and x.is_contiguous()
        assert (block_mask.kv_indices >= 0).all() and (
            block_mask.kv_indices < (k.shape[2] + 127) // 128
        ).all()
        assert enable_gqa and q.shape == (len(n), 6, 1, 8)
        return q

    monkeypatch.setattr(decode_attention, "flex_attention", strict)
    q = torch.randn(len(n), 2, 3, 8)
    (k, v) = torch.randn(2, len(n), 2, 300, 8)
    for mask in (None, torch.rand(len(n), 300) < 0.5):
        decode_attention.block_by_block(q, k, v, torch.tensor(n), mask)


def test_what_cannot_be_captured_runs_uncaptured_after_one_line(capsys):
    def broken(*_):
        raise RuntimeError("operation not\npermitted")

    model = copy.deepcopy(small())
    record_decode(model, broken)
    assert_same(feed(model, filter_of("cache")), feed(small(), filter_of("cache")))
    line = (
        "note: decoding is not recorded as a CUDA graph, so it is slower: operation not permitted\n"
    )
    assert capsys.readouterr().err == line and model.step_runner.record is None
