"""What transformers saves is what load_weights loads; bad input is named in one line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file, save_file

from load_weights import CheckpointError, load, load_model, make_plan, read_config
from loading import memory
from loading.families import FUSED, HUGGING_FACE
from loading.match_tensors import stored_name

FULL, WINDOW = ["full_attention"], ["sliding_attention"]
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


@pytest.mark.parametrize("note", [True, False])
@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
def test_tied_weights_may_be_stored_as_the_head_alone(tmp_path, note, max_shard_size):
    """As safetensors' save_model does, which keeps the first of a tensor's names; transformers ties from either side."""
    reference = save_model(tmp_path, tie_word_embeddings=True, max_shard_size=max_shard_size)
    file = max(tmp_path.glob("*.safetensors"), key=lambda path: "model.embed_tokens.weight" in load_file(path))
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"model.embed_tokens.weight": "lm_head.weight"} if note else {})
    if max_shard_size == "10KB":
        index = tmp_path / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        del weight_map["model.embed_tokens.weight"]
        edit_json(index, weight_map=weight_map | {"lm_head.weight": file.name})
    model = load_model(tmp_path, device="cpu")
    assert_same_weights(model, reference)
    assert model.head.weight is model.embed.weight
    tensors["lm_head.weight"] = torch.ones(3)
    save_file(tensors, file)
    assert "'model.embed_tokens.weight' has the shape [3]" in fails(load_model, tmp_path)


def test_tensors_that_share_their_memory_are_found_under_all_names(tmp_path):
    """Layers that share a matrix, and an output projection that shares the embedding's though the config does not say so."""
    reference = save_model(tmp_path)
    layers = reference.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.gate_proj.weight = layers[0].mlp.up_proj.weight
    layers[1].input_layernorm.weight = layers[0].post_attention_layernorm.weight
    reference.lm_head.weight = reference.model.embed_tokens.weight
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_model(reference, str(file))
    assert len(load_file(file)) == 30 - 4
    model = load_model(tmp_path, device="cpu")
    for ours, theirs in ((model.blocks[i].mlp, layers[i].mlp) for i in range(3)):
        assert torch.equal(ours.up.weight, theirs.up_proj.weight) and torch.equal(ours.gate.weight, theirs.gate_proj.weight)
    assert torch.equal(model.blocks[1].attn_norm.weight, layers[1].input_layernorm.weight)
    assert torch.equal(model.head.weight, model.embed.weight)
    save_file(load_file(file), file, metadata={"format": "pt", "lm_head.weight": "nowhere"})  # a note that leads nowhere
    assert "is missing" in fails(load_model, tmp_path)


