"""Flags are FilterConfig's fields, --help is at once, an error is one line, any stream will do."""

import argparse
import dataclasses
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import eval_ppl
import filter_config
import generate
from cli import arguments, process
from cli.arguments import Parser, add_filter_arguments, check_filter_arguments, filters_from
from filter_config import CHOICES, PRESETS, FilterConfig, preset

ROOT = Path(generate.__file__).parent
LONG = "the quick brown fox " * 3

# Texts that are not UTF-8. In UTF-16, ASCII letters are valid UTF-8 with zero bytes between them.
NOT_UTF_8 = [
    "A café?\n".encode("latin-1"),
    "A cup?\n".encode("utf-16"),
    "A cup?\n".encode("utf-16-le"),
    "A cup?\n".encode("utf-16-be"),
]


def refused(capsys, *flags, command=generate.main):
    """Run a command, which must print one error line, nothing on stdout, and exit with code 2.

    Returns the line.
    """
    with pytest.raises(SystemExit) as end:
        command([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    lines = err.replace("\r", "\n").split("\n")
    errors = [line for line in lines if line.startswith("error: ")]
    assert end.value.code == 2, (out, err)
    assert out == ""
    assert len(errors) == 1, err
    assert "Traceback" not in err
    return errors[0]


def run_file(name, *flags, **options):
    """Run one of the root's files as a process: what it printed, as text."""
    command = [sys.executable, str(ROOT / name), *(str(flag) for flag in flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


# ------------------------------------------------------------------------ --help and wrong flags


@pytest.mark.parametrize(
    "command",
    [
        "generate",
        "chat",
        "eval_ppl",
        "evaluation.passkey",
        "evaluation.tasks",
        "evaluation.rivals",
        "evaluation.bench",
        "tools.demo_checkpoint",
    ],
)
def test_help_says_something_of_every_argument(command, monkeypatch):
    if command == "evaluation.tasks":
        pytest.importorskip("lm_eval", reason="an extra: pip install -r requirements-extra.txt")
    parsers = []

    def parse_args(self, *_):
        parsers.append(self)
        sys.exit()

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse_args)
    with pytest.raises(SystemExit):
        importlib.import_module(command).main([])
    [parser] = parsers
    texts = [action.help for action in parser._actions]
    assert all(texts)
    assert len(set(texts)) == len(texts)  # each argument has its own
    parser.format_help()  # no text breaks argparse's formatting


@pytest.mark.parametrize("command", ["generate.py", "chat.py"])
@pytest.mark.parametrize(
    "flags, code",
    [
        (["--help"], 0),
        (["--nope"], 2),
        (["--prune", "50"], 2),
        (["--prune", "0", "--gamma", "0.5"], 2),
        (["--temperature", "-1"], 2),
        (["--seed", "3"], 2),
    ],
    ids=str,
)
def test_flags_are_answered_before_anything_slow_is_imported(command, flags, code):
    """Torch takes seconds, and NumPy and tqdm a part of one."""
    file = str(ROOT / command)
    program = (
        "import atexit, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "atexit.register(lambda: print(*sys.modules))\n"
        f"runpy.run_path({file!r}, run_name='__main__')\n"
    )
    run = [sys.executable, "-c", program, *flags]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    *printed, modules = done.stdout.splitlines()
    imported = set(modules.split())
    assert done.returncode == code, done.stderr
    assert "cli.arguments" in imported
    assert not {"torch", "numpy", "tqdm"} & imported
    if code == 0:
        assert printed[0].startswith("usage: ")
        assert done.stderr == ""
    else:
        assert printed == []
        assert re.fullmatch(r"error: .*\n", done.stderr)


@pytest.mark.parametrize("command", ["generate.py", "chat.py"])
def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(command, checkpoint, tmp_path):
    stand_in = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "torch.py").write_text(stand_in)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    flags = [checkpoint]
    if command == "generate.py":
        flags += ["--prompt", "a"]
    done = run_file(command, *flags, env=environment, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_process_itself_exits_with_2_and_no_traceback(tmp_path):
    folder = tmp_path / "nowhere"
    done = run_file("generate.py", folder, "--prompt", "a")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {folder}: no such folder\n"


# ----------------------------------------------------------------------------- the filter's flags


def filter_parser(read=arguments):
    """A parser with --prune and the filter's flags, as the functions of `read` make them."""
    parser = Parser()
    parser.add_argument("--prune", type=read.share)
    read.add_filter_arguments(parser)
    return parser


def test_the_flags_are_the_fields_of_filter_config():
    actions = {action.dest: action for action in filter_parser()._actions}
    names = [field.name for field in dataclasses.fields(FilterConfig)]
    assert list(actions) == ["help", "prune", "preset", *names[1:]]
    assert names[0] == "prune"
    assert list(actions["preset"].choices) == list(PRESETS)
    for field in dataclasses.fields(FilterConfig)[1:]:
        action = actions[field.name]
        assert action.help == f"{field.metadata['help']} [{field.default}]"
        assert action.default is None  # so a preset has the last word on what is not given
        if field.name in CHOICES:
            assert action.choices == CHOICES[field.name]


def test_a_new_field_of_filter_config_has_a_flag(monkeypatch):
    """In a copy with two more fields; nothing in cli/ knows them."""
    new_fields = [
        ("stride", int, filter_config.option(4, "how far to go", at_least=2)),
        ("slope", float, filter_config.option(1.5, "how steep", at_least=1, below=3)),
    ]
    extended = dataclasses.make_dataclass(
        "FilterConfig", new_fields, bases=(FilterConfig,), frozen=True
    )
    monkeypatch.setattr(filter_config, "FilterConfig", extended)
    read = argparse.Namespace(**runpy.run_path(arguments.__file__))
    parser = filter_parser(read)
    words = " ".join(parser.format_help().split())
    assert "--stride N how far to go [4]" in words
    assert "--slope X how steep [1.5]" in words

    args = parser.parse_args(["--prune", "0.5", "--preset", "cache", "--slope", "2"])
    [(label, config)] = read.filters_from(args, [args.preset], [args.prune])
    assert label == "cache, slope 2.0"
    assert (config.stride, config.slope, config.mode) == (4, 2.0, "cache")
    assert read.check_filter_arguments(args) == ["--preset", "--slope"]


@pytest.mark.parametrize("flags, message", [
    (["--stride", "1"], "1 is not a whole number of at least 2"),
    (["--slope", "0.5"], "0.5 is not a number in [1, 3)"),
])  # fmt: skip
def test_a_new_field_s_range_is_that_of_its_flag(monkeypatch, capsys, flags, message):
    new_fields = [
        ("stride", int, filter_config.option(4, "how far to go", at_least=2)),
        ("slope", float, filter_config.option(1.5, "how steep", at_least=1, below=3)),
    ]
    extended = dataclasses.make_dataclass(
        "FilterConfig", new_fields, bases=(FilterConfig,), frozen=True
    )
    monkeypatch.setattr(filter_config, "FilterConfig", extended)
    read = argparse.Namespace(**runpy.run_path(arguments.__file__))
    line = refused(capsys, *flags, command=filter_parser(read).parse_args)
    assert message in line


VALUES = ("-1", "-0.001", "0", "0.5", "0.999", "1", "2", "300", "NaN", "Infinity")
NUMBERS = [field.name for field in dataclasses.fields(FilterConfig) if field.name not in CHOICES]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_flag_takes_what_filter_config_takes(name, value, capsys):
    is_taken_by_config = True
    try:
        preset("paper", **{name: json.loads(value)})
    except ValueError:
        is_taken_by_config = False

    is_taken_by_flag = True
    try:
        filter_parser().parse_args([f"--{name}", value])
    except SystemExit:
        is_taken_by_flag = False
        assert f"--{name}: {value} is not a" in capsys.readouterr().err
    assert is_taken_by_flag == is_taken_by_config


def filters_of(flags, names, ratios, with_ratio=False):
    """(label, FilterConfig) of the settings that these flags ask for."""
    args = filter_parser().parse_args(flags.split())
    return filters_from(args, names, ratios, with_ratio)


def test_filters_of_names_ratios_and_flags(capsys):
    found = filters_of("--history 9", ["paper", "cache"], [0.5, 0, 0.25, 0.5], with_ratio=True)
    assert found == [
        ("paper 0.5, history 9", preset("paper", prune=0.5, history=9)),
        ("paper 0.25, history 9", preset("paper", prune=0.25, history=9)),
        ("cache 0.5, history 9", preset("cache", prune=0.5, history=9)),
        ("cache 0.25, history 9", preset("cache", prune=0.25, history=9)),
    ]
    assert capsys.readouterr().err == ""


def test_what_comes_out_equal_is_there_once(capsys):
    flags = "--mode local --recent 32 --schedule uniform"
    found = filters_of(flags, ["paper", "local"], [0.5])
    label = "paper, mode local, recent 32, schedule uniform"
    assert found == [(label, preset("local", prune=0.5))]
    assert capsys.readouterr().err == (
        f"note: at --prune 0.5, local is {label} again, and run once\n"
    )


def test_what_comes_out_equal_is_run_once(checkpoint, capsys, tmp_path):
    (tmp_path / "text").write_text(LONG * 3)
    flags = (
        "--preset paper local cache --mode local --recent 32 --schedule uniform --warmup 16 "
        "--fusion variance --keys rotated --prune 0.5 0.5 0.3 0 --window 64 --device cpu"
    )
    eval_ppl.main([str(checkpoint), "--text", str(tmp_path / "text"), *flags.split()])
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if line.startswith(("dense", *PRESETS))]
    labels = [re.split(r"  +", row)[0] for row in rows]
    assert labels == ["dense", *["paper, mode local, recent 32, schedule uniform"] * 2]
    assert "note: at --prune 0.5, local is paper, mode local, " in err
    assert err.count("note: ") == 4


@pytest.mark.parametrize("prune", ["--prune 0", ""])
@pytest.mark.parametrize("flag", ["--preset cache", "--history 9", "--keys unrotated"])
def test_flags_that_need_a_ratio(capsys, prune, flag):
    def command(flags):
        check_filter_arguments(filter_parser().parse_args(flags))

    name = flag.split()[0]
    line = refused(capsys, *flag.split(), *prune.split(), command=command)
    assert line == f"error: {name} does nothing without --prune above 0"


def test_several_presets_and_ratios():
    parser = Parser()
    parser.add_argument("--prune", type=arguments.share, nargs="+")
    add_filter_arguments(parser, several=True)
    args = parser.parse_args(["--prune", "0", "0.5", "--preset", "local", "cache"])
    assert args.preset == ["local", "cache"]
    assert check_filter_arguments(args) == ["--preset"]  # one of the ratios is above 0


# ------------------------------------------------------------------------------- files and ranks


@pytest.mark.parametrize("rank, expected", [(0, "out.json"), (1, None)])
def test_of_several_ranks_only_the_first_writes_files(monkeypatch, rank, expected):
    monkeypatch.setattr(arguments, "RANK", rank)
    parser = Parser()
    for flag in ("--json", "--csv", "--text"):
        parser.add_argument(flag)
    args = parser.parse_args(["--json", "out.json", "--text", "in.txt"])
    assert (args.json, args.csv, args.text) == (expected, None, "in.txt")


def test_single_process_only(monkeypatch, capsys):
    process.single_process_only(compile=True)
    monkeypatch.setattr(process, "N_RANKS", 2)
    process.single_process_only(compile=False, skip_map=None)
    with pytest.raises(SystemExit) as end:
        process.single_process_only(compile=False, skip_map="x.html")
    assert end.value.code == 2
    line = "error: --skip-map is for one process: leave it out, or torchrun\n"
    assert capsys.readouterr().err == line


# ----------------------------------------------------------------------- what is wrong, in a line


def test_a_message_is_one_line_that_no_terminal_obeys():
    assert process.one_line("a\n b\t c\x1b[31m \u202e é") == "a b c\\x1b[31m \\u202e é"


SHELL = (
    f"{shlex.quote(sys.executable)} {shlex.quote(generate.__file__)} CHECKPOINT "
    "--prompt hello --ignore-eos --max-new-tokens 40"
)
NO_SPACE = "error: cannot write or read: No space left on device"


@pytest.mark.parametrize(
    "command, code, prints, last_words",
    [
        (f"{SHELL} 2>&-", 0, True, ""),
        (f"{SHELL} 2>/dev/full", 0, True, ""),
        (f"{SHELL} >&-", 2, False, "error: stdout is closed"),
        (f"{SHELL} >/dev/full", 2, False, NO_SPACE),
        (f"{SHELL} --json >/dev/full", 2, False, NO_SPACE),
        (f"PYTHONIOENCODING=cp1252 {SHELL}", 0, True, "decode"),
        (f"PYTHONIOENCODING=ascii {SHELL} --json", 0, True, ""),
        (f"{SHELL} --prompt caf$'\\xe9'", 2, False, "error: --prompt is not UTF-8 text"),
        (f"{SHELL.replace('CHECKPOINT', '/none')} 2>&-", 2, False, ""),
        (f"{SHELL} | true", 0, False, ""),
    ],
)
def test_streams_and_encodings(checkpoint, command, code, prints, last_words):
    script = command.replace("CHECKPOINT", shlex.quote(str(checkpoint)))
    shell = ["bash", "-o", "pipefail", "-c", script]
    done = subprocess.run(shell, capture_output=True, check=False)
    lines = done.stderr.decode().replace("\r", "\n").splitlines()
    assert done.returncode == code, lines
    assert bool(done.stdout) == prints
    assert "Traceback" not in done.stderr.decode()
    if last_words:
        assert last_words in lines[-1]
    if "--json" in command and prints:
        assert json.loads(done.stdout)["prompts"] == ["hello"]


def test_progress_is_for_a_terminal(checkpoint):
    prompts = ["--prompt", "a", "--prompt", "b"]
    done = run_file("generate.py", checkpoint, *prompts, "--ignore-eos", "--max-new-tokens", 60)
    assert done.returncode == 0
    assert re.fullmatch(r"dense: prefill .*\n", done.stderr)
