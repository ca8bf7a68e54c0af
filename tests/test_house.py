"""The order of the house: imports point one way, and flags are read before torch is imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import those that stand before it in its own chain and the ones named here, never the
# other way round. The library's chain, from the bottom to the top:
LIBRARY = (
    "filter_config",
    "token_filter",
    "kv_cache",
    "decode_attention",
    "model",
    "runtime",
    "loading",
    "load_weights",
    "generation",
)
# Then what commands share, and the commands.
COMMAND_PARTS = ("cli",)
COMMANDS = ("generate", "chat", "eval_ppl", "evaluation", "golden", "ports", "tools", "docs")
ORDER = (*LIBRARY, *COMMAND_PARTS, *COMMANDS)
# The one module of cli/ that the library may know: it says which of several processes this is.
RANKS = "cli.process"


def own_modules():
    """Each Python file of the project but its tests -> the name that it is imported by."""
    modules = {}
    for room in ORDER:
        for path in [ROOT / f"{room}.py", *sorted((ROOT / room).rglob("*.py"))]:
            if path.is_file():
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                modules[path] = name.removesuffix(".__init__")
    return modules


def imports(path, modules):
    """The project's own modules that a file imports, anywhere in it."""
    known = set(modules.values())
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found.update(name for name in names if name in known)
    return {name for name in found if name not in ROOMS_THEMSELVES}


ROOMS_THEMSELVES = {room for room in ORDER if (ROOT / room).is_dir()}
MODULES = own_modules()
GRAPH = {name: imports(path, MODULES) - {name} for path, name in MODULES.items()}


def test_the_files_are_found():
    assert {"model", "kv_cache", "cli.process", "loading.tokenizer"} <= set(GRAPH)
    assert "kv_cache" in GRAPH["model"] and "loading.tokenizer" in GRAPH["load_weights"]


@pytest.mark.parametrize("name", [name for name in GRAPH if name.split(".")[0] in LIBRARY])
def test_no_import_of_the_library_points_up(name):
    place = ORDER.index(name.split(".")[0])
    for other in GRAPH[name] - {RANKS}:
        assert ORDER.index(other.split(".")[0]) <= place, f"{name} imports {other}"


def test_the_core_knows_neither_ranks_nor_graphs():
    for name in ("filter_config", "token_filter", "kv_cache", "decode_attention", "model"):
        assert not [other for other in GRAPH[name] if other.startswith(("cli", "runtime"))]


def test_generate_does_not_import_chat_nor_a_command_a_command_it_is_not_built_on():
    assert "chat" not in GRAPH["generate"] and "generate" not in GRAPH["chat"]
    for name in GRAPH:
        if name.startswith("cli."):
            assert not [other for other in GRAPH[name] if other.split(".")[0] in COMMANDS], name


def test_no_circle():
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, [*above, name])
            done.add(name)

    for name in GRAPH:
        visit(name, [])


@pytest.mark.parametrize("command", ["generate.py", "chat.py"])
@pytest.mark.parametrize("flags", [["--help"], ["--prune", "2"], ["--no-such-flag"]], ids=str)
def test_flags_are_read_before_torch_is_imported(command, flags):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{command!r}, *{flags!r}]\n"
        "try:\n"
        f"    runpy.run_path({command!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('exit code', end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    expected = 0 if flags == ["--help"] else 2
    assert done.stdout.endswith(f"exit code {expected} False\n"), done.stdout + done.stderr


def test_the_root_holds_what_readers_came_for():
    files = {path.name for path in ROOT.glob("*.py")}
    assert len(files - {"conftest.py"}) <= 12
    cards = {"model.py", "token_filter.py", "generate.py", "load_weights.py", "eval_ppl.py"}
    assert cards | {"test_filter.py"} <= files
