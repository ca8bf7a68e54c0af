"""README and the other pages hold: their commands run, and what they quote and link to is there.

What the language of a code block promises:

    sh       every line is a command that works: see test_a_command
    python   a whole program, which is run as it stands
    py       a quote, word for word, of the project's own code
    python3  an answer to one of the lesson's exercises, which test_idea.py tries
    text     none of these: output, or a sketch

Tables are compared with what was printed, in results/. The lesson's numbers: test_idea.py. The code
of ports/README.md: test_transformers_port.py.
"""

import ast
import functools
import importlib
import importlib.util
import io
import math
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import chat
import eval_ppl
import filter_config
import generate
import generation
import load_weights
import token_filter
from cli.arguments import DEMO
from cli.process import fail
from docs.figures import sizes
from evaluation import bench, passkey, rivals
from filter_config import FilterConfig
from model import ModelConfig, Transformer
from test_filter import small
from test_tokenizer import folders  # noqa: F401 (a fixture)
from tools import demo_checkpoint

HERE = Path(__file__).resolve().parent.parent
MAKEFILE = (HERE / "Makefile").read_text(encoding="utf-8")
NO_ROOMS = {"checkpoints", "__pycache__"}
ROOMS = sorted(
    path.name
    for path in HERE.iterdir()
    if path.is_dir() and path.name not in NO_ROOMS and not path.name.startswith(".")
)


def read_pages():
    """Every page of the project: its path from the root -> its text."""
    paths = sorted(HERE.glob("*.md"))
    for room in ROOMS:
        paths += sorted((HERE / room).rglob("*.md"))
    return {str(path.relative_to(HERE)): path.read_text(encoding="utf-8") for path in paths}


PAGES = read_pages()
README = PAGES["README.md"]
LESSON = PAGES["docs/lesson.md"]


def test_the_pages_are_found():
    assert {"README.md", "docs/lesson.md", "golden/PORTING.md"} <= set(PAGES)
    assert {"cli", "docs", "evaluation", "golden", "results", "tests"} <= set(ROOMS)


def blocks(page, language):
    """The code blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------- commands

# Each command that is run here, as it stands after .venv/bin/python -> its module, and what is put
# behind its arguments, so that it is done soon. The last one of a flag counts.
COMMANDS = {
    "generate.py": (generate, "--max-new-tokens 2"),
    "chat.py": (chat, "--max-new-tokens 2"),
    "eval_ppl.py": (eval_ppl, "--window 24 --max-tokens 48 --offsets 0 16 --prune 0.3"),
    "evaluation.rivals": (rivals, "--window 24 --max-tokens 48 --offsets 0 16 --prune 0.3"),
    "evaluation.passkey": (passkey, "--prune 0.3 --lengths 128 --depths 0.5"),
    "evaluation.bench": (bench, "--batch 1 --context 20 --new-tokens 1 --repeat 1"),
}
# Modules with a test of their own that runs them.
TESTED_ELSEWHERE = {
    "docs.figures.idea": "test_idea.py",
    "docs.figures.realised": "test_idea.py",
    "golden.make": "test_golden.py",
    "ports.transformers_bench": "test_transformers_port.py",
}
# A checkpoint of the reader's own, which is not here.
ABSENT = ("path/to/Llama-2-13b-hf", "meta-llama/Llama-2-13b-hf")


def commands():
    """Every command of every page, once: a list of words each."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("HF_HUB_OFFLINE=0 "), comments=True)
                if words:
                    found[tuple(words)] = words
    return list(found.values())


load = functools.cache(load_weights.load)  # once for all commands


