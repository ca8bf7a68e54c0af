"""The benchmark's figures are what they say, and no hidden buffer is of dense size."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation import bench
import generate as generate_module
from evaluation.bench import SHAPES, main
from model import ModelConfig, Transformer
from test_generate import refused
from filter_config import PRESETS, preset

RUN = ["--device", "cpu", "--batch", "1", "3", "--context", "60", "--new-tokens", "4", "--repeat", "1"]


def test_figures(checkpoint, capsys, tmp_path):
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    main([str(checkpoint), *RUN, "--preset", "paper", "cache", "--prune", "0", "0.5", "--nothing-skipped",
          "--vs", "transformers", "--json", str(out), "--plot", str(picture)])  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    names = ["dense", "paper 0.5", "cache 0.5", "none skipped", "transformers"]
    assert [(row["batch"], row["setting"]) for row in rows] == [(batch, name) for batch in (1, 3) for name in names]
    weights = sum(p.numel() * 4 for p in generate_module.load(checkpoint, "cpu")[0].parameters())
    for row in rows:
        kv = 2 * 3 * 2 * 8 * 4  # K and V, layers, heads, head size, float32
        assert row["dense_bytes"] == row["batch"] * 67 * kv
        embedding = 4 * 32 * generate_module.load(checkpoint, "cpu")[0].config.vocab_size
        moved = weights - embedding
        assert row["bound"] == pytest.approx((moved + row["kv_read"] * row["dense_bytes"]) / (moved + row["dense_bytes"]))
        assert row["step_ms"] > 0 and row["prefill_ms"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["step_ms"] * 1000)
        assert (row["skipped"] > 0.2) == (row["setting"] in ("paper 0.5", "cache 0.5"))
        assert (row["kv_held"] < 1) == (row["kv_read"] < 1) == (row["setting"] in ("paper 0.5", "cache 0.5"))
        assert ("filter_share" in row) == (row["setting"] not in ("dense", "transformers"))
    assert rows[0]["step_ratio"] == rows[0]["prefill_ratio"] == 1
    assert rows[1]["live_bytes"] < rows[3]["live_bytes"]
    out = capsys.readouterr().out
    assert "KV held  KV read" in out and "none skipped" in out and picture.read_bytes()[1:4] == b"PNG"


def explained(text) -> list[str]:
    """The titles of columns that a text explains, in its order."""
    legend = text[text.index("columns (") :].splitlines()[1:]
    lines = [re.match(r"  (\S.*?) {2,}(\S.*)", line) for line in legend]
    return [line[1] for line in lines if line]


def test_every_column_has_a_legend_in_the_output_and_in_the_help(checkpoint, capsys):
    main([str(checkpoint), *RUN, "--batch", "1", "--preset", "cache"])
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if line.startswith("setting"))
    titles = explained(out)
    assert len(titles) == 18 and titles.pop() == "peak GB"  # of a GPU alone
    assert head.split() == " ".join(["setting", *titles]).split()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert explained(capsys.readouterr().out) == explained(out)


def test_one_of_a_thing_is_written_so(checkpoint, capsys, tmp_path):
    main([str(checkpoint), *RUN, "--batch", "3", "--new-tokens", "1", "--distinct", "1"])
    out = capsys.readouterr().out
    assert "1 decode step, 1 repetition, ours" in out and "(1 row prefilled and copied)" in out
    assert not re.search(r"\b1 (steps|decode steps|repetitions|rows|threads)\b", out)
    (tmp_path / "t.txt").write_text("t")
    flags = ["--device", "cpu", "--text", str(tmp_path / "t.txt")]
    said = refused(capsys, checkpoint, "--context", "60", *flags, command=main)
    assert said.endswith("ask for 81 tokens, and it has 1")


def test_stderr_is_our_own(checkpoint):
    """The profiler of torch, which measures what attention takes, writes nothing there."""
    flags = [*RUN, "--batch", "1", "--new-tokens", "1", "--preset", "cache"]
    command = [sys.executable, bench.__file__, str(checkpoint), *flags]
    folder = Path(bench.__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "attention" in done.stdout


@pytest.mark.parametrize("flags, message", [
    (["--context", "199"], "more than the model's context of 200"), (["--batch", "0"], "--batch"),
    (["--json", "no/such/folder/out.json"], "--json no/such/folder/out.json: cannot be written"), (["--seed", str(2**64)], "--seed"),
    (["--plot", "out.txt"], "--plot out.txt"),
    (["--text", "no/such/file"], "no/such/file"), (["--prune", "1"], "--prune: 1"), (["--shape", "gpt-2"], "--shape"),
])  # fmt: skip
def test_bad_flags(checkpoint, capsys, flags, message):
    assert message in refused(capsys, checkpoint, *flags, command=main)


@pytest.mark.parametrize("shape, billions", [
    ("llama-2-7b", 6.74), ("llama-2-13b", 13.02), ("llama-3-8b", 8.03), ("mistral-7b", 7.24), ("phi-4", 14.66),
])  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(shape, billions):
    with torch.device("meta"):
        model = Transformer(SHAPES[shape])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


class Largest(TorchDispatchMode):
    """The most bytes that any one new tensor took."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", PRESETS)
