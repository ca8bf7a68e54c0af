"""The flags that commands share. The filter's flags are FilterConfig's own fields.

Imports no torch, so that a command answers --help and a wrong flag at once.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from cli.process import RANK, fail
from filter_config import CHOICES, PRESETS, FilterConfig, preset

DEMO = Path(__file__).resolve().parent.parent / "checkpoints" / "smollm2-135m"

# The fields of FilterConfig that have a flag of their own; --prune is each command's.
FILTER_FIELDS = [field for field in dataclasses.fields(FilterConfig) if field.name != "prune"]


class Parser(argparse.ArgumentParser):
    """Reports an error in one line. Of several ranks only the first writes files."""

    def error(self, message):
        fail(message)

    def parse_args(self, *given: Any) -> Any:  # type: ignore[override]
        args = super().parse_args(*given)
        if RANK > 0:
            for name in ("json", "csv", "plot"):
                if hasattr(args, name):
                    setattr(args, name, None)
        return args


def whole_number(at_least: int):
    """A type for argparse: a whole number of at least so much."""

    def read(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < at_least:
            wanted = f"a whole number of at least {at_least}"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return read


def share(text):
    """A type for argparse: a number in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = None
    if value is None or not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number in [0, 1)")
    return value


def add_model_arguments(parser):
    """CHECKPOINT, --device and --dtype."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=DEMO,
        help="checkpoint folder, or org/name on the Hugging Face hub (default: the demo's, %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ... (default: auto, cuda if there is one)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
        help="of weights and cache (default: auto, the checkpoint's own on cuda, float32 on cpu)",
    )


def add_filter_arguments(parser, several=False, default="paper"):
    """--preset, with one name or several, and a flag for each of FILTER_FIELDS.

    default: the preset, in words, that the command takes if none is given.
    """
    group = parser.add_argument_group(
        "token filtering",
        "None of these does anything without --prune above 0. What is not given is as the preset has "
        "it; in [brackets] is what preset paper has.",
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        nargs="+" if several else None,
        help="the paper's setting, or one of ours, which the README compares "
        f"(default: {default})",
    )
    for field in FILTER_FIELDS:
        options: dict[str, Any] = {"help": f"{field.metadata['help']} [{field.default}]"}
        if field.name in CHOICES:
            options["choices"] = CHOICES[field.name]
        elif field.type is int:
            options["type"] = whole_number(field.metadata["at_least"])
            options["metavar"] = "N"
        else:
            options["type"] = share
            options["metavar"] = "X"
        group.add_argument(f"--{field.name}", **options)


def filter_options(args) -> dict[str, Any]:
    """The fields of FilterConfig whose flags were given, with their values."""
    values = {field.name: getattr(args, field.name) for field in FILTER_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def check_filter_arguments(args, *others) -> list[str]:
    """The flags given of --preset, FILTER_FIELDS and `others`, which all need --prune.

    Fails if there is one, and --prune (one ratio or several) is 0 or missing.
    """
    names = ["preset", *(field.name for field in FILTER_FIELDS), *others]
    given = [name for name in names if getattr(args, name) not in (None, False)]
    flags = ["--" + name.replace("_", "-") for name in given]
    ratios = args.prune if isinstance(args.prune, list) else [args.prune]
    if flags and not any(ratios):
        fail(f"{flags[0]} does nothing without --prune above 0")
    return flags


def filters_from(args, names, ratios, with_ratio=False) -> list[tuple[str, FilterConfig]]:
    """(label, FilterConfig) of each named preset, with the flags that were given, at each ratio above 0.

    A label names the preset and what differs from it, and with_ratio also the ratio. Of settings that
    come out equal only the first is there, with a note on stderr.
    """
    given = filter_options(args)
    label_of: dict[FilterConfig, str] = {}
    for name in names:
        differing = ""
        for field, value in given.items():
            if value != getattr(preset(name), field):
                differing += f", {field} {value}"
        for ratio in dict.fromkeys(ratios):
            if ratio == 0:
                continue
            config = preset(name, prune=ratio, **given)
            label = f"{name} {ratio:g}{differing}" if with_ratio else f"{name}{differing}"
            first = label_of.setdefault(config, label)
            if first != label:
                print(
                    f"note: at --prune {ratio:g}, {label} is {first} again, and run once",
                    file=sys.stderr,
                )
    return [(label, config) for config, label in label_of.items()]


def compile_decode(model) -> bool:
    """Have the model decode through torch.compile; False, after a note on stderr, where it cannot."""
    import torch

    from runtime import cuda_graph

    try:
        torch.compile(torch.sin)(torch.zeros(2, device=model.embed.weight.device))
    except Exception as error:  # noqa: BLE001 (compilers fail in many ways)
        without_advice = str(error).split("\n\n")[0]
        reason = " ".join(without_advice.split()) or type(error).__name__
        print(
            f"note: torch.compile does not work here, so nothing is compiled: {reason}",
            file=sys.stderr,
        )
        return False
    cuda_graph.compile_decode(model)
    return True
