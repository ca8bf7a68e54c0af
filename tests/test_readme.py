"""README and the other pages hold: their commands run, what they quote and link to is there. Their numbers: test_idea.py.

How their ```sh blocks are tested (```python is run with 4 new tokens, ```py blocks are quotes): generate.py runs, with 2 new
tokens; eval_ppl.py, eval_passkey.py and bench.py run on a tiny random model and a short text, bench uncompiled; eval_tasks.py
(its harness is an extra), `--shape` and the reader's own checkpoint stop at the first thing past their arguments; of make,
pip and -m, only the target, the file or the module is looked up.
"""

import functools
import importlib.util
import io
import math
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import MagicMock

import command_line

import numpy as np
import pytest
import torch

from evaluation import bench
from tools import demo_checkpoint
from evaluation import passkey as eval_passkey
import eval_ppl
import generate
import load_weights
from docs.figures import sizes
from model import ModelConfig, Transformer
from test_tokenizer import folders  # noqa: F401 (a fixture)

HERE = Path(__file__).resolve().parent.parent
NAMES = ("README.md", "CONTRIBUTING.md", "docs/lesson.md", "docs/results.md", "golden/PORTING.md", "tasks/README.md")
PAGES = {name: (HERE / name).read_text(encoding="utf-8") for name in NAMES}
README, LESSON = PAGES["README.md"], PAGES["docs/lesson.md"]
LESS = {  # what comes last on a command line counts
    "generate.py": "--max-new-tokens 2",
    "eval_ppl.py": "--window 24 --max-tokens 48 --offsets 0 16 --prune 0.3",
    "eval_passkey.py": "--prune 0.3 --lengths 128 --depths 0.5",
    "bench.py": "--batch 1 --context 20 --new-tokens 1 --repeat 1",
    "eval_tasks.py": "",
}
load = functools.cache(load_weights.load)  # once for all commands


@functools.cache
def load_tiny(*_, **__):
    torch.manual_seed(0)
    return Transformer(ModelConfig(49152, 16, 3, 2, 1, 8, 16, 1e4, 1e-5, 512, True)), load(command_line.DEMO)[1]


def blocks(language):
    return [block for page in PAGES.values() for block in re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)]


def commands():
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    given = (re.sub(r"^HF_HUB_OFFLINE=0 ", "", line) for line in lines)
    return list({tuple(words): words for line in given if (words := shlex.split(line, comments=True))}.values())


@pytest.fixture
def reader(demo, tmp_path, monkeypatch):
    """The reader's folder: WikiText (a stand-in) is there, and docs/figures/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "wikitext-2-test.txt").write_text(README, encoding="utf-8")
    for module, loader in ((generate, load), (load_weights, load), (eval_ppl, load_tiny), (eval_passkey, load_tiny), (bench, load_tiny)):
        monkeypatch.setattr(module, "load", loader)
    monkeypatch.setattr(bench, "compile_decode", lambda model: False)  # which takes long, and test_bench.py does


def main_of_eval_tasks(monkeypatch):
    for name in ("datasets", "lm_eval", "lm_eval.api.model", "lm_eval.models.utils", "lm_eval.tasks", "lm_eval.utils"):
        monkeypatch.setitem(sys.modules, name, MagicMock(TemplateLM=object))
    spec = importlib.util.spec_from_file_location("eval_tasks_alone", HERE / "eval_tasks.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    module.load_tasks = lambda *_: command_line.fail("nowhere")
    return module.main


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command(command, reader, capsys, monkeypatch):
    program, script, *arguments = command
    if program == "make":
        assert re.search(rf"^{script}:", (HERE / "Makefile").read_text(), re.M)
        models = [word.removeprefix("MODEL=") for word in arguments if word.startswith("MODEL=")]
        assert set(models) <= set(demo_checkpoint.MODELS)
    elif program == ".venv/bin/torchrun":
        assert (HERE / arguments[1]).is_file()
    elif program in ("git", "bash"):
        assert arguments or (HERE / script).is_file()
    elif program == ".venv/bin/pip":
        assert [script, arguments[0]] == ["install", "-r"] and (HERE / arguments[1]).is_file()
    elif script == "-m":
        assert arguments[0] == "pytest" or (HERE / arguments[0].replace(".", "/")).with_suffix(".py").is_file()
        assert arguments[0] != "pytest" or (HERE / arguments[-1]).is_file()
    else:
        assert program == ".venv/bin/python"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))  # of a conversation
        files = [arguments[i + 1] for i, flag in enumerate(arguments) if flag in ("--plot", "--skip-map")]
        for module in ["matplotlib"] * bool(files) + ["transformers"] * ("--vs" in arguments):
            pytest.importorskip(module)
        modules = (generate, eval_ppl, eval_passkey, bench)
        main = {f"{module.__name__}.py": module.main for module in modules}.get(script)
        main, less = main or main_of_eval_tasks(monkeypatch), LESS[script] + " --device nowhere" * ("--shape" in arguments)
        if script == "eval_tasks.py" or arguments[0] in ("--help", "--shape", "path/to/Llama-2-13b-hf", "meta-llama/Llama-2-13b-hf"):
            with pytest.raises(SystemExit) as end:
                main([*arguments, *less.split()])
            code, shown = end.value.code, capsys.readouterr()
            assert (code, shown.err) == (0, "") or (code == 2 and re.fullmatch("error: .*(nowhere|Llama-2-13b-hf).*\n", shown.err))
        else:
            main([*arguments, *less.split()])
        assert all(Path(file).is_file() for file in files)


def test_readme_says_where_its_python_runs():
    """What it imports is found in the repository's folder alone."""
    before, _, _ = README.partition("```python\n")
    last = " ".join(before.strip().splitlines()[-2:])
    assert "From Python, run in this repository's folder" in last


