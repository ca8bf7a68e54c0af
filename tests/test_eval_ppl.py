"""Perplexity is that of real decoding, and the command loses nothing."""

import csv
import json
import math
import re

import pytest
import torch

import eval_ppl
from eval_ppl import Setting, cut, evaluate, main
from evaluation.rivals import recent_only
from filter_config import PRESETS, FilterConfig, preset
from load_weights import load
from test_filter import small
from test_generate import FILTERS, LONG, PROMPTS, refused

# --------------------------------------------------------------------------------- perplexity


def last_score(model, windows, setting, **more):
    """The Score of all windows."""
    *_, score = evaluate(model, windows, setting, **more)
    return score


@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_perplexity_equals_decoding_token_by_token(filter):
    model = small()
    lengths = [len(prompt) for prompt in PROMPTS]
    losses = torch.zeros(max(lengths), dtype=torch.float64)  # summed by position
    usage = torch.zeros(5, dtype=torch.float64)
    for prompt in PROMPTS:
        cache = model.new_cache(1, filter)
        for t, token in enumerate(prompt):
            logits = model(torch.tensor([[token]]), cache)[0, 0]
            if t + 1 < len(prompt):
                losses[t + 1] -= logits.log_softmax(-1)[prompt[t + 1]]
        usage += cache.usage()[0]

    score = last_score(model, PROMPTS, Setting("", filter), batch=2, chunk=17)
    n_losses = sum(lengths) - len(PROMPTS)
    assert score.tokens == n_losses
    torch.testing.assert_close(score.losses, losses, rtol=0, atol=1e-9)
    assert score.perplexity == pytest.approx(math.exp(losses.sum() / n_losses), rel=1e-12)
    # Two of the rows reach positions 50 to 79: one has all of them, the other 13.
    expected = math.exp(losses[50:80].sum() / (30 + 13))
    assert score.between(50, 80) == pytest.approx(expected, rel=1e-12)

    pairs, redundant, held, read, dense_read = usage.tolist()
    expected = {"skipped": redundant / pairs, "KV held": held / pairs, "KV read": read / dense_read}
    assert score.shares == expected
    if filter is None:
        assert score.shares == {"skipped": 0, "KV held": 1, "KV read": 1}


def test_kv_held_and_read_by_hand():
    """With every token past the warm-up redundant, `local` sees 4 sinks and the 3 latest tokens."""
    config = FilterConfig(prune=0.5, mode="local", recent=2, warmup=4, schedule="uniform")
    score = last_score(small(), [PROMPTS[0][:10]], Setting("", config, recent_only), chunk=4)
    read = sum(min(t + 1, 7) for t in range(10))
    dense_read = sum(t + 1 for t in range(10))
    expected = {"skipped": 6 / 10, "KV held": 7 / 10, "KV read": read / dense_read}
    assert score.shares == pytest.approx(expected)


def sliding_loop(model, ids, window, stride, bos, filter):
    """Window by window: the summed loss, and which tokens of the text were scored."""
    head = [] if bos is None else [bos]
    loss = 0.0
    scored = []
    start = 0  # of the window in the text
    done = 0  # tokens of the text that windows have covered
    while done < len(ids):
        tokens = (head + ids[start:])[:window]
        end = start + len(tokens) - len(head)
        log_probs = model(torch.tensor([tokens]), model.new_cache(1, filter))[0].log_softmax(-1)
        for t in range(done, end):
            place = t - start + len(head)
            if place > 0:  # something is before it
                loss -= float(log_probs[place - 1, ids[t]])
                scored.append(t)
        done = end
        start += stride
    return loss, scored


@pytest.mark.parametrize("filter", FILTERS[:2], ids=["dense", "paper"])
@pytest.mark.parametrize(
    "window, stride, bos",
    [
        (40, None, None),
        (40, 40, None),
        (40, 13, None),
        (40, 39, None),
        (40, 13, 5),
        (40, None, 5),
        (89, 1, None),
        (100, 50, None),
    ],
)
def test_sliding_windows_equal_a_plain_loop(window, stride, bos, filter):
    model = small()
    ids = PROMPTS[0]
    windows, overlap = cut(ids, window, stride, bos)
    score = last_score(model, windows, Setting("", filter), batch=2, chunk=32, overlap=overlap)

    end_to_end = window if bos is None else window - 1
    loss, scored = sliding_loop(model, ids, window, stride or end_to_end, bos, filter)
    assert score.tokens == len(scored) == len(set(scored))
    assert float(score.losses.sum()) == pytest.approx(loss, abs=1e-9)
    if bos is not None:
        assert len(scored) == len(ids)
    elif stride is not None and stride < window:
        assert len(scored) == len(ids) - 1


