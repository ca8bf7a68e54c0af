"""Tasks ask as the harness's own command does, and the table says what was measured."""

import functools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from cli.report import finite
from load_weights import load
from local_tasks import write_task, write_tasks

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm_eval is an extra: pip install -r requirements-extra.txt"
)

from lm_eval.tasks import TaskManager  # noqa: E402

from evaluation import tasks  # noqa: E402
from evaluation.harness_model import FilteredLM  # noqa: E402
from evaluation.tasks import OWN_TASKS, SUITES, compare, load_tasks, main, summarise  # noqa: E402

ROOT = OWN_TASKS.parent.parent


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder of small tasks, of which three cannot be run."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def run(capsys, *arguments):
    """What the command prints."""
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def error_line(capsys, *arguments):
    """What the command ends with: one line, and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("error:")]
    assert stopped.value.code == 2
    return line


# -------------------------------------------------------------------------- the paper's tasks

SCHOOL = {
    "choices": {"text": ["sand", "water", "wood", "glass"], "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
}
# A row of each data set, in its own columns.
ROWS = {
    "boolq": {
        "question": "is ice frozen water",
        "passage": "Ice is frozen water.",
        "idx": 0,
        "label": 1,
    },
    "piqa": {
        "goal": "To dry a cup,",
        "sol1": "use a towel.",
        "sol2": "use a lamp post.",
        "label": 0,
    },
    "hellaswag": {
        "ind": 4,
        "activity_label": "Cooking",
        "ctx_a": "A man boils water.",
        "ctx_b": "he",
        "ctx": "A man boils water. he",
        "endings": ["adds the rice.", "paints it [title] red.", "swims off.", "sleeps."],
        "label": "0",
    },
    "winogrande": {
        "sentence": "Tom thanked Jim because _ had helped.",
        "option1": "Tom",
        "option2": "Jim",
        "answer": "2",
    },
    "arc_easy": {"id": "a", "question": "What does ice melt into?", **SCHOOL},
    "arc_challenge": {"id": "b", "question": "What fills the sea?", **SCHOOL},
    "openbookqa": {"id": "c", "question_stem": "Rain consists of", **SCHOOL},
    "wikitext": {"page": " = Ice = \n Ice is water that is frozen , and it floats on water . \n"},
    "mmlu": {
        "question": "What is ice? ",
        "subject": "x",
        "choices": ["sand", "water", "wood", "glass"],
        "answer": 1,
    },
}
# The first request that must come out of each.
FIRST = {
    "boolq": ("Ice is frozen water.\nQuestion: is ice frozen water?\nAnswer:", " no"),
    "piqa": ("Question: To dry a cup,\nAnswer:", " use a towel."),
    "hellaswag": ("Cooking: A man boils water. He", " adds the rice."),
    "winogrande": ("Tom thanked Jim because Tom", " had helped."),
    "arc_easy": ("Question: What does ice melt into?\nAnswer:", " sand"),
    "arc_challenge": ("Question: What fills the sea?\nAnswer:", " sand"),
    "openbookqa": ("Rain consists of", " sand"),
    "wikitext": (" = Ice =\nIce is water that is frozen, and it floats on water.\n",),
}
FOLDERS = [
    "super_glue/boolq",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc",
    "openbookqa",
    "wikitext",
    "mmlu/default",
]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Folders for --include-path: the harness's own tasks, and files that replace their data."""
    folder = tmp_path_factory.mktemp("stand-ins")
    own = [str(Path(lm_eval.__file__).parent / "tasks" / name) for name in FOLDERS]
    index = TaskManager(include_path=own, include_defaults=False).task_index
    for name, entry in index.items():
        kind = "mmlu" if name.startswith("mmlu_") else name
        if entry.kind.name == "TASK" and kind in ROWS:
            write_task(folder, name, [ROWS[kind]] * 3, {"include": str(entry.yaml_path)})
    return [*own, str(folder)]


def include(folders):
    return [flag for folder in folders for flag in ("--include-path", folder)]


