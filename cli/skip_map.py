"""Which layers found which tokens redundant: a text in colours for a terminal, a picture of layers by tokens, or a page to take apart.

Shapes: L layers, T tokens of one sequence, prompt and answer.
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

SHADES = (230, 222, 214, 208, 202)  # backgrounds for up to 20%, 40%, ... of the layers, of a terminal's 256 colours
BOLD, UNDERLINE, RESET = "\033[1m", "\033[4m", "\033[0m"
STRIP, MOST_STRIPS = 72, 6  # a skip map is wrapped after so many tokens, and ends after so many strips


class Decisions:
    """What every layer decided about every token that was fed; `watch` is for generate().

    redundant[row] (L, T) bool and score[row] (L, T) float64, NaN where a layer gave none, of the row's T tokens so far: its
    prompt and its answer, but for a last token that was not fed back. As lists of float64 parts, empty for a layer that does not
    score: cosine[row][l] (T, 2, KVH), of key and of value in each head, and w_k[row][l] (T,), as in token_filter.
    """

    def __init__(self, n_rows, n_layers):
        self.redundant = [torch.zeros(n_layers, 0, dtype=torch.bool)] * n_rows
        self.score = [torch.zeros(n_layers, 0, dtype=torch.float64)] * n_rows
        self.cosine, self.w_k = ([[list[torch.Tensor]() for _ in range(n_layers)] for _ in range(n_rows)] for _ in range(2))

    def watch(self, rows, cache: KVCache):
        decided = cache.decisions()
        redundant = torch.stack([layer.redundant for layer in decided]).cpu()  # (L, B, T)
        score = torch.stack([layer.score.double() for layer in decided]).cpu()
        for i, row in enumerate(rows):
            new = int(cache.lengths[i]) - self.redundant[row].shape[1]  # without padding
            self.redundant[row] = torch.cat((self.redundant[row], redundant[:, i, :new]), 1)
            self.score[row] = torch.cat((self.score[row], score[:, i, :new]), 1)
            for l, layer in enumerate(decided):
                if layer.cosine is not None and layer.w_k is not None:
                    self.cosine[row][l].append(layer.cosine[i, :new].double().cpu())
                    self.w_k[row][l].append(layer.w_k[i, :new].double().cpu())


def token_pieces(tokenizer: Tokenizer, tokens) -> list[str]:
    """The text each token brings, a special token its name; "" for one that ends within a character."""
    backend, stream = tokenizer._backend, tokenizer.stream(start=True)
    special = {backend.vocab[name]: name for name in backend.special}
    pieces = [special.get(token) or stream.push(token) for token in tokens]
    return pieces[:-1] + [pieces[-1] + stream.flush()]


def shade(level) -> str:
    return f"\033[48;5;{SHADES[level]};38;5;16m"  # black on the shade


def paint(pieces: list[str], n_prompt: int, redundant) -> str:
    """A row's text for a terminal: backgrounds show what share of the layers found each token redundant, the answer is bold.

    pieces: the text of each token, n_prompt of them the prompt's; redundant (L, T), as in Decisions.
    """
    layers, text = redundant.sum(0).tolist(), ""  # (T,)
    for i, piece in enumerate(pieces):
        style = BOLD if i >= n_prompt else ""
        if i >= len(layers):
            style += UNDERLINE
        elif layers[i] > 0:
            style += shade(math.ceil(layers[i] * len(SHADES) / len(redundant)) - 1)
        # a line ends without colour: some terminals would draw it to the margin
        text += style + piece.replace("\n", f"↵{RESET}\n{style}") + RESET
    return text


def paint_legend() -> str:
    shades = "".join(f"{shade(i)} up to {(i + 1) / len(SHADES):.0%} {RESET}" for i in range(len(SHADES)))
    return f"redundant in {shades} of the layers; {BOLD}answer{RESET}; {UNDERLINE}last token{RESET}, which no layer has seen"


def strips(T, n_prompt) -> tuple[int, list[int], str]:
    """How T tokens are wrapped: the most of a strip, the first of each, and what is to be said of tokens left out."""
    n_strips = min(math.ceil(T / STRIP), MOST_STRIPS)
    width = min(math.ceil(T / n_strips), STRIP)
    if T <= STRIP * MOST_STRIPS:
        return width, [width * i for i in range(n_strips)], ""
    second = max(STRIP, min(n_prompt - STRIP, T - STRIP * (MOST_STRIPS - 1)))
    starts = [0, *(second + STRIP * i for i in range(MOST_STRIPS - 1))]
    gap = f"{STRIP - 1} and {second} to " if second > STRIP else ""
    return width, starts, f" (tokens 0 to {gap}{starts[-1] + STRIP - 1} of {T} are drawn)"


def tick_label(piece, fonts) -> str:
    """␣ is a space, ↵ a line's end, · a token that ends within a character, U+72D0 a letter that the fonts lack."""
    text = ""
    for letter in piece.replace("\n", "↵").strip() or ("␣" if piece else "·"):
        known = all(font.get_char_index(ord(letter)) for font in fonts)
        if len(text := text + (letter if known else f"U+{ord(letter):04X}")) >= 12:
            break
    return text


