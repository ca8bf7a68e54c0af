"""Token Filtering's specification in executable form. Read it from the top.

1. the method as a literal loop: `filter_loop` (golden/loop.py) says who is redundant, `visible` who
   may see whom, `decode_loop`
   is a decoder of both
2. token_filter agrees with filter_loop, and the Transformer with decode_loop
3. chunk-free, batch-invariant, causal             6. layer_ratios
4. the threshold rule on scores                    7. FilterConfig and presets
5. properties that hold whatever the input         8. FilterState, half precision    9. operations

Shapes: B sequences, T tokens, H query heads, KVH key/value heads, D head size, W scores remembered,
L layers.
"""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from filter_config import CHOICES, FilterConfig, layer_ratios, preset
from golden.loop import drift, filter_loop, is_above, tail_by_bisection
from model import ModelConfig, Transformer, rope_frequencies
from token_filter import FilterState, exceeds_quantile, running_averages, token_filter

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")

# ------------------------------------------------- 1. the method, one token and one head at a time


def visible(t, redundant, config, window=None):
    """The positions that token t may look at in a layer.

    redundant[j]: whether the layer found token j redundant; window: of a sliding window, in tokens.
    """
    if redundant[t] and config.mode == "skip":
        return []
    seen = []
    for j in range(t + 1):
        is_sink = j < max(config.warmup, 1)
        is_recent = t - j <= config.recent
        is_far = not redundant[j] and (not redundant[t] or config.mode == "cache")
        in_window = window is None or t - j < window
        if (is_sink or is_recent or is_far) and in_window:
            seen.append(j)
    return seen


def rotated(x, angle):
    """RoPE: the channel pair (i, i + R/2) as a complex number, rotated by its angle (R/2,)."""
    R = 2 * angle.shape[-1]
    pairs = torch.complex(x[..., : R // 2], x[..., R // 2 : R])
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag, x[..., R:]), dim=-1)


def decode_loop(model, tokens, config):
    """One token, one layer, one head at a time, over what each may see.

    Returns logits (T, vocab) and redundant[l][t] of one text.
    """
    c = model.config
    ratios = layer_ratios(config, c.n_layers)
    states = [None] * c.n_layers
    redundant = [[] for _ in ratios]
    keys = [[] for _ in ratios]
    values = [[] for _ in ratios]
    logits = []
    for t, token in enumerate(tokens):
        x = model.embed(token)
        angle = t * rope_frequencies(c).double()
        for l, block in enumerate(model.blocks):
            attn = block.attn
            normed = block.attn_norm(x)
            k_unrotated = attn.k_norm(attn.k(normed).view(c.kv_heads, c.head_dim))
            k = rotated(k_unrotated, angle)
            v = attn.v(normed).view(c.kv_heads, c.head_dim)
            q_unrotated = attn.q_norm(attn.q(normed).view(c.heads, c.head_dim))
            q = rotated(q_unrotated, angle)

            is_rotated = config.keys == "rotated"
            compared_k = k if is_rotated else k_unrotated
            compared_q = q if is_rotated else q_unrotated
            # A key head's queries are those of the heads that share it, which are neighbours.
            mean_q = torch.stack([heads.mean(0) for heads in compared_q.chunk(c.kv_heads)])
            # Chunks of one token.
            k_chunk, v_chunk, q_chunk = (x.numpy()[None, None] for x in (compared_k, v, mean_q))
            found, _, _, states[l] = filter_loop(
                k_chunk, v_chunk, [1], [ratios[l]], config, states[l], q_chunk
            )
            redundant[l].append(found[0, 0])
            keys[l].append(k)
            values[l].append(v)

            seen = visible(t, redundant[l], config, c.window)
            if seen:
                heads = []
                for h in range(c.heads):
                    h_kv = h * c.kv_heads // c.heads
                    dots = [q[h] @ keys[l][j][h_kv] / math.sqrt(c.head_dim) for j in seen]
                    weights = torch.stack(dots).softmax(0)
                    heads.append(sum(w * values[l][j][h_kv] for w, j in zip(weights, seen)))
                x = x + attn.o(torch.cat(heads))
            x = x + block.mlp(block.mlp_norm(x))
        logits.append(model.head(model.norm(x)))
    return torch.stack(logits), redundant


# ---------------------------------------------------------------- what the tests share

KEY_QUERY = FilterConfig(mode="cache", fusion="key-query")


@functools.cache
def small(shape="gqa", window=None, n_layers=4, **of_a_family) -> Transformer:
    """A random float64 model.

    Weights are scaled up, so that attention is far from uniform and every fault shows.
    """
    torch.manual_seed(1)
    heads, kv_heads = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}[shape]
    config = ModelConfig(
        vocab_size=97,
        width=32,
        n_layers=n_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=8,
        mlp_width=48,
        rope_theta=10000.0,
        norm_eps=1e-5,
        max_positions=512,
        tied=False,
        window=window,
        **of_a_family,
    )
    model = Transformer(config).double().requires_grad_(False)
    for name, p in model.named_parameters():
        p.mul_(3.0 if ".q." in name or ".k." in name else 1.5)
        if "q_norm" in name or "k_norm" in name:
            p.add_(torch.randn(8))
    return model


