"""What the decoder promises: the same logits as transformers, the same result however a text is
fed, real savings.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention.bias import CausalBias

from cli.skip_map import Decisions
from filter_config import PRESETS, FilterConfig, preset
from load_weights import load
from model import ModelConfig, Transformer
from test_filter import decode_loop, small, visible

LENGTHS = [90, 40, 63]  # of the three rows of most tests
NAMES = [None, *PRESETS]  # None: dense
WINDOWS = [
    None,
    8,
    20,
    60,
]  # none; shorter than the warm-up of 16; between; longer than the 32 recent ones


def filter_of(name, prune=0.5, **overrides):
    """name: a preset's, None for dense."""
    return name and preset(name, prune=prune, **overrides)


def decisions(cache):
    """What every layer decided about the latest tokens: redundant and score, (L, B, T) each."""
    layers = cache.decisions()
    redundant = torch.stack([layer.redundant for layer in layers])
    score = torch.stack([layer.score for layer in layers])
    return redundant, score


def texts():
    torch.manual_seed(2)
    return torch.randint(0, 97, (3, max(LENGTHS)))


def feed(model, filter, sizes, rows=(0, 1, 2)):
    """The rows' texts in one batch, in chunks of these sizes: logits (B, T, V), decisions (L, B,
    T), the cache.
    """
    cache = model.new_cache(len(rows), filter)
    logits = []
    redundant = []
    start = 0
    for size in sizes:
        n_new = [min(max(LENGTHS[row] - start, 0), size) for row in rows]
        logits.append(model(texts()[list(rows), start : start + size], cache, n_new))
        redundant.append(decisions(cache)[0])
        start += size
    return torch.cat(logits, 1), torch.cat(redundant, 2), cache


