"""Which layers found which tokens redundant, shown in one of three ways:

    paint           a text in colours, for a terminal
    draw_skip_map   a picture of layers by tokens, FILE.png
    write_skip_page a page to take apart in a browser, FILE.html

Shapes: L layers, T tokens of one sequence (prompt and answer), KVH key/value heads.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from filter_config import FilterConfig, layer_ratios
from kv_cache import KVCache
from loading.tokenizer import Tokenizer
from token_filter import mean_and_variance

# Backgrounds for up to 20%, 40%, ... of the layers, out of a terminal's 256 colours.
SHADES = (230, 222, 214, 208, 202)
BOLD = "\033[1m"
UNDERLINE = "\033[4m"
RESET = "\033[0m"

# A picture is wrapped: it has strips of at most STRIP tokens, and at most MOST_STRIPS of them.
STRIP = 72
MOST_STRIPS = 6

# From a low score to a high one, and where a layer gave no score.
BLUES = ("#f4f9fe", "#6aaed6", "#08306b")  # kept
NO_SCORE_KEPT = "#cccccc"
ORANGES = ("#fff3c4", "#fd9a3c", "#a02c00")  # redundant
NO_SCORE_REDUNDANT = "#3d1000"


class Decisions:
    """What every layer decided about every token that was fed. Hand `watch` to generate().

    Each of these is a list over the rows of the batch:

        redundant  (L, T) bool
        score      (L, T) float64, NaN where a layer gave none
        cosine     of each layer a list of parts (T', 2, KVH) float64: the similarity of keys and of
                   values, by head. The parts make up the T tokens. No parts: it does not score.
                   With fusion "key-query" (T', 3, KVH), the last of keys to queries.
        mean       of each layer a list of parts (T', 2 or 3) float64: the mean of cosine over heads
        w_k        of each layer a list of parts (T',) float64: the weight of the keys' side. No
                   parts with fusion "key-query".

    T counts the tokens that were fed: all of the prompt and the answer but the last one sampled.
    """

    def __init__(self, n_rows, n_layers):
        self.redundant = [torch.zeros(n_layers, 0, dtype=torch.bool) for _ in range(n_rows)]
        self.score = [torch.zeros(n_layers, 0, dtype=torch.float64) for _ in range(n_rows)]
        self.cosine: list[list[list[torch.Tensor]]] = []
        self.mean: list[list[list[torch.Tensor]]] = []
        self.w_k: list[list[list[torch.Tensor]]] = []
        for _ in range(n_rows):
            self.cosine.append([[] for _ in range(n_layers)])
            self.mean.append([[] for _ in range(n_layers)])
            self.w_k.append([[] for _ in range(n_layers)])

    def watch(self, rows, cache: KVCache):
        """Add what the layers decided about the chunk that the cache was fed last.

        rows: the numbers of the cache's rows.
        """
        by_layer = cache.decisions()
        redundant = torch.stack([layer.redundant for layer in by_layer]).cpu()  # (L, B, T')
        score = torch.stack([layer.score.double() for layer in by_layer]).cpu()
        # The means as the filter has them, to the last bit, since it ranks them. So they are of the
        # cosines in the filter's own precision.
        means = []  # of each layer (B, T', 2 or 3) or None
        for layer in by_layer:
            mean = None
            if layer.cosine is not None:
                mean, _ = mean_and_variance(layer.cosine, None)
            means.append(mean)
        for i, row in enumerate(rows):
            n_new = int(cache.lengths[i]) - self.redundant[row].shape[1]  # without padding
            self.redundant[row] = torch.cat((self.redundant[row], redundant[:, i, :n_new]), dim=1)
            self.score[row] = torch.cat((self.score[row], score[:, i, :n_new]), dim=1)
            for l, layer in enumerate(by_layer):
                mean = means[l]
                if layer.cosine is not None and mean is not None:
                    self.cosine[row][l].append(layer.cosine[i, :n_new].double().cpu())
                    self.mean[row][l].append(mean[i, :n_new].double().cpu())
                if layer.w_k is not None:
                    self.w_k[row][l].append(layer.w_k[i, :n_new].double().cpu())


def token_pieces(tokenizer: Tokenizer, tokens) -> list[str]:
    """The text that each token brings: "" for one that ends within a character.

    A special token brings its name.
    """
    special = tokenizer.special_names
    stream = tokenizer.stream(start=True)
    pieces = []
    for token in tokens:
        if token in special:
            pieces.append(special[token])
        else:
            pieces.append(stream.push(token))
    pieces[-1] += stream.flush()
    return pieces


# ---------------------------------------------------------------------------- in a terminal


def shade(level) -> str:
    """The background number `level` of SHADES, with black on it."""
    return f"\033[48;5;{SHADES[level]};38;5;16m"


def paint(pieces: list[str], n_prompt: int, redundant) -> str:
    """A row's text for a terminal. The more layers found a token redundant, the darker it stands.

    The answer is bold.

    pieces: the text of each token, n_prompt of them the prompt's.
    redundant (L, T), as in Decisions.
    """
    n_layers, n_fed = redundant.shape
    n_redundant = redundant.sum(0).tolist()  # of each token: in how many layers it is redundant
    text = ""
    for t, piece in enumerate(pieces):
        style = ""
        if t >= n_prompt:
            style += BOLD
        if t >= n_fed:
            style += UNDERLINE
        elif n_redundant[t] > 0:
            style += shade(math.ceil(n_redundant[t] * len(SHADES) / n_layers) - 1)
        # A line ends without colour, as some terminals would draw it to the margin.
        painted = piece.replace("\n", f"↵{RESET}\n{style}")
        text += style + painted + RESET
    return text


def paint_legend() -> str:
    """What the colours of paint() mean, in a line."""
    shades = ""
    for level in range(len(SHADES)):
        shades += f"{shade(level)} up to {(level + 1) / len(SHADES):.0%} {RESET}"
    answer = f"{BOLD}answer{RESET}"
    last = f"{UNDERLINE}last token{RESET}"
    return f"redundant in {shades} of the layers; {answer}; {last}, which no layer has seen"


# ----------------------------------------------------------------------------- as a picture


def strips(T, n_prompt) -> tuple[int, list[int], str]:
    """How a picture of T tokens is wrapped.

    Returns how many tokens its widest strip has, the first token of each, and what the title says
    about tokens that are left out.
    """
    if T <= STRIP * MOST_STRIPS:
        n_strips = math.ceil(T / STRIP)
        width = math.ceil(T / n_strips)
        return width, [width * i for i in range(n_strips)], ""

    # The first strip, then the end of the prompt and the answer as far as there is room.
    n_others = MOST_STRIPS - 1
    second = min(n_prompt - STRIP, T - STRIP * n_others)
    second = max(second, STRIP)
    starts = [0]
    for i in range(n_others):
        starts.append(second + STRIP * i)
    last = starts[-1] + STRIP - 1
    if second > STRIP:
        drawn = f"0 to {STRIP - 1} and {second} to {last}"
    else:
        drawn = f"0 to {last}"
    return STRIP, starts, f" (tokens {drawn} of {T} are drawn)"


def tick_label(piece, fonts) -> str:
    """A token's text as a label of at most about 12 letters.

    ␣ is a space, ↵ a line's end, · a token that ends within a character, U+72D0 a letter that one
    of the fonts lacks.
    """
    if piece == "":
        return "·"
    visible = piece.replace("\n", "↵").strip() or "␣"
    label = ""
    for letter in visible:
        is_known = all(font.get_char_index(ord(letter)) for font in fonts)
        label += letter if is_known else f"U+{ord(letter):04X}"
        if len(label) >= 12:
            break
    return label


def draw_share(panel, tokens, redundant):
    """Of each token the share of the layers that found it redundant, as bars; redundant (L, T)."""
    panel.bar(tokens, redundant[:, tokens].mean(0), width=1, color=ORANGES[1])
    panel.set(ylim=(0, 1), xticks=[], yticks=[0, 1], ylabel="share of\nlayers")
    panel.set_title(f"tokens {tokens[0]} to {tokens[-1]}", loc="right", fontsize=9)


def draw_layers(panel, tokens, image, labels, n_prompt):
    """Every decision on each token: image (L, T, RGBA), with a label under each token."""
    corners = (tokens[0] - 0.5, tokens[-1] + 0.5, -0.5, len(image) - 0.5)
    panel.imshow(
        image[:, tokens], extent=corners, origin="lower", aspect="auto", interpolation="nearest"
    )
    panel.set_ylabel("layer")
    panel.yaxis.get_major_locator().set_params(integer=True)
    below = [labels[t] for t in tokens]
    panel.set_xticks(tokens, below, rotation=90, fontsize=9, fontfamily="DejaVu Sans")
    for t, tick in zip(tokens, panel.get_xticklabels()):
        tick.set_parse_math(False)  # "$" is a token like others
        if t >= n_prompt:
            tick.set_fontweight("bold")


def score_colours(score):
    """How scores become colours: their scale, and its colours for kept and for redundant tokens.

    score (L, T), masked where there is none.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    known = score.compressed()
    lowest, highest = 0, 1
    if known.size > 0:
        # A few scores are very low, and would leave one shade to all others.
        lowest, highest = np.quantile(known, (0.03, 1))
    kept = LinearSegmentedColormap.from_list("kept", BLUES)
    redundant = LinearSegmentedColormap.from_list("redundant", ORANGES)
    return (
        Normalize(lowest, highest),
        kept.with_extremes(bad=NO_SCORE_KEPT),
        redundant.with_extremes(bad=NO_SCORE_REDUNDANT),
    )


def draw_key(figure, panels, scale, colours, label):
    """A bar beside the panels that says which score has which colour."""
    from matplotlib.cm import ScalarMappable

    mappable = ScalarMappable(scale, colours)
    bar = figure.colorbar(mappable, ax=panels, extend="min", aspect=40, pad=0.01)
    bar.set_label(label)


def draw_key_without_score(figure, some_kept, some_redundant):
    """What the colours of tokens without a score mean, where there are such tokens."""
    from matplotlib.patches import Patch

    patches = []
    if some_kept:
        patches.append(Patch(color=NO_SCORE_KEPT, label="kept, no score"))
    if some_redundant:
        patches.append(Patch(color=NO_SCORE_REDUNDANT, label="redundant, no score"))
    if patches:
        place = "outside lower right"
        figure.legend(handles=patches, loc=place, ncols=2, frameon=False, fontsize=9)


def draw_skip_map(path, title, pieces: list[str], n_prompt: int, redundant, score, warmup: int):
    """A row as a PNG picture, layers by tokens: orange where redundant, blue where kept.

    The higher a score, the darker. A text of more than MOST_STRIPS strips is not drawn whole: its
    start is, and from the end of the prompt on what there is room for. The title says so.

    pieces: the text of each token, n_prompt of them the prompt's.
    redundant, score (L, T), as in Decisions.
    """
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findfont, get_font

    redundant = redundant.numpy()
    score = np.ma.masked_invalid(score.double().numpy())  # masked where there is none
    L, T = redundant.shape
    scale, blue, orange = score_colours(score)
    shades = scale(score)
    image = np.where(redundant[..., None], orange(shades), blue(shades))  # (L, T, RGBA)
    fonts = [get_font(findfont(f"DejaVu Sans:weight={weight}")) for weight in ("normal", "bold")]
    labels = [tick_label(piece, fonts) for piece in pieces]

    width, starts, left_out = strips(T, n_prompt)
    strip_height = 0.1 * max(L, 8)  # inches
    heights = [0.5, strip_height] * len(starts)
    figure = Figure(figsize=(13, 0.6 + len(starts) * (1.8 + strip_height)), layout="constrained")
    panels = figure.subplots(2 * len(starts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for start, share, layers in zip(starts, panels[::2], panels[1::2]):
        tokens = range(start, min(start + width, T))
        draw_share(share, tokens, redundant)
        draw_layers(layers, tokens, image, labels, n_prompt)
        share.set_xlim(start - 0.5, start + width - 0.5)
        layers.set_xlim(start - 0.5, start + width - 0.5)
        for edge, name in ((max(warmup, 1), "warm-up ends"), (n_prompt, "answer")):
            if edge in tokens:
                share.axvline(edge - 0.5, color="black", linewidth=1.2)
                layers.axvline(edge - 0.5, color="black", linewidth=1.2)
                share.text(edge - 0.5, 1.05, name, fontsize=9)

    draw_key(figure, panels, scale, orange, "score of redundant tokens")
    draw_key(figure, panels, scale, blue, "score of kept tokens")
    has_no_score = np.ma.getmaskarray(score)
    some_kept = (has_no_score & ~redundant).any()
    some_redundant = (has_no_score & redundant).any()
    draw_key_without_score(figure, some_kept, some_redundant)
    figure.suptitle(f"{title}: {redundant.mean():.1%} of (token, layer) pairs redundant{left_out}")
    figure.savefig(path, format="png", dpi=110)


# -------------------------------------------------------------------------------- as a page


def places(values, history):
    """How many of the latest `history` values before each one are below it; equal ones count half.

    values (T, N); returns (T, N).
    """
    none = torch.full((history, values.shape[1]), math.nan, dtype=values.dtype)
    before = torch.cat((none, values[:-1])).unfold(0, history, 1)  # (T, N, history)
    value = values[..., None]
    below = (before < value).sum(-1)
    equal = (before == value).sum(-1)
    return below + equal / 2


def layer_data(decisions: Decisions, l, filter: FilterConfig) -> dict:
    """The entries of page_data() that are lists over layers, for layer l."""
    digits = [str(int(flag)) for flag in decisions.redundant[0][l]]
    data: dict = {"redundant": "".join(digits)}
    for name in ("score", "cosine_k", "cosine_v", "weight", "cosine_q", "place_k", "place_q"):
        data[name] = None
    if not decisions.cosine[0][l]:
        return data

    # Scores and places are exact, since the page ranks scores, and equal ones must stay equal. Of
    # the others four digits are enough to read.
    data["score"] = decisions.score[0][l].tolist()
    cosine = torch.cat(decisions.cosine[0][l]).numpy().round(4)  # (T, 2 or 3, KVH)
    data["cosine_k"] = cosine[:, 0].tolist()
    if filter.needs_queries:
        data["cosine_q"] = cosine[:, 2].tolist()
        place = places(torch.cat(decisions.mean[0][l]), filter.history)  # (T, 3)
        data["place_k"] = place[:, 0].tolist()
        data["place_q"] = place[:, 2].tolist()
    else:
        data["cosine_v"] = cosine[:, 1].tolist()
        weight = torch.cat(decisions.w_k[0][l]).numpy().round(4)  # (T,)
        data["weight"] = weight.tolist()
    return data


def page_data(
    title, pieces: list[str], n_prompt: int, decisions: Decisions, filter: FilterConfig, window
) -> dict:
    """What skip_page.html shows of the only row of `decisions`. A dictionary with these entries:

        title, about         of the run, in words
        pieces, prompt       the text of each token, and how many are the prompt's; a last one may
                             not have been fed
        mode, recent, warmup, history    as in FilterConfig
        ratios               r_l of each layer
        redundant            of each layer a string of 0 and 1, a digit for each token fed
        score                of each layer a list over tokens, s_t
        cosine_k             of each layer a list over tokens of lists over heads, c_k
        cosine_v, weight     the same of c_v, and a list over tokens, w_k
        cosine_q             with fusion "key-query", in place of these two: as cosine_k, c_q
        place_k, place_q     with that fusion too, of each layer a list over tokens: how many of the
                             latest `history` means of c_k or c_q before the token are below its
                             own; equal ones count half

    Those from `score` on are null in a layer that scores none, and where the fusion has none.
    """
    redundant = decisions.redundant[0]
    L, T = redundant.shape
    share = redundant.double().mean()
    about = f"{share:.1%} of {L * T} (token, layer) pairs are redundant; tokens: {T}, layers: {L}"
    if window:
        about += f"; a sliding window of {window} tokens may hide more than is said here"

    data = {
        "title": title,
        "about": about,
        "pieces": pieces,
        "prompt": n_prompt,
        "mode": filter.mode,
        "recent": filter.recent,
        "warmup": filter.warmup,
        "history": filter.history,
        "ratios": layer_ratios(filter, L),
    }
    layers = [layer_data(decisions, l, filter) for l in range(L)]
    for name in layers[0]:
        data[name] = [layer[name] for layer in layers]
    return data


def write_skip_page(
    path,
    title,
    pieces: list[str],
    n_prompt: int,
    decisions: Decisions,
    filter: FilterConfig,
    window=None,
):
    """The only row of `decisions` as one HTML file that needs nothing else.

    It is skip_page.html with page_data() put in, as JSON.
    """
    data = page_data(title, pieces, n_prompt, decisions, filter, window)
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # in ASCII
    # Nothing in a text can then end the script element, or begin a comment.
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    page = Path(__file__).with_name("skip_page.html").read_text(encoding="utf-8")
    Path(path).write_text(page.replace(">DATA<", f">{text}<"), encoding="utf-8")


# --------------------------------------------------------------------------------- as a file


def write_skip_map(
    path,
    title,
    pieces: list[str],
    n_prompt: int,
    decisions: Decisions,
    filter: FilterConfig,
    window=None,
):
    """The only row of `decisions` as a page if `path` ends in .html, else as a picture.

    A line on stderr says where it is. The file appears whole or not at all: Ctrl-C meanwhile says
    that none was written, and goes on as KeyboardInterrupt.
    """
    is_page = str(path).lower().endswith(".html")
    kind = "page" if is_page else "picture"
    partial = Path(f"{path}.partial")
    try:
        if is_page:
            write_skip_page(partial, title, pieces, n_prompt, decisions, filter, window)
        else:
            redundant = decisions.redundant[0]
            score = decisions.score[0]
            draw_skip_map(partial, title, pieces, n_prompt, redundant, score, filter.warmup)
        partial.replace(path)
    except KeyboardInterrupt:
        print(f"interrupted: no {kind} was written to {path}", file=sys.stderr)
        raise
    finally:
        partial.unlink(missing_ok=True)
    how_to_see = ", open it in a browser" if is_page else ""
    print(f"{path}: the {kind}{how_to_see}", file=sys.stderr)