def draw_strip(share, layers, at, start, width, redundant, image, labels, n_prompt, warmup):
    """Tokens `at` of a skip map: in panel `share` the layers that found each redundant, in panel `layers` every decision."""
    share.bar(at, redundant[:, at].mean(0), width=1, color="#fd9a3c")
    share.set(ylim=(0, 1), xticks=[], yticks=[0, 1], ylabel="share of\nlayers")
    corners = (at[0] - 0.5, at[-1] + 0.5, -0.5, len(redundant) - 0.5)
    layers.imshow(image[:, at], extent=corners, origin="lower", aspect="auto", interpolation="nearest")
    layers.set_ylabel("layer")
    layers.yaxis.get_major_locator().set_params(integer=True)
    share.set_title(f"tokens {at[0]} to {at[-1]}", loc="right", fontsize=9)
    layers.set_xticks(at, [labels[i] for i in at], rotation=90, fontsize=9, fontfamily="DejaVu Sans")
    for i, tick in zip(at, layers.get_xticklabels()):
        tick.set(parse_math=False, fontweight="bold" if i >= n_prompt else "normal")  # "$" is a token like others
    for panel in (share, layers):
        panel.set_xlim(start - 0.5, start + width - 0.5)
        for edge, name in ((max(warmup, 1), "warm-up ends"), (n_prompt, "answer")):
            if edge in at:
                panel.axvline(edge - 0.5, color="black", linewidth=1.2)
                if panel is share:
                    panel.text(edge - 0.5, 1.05, name, fontsize=9)


