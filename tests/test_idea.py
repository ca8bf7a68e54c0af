"""The numbers of the lesson: the worked example, the formulas of what is saved, the answers to the exercises."""

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from docs.figures import idea, sizes
from model import ModelConfig, Transformer
from filter_config import layer_ratios
from cli.skip_map import decisions
from test_filter import small
from filter_config import CHOICES, FilterConfig, PRESETS, preset
from token_filter import FilterState, exceeds_quantile, token_filter

HERE = Path(__file__).resolve().parent.parent
LESSON = (HERE / "docs" / "lesson.md").read_text(encoding="utf-8")
PROSE = " ".join(LESSON.split())

# ----------------------------------------------------------------------------------------------- the worked example


@pytest.fixture(scope="module")
def example(demo):
    pieces, seen, cache = idea.watch()
    return pieces, seen[idea.LAYER], cache, idea.stages(*seen[idea.LAYER], cache.layers[idea.LAYER].ratio.item())


def test_the_worked_example(example):
    """No other score is near the two, and no figure near where it would be printed otherwise: rounding moves nothing."""
    pieces, _, cache, steps = example
    layer, two = cache.layers[15], (idea.SKIPPED, idea.KEPT)
    np.testing.assert_allclose([step.score for step in steps], layer.score[0], rtol=0, atol=1e-9)
    assert [step.redundant for step in steps] == layer.redundant[0].tolist()
    assert min(abs(steps[t].score - step.score) for t in two for step in steps if step is not steps[t]) > 1e-3
    for row in idea.table(*(steps[t] for t in two)).splitlines():
        assert row in LESSON
    for step in (steps[t] for t in two):
        figures = 1e3 * np.array([*step.c_k, *step.c_v, step.c_k.mean(), step.c_v.mean(), step.w_k, step.score])
        figures = np.append(figures, 1e5 * np.array([step.c_k.var(), step.c_v.var()]))
        assert abs(figures % 1 - 0.5).min() > 1e-4
    # what is said around it, and about the picture
    assert [pieces[t] for t in two] == [" the", " hot"] and idea.LAYER == 15 and f"= 15/29 = {layer.ratio:.3f}$" in PROSE
    assert f"gets {steps[25].w_k:.0%} of the weight" in PROSE and f"gets {1 - steps[26].w_k:.0%} of the weight" in PROSE
    assert [piece for piece, step in zip(pieces[16:], steps[16:]) if not step.redundant] == [" mat", " sat", " hot", " stove"]
    assert '"hot" and "stove" are kept, and so are "mat" and one "sat"' in PROSE
    assert cache.layers[20].redundant[0, 26] and f"{len(pieces)} tokens through the demo model" in PROSE


@pytest.fixture
def figures():
    """The folder of the pages' pictures, which no command writes into unasked."""
    folder = HERE / "docs" / "figures"
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.png")}
    yield folder
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.png")}
    assert after == before and len(before) > 5


def test_the_lesson_s_command_prints_the_table_alone(demo, figures, capsys, monkeypatch):
    """It draws nothing, and needs nothing for drawing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(idea, "draw", None)
    idea.main([])
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("layer 15, ratio 0.517") and len(rows) == 10
    assert all(row in LESSON for row in rows)
    with pytest.raises(SystemExit) as end:
        idea.main(["--draw", "idea.png"])
    assert end.value.code == 2 and "--draw needs matplotlib" in capsys.readouterr().err


def test_the_pictures_are_drawn_where_they_are_asked_for(demo, figures, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    idea.main(["--draw", str(tmp_path / "idea.png")])
    sizes.main(["--draw", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"idea.png", "sizes.png", "reads.png"}
    assert all(path.read_bytes()[1:4] == b"PNG" for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        sizes.main([])
    assert end.value.code == 2 and "--draw" in capsys.readouterr().err


def test_make_figures_writes_the_tracked_pictures(figures):
    recipe = (HERE / "Makefile").read_text(encoding="utf-8").split("\nfigures:")[1].split("\n\n")[0]
    assert "docs.figures.idea --draw docs/figures/idea.png\n" in recipe
    assert "docs.figures.sizes --draw docs/figures\n" in recipe


@pytest.mark.parametrize("recent", [0, 2, 5])
@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_the_slots_drawn_are_those_of_a_cache(mode, recent):
    """A cache that is given decisions holds the keys that the picture would show, and each token reads as many."""
    redundant, keys = torch.rand(1, 40, generator=torch.Generator().manual_seed(0)) < 0.5, []
    redundant[:, :3] = False

    def decided(k, v, n_new, state, ratio, config):
        state.count += 1
        if state.layer == 1:
            keys.append(k[0, 0])
        return redundant[:, state.count - 1], torch.zeros(1, 1)

    model, read = small(n_layers=2), 0
    cache = model.new_cache(1, FilterConfig(prune=0.5, mode=mode, recent=recent, schedule="uniform", warmup=3), decided)
    for t, (front, far) in enumerate(idea.slots(redundant[0].tolist(), 3, recent)):
        model(torch.tensor([[t]]), cache)
        layer, held = cache.layers[1], front + far
        sees = {"skip": 0, "local": len(front), "cache": len(held)}[mode] if redundant[0, t] else len(held)
        assert torch.equal(layer.kv[0, 0, :, : len(held)].transpose(0, 1), torch.stack([keys[i] for i in held]))
        assert int(layer.read) == (read := read + sees)
    assert 5 < len(far) < 37


# -------------------------------------------------------------------------------------------------- what is saved


def numbers(name):
    """The cells of the lesson's table row of this name that are a number."""
    row = next(line for line in LESSON.splitlines() if line.startswith(f"| {name}"))
    return [float(x) for x in re.findall(r"(?<=\| )[\d.]+(?= \|)", row)]