def same(a, b, row_a, row_b, length):
    assert torch.equal(a[1][:, row_a, :length], b[1][:, row_b, :length])
    torch.testing.assert_close(a[0][row_a, :length], b[0][row_b, :length], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_what_other_families_add_equals_the_literal_loop(name):
    model = small("gqa", 40, rotary_dim=6, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    logits, redundant, _ = feed(model, filter_of(name), [31, 1, 58], rows=[0])
    expected, decided = decode_loop(model, texts()[0], filter_of(name))
    assert redundant[:, 0].tolist() == decided and redundant.any()
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-9)


# ----------------------------------------------------------------- chunk-free and batch-invariant


SHAPES = [*(("gqa", window) for window in WINDOWS), ("mha", None), ("mqa", None)]


@pytest.mark.parametrize(
    "shape, window, prune",
    [*((*shape, 0.5) for shape in SHAPES), ("gqa", None, 0.3), ("gqa", None, 0.8)],
)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_neighbours_change_nothing(shape, window, name, prune):
    model = small(shape, window)
    filter = filter_of(name, prune)
    whole = feed(model, filter, [90])
    usage = whole[2].usage()
    assert usage[:, 1].sum() == whole[1].sum() and (name is None or whole[1].any())
    for sizes in ([1] * 90, [7] * 12 + [6], [64, 26], [1, 40, 1, 48]):
        other = feed(model, filter, sizes)
        for row, length in enumerate(LENGTHS):
            same(whole, other, row, row, length)
        assert torch.equal(other[2].usage(), usage)
    for row, length in enumerate(LENGTHS):
        for sizes in ([length], [1] * length):
            same(whole, feed(model, filter, sizes, rows=[row]), row, 0, length)
    for row, place in ((0, 2), (2, 0)):
        same(whole, feed(model, filter, [33, 57], rows=[2, 1, 0]), row, place, LENGTHS[row])


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "key"},
        {"keys": "unrotated"},
        {"schedule": "uniform"},
        {"schedule": "head"},
        {"schedule": "last"},
        {"warmup": 0},
        {"history": 8},
        {"gamma": 0.0},
        {"recent": 1},
        {"recent": 200},
        {"mode": "cache"},
        {"mode": "local", "recent": 3},
        {"mode": "local", "recent": 3, "fusion": "key-query"},
        {"mode": "cache", "fusion": "key", "keys": "unrotated"},
    ],
)
def test_chunks_and_neighbours_change_nothing_with_other_settings(changes):
    model = small()
    filter = filter_of("paper", **changes)
    whole = feed(model, filter, [90])
    steps = feed(model, filter, [16, *[1] * 40, 34])
    assert whole[1].any()
    for row, length in enumerate(LENGTHS):
        same(whole, steps, row, row, length)
        same(whole, feed(model, filter, [length], rows=[row]), row, 0, length)


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_empty_chunks_change_nothing(name):
    model = small()
    filter = filter_of(name)
    tokens = texts()[:2, :60]
    cache = model.new_cache(2, filter)
    logits = model(tokens, cache, [20, 10])[0, :20]
    redundant, score = decisions(cache)
    assert (
        redundant.shape == score.shape == (4, 2, 60)
        and not redundant[:, 0, 20:].any()
        and score[:, 1, 10:].isnan().all()
    )
    model(tokens[:, :40], cache, [0, 0])
    redundant, score = decisions(cache)
    assert redundant.shape == (4, 2, 40) and not redundant.any() and score.isnan().all()
    logits = torch.cat((logits, model(tokens[:, 20:], cache, [40, 0])[0]))
    torch.testing.assert_close(
        logits, model(tokens[:1], model.new_cache(1, filter))[0], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_nothing(name):
    """No tokens, no rows, rows that get nothing for a while, and none that stay."""
    model = small()
    filter = filter_of(name)
    none = torch.zeros(0, 5, dtype=torch.int64)
    assert model(none, model.new_cache(0, filter)).shape == (0, 5, 97)
    cache = model.new_cache(2, filter)
    alone = model.new_cache(1, filter)
    for part in texts()[:2, :40].split(10, dim=1):
        assert model(part[:, :0], cache).shape == (2, 0, 97) and model(
            part, cache, [0, 0], last=True
        ).shape == (2, 97)
        expected = model(part[:1], alone)
        torch.testing.assert_close(model(part, cache, [10, 0])[:1], expected, rtol=0, atol=1e-9)
    assert (
        cache.lengths.tolist() == [40, 0]
        and torch.equal(cache.usage()[0], alone.usage()[0])
        and not cache.usage()[1].any()
    )
    cache.select([])
    assert model(none[:, :1], cache, last=True).shape == (0, 97) and cache.usage().shape == (0, 5)


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_future_changes_nothing(name):
    tokens = texts()[:1]
    changed = torch.cat((tokens[:, :60], (tokens[:, 60:] + 1) % 97), 1)
    a, b = (small()(t, small().new_cache(1, filter_of(name)))[0, :60] for t in (tokens, changed))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_of_ragged_prompts_gives_each_ones_last_logits(name):
    model = small()
    filter = filter_of(name)
    prompts = [texts()[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    for chunk in (7, 512):
        logits = model.prefill(prompts, model.new_cache(3, filter), chunk)
        for row, prompt in enumerate(prompts):
            alone = model.prefill([prompt], model.new_cache(1, filter))
            torch.testing.assert_close(logits[row], alone[0], rtol=0, atol=1e-9)


MOMENTS = {  # the chunks that are fed before rows leave and fork
    "at the start": [],
    "before the warm-up ends": [5],
    "as it ends": [16],
    "past it": [17],
    "ring half full": [32],
    "ring full": [60],
    "amid a block of steps": [20, *[1] * 5],
    "at its end": [20, *[1] * 32],
    "in the next one": [20, *[1] * 33],
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize("name", NAMES)
def test_rows_leave_and_fork(name, window, moment):
    """select() drops and copies whole rows: each goes on, in steps or in chunks, as if nothing had
    happened to the others.
    """
    model = small("gqa", window)
    filter = filter_of(name)
    done = sum(MOMENTS[moment])
    origins = [2, 0, 2, 1]
    more = torch.randint(0, 97, (4, 40))
    whole = [
        torch.cat((texts()[origin, : min(done, LENGTHS[origin])], new))[None]
        for origin, new in zip(origins, more)
    ]
    expected = [model(tokens, model.new_cache(1, filter))[0, -40:] for tokens in whole]
    for sizes in ([1] * 40, [3, 37]):
        cache = feed(model, filter, MOMENTS[moment])[2] if done else model.new_cache(3, filter)
        cache.select(origins)
        got = torch.cat([model(part, cache) for part in more.split(sizes, dim=1)], dim=1)
        torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-9)
    size = cache.nbytes()
    cache.select([])
    assert cache.nbytes() == 0 < size


@pytest.mark.parametrize("name", NAMES)
def test_a_long_row_that_leaves_takes_its_slots_along(name):
    model = small()
    filter = filter_of(name, 0.3)
    cache = model.new_cache(2, filter)
    alone = model.new_cache(1, filter)
    model(texts()[:2, :90], cache, [90, 10])
    cache.select([1])
    model(texts()[1:2, :10], alone)
    assert cache.nbytes() <= alone.nbytes() + 4 * 32 * (
        cache.slot_bytes + 8
    )  # room for the next steps


# ---------------------------------------------------------------------------------- off means off


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_filter_that_keeps_everything_equals_dense(name, window):
    model = small("gqa", window)
    dense = feed(model, None, [90])
    for sizes in ([90], [30, 60], [1] * 90):
        filtered = feed(model, filter_of(name, 0.7, warmup=1000), sizes)
        assert not filtered[1].any()
        for row, length in enumerate(LENGTHS):
            same(dense, filtered, row, row, length)


@pytest.mark.parametrize("name", PRESETS)
def test_off_means_no_filter_work_and_no_filter_state(name):
    def refuse(*args):
        raise AssertionError("the filter was called")

    model = small()
    cache = model.new_cache(3, filter_of(name, 0.0), filter_fn=refuse)
    dense = model.new_cache(3)
    for each in (cache, dense):
        model(texts(), each, LENGTHS)
        model(texts()[:, :1], each)
    assert cache.nbytes() == dense.nbytes() and not any(layer.filters for layer in cache.layers)


# ----------------------------------------------------------------------------------- real savings


@pytest.mark.parametrize("sizes", [[90], [20, 38, 32]], ids=len)
@pytest.mark.parametrize("name", NAMES)
def test_skipped_tokens_run_no_projection_and_no_attention(name, sizes, monkeypatch):
    """In prefill."""
    model = small()
    rows = {}
    queries = []
    attention = F.scaled_dot_product_attention

    def counting(q, k, v, **options):
        n_queries = q.shape[0] * q.shape[2]
        if "is_causal" not in options:  # some of them fill a row up, and see nothing
            mask = options["attn_mask"]
            if not isinstance(mask, CausalBias):
                n_queries = int(mask.isfinite().any(-1).sum())
        queries.append(n_queries * q.shape[1])
        return attention(q, k, v, **options)

    def count(module, args):
        rows[module] = rows.get(module, 0) + args[0][..., 0].numel()

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    hooks = [
        module.register_forward_pre_hook(count)
        for block in model.blocks
        for module in block.attn.children()
    ]
    try:
        _, redundant, _ = feed(model, filter_of(name), sizes)
        attending = [sum(LENGTHS) - int(skipped.sum()) * (name == "paper") for skipped in redundant]
        assert sum(queries) == sum(attending) * model.config.heads
        for block, attended in zip(model.blocks, attending):
            assert rows[block.attn.q] == rows[block.attn.o] == attended
            assert rows[block.attn.k] == rows[block.attn.v] == sum(LENGTHS)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("sizes", [[90], [90, *[1] * 40], [50, *[1] * 80]], ids=str)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("name", NAMES)
def test_usage_and_live_bytes_are_what_is_in_use(name, window, sizes):
    """Counted token by token, from what was found redundant."""
    model = small("gqa", window)
    filter = filter_of(name)
    tokens = torch.randint(0, 97, (3, 130))
    config = filter or FilterConfig()
    cache = model.new_cache(3, filter)
    decided = Decisions(3, 4)
    start = 0
    empty = cache.live_bytes()
    for size in sizes:
        model(tokens[:, start : start + size], cache, [size, (size + 1) // 2, min(size, 3)])
        decided.watch(range(3), cache)
        start += size
    for row, usage in enumerate(cache.usage().tolist()):
        pairs = skipped = in_sight = read = dense_read = 0
        for layer, redundant in zip(cache.layers, decided.redundant[row].tolist()):
            T = len(redundant)
            recent = config.recent + 1 if layer.filters else 0
            pairs = pairs + T
            skipped = skipped + sum(redundant)
            slots = [j for j in range(T) if not redundant[j] or j >= T - recent]
            in_sight += sum(window is None or T - j <= window for j in slots)
            read += sum(len(visible(t, redundant, config, window)) for t in range(T))
            dense_read += sum(min(t + 1, window or T) for t in range(T))
        assert usage == [pairs, skipped, in_sight, read, dense_read]
    slot = cache.slot_bytes + 8  # every slot has a position
    assert cache.live_bytes() - empty == int(cache.usage()[:, 2].sum()) * slot
    assert empty < 4 * 3 * (
        8 * (2 * 2 * 8 + 256) + 200
    )  # anchors, history, and some numbers and flags


@pytest.mark.parametrize("prompt, new", [(512, 100), (40, 600)])
@pytest.mark.parametrize("name", NAMES)
def test_hardly_more_is_allocated_than_is_in_use(name, prompt, new):
    """At the end of a text whose length was known, and after the first step nothing is replaced on
    the way; heads as in a real model.
    """
    model = Transformer(
        ModelConfig(97, 64, 6, 9, 3, 64, 48, 10000.0, 1e-5, 1024, False)
    ).requires_grad_(False)
    cache = model.new_cache(2, filter_of(name), length=prompt + new)
    model(torch.randint(0, 97, (2, prompt)), cache)
    replaced = []
    for _ in range(new):
        slots = [layer.positions.shape[1] for layer in cache.layers]
        model(torch.randint(0, 97, (2, 1)), cache)
        replaced.append(slots != [layer.positions.shape[1] for layer in cache.layers])
    assert cache.live_bytes() <= cache.nbytes() <= 1.15 * cache.live_bytes()
    assert sum(replaced[1:]) <= (0 if name is None else 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [[60], [20, *[1] * 40]], ids=len)
def test_nbytes_is_what_the_tensors_take(name, sizes):
    _, _, cache = feed(small(), filter_of(name), sizes)
    holders = [*cache.layers, *(layer.state for layer in cache.layers if layer.state)]
    to_look_at = ("redundant", "score", "ratio_tensor", "layer", "latest_cosine", "latest_w_k")
    own = [
        t
        for holder in holders
        for key, t in vars(holder).items()
        if isinstance(t, torch.Tensor) and key not in to_look_at
    ]
    assert cache.nbytes() == sum(t.nbytes for t in own)
    assert all(
        t.untyped_storage().nbytes() == t.nbytes for t in own if t.ndim > 1
    )  # none is a part of something larger


@pytest.mark.parametrize("sizes", [[1] * 300, [70] * 4], ids=len)
@pytest.mark.parametrize("name", NAMES)
def test_a_sliding_window_bounds_the_cache(name, sizes):
    model = small("gqa", 20)
    cache = model.new_cache(1, filter_of(name, 0.3))
    empty = cache.nbytes()
    for tokens in torch.randint(0, 97, (1, sum(sizes))).split(sizes, dim=1):
        model(tokens, cache)
    spare = max(sizes) + 2 * 32  # slots of what is hidden by now, and of what comes next
    assert cache.nbytes() <= empty + 4 * (20 + spare) * (cache.slot_bytes + 8)


# ----------------------------------------------------------------------------------------- parity


def hf_logits(folder, ids, steps, dtype=torch.float32):
    """transformers' logits for a prompt and then `steps` of decode with its own cache."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        out = reference(ids[:, :-steps], use_cache=True)
        logits = [out.logits]
        for t in range(ids.shape[1] - steps, ids.shape[1]):
            out = reference(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1)


def our_logits(model, ids, steps):
    cache = model.new_cache(len(ids))
    logits = [model(ids[:, :-steps], cache)]
    logits += [model(ids[:, t : t + 1], cache) for t in range(ids.shape[1] - steps, ids.shape[1])]
    return torch.cat(logits, 1)


PROSE = (
    "The lighthouse keeper kept a careful record of every ship that passed the point: its name, if "
    "he could read it,\nthe colour of its funnel, and the hour. On foggy nights he wrote down only "
    "the sound of the engines."
)


@pytest.mark.parametrize("dtype, atol", [("float32", 3e-4), ("float64", 1e-4)])
def test_demo_logits_equal_transformers(demo, dtype, atol):
    """The logits go up to 37: float32's rounding alone puts either side up to 2e-4 from its own
    float64 logits.
    """
    model, tokenizer = load(demo, "cpu", dtype)
    ids = torch.tensor(
        [tokenizer.encode(PROSE) + tokenizer.chat([{"role": "user", "content": PROSE}])]
    )
    ours = our_logits(model, ids, 20)
    theirs = hf_logits(demo, ids, 20, getattr(torch, dtype))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", PRESETS)
def test_demo_is_chunk_free_and_batch_invariant(demo, name):
    """The small models' promise on real weights: float64, a prompt's decisions and logits, whole,
    in pieces, in company.
    """
    model, tokenizer = load(demo, "cpu", "float64")
    long = tokenizer.encode(PROSE * 2)
    short = tokenizer.encode(PROSE[:90])
    filter = preset(name, prune=0.5)
    whole = model.new_cache(1, filter)
    expected = model(torch.tensor([long]), whole)[0]
    pairs, skipped = whole.usage()[0, :2]
    assert pairs == len(long) * 30 and 0.2 < skipped / pairs < 0.6
    tokens = torch.tensor([short + [0] * (len(long) - len(short)), long])
    cache = model.new_cache(2, filter)
    logits = []
    start = 0
    for size in (40, 1, 1, len(long) - 42):
        n_new = [min(max(len(short) - start, 0), size), size]
        logits.append(model(tokens[:, start : start + size], cache, n_new)[1])
        start += size
    assert torch.equal(cache.usage()[1], whole.usage()[0])
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------- the rest


def test_beyond_the_context_is_refused():
    model = small()
    cache = model.new_cache(1)
    model(torch.zeros(1, 512, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="513 tokens are more than the model's context of 512"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="empty"):
        model.prefill([[1], []], model.new_cache(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_keeps_its_statistics_in_float32(dtype):
    model = Transformer(small().config).to(dtype).requires_grad_(False)
    cache = model.new_cache(3, preset("cache", prune=0.5))
    assert model(texts(), cache, LENGTHS).dtype == dtype
    state = cache.layers[1].state
    assert state.anchor.dtype == state.history.dtype == torch.float32
    assert cache.slot_bytes == 2 * 2 * 8 * 2  # K and V, 2 heads of 8 channels, 2 bytes each


@pytest.mark.parametrize("T", [1, 3])
def test_a_cache_of_something_else_is_refused_naming_both(T):
    model = small()
    tokens = torch.zeros(2, T, dtype=torch.int64)
    with pytest.raises(ValueError, match="2 rows, but the cache was made for 1"):
        model(tokens, model.new_cache(1))
    with pytest.raises(ValueError, match="made for another model: heads 4 for 6"):
        model(tokens, small("mha").new_cache(2))
    halved = Transformer(model.config).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"in torch.bfloat16, but the model in torch.float64"):
        model(tokens, halved.new_cache(2))
    with torch.device("meta"):
        elsewhere = Transformer(model.config).double()
    with pytest.raises(ValueError, match="on meta, but the model on cpu"):
        model(tokens, elsewhere.new_cache(2))