@pytest.mark.parametrize("code", blocks("python"))
def test_python_as_shown(code, reader, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    exec(code.replace("prompts, 64, ", "prompts, 4, "), {})
    assert re.search(r"\S.*\nprefill \d+ tokens at .*; decode .*", capsys.readouterr().out)


@pytest.mark.parametrize("text", ["The café\u2019s 😀 👩‍👩‍👧 says 你好 世界 and שלום עולם.", "two words, three words here\n  and more"])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-fallback", "byte-level"])
@pytest.mark.parametrize("code", blocks("python"))
def test_python_as_shown_prints_any_text_whole(code, kind, text, folders, capsys, monkeypatch):  # noqa: F811
    """Whatever the tokenizer: letters that take several tokens, and the space that a decoder strips from a first word."""
    tokenizer = load_weights.Tokenizer(folders[kind])
    monkeypatch.setattr(tokenizer, "chat", lambda messages: tokenizer.encode("hello"))
    monkeypatch.setattr(load_weights, "load", lambda *_: (None, tokenizer))
    monkeypatch.setattr(generate, "generate", lambda *_, **__: ((0, token) for token in tokenizer.encode(text, bos=False)))
    exec(code, {})
    assert capsys.readouterr().out.partition("\nprefill ")[0].lstrip(" ") == text


def test_links_files_and_quotes():
    for name, page in PAGES.items():
        links = set(re.findall(r"\]\(([^)\s]+)\)", page))
        for path, _, anchor in (link.partition("#") for link in links if not link.startswith("https://")):
            target = (HERE / name).parent / path if path else HERE / name
            assert target.exists(), (name, path)
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], (name, anchor)
    for target in re.findall(r"`make (\w+)", "".join(PAGES.values())):
        assert re.search(rf"^{target}:", (HERE / "Makefile").read_text(), re.M), target
    assert len(README.splitlines()) <= 200
    table = README[README.index("## The files") : README.index("## Licence")]
    modules = {path.name for path in HERE.glob("*.py") if not path.name.startswith(("test_", "conftest"))}
    assert modules <= set(re.findall(r"\]\(([\w.]+)\)", table))

    source = [line.strip() for name in ("token_filter.py", "schedule.py") for line in (HERE / name).read_text().splitlines()]
    quotes, labels = "".join(blocks("py")).splitlines(), re.findall(r"\[`(# \w+)`", LESSON)
    assert len(quotes) >= 11 and set(quotes) <= set(source), set(quotes) - set(source)
    assert len(labels) == 4 and all(any(line.startswith(label) for line in source) for label in labels)
    for label in ("# filter\n", "# store, attend, and add\n"):
        assert f"`{label.strip()}`" in LESSON and label in (HERE / "model.py").read_text()


