"""The coloured text and the picture say what the decisions were."""

import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from cli import skip_map
from cli.skip_map import (
    BOLD,
    MOST_STRIPS,
    RESET,
    SHADES,
    STRIP,
    UNDERLINE,
    Decisions,
    draw_skip_map,
    paint,
    places,
    token_pieces,
    write_skip_map,
)
from filter_config import preset
from golden.loop import place
from load_weights import load
from test_filter import small
from test_model import texts

ESCAPES = re.compile(r"\033\[[0-9;]*m")


def layers_of(n_layers, n_redundant):
    """One token that n_redundant of n_layers layers found redundant, (L, 1)."""
    return torch.arange(n_layers)[:, None] < n_redundant


# ---------------------------------------------------------------------------- the decisions


def test_what_layers_decide():
    """At ratio 0 nothing, at ratio 1 all tokens past the warm-up; of padding nothing."""
    model = small()
    lengths = torch.tensor([40, 7, 0])
    cache = model.new_cache(3, preset("paper", prune=0.5, warmup=6))  # ratios 0, 1/3, 2/3, 1
    model(texts()[:, :3], cache)
    model(texts()[:, 3:43], cache, lengths.tolist())
    first, second, third, last = cache.decisions()
    position = torch.arange(40)  # in the chunk, whose first token is the sequence's fourth
    is_real = position < lengths[:, None]

    assert not first.redundant.any()
    assert first.score.isnan().all()
    assert torch.equal(last.redundant, is_real & (position >= 3))
    for number, layer in ((1, second), (2, third), (3, last)):
        assert layer.redundant.any()
        assert torch.equal(layer.redundant, cache.layers[number].redundant)
        assert torch.equal(layer.score.isnan(), ~is_real)
        assert torch.equal(layer.score[is_real], cache.layers[number].score[is_real])


