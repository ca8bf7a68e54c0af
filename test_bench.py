"""The benchmark's figures are what they say, and no hidden buffer is of dense size."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import generate as generate_module
from bench import SHAPES, CompiledFilter, main
from model import ModelConfig, Transformer
from test_generate import refused
from test_model import small, texts
from token_filter import PRESETS, preset, token_filter

RUN = ["--device", "cpu", "--batch", "1", "3", "--context", "60", "--new-tokens", "4", "--repeat", "1"]


def test_figures(checkpoint, capsys, tmp_path):
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    main([str(checkpoint), *RUN, "--preset", "paper", "cache", "--prune", "0", "0.5", "--nothing-skipped",
          "--vs", "transformers", "--json", str(out), "--plot", str(picture)])  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    names = ["dense", "paper 0.5", "cache 0.5", "paper, none skipped", "transformers"]
    assert [(row["batch"], row["setting"]) for row in rows] == [(batch, name) for batch in (1, 3) for name in names]
    weights = sum(p.numel() * 4 for p in generate_module.load(checkpoint, "cpu")[0].parameters())
    for row in rows:
        kv = 2 * 3 * 2 * 8 * 4  # K and V, layers, heads, head size, float32
        assert row["dense_bytes"] == row["batch"] * 64 * kv
        embedding = 4 * 32 * generate_module.load(checkpoint, "cpu")[0].config.vocab_size
        moved = weights - embedding
        assert row["bound"] == pytest.approx((moved + row["live_bytes"]) / (moved + row["dense_bytes"]))
        assert row["step_ms"] > 0 and row["prefill_ms"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["step_ms"] * 1000)
        assert (row["skipped"] > 0.2) == (row["setting"] in ("paper 0.5", "cache 0.5"))
        assert ("filter_share" in row) == (row["setting"] not in ("dense", "transformers"))
    assert rows[0]["step_ratio"] == rows[0]["prefill_ratio"] == 1
    assert rows[1]["live_bytes"] < rows[3]["live_bytes"]
    assert "paper, none skipped" in capsys.readouterr().out and picture.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("flags, message", [
    (["--context", "199"], "more than the model's context of 200"), (["--batch", "0"], "--batch"),
    (["--shape", "llama-2-7b", "--vs", "transformers"], "--vs transformers needs a checkpoint"),
    (["--text", "no/such/file"], "no/such/file"), (["--prune", "1"], "prune=1.0"), (["--shape", "gpt-2"], "--shape"),
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
    """No tensor made on the way, in prefill or decode, is larger than the largest layer's K of the filtered cache."""
    config = ModelConfig(50, 32, 3, 4, 4, 64, 48, 10000.0, 1e-5, 4096, tied=False)
    model = Transformer(config).double().requires_grad_(False)
    filter = preset(name, prune=0.9, schedule="uniform")
    cache, tokens = model.new_cache(2, filter), torch.randint(0, 50, (2, 1600))
    with Largest() as largest:
        for start in range(0, 1500, 50):
            model(tokens[:, start : start + 50], cache, last=True)
        for t in range(1500, 1600):
            model(tokens[:, t : t + 1], cache, last=True)
    layer, dense = max(layer.k.nbytes for layer in cache.layers), 2 * 4 * 1600 * 64 * 8
    chunk = 2 * 2 * 51 * 4 * 64 * 8  # K and V of 50 new tokens of two rows, and the anchors between them
    assert largest.nbytes <= max(layer, chunk) < 0.4 * dense


def decode_both(filter, other):
    """The same texts decoded with token_filter and with another criterion."""
    model, results = small(), []
    for criterion in (token_filter, other):
        cache = model.new_cache(3, filter, criterion)
        logits = [model(texts()[:, :40], cache)] + [model(texts()[:, t : t + 1], cache) for t in range(40, 70)]
        results.append((torch.cat(logits, 1), torch.stack([layer.kept for layer in cache.layers])))
    return results


def test_compiled_filter_decides_alike(capsys):
    (a, kept_a), (b, kept_b) = decode_both(preset("anchored", prune=0.5), CompiledFilter())
    assert "compile failed" not in capsys.readouterr().err
    assert torch.equal(kept_a, kept_b)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_without_a_compiler_the_filter_runs_as_it_is(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    (a, _), (b, _) = decode_both(preset("paper", prune=0.5), CompiledFilter())
    assert torch.equal(a, b)
    assert capsys.readouterr().err == "note: torch.compile failed, the filter runs uncompiled: no C++ compiler\n"
