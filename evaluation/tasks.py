"""Zero-shot and few-shot tasks through EleutherAI's lm-evaluation-harness, dense and filtered.

    python -m evaluation.tasks [CHECKPOINT] --suite commonsense --prune 0 0.5 --preset paper cache
    python -m evaluation.tasks [CHECKPOINT] --tasks common_sense --num-fewshot 5

The second asks the questions in evaluation/common_sense/, which need no download. The harness knows
the tasks and the metrics; harness_model.py gives it the model.
Needs `pip install -r requirements-extra.txt`.
"""

import logging
import math
import os
import random
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli.arguments import (
    Parser,
    add_filter_arguments,
    add_model_arguments,
    check_filter_arguments,
    filters_from,
    share,
)
from cli.process import fail, run_command
from cli.report import finite, print_json
from eval_ppl import Setting
from evaluation.rivals import by_chance, no_attention_in_last_layers
from load_weights import CheckpointError, load

try:
    from evaluation.harness_model import FilteredLM  # isort: skip (it says where data sets are)
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    fail(f"{error}: the harness is an extra, pip install -r requirements-extra.txt")

# The benchmarks that the paper reports.
SUITES = {
    "commonsense": [
        "boolq",
        "piqa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
    ],
    "mmlu": ["mmlu"],
    "wikitext": ["wikitext"],
}
OWN_TASKS = Path(__file__).resolve().parent / "common_sense"
AVERAGED = ("acc", "acc_norm", "exact_match")  # metrics that mean the same on every task
# The harness's default for NumPy's and torch's generators. Python's own it starts at 0.
OTHER_SEED = 1234


# ---------------------------------------------------------------------------------- the tasks


def load_tasks(names, include_path):
    """What the harness loads for these names, and the lines to report.

    Returns {"tasks": {name: Task}, "groups": {name: Group}}, and of each line its name, a group's
    or a task's, and its tasks: {name: [task, ...]}. Fails in one line if a task cannot be had.
    """
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        # The harness's own tasks are thousands of files to read.
        manager = TaskManager(include_path=include_path)
    loaded: dict[str, dict] = {"tasks": {}, "groups": {}}
    lines: dict[str, list[str]] = {}
    for name in names:
        try:
            found = manager.load([name])
        except KeyError:
            fail(f"task {name}: neither the harness nor {' nor '.join(include_path)} has it")
        except Exception as error:  # noqa: BLE001 (whatever a data set's loading raises)
            hint = "to download them, run once with HF_HUB_OFFLINE=0"
            no_such_file = str(error).startswith("Unable to find '/")
            if isinstance(error, FileNotFoundError) and no_such_file:
                hint = "is the path in its task file right?"
            fail(f"task {name}: its data cannot be loaded: {error}; {hint}")
        loaded["tasks"].update(found["tasks"])
        loaded["groups"].update(found["groups"])
        if name in found["groups"]:
            lines[name] = list(found["tasks"])
        else:
            for task in found["tasks"]:
                lines[task] = [task]
    return loaded, lines


def prepare_tasks(args):
    """load_tasks() of what the arguments name, with as many solved examples as they want."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # The harness has a bar for each task, and MMLU has 57: ours are enough.
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    # A few tasks shuffle their choices or make their data with one of these. In the harness, too, a
    # seed that is given is for all of them.
    random.seed(args.seed)
    np.random.seed(args.seed or OTHER_SEED)
    torch.manual_seed(args.seed or OTHER_SEED)
    loaded, lines = load_tasks(args.tasks, [str(OWN_TASKS), *(args.include_path or [])])
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        # A 0 in a task's own file stays, as in the harness.
        if own is None or (own > 0 and args.num_fewshot is not None):
            task.set_config("num_fewshot", args.num_fewshot or 0)
    return loaded, lines


class RandomStates:
    """The states of all three generators, to go back to."""

    def __init__(self):
        self.python = random.getstate()
        self.numpy = np.random.get_state()
        self.torch = torch.get_rng_state()

    def restore(self):
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)


# ---------------------------------------------------------------------------------- the table


def summarise(results, lm: FilteredLM, lines):
    """The harness's results of one setting as {name of a line: row}. A row has

    metrics                       {metric: (value, standard error or None)}
    outcomes                      {metric: the values of its questions}; not in the row "average"
    texts, longest                how many texts were asked, and the tokens of the longest
    unfiltered                    how many of them the warm-up covers
    skip_ratio, kv_held, kv_read  shares, of what cache.usage() counts

    With several tasks, the row "average" is over all that report a metric ("acc of 7": over 7), its
    standard error as of independent tasks.
    """
    table: dict[str, dict] = {}
    used: dict[str, list] = {}
    for name, tasks in lines.items():
        table[name] = metrics_of(results, name, tasks)
        used[name] = [text for task in tasks for text in lm.used[task]]
    if len(table) > 1:
        every_text = [text for texts in used.values() for text in texts]
        table["average"] = {"metrics": averages(table, "metrics")}
        used["average"] = every_text
    for name, row in table.items():
        row.update(usage_figures(used[name], lm))
    return table


def metrics_of(results, name, tasks):
    """What the harness found for a group or task: its metrics, and each question's own values."""
    metrics = {}
    outcomes = {}
    values = results["results"][name]
    for key, value in values.items():
        metric, _, kind = key.partition(",")  # "acc,none": the metric and the filter of answers
        if not kind or metric.endswith("_stderr"):
            continue
        label = metric if kind == "none" else f"{metric}, {kind}"
        error = values.get(f"{metric}_stderr,{kind}")
        if not isinstance(error, float) or not math.isfinite(error):
            error = None
        metrics[label] = (value, error)
        samples = [sample for task in tasks for sample in results["samples"][task]]
        outcomes[label] = [
            float(sample[metric])
            for sample in samples
            if sample["filter"] == kind and isinstance(sample.get(metric), bool | int | float)
        ]
    return {"metrics": metrics, "outcomes": outcomes}