def test_texts_without_a_token_are_no_texts():
    model = small()
    assert list(evaluate(model, [], Setting("dense"))) == []
    setting = Setting("", FILTERS[1])
    score = last_score(model, [[], PROMPTS[0], []], setting, batch=2, chunk=30)
    alone = last_score(model, [PROMPTS[0]], setting)
    assert score.tokens == alone.tokens
    assert score.perplexity == pytest.approx(alone.perplexity, rel=1e-12)


# ---------------------------------------------------------------------------- the command line


@pytest.fixture
def text(tmp_path):
    """The flags that name a text of 160 words, in windows of 64 tokens."""
    (tmp_path / "text.txt").write_text(LONG * 8, encoding="utf-8")
    return ["--text", str(tmp_path / "text.txt"), "--window", "64", "--device", "cpu"]


def table(out):
    """The printed table's rows as lists of cells."""
    lines = out.split("\n\n")[1].splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


@pytest.fixture
def files(tmp_path):
    return {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}


def flags_for(files):
    return [
        *("--json", str(files["json"])),
        *("--csv", str(files["csv"])),
        *("--plot", str(files["png"])),
    ]


def test_printed_and_written_rows_are_the_same(checkpoint, capsys, text, files):
    flags = ["--prune", "0", "0.5", "--preset", "paper", "cache"]
    main([str(checkpoint), *text, *flags, *flags_for(files)])
    head, *rows = table(capsys.readouterr().out)
    expected = ["setting", "prune", "perplexity", "x dense", "skipped", "KV held", "KV read"]
    assert head == expected
    settings = [["dense", "0.000"], ["paper", "0.500"], ["cache", "0.500"]]
    assert [row[:2] for row in rows] == settings
    assert rows[0][3:] == ["1.000", "0.000", "1.000", "1.000"]
    for row in rows[1:]:
        skipped, held, read = map(float, row[4:])
        assert 0.2 < skipped < 0.6
        assert 0.3 < held < 1
        assert 0.3 < read < 1

    written = json.loads(files["json"].read_text())
    for fact in ("64", "no BOS", "float32"):
        assert fact in written["protocol"]
    with open(files["csv"], newline="") as file:
        from_csv = list(csv.DictReader(file))
    for row, in_json, in_csv in zip(rows, written["rows"], from_csv, strict=True):
        assert list(in_json) == list(in_csv) == head
        values = list(in_json.values())
        assert [str(value) for value in values] == list(in_csv.values())
        shown = [value if isinstance(value, str) else f"{value:.3f}" for value in values]
        assert shown == row
    assert files["png"].read_bytes()[1:4] == b"PNG"


def test_perplexity_is_drawn_against_kv_read():
    figures = [("dense", 1.0, 9.0), ("cache", 0.5, 12.0), ("cache", 0.7, 10.0)]
    figures += [("local", 0.3, 20.0)]
    rows = [{"setting": name, "KV read": x, "perplexity": y} for name, x, y in figures]
    lines = eval_ppl.draw_reads(rows).axes[0].lines
    shown = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}
    assert shown["cache"] == ([0.5, 0.7], [12.0, 10.0])
    assert shown["local"] == ([0.3], [20.0])
    assert "dense: 9.0" in shown


def test_flags_choose_the_windows(checkpoint, capsys, text):
    model, tokenizer = load(checkpoint, "cpu")
    ids = tokenizer.encode(LONG * 8, bos=False)
    bos = tokenizer.bos_id
    with_bos = [[bos, *ids[:63]], [bos, *ids[63:100]]]
    for flags, windows, overlap in (
        (["--offsets", "7", "90"], [ids[7:71], ids[90:154]], 0),
        (["--max-tokens", "100"], [ids[:64], ids[64:100]], 0),
        (
            ["--stride", "50", "--max-tokens", "150"],
            [ids[:64], ids[50:114], ids[100:150]],
            14,
        ),
        (["--bos", "--max-tokens", "100"], with_bos, 1),
    ):
        main([str(checkpoint), *text, "--prune", "0", *flags])
        score = last_score(model, windows, Setting("dense"), overlap=overlap)
        out = capsys.readouterr().out
        assert table(out)[1][2] == f"{score.perplexity:.3f}"
        assert f"losses: {score.tokens};" in out
        assert (", no BOS" in out) == ("--bos" not in flags)


def test_by_position(checkpoint, capsys, tmp_path, text):
    picture = tmp_path / "positions.png"
    flags = ["--window", "150", "--prune", "0.5", "--by-position", "--plot", str(picture)]
    main([str(checkpoint), *text, *flags])
    head, *rows = table(capsys.readouterr().out)
    assert head[-3:] == ["0-63", "64-127", "128-149"]
    assert len(rows) == 1 + len(PRESETS)
    assert len(set(rows[0][-3:])) == 3
    assert picture.read_bytes()[1:4] == b"PNG"


