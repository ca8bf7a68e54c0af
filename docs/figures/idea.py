"""The numbers of the worked example, and the picture of the idea in README and the lesson.

    python -m docs.figures.idea                    print the lesson's table
    python -m docs.figures.idea --draw FILE.png    draw the picture too

One sentence through the demo model under preset "paper". `stages` computes once more what a layer
does with it, one stage at a time in NumPy, from the keys and values of the real forward pass. The
lesson, the picture and test_idea.py share it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from cli.arguments import DEMO, Parser
from cli.process import run_command
from cli.report import check_output
from cli.skip_map import token_pieces
from filter_config import preset
from load_weights import load
from token_filter import token_filter

TEXT = (
    "The cat sat on the mat. The cat sat on the mat. The cat sat on the mat. "
    "The cat sat on the hot stove."
)
LAYER = 15  # chosen because its decisions are clear
SKIPPED = 25  # " the", an old word
KEPT = 26  # " hot", a new one

BLUE = "#2f6fb0"  # kept
ORANGE = "#f08c2e"  # redundant
PALE_BLUE = "#cfe2f3"
PALE_ORANGE = "#fde3c8"
PALE_GREY = "#f3f3f3"
GREY = "#888888"
DARK_GREY = "#555555"


# ------------------------------------------------------------------------------------ the numbers


@dataclass
class Stage:
    """One token in one layer: everything between its k, v and the verdict."""

    c_k: np.ndarray  # (KVH,) cosines of its key
    c_v: np.ndarray  # (KVH,) cosines of its value
    w_k: float
    score: float
    n: int  # how many scores there are to be ranked among
    below: int  # how many of them are strictly below its own
    needed: int  # how many must be for it to be redundant
    threshold: float  # the score that it must exceed for that; NaN while there is none
    redundant: bool


def cosine(x, y):
    """By head: x, y (KVH, D) -> (KVH,)."""
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


def stages(
    k, v, ratio, gamma=0.9, warmup=16, window=64, eps=1e-6, averaged_first=False
) -> list[Stage]:
    """k, v (T, KVH, D) of one sequence in one layer, one token after the other.

    averaged_first: the mistake of an exercise, to compare a token with averages it is already in.
    """
    A_K = k[0]
    A_V = v[0]
    scores: list[float] = []
    out = []
    for k_t, v_t in zip(k, v):
        next_A_K = gamma * A_K + (1 - gamma) * k_t
        next_A_V = gamma * A_V + (1 - gamma) * v_t
        if averaged_first:
            c_k = cosine(k_t, next_A_K)
            c_v = cosine(v_t, next_A_V)
        else:
            c_k = cosine(k_t, A_K)
            c_v = cosine(v_t, A_V)
        w_k = (c_v.var() + eps) / (c_k.var() + c_v.var() + 2 * eps)
        score = w_k * c_k.mean() + (1 - w_k) * c_v.mean()

        past = sorted(scores[-window:])
        n = len(past)
        below = sum(s < score for s in past)
        needed = math.ceil((1 - ratio) * n - 1e-9)
        threshold = math.nan
        if needed > 0:
            threshold = past[needed - 1]
        redundant = len(scores) >= warmup and below >= needed
        out.append(Stage(c_k, c_v, w_k, score, n, below, needed, threshold, redundant))
        scores.append(score)
        A_K = next_A_K
        A_V = next_A_V
    return out


def run_example(prune=0.5, **changes):
    """TEXT through the demo model in float64, under preset "paper" with some fields changed.

    Returns the text of its tokens; layer -> (k, v), (T, KVH, D) each, of every layer that filters;
    the cache.
    """
    model, tokenizer = load(DEMO, "cpu", "float64")
    tokens = tokenizer.encode(TEXT)
    keys_and_values = {}

    def filter_fn(k, v, lengths, state, ratio, config, q=None):
        """The method's own, with a look at what the model gives it."""
        keys_and_values[int(state.layer)] = (k[0].numpy(), v[0].numpy())
        return token_filter(k, v, lengths, state, ratio, config)

    cache = model.new_cache(1, preset("paper", prune=prune, **changes), filter_fn)
    model(torch.tensor([tokens]), cache)
    return token_pieces(tokenizer, tokens), keys_and_values, cache


