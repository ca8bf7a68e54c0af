"""A decode step as a GPU wants it: nothing waits for data, few operations, one graph, and nothing read that is not in sight."""

import copy
import functools
import inspect
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

import attend
from model import ModelConfig, Transformer
from test_filter import small
from token_filter import PRESETS, preset

NAMES = [None, *PRESETS]  # None: dense
BLOCK = 32  # steps between two looks at how long the rows have become


def filter_of(name, **overrides):
    return name and preset(name, prune=0.5, **overrides)


def step(model, cache, t=0):
    """One token for every row, other ones at every t."""
    return model((torch.arange(len(cache.seen)) * 31 + t * 17)[:, None] % 97, cache)


def prompted(model, filter):
    """A cache with prompts of 12, 3 and 40 tokens."""
    cache = model.new_cache(3, filter)
    model(torch.arange(120).view(3, 40) * 7 % 97, cache, [12, 3, 40])
    return cache


def on_meta(window=None, n_layers=4):
    """A model without data: whatever waits for some raises."""
    with torch.device("meta"):
        return Transformer(ModelConfig(97, 32, n_layers, 4, 2, 8, 48, 10000.0, 1e-5, 512, False, window)).requires_grad_(False)


# ---------------------------------------------------------------------------------------------- nothing waits


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_block_of_steps_waits_for_nothing(name, window):
    model = on_meta(window)
    cache = model.new_cache(3, filter_of(name))
    for t in range(BLOCK):
        assert step(model, cache, t).shape == (3, 1, 97)
    with pytest.raises(NotImplementedError, match="meta"):  # more room is needed: now it has to know
        step(model, cache)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_waits_once_a_layer_and_room_is_made_with_one_wait_for_all(name, window, monkeypatch):
    """All waits go through Tensor.cpu(). It is recorded on the CPU and played back on the meta device, where any other raises."""
    recorded, filter = [], filter_of(name)

    def feed(model):
        cache = model.new_cache(3, filter)
        for n_new in ([20, 5, 0], [30, 30, 30]):
            yield model(torch.arange(90).view(3, 30), cache, n_new)
        for t in range(BLOCK + 1):
            yield step(model, cache, t)

    def record(x):
        recorded.append(x.to("cpu"))
        return recorded[-1]

    monkeypatch.setattr(torch.Tensor, "cpu", record)
    list(feed(small("gqa", window)))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: recorded.pop(0))
    left = [len(recorded), *(len(recorded) for _ in feed(on_meta(window)))]
    waits = [before - after for before, after in itertools.pairwise(left)]
    assert max(waits[:2]) <= (0 if name is None and window is None else 4)
    assert waits[2:] == [1, *[0] * (BLOCK - 1), 1]


# ------------------------------------------------------------------------------------------------------ one graph


@functools.cache
def compiles():
    """torch.compile needs a C++ compiler, and that no folder above torch has a space in its name."""
    try:
        torch.compile(torch.sin)(torch.zeros(2))
        return True
    except Exception:  # noqa: BLE001 (compilers fail in many ways)
        return False


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_steps_equal_plain_ones_and_compile_once(name, window):
    """With fullgraph=True in compile_decode, so whatever breaks the graph raises."""
    if not compiles():
        pytest.skip("torch.compile cannot compile anything here")
    torch._dynamo.reset()
    plain = small("gqa", window, n_layers=3)
    compiled, filter = copy.deepcopy(plain), filter_of(name)
    compiled.compile_decode()
    expected, cache, graphs, bytes_ = prompted(plain, filter), prompted(compiled, filter), [], []
    for t in range(200):
        torch.testing.assert_close(step(compiled, cache, t), step(plain, expected, t), rtol=0, atol=1e-9)
        for a, b in zip(cache.layers, expected.layers):
            assert a.redundant is None if b.redundant is None else torch.equal(a.redundant, b.redundant)
        graphs.append(counters["stats"]["unique_graphs"])
        bytes_.append(cache.nbytes())
    # in the first hundred steps every layer that can grow has done so; from then on one graph serves all lengths
    assert graphs[0] > 0 and graphs[99] == graphs[-1]
    assert window or bytes_[99] < bytes_[-1]
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------- few operations


class Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", NAMES)
def test_operations_of_a_layer(name, device):
    def count(n_layers):
        model = on_meta(None, n_layers)
        model = model if device == "meta" else model.to_empty(device="cpu")
        cache = model.new_cache(3, filter_of(name, schedule="uniform"))
        for t in range(20):  # past the warm-up
            step(model, cache, t)
        with torch.inference_mode(), Operations() as operations:
            step(model, cache)
        return operations.count

    assert 20 < count(5) - count(4) <= (45 if name is None else 90)


# ------------------------------------------------------------------------------------------------------ attending


def attend_loop(q, k, v, n, mask=None):
    """Row b's queries, over its first n[b] slots, those of them that the mask shows; 0 where n[b] is 0."""
    y = torch.zeros_like(q)
    for b, h, g in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        slots = [s for s in range(int(n[b])) if mask is None or mask[b, s]]
        if slots:
            weights = (k[b, h, slots] @ q[b, h, g] / q.shape[-1] ** 0.5).softmax(0)
            y[b, h, g] = weights @ v[b, h, slots]
    return y


