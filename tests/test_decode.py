"""A decode step as a GPU wants it: nothing waits for data, few operations, one graph, and nothing
read that is not in sight.
"""

import copy
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import decode_attention
import model as model_file
from filter_config import PRESETS, preset
from model import ModelConfig, Transformer
from runtime.cuda_graph import compile_decode
from test_filter import small

NAMES = [None, *PRESETS]  # None: dense
BLOCK = 32  # steps between two looks at how long the rows have become


def filter_of(name, **overrides):
    """name: a preset's, None for dense."""
    return name and preset(name, prune=0.5, **overrides)


def step(model, cache, t=0):
    """One token for every row, other ones at every t."""
    return model((torch.arange(len(cache.lengths)) * 31 + t * 17)[:, None] % 97, cache)


def prompted(model, filter):
    """A cache with prompts of 12, 3 and 40 tokens."""
    cache = model.new_cache(3, filter)
    model(torch.arange(120).view(3, 40) * 7 % 97, cache, [12, 3, 40])
    return cache


def on_meta(window=None, n_layers=4):
    """A model without data: whatever waits for some raises."""
    with torch.device("meta"):
        return Transformer(
            ModelConfig(97, 32, n_layers, 4, 2, 8, 48, 10000.0, 1e-5, 512, False, window)
        ).requires_grad_(False)


# ---------------------------------------------------------------------------------- nothing waits


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_block_of_steps_waits_for_nothing(name, window):
    model = on_meta(window)
    cache = model.new_cache(3, filter_of(name))
    for t in range(BLOCK):
        assert step(model, cache, t).shape == (3, 1, 97)
    with pytest.raises(
        NotImplementedError, match="meta"
    ):  # more room is needed: now it has to know
        step(model, cache)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_waits_twice_a_layer_that_filters_at_most_and_room_is_made_with_one_wait(
    name, window, monkeypatch
):
    """All waits go through Tensor.cpu(). It is recorded on the CPU and played back on the meta
    device, where any other raises.
    """
    recorded = []
    filter = filter_of(name)
    if filter is not None:  # its near slots are to be full within the steps below
        filter = replace(filter, warmup=16, recent=min(filter.recent, 32))

    def feed(model):
        cache = model.new_cache(3, filter)
        for n_new in ([20, 5, 0], [30, 30, 30]):
            yield model(torch.arange(90).view(3, 30), cache, n_new)
        for t in range(BLOCK + 1):
            yield step(model, cache, t)

    def record(x):
        recorded.append(x.to("cpu"))
        return recorded[-1]

    def play(x):
        waits[-1] += x.device.type == "meta"
        return recorded.pop(0)

    monkeypatch.setattr(torch.Tensor, "cpu", record)
    list(feed(small("gqa", window)))
    monkeypatch.setattr(torch.Tensor, "cpu", play)
    waits = [0]
    for _ in feed(on_meta(window)):
        waits.append(0)
    assert max(waits[:2]) <= (0 if name is None else 2 * 4)
    assert waits[2:-1] == [
        1,
        *[0] * (BLOCK - 1),
        0 if window else 1,
    ]  # within a window all has its slot by then


# -------------------------------------------------------------------------------------- one graph


@functools.cache
def compiles():
    """torch.compile needs a C++ compiler, and no space in the names of the folders above torch."""
    try:
        torch.compile(torch.sin)(torch.zeros(2))
        return True
    except Exception:  # noqa: BLE001 (compilers fail in many ways)
        return False


@pytest.mark.parametrize("name, window", [*((name, None) for name in NAMES), ("cache", 9)])
def test_compiled_steps_equal_plain_ones_and_compile_once(name, window):
    """With fullgraph=True in runtime/cuda_graph.py, so whatever breaks the graph raises."""
    if not compiles():
        pytest.skip("torch.compile cannot compile anything here")
    torch._dynamo.reset()
    plain = small("gqa", window, n_layers=3)
    compiled = copy.deepcopy(plain)
    filter = filter_of(name)
    compile_decode(compiled)
    expected = prompted(plain, filter)
    cache = prompted(compiled, filter)
    graphs = []
    bytes_ = []
    for t in range(300):
        torch.testing.assert_close(
            step(compiled, cache, t), step(plain, expected, t), rtol=0, atol=1e-9
        )
        for a, b in zip(cache.layers, expected.layers):
            assert (
                a.redundant is None
                if b.redundant is None
                else torch.equal(a.redundant, b.redundant)
            )
        graphs.append(counters["stats"]["unique_graphs"])
        bytes_.append(cache.nbytes())
    # by then every layer that can grow has done so, and is past one block of slots; from then on
    # one graph serves all lengths
    assert graphs[0] > 0 and graphs[199] == graphs[-1]
    assert window or bytes_[199] < bytes_[-1]
    torch._dynamo.reset()