def slots(redundant, n_sinks, recent):
    """What a layer's cache holds after each token of a sequence, as LayerCache in kv_cache.py does.

    redundant: a flag for each token.
    Yields the tokens in the near slots (sinks and ring), and those in the far ones.
    """
    near: list[int] = []
    far: list[int] = []
    for t in range(len(redundant)):
        slot = t
        if t >= n_sinks:
            slot = n_sinks + (t - n_sinks) % (recent + 1)
        if slot == len(near):
            near.append(t)
        else:
            leaves = near[slot]
            if not redundant[leaves]:
                far.append(leaves)
            near[slot] = t
        yield near.copy(), far.copy()


def n_visible(mode, redundant, n_near, n_far) -> int:
    """How many slots a token sees in a layer that found it redundant, or not."""
    if redundant and mode == "skip":
        return 0
    if redundant and mode == "local":
        return n_near
    return n_near + n_far


def table(skipped: Stage, kept: Stage) -> str:
    """The lesson's table, without its head."""
    rows = []
    for name, left, right in zip(ROW_NAMES, cells(skipped), cells(kept)):
        rows.append(f"| {name} | {left} | {right} |")
    return "\n".join(rows)


ROW_NAMES = (
    "$c_k$ of the three heads",
    "$c_v$ of the three heads",
    "mean of $c_k$, of $c_v$",
    "variance of $c_k$, of $c_v$",
    "$w_k$",
    "score $s_t$",
    "$n$, the scores before it",
    "$c$, those strictly below $s_t$",
    r"needed, $\lceil(1-r_l)n-10^{-9}\rceil$",
    "verdict",
)


def cells(stage: Stage) -> list[str]:
    """What the lesson's table says of a token, in the order of ROW_NAMES."""
    verdict = f"{stage.below} < {stage.needed}: **kept**"
    if stage.redundant:
        verdict = f"{stage.below} ≥ {stage.needed}: **skipped**"
    return [
        ", ".join(f"{c:.3f}" for c in stage.c_k),
        ", ".join(f"{c:.3f}" for c in stage.c_v),
        f"{stage.c_k.mean():.3f}, {stage.c_v.mean():.3f}",
        f"{stage.c_k.var():.5f}, {stage.c_v.var():.5f}",
        f"{stage.w_k:.3f}",
        f"**{stage.score:.3f}**",
        str(stage.n),
        str(stage.below),
        str(stage.needed),
        verdict,
    ]


# ------------------------------------------------------------------------------------ the picture


