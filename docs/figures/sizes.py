"""The two pictures at the head of the results, drawn from the tables in results/.

python -m docs.figures.sizes --draw FOLDER     write both there:

sizes.png    what filtering costs against the model's size
reads.png    perplexity against KV read, `cache` and its rivals, at the smallest and largest size
"""

import re
from pathlib import Path

from cli.arguments import Parser
from cli.process import run_command
from cli.report import check_output

RESULTS = Path(__file__).resolve().parent.parent.parent / "results"

# The commands whose tables are drawn score these windows.
WINDOWS = "--window 768 --offsets 0 4096 8192"

# File of a model's tables -> billion parameters
MODELS = {
    "smollm2-135m.txt": 0.135,
    "qwen2.5-coder-0.5b.txt": 0.49,
    "qwen2.5-coder-1.5b.txt": 1.54,
}
COLOURS = {"paper": "tab:blue", "local": "tab:orange", "cache": "tab:green"}

# Each curve of reads.png: its label -> the settings on it, and its colour.
CURVES = {
    "cache": (["cache"], "tab:green"),
    "KeyDiff, online": (["KeyDiff, online"], "tab:purple"),
    "StreamingLLM": (["StreamingLLM, as much held", "StreamingLLM, as much read"], "tab:red"),
    "random tokens": (["cache, random tokens"], "gray"),
    "oracle, which knows what will be attended to": (["oracle"], "black"),
    "local": (["local"], "tab:orange"),
}

# setting, prune, perplexity, times dense, two columns that are not drawn, KV read
ROW = re.compile(
    r"^(\S.*?) +(0\.\d{3}) +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+ +([\d.]+)", re.MULTILINE
)


def rows(file) -> dict[tuple[str, float], tuple[float, float, float]]:
    """(setting, prune) -> (perplexity, times dense, KV read), from a file's tables of WINDOWS."""
    text = (RESULTS / file).read_text(encoding="utf-8")
    found = {}
    for block in text.split("\n$ python ")[1:]:
        command, _, table = block.partition("\n")
        if WINDOWS + " " not in command + " ":
            continue
        for setting, prune, perplexity, times, read in ROW.findall(table):
            found[setting, float(prune)] = (float(perplexity), float(times), float(read))
    return found


def label_plainly(axis, locator=None):
    """Numbers as one writes them, 0.5 and 2, at the marks of the locator alone."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if locator is not None:
        axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


# ------------------------------------------------------------------------------------ sizes.png


def draw_sizes(path):
    """Times the dense model's perplexity, against the model's size.

    On the left all presets, on the right the two that are close to dense.
    """
    from matplotlib.figure import Figure

    tables = {size: rows(file) for file, size in MODELS.items()}
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_costs(left, tables, ["paper", "local", "cache"])
    left.set_yscale("log")
    draw_costs(right, tables, ["local", "cache"])
    for panel in (left, right):
        panel.set(xscale="log", xlabel="parameters, billion")
        label_plainly(panel.xaxis)
        label_plainly(panel.yaxis)
        panel.set_xticks(list(tables))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.supylabel("perplexity, times the dense model's")
    figure.savefig(path, dpi=120)


def draw_costs(panel, tables, names):
    """A curve for each of these presets at 0.2 and at 0.5; tables: size -> rows()."""
    for name in names:
        for prune, style in ((0.2, "--"), (0.5, "-")):
            sizes = list(tables)
            times = [table[name, prune][1] for table in tables.values()]
            label = f"{name}, prune {prune}"
            panel.plot(sizes, times, style, color=COLOURS[name], marker="o", label=label)
    panel.axhline(1, color="black", linewidth=0.8)


# ------------------------------------------------------------------------------------ reads.png


def curve(table, settings) -> tuple[list[float], list[float]]:
    """KV read and perplexity of these settings at every ratio, from the least read to the most.

    A setting that was run with several seeds is averaged over them.
    """
    by_setting: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for (name, prune), (perplexity, _, read) in table.items():
        setting = name.split(", seed")[0]
        if setting in settings:
            by_setting.setdefault((setting, prune), []).append((read, perplexity))
    points = []
    for seeds in by_setting.values():
        read = sum(read for read, _ in seeds) / len(seeds)
        perplexity = sum(perplexity for _, perplexity in seeds) / len(seeds)
        points.append((read, perplexity))
    points.sort()
    return [read for read, _ in points], [perplexity for _, perplexity in points]


def draw_reads(path):
    """Perplexity against KV read, at the smallest and the largest size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, rows("smollm2-135m.txt"), "135 million parameters")
    draw_curves(right, rows("qwen2.5-coder-1.5b.txt"), "1.5 billion")
    figure.supxlabel("KV read: keys and values read, over those read without a filter")
    figure.supylabel("perplexity (logarithmic)")
    figure.savefig(path, dpi=120)


def draw_curves(panel, table, title):
    """All CURVES of one model."""
    from matplotlib.ticker import LogLocator

    dense, _, _ = table["dense", 0.0]
    label = f"dense: {dense:.1f}"
    panel.axhline(dense, color="black", linestyle="--", linewidth=0.8, label=label)
    for label, (settings, colour) in CURVES.items():
        reads, perplexities = curve(table, settings)
        panel.plot(reads, perplexities, "o-", color=colour, label=label, markersize=4)
    panel.set(xlim=(0, 1), ylim=(0.97 * dense, 2.2 * dense), yscale="log", title=title)
    label_plainly(panel.yaxis, LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def main(argv=None):
    parser = Parser(description="Draw the two pictures at the head of the results.")
    parser.add_argument(
        "--draw", metavar="FOLDER", required=True, help="write sizes.png and reads.png there"
    )
    folder = Path(parser.parse_args(argv).draw)
    for name, draw in (("sizes.png", draw_sizes), ("reads.png", draw_reads)):
        check_output("--draw", str(folder / name), (".png",))
        draw(folder / name)


if __name__ == "__main__":
    run_command(main)