@pytest.mark.parametrize("disagreement", ["listed, not stored", "stored, not listed", "stored in another shard"])
def test_index_and_shards_may_disagree_about_tensors_that_nothing_needs(tmp_path, disagreement):
    """RoPE's frequencies, and a head that is the embedding."""
    reference = save_model(tmp_path, tie_word_embeddings=True, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    extra = {"lm_head.weight": reference.lm_head.weight.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    first, *_, last = sorted(set(weight_map.values()))
    if disagreement != "listed, not stored":
        save_file(load_file(tmp_path / first) | extra, tmp_path / first)
    if disagreement != "stored, not listed":
        edit_json(index, weight_map=weight_map | dict.fromkeys(extra, last))
    assert_same_weights(load_model(tmp_path, device="cpu"), reference)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)  # now the head is one that something needs
    assert "'lm_head.weight'" in fails(load_model, tmp_path)


def test_progress_goes_to_stderr(tmp_path, capfd):
    save_model(tmp_path)
    capfd.readouterr()
    load_model(tmp_path, device="cpu")
    assert capfd.readouterr() == ("", "")
    load_model(tmp_path, device="cpu", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "30/30" in err


PEAK = """
import sys, threading, time
import torch, load_weights

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done:
        peaks.append(resident())
        time.sleep(0.0005)

torch.nn.Embedding(1, 1, device="meta")  # for the first of these torch imports some 70 MB of itself
done, peaks, before = False, [], resident()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_weights.load_model(sys.argv[1], "cpu")
done = True
watcher.join()
print((max(peaks) - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def test_splitting_fused_tensors_needs_memory_for_one_copy(tmp_path):
    """Counted without the file's own pages, and for a model of which a single tensor is two thirds."""
    C, D, M = 512, 128, 16384
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=C, intermediate_size=M, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    tensors = {f"{name}.weight": torch.randn(64, C) for name in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = torch.ones(C)
    shapes = {"self_attn.qkv": (8 * D, C), "self_attn.o": (C, 4 * D), "mlp.gate_up": (2 * M, C), "mlp.down": (C, M)}
    tensors |= {f"model.layers.0.{name}_proj.weight": torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {f"model.layers.0.{norm}_layernorm.weight": torch.ones(C) for norm in ("input", "post_attention")}
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert 0.95 < float(done.stdout) < 1.2


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
    (tmp_path / "model.gguf").touch()
    assert fails(load_model, tmp_path).startswith(f"{tmp_path}/model.gguf: GGUF and pickles are not read")


@pytest.mark.parametrize("name", ["a.gguf", "A.GGUF", "pytorch_model.bin", "consolidated.00.pth"])
def test_a_folder_with_only_weights_of_another_format(tmp_path, name):
    (tmp_path / name).touch()
    assert fails(load, str(tmp_path)).startswith(f"{tmp_path}: has no config.json, but {name}; GGUF and pickles are not read")
    (tmp_path / "model.safetensors").touch()
    assert fails(load, str(tmp_path)) == f"{tmp_path}/config.json: no such file"


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_a_name_of_nothing(name):
    assert fails(load, name).startswith("checkpoint: the name is empty; give a folder")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\ufeff{}", b"\xff\xfe"])
def test_config_is_not_a_json_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert fails(read_config, tmp_path).startswith(f"{tmp_path}/config.json: ")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported (supported: llama, mistral, phi3, qwen2, qwen3)"),
        ({"model_type": ...}, "model_type is missing"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set ('gptq')"),
        ({"quantization_config": 4}, "quantization_config is set (4)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; the family has no such setting"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5}, "head_dim is 10, of which RoPE turns 5"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.01}, "head_dim is 10, of which RoPE turns 0"),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"model_type": "phi3", "rope_parameters": ..., "rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": ..., "rope_scaling": {"factor": 2.0}}, "rope_scaling has the rope type"),
        ({"rope_parameters": {**LLAMA3, "factor": None}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": {**LLAMA3, "factor": -8}}, "rope_parameters.factor"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor is not below"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_theta": -1e10}}, "rope_parameters.rope_theta is -10000000000.0, not between 0 and"),
        ({"rope_scaling": LLAMA3}, "rope_scaling differs from rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling differs from rope_parameters"),
        ({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 500.0, but rope_parameters.rope_theta"),
        ({"rope_parameters": {**LLAMA3, "type": "linear"}}, "rope_parameters.type is 'linear', but rope_type"),
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings is 64, but"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
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
        ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window is 1"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "max_window_layers is 1; only full_attention or"),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 2}, "same in all 3 layers, is supported here"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
        ({"model_type": "qwen2", "layer_types": 2 * FULL + WINDOW}, "layer_types is ['full_attention', 'full_attention', 'sliding"),
        ({"model_type": "mistral", "sliding_window": 9, "layer_types": FULL + 2 * WINDOW}, "layer_types is ['full_attention'"),
        ({"model_type": "mistral", "sliding_window": 9, "layer_types": FULL}, "layer_types is ['full_attention']; only full_"),
        ({"model_type": "mistral", "sliding_window": 9, "layer_types": 3 * ["chunked_attention"]}, "layer_types is ['chunked"),
        ({"model_type": "mistral", "sliding_window": None, "layer_types": 3 * WINDOW}, "; only full_attention, the same in all"),
        ({"model_type": "qwen2", "layer_types": 3 * WINDOW}, "; only full_attention, the same in all"),  # not switched on
        ({"model_type": "phi3", "sliding_window": 9, "layer_types": 3 * FULL}, "; only sliding_attention, the same in all"),
        ({"layer_types": 3 * WINDOW}, "; only full_attention, the same in all"),
        ({"layer_types": [[]] * 3}, "layer_types is [[], [], []]"),
        ({"layer_types": "full_attention"}, "layer_types"),
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
    problem = "is not a file" if damage == "folder" else "cannot be read as safetensors"
    assert fails(load_model, tmp_path).startswith(f"{file}: {problem}")


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


def test_missing_files_are_reported_before_any_weight_is_read(tmp_path, monkeypatch):
    save_model(tmp_path, max_shard_size="10KB")
    monkeypatch.setattr("load_weights.read_tensor", lambda *_: pytest.fail("a weight was read"))
    assert "has no tokenizer.json" in fails(load, tmp_path)
    max(tmp_path.glob("*.safetensors")).unlink()
    assert "no such file" in fails(load_model, tmp_path)


def test_bad_device_and_dtype(tmp_path):
    save_model(tmp_path)
    assert "device 'nonsense'" in fails(load_model, tmp_path, device="nonsense")
    assert "int8" in fails(load_model, tmp_path, device="cpu", dtype="int8")
    assert "int32" in fails(load_model, tmp_path, device="cpu", dtype=torch.int32)
    if not torch.cuda.is_available():
        assert "device 'cuda'" in fails(load_model, tmp_path, device="cuda")


def test_stored_name():
    assert stored_name("blocks.11.attn.q.weight", HUGGING_FACE) == "model.layers.11.self_attn.q_proj.weight"
    assert stored_name("head.weight", HUGGING_FACE) == "lm_head.weight"
    assert stored_name("blocks.1.mlp.up.weight", FUSED) == "model.layers.1.mlp.gate_up_proj.weight"


def test_transformers_is_not_needed_to_load():
    program = "import sys, load_weights; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, check=False).returncode == 0


def test_what_does_not_fit_is_said_before_a_weight_is_read(tmp_path, monkeypatch):
    save_model(tmp_path)
    count = sum(p.numel() for p in load_model(tmp_path, "cpu").parameters())
    monkeypatch.setattr("load_weights.find_tensors", lambda *_: pytest.fail("the weights were opened"))
    for free, words in ((3 * count, "it fits with --dtype bfloat16"), (count, "no --dtype makes it fit")):
        monkeypatch.setattr("loading.memory.free_bytes", lambda _, free=free: free)
        message = fails(load_model, tmp_path, "cpu")
        assert message == f"{tmp_path}: needs 0.0 GB as float32, and the cpu has 0.0 GB free; {words}"
    edit_json(tmp_path / "config.json", hidden_size=2400)  # not what the file holds: that is said instead
    with pytest.raises(pytest.fail.Exception):
        load_model(tmp_path, "cpu")


def test_weights_are_counted_as_they_are_read(tmp_path, monkeypatch):
    """Whether a model fits does not depend on what else lies there, what its shards are called, or how often a tied head is stored."""
    def needs(folder):
        """Bytes, as a device says them that keeps the files' dtype; just enough of them must do."""
        found = []
        for dtype in ("auto", "float32"):
            monkeypatch.setattr("loading.memory.free_bytes", lambda _: 0)
            message = fails(make_plan, folder, "meta", dtype)
            assert "no --dtype makes it fit" in message
            for free in (2 * count, 4 * count):
                monkeypatch.setattr("loading.memory.free_bytes", lambda _, free=free: free)
                try:
                    make_plan(folder, "meta", dtype)
                    found.append(free // count)
                    break
                except CheckpointError as error:
                    assert "it fits with --dtype bfloat16" in str(error)
        return found

    model = save_model(tmp_path / "whole", dtype=torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert needs(tmp_path / "whole") == [2, 4]
    save_model(tmp_path / "shards", dtype=torch.bfloat16, max_shard_size="10KB")
    assert needs(tmp_path / "shards") == [2, 4]
    for name in ("model.fp16.safetensors", "model-00001-of-00001.safetensors", "consolidated.safetensors"):
        for folder in ("whole", "shards"):
            shutil.copy(tmp_path / "whole/model.safetensors", tmp_path / folder / name)
    assert needs(tmp_path / "whole") == needs(tmp_path / "shards") == [2, 4]
    shutil.copy(tmp_path / "whole/model.safetensors", tmp_path / "shards")
    assert needs(tmp_path / "shards") == [2, 4]
    assert_same_weights(load_model(tmp_path / "shards", "cpu", "bfloat16"), model, torch.bfloat16)

    (tmp_path / "shards/model.safetensors").unlink()
    index = tmp_path / "shards/model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for shard in set(weight_map.values()):
        (tmp_path / "shards" / shard).rename(tmp_path / "shards" / shard.replace("model-", "part."))
    edit_json(index, weight_map={name: shard.replace("model-", "part.") for name, shard in weight_map.items()})
    assert needs(tmp_path / "shards") == [2, 4]
    assert_same_weights(load_model(tmp_path / "shards", "cpu", "bfloat16"), model, torch.bfloat16)

    save_model(tmp_path / "single precision")
    assert needs(tmp_path / "single precision") == [4, 4]
    tied = save_model(tmp_path / "tied", dtype=torch.bfloat16, tie_word_embeddings=True)
    count = sum(parameter.numel() for parameter in tied.parameters())
    edit_tensors(tmp_path / "tied/model.safetensors", lm_head__weight=tied.lm_head.weight.detach().clone())
    assert needs(tmp_path / "tied") == [2, 4]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads what Linux says of its memory")
def test_free_memory_is_below_all_there_is():
    total = 1024 * int(re.findall(r"MemTotal: *(\d+)", Path("/proc/meminfo").read_text())[0])
    assert 0 < memory.free_bytes(torch.device("cpu")) < total


def test_a_padding_token_beyond_the_vocabulary_loads_and_is_refused_in_a_prompt(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    size = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    edit_json(tmp_path / "added_tokens.json", **{"<pad>": size})
    model, tokenizer = load(tmp_path, "cpu")
    ids = tokenizer.encode("the<pad>", parse_special=True)
    assert ids[-1] == size and tokenizer.vocab_size == size + 1 and tokenizer.plain_size <= size
    with pytest.raises(ValueError, match=f"the token {size}, but the model only {size} embeddings"):
        model.prefill([ids], model.new_cache(1))
    edit_json(tmp_path / "added_tokens.json", **{"<pad>": size + 1})
    assert f"gives '<pad>' the id {size + 1}, unlike tokenizer.json" in fails(load, tmp_path, "cpu")