def draw_skip_map(path, title, pieces: list[str], n_prompt: int, redundant, score, warmup: int):
    """A row as a PNG picture, layers by tokens: orange where redundant, blue where kept, the darker the higher the score.

    pieces: the text of each token, n_prompt of them the prompt's; redundant, score (L, T): as in Decisions. Wrapped after
    STRIP tokens; what MOST_STRIPS strips cannot hold is left out between the first strip and the answer, then at the end, and the
    title says so.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findfont, get_font
    from matplotlib.patches import Patch

    redundant, score = redundant.numpy(), np.ma.masked_invalid(score.double().numpy())  # masked: no score
    L, T = redundant.shape
    width, starts, left_out = strips(T, n_prompt)
    known = score.compressed()
    scale = Normalize(*(np.quantile(known, (0.03, 1)) if known.size else (0, 1)))  # the lowest would take most of it
    blue = LinearSegmentedColormap.from_list("kept", ["#f4f9fe", "#6aaed6", "#08306b"]).with_extremes(bad="#cccccc")
    orange = LinearSegmentedColormap.from_list("redundant", ["#fff3c4", "#fd9a3c", "#a02c00"]).with_extremes(bad="#3d1000")
    image = np.where(redundant[..., None], orange(scale(score)), blue(scale(score)))  # (L, T, RGBA)
    fonts = [get_font(findfont(f"DejaVu Sans:weight={weight}")) for weight in ("normal", "bold")]
    labels = [tick_label(piece, fonts) for piece in pieces]

    tall = 0.1 * max(L, 8)  # inches of a strip
    figure = Figure(figsize=(13, 0.6 + len(starts) * (1.8 + tall)), layout="constrained")
    panels = figure.subplots(2 * len(starts), 1, squeeze=False, height_ratios=[0.5, tall] * len(starts))[:, 0]
    for start, share, layers in zip(starts, panels[::2], panels[1::2]):
        draw_strip(share, layers, range(start, min(start + width, T)), start, width, redundant, image, labels, n_prompt, warmup)
    for name, colours in (("redundant", orange), ("kept", blue)):
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=panels, extend="min", aspect=40, pad=0.01)
        bar.set_label(f"score of {name} tokens")
    missing = ((~redundant, blue, "kept, no score"), (redundant, orange, "redundant, no score"))
    patches = [Patch(color=tuple(colours.get_bad()), label=name) for here, colours, name in missing if (here & score.mask).any()]
    if patches:
        figure.legend(handles=patches, loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"{title}: {redundant.mean():.1%} of (token, layer) pairs redundant{left_out}")
    figure.savefig(path, format="png", dpi=110)


def write_skip_map(path, title, pieces: list[str], n_prompt: int, decisions: Decisions, filter: FilterConfig, window=None):
    """The only row of `decisions` as a page if `path` ends in .html, else as a picture; a line on stderr says where it is. The file
    appears whole or not at all: Ctrl-C meanwhile says that none was written, and goes on as KeyboardInterrupt.
    """
    is_page, partial = str(path).lower().endswith(".html"), Path(f"{path}.partial")
    try:
        if is_page:
            write_skip_page(partial, title, pieces, n_prompt, decisions, filter, window)
        else:
            draw_skip_map(partial, title, pieces, n_prompt, decisions.redundant[0], decisions.score[0], filter.warmup)
        partial.replace(path)
    except KeyboardInterrupt:
        print(f"interrupted: no {'page' if is_page else 'picture'} was written to {path}", file=sys.stderr)
        raise
    finally:
        partial.unlink(missing_ok=True)
    print(f"{path}: {'the page, open it in a browser' if is_page else 'the picture'}", file=sys.stderr)


def write_skip_page(path, title, pieces: list[str], n_prompt: int, decisions: Decisions, filter: FilterConfig, window=None):
    """The only row of `decisions` as one HTML file, which needs nothing else: skip_page.html with the data put in, as JSON:

        title, about         of the run, in words
        pieces, prompt       the text of each token, and how many are the prompt's; a last one may not have been fed
        mode, recent, warmup, history    as in FilterConfig
        ratios               r_l of each layer
        redundant            of each layer a string of 0 and 1, a digit for each token fed
        score, weight        of each layer a list over tokens, s_t and w_k; null for a layer that scores none
        cosine_k, cosine_v   the same, c_k and c_v: of each token a list over heads
    """
    redundant, w_k, cosine = decisions.redundant[0], decisions.w_k[0], decisions.cosine[0]

    def listed(layers, column=...):
        return [np.round(torch.cat(parts).numpy(), 4)[:, column].tolist() if parts else None for parts in layers]

    (L, T), share = redundant.shape, redundant.double().mean()
    about = f"{share:.1%} of {L * T} (token, layer) pairs are redundant; tokens: {T}, layers: {L}"
    data = {
        "title": title,
        "about": about + (f"; a sliding window of {window} tokens may hide more than is said here" if window else ""),
        "pieces": pieces,
        "prompt": n_prompt,
        **{name: getattr(filter, name) for name in ("mode", "recent", "warmup", "history")},
        "ratios": layer_ratios(filter, L),
        "redundant": ["".join("01"[flag] for flag in row) for row in redundant.tolist()],
        "score": [row.tolist() if parts else None for row, parts in zip(decisions.score[0], w_k)],
        "weight": listed(w_k),
        "cosine_k": listed(cosine, 0),
        "cosine_v": listed(cosine, 1),
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII
    for letter in "<>&":  # so that nothing in it can end the script, or begin a comment
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    page = Path(__file__).with_name("skip_page.html").read_text(encoding="utf-8")
    Path(path).write_text(page.replace(">DATA<", f">{text}<"), encoding="utf-8")
