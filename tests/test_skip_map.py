"""The coloured text and the picture say what the decisions were."""

import re

import torch
from matplotlib.figure import Figure

from load_weights import load
from skip_map import BOLD, MOST_STRIPS, RESET, SHADES, STRIP, UNDERLINE, decisions, draw_skip_map, paint, token_pieces
from test_model import small, texts
from token_filter import preset

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


def test_a_token_without_text_of_its_own_has_an_empty_piece(demo):
    _, tokenizer = load(demo, "cpu")
    tokens = tokenizer.encode("<|im_start|>the 🦊 fox", parse_special=True)
    pieces = token_pieces(tokenizer, tokens)
    assert len(pieces) == len(tokens) and pieces[0] == "" and "" in pieces[2:] and "".join(pieces) == "the 🦊 fox"


def test_draw_skip_map(tmp_path, monkeypatch):
    """Colours by decision and score, labels, wrapping, and what is left out."""
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    L, T = 3, STRIP + 8
    pieces = [f" t{i}" for i in range(T)]
    pieces[5:10] = ["$\\frac$", "\n ", " ", "", "$"]
    pieces[10] = "狐" * 30
    redundant, score = torch.rand(L, T) < 0.4, torch.rand(L, T)
    score[0] = float("nan")  # a layer without scores, some of its tokens kept and some skipped
    draw_skip_map(tmp_path / "map.png", "title", pieces, T - 4, redundant, score, 16)
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    panels = [axes for axes in drawn[0].axes if axes.get_images()]
    labels = [label.get_text() for axes in panels for label in axes.get_xticklabels()]
    assert labels[:12] == ["t0", "t1", "t2", "t3", "t4", "$\\frac$", "↵", "␣", "·", "$", "狐" * 12, "t11"]
    assert len(panels) == 2 and len(labels) == T
    image = torch.cat([torch.as_tensor(axes.get_images()[0].get_array()) for axes in panels], 1)  # (L, T, RGBA)
    red_over_blue = image[..., 0] - image[..., 2]
    assert ((red_over_blue[1:] > 0) == redundant[1:]).all()
    assert (red_over_blue[0][~redundant[0]] == 0).all()  # grey
    for where in (redundant[1:], ~redundant[1:]):  # the higher the score, the darker
        order = score[1:][where].argsort()
        assert (image[1:][where][order, :3].sum(-1).diff() <= 1e-6).all()
    assert f"{redundant.float().mean():.1%} of (token, layer) pairs" in drawn[0].get_suptitle()

    T, savefig = STRIP * MOST_STRIPS + 10, lambda *a, **k: None
    draw_skip_map(tmp_path / "long.png", "title", ["x"] * T, T, torch.ones(1, T).bool(), torch.full((1, T), float("nan")), 16)
    assert sum(len(axes.get_xticklabels()) for axes in drawn[1].axes if axes.get_images()) == T - 10
    assert f"the first {T - 10} of {T} tokens are drawn" in drawn[1].get_suptitle()
