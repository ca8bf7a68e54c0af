"""What the commands share: flags for the model and the filter, files that are read and written, errors in one line."""

import argparse
import importlib.util
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # for Ctrl-C while a command still imports torch
    sys.excepthook = lambda kind, *error: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error)

import torch

from checkpoint_files import one_line
from token_filter import CHOICES, PRESETS, FilterConfig, preset

DEMO = Path(__file__).resolve().parent / "checkpoints" / "smollm2-135m"


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message):
        fail(message)


def fail(message) -> NoReturn:
    """One line on stderr, exit code 2."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


class Forgiving:
    """A stream whose faults stop nobody: for stderr, which may be full."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def as_process(main):
    """Call main(). Ctrl-C, a reader that has enough (head, say), a full disk or a closed stream end the process without a traceback,
    and a letter that the terminal's encoding lacks becomes "?"."""
    sys.stderr = Forgiving(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
    if sys.stdout is None:
        fail("stdout is closed, so there is nowhere to print to")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        if not isinstance(error, BrokenPipeError):
            fail(f"cannot write or read{f' {error.filename}' if error.filename else ''}: {error.strerror}")


def print_json(value):
    """One JSON object on stdout, in ASCII where its encoding may lack a letter."""
    print(json.dumps(value, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"), indent=1, allow_nan=False))


def overflow(model, tokens: list[int], config: FilterConfig | None) -> str:
    """Where the logits of a text stop being finite, in a line."""
    cache, dtype, where = model.new_cache(1, config), str(model.embed.weight.dtype)[6:], "the output"
    with torch.inference_mode():
        x = model.embed(torch.tensor(tokens, device=cache.position.device))
        chunk = cache.advance(torch.tensor([len(tokens)]), len(tokens), x.dtype)
        for number, (block, layer) in enumerate(zip(model.blocks, cache.layers)):
            x = block(x, chunk, layer)
            if not x.isfinite().all():
                where = f"layer {number}"
                break
    others = [name for name in ("bfloat16", "float32", "float64") if name != dtype]
    return f"{dtype} is not enough for this model: from {where} on, values are not finite; use --dtype {' or '.join(others)}"


def add_model_arguments(parser):
    parser.add_argument("checkpoint", nargs="?", default=DEMO, help="checkpoint folder (default: the demo's, %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto, cuda if there is one)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16", "float64"),
                        help="of weights and cache (default: auto, the checkpoint's own on cuda, float32 on cpu)")  # fmt: skip


KNOBS = {  # the fields of FilterConfig that have a flag of their name, and what --help says of them
    "mode": "what a redundant token loses in a layer: its attention (skip), attention to all but the first and the latest tokens "
            "(local), or nothing (cache); in none of them is it cached for long",
    "recent": "a token and so many before it can be seen by any token that attends, redundant or not",
    "schedule": "how the ratio is spread over the layers: growing from the first to the last (tail), falling (head), the same in "
                "all (uniform), or the last ones alone (last)",
    "gamma": "decay of the running averages, 0 <= X < 1",
    "warmup": "how many tokens at the start of a text are always kept",
    "history": "how many past scores a new one is ranked among",
    "fusion": "how key and value similarity become one score: the side whose heads agree counts more (variance), both alike "
              "(equal), or one alone (key, value)",
    "keys": "whether keys are compared after RoPE (rotated) or before it (unrotated)",
}  # fmt: skip


def add_filter_arguments(parser, several=False, default="paper"):
    """--preset (one name, or several) and the KNOBS."""
    about = "What is not given is as the preset has it; in [brackets] is what preset paper has."
    group = parser.add_argument_group("token filtering", about)
    group.add_argument("--preset", choices=PRESETS, nargs="+" if several else None,
                       help=f"the paper's setting, or ones of ours that README compares (default: {default})")  # fmt: skip
    for name, text in KNOBS.items():
        value = getattr(FilterConfig, name)
        metavar = {int: "N", float: "X"}.get(type(value))
        group.add_argument(f"--{name}", type=type(value), choices=CHOICES.get(name), metavar=metavar, help=f"{text} [{value}]")


def filter_from(args, name, prune) -> FilterConfig | None:
    """The named preset with the KNOBS that were given, or None for prune 0. Exits with one line if that makes no sense."""
    overrides = {knob: getattr(args, knob) for knob in KNOBS if getattr(args, knob) is not None}
    try:
        config = preset(name, prune=prune, **overrides)
    except ValueError as e:
        fail(e)
    return config if prune > 0 else None


def compile_decode(model) -> bool:
    """Have the model decode through torch.compile: True, or False after one line on stderr where that cannot work."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=model.embed.weight.device))
    except Exception as e:  # noqa: BLE001 (compilers fail in many ways)
        reason = " ".join(str(e).split("\n\n")[0].split()) or type(e).__name__  # without torch's advice on debugging
        print(f"note: torch.compile does not work here, so nothing is compiled: {reason}", file=sys.stderr)
        return False
    model.compile_decode()
    return True


def read_text(path) -> str:
    """A file's text, without the byte order mark that some editors put first. Exits with one line if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{path}: cannot be read as UTF-8 text: {e}")


def check_output(flag, path, endings=()):
    """Find out before the work what would keep a file from being written; a picture's name has one of the endings."""
    if endings and importlib.util.find_spec("matplotlib") is None:
        fail(f"{flag} needs matplotlib: pip install -r requirements-dev.txt")
    if endings and not path.lower().endswith(endings):
        fail(f"{flag} {path}: the name must end in {', '.join(endings)}")
    try:
        existed = os.path.exists(path)
        open(path, "ab").close()
        if not existed:
            os.remove(path)
    except OSError as e:
        fail(f"{flag} {path}: cannot be written: {e.strerror}")
