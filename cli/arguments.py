"""The flags that commands share. The filter's flags are FilterConfig's own fields.

Imports no torch, so that a command answers --help and a wrong flag at once.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
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


def whole_number(at_least: int, below: float = math.inf):
    """A type for argparse: a whole number in a range."""

    def read(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not at_least <= value < below:
            wanted = f"a whole number of at least {at_least}"
            if below < math.inf:
                wanted += f" and below {below}"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return read


def number(is_allowed: Callable[[float], bool], wanted: str):
    """A type for argparse: a number that is_allowed, which `wanted` says in words."""

    def read(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not is_allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return read


def number_in(at_least: float, below: float):
    """A type for argparse: a number in [at_least, below)."""
    return number(lambda x: at_least <= x < below, f"a number in [{at_least:g}, {below:g})")


share = number_in(0, 1)
temperature = number(lambda x: 0 <= x < math.inf, "a finite number of at least 0")
probability = number(lambda x: 0 < x <= 1, "a number above 0 and at most 1")


def add_model_arguments(parser):
    """CHECKPOINT, --device and --dtype."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=DEMO,
        help="checkpoint folder, or org/name on the Hugging Face hub "
        "(default: the demo's, %(default)s)",
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
        "None of these does anything without --prune above 0. What is not given is as the preset "
        "has it; in [brackets] is what preset paper has.",
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        nargs="+" if several else None,
        help=f"the paper's setting, or one of ours, which the README compares (default: {default})",
    )
    for field in FILTER_FIELDS:
        options: dict[str, Any] = {"help": f"{field.metadata['help']} [{field.default}]"}
        at_least = field.metadata["at_least"]
        below = field.metadata["below"]
        if field.name in CHOICES:
            options["choices"] = CHOICES[field.name]
        elif field.type is int:
            options["type"] = whole_number(at_least)
            options["metavar"] = "N"
        else:
            options["type"] = number_in(at_least, below)
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
    """(label, FilterConfig) of each named preset, with the flags that were given.

    There is one for each of the ratios above 0. A label names the preset and what differs from it,
    and with_ratio also the ratio. Of settings that come out equal only the first is there, with a
    note on stderr.
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
            try:
                config = preset(name, prune=ratio, **given)
            except ValueError as error:  # each value is allowed, but not all of them together
                fail(f"--preset {name}: {error}")
            label = f"{name} {ratio:g}{differing}" if with_ratio else f"{name}{differing}"
            first = label_of.setdefault(config, label)
            if first != label:
                print(
                    f"note: at --prune {ratio:g}, {label} is {first} again, and run once",
                    file=sys.stderr,
                )
    return [(label, config) for config, label in label_of.items()]


# ------------------------------------------------------------------ for generate.py and chat.py


def add_generation_arguments(parser):
    """--system, what ends an answer, sampling, --prune, and how decode steps are run."""
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="message that tells the model of a conversation what it is (default: the template's)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        default=128,
        metavar="N",
        help="length of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end answers before this text; may be given several times",
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on after an end-of-text token"
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="X",
        help="of sampling (default: 0, always the likeliest token)",
    )
    parser.add_argument(
        "--top-k",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="sample from the N likeliest tokens (default: 0, all)",
    )
    parser.add_argument(
        "--top-p",
        type=probability,
        default=1.0,
        metavar="P",
        help="and from the likeliest that together have probability P (default: 1)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0, below=2**63), metavar="N", help="of sampling (default: 0)"
    )
    parser.add_argument(
        "--prune",
        type=share,
        metavar="P",
        help="share of (token, layer) pairs to skip (default: 0, dense)",
    )
    parser.add_argument(
        "--no-graph",
        action="store_true",
        help="on CUDA, do not record a decode step as a graph and replay it: slower",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="decode through torch.compile: faster, after a minute or so for compiling",
    )


def check_generation_arguments(args, num_samples=1):
    """Fail where flags of add_generation_arguments make no sense together.

    Sets args.seed to 0 if it was not given.
    """
    if args.temperature == 0:
        does_nothing = {
            "--top-k": args.top_k > 0,
            "--top-p": args.top_p < 1,
            "--num-samples": num_samples > 1,
            "--seed": args.seed is not None,
        }
        for flag, given in does_nothing.items():
            if given:
                fail(f"{flag} does nothing without --temperature")
    if args.seed is None:
        args.seed = 0
    if "" in args.stop:
        fail("--stop is empty: it would end every answer at once")
    check_text("--stop", args.stop)
    check_text("--system", [args.system or ""])


def check_text(flag, texts):
    """Fail where one of the texts is not UTF-8.

    On a command line, Python has surrogates stand for bytes that are not.
    """
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            fail(f"{flag} is not UTF-8 text: is the terminal set to another encoding?")


def load_checkpoint(args):
    """(model, tokenizer) of the flags. Fails in one line where that cannot be."""
    from load_weights import CheckpointError, load, read_config
    from loading.checkpoint_files import checkpoint_folder
    from runtime import cuda_graph

    try:
        folder = checkpoint_folder(args.checkpoint)
        context = read_config(folder).max_positions
        if args.max_new_tokens >= context:
            fail(
                f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt "
                f"in the model's context of {context}"
            )
        model, tokenizer = load(folder, args.device, args.dtype, progress=sys.stderr.isatty())
    except CheckpointError as error:
        fail(error)
    if args.no_graph:
        cuda_graph.record_decode(model, None)
    if args.compile:
        args.compile = compile_decode(model)
        if args.compile:
            print("compiling ...", file=sys.stderr, flush=True)
    return model, tokenizer


def note_useless_filter(model, filters, longest):
    """A note on stderr where filtering does nothing, or much harm.

    filters: FilterConfig, or None for dense; longest: the length of the longest text, in tokens.
    """
    filters = [filter for filter in filters if filter is not None]
    if not filters:
        return
    warmup = max(filter.warmup for filter in filters)
    n_parameters = sum(p.numel() for p in model.parameters())
    if longest <= warmup:
        print(
            f"note: the first {warmup} tokens of a text (the warm-up) are not filtered, "
            "and no text here is longer",
            file=sys.stderr,
        )
    elif len(filters) == 1 and filters[0].mode == "skip" and n_parameters < 1e9:
        print(
            "note: models below a billion parameters rarely answer well when attention is skipped; "
            "try --preset cache, or --compare to see dense and all presets one after another",
            file=sys.stderr,
        )


def compile_decode(model) -> bool:
    """Have the model decode through torch.compile.

    Returns False, after a note on stderr, where that does not work.
    """
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
