"""What the commands share: flags and errors, each answered in a line at once, so torch, which takes seconds, is imported late."""

import argparse
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # for Ctrl-C while a command still imports torch
    sys.excepthook = lambda kind, *error: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error)

from checkpoint_files import one_line

# several processes, started by torchrun for one model (parallel.py): how many, and which of them this is; the first speaks for all
RANKS, RANK = (int(os.environ[key]) if "LOCAL_RANK" in os.environ else one for key, one in (("WORLD_SIZE", 1), ("RANK", 0)))
DEMO = Path(__file__).resolve().parent / "checkpoints" / "smollm2-135m"


class Parser(argparse.ArgumentParser):
    """Errors in one line; files are written by the first process alone."""

    def error(self, message):
        fail(message)

    def parse_args(self, *given: Any) -> Any:  # type: ignore[override]
        args = super().parse_args(*given)
        vars(args).update(dict.fromkeys({"json", "csv", "plot"} & vars(args).keys() if RANK else ()))
        return args


def fail(message) -> NoReturn:
    """One line on stderr, exit code 2. Of several processes the first to fail says why."""
    parallel = sys.modules.get("parallel")
    if parallel.first_to_fail() if parallel else RANK == 0:
        print(f"error: {one_line(message)}", file=sys.__stderr__ if RANK else sys.stderr)
    raise SystemExit(2)


def alone(**given):
    """Exits with one line where one of these flags was given, and the processes are several."""
    for flag in [flag for flag, value in given.items() if value and RANKS > 1]:
        fail(f"--{flag.replace('_', '-')} is for one process: leave it out, or torchrun")


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


def as_process(function, *arguments):
    """What the function returns. Ctrl-C, a reader that has enough (head, say), a full disk or a closed stream end the process without a
    traceback, a letter that the terminal's encoding lacks becomes "?", and only a terminal sees progress bars."""
    sys.stderr = Forgiving(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
    if not sys.stderr.isatty():
        os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # read when these are imported
    if RANK:
        sys.stdout, sys.stderr = open(os.devnull, "w"), Forgiving(open(os.devnull, "w"))  # noqa: SIM115
    if sys.stdout is None:
        fail("stdout is closed, so there is nowhere to print to")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        result = function(*arguments)
        sys.stdout.flush()
        if parallel := sys.modules.get("parallel"):
            parallel.leave()
        return result
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        if not isinstance(error, BrokenPipeError):
            fail(f"cannot write or read{f' {error.filename}' if error.filename else ''}: {error.strerror}")
    except RuntimeError as error:
        if RANKS == 1:
            raise
        fail(f"process {RANK} of {RANKS}, or one that it waited for, has failed: {error}")


def add_model_arguments(parser):
    parser.add_argument("checkpoint", nargs="?", default=DEMO, help="checkpoint folder, or org/name on the Hugging Face hub "
                        "(default: the demo's, %(default)s)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto, cuda if there is one)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16", "float64"),
                        help="of weights and cache (default: auto, the checkpoint's own on cuda, float32 on cpu)")  # fmt: skip


def number(least, below=None):
    """An argparse type: a whole number of at least `least`, or any in [least, below)."""

    def read(text):
        with suppress(ValueError):
            if least <= (value := int(text) if below is None else float(text)) < (below or math.inf):
                return value
        kind = f"whole number of at least {least}" if below is None else f"number in [{least}, {below})"
        raise argparse.ArgumentTypeError(f"{text} is not a {kind}")

    return read


PRUNE = number(0, 1)
PRESETS = ("paper", "local", "cache")  # as in token_filter.py, like what follows
KNOBS = {  # the fields of FilterConfig with a flag of their name: what preset paper has, what is allowed, what --help says
    "mode": ("skip", ("skip", "local", "cache"), "what a redundant token loses in a layer: its attention (skip), attention to all but "
             "the first and the latest tokens (local), or nothing (cache); in none of them is it cached for long"),
    "recent": (0, number(0), "a token and so many before it can be seen by any token that attends, redundant or not"),
    "schedule": ("tail", ("tail", "uniform", "head", "last"), "how the ratio is spread over the layers: growing from the first to the "
                 "last (tail), falling (head), the same in all (uniform), or the last ones alone (last)"),
    "gamma": (0.9, PRUNE, "decay of the running averages, 0 <= X < 1"),
    "warmup": (16, number(0), "how many tokens at the start of a text are always kept"),
    "history": (64, number(1), "how many past scores a new one is ranked among"),
    "fusion": ("variance", ("variance", "equal", "key", "value"), "how key and value similarity become one score: the side whose heads "
               "agree counts more (variance), both alike (equal), or one alone (key, value)"),
    "keys": ("rotated", ("rotated", "unrotated"), "whether keys are compared after RoPE (rotated) or before it (unrotated)"),
}  # fmt: skip


def add_filter_arguments(parser, several=False, default="paper"):
    """--preset (one name, or several) and the KNOBS."""
    about = "None does anything without --prune above 0. What is not given is as the preset has it; in [brackets] is what paper has."
    group = parser.add_argument_group("token filtering", about)
    group.add_argument("--preset", choices=PRESETS, nargs="+" if several else None,
                       help=f"the paper's setting, or ones of ours that README compares (default: {default})")  # fmt: skip
    for name, (value, allowed, text) in KNOBS.items():
        kind = {"choices": allowed} if isinstance(value, str) else {"type": allowed, "metavar": "N" if isinstance(value, int) else "X"}
        group.add_argument(f"--{name}", help=f"{text} [{value}]", **kind)


def check_filter(args, *others) -> list[str]:
    """The flags that were given of the filter's, and of others. Exits with one line if --prune, one ratio or several, is 0 for them."""
    given = [f"--{name.replace('_', '-')}" for name in ("preset", *KNOBS, *others) if getattr(args, name) not in (None, False)]
    if given and not any(args.prune if isinstance(args.prune, list) else [args.prune]):
        fail(f"{given[0]} does nothing without --prune above 0")
    return given


def filters_from(args, names, ratios, with_ratio=False) -> list:
    """(label, FilterConfig) of each named preset with the KNOBS that were given, at each ratio above 0; what comes out equal only once,
    with a note. A label names the preset and what differs from it."""
    from token_filter import preset
    given, found = {knob: getattr(args, knob) for knob in KNOBS if getattr(args, knob) is not None}, dict[Any, str]()
    for name in names:
        differs = "".join(f", {knob} {value}" for knob, value in given.items() if value != getattr(preset(name), knob))
        for config in (preset(name, prune=prune, **given) for prune in dict.fromkeys(ratios) if prune > 0):
            label = f"{name} {config.prune:g}{differs}" if with_ratio else f"{name}{differs}"
            if found.setdefault(config, label) != label:
                print(f"note: at --prune {config.prune:g}, {label} is {found[config]} again, and run once", file=sys.stderr)
    return [(label, config) for config, label in found.items()]


def compile_decode(model) -> bool:
    """Have the model decode through torch.compile: True, or False after one line on stderr where that cannot work."""
    import torch

    try:
        torch.compile(torch.sin)(torch.zeros(2, device=model.embed.weight.device))
    except Exception as e:  # noqa: BLE001 (compilers fail in many ways)
        reason = " ".join(str(e).split("\n\n")[0].split()) or type(e).__name__  # without torch's advice on debugging
        print(f"note: torch.compile does not work here, so nothing is compiled: {reason}", file=sys.stderr)
        return False
    model.compile_decode()
    return True