def test_infinite_perplexity_is_null_in_json(checkpoint, capsys, text, files, monkeypatch):
    model, tokenizer = load(checkpoint, "cpu")
    model.head.weight.mul_(1e5)
    monkeypatch.setattr(eval_ppl, "load", lambda *_, **__: (model, tokenizer))
    flags = ["--prune", "0.5", "--preset", "cache"]
    main([str(checkpoint), *text, *flags, *flags_for(files)])
    assert [row[2] for row in table(capsys.readouterr().out)[1:]] == ["inf"] * 2
    rows = json.loads(files["json"].read_text())["rows"]
    assert [(row["perplexity"], row["x dense"]) for row in rows] == [(None, None)] * 2
    assert rows[1]["skipped"] > 0.2
    assert "inf" in files["csv"].read_text()
    assert files["png"].read_bytes()[1:4] == b"PNG"


def test_ctrl_c_shows_what_was_measured(checkpoint, capsys, text, files, monkeypatch):
    original = eval_ppl.evaluate

    def interrupted(model, windows, setting, *rest, **more):
        """Ctrl-C when the second window of the filtered setting has been scored."""
        for n, score in enumerate(original(model, windows, setting, *rest, **more)):
            if setting.filter is not None and n == 1:
                raise KeyboardInterrupt
            yield score

    monkeypatch.setattr(eval_ppl, "evaluate", interrupted)
    flags = ["--prune", "0.5", "--preset", "cache", "--batch", "1"]
    with pytest.raises(KeyboardInterrupt):
        main([str(checkpoint), *text, *flags, "--json", str(files["json"])])
    out = capsys.readouterr().out

    model, tokenizer = load(checkpoint, "cpu")
    ids = tokenizer.encode(LONG * 8, bos=False)
    setting = Setting("cache", preset("cache", prune=0.5))
    *_, score = original(model, [ids[:64], ids[64:128]], setting, batch=1)
    n_losses = sum(len(ids[start : start + 64]) - 1 for start in range(0, len(ids), 64))
    perplexity = f"{score.perplexity:.3f}"
    line = f"interrupted: cache: perplexity {perplexity} over the first 126 of {n_losses} losses"
    assert line in out
    (row,) = json.loads(files["json"].read_text())["rows"]
    assert row["setting"] == "dense"
    assert f"{row['perplexity']:.3f}" in out


# ---------------------------------------------------------------------------------- bad input

BAD_INPUT = {
    "no file": (None, [], "cannot be read"),
    "empty": (b"", ["--window", "64"], "text is empty"),
    "white space": (b" \n", [], "text is empty"),
    "not UTF-8": (b"\xff\xfe\x00binary", [], "cannot be read as UTF-8"),
    "zero bytes": (b"a\x00b", [], "it has zero bytes"),
    "one token": (b"t", ["--window", "64"], "at least two tokens, and it has 1"),
    "window beyond context": (b"the fox the fox", ["--window", "500"], "context of 200"),
    "offset beyond text": (
        b"the fox the fox",
        ["--window", "64", "--offsets", "99999"],
        "--offsets",
    ),
    "prune": (b"the fox the fox", ["--prune", "2"], "--prune: 2"),
    "window": (b"the fox", ["--window", "1"], "--window"),
    "max tokens": (b"the fox", ["--max-tokens", "0"], "--max-tokens"),
    "batch": (b"the fox", ["--batch", "0"], "--batch"),
    "stride beyond window": (b"the fox", ["--stride", "769"], "--stride"),
    "stride beyond window with BOS": (b"the fox", ["--stride", "768", "--bos"], "--stride"),
    "no stride": (b"the fox", ["--stride", "0"], "--stride"),
    "stride and offsets": (b"the fox", ["--stride", "9", "--offsets", "0"], "--stride"),
    "kind of picture": (b"the fox", ["--plot", "x.jpeg2"], ".png, .svg, .pdf"),
    "no folder": (
        b"the fox",
        ["--csv", "no/such/folder/x.csv"],
        "no/such/folder/x.csv: cannot be written",
    ),
}


@pytest.mark.parametrize("content, flags, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_ends_in_one_line(checkpoint, capsys, tmp_path, content, flags, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    flags = ["--device", "cpu", "--text", path, *flags]
    assert message in refused(capsys, checkpoint, *flags, command=main)


def test_without_a_text(checkpoint, capsys):
    assert "give --text" in refused(capsys, checkpoint, command=main)


def test_a_picture_without_matplotlib(checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "text").write_text("the fox")
    flags = ["--text", tmp_path / "text", "--plot", tmp_path / "x.png"]
    assert "--plot needs matplotlib" in refused(capsys, checkpoint, *flags, command=main)