def test_the_paper_s_tasks_build_their_requests(stand_ins):
    names = [name for suite in SUITES.values() for name in suite]
    loaded, lines = load_tasks(names, stand_ins)
    assert list(lines) == names
    assert len(lines["mmlu"]) == 57
    requests = {}
    for name, task in loaded["tasks"].items():
        task.build_all_requests(limit=2)
        requests[name] = [request.args for request in task.instances]
    assert {name: requests[name][0] for name in FIRST} == FIRST
    assert all(len(requests[name]) == 8 for name in lines["mmlu"])
    header = "The following are multiple choice questions (with answers) about astronomy.\n\n"
    question = header + "What is ice?\nA. sand\nB. water\nC. wood\nD. glass\nAnswer:"
    assert requests["mmlu_astronomy"][1] == (question, " B")


@pytest.fixture(scope="module")
def suite(checkpoint, stand_ins):
    """The flags of a run of the suite and one task more, at 25 tokens of warm-up."""
    flags = ["--suite", "commonsense", "--tasks", "mmlu_astronomy", "--limit", "2"]
    flags += ["--preset", "cache", "--prune", "0.5", "0", "--warmup", "25"]
    return [str(checkpoint), *include(stand_ins), *flags]


def test_the_table_of_a_suite(suite, capsys):
    """Averages and differences add up, and the printed figures are those of the JSON form."""
    printed = run(capsys, *suite).splitlines()
    results = json.loads(run(capsys, *suite, "--json"))["results"]
    assert [row["setting"] for row in results] == ["dense", "cache 0.5, warmup 25"]
    assert results[1]["filter"]["warmup"] == 25

    dense, filtered = (row["tasks"] for row in results)
    names = [*SUITES["commonsense"], "mmlu_astronomy"]
    assert list(dense) == [*names, "average"]
    check_averages(dense, names)
    check_averages(filtered, names)
    for row in dense.values():
        assert (row["skip_ratio"], row["kv_held"], row["kv_read"]) == (0, 1, 1)
        assert "- dense" not in row
    assert filtered["mmlu_astronomy"]["skip_ratio"] > 0.2
    assert filtered["mmlu_astronomy"]["unfiltered"] == 0
    assert dense["piqa"]["texts"] == 4
    assert dense["mmlu_astronomy"]["texts"] == 8
    check_differences(filtered, dense)
    check_printed(printed, filtered["mmlu_astronomy"])


def check_averages(table, names):
    for metric in ("acc", "acc_norm"):
        having = [table[name]["metrics"] for name in names if metric in table[name]["metrics"]]
        values = np.array([metrics[metric] for metrics in having])  # (tasks, 2)
        n = len(values)
        expected = [values[:, 0].mean(), np.sqrt((values[:, 1] ** 2).sum()) / n]
        assert table["average"]["metrics"][f"{metric} of {n}"] == pytest.approx(expected, abs=1e-6)


def check_differences(filtered, dense):
    for name, row in filtered.items():
        for metric, (change, error) in row["- dense"].items():
            of_dense = dense[name]["metrics"][metric][0]
            assert change == pytest.approx(row["metrics"][metric][0] - of_dense)
            if name != "average":
                pairs = zip(row["outcomes"][metric], dense[name]["outcomes"][metric])
                changes = [ours - theirs for ours, theirs in pairs]
                assert error == pytest.approx(statistics.stdev(changes) / math.sqrt(2))
    assert len(filtered["average"]["- dense"]) == 2


def check_printed(printed, row):
    titles = "setting task metric value stderr - dense stderr skipped KV held KV read whole"
    assert " ".join(printed[0].split()) == titles
    (line,) = [line for line in printed if line.startswith("cache 0.5, warmup 25  mmlu_astronomy ")]
    *figures, whole = line.split()[6:]
    shares = [row["skip_ratio"], row["kv_held"], row["kv_read"]]
    expected = [*row["metrics"]["acc"], *row["- dense"]["acc"], *shares]
    assert [float(figure) for figure in figures] == pytest.approx(expected, abs=1e-4)
    assert whole == "0%"
    # Its texts are within the warm-up.
    (short, *_) = [line for line in printed if line.startswith("cache 0.5, warmup 25  openbookqa")]
    assert short.endswith(" 100%")