def feed(k, v, chunks, ratio, config, state=None, dtype=torch.float64, layer=0, q=None):
    """Run token_filter over k, v in chunks, each a list of B numbers of tokens, one for each row.

    q: queries, for fusion "key-query".
    ratio: one for all rows, or a list of one for each. Rows that get less than others are padded
    with what comes next in k, v. Returns redundant (B, T) and score (B, T) as arrays, False and NaN
    for tokens not fed, and the state.
    """
    B, T, KVH, D = k.shape
    if state is None:
        state = FilterState(B, KVH, D, config, layer, dtype, k.device)
    if isinstance(ratio, list):
        ratio = torch.tensor(ratio, dtype=torch.float64)[:, None]
    redundant = np.zeros((B, T), bool)
    score = np.full((B, T), np.nan)
    rows = torch.arange(B)[:, None]
    done = [0] * B
    for chunk in chunks:
        n_columns = max(*chunk, 1)
        columns = torch.tensor(done)[:, None] + torch.arange(n_columns)
        columns = columns.clamp(max=T - 1)
        has_padding = min(chunk) < n_columns
        lengths = torch.tensor(chunk) if has_padding else None
        k_chunk = k[rows, columns]
        v_chunk = v[rows, columns]
        q_chunk = None if q is None else q[rows, columns]
        r, s = token_filter(k_chunk, v_chunk, lengths, state, ratio, config, q_chunk)
        for b, n in enumerate(chunk):
            assert not r[b, n:].any() and s[b, n:].isnan().all()  # padding
            redundant[b, done[b] : done[b] + n] = r[b, :n]
            score[b, done[b] : done[b] + n] = s[b, :n]
            done[b] += n
    return redundant, score, state


def assert_agrees(k, v, lengths, ratio, config, unsettled=0.0, q=None):
    """token_filter does as the loop does.

    unsettled: the share of decisions that may hang on the last bit of a score. Those too are
    exactly what the rule says of token_filter's own scores.
    """
    redundant, score, _ = feed(k, v, [lengths], ratio, config, q=q)
    q_array = None if q is None else q.numpy()
    want, want_score, settled, _ = filter_loop(
        k.numpy(), v.numpy(), lengths, ratio, config, q=q_array
    )
    np.testing.assert_allclose(score, want_score, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(redundant[settled], want[settled])
    assert np.mean(~settled) <= unsettled
    for b, n in enumerate(lengths):
        for t in range(n):
            recent = score[b, max(0, t - config.history) : t]
            is_past_warmup = t >= max(config.warmup, 1)
            assert redundant[b, t] == (is_past_warmup and is_above(score[b, t], recent, ratio[b]))


def random_chunks(lengths, seed, largest=40):
    """Chunks that feed lengths[b] tokens to row b, each row in pieces of its own, some empty."""
    rng = np.random.default_rng(seed)
    left = np.array(lengths)
    chunks = []
    while left.any():
        chunk = np.minimum(rng.integers(0, largest + 1, len(left)), left)
        chunks.append(chunk.tolist())
        left = left - chunk
    return chunks


def assert_same(one, other):
    """The same decisions, and scores to 1e-9."""
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1], rtol=0, atol=1e-9)


# --------------------------------------- 2. token_filter and the Transformer agree with the loops


