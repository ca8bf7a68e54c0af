"""The benchmark's figures are what they say, and no hidden buffer is of dense size."""

import functools
import json
import re
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation import timing
from evaluation.bench import ROOT, SHAPES, main
from filter_config import PRESETS, preset
from load_weights import load
from model import ModelConfig, Transformer
from test_cli import refused
from token_filter import FilterState

RUN = ["--device", "cpu", "--batch", "1", "3", "--context", "60", "--new-tokens", "4"]
RUN += ["--repeat", "1"]
N_FED = 60 + timing.WARM_STEPS + 4  # tokens in a row's cache when its figures are taken


@pytest.fixture(scope="module")
def measured(checkpoint, tmp_path_factory):
    """The rows of a run with every kind of setting, and the picture of it."""
    folder = tmp_path_factory.mktemp("bench")
    flags = ["--preset", "paper", "cache", "--prune", "0", "0.5", "--nothing-skipped"]
    flags += ["--vs", "transformers"]
    flags += ["--json", str(folder / "bench.json"), "--plot", str(folder / "bench.png")]
    main([str(checkpoint), *RUN, *flags])
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    return rows, (folder / "bench.png").read_bytes()


def test_each_batch_has_a_row_for_each_setting(measured):
    rows, picture = measured
    names = ["dense", "paper 0.5", "cache 0.5", "none skipped", "transformers"]
    expected = [(batch, name) for batch in (1, 3) for name in names]
    assert [(row["batch"], row["setting"]) for row in rows] == expected
    assert picture[1:4] == b"PNG"


def test_times_and_their_ratios_belong_together(measured):
    rows, _ = measured
    for start in (0, 5):
        of_batch = rows[start : start + 5]
        dense = of_batch[0]
        best = min(dense["step_ms"], of_batch[4]["step_ms"])
        for row in of_batch:
            assert row["step_ms"] > 0
            assert row["prefill_ms"] > 0
            assert row["first_prefill_ms"] > 0
            expected = row["batch"] / row["step_ms"] * 1000
            assert row["tokens_per_second"] == pytest.approx(expected)
            assert row["step_ratio"] == pytest.approx(row["step_ms"] / dense["step_ms"])
            assert row["prefill_ratio"] == pytest.approx(row["prefill_ms"] / dense["prefill_ms"])
            assert row["best_ratio"] == pytest.approx(row["step_ms"] / best)


def test_bytes_are_those_of_weights_and_cache(measured, checkpoint):
    model, _ = load(checkpoint, "cpu")
    # Of the embedding, which is not tied, a step reads a few rows.
    weights = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes
    slot = 2 * 3 * 2 * 8 * 4  # K and V, layers, heads, head size, float32
    rows, _ = measured
    for row in rows:
        dense = row["batch"] * N_FED * slot
        assert row["dense_bytes"] == dense
        read = weights + row["kv_read"] * dense
        assert row["bound"] == pytest.approx(read / (weights + dense))
        assert row["bytes_per_second"] == pytest.approx(read / row["step_ms"] * 1000)
    assert rows[1]["live_bytes"] < rows[3]["live_bytes"]  # paper 0.5 and none skipped


def test_only_filters_that_skip_save_something(measured):
    for row in measured[0]:
        if row["setting"] in ("paper 0.5", "cache 0.5"):
            assert row["skipped"] > 0.2
            assert row["kv_held"] < 1
            assert row["kv_read"] < 1
        else:
            assert (row["skipped"], row["kv_held"], row["kv_read"]) == (0, 1, 1)
        has_filter = row["setting"] not in ("dense", "transformers")
        assert ("filter_share" in row) == has_filter


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
    assert len(titles) == 18
    assert titles.pop() == "peak GB"  # of a GPU alone
    assert head.split() == " ".join(["setting", *titles]).split()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert explained(capsys.readouterr().out) == explained(out)