def test_a_group_is_one_line(checkpoint, stand_ins, capsys):
    flags = ["--suite", "mmlu", "--prune", 0, "--limit", 1, "--num-fewshot", 0, "--json"]
    (only,) = json.loads(run(capsys, checkpoint, *include(stand_ins), *flags))["results"]
    assert list(only["tasks"]) == ["mmlu"]
    assert only["tasks"]["mmlu"]["texts"] == 57 * 4


# ---------------------------------------------------------------------------------- the table


def test_rivals_skip_as_much_and_other_tokens(checkpoint, local, capsys):
    flags = ["--tasks", "local_choice", "--include-path", local, "--prune", 0, 0.5]
    flags += ["--recent", 0, "--warmup", 2, "--preset", "paper", "cache", "--rivals", "--json"]
    dense, *others = json.loads(run(capsys, checkpoint, *flags))["results"]
    assert dense["setting"] == "dense"
    assert [row["setting"] for row in others] == [
        "paper 0.5, warmup 2",
        "paper 0.5, warmup 2, random",
        "cache 0.5, recent 0, warmup 2",
        "cache 0.5, recent 0, warmup 2, random",
        "last layers 0.5",
    ]
    ratios = [row["tasks"]["local_choice"]["skip_ratio"] for row in others]
    assert all(0.3 < ratio < 0.7 for ratio in ratios)
    assert len(set(ratios)) == 5


def test_the_table_compares_with_dense():
    """Paired by question; of a single question there is no standard error."""
    model = SimpleNamespace(config=SimpleNamespace(n_layers=4))
    used = {"a": [[40, 10, 30, 5, 10]], "b": [[40, 0, 40, 10, 10]]}
    lm = SimpleNamespace(used=used, filter=None, model=model)

    def results(outcomes):
        """The harness's, where questions have these outcomes, and no errors are known."""
        figures = {}
        samples = {}
        for name, values in outcomes.items():
            figures[name] = {"acc,none": sum(values) / len(values)}
            samples[name] = [{"filter": "none", "acc": value} for value in values]
        return {"results": figures, "samples": samples}

    lines = {"a": ["a"], "b": ["b"]}
    dense = summarise(results({"a": [1, 1, 0, 1], "b": [0.5]}), lm, lines)
    table = summarise(results({"a": [1, 0, 0, 0], "b": [0.75]}), lm, lines)
    compare(table, dense)
    assert table["a"]["metrics"] == {"acc": (0.25, None)}
    assert table["a"]["skip_ratio"] == 0.25
    assert table["a"]["kv_held"] == 0.75
    assert table["a"]["kv_read"] == 0.5
    expected = (-0.5, statistics.stdev([0, -1, 0, -1]) / 2)
    assert table["a"]["- dense"]["acc"] == pytest.approx(expected)
    assert table["b"]["- dense"]["acc"] == (0.25, None)
    assert table["average"]["- dense"]["acc of 2"] == (-0.125, None)


def test_empty_texts_and_a_loss_without_bound(checkpoint, local, capsys, monkeypatch):
    """One line where the harness has no figure for them, nothing where it has."""
    settings = yaml.safe_load((local / "local_rolling.yaml").read_text())
    for name in ("word", "byte"):
        metrics = [{"metric": f"{name}_perplexity"}]
        rows = [{"text": ""}]
        write_task(local, f"empty_{name}s", rows, {**settings, "metric_list": metrics})
    arguments = [checkpoint, "--include-path", local, "--prune", 0, "--device", "cpu", "--tasks"]
    (row,) = json.loads(run(capsys, *arguments, "empty_words", "--json"))["results"]
    assert row["tasks"]["empty_words"]["metrics"] == {"word_perplexity": [1.0, None]}
    assert row["tasks"]["empty_words"]["longest"] == 0

    model, tokenizer = load(checkpoint, "cpu")
    model.head.weight.mul_(1e5)
    monkeypatch.setattr(tasks, "load", lambda *_, **__: (model, tokenizer))
    for task in ("empty_bytes", "local_rolling"):
        line = error_line(capsys, *arguments, task)
        assert "dense: the harness cannot make figures" in line