@pytest.mark.parametrize("name, n_sides", [("local", 2), ("cache", 3)])
def test_decisions_of_several_chunks_and_rows_are_put_together(name, n_sides):
    """Chunks, padding and a row that leaves change nothing: a row's are those of a run alone."""
    model = small()
    filter = preset(name, prune=0.5)
    lengths = [50, 31]
    together = Decisions(2, 4)
    cache = model.new_cache(2, filter)
    model(texts()[:2, :20], cache)
    together.watch([0, 1], cache)
    model(texts()[:2, 20:50], cache, [30, 11])
    together.watch([0, 1], cache)
    cache.select([0])
    model(texts()[:1, 50:51], cache)
    together.watch([0], cache)

    for row, n in enumerate((51, lengths[1])):
        alone = Decisions(1, 4)
        cache = model.new_cache(1, filter)
        model(texts()[row : row + 1, :n], cache)
        alone.watch([0], cache)
        assert alone.redundant[0].any()
        assert torch.equal(together.redundant[row], alone.redundant[0])
        torch.testing.assert_close(together.score[row], alone.score[0], rtol=0, atol=1e-9)
        for l in range(4):
            cosine = torch.cat(together.cosine[row][l])
            mean = torch.cat(together.mean[row][l])
            assert cosine.shape == (n, n_sides, 2)
            torch.testing.assert_close(cosine, alone.cosine[0][l][0], rtol=0, atol=1e-9)
            torch.testing.assert_close(mean, cosine.mean(-1), rtol=0, atol=1e-9)
            if name == "cache":
                assert together.w_k[row][l] == []
                continue
            w_k = torch.cat(together.w_k[row][l])
            torch.testing.assert_close(w_k, alone.w_k[0][l][0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("history", [1, 7, 64, 100])
def test_places_among_the_latest_values(history):
    values = torch.randint(0, 10, (80, 2)).double()  # many are equal
    counted = places(values, history)
    for side in range(2):
        column = values[:, side].tolist()
        for t, value in enumerate(column):
            recent = column[max(0, t - history) : t]
            assert counted[t, side] == place(value, recent)


# ------------------------------------------------------------------------------ the terminal


def test_paint():
    n_layers = torch.tensor([0, 7, 30])  # how many of 30 layers found each token redundant
    redundant = torch.arange(30)[:, None] < n_layers
    painted = paint(["a", " b\n", "c", "d"], 2, redundant)
    assert ESCAPES.sub("", painted) == "a b↵\ncd"

    shades = [int(number) for number in re.findall(r"48;5;(\d+)", painted)]
    assert shades == [SHADES[1], SHADES[1], SHADES[4]]  # that of " b" again after the line's end

    a, b, _, c, d = painted.split(RESET)[:5]
    assert a == "a"
    assert b.endswith(" b↵") and BOLD not in b and UNDERLINE not in b
    assert c.startswith(BOLD)
    assert d == BOLD + UNDERLINE + "d"  # it was not fed: nothing is known of it


@pytest.mark.parametrize("n_redundant, level", [(1, 0), (6, 0), (7, 1), (18, 2), (19, 3), (24, 3)])
def test_shades_stand_for_up_to_a_fifth_two_fifths_and_so_on(n_redundant, level):
    assert f"48;5;{SHADES[level]};" in paint(["a"], 1, layers_of(30, n_redundant))


def test_the_text_of_special_tokens_and_of_parts_of_a_character(demo):
    _, tokenizer = load(demo, "cpu")
    tokens = tokenizer.encode("<|im_start|>the 🦊 fox", parse_special=True)
    pieces = token_pieces(tokenizer, tokens)
    assert len(pieces) == len(tokens)
    assert pieces[:2] == ["<|im_start|>", "the"]
    assert "" in pieces[2:]
    assert "".join(pieces) == "<|im_start|>the 🦊 fox"


# ------------------------------------------------------------------------------- the picture


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, in a list."""
    figures = []
    savefig = Figure.savefig

    def save(self, *args, **options):
        figures.append(self)
        savefig(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def map_panels(figure):
    """The panels that show decisions, one a strip."""
    return [axes for axes in figure.axes if axes.get_images()]


def labels_of(panels):
    labels = []
    for axes in panels:
        labels += axes.get_xticklabels()
    return labels


def test_draw_skip_map(tmp_path, drawn):
    """Colours by decision and score, labels, and wrapping."""
    L = 3
    T = STRIP + 8
    pieces = [f" t{i}" for i in range(T)]
    pieces[5:10] = ["$\\frac$", "\n ", " ", "", "$"]
    pieces[10:12] = ["狐" * 30, "é\x04"]  # the font has é alone
    redundant = torch.rand(L, T) < 0.4
    score = torch.rand(L, T)
    score[0] = float("nan")  # a layer without scores, some of its tokens kept and some skipped
    draw_skip_map(tmp_path / "map.png", "title", pieces, T - 4, redundant, score, 16)
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    panels = map_panels(drawn[0])
    assert len(panels) == 2
    labels = [label.get_text() for label in labels_of(panels)]
    assert len(labels) == T
    assert labels[:10] == ["t0", "t1", "t2", "t3", "t4", "$\\frac$", "↵", "␣", "·", "$"]
    assert labels[10:12] == ["U+72D0U+72D0", "éU+0004"]

    parts = [torch.as_tensor(axes.get_images()[0].get_array()) for axes in panels]
    image = torch.cat(parts, dim=1)  # (L, T, RGBA)
    red_over_blue = image[..., 0] - image[..., 2]
    assert torch.equal(red_over_blue[1:] > 0, redundant[1:])
    assert (red_over_blue[0][~redundant[0]] == 0).all()  # grey
    for where in (redundant[1:], ~redundant[1:]):  # the higher the score, the darker
        order = score[1:][where].argsort()
        brightness = image[1:][where][order, :3].sum(-1)
        assert (brightness.diff() <= 1e-6).all()
    share = redundant.float().mean()
    assert f"{share:.1%} of (token, layer) pairs" in drawn[0].get_suptitle()
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "kept, no score",
        "redundant, no score",
    ]


def test_scores_made_of_ranks_are_drawn_as_others(tmp_path, drawn):
    """All tokens of a run under `cache` have one, and the higher, the darker."""
    model = small()
    filter = preset("cache", prune=0.5)
    cache = model.new_cache(1, filter)
    model(texts()[:1, :50], cache)
    decisions = Decisions(1, 4)
    decisions.watch([0], cache)
    write_skip_map(tmp_path / "map.png", "title", ["x"] * 50, 40, decisions, filter)

    (panel,) = map_panels(drawn[0])
    image = torch.as_tensor(panel.get_images()[0].get_array())  # (L, T, RGBA)
    assert torch.equal(image[..., 0] > image[..., 2], decisions.redundant[0])
    for where in (decisions.redundant[0], ~decisions.redundant[0]):
        order = decisions.score[0][where].argsort()
        brightness = image[where][order, :3].sum(-1)
        assert (brightness.diff() <= 1e-6).all()
        assert len(brightness.unique()) > 10
    assert drawn[0].legends == []


def test_nothing_is_said_of_tokens_without_a_score_where_all_have_one(tmp_path, drawn):
    redundant = torch.rand(3, 40) < 0.4
    draw_skip_map(tmp_path / "map.png", "title", ["x"] * 40, 30, redundant, torch.rand(3, 40), 16)
    assert drawn[0].legends == []


@pytest.mark.parametrize("T, n_prompt, second, said", [
    (1400, 1390, 1040, "0 to 71 and 1040 to 1399 of 1400"),  # the end, and so the answer
    (1400, 900, 828, "0 to 71 and 828 to 1187 of 1400"),  # the answer from its start
    (440, 20, 72, "0 to 431 of 440"),
])  # fmt: skip
def test_of_a_long_text_start_and_answer_are_drawn(tmp_path, drawn, T, n_prompt, second, said):
    redundant = torch.ones(1, T).bool()
    score = torch.full((1, T), float("nan"))
    pieces = [str(t) for t in range(T)]
    draw_skip_map(tmp_path / "long.png", "title", pieces, n_prompt, redundant, score, 16)

    labels = labels_of(map_panels(drawn[0]))
    end = second + STRIP * (MOST_STRIPS - 1)
    assert [int(label.get_text()) for label in labels] == [*range(STRIP), *range(second, end)]
    for label in labels:
        is_answer = int(label.get_text()) >= n_prompt
        assert label.get_fontweight() == ("bold" if is_answer else "normal")
    assert f"tokens {said} are drawn" in drawn[0].get_suptitle()


# ---------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("name, kind", [
    ("map.html", "page"),
    ("map.HTML", "page"),
    ("map.png", "picture"),
])  # fmt: skip
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys, name, kind):
    filter = preset("cache", prune=0.5)
    model = small()
    cache = model.new_cache(1, filter)
    model(texts()[:1, :50], cache)
    decisions = Decisions(1, 4)
    decisions.watch([0], cache)
    path = tmp_path / name
    content = ("title", ["x"] * 50, 40, decisions, filter)

    write_skip_map(path, *content)
    assert f"{path}: the {kind}" in capsys.readouterr().err
    whole = path.read_bytes()
    if kind == "page":
        assert whole.startswith(b"<!DOCTYPE html>")
    else:
        assert whole.startswith(b"\x89PNG")

    def stopped(path, *_):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(skip_map, "write_skip_page", stopped)
    monkeypatch.setattr(skip_map, "draw_skip_map", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_skip_map(path, *content)
    assert capsys.readouterr().err == f"interrupted: no {kind} was written to {path}\n"
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == whole