MODELS = {"135M": "smollm2-135m.txt", "0.5B": "qwen2.5-coder-0.5b.txt", "1.5B": "qwen2.5-coder-1.5b.txt"}
WINDOWS = {  # as the pages call them, and as the raw files' commands do
    "four other windows": "--window 768 --offsets 100000 150000 200000 250000", "windows of 128": "--window 128",
    "windows of 2048": "--window 2048 --offsets 0 20480", "one of 4096": "--window 4096 --offsets 0 --batch 1",
}  # fmt: skip
RIVALS = {"oracle": "oracle", "KeyDiff": "KeyDiff, online", "a threshold": "cache, adjusted threshold",
          "the same": "StreamingLLM, as much read", "StreamingLLM": "StreamingLLM, as much held",
          "no attention": "no attention in last layers"}  # fmt: skip


def measured(table, name, prune):
    """(perplexity, times dense, KV read) of a setting, or the mean of its seeds."""
    label = next((full for part, full in RIVALS.items() if part in name), name.replace("`", ""))
    found = [table[key, prune] for key in (label, *(f"{label}, seed {seed}" for seed in range(3))) if (key, prune) in table]
    return np.mean(found, axis=0)


def says(cell, *figures):
    """The numbers of a cell, "25.9 (0.64)" or "1.2 / 3.4" with "not run" where it was not, are these, rounded."""
    shown = re.findall(r"\d[\d.]*|not run", cell)
    assert len(shown) == len(figures), (cell, figures)
    return all(x == "not run" or abs(float(x) - figure) <= 0.501 * 10 ** -len(x.partition(".")[2]) for x, figure in zip(shown, figures))


def figures_of(head, name, column):
    """What the cell of the row `name` under `column`, in the table of results.md that begins with `head`, is to say."""
    prunes = [float(p) for p in re.findall(r"0\.\d(?!\d|B)", column)]
    if head == "| times dense | 0.1 |":
        preset, size = name.split(", ")
        return [measured(sizes.rows(MODELS[size]), preset, prunes[0])[1]]
    if head == "| times dense | `paper` 0.2":
        windows, size = name.split(", ")
        table, preset = sizes.rows(MODELS[size], WINDOWS[windows]), column.split(" ")[0].strip("`")
        prunes = prunes[:2] if windows == "windows of 128" else prunes
        return [table.get((preset, p), (0, math.nan))[1] for p in prunes]
    if head == "| perplexity (KV read) | 135M 0.2":
        return measured(sizes.rows(MODELS[column.split(" ")[0]]), name, prunes[0])[[0, 2]]
    if head == "| perplexity (KV read) | 0 |":
        table = sizes.rows(MODELS["135M"])
        return measured(table, name, prunes[0])[[0, 2]] if prunes else [table["dense", 0][0]]
    if head == "| perplexity | dense":
        table = sizes.rows(MODELS["135M"], WINDOWS[name])
        return [table["dense", 0][0]] if column == "dense" else [table[column.strip("`"), p][0] for p in (0.2, 0.5)]
    if head == "| `paper`, perplexity at":
        setting = "paper" if column == "`tail`" else f"paper, schedule {column.strip('`')}"
        return [sizes.rows(MODELS[name])[setting, p][0] for p in (0.2, 0.5)]
    assert head == "| changed |"
    table, preset, fields = sizes.rows(MODELS["135M"]), column.split(" ")[0].strip("`"), {"warm-up": "warmup", "$\\gamma$": "gamma"}
    field, values = name.split(": ") if ": " in name else ("keys", "rotated / unrotated")
    values = [value.strip("` ").replace(" alone", "") for value in values.split("/")]
    assert says(column, table[preset, 0.3][0])
    return [table.get((f"{preset}, {fields.get(field, field)}={value}", 0.3), table[preset, 0.3])[0] for value in values]


