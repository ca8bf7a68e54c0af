"""What commands read and write: texts, JSON, and tables that grow row by row."""

import csv
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cli.process import N_RANKS, fail

# What the columns of tables mean: printed above each table.
COLUMNS = """\
skipped  redundant (token, layer) pairs over all pairs
KV held  keys and values in the cache at a text's end, over those of all its tokens in all layers
KV read  keys and values that all queries of a text read, over those that they would read dense"""


def read_text(path) -> str:
    """The text of a file, or of stdin ("-"), without the byte order mark that some editors put
    first.

    Fails in one line where there is none, or it is not UTF-8.
    """
    from_stdin = path == "-"
    if from_stdin and N_RANKS > 1:
        fail("stdin (-) is for one process: give a file, or leave out torchrun")
    if from_stdin and sys.stdin is None:
        fail("stdin is closed, so there is nothing to read")
    source = 0 if from_stdin else path
    try:
        with open(source, encoding="utf-8-sig", closefd=not from_stdin) as file:
            text = file.read()
    except UnicodeDecodeError as error:
        fail(f"{path}: cannot be read as UTF-8 text ({error.reason} at byte {error.start})")
    except OSError as error:
        fail(f"{path}: cannot be read: {error.strerror}")
    refuse_zeros(path, text)
    return text


def refuse_zeros(path, text):
    """Fail where a text has zero bytes.

    UTF-16 of ASCII letters has them, and it is valid UTF-8 as well.
    """
    if "\0" in text:
        fail(f"{path}: cannot be read as UTF-8 text (it has zero bytes: is it UTF-16?)")


def check_output(flag, path, endings=()):
    """Fail before the work if a file cannot be written after it.

    endings: those that the name may have, in lower case: ".html", or a picture's, which needs
    matplotlib.
    """
    name = path.lower()
    if endings and not name.endswith(endings):
        fail(f"{flag} {path}: the name must end in {', '.join(endings)}")
    is_picture = bool(endings) and not name.endswith(".html")
    if is_picture and importlib.util.find_spec("matplotlib") is None:
        fail(f"{flag} needs matplotlib: pip install -r requirements-dev.txt")
    existed = os.path.exists(path)
    try:
        open(path, "ab").close()
        if not existed:
            os.remove(path)
    except OSError as error:
        fail(f"{flag} {path}: cannot be written: {error.strerror}")


def print_json(value):
    """One JSON object on stdout, in ASCII where stdout's encoding may lack a letter."""
    encoding = (sys.stdout.encoding or "").lower()
    is_utf = encoding.startswith("utf")
    print(json.dumps(value, ensure_ascii=not is_utf, indent=1, allow_nan=False))


def finite(value):
    """The same value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Report:
    """A table that grows row by row. Each row is printed, and the files asked for are rewritten, at
    once.
    """

    def __init__(self, args, protocol: str, draw: Callable, width: int):
        """args: with json, csv and plot, as add_report_arguments makes them.

        protocol: how the figures were made, printed first. draw(rows) -> a matplotlib figure.
        width: of the first column, in letters.
        """
        self.args = args
        self.protocol = protocol
        self.draw = draw
        self.width = width
        self.rows: list[dict] = []
        print(protocol)

    def add(self, row: dict):
        """A row: column names to strings or numbers, the same names every time."""
        if not self.rows:
            print()
            self._print_cells(row, list(row))
        self._print_cells(row, [self._cell(value) for value in row.values()])
        self.rows.append(row)
        if self.args.json:
            table = {"command": sys.argv, "protocol": self.protocol, "rows": finite(self.rows)}
            text = json.dumps(table, indent=1, allow_nan=False)
            Path(self.args.json).write_text(text, encoding="utf-8")
        if self.args.csv:
            with open(self.args.csv, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
                writer.writerows(self.rows)
        if self.args.plot:
            figure = self.draw(self.rows)
            figure.suptitle(self.protocol.splitlines()[0], fontsize=8, wrap=True)
            figure.savefig(self.args.plot, dpi=120)

    @staticmethod
    def _cell(value) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    def _print_cells(self, row: dict, cells: list[str]):
        """One line: the first cell to the left, the others to the right under their names."""
        first, *others = cells
        line = f"{first:<{self.width}}"
        for name, cell in zip(list(row)[1:], others):
            line += f"{cell:>{max(len(name), 9) + 2}}"
        print(line, flush=True)


def add_report_arguments(parser):
    """--json, --csv and --plot."""
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON, after each row")
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV, after each row")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the table (needs matplotlib)")


def check_report_arguments(args):
    """Fail before the work if one of the files could not be written."""
    if args.json:
        check_output("--json", args.json)
    if args.csv:
        check_output("--csv", args.csv)
    if args.plot:
        check_output("--plot", args.plot, (".png", ".svg", ".pdf"))