def draw(path, pieces: list[str], steps: list[Stage], n_sinks: int):
    """The way of a token; the scores of one run; the cache of the same run.

    pieces: the text of each token; steps: its stages in LAYER.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 12), layout="constrained")
    flow, scores, cache = figure.subplots(3, 1, height_ratios=[2.6, 4.4, 5])
    words = [piece.strip() for piece in pieces]
    draw_flow(flow)
    draw_scores(scores, words, steps, n_sinks)
    draw_cache(cache, words, [step.redundant for step in steps], n_sinks)
    figure.savefig(path, dpi=110)


def draw_flow(panel):
    """The way of a token through one layer."""
    panel.set(xlim=(0, 100), ylim=(0, 22))
    panel.axis("off")
    panel.set_title("1. One token in one layer", loc="left")
    draw_box(panel, 1, 11, 9, "token")
    draw_box(panel, 15, 11, 12, "project\nkey $k$, value $v$")
    draw_box(panel, 32, 11, 18, "compare with the averages\n(anchors) of the latest:\nscore $s$")
    attend = "query, attention, output projection\n$k, v$ go into the cache"
    draw_box(panel, 55, 17.5, 27, attend, PALE_BLUE, BLUE)
    draw_box(panel, 55, 4.5, 27, "nothing is added\n$k, v$ are dropped", PALE_ORANGE, ORANGE)
    draw_box(panel, 89, 11, 9, "MLP,\nnext layer")
    draw_arrow(panel, (10.5, 11), (14.5, 11))
    draw_arrow(panel, (27.5, 11), (31.5, 11))
    draw_arrow(panel, (50.5, 12), (54.5, 17), BLUE)
    draw_arrow(panel, (50.5, 10), (54.5, 5), ORANGE)
    panel.text(50.5, 18, "kept", ha="center", color=BLUE, fontsize=11)
    panel.text(50.5, 3, "redundant", ha="center", color=ORANGE, fontsize=11)
    draw_arrow(panel, (82.5, 17), (88.5, 12), BLUE)
    draw_arrow(panel, (82.5, 5), (88.5, 10), ORANGE)


def draw_box(panel, x, y, width, text, colour=PALE_GREY, edge=GREY):
    from matplotlib.patches import FancyBboxPatch

    box = FancyBboxPatch(
        (x, y - 2.6), width, 5.2, boxstyle="round,pad=0.3", facecolor=colour, edgecolor=edge
    )
    panel.add_patch(box)
    panel.text(x + width / 2, y, text, ha="center", va="center", fontsize=9.5)


def draw_arrow(panel, start, end, colour=DARK_GREY):
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6}
    panel.annotate("", end, start, arrowprops=style)


def draw_scores(panel, words, steps: list[Stage], n_sinks):
    """Each token's score, and the threshold that it was compared with."""
    kept = [t for t, step in enumerate(steps) if not step.redundant]
    skipped = [t for t, step in enumerate(steps) if step.redundant]
    draw_tokens(panel, kept, steps, BLUE, "score, kept: attends, and is cached")
    draw_tokens(panel, skipped, steps, ORANGE, "score, skipped: no attention, not cached")

    t = np.arange(len(steps))
    of_keys = [step.c_k.mean() for step in steps]
    of_values = [step.c_v.mean() for step in steps]
    panel.plot(t, of_keys, "^", color="#777777", markersize=4, label="of its key alone")
    panel.plot(t, of_values, "v", color="#a8a8a8", markersize=4, label="of its value alone")
    thresholds = [step.threshold for step in steps[n_sinks:]]
    label = "threshold: a rank among earlier scores"
    left = t[n_sinks:] - 0.45
    right = t[n_sinks:] + 0.45
    panel.hlines(thresholds, left, right, colors="black", linewidth=2, label=label)

    panel.axvspan(-0.5, n_sinks - 0.5, color="#eeeeee", zorder=0)
    warmup = "warm-up: always kept, the averages have yet to settle"
    panel.text(-0.2, 1.09, warmup, va="center", color=DARK_GREY)
    panel.axhline(0, color="#aaaaaa", linewidth=0.8, zorder=0)
    panel.set(xlim=(-0.5, len(steps) - 0.5), ylim=(-0.22, 1.36), yticks=np.arange(0, 1.1, 0.2))
    panel.set_ylabel("likeness to the averages")
    panel.set_xticks(t, words, fontsize=10)
    for of_table in (SKIPPED, KEPT):
        panel.get_xticklabels()[of_table].set_fontweight("bold")
    title = f"2. One sentence in layer {LAYER} of the demo model"
    panel.set_title(f"{title}: what is above its threshold is skipped", loc="left")
    panel.legend(loc="upper center", ncols=5, fontsize=8.5, frameon=False, columnspacing=1.2)
    panel.spines[["top", "right"]].set_visible(False)


def draw_tokens(panel, tokens, steps, colour, label):
    """The scores of these tokens."""
    scores = [steps[t].score for t in tokens]
    panel.vlines(tokens, 0, scores, colors=colour, linewidth=3, alpha=0.35)
    panel.plot(tokens, scores, "o", color=colour, markersize=9, label=label)


# Widths in the third panel.
SINK_WIDTH = 0.75  # sinks never change, so they may be narrow
SLOT_WIDTH = 1.5

CAPTION = (
    "Bold: the new token; the ring has one slot, for it. Framed: what it sees, always the first "
    "slots of the row. Blue: kept. Orange: redundant, gone with\n"
    "the next token. Arrow: a kept token leaves the ring and becomes a far one. Numbers: how many "
    "slots the token sees in this run (skip), and how many it\n"
    "would see in the other modes, had they decided the same. (Presets local and cache have a ring "
    "of 33.)"
)


