"""What the decoder promises: the same logits as transformers, the same result however a text is fed, real savings."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
import transformers

from load_weights import load
from model import ModelConfig, Transformer, rope_frequencies
from schedule import layer_ratios
from token_filter import PRESETS, FilterState, preset, token_filter

LENGTHS = [90, 40, 63]  # of the three rows of most tests
SHAPES = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}  # heads, kv_heads


@functools.cache
def small(shape="gqa", window=None, n_layers=4, **of_a_family) -> Transformer:
    """A random float64 model. Weights are scaled up, so that attention is far from uniform and every bug shows."""
    torch.manual_seed(1)
    heads, kv_heads = SHAPES[shape]
    config = ModelConfig(97, 32, n_layers, heads, kv_heads, 8, 48, 10000.0, 1e-5, 512, False, window, **of_a_family)
    model = Transformer(config).double().requires_grad_(False)
    for name, p in model.named_parameters():
        p.mul_(3.0 if ".q." in name or ".k." in name else 1.5)
        if "q_norm" in name or "k_norm" in name:
            p.add_(torch.randn(8))
    return model


def texts():
    torch.manual_seed(2)
    return torch.randint(0, 97, (3, max(LENGTHS)))


def feed(model, filter, sizes, rows=(0, 1, 2)):
    """The rows' texts in one batch, in chunks of these sizes: logits (B, T, V), decisions (L, B, T), the cache."""
    cache, logits, redundant, start = model.new_cache(len(rows), filter), [], [], 0
    for size in sizes:
        n_new = [min(max(LENGTHS[row] - start, 0), size) for row in rows]
        logits.append(model(texts()[list(rows), start : start + size], cache, n_new))
        redundant.append(torch.stack([layer.redundant for layer in cache.layers]))
        start += size
    return torch.cat(logits, 1), torch.cat(redundant, 2), cache


