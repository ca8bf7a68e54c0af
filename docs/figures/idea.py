"""The numbers of the worked example, and the picture of the idea in README and the lesson.

    python -m docs.figures.idea                    print the lesson's table
    python -m docs.figures.idea --draw FILE.png    draw the picture too

One sentence through the demo model under preset "paper". `stages` computes what a layer does with it once more, one stage
at a time in NumPy, from the keys and values of the real forward pass; the lesson, the picture and test_idea.py share it.
"""

import math
from dataclasses import dataclass

from cli.arguments import DEMO, Parser
from cli.process import run_command

import numpy as np
import torch

from load_weights import load
from cli.report import check_output
from cli.skip_map import token_pieces
from filter_config import preset
from token_filter import token_filter

TEXT = "The cat sat on the mat. The cat sat on the mat. The cat sat on the mat. The cat sat on the hot stove."
LAYER = 15  # chosen because its decisions are clear
SKIPPED, KEPT = 25, 26  # " the", an old word, and " hot", a new one
RECENT, FIRST = 2, 18  # of the cache that is drawn: how many recent tokens, and the token it starts with
BLUE, ORANGE = "#2f6fb0", "#f08c2e"
PALE = {BLUE: "#cfe2f3", ORANGE: "#fde3c8"}


@dataclass
class Stage:
    """One token in one layer: everything between its k, v and the verdict."""

    c_k: np.ndarray  # (KVH,) cosines
    c_v: np.ndarray
    w_k: float
    score: float
    n: int  # how many scores there are to be ranked among
    below: int  # how many of them are strictly below; redundant needs `needed`
    needed: int
    threshold: float  # the score it must exceed for that; NaN while there is none
    redundant: bool


def stages(k, v, ratio, gamma=0.9, warmup=16, window=64, eps=1e-6, averaged_first=False) -> list[Stage]:
    """k, v (T, KVH, D) of one sequence in one layer, one token after the other.

    averaged_first: the mistake of an exercise, a token that is compared with averages it is already part of.
    """

    def cosine(x, y):
        return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)

    A_K, A_V, out = k[0], v[0], []
    scores: list[float] = []
    for k_t, v_t in zip(k, v):
        after = gamma * A_K + (1 - gamma) * k_t, gamma * A_V + (1 - gamma) * v_t
        c_k, c_v = (cosine(k_t, after[0]), cosine(v_t, after[1])) if averaged_first else (cosine(k_t, A_K), cosine(v_t, A_V))
        w_k = (c_v.var() + eps) / (c_k.var() + c_v.var() + 2 * eps)
        s = w_k * c_k.mean() + (1 - w_k) * c_v.mean()
        recent = sorted(scores[-window:])
        n, below = len(recent), sum(x < s for x in recent)
        needed = math.ceil((1 - ratio) * n - 1e-9)
        redundant = len(scores) >= warmup and below >= needed
        out.append(Stage(c_k, c_v, w_k, s, n, below, needed, recent[needed - 1] if needed else math.nan, redundant))
        scores.append(s)
        A_K, A_V = after
    return out


def watch(prune=0.5, **changes):
    """TEXT through the demo model in float64, under preset "paper" with some fields changed: the text of its tokens, (k, v) of every
    layer that filters, and the cache."""
    model, tokenizer = load(DEMO, "cpu", "float64")
    tokens, seen = tokenizer.encode(TEXT), {}

    def criterion(k, v, n_new, state, ratio, config):  # what the model calls in every layer, with a look at what it is given
        seen[int(state.layer)] = k[0].numpy(), v[0].numpy()
        return token_filter(k, v, n_new, state, ratio, config)

    cache = model.new_cache(1, preset("paper", prune=prune, **changes), criterion)
    model(torch.tensor([tokens]), cache)
    return token_pieces(tokenizer, tokens), seen, cache


def by_mode() -> dict[str, list[bool]]:
    """Whom LAYER finds redundant in a run of each mode, with RECENT tokens in sight."""
    return {mode: watch(mode=mode, recent=RECENT)[2].layers[LAYER].redundant[0].tolist() for mode in ("skip", "local", "cache")}


def slots(redundant, sinks, recent):
    """A layer's cache after each token of a sequence: the tokens in the slots of sinks and ring, and those in the far ones."""
    front, far = list[int](), list[int]()
    for t in range(len(redundant)):
        slot = t if t < sinks else sinks + (t - sinks) % (recent + 1)
        if slot == len(front):
            front.append(t)
        else:
            if not redundant[front[slot]]:
                far.append(front[slot])
            front[slot] = t
        yield front.copy(), far.copy()


