"""What transformers saves is what load_weights loads; texts survive the tokenizers; bad input is named in one line."""

import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as JsonTokenizer

from load_weights import (
    CheckpointError,
    Tokenizer,
    load,
    load_model,
    read_config,
    stored_name,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def save_model(folder, family="llama", dtype=torch.float32, max_shard_size="1GB", **changes):
    """A random model with grouped queries, every number different, saved by transformers in `folder`; returns it."""
    config = {
        "vocab_size": 70,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,  # not width / heads
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **changes,
    }
    torch.manual_seed(0)
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    else:
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def edit_json(path, **changes):
    """Set keys of a JSON file's object; ... deletes one."""
    path = Path(path)
    values = json.loads(path.read_text()) if path.exists() else {}
    values = {key: value for key, value in (values | changes).items() if value is not ...}
    path.write_text(json.dumps(values))


def edit_tensors(path, **changes):
    """Replace or add tensors of a safetensors file; None deletes one."""
    tensors = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = load_file(path) | tensors
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata={"format": "pt"})


def fails(function, *arguments, **more):
    """The one-line message of the CheckpointError that a call must raise."""
    with pytest.raises(CheckpointError) as caught:
        function(*arguments, **more)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def assert_same_weights(ours, theirs, dtype=torch.float32):
    pairs = [(ours.embed, theirs.model.embed_tokens), (ours.norm, theirs.model.norm), (ours.head, theirs.lm_head)]
    for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        pairs += [
            (block.attn_norm, layer.input_layernorm),
            (block.attn.q, layer.self_attn.q_proj),
            (block.attn.k, layer.self_attn.k_proj),
            (block.attn.v, layer.self_attn.v_proj),
            (block.attn.o, layer.self_attn.o_proj),
            (block.mlp_norm, layer.post_attention_layernorm),
            (block.mlp.gate, layer.mlp.gate_proj),
            (block.mlp.up, layer.mlp.up_proj),
            (block.mlp.down, layer.mlp.down_proj),
        ]
    for mine, reference in pairs:
        assert mine.weight.dtype == dtype
        assert torch.equal(mine.weight, reference.weight.to(dtype))
    assert {id(parameter) for parameter in ours.parameters()} == {id(mine.weight) for mine, _ in pairs}  # nothing else


# --------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
def test_loads_exactly_what_transformers_saved(tmp_path, family, tied, max_shard_size):
    reference = save_model(tmp_path, family, max_shard_size=max_shard_size, tie_word_embeddings=tied)
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards > 3 if max_shard_size == "10KB" else shards == 1
    model = load_model(tmp_path, device="cpu")
    assert_same_weights(model, reference)
    assert (model.head.weight is model.embed.weight) == tied
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_weights_do_not_depend_on_the_file_afterwards(tmp_path):
    reference = save_model(tmp_path)
    model = load_model(tmp_path, device="cpu")
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as raw:
        raw.write(bytes(file.stat().st_size))  # in place: a view of the mapped file would turn to zeros
    assert_same_weights(model, reference)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["auto", "bfloat16", torch.float64, torch.float16])