def usage_figures(used, lm: FilteredLM):
    """What a row says of its texts. used: their rows of cache.usage()."""
    usage = torch.tensor(used or [[0] * 5])  # (texts, 5); none where the only text is empty
    pairs, redundant, held, read, dense_read = usage.sum(0).tolist()
    lengths = (usage[:, 0] // lm.model.config.n_layers).tolist()
    n_unfiltered = len(lengths)
    if lm.filter is not None:
        n_unfiltered = sum(length <= lm.filter.n_sinks for length in lengths)
    return {
        "texts": len(lengths),
        "longest": max(lengths),
        "skip_ratio": redundant / max(pairs, 1),
        "kv_held": held / max(pairs, 1),
        "kv_read": read / max(dense_read, 1),
        "unfiltered": n_unfiltered,
    }


def averages(table, key):
    """Means of what rows have under `key`: {"acc of 7": (mean, standard error)}, if 7 of them do.

    Of the metrics in AVERAGED. The error is None if one of theirs is.
    """
    found = {}
    for metric in AVERAGED:
        having = [row[key][metric] for row in table.values() if metric in row[key]]
        n = len(having)
        if n > 1:
            values, errors = zip(*having)
            error = None if None in errors else math.hypot(*errors) / n
            found[f"{metric} of {n}"] = (sum(values) / n, error)
    return found


def compare(table, dense):
    """Give each row of `table` "- dense": {metric: (difference, standard error)}.

    It is paired: of the same questions, with and without a filter.
    """
    tasks = {name: row for name, row in table.items() if name != "average"}
    for name, row in tasks.items():
        row["- dense"] = {}
        for metric, outcomes in row["outcomes"].items():
            changes = [
                ours - theirs for ours, theirs in zip(outcomes, dense[name]["outcomes"][metric])
            ]
            error = None
            if len(changes) > 1:
                error = statistics.stdev(changes) / math.sqrt(len(changes))
            value, _ = row["metrics"][metric]
            dense_value, _ = dense[name]["metrics"][metric]
            row["- dense"][metric] = (value - dense_value, error)
    if "average" in table:
        table["average"]["- dense"] = averages(tasks, "- dense")


# Titles of the figures, and their formats. "whole" is the share of texts that the warm-up covers.
FIGURES = (
    ("value", ".4f"),
    ("stderr", ".4f"),
    ("- dense", "+.4f"),
    ("stderr", ".4f"),
    ("skipped", ".4f"),
    ("KV held", ".4f"),
    ("KV read", ".4f"),
    ("whole", ".0%"),
)


def print_head(width, name_width):
    titles = " ".join(f"{title:>8}" for title, _ in FIGURES)
    print(f"{'setting':<{width}}  {'task':<{name_width}}  {'metric':<13} {titles}")


def print_table(title, table, width, name_width):
    """A line for each task and metric of one setting, whose table summarise() made."""
    for name, row in table.items():
        shares = (row["skip_ratio"], row["kv_held"], row["kv_read"])
        whole = row["unfiltered"] / row["texts"]
        for metric, value_and_error in row["metrics"].items():
            difference = row.get("- dense", {}).get(metric, (None, None))
            figures = (*value_and_error, *difference, *shares, whole)
            cells = []
            for (_, form), figure in zip(FIGURES, figures):
                text = "" if figure is None else format(figure, form)
                cells.append(f"{text:>8}")
            line = f"{title:<{width}}  {name:<{name_width}}  {metric:<13} {' '.join(cells)}"
            print(line, flush=True)


# ---------------------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(description="Tasks of the lm-evaluation-harness, dense and filtered.")
    add_model_arguments(parser)
    parser.add_argument("--suite", choices=SUITES, help="the benchmarks that the paper reports")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="common_sense, which is our own; tasks of the harness; tasks of --include-path",
    )
    parser.add_argument(
        "--include-path",
        action="append",
        metavar="FOLDER",
        help="more task files (repeatable)",
    )
    parser.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="solved examples before each question (default: the task's)",
    )
    parser.add_argument(
        "--fewshot-seed",
        type=int,
        default=1234,
        metavar="N",
        help="which examples (default: the harness's, %(default)s)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="ask through the checkpoint's chat template"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N documents of each task"
    )
    parser.add_argument(
        "--prune",
        type=share,
        nargs="+",
        default=[0.0, 0.2, 0.5],
        metavar="P",
        help="shares of (token, layer) pairs to skip (default: 0 0.2 0.5)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="continuations at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of what tasks and --rivals draw at random (default: %(default)s)",
    )
    parser.add_argument(
        "--rivals",
        action="store_true",
        help="also presets with tokens by chance, and last layers without attention, to which the "
        "filter's flags mean nothing",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    add_filter_arguments(parser, several=True)
    return parser


def read_arguments(argv=None):
    """The arguments. Fails in one line where they make no sense."""
    args = make_parser().parse_args(argv)
    if args.suite:
        args.tasks = SUITES[args.suite] + args.tasks
    if not args.tasks:
        fail("no task: give --suite or --tasks")
    limit = 1 if args.limit is None else args.limit
    num_fewshot = 0 if args.num_fewshot is None else args.num_fewshot
    if min(args.batch, limit) < 1 or min(args.seed, num_fewshot) < 0:
        fail("--batch and --limit must be at least 1, --seed and --num-fewshot at least 0")
    if args.seed >= 2**32:
        fail("--seed must be below 2**32")
    check_filter_arguments(args)
    for folder in args.include_path or []:
        if not os.path.isdir(folder):
            fail(f"--include-path {folder}: no such folder")
    return args


def make_settings(args, n_layers) -> list[Setting]:
    """What is compared. Dense comes first, where a --prune is 0."""
    settings = []
    if 0 in args.prune:
        settings.append(Setting("dense"))
    ratios = sorted(args.prune)
    for label, filter in filters_from(args, args.preset or ["paper"], ratios, with_ratio=True):
        settings.append(Setting(label, filter))
        if args.rivals:
            chance = partial(by_chance, seed=args.seed)
            settings.append(Setting(f"{label}, random", filter, chance))
    if args.rivals:
        for prune in dict.fromkeys(ratios):
            if prune > 0:
                label = f"last layers {prune:g}"
                settings.append(no_attention_in_last_layers(label, prune, n_layers))
    return settings


def run_setting(args, lm: FilteredLM, loaded) -> dict:
    """The harness's results of one setting. Fails in one line where there are none."""
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(args.fewshot_seed)
    try:
        return lm_eval.evaluate(
            lm,
            loaded,
            limit=args.limit,
            apply_chat_template=args.chat,
            # In a chat, solved examples are turns: the harness's own command does it too.
            fewshot_as_multiturn=args.chat,
        )
    except (ValueError, FloatingPointError, CheckpointError) as error:
        fail(error)
    except ArithmeticError as error:
        fail(
            f"{lm.title}: the harness cannot make figures of what was scored, {error}: "
            "a loss without bound, or only empty texts?"
        )


def main(argv=None):
    args = read_arguments(argv)
    loaded, lines = prepare_tasks(args)
    random_states = RandomStates()
    try:
        model, tokenizer = load(
            args.checkpoint, args.device, args.dtype, progress=sys.stderr.isatty()
        )
    except CheckpointError as error:
        fail(error)
    settings = make_settings(args, model.config.n_layers)
    width = max(len("setting"), *(len(setting.label) for setting in settings))

    tables: dict[str, dict] = {}
    results: dict = {}
    for setting in settings:
        title = setting.label
        lm = FilteredLM(
            model, tokenizer, setting.filter, args.batch, args.seed, title, setting.filter_fn
        )
        random_states.restore()  # for every setting anew, so that all get the same prompts
        results = run_setting(args, lm, loaded)
        table = summarise(results, lm, lines)
        if title != "dense" and "dense" in tables:
            compare(table, tables["dense"])
        if not args.json:
            name_width = max(len(name) for name in table)
            if not tables:
                print_head(width, name_width)
            print_table(title, table, width, name_width)
        tables[title] = table
    if args.json:
        print_results(args, settings, tables, results)


def print_results(args, settings, tables, results):
    """--json: all tables, and how they were made, as one object. results: the harness's latest."""
    rows = []
    for setting in settings:
        filter = None if setting.filter is None else asdict(setting.filter)
        table = tables[setting.label]
        rows.append({"setting": setting.label, "filter": filter, "tasks": table})
    about = {
        "lm_eval": lm_eval.__version__,
        "checkpoint": str(args.checkpoint),
        "limit": args.limit,
        "chat": args.chat,
        "num_fewshot": results["n-shot"],
        "versions": results["versions"],
    }
    print_json(finite({**about, "results": rows}))


if __name__ == "__main__":
    run_command(main)