@pytest.mark.parametrize("T", [1, 2, 17, 129, 300])
@pytest.mark.parametrize("D", [1, 2, 16, 64])
@pytest.mark.parametrize("KVH", [1, 2, 3, 8])
def test_agrees_with_the_loop_for_every_shape(KVH, D, T):
    k, v = drift(2, T, KVH, D)
    ties = 1.0 if D == 1 else 0.0  # the cosine of two numbers is 1 or -1
    assert_agrees(k, v, [T, T // 2], [0.5, 0.3], FilterConfig(warmup=4), unsettled=ties)


@pytest.mark.parametrize("warmup", [0, 1, 16, 1000])
@pytest.mark.parametrize("gamma", [0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("history", [1, 2, 7, 256])
def test_agrees_with_the_loop_for_every_setting(history, gamma, warmup):
    k, v = drift(6, 150, 3, 4)
    config = FilterConfig(history=history, gamma=gamma, warmup=warmup)
    assert_agrees(k, v, [150, 0, 149, 1, 40, 150], [0.0, 0.5, 0.1, 0.9, 0.999, 1.0], config)


@pytest.mark.parametrize("fusion", ["variance", "equal", "key", "value"])
def test_agrees_with_the_loop_for_every_fusion(fusion):
    k, v = drift(2, 200, 3, 16)
    assert_agrees(k, v, [200, 200], [0.5, 0.9], FilterConfig(fusion=fusion))


def drifting_queries(B, T, KVH, D):
    """Like the keys of drift(), but others."""
    return drift(B, T, KVH, D, seed=1000)[0]


@pytest.mark.parametrize("KVH, D", [(1, 2), (1, 64), (2, 16), (3, 4), (8, 16)])
@pytest.mark.parametrize("history, gamma, warmup", [(64, 0.9, 16), (1, 0.5, 0), (7, 0, 1)])
def test_agrees_with_the_loop_with_queries(history, gamma, warmup, KVH, D):
    """There is no unsettled decision, however many scores are equal: they are exact."""
    k, v = drift(6, 150, KVH, D)
    q = drifting_queries(6, 150, KVH, D)
    config = FilterConfig(
        mode="cache", fusion="key-query", history=history, gamma=gamma, warmup=warmup
    )
    assert_agrees(k, v, [150, 0, 149, 1, 40, 150], [0.0, 0.5, 0.1, 0.9, 0.999, 1.0], config, q=q)


def test_what_queries_look_for_is_kept():
    """Of tokens that are otherwise alike, those whose keys are like recent queries."""
    noise = torch.randn(1, 400, 2, 16, generator=torch.Generator().manual_seed(0)).double()
    wanted = torch.zeros(1, 1, 1, 16, dtype=torch.float64)
    wanted[..., 0] = 3
    is_wanted = torch.arange(400) % 4 == 0
    k = torch.where(is_wanted[:, None, None], wanted + noise, noise)
    q = wanted + 0.1 * noise.flip(1)
    shares = []
    for queries in (q, -q):
        redundant, *_ = feed(k, k, [[400]], 0.5, KEY_QUERY, q=queries)
        shares.append(redundant[0, is_wanted.numpy()].mean())
    assert shares[0] < shares[1] - 0.1


def test_ranks_of_equal_cosines_are_in_the_middle():
    """Zeros have cosines of exactly 0: half of those before are below, so s = 1/2 - 1/4."""
    zero = torch.zeros(1, 90, 2, 4, dtype=torch.float64)
    for chunks in ([[90]], [[1]] * 90):
        _, score, _ = feed(zero, zero, chunks, 0.5, KEY_QUERY, q=zero)
        assert score[0, 0] == 0 and (score[0, 1:] == 0.25).all()


def test_a_cosine_that_is_nan_keeps_its_token():
    k, v = drift(1, 90, 2, 4)
    q = drifting_queries(1, 90, 2, 4)
    for broken in (times(k, math.nan, 50), times(k, math.inf, 50)):
        redundant, score, _ = feed(broken, v, [[1]] * 90, 0.99, KEY_QUERY, q=q)
        assert redundant[0, :50].any() and not redundant[0, 50:].any()
        assert not np.isnan(score[0, :50]).any() and np.isnan(score[0, 50:]).all()


def test_each_device_has_some_heads_and_takes_the_decisions_of_one_that_has_all():
    """Each device's sums over its heads are noted first; then both are given their total."""
    k, v = drift(2, 80, 4, 8)
    q = drifting_queries(2, 80, 4, 8)
    whole = feed(k, v, [[80, 50]], 0.5, KEY_QUERY, q=q)
    sums = []

    def note(own):
        sums.append(own)
        return own

    def add_up(own):
        return sums[0] + sums[1]

    def run_part(heads, sum_over_devices):
        part_k, part_v, part_q = (x[:, :, heads] for x in (k, v, q))
        state = FilterState(
            2, part_k.shape[2], 8, KEY_QUERY, 0, torch.float64, "cpu", sum_over_devices
        )
        return feed(part_k, part_v, [[80, 50]], 0.5, KEY_QUERY, state, q=part_q)

    devices = (slice(0, 1), slice(1, 4))
    for heads in devices:
        run_part(heads, note)
    for heads in devices:
        assert_same(run_part(heads, add_up), whole)


def test_queries_that_are_missing_are_named():
    k, v = drift(1, 5, 2, 4)
    with pytest.raises(ValueError, match=r"fusion='key-query' .* \bq\b"):
        feed(k, v, [[5]], 0.5, KEY_QUERY)


@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 60), st.integers(1, 5), st.integers(2, 9)),
    config=st.builds(
        FilterConfig,
        mode=st.just("cache"),
        fusion=st.just("key-query"),
        warmup=st.integers(0, 20),
        history=st.integers(1, 40),
        gamma=st.floats(0, 0.99),
    ),
    seed=st.integers(0, 999),
)
def test_agrees_with_the_loop_with_queries_on_whatever_hypothesis_draws(data, shape, config, seed):
    """D is 2 or more: the cosines of two numbers are 1 or -1, so that their ranks would hang on the
    last bit.
    """
    B, T, _, _ = shape
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    ratio = data.draw(st.lists(st.floats(0, 1), min_size=B, max_size=B))
    assert_agrees(*drift(*shape, seed), lengths, ratio, config, q=drifting_queries(*shape))


def times(x, factor, *where):
    """x with x[:, where] multiplied by factor."""
    x = x.clone()
    x[(slice(None), *where)] *= factor
    return x


ALL = slice(None)
SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(100)[:, None, None]
GROWTH = torch.logspace(-20, 20, 200, dtype=torch.float64)[:, None, None]
# What is done to drifting k and v (3, 200, 3, 4); the share of decisions that may hang on the last
# bit.
UNUSUAL = {
    "some tokens zero": (
        lambda k, v: (times(k, 0, slice(3, None, 7)), times(v, 0, slice(1, None, 5))),
        0.0,
    ),
    "first token zero": (lambda k, v: (times(k, 0, 0), times(v, 0, 0)), 0.0),
    "zero from some token on": (
        lambda k, v: (times(k, 0, slice(60, None)), times(v, 0, slice(90, None))),
        0.3,
    ),
    "a head zero": (lambda k, v: (times(k, 0, ALL, 1), times(v, 0, ALL, 2)), 0.0),
    "keys zero": (lambda k, v: (k * 0, v), 0.0),
    "values zero": (lambda k, v: (k, v * 0), 0.0),
    "a sequence zero": (
        lambda k, v: (torch.cat((k[:2], k[2:] * 0)), torch.cat((v[:2], v[2:] * 0))),
        0.31,
    ),
    "one token all along": (lambda k, v: (k[:, :1].expand_as(k), v[:, :1].expand_as(v)), 0.8),
    "signs alternate": (lambda k, v: (k * SIGNS, v * SIGNS), 0.0),
    "heads alike": (lambda k, v: (k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)), 0.0),
    "values are the keys": (lambda k, v: (k, k), 0.0),
    "one huge token": (lambda k, v: (times(k, 1e9, 50), times(v, 1e9, 70)), 0.0),
    "growing": (lambda k, v: (k * GROWTH, v * GROWTH), 0.0),
    "shrinking": (lambda k, v: (k * GROWTH.flip(0), v * GROWTH.flip(0)), 0.0),
    "huge": (lambda k, v: (k * 1e100, v * 1e100), 0.0),
    "tiny": (lambda k, v: (k * 1e-100, v * 1e-100), 0.0),
    "heads of different scale": (
        lambda k, v: (times(k, 1e50, ALL, 1), times(v, 1e-50, ALL, 2)),
        0.0,
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_agrees_with_the_loop_on_unusual_input(name):
    change, unsettled = UNUSUAL[name]
    k, v = change(*drift(3, 200, 3, 4))
    assert_agrees(k, v, [200, 120, 200], [0.5, 0.3, 0.8], FilterConfig(), unsettled)


@settings(max_examples=100)
@given(
    data=st.data(),
    shape=st.tuples(*(st.integers(1, n) for n in (4, 60, 5, 9))),
    config=st.builds(
        FilterConfig,
        warmup=st.integers(0, 20),
        history=st.integers(1, 40),
        gamma=st.floats(0, 0.99),
        fusion=st.sampled_from(["variance", "equal", "key", "value"]),
    ),
    seed=st.integers(0, 999),
)
def test_agrees_with_the_loop_on_whatever_hypothesis_draws(data, shape, config, seed):
    B, T, _, D = shape
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    ratio = data.draw(st.lists(st.floats(0, 1), min_size=B, max_size=B))
    assert_agrees(*drift(*shape, seed), lengths, ratio, config, unsettled=1.0 if D == 1 else 0.0)


@pytest.mark.parametrize("fusion", ["variance", "key-query"])
def test_agrees_with_the_loop_from_one_chunk_to_the_next(fusion):
    k, v = drift(3, 100, 3, 4)
    q = drifting_queries(3, 100, 3, 4)
    config = FilterConfig(mode="cache", history=30, fusion=fusion)
    ratio = [0.5, 0.3, 0.8]
    state = None
    past = None
    for start, n_new in (
        (0, [20, 0, 7]),
        (20, [50, 50, 0]),
        (70, [20, 1, 20]),
        *((t, [1, 1, 1]) for t in range(90, 100)),
    ):
        k_chunk, v_chunk, q_chunk = (x[:, start : start + max(n_new)] for x in (k, v, q))
        redundant, score, state = feed(k_chunk, v_chunk, [n_new], ratio, config, state, q=q_chunk)
        *want, _, past = filter_loop(
            k_chunk.numpy(), v_chunk.numpy(), n_new, ratio, config, past, q_chunk.numpy()
        )
        assert_same((redundant, score), want)


@pytest.mark.parametrize("history", [7, 64, 256])
def test_the_state_holds_the_loop_s_anchors_and_scores(history):
    """The history is a ring: the score of position t in column t mod W, NaN where there is none."""
    k, v = drift(4, 150, 3, 4)
    config = FilterConfig(history=history)
    lengths = [150, 0, 149, 1]
    state = feed(k, v, random_chunks(lengths, 0), 0.5, config)[2]
    past = filter_loop(k.numpy(), v.numpy(), lengths, [0.5] * 4, config)[3]
    for b, n in enumerate(lengths):
        ring = np.full(history, math.nan)
        for t in range(n):
            ring[t % history] = past[b].scores[t]
        assert state.count[b] == n
        np.testing.assert_allclose(state.history[b], ring, rtol=0, atol=1e-9)
        if n > 0:
            anchors = np.stack([past[b].A_K, past[b].A_V])
            np.testing.assert_allclose(state.anchor[b], anchors, rtol=1e-9, atol=1e-9)


def test_the_state_holds_the_loop_s_anchor_and_cosines_of_queries():
    k, v = drift(4, 150, 3, 4)
    q = drifting_queries(4, 150, 3, 4)
    lengths = [150, 0, 149, 1]
    state = feed(k, v, random_chunks(lengths, 0), 0.5, KEY_QUERY, q=q)[2]
    past = filter_loop(k.numpy(), v.numpy(), lengths, [0.5] * 4, KEY_QUERY, q=q.numpy())[3]
    W = KEY_QUERY.history
    for b, n in enumerate(lengths):
        rings = np.full((2, W), math.nan)
        for t in range(n):
            rings[:, t % W] = past[b].c_k[t], past[b].c_q[t]
        np.testing.assert_allclose(state.cosine_history[:, b], rings, rtol=0, atol=1e-9)
        if n > 0:
            np.testing.assert_allclose(state.anchor[b, 2], past[b].A_Q, rtol=1e-9, atol=1e-9)


def test_equal_scores_are_never_filtered():
    """Zeros score exactly 0, all of them; even a ratio of 0.99 finds none above the others."""
    zero = torch.zeros(1, 90, 2, 4, dtype=torch.float64)
    redundant, score, _ = feed(zero, zero, [[90]], 0.99, FilterConfig())
    assert not redundant.any() and (score == 0).all()


def test_the_first_token_is_its_own_anchor():
    k, v = drift(2, 1, 3, 8)
    k[1] = 0
    v[1] = 0
    _, score, state = feed(k, v, [[1, 1]], 0.5, FilterConfig())
    np.testing.assert_allclose(score, [[1], [0]], rtol=1e-15)
    np.testing.assert_allclose(state.anchor[:, 0], k[:, 0], rtol=1e-15)
    np.testing.assert_allclose(
        state.history[:, 0], [1, 0], rtol=1e-15
    )  # it enters the history like every other


@pytest.mark.parametrize("T", [1, 63, 64, 65, 128, 129, 600])
def test_running_average_is_the_recurrence(T):
    x = drift(2, T, 3, 4)[0]
    start = drift(2, 1, 3, 4, seed=1)[0][:, 0]
    averages = [start]
    for t in range(T):
        averages.append(0.9 * averages[-1] + (1 - 0.9) * x[:, t])
    torch.testing.assert_close(
        running_averages(x, start, 0.9), torch.stack(averages, 1), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "recent, warmup, window, more",
    [
        (0, 4, None, {}),
        (0, 0, 3, {}),
        (1, 1, None, {"prune": 0.8}),
        (3, 4, None, {"keys": "unrotated", "history": 8}),
        (5, 4, 3, {}),
        (12, 6, 9, {}),
        (
            5,
            4,
            9,
            {"prune": 0.3, "schedule": "head"},
        ),  # a window that is the shortest, between, the longest
    ],
)
@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_the_transformer_lets_every_token_see_what_it_may(mode, recent, warmup, window, more):
    config = FilterConfig(mode=mode, recent=recent, warmup=warmup, **more)
    assert_transformer_agrees(small("gqa", window, n_layers=3), config)


@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("keys", CHOICES["keys"])
@pytest.mark.parametrize("mode", ["local", "cache"])
def test_the_transformer_compares_keys_with_queries(mode, keys, shape):
    config = FilterConfig(mode=mode, recent=3, warmup=4, fusion="key-query", keys=keys)
    assert_transformer_agrees(small(shape, n_layers=3, qk_norm=True), config)


def assert_transformer_agrees(model, config):
    """With decode_loop: two texts of different length, in prefill and then one by one."""
    tokens = torch.randint(0, 97, (2, 44))
    cache = model.new_cache(2, config)
    got = [[], []]
    for n_new in ([25, 9], *[[1, 1]] * 15):
        done = cache.lengths[:, None]
        logits = model(tokens[[[0], [1]], done + torch.arange(max(n_new))], cache, n_new)
        redundant = torch.stack([layer.redundant for layer in cache.decisions()])  # (L, B, T)
        for row, n in enumerate(n_new):
            got[row].append((logits[row, :n], redundant[:, row, :n]))
    for row in range(2):
        logits = torch.cat([a for a, _ in got[row]])
        redundant = torch.cat([b for _, b in got[row]], dim=1)
        want, want_redundant = decode_loop(model, tokens[row, : len(logits)], config)
        assert redundant.tolist() == want_redundant and redundant.any()
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-9)


# --------------------------------------------------------- 3. chunk-free, batch-invariant, causal

LENGTHS = [300, 0, 1, 17, 211]  # of the rows of a batch
FUSIONS = ["variance", "key", "key-query"]


@pytest.mark.parametrize("lengths", [LENGTHS, [300] * 5], ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("history", [5, 256])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_any_chunks_give_the_same_result(ratio, history, fusion, lengths):
    k, v = drift(5, 300, 3, 16)
    q = drifting_queries(5, 300, 3, 16)
    config = FilterConfig(mode="cache", history=history, fusion=fusion)
    whole = feed(k, v, [lengths], ratio, config, q=q)
    one_by_one = [[int(t < n) for n in lengths] for t in range(300)]
    for chunks in (one_by_one, random_chunks(lengths, 0), random_chunks(lengths, 1, largest=200)):
        assert_same(feed(k, v, chunks, ratio, config, q=q), whole)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_sequence_does_not_depend_on_its_neighbours(fusion):
    k, v = drift(5, 300, 3, 16)
    q = drifting_queries(5, 300, 3, 16)
    ratio = [0.5, 0.1, 1.0, 0.9, 0.3]
    config = FilterConfig(mode="cache", fusion=fusion)
    redundant, score, _ = feed(k, v, random_chunks(LENGTHS, 2), ratio, config, q=q)
    for b, n in enumerate(LENGTHS):
        alone = feed(k[b : b + 1], v[b : b + 1], [[n]], ratio[b], config, q=q[b : b + 1])
        assert_same(alone, (redundant[b : b + 1], score[b : b + 1]))


@pytest.mark.parametrize("fusion", ["variance", "key-query"])
@pytest.mark.parametrize("change", [0.0, -1e6, 1e100])
@pytest.mark.parametrize("t", [1, 40, 63, 64, 128, 199])
def test_a_later_token_changes_nothing_earlier(t, change, fusion):
    k, v = drift(2, 200, 3, 4)
    q = drifting_queries(2, 200, 3, 4)
    config = FilterConfig(mode="cache", fusion=fusion)
    before = feed(k, v, [[200, 200]], 0.5, config, q=q)
    after = feed(
        times(k, change, slice(t, None)),
        times(v, change, slice(t, None)),
        [[200, 200]],
        0.5,
        config,
        q=times(q, change, slice(t, None)),
    )
    assert_same([x[:, :t] for x in after[:2]], [x[:, :t] for x in before[:2]])


@pytest.mark.parametrize("fusion", ["variance", "key-query"])
@pytest.mark.parametrize("pad", [0.0, 1e6, math.nan, math.inf])
def test_padding_changes_nothing(pad, fusion):
    k, v = drift(3, 60, 2, 4)
    q = drifting_queries(3, 60, 2, 4)
    config = FilterConfig(mode="cache", warmup=4, fusion=fusion)
    n_new = torch.tensor([50, 0, 7])
    results = []
    for fill in (1.0, pad):
        state = feed(k, v, [[20, 20, 20]], 0.5, config, q=q)[2]
        padding = torch.arange(60)[:, None, None] >= n_new[:, None, None, None]
        k_chunk, v_chunk, q_chunk = (x.masked_fill(padding, fill) for x in (k, v, q))
        results.append(
            (
                *token_filter(k_chunk, v_chunk, n_new, state, 0.5, config, q_chunk),
                state.anchor,
                state.history,
                state.cosine_history,
                state.count,
            )
        )
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, equal_nan=True)


# ---------------------------------------------------------------- 4. the threshold rule on scores


@pytest.mark.parametrize("W", [1, 2, 7, 32])
def test_threshold_is_the_rule_on_scores_full_of_ties_and_nan(W):
    """Each score has its own n scores before it, anywhere among W columns."""
    rng = np.random.default_rng(0)
    ratio = np.array([0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.999, 1] * 8)
    B = len(ratio)
    T = 5
    values = np.array([-1, 0, 0.25, 0.5, 1, np.nan])
    n = rng.integers(0, W + 1, (B, T))
    score = rng.choice(values, (B, T))
    past = rng.choice(values, (B, T, W))
    past = rng.permuted(np.where(np.arange(W) < n[..., None], past, np.nan), axis=-1)
    above = exceeds_quantile(*(torch.tensor(x) for x in (score, past, n, ratio[:, None])))
    for b, t in np.ndindex(B, T):
        scores = [*past[b, t][~np.isnan(past[b, t])], *[np.nan] * W]
        assert above[b, t] == is_above(score[b, t], scores[: n[b, t]], ratio[b])


def test_threshold_is_met_exactly_at_the_ceiling():
    """With n scores before and ratio 1 - m/n, having m below is enough and m - 1 is not, however 1
    - m/n rounds.
    """
    W = 60
    n, m = torch.tensor([(n, m) for n in range(1, W + 1) for m in range(1, n)]).T[
        ..., None
    ]  # (B, 1) each
    past = torch.arange(W, dtype=torch.float64).expand(len(n), 1, W)
    past = past.masked_fill(past >= n[..., None], math.nan)  # 0 .. n-1
    ratio = 1 - m.double() / n
    for score, expected in ((m - 0.5, True), (m - 1.5, False)):
        score = score.double()
        assert (exceeds_quantile(score, past, n, ratio) == expected).all()
        for i in range(0, len(n), 10):  # a ratio for all is as exact as one for each
            assert (
                exceeds_quantile(score[i : i + 1], past[i : i + 1], n[i : i + 1], ratio[i].item())
                == expected
            )


def threshold_of(scores, W, ratio):
    """Every score ranked among the W before it."""
    padded = torch.tensor([math.nan] * W + scores, dtype=torch.float64)
    n = torch.arange(len(scores))[None].clamp(max=W)
    return exceeds_quantile(padded[None, W:], padded[:-1].unfold(0, W, 1)[None], n, ratio)[0]


@pytest.mark.parametrize(
    "scores, ratio, expected",
    [
        (
            [1, 2, 3, 4, 5],
            0.5,
            [0, 1, 1, 1, 1],
        ),  # each above all before it; the first has none before it
        ([5, 4, 3, 2, 1], 0.5, [0, 0, 0, 0, 0]),
        ([3, 3, 3, 3, 3], 0.9, [0, 0, 0, 0, 0]),  # ties keep the token
        ([3, 3, 3, 3, 3], 1.0, [0, 1, 1, 1, 1]),  # everything lies above the lowest quantile
        ([1, 2, 3, 4, 5], 0.0, [0, 0, 0, 0, 0]),  # nothing is asked for
        (
            [1, 2, math.nan, 1.5, 3],
            0.5,
            [0, 1, 0, 0, 1],
        ),  # 1.5: 1 of 3 is below, 2 are needed, NaN is not below
        ([1, math.nan, 2, 1, 1], 1.0, [0, 0, 1, 1, 1]),  # NaN is kept even so
        ([9, 1, 2, 3, 4], 0.5, [0, 0, 1, 1, 1]),
    ],
)
def test_threshold_by_hand(scores, ratio, expected):
    assert threshold_of(scores, 3, ratio).int().tolist() == expected


# ----------------------------------------------------- 5. properties that hold whatever the input

SEEDS = st.integers(0, 999)
FACTORS = st.lists(st.floats(1e-30, 1e30), min_size=6, max_size=6)


@given(low=st.floats(0, 1), high=st.floats(0, 1), seed=SEEDS)
def test_a_larger_ratio_filters_the_same_tokens_and_more(low, high, seed):
    k, v = drift(3, 80, 2, 4, seed)
    low, high = sorted((low, high))
    fewer, more = (
        feed(k, v, [[80, 60, 80]], ratio, FilterConfig(history=20))[0] for ratio in (low, high)
    )
    assert not (fewer & ~more).any()


@given(warmup=st.integers(0, 90), seed=SEEDS)
def test_the_warm_up_is_never_filtered(warmup, seed):
    k, v = drift(2, 80, 2, 4, seed)
    redundant, score, _ = feed(
        k, v, random_chunks([80, 70], seed), 1.0, FilterConfig(warmup=warmup)
    )
    first = max(warmup, 1)
    assert not redundant[:, :first].any()
    assert (
        redundant[0, first:].all() and redundant[1, first:70].all()
    )  # and at ratio 1 it alone is not
    assert not np.isnan(score[0]).any()  # the warm-up is scored as well


@given(factors=FACTORS, seed=SEEDS)
def test_scale_does_not_matter(factors, seed):
    """Neither of keys nor of values nor of a single head."""
    k, v = drift(1, 60, 3, 4, seed)
    factor_k, factor_v = torch.tensor(factors, dtype=torch.float64).view(2, 3, 1)
    scaled = feed(k * factor_k, v * factor_v, [[60]], 0.5, FilterConfig())
    assert_same(scaled, feed(k, v, [[60]], 0.5, FilterConfig()))


@given(order_k=st.permutations(range(4)), order_v=st.permutations(range(4)), seed=SEEDS)
def test_the_order_of_heads_does_not_matter(order_k, order_v, seed):
    k, v = drift(1, 60, 4, 4, seed)
    shuffled = feed(k[:, :, order_k], v[:, :, order_v], [[60]], 0.5, FilterConfig())
    assert_same(shuffled, feed(k, v, [[60]], 0.5, FilterConfig()))


@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan]), min_size=1, max_size=40),
    ratio=st.floats(0, 0.99),
)
def test_a_token_tied_with_the_best_before_it_is_kept(scores, ratio):
    above = threshold_of(scores, 8, ratio)
    for t in range(len(scores)):
        recent = scores[max(0, t - 8) : t]
        if not any(other < scores[t] for other in recent):
            assert not above[t]