def multiply_adds(C, H, KVH, D, M, S):
    return {"key, value": 2 * C * KVH * D, "query, output": 2 * C * H * D, "attention": 2 * H * D * S, "MLP": 3 * C * M}


def layer_bytes(KVH, D, e, filter, filters):
    """Of a slot; of what a layer keeps for each sequence: its filter's, its counters and flags."""
    slot, stats, front = 2 * KVH * D * e + 8, 8 if e == 8 else 4, max(filter.warmup, 1) + filter.recent + 1
    return slot, (stats * (2 * KVH * D + filter.history) + 8) * filters, 3 * 8 + front * filters


def test_the_tables_of_what_is_saved():
    demo, llama = (multiply_adds(*shape, 1024) for shape in ((576, 9, 3, 64, 1536), (5120, 40, 40, 128, 13824)))
    for name in demo:
        assert numbers(name) == [round(demo[name] / 1e6, 2), round(llama[name] / 1e6, 1)]
    shares = [(part["query, output"] + part["attention"]) / sum(part.values()) for part in (demo, llama)]
    assert f"saves {shares[0]:.0%} of a layer's multiply-adds in the demo model there, {shares[1]:.0%} in LLaMA-2-13B" in PROSE
    rows = ("a slot", "the filter, per sequence")
    assert [numbers(name) for name in rows] == [[x] for x in layer_bytes(3, 64, 4, preset("paper"), True)[:2]]


@pytest.mark.parametrize("name, prune", [("paper", 0.3), ("paper", 0.7), ("local", 0.5), ("cache", 0.5)])
def test_multiply_adds_are_what_the_model_does(name, prune, monkeypatch):
    """Counted by torch, they are the sum of the formulas: of a prefill, but for its attention, and of every decode step."""
    model, attention, done = small(), F.scaled_dot_product_attention, []

    def counting(q, k, v, **options):
        done.append(2 * q.numel() * k.shape[-2])
        return attention(q, k, v, **options)

    def multiply_adds_of(tokens):
        with FlopCounterMode(display=False) as counter:
            model(tokens, cache)
        return counter.get_total_flops() // 2

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    c, filter, tokens = model.config, preset(name, prune=prune, recent=0 if name == "paper" else 8), torch.randint(0, 97, (1, 40))
    part = multiply_adds(c.width, c.heads, c.kv_heads, c.head_dim, c.mlp_width, 1)
    each, kv, qo = c.width * c.vocab_size + 4 * part["MLP"], part["key, value"], part["query, output"]
    cache = model.new_cache(1, filter)
    found, kept = multiply_adds_of(tokens), [40 - int(row.sum()) for row in decisions(cache)[0]]
    assert found == 40 * each + 4 * 40 * kv + (sum(kept) if name == "paper" else 4 * 40) * qo

    cache, reads = model.new_cache(1, filter), [0]
    for t, token in enumerate(tokens.T[:, None]):
        done.clear()
        found = multiply_adds_of(token)
        reads.append(int(cache.usage()[0, 3]))
        open_layers = sum(not (layer.closed and t >= 16) for layer in cache.layers)
        assert found == each + open_layers * (kv + qo)  # a token that skips runs the latter for nothing: the weights are read anyway
        assert sum(done) == part["attention"] * (reads[-1] - reads[-2])
    assert reads[-1] < 4 * 40 * 41 / 2 and sum(kept) < 140


@pytest.mark.parametrize("e, dtype", [(2, torch.bfloat16), (4, torch.float32), (8, torch.float64)])
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("name", PRESETS)
def test_bytes_are_what_the_cache_counts(name, window, e, dtype):
    filter, lengths, live, allocated = preset(name, prune=0.5), [90, 60], 0, 0
    model = Transformer(ModelConfig(97, 32, 4, 6, 2, 8, 48, 1e4, 1e-5, 512, False, window)).to(dtype)
    cache = model.new_cache(2, filter)
    model(torch.randint(0, 97, (2, 90)), cache, lengths)
    for layer, redundant in zip(cache.layers, decisions(cache)[0]):
        slot, *state = layer_bytes(2, 8, e, filter, layer.filters)
        front = 17 + filter.recent if layer.filters else 0
        held = [n - int(redundant[b, : n - front + 16].sum()) for b, n in enumerate(lengths)]  # who has left the ring and is gone
        live += sum(held) * slot + 2 * sum(state)
        allocated += 2 * ((max(held) + 1) * slot + sum(state))  # one stays empty
    assert (cache.live_bytes(), cache.nbytes()) == (live, allocated)