def varlen_stand_in(*args, **kwargs):
    """torch.nn.attention.varlen.varlen_attn as its documentation has it, for the arguments that decoding needs."""
    call = inspect.signature(varlen_attn).bind(*args, **kwargs)
    call.apply_defaults()
    a = call.arguments
    q, k, v, starts_q, starts_k, used = (a[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k", "seqused_k"))
    assert a["scale"] is a["return_aux"] is a["block_table"] is a["num_splits"] is None and a["window_size"] == (-1, -1)
    assert q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]  # (tokens, heads, D)
    assert q.shape[1] == k.shape[1] or (a["enable_gqa"] and q.shape[1] % k.shape[1] == 0)
    for starts, tokens, longest in ((starts_q, q, a["max_q"]), (starts_k, k, a["max_k"])):
        assert starts.dtype == torch.int32 and starts.shape == (len(used) + 1,) and starts[0] == 0 and starts[-1] == len(tokens)
        assert ((starts.diff() >= 0) & (starts.diff() <= longest)).all() and type(longest) is int
    assert used.dtype == torch.int32 and ((used >= 0) & (used <= starts_k.diff())).all()
    y, heads_per_kv = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for i, n in enumerate(used.tolist()):
        for t in range(starts_q[i], starts_q[i + 1]):
            for head in range(q.shape[1] if n else 0):
                slots, kv_head = slice(starts_k[i], starts_k[i] + n), head // heads_per_kv
                weights = (k[slots, kv_head] @ q[t, head] / q.shape[2] ** 0.5).softmax(0)
                y[t, head] = weights @ v[slots, kv_head]
    return y


WAYS: dict = {"rows": attend.attend_rows, "masked": attend.attend_masked, "varlen": partial(attend.attend_varlen, varlen_stand_in)}
LENGTHS = [[5], [0], [0, 0, 0], [7, 7, 7], [19, 20, 18, 20], [10, 0, 7, 0, 20, 19], [1, 20, 3, 9, 2]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (4, 1)])  # kv_heads, heads of each
@pytest.mark.parametrize("n", LENGTHS, ids=str)
def test_every_way_to_attend_equals_the_loop(n, heads, way):
    q = torch.randn(len(n), *heads, 8).double()
    k, v = torch.randn(2, len(n), heads[0], 20, 8).double()
    n, some = torch.tensor(n), torch.rand(len(n), 20) < 0.5
    some[torch.arange(len(n)), (n - 1).clamp(min=0)] = True  # a token sees itself
    for mask in (None, some):
        y, expected, sees = WAYS[way](q, k, v, n, mask), attend_loop(q, k, v, n, mask), n > 0
        torch.testing.assert_close(y[sees], expected[sees], rtol=0, atol=1e-12)
        if way == "rows" or (way == "varlen" and mask is None):
            assert (y[~sees] == 0).all()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_as_on_a_gpu_equals_decoding_as_on_the_cpu(name, window):
    """And where no window needs a mask, the kernel is given the slots that usage() counts, for every key/value head."""
    model, filter, given = small("gqa", window), filter_of(name, warmup=3), []  # the prompts are past it

    def varlen(*args, **kwargs):
        given.append(int(kwargs["seqused_k"].sum()))
        return varlen_stand_in(*args, **kwargs)

    usual, other = prompted(model, filter), prompted(model, filter)
    read = other.usage()[:, 3].sum()
    for layer in other.layers:
        layer.attend = partial(attend.attend_varlen, varlen)
    for t in range(40):
        torch.testing.assert_close(step(model, other, t), step(model, usual, t), rtol=0, atol=1e-9)
    if window is None:
        assert sum(given) == model.config.kv_heads * (other.usage()[:, 3].sum() - read) > 0


# --------------------------------------------------------------------------------------- what is read on the CPU


@pytest.fixture
def slots(monkeypatch):
    """The slots of each call of the kernel: rows times keys."""
    attention, calls = F.scaled_dot_product_attention, []

    def counting(q, k, v, **options):
        calls.append(k.shape[0] * k.shape[2])
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    return calls


@pytest.mark.parametrize("n, expected", [
    ([0, 0, 0], []),  # who sees nothing reads nothing
    ([7, 7, 7], [21]),  # all at once if about as long,
    ([19, 20, 18, 20], [80]),
    ([10, 0, 7, 0, 20, 19], [20, 40]),  # otherwise by twos
    ([1, 20, 3, 9, 2], [4, 18, 20]),
])  # fmt: skip
def test_rows_read_their_own_slots(n, expected, slots):
    attend.attend_rows(torch.randn(len(n), 2, 3, 8), *torch.randn(2, len(n), 2, 64, 8), torch.tensor(n))
    assert slots == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_what_usage_counts(name, slots):
    model = small()
    cache = model.new_cache(1, filter_of(name))
    model(torch.arange(50)[None], cache)
    read = cache.usage()[:, 3].sum()
    slots.clear()
    for t in range(40):
        step(model, cache, t)
    assert sum(slots) == cache.usage()[:, 3].sum() - read > 0