@pytest.mark.parametrize("head, least", [
    ("| times dense | 0.1 |", 45), ("| times dense | `paper` 0.2", 20), ("| perplexity (KV read) | 135M 0.2", 45),
    ("| perplexity (KV read) | 0 |", 20), ("| perplexity | dense", 8), ("| `paper`, perplexity at", 8), ("| changed |", 14),
])  # fmt: skip
def test_tables_say_what_was_measured(head, least):
    columns, compared = cells("docs/results.md", head, titled=True)[0][1:], 0
    for name, *given in cells("docs/results.md", head):
        for column, cell in zip(columns, given, strict=True):
            if cell:
                assert says(cell, *figures_of(head, name, column)), (name, column, cell)
                compared += 1
    assert compared >= least


def test_the_ratios_that_come_are_what_was_measured():
    text = (HERE / "results" / "realised.txt").read_text(encoding="utf-8")
    lines = re.findall(r"^(\w+) +([a-z][^\d\n]*?(?: 64| 256)?) +(0\.\d+) +(.*)$", text, re.M)
    raw = {(preset, rule, float(asked)): [float(x) for x in shares.split()] for preset, rule, asked, shares in lines}
    table = cells("docs/results.md", "| asked: 0.2 / 0.5 / 0.8 |")
    assert len(table) == 9
    for name, *given in table:
        preset, rule = name.replace("`", "").split(", ")
        assert all(says(cell, *(raw[preset, rule, p][i] for p in (0.2, 0.5, 0.8))) for i, cell in enumerate(given)), name


def agrees(cell, row):
    """A perplexity, and in brackets, if any, KV read, are this row's of sizes.rows(), rounded."""
    return says(cell, row[0], *([row[2]] if "(" in cell else []))


def cells(page, head, titled=False):
    """The rows of the table that begins with this head: [first cell, others ...]; with its head, if titled."""
    title, _, *lines = PAGES[page][PAGES[page].index(head) :].split("\n\n")[0].splitlines()
    return [[cell.strip() if titled else cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in [title] * titled + lines]


BENCHMARKS = (HERE / "results" / "benchmarks.txt").read_text(encoding="utf-8")


def benchmarks():
    """1.5B: (setting, task) -> accuracy in percent; the standard error of its difference from dense, or None; KV read; skipped.

    A setting with a dagger, as on the pages: as measured before the presets changed.
    """
    now, before = BENCHMARKS.split("\nWhat follows was measured")
    found = {}
    for text, mark in ((now, ""), (before.split("\nSmolLM2")[0], " †")):
        for setting, task, values in re.findall(r"^(\S.*?) +(?:real_)?(\w+) +acc(?: of 7)? +(.*)", text, re.M):
            value, *between, skipped, _, read, _ = map(float, values.rstrip("%").split())
            found[setting + mark, task] = 100 * value, 100 * between[2] if len(between) == 3 else None, read, skipped
    return found


def test_readme_says_what_was_measured_at_the_largest_size():
    """Perplexity and accuracy, each with its KV read; a difference's standard error as it was paired."""
    perplexity, accuracy, compared = sizes.rows("qwen2.5-coder-1.5b.txt"), benchmarks(), 0
    for setting, *given in cells("README.md", "| | perplexity | seven tasks"):
        setting = setting.replace("`", "")
        name, _, prune = setting.partition(" ")
        assert agrees(given[0], perplexity[name, float(prune or 0)]), setting
        for task, cell in zip(("average", "mmlu"), given[1:]):
            value, error, read, _ = accuracy[setting, task]
            known = [(x, unit) for x, unit in ((value, 0.1), (error, 0.1), (read, 0.01)) if x is not None]
            for figure, (x, unit) in zip(re.findall(r"[\d.]+", cell), known):
                assert float(figure) == pytest.approx(x, abs=0.501 * unit), (setting, cell)
            compared += 1
    assert compared >= 14


def test_every_benchmark_is_what_was_measured():
    raw, compared = benchmarks(), 0
    tasks = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "average", "mmlu")
    for setting, *given in cells("docs/results.md", "| `--prune` | BoolQ"):
        share, name = setting.startswith("share"), re.sub("share skipped, |`|--", "", setting)
        for task, cell in zip(tasks, given):
            if cell:
                value, *_, skipped = raw[name, task]
                assert float(cell) == pytest.approx(skipped if share else value, abs=0.00501 if share else 0.0501), (setting, task)
                compared += 1
    assert compared >= 40