def test_memory_while_generating_follows_the_live_cache(name):
    """No tensor made on the way, in prefill or decode, is larger than the largest layer of the filtered cache."""
    config = ModelConfig(50, 32, 3, 4, 4, 64, 48, 10000.0, 1e-5, 4096, tied=False)
    model = Transformer(config).double().requires_grad_(False)
    filter = preset(name, prune=0.9, schedule="uniform")
    cache, tokens = model.new_cache(2, filter), torch.randint(0, 50, (2, 1600))
    with Largest() as largest:
        for start in range(0, 1500, 50):
            model(tokens[:, start : start + 50], cache, last=True)
        for t in range(1500, 1600):
            model(tokens[:, t : t + 1], cache, last=True)
    layer, dense = max(layer.kv.nbytes for layer in cache.layers), 2 * 2 * 4 * 1600 * 64 * 8
    chunk = 2 * 2 * 51 * 4 * 64 * 8  # K and V of 50 new tokens of two rows, and the anchors between them
    assert largest.nbytes <= layer + chunk < 0.3 * dense


def test_compiled_before_it_is_timed(checkpoint, capsys, tmp_path, monkeypatch):
    """Whatever the measured steps need is compiled before them, dense too; with a backend that runs a graph as it is."""
    compiled, while_timed, session = [], [], bench.session
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=lambda graph, _: compiled.append(graph) or graph))

    def watched(*args):
        pieces = session(*args)
        yield next(pieces)  # prefill and the steps that warm up
        while True:
            before, piece = len(compiled), next(pieces)
            while_timed.append(len(compiled) - before)
            yield piece

    monkeypatch.setattr(bench, "session", watched)
    torch.compiler.reset()
    out = tmp_path / "bench.json"
    main([str(checkpoint), "--device", "cpu", "--batch", "3", "--context", "60", "--new-tokens", "40", "--repeat", "1",
          "--preset", "local", "--compile", "--json", str(out)])  # fmt: skip
    assert not any(while_timed) and len(while_timed) == 2 * 41 and len(compiled) >= 3  # the trial, dense, and local
    assert "ours compiled" in capsys.readouterr().out
    dense, local = json.loads(out.read_text())["rows"]
    assert local["skipped"] > 0.2 and dense["kv_read"] == 1 > local["kv_read"]
    assert "filter_share" not in local  # inside the graph there is no stopwatch


def test_without_a_compiler_it_runs_uncompiled(checkpoint, capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("no C++\ncompiler\n\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    main([str(checkpoint), *RUN, "--preset", "cache", "--compile"])
    out, err = capsys.readouterr()
    assert "note: torch.compile does not work here, so nothing is compiled: no C++ compiler\n" in err.replace("\r", "\n")
    assert "ours eager" in out and "cache 0.5" in out


@pytest.mark.parametrize("window", [None, 32])
def test_random_weights_skip_what_is_asked(capsys, tmp_path, monkeypatch, window):
    """Beside transformers' model of the same shape; a window bounds what dense reads."""
    monkeypatch.setitem(SHAPES, "phi-4", ModelConfig(97, 32, 4, 4, 2, 8, 48, 10000.0, 1e-5, 1024, tied=False, window=window))
    out = tmp_path / "bench.json"
    main(["--shape", "phi-4", "--device", "cpu", "--batch", "4", "--context", "300", "--new-tokens", "4", "--repeat", "1",
          "--distinct", "2", "--preset", "cache", "--profile", "--vs", "transformers", "--json", str(out)])  # fmt: skip
    dense, cache, other = json.loads(out.read_text())["rows"]
    assert cache["skipped"] == pytest.approx(0.5 * (307 - 16) / 307, abs=0.04)
    assert dense["dense_bytes"] == cache["dense_bytes"] == 4 * 4 * (window or 307) * 2 * 2 * 8 * 4
    best = min(dense["step_ms"], other["step_ms"])
    assert cache["best_ratio"] == pytest.approx(cache["step_ms"] / best) and dense["first_prefill_ms"] > 0
    text = capsys.readouterr().out
    assert "verdicts drawn at the ratio" in text and "a decode step of cache 0.5" in text and "aten::" in text