@functools.cache
def load_tiny(*_, **__):
    """In place of load(), for what measures: a tiny random model with the demo's tokenizer."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=49152,
        width=16,
        n_layers=3,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp_width=16,
        rope_theta=1e4,
        norm_eps=1e-5,
        max_positions=512,
        tied=True,
    )
    return Transformer(config), load(DEMO)[1]


@pytest.fixture
def reader(demo, tmp_path, monkeypatch):
    """The reader's folder. WikiText (a stand-in) is there, docs/figures/ too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "wikitext-2-test.txt").write_text(README, encoding="utf-8")
    monkeypatch.setattr(load_weights, "load", load)
    for module in (eval_ppl, passkey, bench):
        monkeypatch.setattr(module, "load", load_tiny)
    # Compiling takes long. test_bench.py does it.
    monkeypatch.setattr(bench, "compile_decode", lambda model: False)


def main_of_tasks(monkeypatch):
    """main() of evaluation/tasks.py, which ends where it would load a task.

    The harness is an extra, so an empty one takes its place.
    """
    for name in ("datasets", "lm_eval", "lm_eval.tasks", "evaluation.harness_model"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    path = HERE / "evaluation" / "tasks.py"
    spec = importlib.util.spec_from_file_location("tasks_without_harness", path)
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    tasks.load_tasks = lambda *_: fail("nowhere")
    return tasks.main


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command(command, reader, capsys, monkeypatch):
    """Python commands run. Of make, pip and torchrun only what they are given is looked up."""
    program, *arguments = command
    if program == "make":
        check_make(arguments)
    elif program == ".venv/bin/torchrun":
        [script] = [word for word in arguments if word.endswith(".py")]
        assert (HERE / script).is_file()
    elif program == "git":
        assert arguments[0] in ("clone", "checkout")
    elif program == ".venv/bin/pip":
        assert arguments[:2] == ["install", "-r"]
        assert (HERE / arguments[2]).is_file()
    else:
        assert program == ".venv/bin/python"
        if arguments[0] == "-m":
            del arguments[0]
            assert not arguments[0].endswith(".py")
        else:
            assert (HERE / arguments[0]).is_file()
        check_python(*arguments, capsys=capsys, monkeypatch=monkeypatch)


def check_make(arguments):
    target, *variables = arguments
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
    for variable in variables:
        name, _, value = variable.partition("=")
        assert name in ("MODEL", "TEXT")
        assert name != "MODEL" or value in demo_checkpoint.MODELS


def check_python(name, *arguments, capsys, monkeypatch):
    """Run the command, or see that it gets as far as it can here."""
    if name == "pytest":
        assert all((HERE / word).is_file() for word in arguments if word.endswith(".py"))
        return
    if name in TESTED_ELSEWHERE:
        assert callable(importlib.import_module(name).main)
        test = (HERE / "tests" / TESTED_ELSEWHERE[name]).read_text(encoding="utf-8")
        assert name.rpartition(".")[2] in test
        return

    if name == "golden.check":
        runpy.run_module(name, run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(list((HERE / "golden").glob("*.safetensors")))
        assert all(line.endswith(": as expected in float64 and float32") for line in lines)
        return

    less = ""
    if name == "evaluation.tasks":
        main = main_of_tasks(monkeypatch)
    else:
        module, less = COMMANDS[name]
        main = module.main
    if "--shape" in arguments:
        less += " --device nowhere"  # these models are too large for a test
    if "--vs" in arguments:
        pytest.importorskip("transformers")
    files = [
        arguments[i + 1] for i, word in enumerate(arguments) if word in ("--plot", "--skip-map")
    ]
    if any(file.endswith(".png") for file in files):
        pytest.importorskip("matplotlib")
    typed = io.TextIOWrapper(io.BytesIO(b"Hello\n"))  # in a conversation
    monkeypatch.setattr("sys.stdin", typed)

    arguments = [*arguments, *less.split()]
    stops = name == "evaluation.tasks" or "--shape" in arguments
    if stops or any(word in ABSENT for word in arguments) or "--help" in arguments:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        errors = capsys.readouterr().err
        if "--help" in arguments:
            assert (end.value.code, errors) == (0, "")
        else:
            assert end.value.code == 2
            assert re.fullmatch("error: .*(nowhere|Llama-2-13b-hf).*\n", errors)
        return
    main(arguments)
    assert capsys.readouterr().out.strip()
    assert all(Path(file).is_file() for file in files)


# ------------------------------------------------------------------------------- programs


def test_pages_with_programs():
    assert {page for page in PAGES if blocks(page, "python")} <= {"README.md", "ports/README.md"}


def test_readme_says_where_its_python_runs():
    """What it imports is found in the repository's folder alone."""
    before, _, _ = README.partition("```python\n")
    assert before.endswith("From Python, run in this repository's folder:\n\n")


@pytest.mark.parametrize("code", blocks("README.md", "python"))
def test_python_as_shown(code, reader, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    shorter = code.replace("prompts, 64, ", "prompts, 4, ")
    assert shorter != code
    exec(shorter, {})
    assert re.search(r"\S.*\nprefill \d+ tokens at .*; decode .*", capsys.readouterr().out)


@pytest.mark.parametrize("text", [
    "The café\u2019s 😀 👩‍👩‍👧 says 你好 世界 and שלום עולם.",
    "two words, three words here\n  and more",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-fallback", "byte-level"])
@pytest.mark.parametrize("code", blocks("README.md", "python"))
def test_python_as_shown_prints_any_text_whole(code, kind, text, folders, capsys, monkeypatch):  # noqa: F811
    """Whatever the tokenizer: some letters take several tokens.

    And some decoders strip the space before a first word.
    """
    tokenizer = load_weights.Tokenizer(folders[kind])
    tokens = tokenizer.encode(text, bos=False)
    monkeypatch.setattr(tokenizer, "chat", lambda messages: tokenizer.encode("hello"))
    monkeypatch.setattr(load_weights, "load", lambda *_: (None, tokenizer))
    monkeypatch.setattr(generation, "generate", lambda *_, **__: ((0, token) for token in tokens))
    exec(code, {})
    assert capsys.readouterr().out.partition("\nprefill ")[0].lstrip(" ") == text


# ---------------------------------------------------------------------- links, names, quotes


def slug(title):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    for link in set(re.findall(r"\]\(([^)\s]+)\)", PAGES[name])):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = HERE / name
        if path:
            target = target.parent / path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [slug(title) for title in titles], link


@pytest.mark.parametrize("name", PAGES)
def test_make_targets(name):
    for target in re.findall(r"`make (\w+)", PAGES[name]):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_readme_names_every_room_and_every_module_of_the_root():
    table = README[README.index("## The folders") : README.index("## Licence")]
    named = set(re.findall(r"\[([\w.]+)/?\]\(", table))
    modules = {path.name for path in HERE.glob("*.py")} - {"conftest.py"}
    assert {*modules, *ROOMS} == named


def function_lines(path, name):
    """The lines of a function, without those that nobody quotes: blank ones at its ends."""
    source = (HERE / path).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return source.splitlines()[node.lineno - 1 : node.end_lineno]
    raise AssertionError(f"{path} has no function {name}")


def without_comments(text):
    """The lines of some code, without comments and what is left of lines that hold nothing else."""
    lines = [re.sub(r"(^|\s+)# .*$", "", line) for line in text.splitlines()]
    return [line for line in lines if line.strip()]


def is_quoted_from(block, lines):
    """Whether the block is these lines, but for what a line of ... says is left out.

    The parts between must follow each other, each without a gap, indented as there. Comments may
    differ: a page has shapes of its own to tell.
    """
    lines = without_comments("\n".join(lines))
    at = 0
    for text in re.split(r"^\s*\.\.\.\n", block, flags=re.MULTILINE):
        part = without_comments(text)
        n = len(part)
        while textwrap.dedent("\n".join(lines[at : at + n])) != textwrap.dedent("\n".join(part)):
            at += 1
            if at + n > len(lines):
                return False
        at += n
    return True


# Where each quote of a page comes from, in the page's order.
QUOTED = {
    "README.md": [("golden/loop.py", "filter_token")],
    "docs/lesson.md": [
        ("token_filter.py", "token_filter"),
        ("token_filter.py", "token_filter"),
        ("token_filter.py", "token_filter"),
        ("token_filter.py", "exceeds_quantile"),
        ("token_filter.py", "rank_scores"),
        ("filter_config.py", "layer_ratios"),
        ("test_filter.py", "visible"),
    ],
}


@pytest.mark.parametrize("page", PAGES)
def test_quotes(page):
    quotes = blocks(page, "py")
    sources = QUOTED.get(page, [])
    assert len(quotes) == len(sources)
    for quote, source in zip(quotes, sources):
        assert is_quoted_from(quote, function_lines(*source)), quote


def test_a_quote_that_is_not_one_is_seen():
    lines = function_lines("token_filter.py", "exceeds_quantile")
    [quote] = [block for block in blocks("docs/lesson.md", "py") if "below = " in block]
    first, second, *rest = quote.splitlines(keepends=True)
    assert is_quoted_from(quote, lines)
    assert is_quoted_from(first + "...\n" + "".join(rest), lines)
    assert not is_quoted_from(first + "".join(rest), lines)
    assert not is_quoted_from(second + first + "".join(rest), lines)
    assert not is_quoted_from(quote.replace("<", "<="), lines)
    assert not is_quoted_from(quote.replace("return", "  return"), lines)


def test_names_in_brackets():
    """Beside each of the lesson's five steps stand its functions, and its comment in the code."""
    steps = re.findall(r"^\*\*\d\. \w+\*\* \[(.*)\]", LESSON, re.MULTILINE)
    assert len(steps) == 5
    source = (HERE / "token_filter.py").read_text(encoding="utf-8")
    comments = 0
    for names in steps:
        for name in names.split(", "):
            name = name.strip("`")
            if name.startswith("# "):
                assert f"\n    {name}" in source
                comments += 1
            else:
                assert hasattr(token_filter, name) or hasattr(filter_config, name), name
    assert comments == 4
    assert "`# Filter.`" in LESSON
    assert "\n        # Filter. " in (HERE / "model.py").read_text(encoding="utf-8")


def test_formulas_have_the_defaults():
    config = FilterConfig()
    assert rf"\gamma = {config.gamma}" in LESSON
    assert rf"n \le {config.history}$" in LESSON
    assert rf"t \ge {config.warmup}" in LESSON
    assert token_filter.EPS == 1e-6
    assert r"$\varepsilon = 10^{-6}$" in LESSON


def test_the_table_of_presets_is_the_code_s():
    rows = cells("docs/lesson.md", "| preset | `--mode` |")
    assert len(rows) == 3
    for name, mode, _, recent, schedule, score in rows:
        config = filter_config.preset(name)
        assert (mode, int(recent), schedule) == (config.mode, config.recent, config.schedule)
        by_queries_before_rotation = (config.fusion, config.keys) == ("key-query", "unrotated")
        assert ("queries" in score and "before rotation" in score) == by_queries_before_rotation


def test_the_example_of_a_filter_function():
    """The one in token_filter's docstring, which CONTRIBUTING sends its readers to, keeps the
    contract: a text gets the same decisions whole and token by token.
    """
    assert "long_values" in PAGES["CONTRIBUTING.md"]
    _, _, example = token_filter.token_filter.__doc__.partition("def long_values")
    known = vars(token_filter).copy()
    exec(textwrap.dedent(" " * 8 + "def long_values" + example), known)
    config = filter_config.preset("local", prune=0.5)
    model = small()
    tokens = torch.randint(0, 97, (2, 50))
    whole = model.new_cache(2, config, filter_fn=known["long_values"])
    model(tokens, whole)
    one_by_one = model.new_cache(2, config, filter_fn=known["long_values"])
    found = []
    for token in tokens.T:
        model(token[:, None], one_by_one)
        found.append(torch.stack([layer.redundant for layer in one_by_one.decisions()]))
    expected = torch.stack([layer.redundant for layer in whole.decisions()])
    assert torch.equal(torch.cat(found, dim=2), expected)
    assert 0.3 < expected[:, :, 16:].double().mean() < 0.7


def code_of_today(block):
    """What a diff block says of today: its lines with +."""
    lines = [line[1:] for line in block.splitlines() if line.startswith("+")]
    return "\n".join(lines) + "\n"


def test_the_pairs_of_contributing_end_in_today_s_code():
    kv_cache = (HERE / "kv_cache.py").read_text(encoding="utf-8").splitlines()
    sources = [
        function_lines("kv_cache.py", "append"),
        function_lines("model.py", "prefill"),
        kv_cache,
    ]
    pairs = blocks("CONTRIBUTING.md", "diff")
    assert len(pairs) == 3
    for pair, source in zip(pairs, sources):
        assert is_quoted_from(code_of_today(pair), source), pair
    # The last is about comments, which must be there as well.
    assert {line.strip() for line in code_of_today(pairs[2]).splitlines()} <= {
        line.strip() for line in kv_cache
    }


# --------------------------------------------------- tables of perplexity against results/

MODELS = {
    "135M": "smollm2-135m.txt",
    "0.5B": "qwen2.5-coder-0.5b.txt",
    "1.5B": "qwen2.5-coder-1.5b.txt",
}
# Windows as the pages call them, and as the raw files' commands do.
WINDOWS = {
    "four other windows": "--window 768 --offsets 100000 150000 200000 250000",
    "windows of 128": "--window 128",
    "windows of 2048": "--window 2048 --offsets 0 20480",
    "one of 4096": "--window 4096 --offsets 0 --batch 1",
}
# What the pages call preset "cache" without queries -> what it is called in the raw files.
KEYS_ALONE = {"keys alone": "cache, fusion key"}
# What the name of a baseline contains on the page -> what it is called in the raw files.
BASELINES = {
    "oracle": "oracle",
    "KeyDiff": "KeyDiff, online",
    "a threshold": "cache, adjusted threshold",
    "the same": "StreamingLLM, as much read",
    "StreamingLLM": "StreamingLLM, as much held",
    "no attention": "no attention in last layers",
}


def cells(page, head):
    """The rows of the table that begins with this head: [first cell, others ...], without ticks."""
    text = PAGES[page]
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in lines[2:]]


def columns(page, head):
    """The column heads of that table, but for the first."""
    text = PAGES[page]
    line = text[text.index(head) :].split("\n")[0]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def table_of(model, windows=None):
    """(setting, prune) -> (perplexity, times dense, KV read), of a model and, if given, windows."""
    file = MODELS[model]
    if windows is None:
        return sizes.rows(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "WINDOWS", WINDOWS[windows])
        return sizes.rows(file)


def measured(table, name, prune):
    """(perplexity, times dense, KV read) of a setting, or the mean of its seeds."""
    label = name.replace("`", "")
    label = KEYS_ALONE.get(label, label)
    for part, full in BASELINES.items():
        if part in name:
            label = full
            break
    found = [table[label, prune]] if (label, prune) in table else []
    for seed in range(3):
        with_seed = f"{label}, seed {seed}"
        if (with_seed, prune) in table:
            found.append(table[with_seed, prune])
    assert found, label
    return np.mean(found, axis=0)


def says(cell, *figures):
    """Whether the numbers of a cell are these, rounded: of "25.9 (0.64)", or of "1.2 / 3.4".

    "not run" in the place of a number may stand for any.
    """
    shown = re.findall(r"\d[\d.]*|not run", cell)
    assert len(shown) == len(figures), (cell, figures)
    for text, figure in zip(shown, figures):
        if text == "not run":
            continue
        digits = len(text.partition(".")[2])
        if abs(float(text) - figure) > 0.501 * 10**-digits:
            return False
    return True


def prunes_of(column):
    """The ratios in a column's head; 0.5B is none."""
    return [float(p) for p in re.findall(r"0\.\d(?!\d|B)", column)]


# One function for each table of results.md: what the cell of the row `name` in `column` is to say.


def of_sizes(name, column):
    preset, model = name.replace("`", "").split(", ")
    return [measured(table_of(model), preset, float(column))[1]]


def of_other_windows(name, column):
    windows, model = name.split(", ")
    table = table_of(model, windows)
    preset = column.partition(" 0.2")[0].strip("`")
    preset = KEYS_ALONE.get(preset, preset)
    prunes = prunes_of(column)
    if windows == "windows of 128":
        prunes = prunes[:2]
    return [table.get((preset, p), (0, math.nan))[1] for p in prunes]


def of_baselines(name, column):
    model, prune = column.split(" ")
    perplexity, _, read = measured(table_of(model), name, float(prune))
    return [perplexity, read]


def of_small_model(name, column):
    table = table_of("135M")
    if column == "0":
        return [table["dense", 0][0]]
    perplexity, _, read = measured(table, name, float(column))
    return [perplexity, read]


def of_window_lengths(name, column):
    table = table_of("135M", name)
    if column == "dense":
        return [table["dense", 0][0]]
    return [table[column.strip("`"), p][0] for p in (0.2, 0.5)]


def of_schedules(name, column):
    schedule = column.strip("`")
    setting = "paper" if schedule == "tail" else f"paper, schedule {schedule}"
    table = table_of(name)
    return [table[setting, p][0] for p in (0.2, 0.5)]


def of_ablations(name, column):
    table = table_of("135M")
    preset = column.split(" ")[0].strip("`")
    unchanged = table[preset, 0.3]
    assert says(column, unchanged[0])
    if name.startswith("keys compared"):
        field = "keys"
        values = ["rotated", "unrotated"]
    else:
        field, _, listed = name.partition(": ")
        field = {"warm-up": "warmup", "$\\gamma$": "gamma"}.get(field, field)
        values = [value.strip("` ").removesuffix(" alone") for value in listed.split("/")]
    # The value that the preset has is not among those changed.
    rows = [table.get((f"{preset}, {field}={value}", 0.3), unchanged) for value in values]
    return [row[0] for row in rows]


@pytest.mark.parametrize("head, expected, least", [
    ("| times dense | 0.1 |", of_sizes, 45),
    ("| times dense | `paper` 0.2", of_other_windows, 20),
    ("| perplexity (KV read) | 135M 0.2", of_baselines, 45),
    ("| perplexity (KV read) | 0 |", of_small_model, 20),
    ("| perplexity | dense", of_window_lengths, 8),
    ("| `paper`, perplexity at", of_schedules, 8),
    ("| changed |", of_ablations, 14),
])  # fmt: skip
def test_tables_say_what_was_measured(head, expected, least):
    heads = columns("docs/results.md", head)
    n_compared = 0
    for name, *row in cells("docs/results.md", head):
        for column, cell in zip(heads, row, strict=True):
            if cell:
                assert says(cell, *expected(name, column)), (name, column, cell)
                n_compared += 1
    assert n_compared >= least


def test_the_findings_are_in_the_tables():
    """The ranges that the page begins with."""
    findings = PAGES["docs/results.md"].split("## How to read")[0]
    names = ("paper", "local", "cache")
    half = [{name: table_of(model)[name, 0.5] for name in names} for model in MODELS]
    for preset, pattern in (
        ("paper", r"perplexity is (\S+ to \S+) times dense's"),
        ("cache", r"at (\S+ to\s+\S+) times the dense perplexity"),
        ("local", r"reads a third, at (\S+ to \S+) times"),
    ):
        times = [table[preset][1] for table in half]
        assert says(re.search(pattern, findings)[1], min(times), max(times)), preset
    reads = {name: [table[name][2] for table in half] for name in names}
    assert all(0.55 < read < 0.58 for read in reads["cache"])
    assert all(0.3 < read < 0.36 for read in reads["local"])


def test_nothing_on_the_page_is_of_the_presets_before():
    """The raw files keep those figures, under a line that says so."""
    assert "†" not in PAGES["docs/results.md"] + README


def test_the_ratios_measured_are_the_raw_file_s():
    text = (HERE / "results" / "realised.txt").read_text(encoding="utf-8")
    raw = {}
    for line in text.splitlines()[2:]:
        preset, *columns = re.split(r"\s{2,}", line.strip())
        if len(columns) < 3:  # words between the rows
            continue
        threshold, asked, *shares = columns
        raw[preset, threshold, float(asked)] = [float(share) for share in shares]
    table = cells("docs/results.md", "| asked: 0.2 / 0.5 / 0.8 |")
    assert len(table) == 10
    for name, *row in table:
        preset, threshold = name.replace("`", "").split(", ")
        for i, cell in enumerate(row):
            shares = [raw[preset, threshold, asked][i] for asked in (0.2, 0.5, 0.8)]
            assert says(cell, *shares), (name, cell)


# ------------------------------------------------------------------------------- benchmarks

BENCHMARKS = (HERE / "results" / "benchmarks.txt").read_text(encoding="utf-8")
MEASURED_NOW, _, _ = BENCHMARKS.partition("\nWhat follows was measured")
TASKS = (
    "boolq",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "average",
    "mmlu",
)


def benchmarks():
    """1.5B: (setting, task) -> accuracy and the standard error of its difference from dense, in
    percent (None for dense); KV read; skipped.
    """
    found = {}
    line = re.compile(r"^(\S.*?) +(?:real_)?(\w+) +acc(?: of 7)? +(.*)", re.MULTILINE)
    for setting, task, columns in line.findall(MEASURED_NOW):
        values = [float(x) for x in columns.rstrip("%").split()]
        # accuracy, its error, then, but for dense, the difference and its error, and four shares
        error = None
        if len(values) == 8:
            error = 100 * values[3]
        skipped, _, read, _ = values[-4:]
        found[setting, task] = SimpleNamespace(
            accuracy=100 * values[0], error=error, read=read, skipped=skipped
        )
    return found


def test_readme_says_what_was_measured_at_the_largest_size():
    """Perplexity and accuracy, each with its KV read; errors of differences as they were paired."""
    perplexity = table_of("1.5B")
    raw = benchmarks()
    n_compared = 0
    for setting, *row in cells("README.md", "| | perplexity | seven tasks"):
        setting = setting.replace("`", "")
        name, prune = re.fullmatch(r"(.*?)(?: (0\.\d))?", setting).groups()
        times, *tasks = row
        value, _, read = perplexity[KEYS_ALONE.get(name, name), float(prune or 0)]
        assert says(times, *([value, read] if prune else [value])), setting
        for task, cell in zip(("average", "mmlu"), tasks, strict=True):
            if cell == "not run":
                continue
            found = raw[setting, task]
            figures = [found.accuracy]
            if prune:
                figures += [found.error, found.read]
            assert says(cell, *figures), (setting, cell)
            n_compared += 1
    assert n_compared >= 14


def test_every_benchmark_is_what_was_measured():
    raw = benchmarks()
    n_compared = 0
    for setting, *row in cells("docs/results.md", "| `--prune` | BoolQ"):
        name = re.sub("share skipped, |`|--", "", setting)
        for task, cell in zip(TASKS, row, strict=True):
            if not cell:
                continue
            found = raw[name, task]
            figure = found.skipped if setting.startswith("share skipped") else found.accuracy
            assert says(cell, figure), (setting, task)
            n_compared += 1
    assert n_compared >= 70


def test_every_difference_of_benchmarks_is_what_was_measured():
    """Each is one from dense, as printed."""
    line = r"^.* (?:average|real_mmlu) .* [+-](0\.\d+) +(0\.\d+) .*$"
    known = re.findall(line, MEASURED_NOW, re.MULTILINE)
    section = PAGES["docs/results.md"].split("## Benchmarks")[1]
    section = section.split("**Without any download**")[0]
    given = set(re.findall(r"\d+\.\d ± \d+\.\d", " ".join(section.split())))
    assert len(given) >= 10
    for difference in given:
        assert any(
            says(difference, 100 * float(change), 100 * float(error)) for change, error in known
        ), difference


def test_our_own_questions_are_answered_as_measured():
    raw = (HERE / "results" / "common_sense.txt").read_text(encoding="utf-8")
    lines = re.findall(
        r"^([\w ]+?(?: 0\.\d)?) +common_sense +acc +(0\.\d+) +(0\.\d+)", raw, re.MULTILINE
    )
    accuracy = {
        setting: (100 * float(value), 100 * float(error)) for setting, value, error in lines
    }
    text = " ".join(PAGES["docs/results.md"].split())
    answers, paper = re.search(
        r"answers (\S+% ± \S+) of them.*?it answers (.*?)% at 0\.1", text
    ).groups()
    assert says(answers, *accuracy["dense"])
    shown = paper.replace(",", " /").replace("and", "/")
    assert says(shown, *(accuracy[f"paper {p}"][0] for p in (0.1, 0.2, 0.3, 0.5)))
    for name in ("local", "keys alone"):
        assert all(accuracy[f"{name} {p}"] == accuracy["dense"] for p in (0.1, 0.2, 0.3, 0.5))


# ---------------------------------------------------------------------- speed and pass keys


def test_speed_on_a_cpu_says_what_was_measured():
    raw = (HERE / "results" / "bench-cpu.txt").read_text(encoding="utf-8")
    row = re.compile(r".{18}" + 3 * r" +\S+" + 3 * r" +(\S+) +\S+" + r" +(\S+)")
    for case, dense, *others in cells("docs/results.md", "| batch, context | dense, ms"):
        batch, context = case.split(", ")
        title = rf"^batch {batch}, context {context}\b.*\n.*\n"
        lines = re.search(title + r"((?:\S.*\n)+)", raw, re.MULTILINE)[1].splitlines()
        ms, ratio, bound, speed = zip(*(map(float, row.match(line).groups()) for line in lines))
        assert says(dense, ms[0], speed[0]), case
        for i, cell in enumerate(others, start=1):
            figures = [ratio[i], bound[i]] if "(" in cell else [ratio[i]]
            assert says(cell, *figures), (case, cell)
        if (batch, context) == ("32", "1024"):
            assert_readme_says("a step takes", ratio[1:4])


def assert_readme_says(words, ratios):
    """README gives the three presets' ratios behind these words."""
    prose = " ".join(README.split())
    figures = r" (\S+) \(`paper`\), (\S+) \(`local`\) and (\S+) \(keys alone\) times dense's"
    shown = re.search(words + figures, prose).groups()
    assert says(" / ".join(shown), *ratios)


def test_speed_on_a_gpu_says_what_was_measured():
    raw = (HERE / "results" / "bench-gpu.txt").read_text(encoding="utf-8")
    ratios = []
    for name, *row in cells("docs/results.md", "| | step, ms | x dense | bound"):
        setting = name.split(",")[0].strip("`").replace("keys alone", "cache")
        line = re.search(rf"^{setting}(?: 0\.5)? +(.*)$", raw, re.MULTILINE)[1]
        first, again, times, ms, _, ratio, _, bound, speed, _, cache, *_ = line.split()
        figures = [ms, ratio, bound, speed, float(cache) / 1000, first, again, times]
        for cell, figure in zip(row, figures, strict=True):
            assert says(cell, float(figure)), (name, cell)
        ratios.append(float(ratio))
    assert_readme_says("a decode step takes", ratios[1:4])


def test_pass_keys_are_those_found():
    found = {}
    line = re.compile(r"(dense|paper|local|cache) +(0\.\d+) +\d+ +(.*)")
    for text in (HERE / "results" / "passkey.txt").read_text(encoding="utf-8").splitlines():
        match = line.match(text)
        if match:
            setting = (match[1], float(match[2]))
            n_keys = sum(float(share) for share in match[3].split()[:5])
            found[setting] = found.get(setting, 0) + n_keys
    for name, dense, *row in cells("docs/results.md", "| pass keys found, of 15 |"):
        assert int(dense) == found["dense", 0]
        assert [int(n) for n in row] == [found[name, p] for p in (0.1, 0.2, 0.5)]
