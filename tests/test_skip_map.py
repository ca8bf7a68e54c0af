"""The coloured text and the picture say what the decisions were."""

import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from load_weights import load
from cli.skip_map import BOLD, MOST_STRIPS, RESET, SHADES, STRIP, UNDERLINE, Decisions, decisions, draw_skip_map, paint, token_pieces, write_skip_map
from test_model import small, texts
from filter_config import preset

ESCAPES = re.compile(r"\033\[[0-9;]*m")


def test_decisions():
    """Of layers that filter, what they found; of one at ratio 0 nothing; at ratio 1, all tokens past the warm-up; not of padding."""
    model, n_new = small(), [40, 7, 0]
    cache = model.new_cache(3, preset("paper", prune=0.5, warmup=6))  # ratios 0, 1/3, 2/3, 1
    model(texts()[:, :3], cache)
    model(texts()[:, 3:43], cache, n_new)
    redundant, score = decisions(cache)
    real = torch.arange(40) < torch.tensor(n_new)[:, None]
    assert not redundant[0].any() and torch.equal(redundant[3], real & (torch.arange(40) >= 3))
    assert score[[0, 3]].isnan().all()
    for l in (1, 2):
        assert torch.equal(redundant[l], cache.layers[l].redundant) and redundant[l].any()
        assert torch.equal(score[l].isnan(), ~real) and (score[l] == cache.layers[l].score)[real].all()


def test_paint():
    redundant = torch.arange(30)[:, None] < torch.tensor([0, 7, 30])  # by none, 7 and all of 30 layers
    painted = paint(["a", " b\n", "c", "d"], 2, redundant)
    assert ESCAPES.sub("", painted) == "a b↵\ncd"
    assert re.findall(r"48;5;(\d+)", painted) == [str(SHADES[1])] * 2 + [str(SHADES[4])]  # again after the line's end
    for skips, level in ((1, 0), (6, 0), (18, 2), (19, 3), (24, 3)):  # up to 20%, 40%, ...
        assert f"48;5;{SHADES[level]};" in paint(["a"], 1, torch.arange(30)[:, None] < skips)
    a, b, _, c, d = painted.split(RESET)[:5]
    assert a == "a" and b.endswith(" b↵") and BOLD not in b and UNDERLINE not in b
    assert c.startswith(BOLD) and d == BOLD + UNDERLINE + "d"  # d was not fed: nothing is known of it


def test_a_special_token_shows_its_name_and_one_that_ends_within_a_character_nothing(demo):
    _, tokenizer = load(demo, "cpu")
    tokens = tokenizer.encode("<|im_start|>the 🦊 fox", parse_special=True)
    pieces = token_pieces(tokenizer, tokens)
    assert len(pieces) == len(tokens) and pieces[:2] == ["<|im_start|>", "the"] and "" in pieces[2:]
    assert "".join(pieces) == "<|im_start|>the 🦊 fox"


def test_draw_skip_map(tmp_path, monkeypatch):
    """Colours by decision and score, labels, wrapping, and what is left out."""
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    L, T = 3, STRIP + 8
    pieces = [f" t{i}" for i in range(T)]
    pieces[5:10] = ["$\\frac$", "\n ", " ", "", "$"]
    pieces[10:12] = ["狐" * 30, "é\x04"]  # the font has é alone
    redundant, score = torch.rand(L, T) < 0.4, torch.rand(L, T)
    score[0] = float("nan")  # a layer without scores, some of its tokens kept and some skipped
    draw_skip_map(tmp_path / "map.png", "title", pieces, T - 4, redundant, score, 16)
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    panels = [axes for axes in drawn[0].axes if axes.get_images()]
    labels = [label.get_text() for axes in panels for label in axes.get_xticklabels()]
    assert labels[:12] == ["t0", "t1", "t2", "t3", "t4", "$\\frac$", "↵", "␣", "·", "$", "U+72D0U+72D0", "éU+0004"]
    assert len(panels) == 2 and len(labels) == T
    image = torch.cat([torch.as_tensor(axes.get_images()[0].get_array()) for axes in panels], 1)  # (L, T, RGBA)
    red_over_blue = image[..., 0] - image[..., 2]
    assert ((red_over_blue[1:] > 0) == redundant[1:]).all()
    assert (red_over_blue[0][~redundant[0]] == 0).all()  # grey
    for where in (redundant[1:], ~redundant[1:]):  # the higher the score, the darker
        order = score[1:][where].argsort()
        assert (image[1:][where][order, :3].sum(-1).diff() <= 1e-6).all()
    assert f"{redundant.float().mean():.1%} of (token, layer) pairs" in drawn[0].get_suptitle()


@pytest.mark.parametrize("T, n_prompt, second, said", [
    (1400, 1390, 1040, "0 to 71 and 1040 to 1399 of 1400"),  # the end, and so the answer
    (1400, 900, 828, "0 to 71 and 828 to 1187 of 1400"),  # the answer from its start
    (440, 20, 72, "0 to 431 of 440"),
])  # fmt: skip
def test_of_a_long_text_the_picture_shows_the_start_and_the_answer(tmp_path, monkeypatch, T, n_prompt, second, said):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    redundant, score = torch.ones(1, T).bool(), torch.full((1, T), float("nan"))
    draw_skip_map(tmp_path / "long.png", "title", [str(t) for t in range(T)], n_prompt, redundant, score, 16)
    labels = [label for axes in drawn[0].axes if axes.get_images() for label in axes.get_xticklabels()]
    assert [int(label.get_text()) for label in labels] == [*range(STRIP), *range(second, second + STRIP * (MOST_STRIPS - 1))]
    assert {label.get_fontweight() for label in labels if int(label.get_text()) >= n_prompt} == {"bold"}
    assert f"tokens {said} are drawn" in drawn[0].get_suptitle()


@pytest.mark.parametrize("name, kind", [("map.html", "page"), ("map.HTML", "page"), ("map.png", "picture")])
def test_a_page_or_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys, name, kind):
    watched, cache = Decisions(1, 4), small().new_cache(1, preset("cache", prune=0.5))
    small()(texts()[:1, :50], cache)
    watched.watch([0], cache)
    path, what = tmp_path / name, ("title", ["x"] * 50, 40, watched, preset("cache", prune=0.5))

    def stopped(path, *_, **__):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    write_skip_map(path, *what)
    assert str(path) in capsys.readouterr().err
    whole = path.read_bytes()
    assert whole.startswith(b"<!DOCTYPE html>" if kind == "page" else b"\x89PNG")
    monkeypatch.setattr("skip_map.write_skip_page", stopped)
    monkeypatch.setattr("skip_map.draw_skip_map", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_skip_map(path, *what)
    assert capsys.readouterr().err == f"interrupted: no {kind} was written to {path}\n"
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == whole