def test_dtypes(tmp_path, stored, wanted):
    reference = save_model(tmp_path, dtype=stored)
    expected = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(wanted, wanted)  # auto: float32 on the CPU
    assert_same_weights(load_model(tmp_path, device="cpu", dtype=wanted), reference, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_on_cuda_keeps_the_stored_dtype(tmp_path):
    reference = save_model(tmp_path, dtype=torch.bfloat16)
    model = load_model(tmp_path)
    assert model.embed.weight.is_cuda
    assert_same_weights(model.cpu(), reference, torch.bfloat16)


def test_config_of_llama(tmp_path):
    save_model(tmp_path, rope_parameters={"rope_theta": 5e5, **LLAMA3}, tie_word_embeddings=True)
    config = read_config(tmp_path)
    assert (config.vocab_size, config.width, config.mlp_width, config.n_layers) == (70, 24, 40, 3)
    assert (config.heads, config.kv_heads, config.head_dim, config.max_positions) == (4, 2, 10, 128)
    assert (config.rope_theta, config.norm_eps, config.tied, config.window) == (5e5, 1e-5, True, None)
    assert config.rope_scaling == {key: value for key, value in LLAMA3.items() if key != "rope_type"}


@pytest.mark.parametrize("window", [16, None])
def test_sliding_window_of_mistral(tmp_path, window):
    save_model(tmp_path, "mistral", sliding_window=window)
    assert read_config(tmp_path).window == window


def test_sliding_window_is_mistrals_alone(tmp_path):
    save_model(tmp_path)
    edit_json(tmp_path / "config.json", sliding_window=16)
    assert read_config(tmp_path).window is None
    edit_json(tmp_path / "config.json", model_type="mistral", sliding_window=...)
    assert read_config(tmp_path).window == transformers.MistralConfig().sliding_window


@pytest.mark.parametrize(
    "old_style, theta, scaled",
    [
        ({}, 10000.0, False),
        ({"rope_theta": None, "rope_scaling": None}, 10000.0, False),
        ({"rope_theta": 500000}, 500000.0, False),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5, False),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, True),
        ({"rope_scaling": {**LLAMA3, "rope_type": ..., "type": "llama3"}}, 10000.0, True),
    ],
)
def test_old_style_rope_settings(tmp_path, old_style, theta, scaled):
    save_model(tmp_path)
    if isinstance(scaling := old_style.get("rope_scaling"), dict):
        old_style["rope_scaling"] = {key: value for key, value in scaling.items() if value is not ...}
    edit_json(tmp_path / "config.json", rope_parameters=..., **old_style)
    config = read_config(tmp_path)
    assert config.rope_theta == theta and type(config.rope_theta) is float
    assert (config.rope_scaling or {}).get("factor") == (8.0 if scaled else None)


def test_defaults_of_missing_sizes(tmp_path):
    save_model(tmp_path)
    edit_json(tmp_path / "config.json", num_key_value_heads=..., head_dim=None)
    config = read_config(tmp_path)
    assert (config.kv_heads, config.head_dim) == (4, 6)


def test_old_rope_frequencies_in_the_file_are_ignored(tmp_path):
    reference = save_model(tmp_path)
    name = "model__layers__0__self_attn__rotary_emb__inv_freq"
    edit_tensors(tmp_path / "model.safetensors", **{name: torch.ones(5)})
    assert_same_weights(load_model(tmp_path, device="cpu"), reference)