# --------------------------------------------------------------------------------------- the answers to the exercises


def test_answers_1_and_2(example):
    k, v = torch.randn(2, 1, 30, 1, 8, dtype=torch.float64)
    state = FilterState(1, 1, 8, FilterConfig(), 0, torch.float64, "cpu")
    _, score = token_filter(k, v, torch.tensor([30]), state, 0.5, FilterConfig())
    plain = [(step.c_k[0] + step.c_v[0]) / 2 for step in idea.stages(k[0].numpy(), v[0].numpy(), 0.5)]
    np.testing.assert_allclose(score[0], plain, rtol=0, atol=1e-12)
    score = torch.tensor([[step.score for step in example[3]]])
    for t, ratio, redundant in ((25, 0.1999, False), (25, 0.2, True), (26, 0.8846, False), (26, 23 / 26, True)):
        assert exceeds_quantile(score[:, t : t + 1], score[:, None, :t], torch.tensor([[t]]), ratio).item() == redundant
    assert (
        f"but in floating point {(1 - 23 / 26) * 26}" in PROSE
        and "for $r_l < 0.2$" in PROSE
        and f"from $r_l = 23/26 = {23 / 26:.3f}$ on" in PROSE
    )


def test_answer_3():
    changed = {"__name__": "token_filter"}
    exec((HERE / "token_filter.py").read_text().replace("past < score", "past <= score"), changed)
    ties, about = load_file(HERE / "golden" / "ties.safetensors"), json.loads((HERE / "golden" / "files.json").read_text())

    def above(rule, score, ratio, W):
        past = F.pad(score, (W, 0), value=math.nan)[:, :-1].unfold(1, W, 1)
        return rule(score, past, torch.arange(score.shape[1]).clamp(max=W).expand(score.shape), ratio)

    assert "all 74 past the warm-up would be skipped, even at $r_l = 0.1$" in PROSE
    for rule, right, of_90 in ((exceeds_quantile, True, 0), (changed["above_threshold"], False, 74)):
        found = above(rule, ties["score"], ties["ratio"].double()[:, None], about["ties"]["config"]["history"])
        assert torch.equal(found, ties["redundant"]) == right
        assert above(rule, torch.zeros(1, 90), 0.1, 64)[0, 16:].sum() == of_90


def test_answers_4_to_6(example):
    _, (k, v), cache, steps = example
    after = idea.stages(k, v, cache.layers[15].ratio.item(), averaged_first=True)
    before, then = (sum(step.redundant for step in x) for x in (steps, after))
    the, hot = (f"from {steps[t].score:.3f} to {after[t].score:.3f}" for t in (25, 26))
    assert f'`" the"` goes {the}, that of `" hot"` {hot}' in PROSE
    assert all((y.c_k > x.c_k).all() and (y.c_v > x.c_v).all() for x, y in zip(steps[1:], after[1:]))
    assert f"skips {then} tokens of the {len(steps) - 16} past the warm-up instead of {before}" in PROSE
    np.testing.assert_allclose([step.score for step in idea.stages(k, v, 0.5, gamma=0, averaged_first=True)], 1, atol=1e-12)
    ratios = [layer_ratios(FilterConfig(prune=prune), 30) for prune in (0.5, 0.7)]
    assert ratios[0][-2] < ratios[0][-1] == 1 and f"at 0.7 the last {ratios[1].count(1.0)} have it" in PROSE
    with torch.device("meta"):
        model = Transformer(ModelConfig(32000, 5120, 40, 40, 40, 128, 13824, 1e4, 1e-5, 4096, False)).to(torch.bfloat16)
    cache = model.new_cache(128, preset("paper", prune=0.5))
    states, token = sum(layer.state.nbytes() for layer in cache.layers if layer.filters), 40 * cache.slot_bytes
    whole, weights = token * 128 * 512 / 1e9, 2 * sum(p.numel() for p in model.parameters()) / 1e9
    assert token == 40 * 20480 and f"{token:,} in all layers" in PROSE and f"{whole:.1f} GB, twice the weights' {weights:.1f} GB" in PROSE
    saved = 0.5 * 496 / 512
    assert f"496/512 / 2 = {saved:.1%}: {saved * whole:.1f} GB" in PROSE
    assert states == 128 * 38 * 41224 and "41,224 bytes in each of the 38 layers" in PROSE
    assert "0.2 GB. These" in PROSE and round(states / 1e9, 1) == 0.2
