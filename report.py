"""What the commands read and write: texts, figures, JSON, and the tables of the evaluations, grown row by row."""

import copy
import csv
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from command_line import RANKS, fail


def read_text(path) -> str:
    """A file's text, or stdin's (-), without the byte order mark that some editors put first. Exits with one line if there is none."""
    if (stdin := path == "-") and RANKS > 1:
        fail("stdin (-) is for one process: give a file, or leave out torchrun")
    if stdin and sys.stdin is None:
        fail("stdin is closed, so there is nothing to read")
    try:
        with open(0 if stdin else path, encoding="utf-8-sig", closefd=not stdin) as file:
            text = file.read()
    except UnicodeDecodeError as e:
        fail(f"{path}: cannot be read as UTF-8 text ({e.reason} at byte {e.start})")
    except OSError as e:
        fail(f"{path}: cannot be read: {e.strerror}")
    refuse_zeros(path, text)
    return text


def refuse_zeros(path, text):
    """Exits with one line where a text has zero bytes: UTF-16 of ASCII letters has, and is UTF-8 as well."""
    if "\0" in text:
        fail(f"{path}: cannot be read as UTF-8 text (it has zero bytes: is it UTF-16?)")


def read_prompts(args) -> list[str]:
    """generate.py's texts, of --prompt and --prompts-file, each as often as --num-samples says; none for a conversation."""
    if [*(args.prompt or []), args.prompts_file].count("-") > 1:
        fail("stdin (-) can be read only once")
    texts = [read_text("-").removesuffix("\n") if text == "-" else text for text in args.prompt or []]
    if args.prompts_file:
        texts += [line for line in read_text(args.prompts_file).split("\n") if line.strip()]
    for flag, given in (("--prompt", texts), ("--system", [args.system or ""]), ("--stop", args.stop)):
        if any("\ud800" <= letter <= "\udfff" for text in given for letter in text):  # what Python makes of other bytes
            fail(f"{flag} is not UTF-8 text: is the terminal set to another encoding?")
    if "" in args.stop:
        fail("--stop is empty: it would end every answer at once")
    if args.chat and not texts and not args.prompts_file:
        others = {"--compare": args.compare, "--json": args.json, "--show-skips": args.show_skips, "--skip-map": args.skip_map}
        for flag, value in (others | {"--num-samples": args.num_samples > 1}).items():
            if value:
                fail(f"{flag} needs a --prompt: a conversation is text, with one setting at a time")
        return []
    if not texts or "" in texts:
        fail(f"prompt {texts.index('') + 1} is empty" if texts else "no prompt: give --prompt TEXT or --prompts-file FILE, or talk: --chat")
    if args.num_samples > 1 and len(texts) > 1:
        fail(f"--num-samples is for one prompt, and here are {len(texts)}")
    return texts * args.num_samples


@dataclass
class Stats:
    """What one call of generate() did, summed over its rows. Times exclude the caller's own work between tokens."""

    prompt_tokens: int = 0
    new_tokens: int = 0  # sampled, an end-of-text token included
    prefill_seconds: float = 0.0  # up to and including each row's first new token
    decode_seconds: float = 0.0  # all further ones
    slot_bytes: int = 0
    rows: list[dict[str, int]] = field(default_factory=list)  # of each row that has ended what it used, by name: see end()

    def end(self, row, usage):
        """Keep what KVCache.usage() says of a row: pairs of a token and a layer, those skipped, slots held at the end, slots that its
        queries have read, and those that they would have read without a filter.
        """
        self.rows[row] = dict(zip(("pairs", "skipped", "held", "read", "dense_read"), usage))

    def total(self, name) -> int:
        return sum(row.get(name, 0) for row in self.rows)

    @property
    def skip_ratio(self) -> float:
        return self.total("skipped") / max(self.total("pairs"), 1)

    @property
    def kv_held(self) -> float:
        """Share of the keys and values in the cache; without a filter, 1."""
        return self.total("held") / max(self.total("pairs"), 1)

    @property
    def kv_read(self) -> float:
        """Slots that were read over those that would have been without a filter."""
        return self.total("read") / max(self.total("dense_read"), 1)

    def line(self) -> str:
        """The figures in one line."""
        prefill = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        decoded = self.new_tokens - len(self.rows)
        decode = f"{decoded / self.decode_seconds:.1f} tokens/s" if self.decode_seconds else "none"
        return (
            f"prefill {self.prompt_tokens} tokens at {prefill:.1f} tokens/s; decode {decode}; "
            f"skipped {self.skip_ratio:.1%} of (token, layer) pairs; "
            f"KV held {self.kv_held:.0%} ({self.total('held') * self.slot_bytes / 1e6:.2f} MB), read {self.kv_read:.0%} of dense"
        )


class Answer:
    """A row's text, token by token, up to one of eos_ids or the first of the stop texts: the one that ends first.

    Stop texts are looked for where special tokens are written out, the one that ends the answer too.
    What is given out is without these, as decode() of the tokens is.
    `start`: it is decoded as a text that starts here, not as one that goes on.
    """

    def __init__(self, tokenizer, stop=(), eos_ids=frozenset(), start=False):
        self.tokenizer = tokenizer
        self.stream = tokenizer.stream(start)
        self.stop = [text for text in stop if text]
        self.eos_ids = eos_ids
        self.ended = False
        self.text = ""  # what was not given out yet, special tokens written out,
        self.shown = list[bool]()  # and which of its letters belong to the answer
        vocab = tokenizer._backend.vocab
        names = {vocab[name]: name for name in tokenizer._backend.special}
        self.special = {token: name for token, name in names.items() if token not in tokenizer._shown}

    def push(self, token: int | None) -> str:
        """The text that has become certain with this token, none with one of eos_ids.

        With None, which comes last, all that is left.
        """
        if not self.ended:
            for piece, shown in self._pieces(token):
                self.text += piece
                self.shown += [shown] * len(piece)
        found = [stop for stop in self.stop if stop in self.text]
        if found:
            first = min(found, key=lambda stop: (self.text.index(stop) + len(stop), -len(stop)))
            self.text = self.text[: self.text.index(first)]
            self.ended = True
        if token in self.eos_ids:
            self.ended = True
            return ""
        certain = len(self.text)
        if token is not None and not self.ended:  # what may be the start of a stop text is held back
            begun = [
                length
                for stop in self.stop
                for length in range(1, len(stop))
                if self.text.endswith(stop[:length])
            ]
            certain -= max(begun, default=0)
        given = "".join(letter for letter, shown in zip(self.text[:certain], self.shown) if shown)
        self.text = self.text[certain:]
        self.shown = self.shown[certain:]
        return given

    def _pieces(self, token: int | None) -> list[tuple[str, bool]]:
        """The text that a token adds, and whether each part of it belongs to the answer."""
        if token is None:
            return [(self.stream.flush(), True)]
        if token in self.eos_ids:
            name = self.special.get(token) or self.tokenizer.decode([token])
            return [(self.stream.flush(), True), (name, False)]
        if token not in self.special:
            return [(self.stream.push(token), True)]
        held = copy.copy(self.stream).flush()
        if held.endswith("\N{REPLACEMENT CHARACTER}"):
            # An unfinished letter, with which decode() goes on after the special token.
            return [(self.special[token], False)]
        return [(self.stream.flush(), True), (self.special[token], False)]


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