def table(skipped: Stage, kept: Stage) -> str:
    """The lesson's table, without its head."""

    def heads(c):
        return ", ".join(f"{x:.3f}" for x in c)

    rows = [
        ("$c_k$ of the three heads", lambda s: heads(s.c_k)),
        ("$c_v$ of the three heads", lambda s: heads(s.c_v)),
        ("mean of $c_k$, of $c_v$", lambda s: heads((s.c_k.mean(), s.c_v.mean()))),
        ("variance of $c_k$, of $c_v$", lambda s: f"{s.c_k.var():.5f}, {s.c_v.var():.5f}"),
        ("$w_k$", lambda s: f"{s.w_k:.3f}"),
        ("score $s_t$", lambda s: f"**{s.score:.3f}**"),
        ("$n$, the scores before it", lambda s: s.n),
        ("$c$, those strictly below $s_t$", lambda s: s.below),
        (r"needed, $\lceil(1-r_l)n-10^{-9}\rceil$", lambda s: s.needed),
        ("verdict", lambda s: f"{s.below} ≥ {s.needed}: **skipped**" if s.redundant else f"{s.below} < {s.needed}: **kept**"),
    ]
    return "\n".join(f"| {name} | {show(skipped)} | {show(kept)} |" for name, show in rows)


def draw(path, pieces, steps: list[Stage], found: dict[str, list[bool]], warm):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 11.4), layout="constrained")
    flow, score, cache = figure.subplots(3, 1, height_ratios=[2.6, 4.4, 4.4])
    draw_flow(flow)

    at = np.arange(len(pieces))
    for redundant, colour, label in ((False, BLUE, "kept: attends, and is cached"), (True, ORANGE, "skipped: no attention, not cached")):
        chosen = [t for t in at if steps[t].redundant == redundant]
        score.vlines(chosen, 0, [steps[t].score for t in chosen], colors=colour, linewidth=3, alpha=0.35)
        score.plot(chosen, [steps[t].score for t in chosen], "o", color=colour, markersize=9, label=f"score, {label}")
    score.plot(at, [s.c_k.mean() for s in steps], "^", color="#777777", markersize=4, label="of its key alone")
    score.plot(at, [s.c_v.mean() for s in steps], "v", color="#a8a8a8", markersize=4, label="of its value alone")
    score.hlines([s.threshold for s in steps[warm:]], at[warm:] - 0.45, at[warm:] + 0.45, colors="black", linewidth=2,
                 label="threshold: a rank among earlier scores")  # fmt: skip
    score.axvspan(-0.5, warm - 0.5, color="#eeeeee", zorder=0)
    score.axhline(0, color="#aaaaaa", linewidth=0.8, zorder=0)
    score.text(-0.2, 1.09, "warm-up: always kept, the averages have yet to settle", va="center", color="#555555")
    score.set(xlim=(-0.5, len(at) - 0.5), ylim=(-0.22, 1.36), yticks=np.arange(0, 1.1, 0.2), ylabel="likeness to the averages")
    score.set_xticks(at, [piece.strip() for piece in pieces], fontsize=10)
    for t in (SKIPPED, KEPT):  # the two of the lesson's table
        score.get_xticklabels()[t].set(fontweight="bold")
    score.set_title(f"2. One sentence in layer {LAYER} of the demo model: what is above its threshold is skipped", loc="left")
    score.legend(loc="upper center", ncols=5, fontsize=8.5, frameon=False, columnspacing=1.2)

    score.spines[["top", "right"]].set_visible(False)
    draw_cache(cache, [piece.strip() for piece in pieces], found, warm)
    figure.savefig(path, dpi=110)


def draw_flow(panel):
    """The way of a token through one layer."""
    from matplotlib.patches import FancyBboxPatch

    panel.set(xlim=(0, 100), ylim=(0, 22))
    panel.axis("off")
    panel.set_title("1. One token in one layer", loc="left")

    def box(x, y, width, text, colour="#f3f3f3", edge="#888888"):
        style = {"boxstyle": "round,pad=0.3", "facecolor": colour, "edgecolor": edge}
        panel.add_patch(FancyBboxPatch((x, y - 2.6), width, 5.2, **style))
        panel.text(x + width / 2, y, text, ha="center", va="center", fontsize=9.5)

    def arrow(x, y, to_x, to_y, colour="#555555"):
        panel.annotate("", (to_x, to_y), (x, y), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6})

    box(1, 11, 9, "token")
    box(15, 11, 12, "project\nkey $k$, value $v$")
    box(32, 11, 18, "compare with the averages\n(anchors) of the latest:\nscore $s$")
    box(55, 17.5, 27, "query, attention, output projection\n$k, v$ go into the cache", "#cfe2f3", BLUE)
    box(55, 4.5, 27, "nothing is added\n$k, v$ are dropped", "#fde3c8", ORANGE)
    box(89, 11, 9, "MLP,\nnext layer")
    arrow(10.5, 11, 14.5, 11)
    arrow(27.5, 11, 31.5, 11)
    arrow(50.5, 12, 54.5, 17, BLUE)
    arrow(50.5, 10, 54.5, 5, ORANGE)
    panel.text(50.5, 18, "new", ha="center", color=BLUE, fontsize=11)
    panel.text(50.5, 3, "redundant", ha="center", color=ORANGE, fontsize=11)
    arrow(82.5, 17, 88.5, 12, BLUE)
    arrow(82.5, 5, 88.5, 10, ORANGE)