def same(a, b, row_a, row_b, length):
    assert torch.equal(a[1][:, row_a, :length], b[1][:, row_b, :length])
    torch.testing.assert_close(a[0][row_a, :length], b[0][row_b, :length], rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------- an obvious version


def turned(x, angle):
    """RoPE: the channel pair (i, i + R/2) as a complex number, turned by its angle."""
    R = 2 * angle.shape[-1]
    a, b = x[..., :R].chunk(2, -1)
    y = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((y.real, y.imag, x[..., R:]), -1)


def obvious(model, tokens, filter):
    """One token, one layer, one visible key at a time, no cache object: logits (T, V) of one text."""
    c, L = model.config, model.config.n_layers
    ratios, logits = layer_ratios(filter, L), []
    states = [FilterState.new(1, c.kv_heads, c.head_dim, filter, l, torch.float64, "cpu") for l in range(L)]
    pasts, anchors, departures = [[] for _ in range(L)], [None] * L, [[] for _ in range(L)]  # past: (position, k, v, redundant)
    for t, token in enumerate(tokens):
        x = model.embed(token)
        if filter.schedule == "adaptive" and t in [max(filter.warmup, 1) * 2**i for i in range(20)]:
            weights = [(sum(n * d for n, d in ds) / sum(n for n, _ in ds)) ** -8 if ds else 1.0 for ds in departures]
            low, high = 0.0, filter.prune * L / min(weights)
            for _ in range(200):  # bisect for a
                a = (low + high) / 2
                ratios = [min(0.95, a * w) for w in weights]
                low, high = (a, high) if sum(ratios) < filter.prune * L else (low, a)
        for l, block in enumerate(model.blocks):
            normed, angle = block.attn_norm(x), t * rope_frequencies(c).double()[None]
            k = turned(block.attn.k_norm(block.attn.k(normed).view(c.kv_heads, c.head_dim)), angle)
            v = block.attn.v(normed).view(c.kv_heads, c.head_dim)
            q = turned(block.attn.q_norm(block.attn.q(normed).view(c.heads, c.head_dim)), angle)
            redundant = bool(token_filter(k[None, None], v[None, None], torch.ones(1).long(), states[l], ratios[l], filter)[0])
            pasts[l].append((t, k, v, redundant))
            if redundant and filter.mode == "attention":
                added = anchors[l] if filter.fill == "anchor" else torch.zeros(c.width).double()
            else:
                heads = []
                for h in range(c.heads):
                    kv, seen = h * c.kv_heads // c.heads, []
                    for j, k_j, v_j, redundant_j in pasts[l]:
                        if t - j < (c.window or len(tokens)) and (j == t or not redundant_j or t - j <= filter.grace):
                            seen.append((q[h] @ k_j[kv] / c.head_dim**0.5, v_j[kv]))
                    weights = torch.stack([s for s, _ in seen]).softmax(0)
                    heads.append(weights @ torch.stack([v_j for _, v_j in seen]))
                added = block.attn.o(torch.cat(heads))
                if not redundant:
                    if t >= 4:
                        stands_for = 1.0 if t < max(filter.warmup, 1) else 1 / (1 - ratios[l])
                        departures[l].append((stands_for, float((added - anchors[l]).norm() / x.norm())))
                    anchors[l] = added if t == 0 else filter.gamma * anchors[l] + (1 - filter.gamma) * added
            x = x + added
            x = x + block.mlp(block.mlp_norm(x))
        logits.append(model.head(model.norm(x)))
    return torch.stack(logits)


@pytest.mark.parametrize("window", [None, 13, 4])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("prune", [0.3, 0.8])
def test_equals_the_obvious_version(name, prune, window):
    model, filter = small("gqa", window), preset(name, prune=prune, warmup=4, **({} if name == "paper" else {"grace": 5}))
    logits, redundant, _ = feed(model, filter, [90], rows=[0])
    assert redundant.any()
    torch.testing.assert_close(logits[0], obvious(model, texts()[0], filter), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_what_other_families_add_equals_the_obvious_version(name):
    model = small("gqa", 40, rotary_dim=6, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    filter = preset(name, prune=0.5)
    logits, redundant, _ = feed(model, filter, [31, 1, 58], rows=[0])
    assert redundant.any()
    torch.testing.assert_close(logits[0], obvious(model, texts()[0], filter), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------- chunk-free and batch-invariant


@pytest.mark.parametrize("shape, window", [("mha", None), ("gqa", None), ("mqa", None), ("gqa", 20)])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("prune", [0.0, 0.3, 0.5, 0.8])
def test_chunks_and_neighbours_change_nothing(shape, window, name, prune):
    model, filter = small(shape, window), preset(name, prune=prune)
    whole = feed(model, filter, [90])
    pairs = sum(LENGTHS) * model.config.n_layers
    assert int(whole[2].kept().sum()) == pairs - int(whole[1].sum())
    for sizes in ([1] * 90, [7] * 12 + [6], [64, 26], [1, 40, 1, 48]):
        other = feed(model, filter, sizes)
        for row, length in enumerate(LENGTHS):
            same(whole, other, row, row, length)
        assert torch.equal(whole[2].kept(), other[2].kept())
    for row, length in enumerate(LENGTHS):
        same(whole, feed(model, filter, [length], rows=[row]), row, 0, length)
    for row, place in ((0, 2), (2, 0)):
        same(whole, feed(model, filter, [33, 57], rows=[2, 1, 0]), row, place, LENGTHS[row])


@pytest.mark.parametrize("changes", [
    {"fusion": "random"}, {"keys": "unrotated"}, {"schedule": "uniform"}, {"schedule": "head"}, {"schedule": "last"},
    {"schedule": "adaptive"}, {"schedule": "adaptive", "warmup": 0}, {"schedule": "adaptive", "mode": "cache"},
    {"warmup": 0}, {"history": 8}, {"gamma": 0.0}, {"grace": 1}, {"grace": 200}, {"mode": "cache", "grace": 0},
])  # fmt: skip
def test_chunks_and_neighbours_change_nothing_with_other_settings(changes):
    model, filter = small(), preset("paper", prune=0.5, **changes)
    whole, steps = feed(model, filter, [90]), feed(model, filter, [16, 1, 1, 30, 42])
    assert whole[1].any()
    for row, length in enumerate(LENGTHS):
        same(whole, steps, row, row, length)
        same(whole, feed(model, filter, [length], rows=[row]), row, 0, length)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("name", ["paper", "anchored", "adaptive"])
def test_idle_rows_change_nothing_where_they_ride_along(name, window, monkeypatch):
    """What a GPU does at decode, on the CPU."""
    model, filter, sizes = small(window=window), preset(name, prune=0.5), [20, *[1] * 70]
    usual = feed(model, filter, sizes)
    monkeypatch.setattr("model.idle_rows_ride_along", lambda device: True)
    for row, length in enumerate(LENGTHS):
        same(usual, feed(model, filter, sizes), row, row, length)


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_padding_and_empty_chunks_change_nothing(name):
    """Not even padding beyond where adaptive ratios change, or a chunk without a single token."""
    model, filter, tokens = small(), name and preset(name, prune=0.5), texts()[:2, :60]
    cache = model.new_cache(2, filter)
    logits = model(tokens, cache, [20, 10])[0, :20]
    assert all(layer.redundant.shape == (2, 60) for layer in cache.layers)
    assert all(layer.score is None or layer.score.shape == (2, 60) for layer in cache.layers)
    model(tokens[:, :40], cache, [0, 0])
    assert all(layer.redundant.shape == (2, 40) and not layer.redundant.any() for layer in cache.layers)
    assert all(layer.score is None or layer.score.isnan().all() for layer in cache.layers)
    logits = torch.cat((logits, model(tokens[:, 20:], cache, [40, 0])[0]))
    torch.testing.assert_close(logits, model(tokens[:1], model.new_cache(1, filter))[0], rtol=0, atol=1e-9)


def test_the_future_changes_nothing():
    model, filter = small(), preset("anchored", prune=0.5)
    tokens = texts()[:1]
    changed = torch.cat((tokens[:, :60], (tokens[:, 60:] + 1) % 97), 1)
    a, b = (model(t, model.new_cache(1, filter))[0, :60] for t in (tokens, changed))
    assert torch.equal(a, b)


def test_prefill_of_ragged_prompts_gives_each_ones_last_logits():
    model, filter = small(), preset("anchored", prune=0.5)
    prompts = [texts()[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    for chunk in (7, 512):
        logits = model.prefill(prompts, model.new_cache(3, filter), chunk)
        for row, prompt in enumerate(prompts):
            alone = model.prefill([prompt], model.new_cache(1, filter))
            torch.testing.assert_close(logits[row], alone[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_rows_leave_and_fork(name):
    """select() drops and copies whole rows: each goes on as if nothing had happened to the others."""
    model, filter = small("gqa", 30), preset(name, prune=0.5)
    _, _, cache = feed(model, filter, [50])
    cache.select([2, 0, 2])
    ends = [[50, 51, 52], [60, 61, 62], [70, 71, 72]]
    logits = [model(torch.tensor([end[i] for end in ends])[:, None], cache) for i in range(3)]
    for row, (origin, end) in enumerate(zip([2, 0, 2], ends)):
        alone = model.new_cache(1, filter)
        tokens = torch.cat((texts()[origin, : min(50, LENGTHS[origin])], torch.tensor(end)))
        expected = model(tokens[None], alone)[0, -3:]
        torch.testing.assert_close(torch.cat(logits, 1)[row], expected, rtol=0, atol=1e-9)
    size = cache.nbytes()
    cache.select([])
    assert cache.nbytes() == 0 < size


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_a_long_row_that_leaves_takes_its_slots_along(name):
    model, filter = small(), name and preset(name, prune=0.3)
    cache = model.new_cache(2, filter)
    model(texts()[:2, :90], cache, [90, 10])
    cache.select([1])
    alone = model.new_cache(1, filter)
    model(texts()[1:2, :10], alone)
    assert [layer.k.shape for layer in cache.layers] == [layer.k.shape for layer in alone.layers]
    assert cache.nbytes() == alone.nbytes()


# ------------------------------------------------------------------------------------------------- off means off


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("window", [None, 20])
def test_a_filter_that_keeps_everything_equals_dense(name, window):
    model = small("gqa", window)
    dense = feed(model, None, [90])
    for sizes in ([90], [30, 60], [1] * 90):
        filtered = feed(model, preset(name, prune=0.7, warmup=1000), sizes)
        assert not filtered[1].any()
        for row, length in enumerate(LENGTHS):
            same(dense, filtered, row, row, length)


@pytest.mark.parametrize("filter", [None, preset("cache", prune=0.0), preset("anchored", prune=0.0)])
def test_off_means_no_filter_work(filter):
    def refuse(*args):
        raise AssertionError("the filter was called")

    cache = small().new_cache(3, filter, criterion=refuse)
    small()(texts(), cache, LENGTHS)
    assert all(layer.state is None and layer.ring == 0 for layer in cache.layers)


# --------------------------------------------------------------------------------------------------- real savings


class Rows:
    """Counts the rows that go through each projection, and the queries and keys that go into attention."""

    def __init__(self, model, monkeypatch):
        self.counts = {}
        self.hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: self.add(name, args[0].shape[0]))
            for name, module in model.named_modules()
            if ".attn." in name
        ]
        attention = F.scaled_dot_product_attention

        def counting(q, k, v, **options):
            self.add("queries", q.shape[0] * q.shape[1] * q.shape[2])  # times query heads, however they are folded
            return attention(q, k, v, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", counting)

    def add(self, name, rows):
        self.counts[name] = self.counts.get(name, 0) + rows


@pytest.mark.parametrize("sizes", [[90], [20, 1, 1, 38, 30]])
@pytest.mark.parametrize("name", PRESETS)
def test_skipped_tokens_run_no_projection_and_no_attention(name, sizes, monkeypatch):
    model, filter = small("gqa"), preset(name, prune=0.5)
    rows = Rows(model, monkeypatch)
    try:
        _, redundant, cache = feed(model, filter, sizes)
    finally:
        for hook in rows.hooks:
            hook.remove()
    total = sum(LENGTHS)
    queries = 0
    for i, layer in enumerate(cache.layers):
        attending = total - (int(redundant[i].sum()) if filter.mode == "attention" else 0)
        queries += attending
        assert rows.counts[f"blocks.{i}.attn.q"] == rows.counts[f"blocks.{i}.attn.o"] == attending
        cached = 3 * 16 if layer.closed else total  # past the warm-up a closed layer does not even project K and V
        assert rows.counts[f"blocks.{i}.attn.k"] == rows.counts[f"blocks.{i}.attn.v"] == cached
    assert rows.counts["queries"] == queries * model.config.heads
    assert cache.layers[-1].closed == (filter.schedule == "tail")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("prune", [0.3, 0.5, 0.8])
def test_cache_bytes_shrink_as_the_skip_ratio_says(name, prune):
    model, filter = small("gqa", n_layers=6), preset(name, prune=prune)
    tokens = torch.randint(0, 97, (2, 400))
    cache = model.new_cache(2, filter)
    model(tokens, cache)
    c, pairs = model.config, 800 * model.config.n_layers
    slot = 2 * c.kv_heads * c.head_dim * 8 + 8  # float64 K and V, int64 position
    graced = sum(int(layer.redundant[:, -filter.grace :].sum()) for layer in cache.layers if filter.grace and not layer.closed)
    fixed = sum(layer.fixed_bytes() for layer in cache.layers) + (cache.adaptive.nbytes() if cache.adaptive else 0)
    kept = pairs - sum(int(layer.redundant.sum()) for layer in cache.layers)
    assert abs(kept / pairs - (1 - prune)) < 0.06  # the realised ratio is near the one asked for
    assert cache.live_bytes() == (kept + graced) * slot + fixed
    # allocated: live, rounded up to blocks of 32 and to the longest row
    longest = sum(2 * (layer.ring + 32 + int(layer.length.max())) for layer in cache.layers)
    assert cache.live_bytes() <= cache.nbytes() <= longest * slot + fixed


@pytest.mark.parametrize("name", PRESETS)
def test_nbytes_is_what_the_tensors_take(name):
    _, _, cache = feed(small(), preset(name, prune=0.5), [60])
    holders = [*cache.layers, *(layer.state for layer in cache.layers if layer.state), *filter(None, [cache.adaptive])]
    held = [(attribute, t) for holder in holders for attribute, t in vars(holder).items() if isinstance(t, torch.Tensor)]
    storages = [t.untyped_storage() for attribute, t in held if attribute not in ("length", "kept", "redundant", "score")]
    assert cache.nbytes() == sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_a_sliding_window_bounds_the_cache(name):
    model = small("gqa", 20)
    cache = model.new_cache(1, name and preset(name, prune=0.3))
    tokens = torch.randint(0, 97, (1, 300))
    for t in range(300):
        model(tokens[:, t : t + 1], cache)
    assert all(layer.k.shape[2] <= layer.ring + 20 + 2 * 32 for layer in cache.layers)


# ------------------------------------------------------------------------------------------------------- parity


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


PROSE = """The lighthouse keeper kept a careful record of every ship that passed the point: its name, if he could read it,
the colour of its funnel, and the hour. On foggy nights he wrote down only the sound of the engines."""


@pytest.mark.parametrize("dtype, atol", [("float32", 3e-4), ("float64", 1e-4)])
def test_demo_logits_equal_transformers(demo, dtype, atol):
    """The logits go up to 37: float32's rounding alone puts either side up to 2e-4 from its own float64 logits."""
    model, tokenizer = load(demo, "cpu", dtype)
    ids = torch.tensor([tokenizer.encode(PROSE) + tokenizer.chat([{"role": "user", "content": PROSE}])])
    ours, theirs = our_logits(model, ids, 20), hf_logits(demo, ids, 20, getattr(torch, dtype))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", PRESETS)
def test_demo_is_chunk_free_and_batch_invariant(demo, name):
    """The small models' promise on real weights: float64, a prompt's decisions and logits, whole, in pieces, in company."""
    model, tokenizer = load(demo, "cpu", "float64")
    long, short = tokenizer.encode(PROSE * 2), tokenizer.encode(PROSE[:90])
    filter = preset(name, prune=0.5)
    whole = model.new_cache(1, filter)
    expected = model(torch.tensor([long]), whole)[0]
    assert 0.2 < 1 - int(whole.kept()) / (len(long) * 30) < 0.6
    tokens = torch.tensor([short + [0] * (len(long) - len(short)), long])
    cache, logits, start = model.new_cache(2, filter), [], 0
    for size in (40, 1, 1, len(long) - 42):
        n_new = [min(max(len(short) - start, 0), size), size]
        logits.append(model(tokens[:, start : start + size], cache, n_new)[1])
        start += size
    assert int(cache.kept()[1]) == int(whole.kept())
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- the rest


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
    config = dataclasses.replace(small().config)
    model = Transformer(config).to(dtype).requires_grad_(False)
    cache = model.new_cache(3, preset("anchored", prune=0.5))
    assert model(texts(), cache, LENGTHS).dtype == dtype
    state = cache.layers[1].state
    assert state.anchor.dtype == state.history.dtype == cache.layers[1].anchor_output.dtype == torch.float32
    assert cache.layers[1].k.dtype == dtype