def test_infinity_is_null_in_json():
    value = {"a": [math.inf, (1, math.nan)], "b": "inf"}
    assert finite(value) == {"a": [None, [1, None]], "b": "inf"}


# --------------------------------------------------------------------------- what tasks draw


def test_few_shot_and_chat_make_prompts_longer(checkpoint, local, capsys):
    def longest(*flags):
        arguments = ["--tasks", "local_choice", "local_generate", "--include-path", local]
        shown = run(capsys, checkpoint, *arguments, "--prune", 0, "--json", *flags)
        return json.loads(shown)["results"][0]["tasks"]["local_choice"]["longest"]

    plain = longest("--num-fewshot", 0)
    assert longest("--num-fewshot", 2) > 2 * plain
    assert longest("--num-fewshot", 0, "--chat") > plain + 5


def test_every_setting_gets_the_same_prompts(checkpoint, local, capsys, monkeypatch):
    """Solved examples that are drawn at random are the same, and so is what else a task draws."""
    asked = []
    loglikelihood = FilteredLM.loglikelihood

    def recorded(self, requests, *rest, **more):
        asked.append(([request.args for request in requests], random.random()))
        return loglikelihood(self, requests, *rest, **more)

    monkeypatch.setattr(FilteredLM, "loglikelihood", recorded)
    arguments = [checkpoint, "--tasks", "local_choice", "--include-path", local]
    arguments += ["--num-fewshot", 2, "--prune", 0, 0.2, 0.5]
    run(capsys, *arguments)
    assert len(asked) == 3
    assert asked[0] == asked[1] == asked[2]
    requests, number = asked[0]
    assert len({context.rpartition("\n\n")[0] for context, _ in requests}) > 3

    run(capsys, *arguments, "--fewshot-seed", 5, "--seed", 5)
    assert asked[3][0] != requests
    assert asked[3][1] != number


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_asks_as_simple_evaluate_does(checkpoint, local, capsys, monkeypatch, chat):
    """In a chat solved examples are turns; all three random generators are in the same state."""
    asked = []
    numbers = []

    def recorded(self, requests, *rest, **more):
        asked.append([request.args for request in requests])
        numbers.append((random.random(), np.random.random(), float(torch.rand(1))))
        for request in requests:
            self.used[request.task_name].append([1, 0, 1, 1, 1])
        if requests[0].request_type == "generate_until":
            return [""] * len(requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(FilteredLM, "loglikelihood", recorded)
    monkeypatch.setattr(FilteredLM, "generate_until", recorded)
    names = ["local_choice", "local_generate"]
    flags = ["--include-path", local, "--num-fewshot", 2, "--prune", 0, 0.5]
    if chat:
        flags.append("--chat")
    run(capsys, checkpoint, "--tasks", *names, *flags)
    lm_eval.simple_evaluate(
        FilteredLM(*load(checkpoint, "cpu")),
        tasks=names,
        task_manager=TaskManager(include_path=str(local), include_defaults=False),
        num_fewshot=2,
        apply_chat_template=chat,
    )
    # Two settings, and simple_evaluate; two tasks each.
    assert len(asked) == 6
    assert asked[:2] == asked[2:4] == asked[4:]
    assert numbers[:2] == numbers[2:4] == numbers[4:]
    n_turns = 2 if chat else 0
    for requests in asked[:2]:
        prompt = requests[0][0]
        assert prompt.count("<s>assistant: ") == n_turns


# ---------------------------------------------------------------------------------- bad input


def test_an_empty_context_without_bos_and_eos(checkpoint, local, capsys, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer_config.json").write_text("{}")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        values |= {"bos_token_id": None, "eos_token_id": None}
        (folder / name).write_text(json.dumps(values))
    flags = ["--include-path", local, "--tasks", "local_rolling", "--device", "cpu"]
    line = error_line(capsys, folder, *flags)
    assert "an empty context has to become a BOS or EOS token" in line


OFFLINE = """
from evaluation import tasks
import datasets, evaluate
print(datasets.config.HF_HUB_OFFLINE, evaluate.config.HF_EVALUATE_OFFLINE)
tasks.main(["org/small", "--tasks", "common_sense"])
"""


@pytest.mark.parametrize(
    "more, offline", [({}, "True True"), ({"HF_HUB_OFFLINE": "0"}, "False False")]
)
def test_a_checkpoint_is_downloaded_and_data_sets_are_not(tmp_path, more, offline):
    """Unless HF_HUB_OFFLINE=0. Nobody listens where the hub should be, but it is asked."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:1", **more}
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.stdout.splitlines()[0] == offline
    assert done.returncode == 2
    assert re.search("org/small.*does not answer", done.stderr.splitlines()[-1])


BAD_FLAGS = {
    "no task": ([], "--suite or --tasks"),
    "no batch": (["--tasks", "local_choice", "--batch", "0"], "--batch"),
    "gamma": (["--tasks", "local_choice", "--gamma", "2"], "gamma"),
    "unknown task": (["--tasks", "no_such_task"], "no_such_task"),
    "data on the hub": (
        ["--tasks", "gone"],
        "gone: its data cannot be loaded: .*someone/gone.* HF_HUB_OFFLINE=0",
    ),
    "data in no file": (
        ["--tasks", "missing"],
        "missing: its data cannot be loaded: "
        "Unable to find '/none/choice.jsonl'; is the path in its task file right",
    ),
    "no folder": (
        ["--tasks", "local_choice", "--include-path", "/none"],
        "--include-path /none: no such folder",
    ),
    "scores overflow": (
        ["--tasks", "local_choice", "--dtype", "float16"],
        "from layer 1 on, values are not finite",
    ),
    "texts overflow": (
        ["--tasks", "local_generate", "--dtype", "float16"],
        "from layer 1 on, values are not finite",
    ),
    "too long": (["--tasks", "local_too_long"], "continuation has 2[0-9]* tokens"),
    "beams": (["--tasks", "local_beams"], "num_beams is not supported at this value"),
    "no temperature": (
        ["--tasks", "local_no_temperature"],
        "local_no_temperature: .*do_sample draws at random, which takes a temperature",
    ),
    "seed": (["--tasks", "local_choice", "--seed", str(2**32)], "--seed must be below"),
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_input_ends_in_one_line(flags, message, checkpoint, local, capsys, monkeypatch):
    # Without the harness's thousands of files.
    few = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_path, **_: few(include_path=include_path)
    )
    text = (local / "local_choice.yaml").read_text()
    gone = text.replace("task: local_choice", "task: gone")
    (local / "gone.yaml").write_text(gone.replace("path: json", "path: someone/gone"))
    missing = text.replace("task: local_choice", "task: missing")
    missing = re.sub(r"/\S*choice.jsonl", "/none/choice.jsonl", missing)
    (local / "missing.yaml").write_text(missing)
    if "float16" in flags:
        model, tokenizer = load(checkpoint, "cpu")
        model.half().blocks[1].mlp.up.weight[:] = 6e4
        monkeypatch.setattr(tasks, "load", lambda *_, **__: (model, tokenizer))
    arguments = [checkpoint, "--include-path", local, "--device", "cpu", *flags]
    assert re.search(message, error_line(capsys, *arguments))


def test_without_the_harness_it_says_what_to_install():
    code = "import runpy, sys; sys.modules['lm_eval'] = None; "
    code += "runpy.run_module('evaluation.tasks', run_name='__main__')"
    command = [sys.executable, "-c", code, "--tasks", "any"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "requirements-extra.txt" in line
