"""What the commands read and write: texts, JSON, and the tables of the evaluations, grown row by row."""

import csv
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from command_line import fail


def read_text(path) -> str:
    """A file's text, without the byte order mark that some editors put first. Exits with one line if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        fail(f"{path}: cannot be read as UTF-8 text ({e.reason} at byte {e.start})")
    except OSError as e:
        fail(f"{path}: cannot be read: {e.strerror}")


def read_prompts(args) -> list[str]:
    """generate.py's texts, of --prompt and --prompts-file."""
    texts = list(args.prompt or [])
    if args.prompts_file:
        texts += [line for line in read_text(args.prompts_file).split("\n") if line.strip()]
    if not texts or "" in texts:
        fail(f"prompt {texts.index('') + 1} is empty" if texts else "no prompt: give --prompt TEXT or --prompts-file FILE")
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):  # what Python makes of other bytes
        fail("--prompt is not UTF-8 text: is the terminal set to another encoding?")
    return texts


def check_output(flag, path, endings=()):
    """Find out before the work what would keep a file from being written; its name has one of the endings: .html, or a picture's."""
    if endings and not path.lower().endswith(endings):
        fail(f"{flag} {path}: the name must end in {', '.join(endings)}")
    if endings and not path.lower().endswith(".html") and importlib.util.find_spec("matplotlib") is None:
        fail(f"{flag} needs matplotlib: pip install -r requirements-dev.txt")
    try:
        existed = os.path.exists(path)
        open(path, "ab").close()
        if not existed:
            os.remove(path)
    except OSError as e:
        fail(f"{flag} {path}: cannot be written: {e.strerror}")


def print_json(value):
    """One JSON object on stdout, in ASCII where its encoding may lack a letter."""
    print(json.dumps(value, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"), indent=1, allow_nan=False))


COLUMNS = """\
skipped  redundant (token, layer) pairs over all pairs
KV held  keys and values in the cache at the end of a text over those of all its tokens in all layers
KV read  keys and values that all queries of a text have read over those that they read without a filter"""


def finite(value):
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Report:
    """A table that grows row by row. Each row is printed, and the files that were asked for are written anew, at once."""

    def __init__(self, args, protocol: str, draw: Callable, width: int):
        self.args, self.protocol, self.draw, self.width = args, protocol, draw, width
        self.rows: list[dict] = []
        print(protocol)

    def add(self, row: dict):
        """A row: column names to strings or numbers, the same names every time."""
        widths = [self.width, *(max(len(name), 9) + 2 for name in list(row)[1:])]
        if not self.rows:
            print("\n" + "".join(f"{name:{'>' if i else '<'}{w}}" for i, (name, w) in enumerate(zip(row, widths))))
        cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
        print("".join(f"{cell:{'>' if i else '<'}{w}}" for i, (cell, w) in enumerate(zip(cells, widths))), flush=True)
        self.rows.append(row)
        if self.args.json:
            table = {"command": sys.argv, "protocol": self.protocol, "rows": finite(self.rows)}
            Path(self.args.json).write_text(json.dumps(table, indent=1, allow_nan=False), encoding="utf-8")
        if self.args.csv:
            with open(self.args.csv, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
                writer.writerows(self.rows)
        if self.args.plot:
            figure = self.draw(self.rows)
            figure.suptitle(self.protocol.splitlines()[0], fontsize=8, wrap=True)
            figure.savefig(self.args.plot, dpi=120)


def add_report_arguments(parser):
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON, after each row")
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV, after each row")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the table (needs matplotlib)")


def check_report_arguments(args):
    """Find out before the work what would keep the files from being written."""
    for flag, path, endings in (("--json", args.json, ()), ("--csv", args.csv, ()), ("--plot", args.plot, (".png", ".svg", ".pdf"))):
        if path:
            check_output(flag, path, endings)
