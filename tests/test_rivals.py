"""Baselines do what they are named for, within their budget, and ablations change one thing."""

import math
import re

import numpy as np
import pytest
import torch

from eval_ppl import evaluate
from evaluation.rivals import (
    baselines,
    by_chance,
    key_distance,
    main,
    oracle,
    variations,
)
from filter_config import FilterConfig, preset
from golden.loop import drift, is_above
from model import rope_frequencies
from test_cli import LONG, refused
from test_filter import rotated, small
from test_generation import PROMPTS
from test_model import LENGTHS, texts
from token_filter import FilterState

BASELINES = list(baselines(0.5, n_layers=4, window=60))


def last_score(model, windows, setting, **more):
    """The Score of all windows."""
    *_, score = evaluate(model, windows, setting, **more)
    return score


def literal(model, tokens, visible, attention=None):
    """Logits (T, V) of one text, without a cache.

    visible (L, T, T) says which keys a query sees; one that sees none adds nothing. `attention`, a
    list, gets each layer's weights (H, T, T) and values (T, H, D).
    """
    config = model.config
    T = len(tokens)
    group = config.heads // config.kv_heads
    angle = torch.arange(T)[:, None, None] * rope_frequencies(config).double()
    x = model.embed(tokens)
    for block, sees in zip(model.blocks, visible):
        h = block.attn_norm(x)
        q = rotated(block.attn.q(h).view(T, config.heads, config.head_dim), angle)
        k = rotated(block.attn.k(h).view(T, config.kv_heads, config.head_dim), angle)
        k = k.repeat_interleave(group, dim=1)
        v = block.attn.v(h).view(T, config.kv_heads, config.head_dim)
        v = v.repeat_interleave(group, dim=1)
        logits = torch.einsum("qhd,khd->hqk", q, k) / config.head_dim**0.5
        weights = logits.masked_fill(~sees, -math.inf).softmax(-1).nan_to_num(0)
        if attention is not None:
            attention.append((weights, v))
        x = x + block.attn.o(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        x = x + block.mlp(block.mlp_norm(x))
    return model.head(model.norm(x))


# ---------------------------------------------------------------------------------- baselines


def assert_sees(setting, visible, held, sizes):
    """Its logits are those of a plain forward, and its cache holds so many slots in the end."""
    model = small()
    tokens = texts()[0]
    cache = model.new_cache(1, setting.filter, setting.filter_fn)
    logits = torch.cat([model(piece[None], cache)[0] for piece in tokens.split(sizes)])
    expected = literal(model, tokens, torch.stack(visible))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    assert int(cache.usage()[0, 2]) == held


CHUNKS = [[90], [1] * 90, [33, 1, 56]]


@pytest.mark.parametrize("sizes", CHUNKS, ids=["whole", "one by one", "three"])
def test_last_layers_without_attention(sizes):
    """A quarter of four layers is the last, where only the first token has attention."""
    setting, *_ = baselines(0.25, 4, 60)
    t = torch.arange(90)
    causal = t[:, None] >= t
    first = causal & (t[:, None] < 1)
    # That layer holds the first token, which is always kept, and the latest.
    assert_sees(setting, [causal, causal, causal, first], 3 * 90 + 2, sizes)


@pytest.mark.parametrize("sizes", CHUNKS, ids=["whole", "one by one", "three"])
def test_streaming_llm(sizes):
    """45 of 60 tokens are visible: 16 sinks, a token itself, and the 28 before it."""
    _, setting, *_ = baselines(0.25, 4, 60)
    assert setting.label == "StreamingLLM, as much held"
    assert setting.filter.recent == 28
    t = torch.arange(90)
    distance = t[:, None] - t
    sees = (distance >= 0) & ((t < 16) | (distance < 29))
    assert_sees(setting, [sees] * 4, 4 * 45, sizes)


@pytest.mark.parametrize("setting", BASELINES, ids=[setting.label for setting in BASELINES])
def test_baselines_are_chunk_free_and_batch_invariant(setting):
    model = small()
    rows = [texts()[row, :n].tolist() for row, n in enumerate(LENGTHS)]

    def new_cache(rows):
        filter_fn = setting.filter_fn
        if setting.prepare is not None:
            filter_fn = setting.prepare(model, rows, setting.filter)
        return model.new_cache(len(rows), setting.filter, filter_fn)

    together = model(texts(), new_cache(rows), LENGTHS)
    for row, ids in enumerate(rows):
        cache = new_cache([ids])
        alone = torch.cat([model(torch.tensor([[token]]), cache)[0] for token in ids])
        torch.testing.assert_close(together[row, : len(ids)], alone, rtol=0, atol=1e-9)


def key_distance_loop(k, ratio, config):
    """KeyDiff, one token and one head at a time: keys k (T, KVH, D) -> scores, redundant."""
    T, KVH, D = k.shape
    units = []
    scores = []
    redundant = []
    for t in range(T):
        norms = np.linalg.norm(k[t], axis=1, keepdims=True)  # (KVH, 1)
        unit = np.divide(k[t], norms, out=np.zeros((KVH, D)), where=norms > 0)
        mean = np.mean(units, axis=0) if units else np.zeros((KVH, D))
        cosines = []
        for h in range(KVH):
            length = np.linalg.norm(mean[h])
            cosines.append(unit[h] @ mean[h] / length if length > 0 else 0.0)
        score = np.mean(cosines)
        latest = scores[max(0, t - config.history) :]
        redundant.append(t >= config.warmup and is_above(score, latest, ratio))
        scores.append(score)
        units.append(unit)
    return scores, redundant


@pytest.mark.parametrize(
    "chunks",
    [[[70, 40, 0]], [[30, 5, 0], *[[1, 1, 0]] * 35, [5, 0, 0]]],
    ids=["one chunk", "many"],
)
def test_key_distance_equals_a_loop(chunks):
    k, v = drift(3, 70, 2, 8)
    k[0, 33] = 0
    config = preset("cache", prune=0.4, warmup=4, history=20)
    state = FilterState(3, 2, 8, config, 0, torch.float64, "cpu")
    n_done = [0, 0, 0]
    scores: list[list[float]] = [[], [], []]
    redundant: list[list[bool]] = [[], [], []]
    for lengths in chunks:
        index = torch.tensor(n_done)[:, None] + torch.arange(max(lengths))
        index = index.clamp(max=69)
        rows = torch.arange(3)[:, None]
        found, score = key_distance(
            k[rows, index], v[rows, index], torch.tensor(lengths), state, 0.4, config
        )
        for b, n in enumerate(lengths):
            assert not found[b, n:].any()  # padding
            assert score[b, n:].isnan().all()
            scores[b] += score[b, :n].tolist()
            redundant[b] += found[b, :n].tolist()
            n_done[b] += n
    assert n_done == [70, 40, 0]
    assert sum(map(sum, redundant)) > 20
    for b, n in enumerate(n_done):
        expected_scores, expected = key_distance_loop(k[b, :n].numpy(), 0.4, config)
        assert scores[b] == pytest.approx(expected_scores, abs=1e-9)
        assert redundant[b] == expected


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_baselines_have_the_budget_they_are_named_for(p):
    model = small()
    window = torch.randint(0, 97, (400,)).tolist()
    settings = list(baselines(p, 4, 400))
    scores = [last_score(model, [window], setting, chunk=10) for setting in settings]
    shares = [score.shares for score in scores]
    last_layers, held, read, keys_alone, keydiff, adjusted, knowing, *chance = shares
    # All but the first token.
    assert last_layers["skipped"] == pytest.approx(round(p * 4) / 4 * (1 - 1 / 400))
    assert held["KV held"] == pytest.approx(1 - p, abs=0.003)
    assert read["KV read"] == pytest.approx(1 - p, abs=0.003)
    assert adjusted["skipped"] == pytest.approx(p, abs=0.06)
    for each in (keys_alone, keydiff, *chance):
        assert each["skipped"] == pytest.approx(p, abs=0.05)
    # Where attention is as good as uniform, each token gets less than those before it.
    assert p < knowing["skipped"] < p + 0.2


# --------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("window", [None, 20])
def test_the_oracle_equals_a_loop(window):
    """Worth: what a query past the recent window gives a token, on average, in the dense model."""
    model = small(window=window)
    ids = PROMPTS[1]
    config = preset("cache", prune=0.5, recent=5)
    T = len(ids)
    t = torch.arange(T)
    distance = t[:, None] - t
    sees = (distance >= 0) & (distance < (window or T))
    attention = []
    literal(model, torch.tensor(ids), [sees] * 4, attention)
    filter_fn = oracle(model, [ids[:9], ids], config)
    for layer, (weights, v) in enumerate(attention):
        state = FilterState(2, 2, 8, config, layer, torch.float64, "cpu")
        ratio = torch.tensor(0.5)
        lengths = torch.tensor([9, T])
        _, score = filter_fn(torch.zeros(2, T, 2, 8), None, lengths, state, ratio, config)
        assert score[0, 9:].isnan().all()
        n_heads = len(weights)
        for j in range(T):
            given = []  # by each query that no longer has j among its recent tokens
            for query in range(j + 6, T):
                by_head = [float(weights[h, query, j] * v[j, h].norm()) for h in range(n_heads)]
                given.append(sum(by_head) / n_heads)
            expected = np.mean(given) if given else 0
            assert -float(score[1, j]) == pytest.approx(expected, abs=1e-9)


def test_perplexity_with_the_oracle_is_that_of_its_choice():
    """The batch's rows are told apart, whatever the chunk."""
    model = small()
    (setting,) = [setting for setting in BASELINES if setting.label == "oracle"]
    score = last_score(model, PROMPTS, setting, batch=2, chunk=17)
    alone = last_score(model, PROMPTS, setting, batch=1)
    torch.testing.assert_close(score.losses, alone.losses, rtol=0, atol=1e-9)
    assert score.shares == alone.shares
    assert score.shares["skipped"] > 0.2


# ------------------------------------------------------------------------------------- chance


def test_chance_is_uniform_and_goes_by_seed_layer_position_and_text():
    config = FilterConfig()

    def scores(layer=0, seed=0, text=0):
        torch.manual_seed(text)
        k, v = torch.randn(2, 1, 4000, 2, 16)
        state = FilterState(1, 2, 16, config, layer, torch.float64, "cpu")
        _, score = by_chance(k, v, torch.tensor([4000]), state, 0.5, config, seed=seed)
        return score[0]

    base = scores()
    assert torch.equal(base, scores())
    assert ((base >= 0) & (base < 1)).all()
    assert len(base.unique()) > 3960
    np.testing.assert_allclose(base.histc(10, 0, 1) / 4000, 0.1, atol=0.02)
    others = {
        "next layer": scores(layer=1),
        "far layer": scores(layer=79),
        "seed 1": scores(seed=1),
        "seed 2": scores(seed=2),
        "large seed": scores(seed=2**40 + 1),
        "text": scores(text=1),
        "position": base.roll(1),
    }
    for what, other in others.items():
        assert abs(np.corrcoef(other, base)[0, 1]) < 0.06, what


# ---------------------------------------------------------------------------------- ablations


def test_variations_change_one_field_each():
    base = preset("paper", prune=0.3)
    found = dict(variations(base))
    for label, config in found.items():
        name, value = label.split("=")
        assert str(getattr(config, name)) == value != str(getattr(base, name))
        assert FilterConfig(**{**vars(config), name: getattr(base, name)}) == base
    expected = {"schedule=uniform", "fusion=key", "keys=unrotated", "gamma=0.99", "warmup=0"}
    assert expected | {"history=128", "recent=8"} <= found.keys()


# ---------------------------------------------------------------------------- the command line


@pytest.fixture
def arguments(checkpoint, tmp_path):
    """A checkpoint, and two windows of a text."""
    (tmp_path / "text.txt").write_text(LONG * 8, encoding="utf-8")
    flags = ["--text", str(tmp_path / "text.txt"), "--window", "64", "--max-tokens", "128"]
    return [str(checkpoint), "--device", "cpu", *flags]


def table(capsys):
    """The printed rows as lists of cells, without their head."""
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()[1:]
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def test_baselines_are_a_row_each_at_every_ratio(arguments, capsys):
    main([*arguments, "--preset", "cache", "--prune", "0", "0.2", "0.5"])
    names = [setting.label for setting in baselines(0.5, 3, 128)]
    expected = [["dense", "0.000"], ["cache", "0.200"], ["cache", "0.500"]]
    expected += [[name, ratio] for ratio in ("0.200", "0.500") for name in names]
    assert [row[:2] for row in table(capsys)] == expected


def test_random_tokens_have_a_row_for_each_seed(arguments, capsys):
    """And rows of a batch draw for themselves: other neighbours do not change the figures."""
    main([*arguments, "--prune", "0.5", "--seed", "0", "1", "2"])
    several = {row[0]: row[2:] for row in table(capsys)}
    drawn = [several[f"cache, random tokens, seed {seed}"] for seed in range(3)]
    assert len({tuple(cells) for cells in drawn}) == 3
    main([*arguments, "--prune", "0.5", "--seed", "2", "--batch", "1"])
    single = {row[0]: row[2:] for row in table(capsys)}
    assert single["cache, random tokens"] == drawn[2]


def test_ablate_changes_one_thing_a_row(arguments, capsys):
    main([*arguments, "--ablate", "--prune", "0.5"])
    rows = {row[0]: row[1:] for row in table(capsys)}
    assert list(rows)[:3] == ["dense", "local", "cache"]
    assert {"local, recent=8", "cache, schedule=tail"} <= rows.keys()
    assert {cells[0] for cells in rows.values()} == {"0.000", "0.500"}
    assert rows["local, gamma=0.5"] != rows["local"]

    # What is changed by a flag is what is changed by the ablation.
    flags = ["--gamma", "0.5", "--prune", "0.5", "--ablate"]
    main([*arguments, "--preset", "local", "cache", *flags])
    changed = {row[0]: row[1:] for row in table(capsys)}
    assert changed["local, gamma 0.5"] == rows["local, gamma=0.5"]
    assert "cache, gamma 0.5, gamma=0.9" in changed
    assert "cache, gamma 0.5, gamma=0.5" not in changed


BAD_FLAGS = {
    "two ratios": (["--ablate", "--prune", "0.1", "0.2"], "--ablate takes one --prune"),
    "no ratio": (["--ablate", "--prune", "0"], "--ablate takes one --prune"),
    "picture of ablations": (["--ablate", "--plot", "x.png"], "draws no --plot"),
    "seed of ablations": (["--ablate", "--seed", "1"], "does nothing with --ablate"),
    "recent": (["--recent", "8"], "leave out --recent"),
    "warmup": (["--warmup", "0"], "leave out --warmup"),
    "keys": (["--preset", "cache", "--keys", "unrotated"], "leave out --keys"),
    "negative seed": (["--seed", "1", "-1"], "--seed must be"),
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_end_in_one_line(arguments, capsys, flags, message):
    assert message in refused(capsys, *arguments, *flags, command=main)