def test_one_of_a_thing_is_written_so(checkpoint, capsys, tmp_path):
    main([str(checkpoint), *RUN, "--batch", "3", "--new-tokens", "1", "--distinct", "1"])
    out = capsys.readouterr().out
    assert "1 decode step, 1 repetition, ours" in out
    assert "(1 row prefilled and copied)" in out
    assert not re.search(r"\b1 (steps|decode steps|repetitions|rows|threads)\b", out)


def test_a_text_that_is_too_short_is_refused(checkpoint, capsys, tmp_path):
    (tmp_path / "t.txt").write_text("t")
    flags = ["--device", "cpu", "--text", str(tmp_path / "t.txt"), "--context", "60"]
    line = refused(capsys, checkpoint, *flags, command=main)
    assert line.endswith("ask for 81 tokens, and it has 1")


def test_stderr_is_our_own(checkpoint):
    """Torch's profiler, which measures what attention takes, writes nothing there."""
    flags = [*RUN, "--batch", "1", "--new-tokens", "1", "--preset", "cache"]
    command = [sys.executable, "-m", "evaluation.bench", str(checkpoint), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "attention" in done.stdout


BAD_FLAGS = {
    "more than the context": (["--context", "199"], "more than the model's context of 200"),
    "no row": (["--batch", "0"], "--batch"),
    "no folder for the figures": (
        ["--json", "no/such/folder/out.json"],
        "--json no/such/folder/out.json: cannot be written",
    ),
    "seed of 65 bits": (["--seed", str(2**64)], "--seed"),
    "no picture": (["--plot", "out.txt"], "--plot out.txt"),
    "no text": (["--text", "no/such/file"], "no/such/file"),
    "more than all": (["--prune", "1"], "--prune: 1"),
    "unknown shape": (["--shape", "gpt-2"], "--shape"),
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_end_in_one_line(checkpoint, capsys, flags, message):
    assert message in refused(capsys, checkpoint, *flags, command=main)


BILLIONS = {
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.02,
    "llama-3-8b": 8.03,
    "mistral-7b": 7.24,
    "phi-4": 14.66,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_the_published_number_of_parameters(shape):
    with torch.device("meta"):
        model = Transformer(SHAPES[shape])
    n_parameters = sum(p.numel() for p in model.parameters())
    assert n_parameters / 1e9 == pytest.approx(BILLIONS[shape], abs=0.005)


class Largest(TorchDispatchMode):
    """The most bytes that any one new tensor took."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        several = isinstance(result, tuple | list)
        for t in result if several else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", PRESETS)
def test_memory_while_generating_follows_the_live_cache(name):
    """No new tensor, in prefill or decode, is larger than the filtered cache's largest layer."""
    B, KVH, D = 2, 4, 64
    config = ModelConfig(50, 32, 3, 4, KVH, D, 48, 10000.0, 1e-5, 4096, tied=False)
    model = Transformer(config).double().requires_grad_(False)
    cache = model.new_cache(B, preset(name, prune=0.9, schedule="uniform"))
    tokens = torch.randint(0, 50, (B, 1600))
    with Largest() as largest:
        for start in range(0, 1500, 50):
            model(tokens[:, start : start + 50], cache, last=True)
        for t in range(1500, 1600):
            model(tokens[:, t : t + 1], cache, last=True)

    layer = max(layer.kv.nbytes for layer in cache.layers)
    token = 2 * B * KVH * D * 8  # K and V in float64
    chunk = 51 * token  # of 50 new tokens, and the running averages before, between and after them
    assert largest.nbytes <= layer + chunk < 0.3 * 1600 * token


def test_all_is_compiled_before_it_is_timed(checkpoint, capsys, tmp_path, monkeypatch):
    """Dense too. The backend runs a graph as it is."""
    compiled = []
    compiled_while_timed = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    timed_run = timing.timed_run

    def watched(*args):
        pieces = timed_run(*args)
        yield next(pieces)  # prefill and the warm steps
        while True:
            before = len(compiled)
            piece = next(pieces)
            compiled_while_timed.append(len(compiled) - before)
            yield piece

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(timing, "timed_run", watched)
    torch.compiler.reset()
    out = tmp_path / "bench.json"
    flags = ["--batch", "3", "--context", "60", "--new-tokens", "40", "--repeat", "1"]
    flags += ["--preset", "local", "--compile", "--json", str(out)]
    main([str(checkpoint), "--device", "cpu", *flags])
    assert compiled_while_timed == [0] * 2 * 41
    assert len(compiled) >= 3  # the trial, dense, and local
    assert "ours compiled" in capsys.readouterr().out

    dense, local = json.loads(out.read_text())["rows"]
    assert local["skipped"] > 0.2
    assert local["kv_read"] < dense["kv_read"] == 1
    assert "filter_share" not in local  # inside the graph there is no stopwatch


def test_without_a_compiler_it_runs_uncompiled(checkpoint, capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("no C++\ncompiler\n\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    main([str(checkpoint), *RUN, "--preset", "cache", "--compile"])
    out, err = capsys.readouterr()
    note = "note: torch.compile does not work here, so nothing is compiled: no C++ compiler\n"
    assert note in err.replace("\r", "\n")
    assert "ours eager" in out
    assert "cache 0.5" in out


def test_drawn_decisions_are_at_the_ratio_whatever_the_filter_finds():
    """Zeros tie, so the filter finds nothing redundant. Chunks and neighbours change nothing."""
    config = preset("cache")
    k = torch.zeros(2, 500, 2, 8)
    state = FilterState(2, 2, 8, config, 3, torch.float32, "cpu")
    whole, _ = timing.drawn_at_ratio(k, k, torch.tensor([500, 300]), state, 0.3, config, k)
    assert not whole[:, :16].any()  # the warm-up
    assert not whole[1, 300:].any()  # padding
    assert whole[0, 16:].double().mean() == pytest.approx(0.3, abs=0.06)

    state = FilterState(2, 2, 8, config, 3, torch.float32, "cpu")
    pieces = []
    for part in k[:, :300].split([250, *[1] * 50], dim=1):
        lengths = None if part.shape[1] == 1 else torch.tensor([250, 250])
        redundant, _ = timing.drawn_at_ratio(part, part, lengths, state, 0.3, config, part)
        pieces.append(redundant)
    assert torch.equal(torch.cat(pieces, dim=1), whole[:, :300])
    assert not torch.equal(whole[0, :300], whole[1, :300])


@pytest.mark.parametrize("window", [None, 32])
def test_random_weights_skip_what_is_asked(capsys, tmp_path, monkeypatch, window):
    """Beside transformers' model of the same shape; a window bounds what dense reads."""
    shape = ModelConfig(97, 32, 4, 4, 2, 8, 48, 10000.0, 1e-5, 1024, tied=False, window=window)
    monkeypatch.setitem(SHAPES, "phi-4", shape)
    out = tmp_path / "bench.json"
    flags = ["--batch", "4", "--context", "300", "--new-tokens", "4", "--repeat", "1"]
    flags += ["--distinct", "2", "--preset", "cache", "--profile", "--vs", "transformers"]
    main(["--shape", "phi-4", "--device", "cpu", *flags, "--json", str(out)])
    dense, cache, other = json.loads(out.read_text())["rows"]
    assert cache["skipped"] == pytest.approx(0.5 * (307 - 16) / 307, abs=0.04)
    slot = 4 * 2 * 2 * 8 * 4  # layers, K and V, heads, head size, float32
    assert dense["dense_bytes"] == cache["dense_bytes"] == 4 * (window or 307) * slot
    assert other["setting"] == "transformers"
    text = capsys.readouterr().out
    assert "verdicts drawn at the ratio" in text
    assert "a decode step of cache 0.5" in text
    assert "aten::" in text