# --------------------------------------------------------------------------------- few operations


class Operations(TorchDispatchMode):
    """Counts them, attention as one."""

    count = 0

    def attend(self, *args):
        before = self.count
        y = decode_attention.decode_attention(*args)
        self.count = before + 1
        return y

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", NAMES)
def test_operations_of_a_layer(name, device, monkeypatch):
    def count(n_layers):
        model = on_meta(None, n_layers)
        model = model if device == "meta" else model.to_empty(device="cpu")
        cache = model.new_cache(3, filter_of(name, schedule="uniform"))
        for t in range(20):  # past the warm-up
            step(model, cache, t)
        with torch.inference_mode(), Operations() as operations:
            monkeypatch.setattr(model_file, "decode_attention", operations.attend)
            step(model, cache)
        monkeypatch.undo()
        return operations.count

    if name is None:
        most = 48
    elif name == "cache":
        most = 136
    else:
        most = 112
    assert 20 < count(5) - count(4) <= most


# -------------------------------------------------------------------------------------- attending


def attend_loop(q, k, v, n, mask=None):
    """Row b's queries, over its first n[b] slots, those of them that the mask shows; 0 where n[b]
    is 0.
    """
    y = torch.zeros_like(q)
    for b, h, g in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        slots = [s for s in range(int(n[b])) if mask is None or mask[b, s]]
        if slots:
            weights = (k[b, h, slots] @ q[b, h, g] / q.shape[-1] ** 0.5).softmax(0)
            y[b, h, g] = weights @ v[b, h, slots]
    return y


def flex(q, k, v, n, mask=None):
    return decode_attention.block_by_block(q, k, v, n, mask)


# The last runs in plain operations here.
WAYS = {
    "rows": decode_attention.row_by_row,
    "all slots": decode_attention.all_slots,
    "blocks": flex,
}
LENGTHS = [
    [5],
    [0],
    [0, 0, 0],
    [7, 7, 7],
    [19, 20, 18, 20],
    [10, 0, 7, 0, 20, 19],
    [1, 20, 3, 9, 2],
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (4, 1)])  # kv_heads, heads of each
@pytest.mark.parametrize("n", LENGTHS, ids=str)
def test_every_way_to_attend_equals_the_loop(n, heads, way):
    q = torch.randn(len(n), *heads, 8).double()
    k, v = torch.randn(2, len(n), heads[0], 20, 8).double()
    n, some = torch.tensor(n), torch.rand(len(n), 20) < 0.5
    some[torch.arange(len(n)), (n - 1).clamp(min=0)] = True  # a token sees itself
    for mask in (None, some):
        y = WAYS[way](q, k, v, n, mask)
        expected = attend_loop(q, k, v, n, mask)
        sees = n > 0
        torch.testing.assert_close(y[sees], expected[sees], rtol=0, atol=1e-12)
        if way != "all slots":
            assert (y[~sees] == 0).all()


def transposed(way, q, k, *args):
    y = way(q.unflatten(1, (k.shape[1], -1)), k, *args).flatten(1, 2)
    return y.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_attend_decodes_alike(name, window, monkeypatch):
    """And wherever the kernel's result lies in memory: some return it transposed."""
    # the prompts are past it
    model = small("gqa", window)
    filter = filter_of(name, warmup=3)
    caches = {way: prompted(model, filter) for way in WAYS}
    for t in range(40):
        logits = []
        for way, cache in caches.items():
            monkeypatch.setattr(
                model_file, "decode_attention", lambda *args, way=way: transposed(WAYS[way], *args)
            )
            logits.append(step(model, cache, t))
        for other in logits[1:]:
            torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-9)


# ------------------------------------------------------------------------ what is read on the CPU


@pytest.fixture
def slots(monkeypatch):
    """The slots of each call of the kernel: rows times keys."""
    attention = F.scaled_dot_product_attention
    calls = []

    def counting(q, k, v, **options):
        calls.append(k.shape[0] * k.shape[2])
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    return calls


@pytest.mark.parametrize(
    "n, expected",
    [
        ([0, 0, 0], []),  # who sees nothing reads nothing
        ([7, 7, 7], [21]),  # all at once if about as long,
        ([19, 20, 18, 20], [80]),
        ([10, 0, 7, 0, 20, 19], [10, 7, 20, 19]),  # otherwise one by one
        ([1, 20, 3, 9, 2], [1, 20, 3, 9, 2]),
    ],
)
def test_rows_read_their_own_slots(n, expected, slots):
    decode_attention.row_by_row(
        torch.randn(len(n), 2, 3, 8), *torch.randn(2, len(n), 2, 64, 8), torch.tensor(n)
    )
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
