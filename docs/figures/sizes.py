"""The two pictures at the head of the results, drawn from the tables in results/.

    python -m docs.figures.sizes --draw FOLDER     write both there:

    sizes.png    what filtering costs against the model's size
    reads.png    perplexity against KV read, `cache` and its rivals, at the smallest and the largest size
"""

import re
from pathlib import Path

from cli.arguments import Parser
from cli.process import run_command

from cli.report import check_output

RESULTS = Path(__file__).resolve().parent.parent.parent / "results"
MODELS = {"smollm2-135m.txt": 0.135, "qwen2.5-coder-0.5b.txt": 0.49, "qwen2.5-coder-1.5b.txt": 1.54}  # billion parameters
COLOURS = {"paper": "tab:blue", "local": "tab:orange", "cache": "tab:green"}


def rows(file, windows="--window 768 --offsets 0 4096 8192"):
    """(setting, prune) -> (perplexity, times dense, KV read): what eval_ppl.py printed for these windows."""
    found = {}
    for block in (RESULTS / file).read_text(encoding="utf-8").split("\n$ python ")[1:]:
        command, _, table = block.partition("\n")
        if f"{windows} " in f"{command} ":
            lines = re.findall(r"^(\S.*?) +(0\.\d{3}) +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+ +([\d.]+)", table, re.M)
            found |= {(name, float(prune)): (float(ppl), float(times), float(read)) for name, prune, ppl, times, read in lines}
    return found


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


RIVALS = {  # a curve: the settings on it, its colour
    "cache": (["cache"], "tab:green"),
    "KeyDiff, online": (["KeyDiff, online"], "tab:purple"),
    "StreamingLLM": (["StreamingLLM, as much held", "StreamingLLM, as much read"], "tab:red"),
    "random tokens": (["cache, random tokens"], "gray"),
    "oracle, which knows what will be attended to": (["oracle"], "black"),
    "local": (["local"], "tab:orange"),
}


def draw_reads(path):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, (file, title) in zip(figure.subplots(1, 2), ((next(iter(MODELS)), "135 million parameters"), ([*MODELS][-1], "1.5 billion"))):
        table = rows(file)
        dense = table["dense", 0.0][0]
        axes.axhline(dense, color="black", linestyle="--", linewidth=0.8, label=f"dense: {dense:.1f}")
        for label, (names, colour) in RIVALS.items():
            drawn: dict[tuple, list] = {}  # points by setting and ratio, of one or several seeds
            for (name, prune), (ppl, _, read) in table.items():
                if name.split(", seed")[0] in names:
                    drawn.setdefault((name.split(", seed")[0], prune), []).append((read, ppl))
            points = sorted(tuple(sum(x) / len(x) for x in zip(*seeds)) for seeds in drawn.values())
            axes.plot(*zip(*points), "o-", color=colour, label=label, markersize=4)
        axes.set(xlim=(0, 1), ylim=(0.97 * dense, 2.2 * dense), yscale="log", title=title)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.supxlabel("KV read: keys and values read, over those read without a filter")
    figure.supylabel("perplexity (logarithmic)")
    figure.savefig(path, dpi=120)


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