def test_every_difference_of_benchmarks_is_what_was_measured():
    """From dense, as printed; between two settings, from the outcomes of every question."""
    lines = re.findall(r"^.* (?:average|real_mmlu) .* [+-](0\.\d+) +(0\.\d+) .*$", BENCHMARKS, re.M)
    known = {f"{100 * float(change):.1f} ± {100 * float(error):.1f}" for change, error in lines}
    found = re.findall(r"^1.5B  (paper [\d.]+(?:, random)?) +(\w+) +([01]+)$", BENCHMARKS.split("\nWhat follows")[1], re.M)
    outcomes = {(name, task): [int(bit) for bit in bits] for name, task, bits in found}
    for name in ("paper 0.2", "paper 0.5"):
        drawn = {task: bits for (each, task), bits in outcomes.items() if each == f"{name}, random"}
        changes = {task: np.subtract(bits, outcomes[name, task]) for task, bits in drawn.items()}
        for part in ([changes.pop("mmlu")] if "mmlu" in changes else [], list(changes.values())):
            if part:
                error = sum(change.var(ddof=1) / len(change) for change in part) ** 0.5 / len(part)
                known.add(f"{100 * np.mean([change.mean() for change in part]):.1f} ± {100 * error:.1f}")
    section = PAGES["docs/results.md"].split("## Benchmarks")[1].split("Every (context")[0]
    given = set(re.findall(r"\d+\.\d ± \d+\.\d", section))
    assert len(given) >= 15 and given <= known, given - known


def test_speed_and_pass_keys_say_what_was_measured():
    raw = (HERE / "results" / "bench-cpu.txt").read_text()
    for case, dense, *others in cells("docs/results.md", "| batch, context | dense, ms"):
        batch, context = case.split(", ")
        block = re.search(rf"^batch {batch}, context {context}\b.*\n.*\n((?:\S.*\n)+)", raw, re.M)[1].splitlines()
        wanted = r".{18}" + 3 * r" +\S+" + 3 * r" +(\S+) +\S+" + r" +(\S+)"
        ms, ratio, bound, speed = zip(*(re.match(wanted, line).groups() for line in block))
        assert dense == f"{float(ms[0]):.0f} ({float(speed[0]):.0f})", case
        shown = [f"{float(x):.2f}" for x in ratio[1:]]
        assert [cell.split(" ")[0] for cell in others] == shown, case
        assert [cell.split("(")[1] for cell in others[:3]] == [f"{float(x):.2f})" for x in bound[1:4]], case
        if (batch, context) == ("32", "1024"):
            assert [*re.search(r"takes (\S+)\s+\(`paper`\), (\S+) \(`local`\) and (\S+) \(`cache`\)", README).groups()] == shown[:3]

    raw = (HERE / "results" / "bench-gpu.txt").read_text()
    for name, *given in cells("docs/results.md", "| | step, ms | x dense | bound"):
        row = re.search(rf"^{name.split(',')[0].strip('`')}(?: 0\.5)? +(.*)$", raw, re.M)[1].split()
        first, again, times, ms, _, ratio, _, bound, speed, _, cache, *_ = (float(x) if "-" not in x else None for x in row)
        assert all(map(says, given, (ms, ratio, bound, speed, cache / 1000, first, again, times))), name

    found = {}
    for line in (HERE / "results" / "passkey.txt").read_text().splitlines():
        if match := re.match(r"(dense|paper|local|cache) +(0\.\d+) +\d+ +(.*)", line):
            found[match[1], float(match[2])] = found.get((match[1], float(match[2])), 0) + sum(map(float, match[3].split()[:5]))
    for name, dense, *keys in cells("docs/results.md", "| pass keys found, of 15 |"):
        assert int(dense) == found["dense", 0] and [int(n) for n in keys] == [found[name, p] for p in (0.1, 0.2, 0.5)]