def draw_slot(panel, row, left, right, piece, inside, sink, new):
    from matplotlib.patches import Rectangle

    left, width = left + 0.04, right - left - 0.08
    panel.add_patch(Rectangle((left, row - 0.33), width, 0.66, facecolor=inside, edgecolor="#b8c4d0", linewidth=0.8))
    look = {"fontsize": 7.5, "color": "#888888"} if sink else {"fontsize": 8.5, "color": "black"}
    panel.text(left + width / 2, row, piece, ha="center", va="center", fontweight="bold" if new else "normal", **look)


def draw_cache(panel, pieces, found, warm):
    """A layer's slots in mode "local" after each token from FIRST on, a row each, and how many slots the token sees in each mode's run."""
    from matplotlib.patches import Rectangle

    held_by, redundant = {mode: list(slots(own, warm, RECENT)) for mode, own in found.items()}, found["local"]
    states, front, last = held_by["local"], warm + RECENT + 1, len(pieces) - FIRST
    # where slots begin: those of the sinks, which never change, are narrower
    edge = [0.75 * slot + 0.75 * max(0, slot - warm) for slot in range(front + len(states[-1][1]) + 2)]
    columns = {name: edge[-1] + 1 + 2 * i for i, name in enumerate(found)}
    panel.set(xlim=(-0.05, columns["cache"] + 0.8), ylim=(last + 0.8, -1.7), xticks=[])
    panel.set_title(f"3. The cache under local, with recent = {RECENT}: what it holds after each token, and what that sees", loc="left")
    parts = (0, warm, f"sinks: the first {warm}"), (warm, front, f"ring: the latest {RECENT + 1}"), (front, -1, "far: kept")
    for start, end, name in parts:
        panel.plot((edge[start] + 0.1, edge[end] - 0.1), (-0.65, -0.65), color="#888888", linewidth=1)
        panel.text((edge[start] + edge[end]) / 2, -1.1, name, ha="center", va="center", fontsize=10)
    panel.text(columns["local"], -1.4, "slots it sees, in each mode's own run", ha="center", va="center", fontsize=10)
    for name, x in columns.items():
        panel.text(x, -0.8, name, ha="center", va="center", fontsize=9.5)

    for row, t in enumerate(range(FIRST, len(pieces))):
        (near, far), colour = states[t], ORANGE if redundant[t] else BLUE
        for slot, held in enumerate(near + far):
            inside = "#f3f3f3" if slot < warm else PALE[ORANGE if redundant[held] else BLUE]
            draw_slot(panel, row, edge[slot], edge[slot + 1], pieces[held], inside, slot < warm, held == t)
        for name, x in columns.items():
            ring, beyond = map(len, held_by[name][t])
            sees = {"skip": 0, "local": ring, "cache": ring + beyond}[name] if found[name][t] else ring + beyond
            panel.text(x, row, sees, ha="center", va="center", fontsize=9.5, color=ORANGE if found[name][t] else BLUE)
            if name == "local":
                panel.add_patch(Rectangle((0, row - 0.42), edge[sees], 0.84, fill=False, edgecolor=colour, linewidth=1.8))
        if far != states[t - 1][1]:  # a kept token has left the ring
            left, to = edge[states[t - 1][0].index(far[-1])] + 0.75, edge[len(near + far) - 1] + 0.4
            panel.annotate("", (to, row - 0.34), (left, row - 0.64), arrowprops={"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.5})
        verdict = "redundant" if redundant[t] else "kept"
        panel.text(-0.2, row, f'"{pieces[t]}" is {verdict}', ha="right", va="center", fontsize=9.5, color=colour)
    panel.text(0, last - 0.3, "Bold: the new token. Framed: what it sees, always the first so many slots. Blue: kept; orange:"
               " redundant, gone once out of the ring.\nArrow: a kept token leaves the ring and becomes a far one.",
               fontsize=9.5, va="top", color="#555555")  # fmt: skip
    panel.axis("off")


def main(argv=None):
    parser = Parser(description="The numbers of the lesson's worked example, and its picture.")
    parser.add_argument("--draw", metavar="FILE.png", help="draw the picture (needs matplotlib)")
    path = parser.parse_args(argv).draw
    if path:
        check_output("--draw", path, (".png",))
    pieces, seen, cache = watch()
    ratio = cache.layers[LAYER].ratio.item()
    k, v = seen[LAYER]
    steps = stages(k, v, ratio)
    print(f"layer {LAYER}, ratio {ratio:.4f}: {pieces[SKIPPED]!r} and {pieces[KEPT]!r}")
    print(table(steps[SKIPPED], steps[KEPT]), flush=True)
    if path:
        draw(path, pieces, steps, by_mode(), cache.filter.warmup)


if __name__ == "__main__":
    run_command(main)