def draw_cache(panel, words, redundant, n_sinks):
    """A layer's slots after each token past the warm-up, a row each, in mode "skip".

    Beside it how many slots the token sees in each mode.
    """
    states = list(slots(redundant, n_sinks, recent=0))
    n_near = n_sinks + 1
    n_slots = n_near + len(states[-1][1])
    edges = [0.0]  # of the slots, from left to right
    for slot in range(n_slots):
        edges.append(edges[-1] + (SINK_WIDTH if slot < n_sinks else SLOT_WIDTH))
    columns = {"skip": edges[-1] + 1.5, "local": edges[-1] + 3.2, "cache": edges[-1] + 4.9}
    n_rows = len(words) - n_sinks

    panel.set(xlim=(-0.05, columns["cache"] + 0.8), ylim=(n_rows + 1.3, -1.7))
    panel.axis("off")
    panel.set_title(
        f"3. The same run: what layer {LAYER} holds after each token, and what the token sees",
        loc="left",
    )
    draw_heading(panel, edges[0], edges[n_sinks], f"sinks: the first {n_sinks}")
    draw_heading(panel, edges[n_sinks], edges[n_near], "ring")
    draw_heading(panel, edges[n_near], edges[-1], "far: kept tokens")
    panel.text(columns["local"], -1.4, "slots it sees", ha="center", va="center", fontsize=10)
    for mode, x in columns.items():
        panel.text(x, -0.8, mode, ha="center", va="center", fontsize=9.5)

    for row in range(n_rows):
        t = n_sinks + row
        near, far = states[t]
        draw_slots(panel, row, edges, words, redundant, near + far, n_sinks)
        colour = ORANGE if redundant[t] else BLUE
        verdict = "redundant" if redundant[t] else "kept"
        label = f'"{words[t]}" is {verdict}'
        panel.text(-0.2, row, label, ha="right", va="center", fontsize=9.5, color=colour)
        for mode, x in columns.items():
            n = n_visible(mode, redundant[t], len(near), len(far))
            panel.text(x, row, n, ha="center", va="center", fontsize=9.5, color=colour)
        draw_frame(panel, row, edges[n_visible("skip", redundant[t], len(near), len(far))])
        if len(far) > len(states[t - 1][1]):
            start = (edges[n_sinks] + 0.75, row - 0.64)
            end = (edges[n_near + len(far) - 1] + 0.4, row - 0.34)
            draw_arrow(panel, start, end, BLUE)
    panel.text(0, n_rows - 0.3, CAPTION, fontsize=9.5, va="top", color=DARK_GREY)


def draw_heading(panel, left, right, text):
    """The name of some slots, above them."""
    panel.plot((left + 0.1, right - 0.1), (-0.65, -0.65), color=GREY, linewidth=1)
    panel.text((left + right) / 2, -1.1, text, ha="center", va="center", fontsize=10)


def draw_slots(panel, row, edges, words, redundant, held, n_sinks):
    """The slots that are filled: `held` are the tokens in them."""
    from matplotlib.patches import Rectangle

    newest = max(held)
    for slot, token in enumerate(held):
        left = edges[slot] + 0.04
        width = edges[slot + 1] - edges[slot] - 0.08
        is_sink = slot < n_sinks
        inside = PALE_ORANGE if redundant[token] else PALE_BLUE
        if is_sink:
            inside = PALE_GREY
        box = Rectangle(
            (left, row - 0.33), width, 0.66, facecolor=inside, edgecolor="#b8c4d0", linewidth=0.8
        )
        panel.add_patch(box)
        panel.text(
            left + width / 2,
            row,
            words[token],
            ha="center",
            va="center",
            fontsize=7.5 if is_sink else 8.5,
            color=GREY if is_sink else "black",
            fontweight="bold" if token == newest else "normal",
        )


def draw_frame(panel, row, width):
    """A frame around what a kept token sees; nothing around nothing."""
    from matplotlib.patches import Rectangle

    if width > 0:
        frame = Rectangle((0, row - 0.42), width, 0.84, fill=False, edgecolor=BLUE, linewidth=1.8)
        panel.add_patch(frame)


def main(argv=None):
    parser = Parser(description="The numbers of the lesson's worked example, and its picture.")
    parser.add_argument("--draw", metavar="FILE.png", help="draw the picture (needs matplotlib)")
    path = parser.parse_args(argv).draw
    if path:
        check_output("--draw", path, (".png",))
    pieces, keys_and_values, cache = run_example()
    ratio = cache.layers[LAYER].ratio
    k, v = keys_and_values[LAYER]
    steps = stages(k, v, ratio)
    print(f"layer {LAYER}, ratio {ratio:.4f}: {pieces[SKIPPED]!r} and {pieces[KEPT]!r}")
    print(table(steps[SKIPPED], steps[KEPT]), flush=True)
    if path:
        draw(path, pieces, steps, cache.n_sinks)


if __name__ == "__main__":
    run_command(main)