def test_tied_weights_may_be_stored_twice_but_not_differ(tmp_path):
    save_model(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    embedding = load_file(file)["model.embed_tokens.weight"]
    edit_tensors(file, lm_head__weight=embedding.clone())
    assert torch.equal(load_model(tmp_path, device="cpu").head.weight, embedding)
    embedding[69, 23] += 1e-3
    edit_tensors(file, lm_head__weight=embedding)
    assert "'lm_head.weight' differs" in fails(load_model, tmp_path)


def test_progress_goes_to_stderr(tmp_path, capfd):
    save_model(tmp_path)
    capfd.readouterr()
    load_model(tmp_path, device="cpu")
    assert capfd.readouterr() == ("", "")
    load_model(tmp_path, device="cpu", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "30/30" in err


# --------------------------------------------------------------------------------------------------- bad checkpoints


def test_missing_folder_and_files(tmp_path):
    assert fails(load, tmp_path / "none") == f"{tmp_path}/none: no such folder"
    assert "no such folder" in fails(load, "x" * 300)
    assert fails(load, tmp_path) == f"{tmp_path}/config.json: no such file"
    save_model(tmp_path)
    assert fails(load, tmp_path) == f"{tmp_path}: has no tokenizer.json and no tokenizer.model"
    (tmp_path / "model.safetensors").rename(tmp_path / "other")
    assert "model.safetensors: no such file" in fails(load_model, tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    message = fails(load_model, tmp_path)
    assert "pytorch_model.bin" in message and "convert the weights to safetensors" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\ufeff{}", b"\xff\xfe"])
def test_config_is_not_a_json_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert fails(read_config, tmp_path).startswith(f"{tmp_path}/config.json: ")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported (supported: llama, mistral)"),
        ({"model_type": ...}, "model_type is missing"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": ..., "rope_scaling": {"factor": 2.0}}, "rope_scaling has the rope type"),
        ({"rope_parameters": {**LLAMA3, "factor": None}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": {**LLAMA3, "factor": -8}}, "rope_parameters.factor"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor is not below"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_parameters.rope_theta"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": -24}, "hidden_size is -24"),
        ({"hidden_size": 24.0}, "hidden_size is 24.0"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 25, "head_dim": None}, "does not divide hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"rms_norm_eps": ...}, "rms_norm_eps is missing"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_config_with_a_bad_value(tmp_path, changes, words):
    save_model(tmp_path)
    read_config(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    message = fails(load_model, tmp_path)
    assert message.startswith(f"{tmp_path}/config.json: ") and words in message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__norm__weight": None}, "the tensor 'model.norm.weight' is missing"),
        ({"lm_head__weight": None}, "the tensor 'lm_head.weight' is missing"),
        ({"model__layers__0__self_attn__q_proj__bias": torch.ones(40)}, "q_proj.bias' is not part of the model"),
        ({"model__layers__3__input_layernorm__weight": torch.ones(24)}, "layers.3.input_layernorm.weight' is not part"),
        ({"model__norm__weight": torch.ones(25)}, "'model.norm.weight' has the shape [25], config.json asks for [24]"),
        ({"model__layers__1__mlp__up_proj__weight": torch.ones(24, 40)}, "has the shape [24, 40]"),
        ({"model__norm__weight": torch.ones(24, dtype=torch.int64)}, "'model.norm.weight' has the dtype I64"),
        ({"model__norm__weight": torch.ones(24).to(torch.float8_e4m3fn)}, "'model.norm.weight' has the dtype F8_E4M3"),
        ({"model__norm__weight": torch.tensor([float("nan")] + 23 * [1.0])}, "'model.norm.weight' has values that"),
        ({"model__norm__weight": torch.tensor([float("inf")] + 23 * [1.0])}, "'model.norm.weight' has values that"),
        ({"model__norm__weight": torch.tensor(23 * [1.0] + [float("-inf")])}, "'model.norm.weight' has values that"),
    ],
)
def test_bad_tensors(tmp_path, changes, words):
    save_model(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", **changes)
    message = fails(load_model, tmp_path, device="cpu")
    assert message.startswith(f"{tmp_path}/model.safetensors: ") and words in message


def test_weights_that_the_wanted_dtype_cannot_hold(tmp_path):
    save_model(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", model__norm__weight=torch.full((24,), 1e6))
    load_model(tmp_path, device="cpu")
    message = fails(load_model, tmp_path, device="cpu", dtype="float16")
    assert "model.norm.weight" in message and "stored as F32, loaded as torch.float16" in message


@pytest.mark.parametrize("damage", ["truncated", "header only", "empty", "not safetensors", "huge header", "folder"])
def test_damaged_safetensors(tmp_path, damage):
    save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(
            {
                "truncated": data[:-1],
                "header only": data[: 8 + int.from_bytes(data[:8], "little")],
                "empty": b"",
                "not safetensors": b"PK\x03\x04" + bytes(1000),
                "huge header": b"\xff" * 1000,
            }[damage]
        )
    assert fails(load_model, tmp_path).startswith(f"{file}: cannot be read as safetensors")


def test_bad_shards(tmp_path):
    save_model(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    original = index.read_text()
    weight_map = json.loads(original)["weight_map"]
    norm_file = weight_map["model.norm.weight"]
    other = next(file for file in weight_map.values() if file != norm_file)

    for bad in ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b.safetensors", "x.bin", 7]:
        edit_json(index, weight_map=weight_map | {"model.norm.weight": bad})
        message = fails(load_model, tmp_path)
        assert message.startswith(f"{index}: the tensor 'model.norm.weight' is put in {bad!r}")
    edit_json(index, weight_map=weight_map | {"model.norm.weight": other})
    assert f"{norm_file}: holds the tensor 'model.norm.weight', unlike" in fails(load_model, tmp_path)
    edit_json(index, weight_map={k: v for k, v in weight_map.items() if k != "model.norm.weight"})
    assert f"{norm_file}: holds the tensor 'model.norm.weight', unlike" in fails(load_model, tmp_path)
    edit_json(index, weight_map=weight_map | {"model.norm2.weight": norm_file})
    assert f"{norm_file}: the tensor 'model.norm2.weight' is missing, though" in fails(load_model, tmp_path)
    for nonsense in ({}, []):
        index.write_text(json.dumps(nonsense))
        assert fails(load_model, tmp_path).startswith(f"{index}: ")
    index.write_text(json.dumps({"weight_map": {}}))
    assert "is missing" in fails(load_model, tmp_path)

    index.write_text(original)
    edit_tensors(tmp_path / norm_file, model__norm__weight=None)
    assert f"{norm_file}: the tensor 'model.norm.weight' is missing" in fails(load_model, tmp_path)
    (tmp_path / norm_file).unlink()
    assert fails(load_model, tmp_path) == f"{tmp_path}/{norm_file}: no such file"


def test_missing_shard_is_reported_before_any_weight_is_read(tmp_path, monkeypatch):
    save_model(tmp_path, max_shard_size="10KB")
    max(tmp_path.glob("*.safetensors")).unlink()
    monkeypatch.setattr("load_weights._read", lambda *_: pytest.fail("a weight was read"))
    assert "no such file" in fails(load_model, tmp_path)


def test_bad_device_and_dtype(tmp_path):
    save_model(tmp_path)
    assert "device 'nonsense'" in fails(load_model, tmp_path, device="nonsense")
    assert "int8" in fails(load_model, tmp_path, device="cpu", dtype="int8")
    assert "int32" in fails(load_model, tmp_path, device="cpu", dtype=torch.int32)
    if not torch.cuda.is_available():
        assert "device 'cuda'" in fails(load_model, tmp_path, device="cuda")


def test_stored_name():
    assert stored_name("blocks.11.attn.q.weight") == "model.layers.11.self_attn.q_proj.weight"
    assert stored_name("head.weight") == "lm_head.weight"


# --------------------------------------------------------------------------------------------------------- tokenizers

TRICKY = [
    "",
    " ",
    "hello world",
    " two  leading  and trailing ",
    "line\n\n\ttab\r\n",
    "naïve café — “quotes” …",
    "日本語とעברית",
    "👩‍👩‍👧 flags 🇫🇷🇫🇷 \U0001f9ff",
    "e\u0301 combining",
    "0123456789 3.14",
    "<s> </s> <|end|> <unk> <0xE2>",
    "\ufffd replacement \ufffd",
    "hello ▁ world",
]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "token", "filter", "hello", "world", "prune", "of", "and", "to"]


def train_sentencepiece(remove_extra_whitespaces=False):
    random.seed(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(random.choices(WORDS, k=8)) for _ in range(500)),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=remove_extra_whitespaces,
        minloglevel=2,
    )
    return model.getvalue()


def byte_fallback_json(model):
    """The same BPE as a tokenizer.json, in the way that LLaMA-2's is written."""
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:  # learnt first, merged first
        if len(piece) > 1 and not model.is_byte(vocab[piece]) and not model.is_control(vocab[piece]):
            halves = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
            merges += [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
    tokenizer = JsonTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level_json():
    """GPT-2's kind: every byte is a letter of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "he", "ll", "Ġw", "Ċ<"])}
    tokenizer = JsonTokenizer(models.BPE(vocab, [("h", "e"), ("l", "l"), ("Ġ", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])  # ids 260, 261
    tokenizer.add_tokens(["<think>"])  # 262, not special: it is text
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each kind of tokenizer."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("sentencepiece", "byte-fallback", "byte-level")}
    proto = train_sentencepiece()
    (made["sentencepiece"] / "tokenizer.model").write_bytes(proto)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    byte_fallback_json(model).save(str(made["byte-fallback"] / "tokenizer.json"))
    edit_json(made["byte-fallback"] / "tokenizer_config.json", bos_token="<s>", eos_token="</s>")
    byte_level_json().save(str(made["byte-level"] / "tokenizer.json"))
    edit_json(
        made["byte-level"] / "tokenizer_config.json",
        bos_token="<|start|>",
        eos_token="<|end|>",
        tokenizer_class="PreTrainedTokenizerFast",
    )
    return made


@pytest.fixture(params=["sentencepiece", "byte-fallback", "byte-level"])
def kind(request):
    return request.param


@pytest.fixture
def folder(folders, kind, tmp_path):
    """A copy of a kind's folder, to be changed at will."""
    return shutil.copytree(folders[kind], tmp_path / kind)


@pytest.mark.parametrize("text", TRICKY)
def test_text_survives(folders, kind, text):
    tokenizer = Tokenizer(folders[kind])
    expected = text if kind == "byte-level" else text.replace("▁", " ")  # SentencePiece's sign for a space
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_sentencepiece_and_its_tokenizer_json_agree(folders):
    ours, reference = Tokenizer(folders["byte-fallback"]), Tokenizer(folders["sentencepiece"])
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (reference.bos_id, reference.eos_ids, reference.vocab_size)
    for text in TRICKY[1:]:
        assert ours.encode(text) == reference.encode(text)
    conversation = "<s>the cat</s><s> sat"
    assert ours.encode(conversation, bos=False, parse_special=True) == reference.encode(
        conversation, bos=False, parse_special=True
    )


@pytest.mark.parametrize("kind", ["byte-fallback", "byte-level"])
def test_same_ids_as_transformers(folders, kind):
    ours, reference = Tokenizer(folders[kind]), transformers.AutoTokenizer.from_pretrained(folders[kind])
    for text in TRICKY:
        ids = ours.encode(text, bos=False)
        assert ids == reference(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text, bos=False, parse_special=True) == reference(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_parsed_only_on_request_and_never_shown(folders, kind):
    tokenizer = Tokenizer(folders[kind])
    names = ("<|start|>", "<|end|>") if kind == "byte-level" else ("<s>", "</s>")
    bos, eos = tokenizer.bos_id, min(tokenizer.eos_ids)
    ids = tokenizer.encode(f"{names[0]}hello{names[1]}", bos=False, parse_special=True)
    assert (ids[0], ids[-1]) == (bos, eos) and tokenizer.decode(ids) == "hello"
    ids = tokenizer.encode(f"{names[0]}hello{names[1]}", bos=False)
    assert bos not in ids and eos not in ids and tokenizer.decode(ids) == f"{names[0]}hello{names[1]}"
    assert tokenizer.decode([bos, *tokenizer.encode("a b", bos=False), eos, 10**6, -1]) == "a b"


def test_bos(folders):
    sentence, json_says, nothing_says = (
        Tokenizer(folders[kind]) for kind in ("sentencepiece", "byte-fallback", "byte-level")
    )
    assert sentence.encode("a")[0] == 1 == json_says.encode("a")[0]
    assert nothing_says.encode("a") == nothing_says.encode("a", bos=False)
    assert nothing_says.encode("a", bos=True) == [260, *nothing_says.encode("a")]
    assert 1 not in sentence.encode("a", bos=False) + json_says.encode("a", bos=False)


def test_tokenizer_config_has_the_last_word_on_bos(folder):
    for wish in (True, False):
        edit_json(folder / "tokenizer_config.json", add_bos_token=wish)
        tokenizer = Tokenizer(folder)
        assert (tokenizer.encode("a")[0] == tokenizer.bos_id) == wish


def test_eos_ids_come_from_the_first_file_that_has_any(folder):
    (own,) = Tokenizer(folder).eos_ids
    name = {2: "</s>", 261: "<|end|>"}[own]
    edit_json(folder / "tokenizer_config.json", eos_token={"content": name, "__type": "AddedToken"})
    assert Tokenizer(folder).eos_ids == {own}
    edit_json(folder / "config.json", eos_token_id=None)
    assert Tokenizer(folder).eos_ids == {own}
    edit_json(folder / "config.json", eos_token_id=7)
    assert Tokenizer(folder).eos_ids == {7}
    edit_json(folder / "generation_config.json", bos_token_id=1)
    assert Tokenizer(folder).eos_ids == {7}
    edit_json(folder / "generation_config.json", eos_token_id=[8, 9])
    assert Tokenizer(folder).eos_ids == {8, 9}


def test_tokenizer_json_is_preferred_and_never_truncates(folders, tmp_path):
    tokenizer = byte_level_json()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes((folders["sentencepiece"] / "tokenizer.model").read_bytes())
    assert len(Tokenizer(tmp_path).encode("abcdefgh", bos=False)) == 8


def test_tokens_added_to_a_sentencepiece_model(folders, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folders["sentencepiece"] / "tokenizer.model").read_bytes())
    size = Tokenizer(tmp_path).vocab_size
    described = {"1": {"content": "<s>"}, str(size): {"content": "<|im_start|>"}}
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=described, eos_token="<|im_end|>")
    edit_json(tmp_path / "added_tokens.json", **{"<|im_start|>": size, "<|im_end|>": size + 1, "<|im": size + 2})
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (size + 3, {size + 1})
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>", parse_special=True)
    assert ids == [1, size, *tokenizer.encode("hello", bos=False), size + 1]
    assert tokenizer.decode(ids) == "hello"
    for bad in ({"x": {"content": "y"}}, {"400": "y"}, {"400": {}}, [], 5):
        edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=bad)
        assert "added" in fails(Tokenizer, tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=None)
    edit_json(tmp_path / "added_tokens.json", **{"<|im_end|>": float("inf")})
    assert "added tokens" in fails(Tokenizer, tmp_path)


def test_streaming_equals_decoding_at_once(folders, kind):
    check_streaming(Tokenizer(folders[kind]))


def test_streaming_where_all_leading_spaces_are_dropped(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(remove_extra_whitespaces=True))
    tokenizer = Tokenizer(tmp_path)
    (cat,), (space, _) = tokenizer.encode("cat", bos=False), tokenizer.encode("é", bos=False)[:2]
    assert tokenizer.decode([space, space, cat, space, space, cat]) == "cat   cat"
    check_streaming(tokenizer, [space, space, cat, space, space, cat])


def check_streaming(tokenizer, ids=()):

    def check(ids):
        stream = tokenizer.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
        return pieces

    check(ids)
    for text in TRICKY:
        ids = tokenizer.encode(text)
        check(ids)
        check(ids[1:])
        check(ids[:-1])  # may end within a character
        check(ids + [i for pair in zip(ids, ids, strict=True) for i in pair])
    assert sum(piece != "" for piece in check(tokenizer.encode("hello world hello world", bos=False))) > 2

    # mostly bytes, in any order, with spaces, words and special tokens among them
    space = tokenizer.encode(" ", bos=False)
    interesting = [*tokenizer.encode("é日👩 hello", bos=False), tokenizer.bos_id, *space, tokenizer.vocab_size]

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(interesting) | st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    def any_ids(ids):
        check(ids)

    any_ids()


def test_streaming_gives_characters_as_soon_as_they_are_whole(folders):
    tokenizer = Tokenizer(folders["byte-level"])
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("aé!")] == ["a", "", "é", "!"]
    tokenizer = Tokenizer(folders["sentencepiece"])
    stream = tokenizer.stream()  # bytes of a run are certain when the run is over
    assert [stream.push(i) for i in tokenizer.encode("aé!", bos=False)] == ["a", "", "", ""]
    assert stream.flush() == "é!"  # "!" is a byte too in this vocabulary


# ------------------------------------------------------------------------------------------------------ chat templates

TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ("user", "assistant") %}{{ raise_exception("no role " + message.role) }}{% endif %}
    {% if true %}
{{ bos_token }}{{ message.role }}: {{ message.content | trim }}{{ eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}"""


def test_chat_renders_as_transformers_does(folders, tmp_path):
    shutil.copytree(folders["byte-level"], tmp_path, dirs_exist_ok=True)
    messages = [{"role": "user", "content": " hello <b>&amp;  "}, {"role": "assistant", "content": "<|end|>"}]
    for change in (
        {"chat_template": TEMPLATE},
        {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]},
    ):
        edit_json(tmp_path / "tokenizer_config.json", add_bos_token=True, **change)
        tokenizer = Tokenizer(tmp_path)
        ids = tokenizer.chat(messages)
        assert ids == tokenizer.encode(
            "<|start|>user: hello <b>&amp;<|end|>\n<|start|>assistant: <|end|><|end|>\nassistant:",
            bos=False,
            parse_special=True,
        )
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert ids == reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}|{{ strftime_now('%Y')|length }}")
    assert tokenizer.decode(Tokenizer(tmp_path).chat(messages)) == " hello <b>&amp;  |4"  # the file goes first


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('only\nusers') }}", "only users"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for %}", "chat template failed"),
        ("{% include 'config.json' %}", "chat template failed"),
        ("{{ messages[5].content }}", "chat template failed"),
        ("{% for i in range(10**9) %}{% endfor %}", "chat template failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template failed"),
    ],
)
def test_templates_run_in_a_sandbox_and_fail_in_one_line(folders, tmp_path, template, words):
    (tmp_path / "tokenizer.json").write_bytes((folders["byte-level"] / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    message = fails(Tokenizer(tmp_path).chat, [{"role": "user", "content": "hi"}])
    assert message.startswith(f"{tmp_path}/chat_template.jinja: ") and words in message


def test_no_template(folders, tmp_path):
    for template in (..., [], [{"name": "other", "template": "x"}], [5, {"name": []}]):
        (tmp_path / "tokenizer.json").write_bytes((folders["byte-level"] / "tokenizer.json").read_bytes())
        edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
        assert "has no chat template" in fails(Tokenizer(tmp_path).chat, [{"role": "user", "content": "hi"}])
    for template in (5, {"default": "x"}, [{"name": "default", "template": 5}]):
        edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
        assert "tokenizer_config.json: chat_template" in fails(Tokenizer, tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=...)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja: cannot be read" in fails(Tokenizer, tmp_path)


# ------------------------------------------------------------------------------------------------------- bad tokenizers


@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '{"model": 5}', '{"post_processor": 5}', "\x00" * 50])
def test_damaged_tokenizer_json(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    assert fails(Tokenizer, tmp_path).startswith(f"{tmp_path}/tokenizer.json: ")


def test_every_kind_of_damage_inside_tokenizer_json_is_a_checkpoint_error(folders, tmp_path):
    """Whatever one value is replaced by, loading and using the tokenizer works or raises a CheckpointError."""
    original = json.loads((folders["byte-fallback"] / "tokenizer.json").read_text())
    original["model"]["vocab"] = {t: i for t, i in original["model"]["vocab"].items() if i < 40}
    original["model"]["merges"] = original["model"]["merges"][:0]

    def places(value, path=()):
        yield path
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            if path != ("model", "vocab"):
                yield from places(value[key], (*path, key))

    refused = 0
    for path in list(places(original))[1:]:
        for nonsense in (None, 5, "x", [], {}, [{}]):
            damaged = json.loads(json.dumps(original))
            inner = damaged
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = nonsense
            (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
            try:
                tokenizer = Tokenizer(tmp_path)
                tokenizer.decode(tokenizer.encode("hello é", parse_special=True))
            except CheckpointError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50


@pytest.mark.parametrize("data", [b"", b"hello", bytes(100), b"cut"])
def test_damaged_sentencepiece(folders, tmp_path, data):
    if data == b"cut":
        data = (folders["sentencepiece"] / "tokenizer.model").read_bytes()[:500]
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert fails(Tokenizer, tmp_path).startswith(f"{tmp_path}/tokenizer.model: cannot be read as a SentencePiece model")


@pytest.mark.parametrize(
    "file, changes",
    [
        ("tokenizer_config.json", {"bos_token": "<nope>"}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"eos_token": {"content": ["x"]}}),
        ("tokenizer_config.json", {"add_bos_token": "yes"}),
        ("generation_config.json", {"eos_token_id": "2"}),
        ("generation_config.json", {"eos_token_id": [2, True]}),
        ("generation_config.json", {"eos_token_id": -1}),
        ("config.json", {"eos_token_id": 10**6}),
    ],
)
def test_bad_special_tokens_name_file_and_key(folder, file, changes):
    edit_json(folder / file, **changes)
    message = fails(Tokenizer, folder)
    assert message.startswith(f"{folder}/{file}: {next(iter(changes))} ")


def test_bos_is_wanted_but_unknown(tmp_path):
    byte_level_json().save(str(tmp_path / "tokenizer.json"))
    assert "no BOS token" in fails(Tokenizer(tmp_path).encode, "a", bos=True)
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=True)
    assert "no file says which" in fails(Tokenizer, tmp_path)


def test_load_gives_both_and_refuses_a_tokenizer_of_another_model(folder):
    reference = save_model(folder, vocab_size=400, bos_token_id=1, eos_token_id=2)
    model, tokenizer = load(folder, device="cpu")
    assert_same_weights(model, reference)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    size = tokenizer.vocab_size
    save_model(folder, vocab_size=size, bos_token_id=1, eos_token_id=2)
    load(folder, device="cpu")
    save_model(folder, vocab_size=size - 1, bos_token_id=1, eos_token_id=2)
    assert f"{size} tokens, more than config.json's vocab_size, {size - 1}" in fails(load, folder, device="cpu")


def test_transformers_is_not_needed_to_load():
    program = "import sys, load_weights; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, check=False).returncode == 0
