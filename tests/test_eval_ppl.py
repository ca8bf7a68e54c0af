"""Perplexity is that of real decoding, baselines do what they are named for, the command loses nothing."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch

import eval_ppl
from eval_ppl import cut, evaluate, main, variations
from golden.loop import drift, is_above
from load_weights import load
from model import rope_frequencies
from evaluation.rivals import baselines, by_chance, key_distance, oracle, recent_only
from test_filter import turned
from test_generate import FILTERS, LONG, PROMPTS, refused
from test_model import LENGTHS, small, texts
from filter_config import FilterConfig, PRESETS, preset
from token_filter import FilterState

# -------------------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_perplexity_equals_decoding_token_by_token(filter):
    model, nll, usage = small(), torch.zeros(max(LENGTHS)).double(), torch.zeros(5).double()
    for prompt in PROMPTS:
        cache = model.new_cache(1, filter)
        for t, (token, target) in enumerate(zip(prompt, prompt[1:] + [None])):
            logits = model(torch.tensor([[token]]), cache)[0, 0]
            if target is not None:
                nll[t + 1] -= logits.log_softmax(-1)[target]
        usage += cache.usage()[0]
    *_, score = evaluate(model, PROMPTS, filter, batch=2, chunk=17)
    assert score.tokens == sum(LENGTHS) - 3
    torch.testing.assert_close(score.losses, nll, rtol=0, atol=1e-9)
    assert score.perplexity == pytest.approx(math.exp(nll.sum() / (sum(LENGTHS) - 3)), rel=1e-12)
    assert score.between(50, 80) == pytest.approx(math.exp(nll[50:80].sum() / (30 + 13)), rel=1e-12)  # of two rows
    pairs, redundant, held, read, dense_read = usage.tolist()
    assert score.shares == {"skipped": redundant / pairs, "KV held": held / pairs, "KV read": read / dense_read}
    assert filter is not None or score.shares == {"skipped": 0, "KV held": 1, "KV read": 1}


def test_kv_held_and_read_by_hand():
    """Everything past the warm-up redundant: at position t, `local` sees 4 sinks and 3 recent tokens, so min(t + 1, 7)."""
    config = FilterConfig(prune=0.5, mode="local", recent=2, warmup=4, schedule="uniform")
    *_, score = evaluate(small(), [PROMPTS[0][:10]], config, chunk=4, criterion=recent_only)
    read = sum(min(t + 1, 7) for t in range(10))
    assert score.shares == pytest.approx({"skipped": 6 / 10, "KV held": 7 / 10, "KV read": read / 55})


def sliding_loop(model, ids, window, stride, bos, filter):
    """Window by window, token by token: summed loss, and which tokens of the text were scored."""
    head, nll, scored, start, done = [] if bos is None else [bos], 0.0, [], 0, 0
    while done < len(ids):
        piece = (head + ids[start:])[:window]
        logits = model(torch.tensor([piece]), model.new_cache(1, filter))[0].log_softmax(-1)
        for t in range(done, start + len(piece) - len(head)):
            place = t - start + len(head)
            if place > 0:  # something is before it
                nll -= float(logits[place - 1, ids[t]])
                scored.append(t)
        done, start = start + len(piece) - len(head), start + stride
    return nll, scored


@pytest.mark.parametrize("filter", FILTERS[:2], ids=["dense", "paper"])
@pytest.mark.parametrize("window, stride, bos", [
    (40, None, None), (40, 40, None), (40, 13, None), (40, 39, None), (40, 13, 5), (40, None, 5), (89, 1, None), (100, 50, None),
])  # fmt: skip
def test_sliding_windows_equal_a_plain_loop(window, stride, bos, filter):
    model, ids = small(), PROMPTS[0]
    windows, overlap = cut(ids, window, stride, bos)
    *_, score = evaluate(model, windows, filter, batch=2, chunk=32, overlap=overlap)
    nll, scored = sliding_loop(model, ids, window, stride or window - (bos is not None), bos, filter)
    assert score.tokens == len(scored) == len(set(scored))
    assert float(score.losses.sum()) == pytest.approx(nll, abs=1e-9)
    if bos is not None or stride not in (None, window):
        assert len(scored) == len(ids) - (bos is None)


# ------------------------------------------------------------------------------------------------------- baselines


def plain(model, tokens, visible, attention=None):
    """Logits (T, V) of one text, without a cache: visible (L, T, T) says which keys a query sees; one that sees none adds nothing.
    `attention`, if given, gets each layer's weights (H, T, T) and values (T, H, D)."""
    c, x, T = model.config, model.embed(tokens), len(tokens)
    angle = torch.arange(T)[:, None, None] * rope_frequencies(c).double()
    for block, seen in zip(model.blocks, visible):
        h = block.attn_norm(x)
        q = turned(block.attn.q(h).view(T, c.heads, c.head_dim), angle)
        k = turned(block.attn.k(h).view(T, c.kv_heads, c.head_dim), angle).repeat_interleave(c.heads // c.kv_heads, 1)
        v = block.attn.v(h).view(T, c.kv_heads, c.head_dim).repeat_interleave(c.heads // c.kv_heads, 1)
        weights = torch.einsum("qhd,khd->hqk", q, k).div(c.head_dim**0.5).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)
        if attention is not None:
            attention.append((weights, v))
        x = x + block.attn.o(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        x = x + block.mlp(block.mlp_norm(x))
    return model.head(model.norm(x))


@pytest.mark.parametrize("sizes", [[90], [1] * 90, [33, 1, 56]])
def test_last_layers_and_recent_only_equal_a_plain_forward(sizes):
    model, tokens, t = small(), texts()[0], torch.arange(90)
    (_, *static), (label, *streaming), *_ = baselines(0.25, 4, 60)
    causal = t[:, None] >= t
    assert label == "StreamingLLM, as much held" and streaming[0].recent == 28  # and itself and 16 sinks: 45 of 60
    first, recent = causal & (t[:, None] < 1), causal & ((t < 16) | (t[:, None] - t < 29))
    for (config, criterion), visible, held in (
        (static, [causal, causal, causal, first], 3 * 90 + 2),  # of the last layer the first token, always kept, and the latest
        (streaming, [recent] * 4, 4 * 45),
    ):
        cache = model.new_cache(1, config, criterion)
        logits = [model(piece[None], cache)[0] for piece in tokens.split(sizes)]
        torch.testing.assert_close(torch.cat(logits), plain(model, tokens, torch.stack(visible)), rtol=0, atol=1e-9)
        assert int(cache.usage()[0, 2]) == held


@pytest.mark.parametrize("rival", range(9))
def test_rivals_are_chunk_free_and_batch_invariant(rival):
    model, (label, config, criterion) = small(), list(baselines(0.5, 4, 60))[rival]

    def made(rows):
        return oracle(model, rows, config) if label == "oracle" else criterion

    rows = [texts()[row, :n].tolist() for row, n in enumerate(LENGTHS)]
    whole = model(texts(), model.new_cache(3, config, made(rows)), LENGTHS)
    for row, n in enumerate(LENGTHS):
        cache = model.new_cache(1, config, made(rows[row : row + 1]))
        alone = torch.cat([model(texts()[row : row + 1, t : t + 1], cache)[0] for t in range(n)])
        torch.testing.assert_close(whole[row, :n], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunks", [[[70, 40, 0]], [[30, 5, 0]] + [[1, 1, 0]] * 35 + [[5, 0, 0]]])
def test_key_distance_equals_a_loop(chunks):
    k, v = drift(3, 70, 2, 8)
    k[0, 33] = 0
    config = preset("cache", prune=0.4, warmup=4, history=20)
    state, done = FilterState(3, 2, 8, config, 0, torch.float64, "cpu"), [0, 0, 0]
    redundant, score = np.zeros((3, 70), bool), np.full((3, 70), math.nan)
    for n_new in chunks:
        index = (torch.tensor(done)[:, None] + torch.arange(max(n_new))).clamp(max=69)
        rows = torch.arange(3)[:, None]
        found, s = key_distance(k[rows, index], v[rows, index], torch.tensor(n_new), state, 0.4, config)
        for b, n in enumerate(n_new):
            assert not found[b, n:].any() and s[b, n:].isnan().all()  # padding
            redundant[b, done[b] : done[b] + n], score[b, done[b] : done[b] + n] = found[b, :n], s[b, :n]
            done[b] += n
    assert done == [70, 40, 0] and redundant.sum() > 20
    for b, n in enumerate(done):
        units, scores = [], []
        for t in range(n):
            norms = np.linalg.norm(k[b, t].numpy(), axis=1, keepdims=True)  # (KVH, 1)
            unit = np.divide(k[b, t].numpy(), norms, out=np.zeros((2, 8)), where=norms > 0)
            mean = np.mean(units, axis=0) if units else np.zeros((2, 8))
            length = np.linalg.norm(mean, axis=1)
            cosine = [unit[h] @ mean[h] / length[h] if length[h] > 0 else 0.0 for h in range(2)]
            scores.append(np.mean(cosine))
            units.append(unit)
            assert score[b, t] == pytest.approx(scores[t], abs=1e-9)
            assert redundant[b, t] == (t >= 4 and is_above(score[b, t], score[b, max(0, t - 20) : t], 0.4))


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_rivals_have_the_budget_they_are_named_for(p):
    model, window = small(), torch.randint(0, 97, (400,)).tolist()

    def figures(config, criterion):
        *_, score = evaluate(model, [window], config, chunk=10, criterion=criterion)
        return tuple(score.shares.values())

    static, at_end, on_average, keydiff, adjusted, knowing, *chance = (figures(*rival) for _, *rival in baselines(p, 4, 400))
    assert static[0] == pytest.approx(round(p * 4) / 4 * (1 - 1 / 400))  # all but the first token
    assert at_end[1] == pytest.approx(1 - p, abs=0.003)
    assert on_average[2] == pytest.approx(1 - p, abs=0.003)
    assert adjusted[0] == pytest.approx(p, abs=0.06)
    assert [shares[0] for shares in (keydiff, *chance)] == pytest.approx([p] * 4, abs=0.05)
    assert p < knowing[0] < p + 0.2  # where attention is as good as uniform, each token gets less than those before it


@pytest.mark.parametrize("window", [None, 20])
def test_the_oracle_equals_a_loop(window):
    """A token's worth: what each query past its recent window gives it, on average, in a dense forward."""
    model, ids, config, attention = small(window=window), PROMPTS[1], preset("cache", prune=0.5, recent=5), []
    t, T = torch.arange(len(ids)), len(ids)
    visible = (t[:, None] >= t) & (t[:, None] - t < (window or T))
    plain(model, torch.tensor(ids), [visible] * 4, attention)
    criterion = oracle(model, [ids[:9], ids], config)
    for layer, (weights, v) in enumerate(attention):
        state = FilterState(2, 2, 8, config, layer, torch.float64, "cpu")
        _, score = criterion(torch.zeros(2, T, 2, 8), None, torch.tensor([9, T]), state, torch.tensor(0.5), config)
        assert score[0, 9:].isnan().all()
        for j in range(T):
            heads = range(len(weights))
            got = [sum(float(weights[h, q, j] * v[j, h].norm()) for h in heads) / len(heads) for q in range(j + 6, T)]
            assert -float(score[1, j]) == pytest.approx(np.mean(got) if got else 0, abs=1e-9)


def test_perplexity_with_the_oracle_is_that_of_its_choice():
    """The batch's rows are told apart, whatever the chunk, and what it drops is what is worth least."""
    model, (_, config, _) = small(), list(baselines(0.5, 4, 60))[5]
    *_, score = evaluate(model, PROMPTS, config, batch=2, chunk=17, criterion=oracle)
    *_, alone = evaluate(model, PROMPTS, config, batch=1, criterion=oracle)
    torch.testing.assert_close(score.losses, alone.losses, rtol=0, atol=1e-9)
    assert score.shares == alone.shares and score.shares["skipped"] > 0.2


def test_chance_is_uniform_and_goes_by_seed_layer_position_and_text():
    def scores(layer=0, seed=0, text=0, **more):
        torch.manual_seed(text)
        state = FilterState(1, 2, 16, FilterConfig(), layer, torch.float64, "cpu")
        return by_chance(*torch.randn(2, 1, 4000, 2, 16), torch.tensor([4000]), state, 0.5, FilterConfig(), seed)[1][0]

    base = scores()
    assert torch.equal(base, scores()) and ((base >= 0) & (base < 1)).all() and len(base.unique()) > 3960
    others = scores(layer=1), scores(layer=79), scores(seed=1), scores(seed=2), scores(seed=2**40 + 1), scores(text=1), base.roll(1)
    for one in others:
        assert abs(np.corrcoef(one, base)[0, 1]) < 0.06
    np.testing.assert_allclose(base.histc(10, 0, 1) / 4000, 0.1, atol=0.02)


def test_variations_change_one_field_each():
    base = preset("paper", prune=0.3)
    found = dict(variations(base))
    for label, config in found.items():
        name, value = label.split("=")
        assert str(getattr(config, name)) == value != str(getattr(base, name))
        assert FilterConfig(**{**vars(config), name: getattr(base, name)}) == base
    assert {"schedule=uniform", "fusion=key", "keys=unrotated", "gamma=0.99", "warmup=0", "history=128",
            "recent=8"} <= found.keys()  # fmt: skip


# ----------------------------------------------------------------------------------------------------- pass key


# --------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(LONG * 8, encoding="utf-8")
    return ["--text", str(tmp_path / "text.txt"), "--window", "64", "--device", "cpu"]


def table(out):
    """The printed table's rows, split; a label's words are joined."""
    lines = out.split("\n\n")[1].splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def test_sweep_prints_and_writes_the_same_rows(checkpoint, capsys, tmp_path, text):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    flags = ["--json", files["json"], "--csv", files["csv"], "--plot", files["png"], "--prune", "0", "0.5"]
    main([str(checkpoint), *text, *map(str, flags), "--preset", "paper", "cache"])
    head, *rows = table(capsys.readouterr().out)
    assert head == ["setting", "prune", "perplexity", "x dense", "skipped", "KV held", "KV read"]
    assert [row[:2] for row in rows] == [["dense", "0.000"], ["paper", "0.500"], ["cache", "0.500"]]
    assert rows[0][3:] == ["1.000", "0.000", "1.000", "1.000"]
    assert all(0.2 < float(row[4]) < 0.6 and all(0.3 < float(kv) < 1 for kv in row[5:]) for row in rows[1:])
    written = json.loads(files["json"].read_text())
    assert "64" in written["protocol"] and "no BOS" in written["protocol"] and "float32" in written["protocol"]
    with open(files["csv"], newline="") as file:
        from_csv = list(csv.DictReader(file))
    for row, in_json, in_csv in zip(rows, written["rows"], from_csv, strict=True):
        shown = [v if isinstance(v, str) else f"{v:.3f}" for v in in_json.values()]
        assert list(in_json) == list(in_csv) == head and shown == row
        assert [str(v) for v in in_json.values()] == list(in_csv.values())
    assert files["png"].read_bytes()[1:4] == b"PNG"


def test_perplexity_is_drawn_against_kv_read():
    rows = [("dense", 1.0, 9.0), ("cache", 0.5, 12.0), ("cache", 0.7, 10.0), ("local", 0.3, 20.0)]
    lines = eval_ppl.draw_reads([{"setting": name, "KV read": x, "perplexity": y} for name, x, y in rows]).axes[0].lines
    shown = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}
    assert shown["cache"] == ([0.5, 0.7], [12.0, 10.0]) and shown["local"] == ([0.3], [20.0]) and "dense: 9.0" in shown


def test_flags_choose_the_windows(checkpoint, capsys, text):
    model, tokenizer = load(checkpoint, "cpu")
    ids = tokenizer.encode(LONG * 8, bos=False)
    for flags, windows, overlap in (
        (["--offsets", "7", "90"], [ids[7:71], ids[90:154]], 0),
        (["--max-tokens", "100"], [ids[:64], ids[64:100]], 0),
        (["--stride", "50", "--max-tokens", "150"], [ids[:64], ids[50:114], ids[100:150]], 14),
        (["--bos", "--max-tokens", "100"], [[tokenizer.bos_id, *ids[:63]], [tokenizer.bos_id, *ids[63:100]]], 1),
    ):
        main([str(checkpoint), *text, "--prune", "0", *flags])
        *_, score = evaluate(model, windows, None, overlap=overlap)
        out = capsys.readouterr().out
        assert table(out)[1][2] == f"{score.perplexity:.3f}"
        assert f"losses: {score.tokens};" in out and (", no BOS" in out) == ("--bos" not in flags)


def test_by_position(checkpoint, capsys, tmp_path, text):
    picture = tmp_path / "positions.png"
    main([str(checkpoint), *text, "--window", "150", "--prune", "0.5", "--by-position", "--plot", str(picture)])
    head, *rows = table(capsys.readouterr().out)
    assert head[-3:] == ["0-63", "64-127", "128-149"] and len(rows) == 1 + len(PRESETS) and picture.read_bytes()[1:4] == b"PNG"
    assert len({*rows[0][-3:]}) == 3


def test_random_tokens_have_a_row_for_each_seed(checkpoint, capsys, text):
    """And rows of a batch draw for themselves: with other neighbours a text has the same figures."""
    flags = [str(checkpoint), *text, "--max-tokens", "128", "--rivals", "--prune", "0.5", "--seed"]
    main([*flags, "0", "1", "2"])
    several = {row[0]: row[2:] for row in table(capsys.readouterr().out)[1:]}
    drawn = [several[f"cache, random tokens, seed {seed}"] for seed in range(3)]
    assert len(set(map(tuple, drawn))) == 3
    main([*flags, "2", "--batch", "1"])
    assert {row[0]: row[2:] for row in table(capsys.readouterr().out)[1:]}["cache, random tokens"] == drawn[2]


def test_rivals_are_a_row_each_at_every_ratio(checkpoint, capsys, text):
    main([str(checkpoint), *text, "--max-tokens", "128", "--rivals", "--preset", "cache", "--prune", "0", "0.2", "0.5"])
    rows = [row[:2] for row in table(capsys.readouterr().out)[1:]]
    names = [label for label, *_ in baselines(0.5, 3, 128)]
    assert rows == [["dense", "0.000"], *(["cache", p] for p in ("0.200", "0.500")), *([n, p] for p in ("0.200", "0.500") for n in names)]


def test_ablate_changes_one_thing_a_row(checkpoint, capsys, text):
    main([str(checkpoint), *text, "--max-tokens", "128", "--ablate", "--prune", "0.5"])
    rows = {row[0]: row[1:] for row in table(capsys.readouterr().out)[1:]}
    assert list(rows)[:3] == ["dense", "local", "cache"]
    assert {"local, recent=8", "cache, schedule=tail"} <= rows.keys()
    assert {row[0] for row in rows.values()} == {"0.000", "0.500"}
    main([str(checkpoint), *text, "--max-tokens", "128", "--preset", "local", "--gamma", "0.5", "--prune", "0.5"])
    assert table(capsys.readouterr().out)[2][1:] == rows["local, gamma=0.5"] != rows["local"]
    main([str(checkpoint), *text, "--max-tokens", "128", "--preset", "cache", "--gamma", "0.5", "--prune", "0.5", "--ablate"])
    rows = {row[0]: row[1:] for row in table(capsys.readouterr().out)[1:]}
    assert "cache, gamma 0.5, gamma=0.9" in rows and "local" not in rows
    assert "cache, gamma 0.5, gamma=0.5" not in rows


def test_infinite_perplexity_is_null_in_json(checkpoint, capsys, tmp_path, text, monkeypatch):
    model, tokenizer = load(checkpoint, "cpu")
    model.head.weight.mul_(1e5)
    monkeypatch.setattr(eval_ppl, "load", lambda *_, **__: (model, tokenizer))
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    flags = [str(part) for kind, path in files.items() for part in (f"--{'plot' if kind == 'png' else kind}", path)]
    main([str(checkpoint), *text, "--prune", "0.5", "--preset", "cache", *flags])
    assert [row[2] for row in table(capsys.readouterr().out)[1:]] == ["inf"] * 2
    rows = json.loads(files["json"].read_text())["rows"]
    assert [(row["perplexity"], row["x dense"]) for row in rows] == [(None, None)] * 2 and rows[1]["skipped"] > 0.2
    assert "inf" in files["csv"].read_text() and files["png"].read_bytes()[1:4] == b"PNG"


def test_texts_without_a_token_are_no_texts():
    assert list(evaluate(small(), [], None)) == []
    *_, score = evaluate(small(), [[], PROMPTS[0], []], FILTERS[1], batch=2, chunk=30)
    *_, alone = evaluate(small(), [PROMPTS[0]], FILTERS[1])
    assert score.tokens == alone.tokens and score.perplexity == pytest.approx(alone.perplexity, rel=1e-12)


def test_ctrl_c_shows_what_was_measured(checkpoint, capsys, tmp_path, text, monkeypatch):
    real, out = eval_ppl.evaluate, tmp_path / "out.json"

    def interrupted(model, windows, filter, *rest, **more):
        for n, score in enumerate(real(model, windows, filter, *rest, **more)):
            if filter is not None and n == 1:
                raise KeyboardInterrupt
            yield score

    monkeypatch.setattr(eval_ppl, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([str(checkpoint), *text, "--prune", "0.5", "--preset", "cache", "--batch", "1", "--json", str(out)])
    shown = capsys.readouterr().out
    model, tokenizer = load(checkpoint, "cpu")
    ids = tokenizer.encode(LONG * 8, bos=False)
    *_, score = real(model, [ids[:64], ids[64:128]], preset("cache", prune=0.5), batch=1)
    losses = sum(len(ids[lo : lo + 64]) - 1 for lo in range(0, len(ids), 64))
    assert f"interrupted: cache: perplexity {score.perplexity:.3f} over the first 126 of {losses} losses" in shown
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 1 and f"{rows[0]['perplexity']:.3f}" in shown


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("content, flags, message", [
    (None, [], "cannot be read"), (b"", ["--window", "64"], "text is empty"), (b" \n", [], "text is empty"),
    (b"\xff\xfe\x00binary", [], "cannot be read as UTF-8"), (b"a\x00b", [], "is a binary file"),
    (b"t", ["--window", "64"], "at least two tokens, and it has 1"),
    (b"the fox the fox", ["--window", "500"], "context of 200"),
    (b"the fox the fox", ["--window", "64", "--offsets", "99999"], "--offsets"),
    (b"the fox the fox", ["--prune", "2"], "--prune: 2"), (b"the fox", ["--window", "1"], "--window"),
    (b"the fox", ["--max-tokens", "0"], "--max-tokens"), (b"the fox", ["--batch", "0"], "--batch"),
    (b"the fox", ["--stride", "769"], "--stride"), (b"the fox", ["--stride", "768", "--bos"], "--stride"),
    (b"the fox", ["--stride", "0"], "--stride"), (b"the fox", ["--stride", "9", "--offsets", "0"], "--stride"),
    (b"the fox", ["--ablate", "--prune", "0.1", "0.2"], "--ablate takes one --prune"),
    (b"the fox", ["--ablate", "--prune", "0"], "--ablate takes one --prune"),
    (b"the fox", ["--ablate", "--plot", "x.png"], "draws no --plot"),
    (b"the fox", ["--ablate", "--rivals"], "not allowed with"),
    (b"the fox", ["--rivals", "--recent", "8"], "leave out --recent"), (b"the fox", ["--rivals", "--warmup", "0"], "leave out --warmup"),
    (b"the fox", ["--rivals", "--preset", "cache", "--keys", "unrotated"], "leave out --keys"),
    (b"the fox", ["--seed", "1"], "does nothing without --rivals"), (b"the fox", ["--rivals", "--seed", "1", "-1"], "--seed must be"),
    (b"the fox", ["--plot", "x.jpeg2"], ".png, .svg, .pdf"),
    (b"the fox", ["--csv", "no/such/folder/x.csv"], "no/such/folder/x.csv: cannot be written"),
])  # fmt: skip
def test_bad_input(checkpoint, capsys, tmp_path, content, flags, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in refused(capsys, checkpoint, "--device", "cpu", "--text", path, *flags, command=main)


def test_without_text_or_matplotlib(checkpoint, capsys, monkeypatch, tmp_path):
    assert "give --text" in refused(capsys, checkpoint, command=main)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "text").write_text("the fox")
    flags = ["--text", tmp_path / "text", "--plot", tmp_path / "x.png"]
    assert "--plot needs matplotlib" in refused(capsys, checkpoint, *flags, command=main)