@pytest.mark.parametrize("fusion", ["variance", "key"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_realised_ratio_is_near_the_target_on_stationary_noise(ratio, fusion):
    k, v = (
        torch.randn(
            2, 8, 1000, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        + 1
    )
    redundant, *_ = feed(k, v, [[1000] * 8], ratio, FilterConfig(fusion=fusion))
    assert abs(redundant[:, 256:].mean() - ratio) < 0.02


# ---------------------------------------------------------------- 6. layer_ratios

PRUNES = [0, 0.001, 0.1, 0.2, 0.3, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
SCHEDULES = ["tail", "uniform", "head", "last"]


def ratios(schedule, p, L):
    return layer_ratios(FilterConfig(prune=p, schedule=schedule), L)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_mean_over_layers_is_the_ratio_asked_for(schedule):
    for L in (*range(1, 13), 30, 80):
        whole_layers = [full * m / L for m in range(L) for full in (1, 0.9)]
        just_below = [p - 1e-10 for p in whole_layers if p]
        for p in PRUNES + whole_layers + just_below:
            got = ratios(schedule, p, L)
            assert len(got) == L and all(0 <= r <= 1 for r in got)
            assert abs(math.fsum(got) / L - p) < 1e-12


@pytest.mark.parametrize("L", [2, 3, 12, 30, 80])
def test_tail_is_the_formula_and_head_its_reverse(L):
    for p in PRUNES + [(L - 1) / L]:
        got = ratios("tail", p, L)
        expected = (
            tail_by_bisection(p, L) if p <= (L - 1) / L else [p * L - (L - 1)] + [1.0] * (L - 1)
        )
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
        assert got == sorted(got)
        assert ratios("head", p, L) == got[::-1]
        if p <= 0.5:
            np.testing.assert_allclose(
                got, [2 * p * layer / (L - 1) for layer in range(L)], rtol=0, atol=1e-15
            )


@pytest.mark.parametrize("L", [1, 2, 3, 12, 30, 80])
def test_uniform_is_constant_and_last_fills_layers_from_the_end(L):
    for p in PRUNES:
        assert ratios("uniform", p, L) == [p] * L
        top = max(0.9, p)
        expected = [min(top, max(0, p * L - top * after)) for after in range(L)][::-1]
        np.testing.assert_allclose(ratios("last", p, L), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_layer_takes_the_whole_ratio(schedule):
    assert all(ratios(schedule, p, 1) == pytest.approx([p], abs=1e-15) for p in PRUNES)


# ---------------------------------------------------------------- 7. FilterConfig and presets


@pytest.mark.parametrize(
    "field, values",
    {
        "prune": [-0.1, 1, 1.5, math.nan, math.inf, "0.5", None],
        "gamma": [-0.1, 1, 1.5, math.nan, math.inf, "0.5", None],
        "warmup": [-1, 1.5, "16", None],
        "recent": [-1, 1.5, "32", None],
        "history": [0, -1, 2.5, "256", None],
        "mode": ["", "Skip", None],
        "schedule": ["", "first", None],
        "fusion": ["", "max", None],
        "keys": ["", "raw", None],
    }.items(),
)
def test_bad_settings_are_refused_by_name(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"\b{field}\b"):
            FilterConfig(**{field: value})


@pytest.mark.parametrize(
    "name, mode, recent, schedule, score",
    [
        ("paper", "skip", 0, "tail", ("variance", "rotated")),
        ("local", "local", 32, "uniform", ("variance", "rotated")),
        ("cache", "cache", 32, "uniform", ("key-query", "unrotated")),
    ],
)
def test_presets(name, mode, recent, schedule, score):
    config = preset(name, prune=0.3)
    assert (config.mode, config.recent, config.schedule) == (mode, recent, schedule)
    assert (config.gamma, config.warmup, config.history) == (0.9, 16, 64)
    assert (config.prune, config.fusion, config.keys) == (0.3, *score)


def test_paper_is_the_default_and_overrides_win():
    assert preset("paper") == FilterConfig()
    assert preset("local", recent=0, schedule="head") == FilterConfig(mode="local", schedule="head")


def test_unknown_presets_and_fields_are_refused_by_name():
    with pytest.raises(ValueError, match="papre"):
        preset("papre")
    with pytest.raises((TypeError, ValueError), match=r"\bprun\b"):
        preset("paper", prun=0.3)
    with pytest.raises(ValueError, match=r"\bprune\b"):
        preset("paper", prune=1.5)


def test_key_query_is_refused_where_redundant_tokens_have_no_queries():
    with pytest.raises(ValueError, match="fusion='key-query' needs mode local or cache"):
        FilterConfig(mode="skip", fusion="key-query")
    assert preset("cache").needs_queries
    assert not any(preset(name).needs_queries for name in ("paper", "local"))


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        FilterConfig().prune = 0.9


# ---------------------------------------------------------------- 8. FilterState, half precision


@pytest.mark.parametrize("fusion", ["variance", "key-query"])
def test_selected_rows_go_on_as_if_alone(fusion):
    """Rows are dropped, reordered and copied; copies then go separate ways."""
    k, v = drift(3, 110, 2, 4)
    q = drifting_queries(3, 110, 2, 4)
    ratio = [0.5, 0.3, 0.8]
    config = FilterConfig(mode="cache", history=20, fusion=fusion)
    state = feed(k, v, [[70, 10, 50]], ratio, config, q=q)[2]
    state.select(torch.tensor([2, 0, 2]))
    more = [torch.stack((x[2, 50:90], x[0, 70:110], x[2, 60:100])) for x in (k, v, q)]
    got = feed(*more[:2], [[40, 40, 30]], [0.8, 0.5, 0.8], config, state, q=more[2])
    for b, (row, old, new) in enumerate(((2, 50, 40), (0, 70, 40), (2, 50, 30))):
        joined = [torch.cat((x[row, :old], y[b]))[None] for x, y in zip((k, v, q), more)]
        alone = feed(*joined[:2], [[old + new]], ratio[row], config, q=joined[2])
        assert_same([x[b] for x in got[:2]], [x[0, old:] for x in alone[:2]])


def test_nbytes_is_what_the_state_holds():
    B = 3
    KVH = 2
    D = 16
    W = 64
    for dtype, size in ((torch.float32, 4), (torch.float64, 8)):
        state = FilterState(B, KVH, D, FilterConfig(), 0, dtype, "cpu")
        assert state.nbytes() == B * (size * (2 * KVH * D + W) + 8)  # anchors, history, count
    state.select(torch.tensor([1]))
    assert state.nbytes() == 8 * (2 * KVH * D + W) + 8

    # With queries one anchor and two histories more.
    state = FilterState(B, KVH, D, KEY_QUERY, 0, torch.float32, "cpu")
    assert state.nbytes() == B * (4 * (3 * KVH * D + 3 * W) + 8)
    state.select(torch.tensor([1]))
    assert state.nbytes() == 4 * (3 * KVH * D + 3 * W) + 8


def test_a_new_state_has_seen_nothing():
    state = FilterState(2, 3, 4, FilterConfig(history=5), 7, torch.float32, "cpu")
    assert (state.anchor.shape, state.history.shape, state.count.shape) == (
        (2, 2, 3, 4),
        (2, 5),
        (2,),
    )
    assert state.history.isnan().all() and (state.count == 0).all() and state.layer == 7
    assert (state.anchor.dtype, state.history.dtype, state.count.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_input_is_judged_in_float32(dtype):
    """Rounded to half precision, k and v are judged as exactly as before: only the state's
    precision counts.
    """
    k, v = (x.to(dtype) for x in drift(2, 200, 3, 16))
    redundant, score, state = feed(
        k, v, random_chunks([200, 150], 0), 0.5, FilterConfig(), dtype=torch.float32
    )
    want, want_score, *_ = filter_loop(
        k.double().numpy(), v.double().numpy(), [200, 150], [0.5, 0.5], FilterConfig()
    )
    np.testing.assert_allclose(score, want_score, rtol=0, atol=1e-5)
    assert (redundant != want).mean() < 0.01
    assert state.anchor.dtype == state.history.dtype == torch.float32


# --------------------------------------- 9. whole-tensor operations, none of which waits for data


class Operations(TorchDispatchMode):
    """Lists them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def operations(shape, fusion):
    """What token_filter calls on k, v of a shape, on the meta device, where there is no value to
    read.
    """
    B, T, KVH, D = shape
    config = FilterConfig(mode="cache", fusion=fusion)
    k = torch.ones(shape, device="meta")
    n_new = None if T == 1 else torch.full((B,), T, device="meta")
    state = FilterState(B, KVH, D, config, 0, torch.float32, "meta")
    with Operations() as mode:
        token_filter(k, k, n_new, state, 0.5, config, k)
    return mode.names


@pytest.mark.parametrize("fusion", FUSIONS)
def test_operations_do_not_depend_on_sequences_heads_and_head_size_and_hardly_on_tokens(fusion):
    for T in (1, 5):
        for B, KVH, D in ((1, 1, 4), (9, 3, 4), (2, 32, 4), (2, 3, 128)):
            assert operations((B, T, KVH, D), fusion) == operations((2, T, 3, 4), fusion)
    # Running averages are taken block by block, a block of 64 tokens in a dozen operations.
    few = len(operations((2, 5, 3, 4), fusion))
    many = len(operations((2, 1000, 3, 4), fusion))
    assert 20 < few < many <= few + 12 * 1000 / 64
