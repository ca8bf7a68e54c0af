"""The two pictures at the head of the results, drawn from the tables in results/: python -m docs.figures.sizes

    sizes.png    what filtering costs against the model's size
    reads.png    at 1.5 billion parameters, perplexity against KV read: the presets and their rivals
"""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent.parent / "results"
MODELS = {"perplexity.txt": 0.135, "qwen2.5-coder-0.5b.txt": 0.49, "qwen2.5-coder-1.5b.txt": 1.54}  # billion parameters
COLOURS = {"paper": "tab:blue", "local": "tab:orange", "cache": "tab:green"}


def rows(file):
    """(setting, prune) -> (perplexity, times dense, KV read), of the windows of 768 that a file begins with."""
    text = (RESULTS / file).read_text(encoding="utf-8").split("Windows ")[0]
    found = re.findall(r"^(\S.*?) +(0\.\d{3}) +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+ +([\d.]+)$", text, re.M)
    return {(name, float(prune)): (float(ppl), float(times), float(read)) for name, prune, ppl, times, read in found}


def draw_sizes(path):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    tables = {size: rows(file) for file, size in MODELS.items()}
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, names in zip(figure.subplots(1, 2), (list(COLOURS), ["local", "cache"])):  # all; the two that are close to dense
        for name in names:
            for prune, style in ((0.2, "--"), (0.5, "-")):
                points = [(size, table[name, prune][1]) for size, table in tables.items()]
                axes.plot(*zip(*points), style, color=COLOURS[name], marker="o", label=f"{name}, prune {prune}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log" if "paper" in names else "linear", xlabel="parameters, billion")
        axes.set_xticks(list(tables), [f"{size:g}" for size in tables])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.supylabel("perplexity, times the dense model's")
    figure.savefig(path, dpi=120)


def draw_reads(path):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    table = rows("qwen2.5-coder-1.5b.txt")
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    dense = table["dense", 0.0][0]
    axes.axhline(dense, color="black", linestyle="--", label=f"dense: {dense:.1f}")
    others = iter(("gray", "tab:purple", "tab:pink", "tab:red", "tab:brown"))
    for name in dict.fromkeys(name for name, _ in table if name != "dense"):
        points = sorted((read, ppl) for (each, _), (ppl, _, read) in table.items() if each == name)
        colour, mine = COLOURS.get(name.split(", random")[0]) or next(others), name in COLOURS
        axes.plot(*zip(*points), "o-" if mine else "x", color=colour, label=name)
    axes.set(xlim=(0, 1), ylim=(0.95 * dense, 100), yscale="log")
    axes.set(xlabel="KV read: keys and values read, over those read without a filter", ylabel="perplexity (logarithmic, up to 100)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw_sizes(HERE / "sizes.png")
    draw_reads(HERE / "reads.png")
