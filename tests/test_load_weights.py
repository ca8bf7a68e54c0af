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

ROOT = Path(__file__).parent.parent
FULL = ["full_attention"]
WINDOW = ["sliding_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OLD_LLAMA3 = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}


def save_model(folder, family="llama", dtype=torch.float32, max_shard_size="1GB", **changes):
    """Have transformers save a random model in a folder; returns the model.

    Its queries are grouped, and all its numbers are different.
    """
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
    values |= changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(path, **changes):
    """Replace or add tensors of a safetensors file; None deletes one. __ in a name is a dot."""
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors[name.replace("__", ".")] = tensor
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})


def fails(function, *arguments, **more):
    """The one-line message of the CheckpointError that a call must raise."""
    with pytest.raises(CheckpointError) as caught:
        function(*arguments, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def assert_same_weights(ours, theirs, dtype=torch.float32):
    pairs = [
        (ours.embed, theirs.model.embed_tokens),
        (ours.norm, theirs.model.norm),
        (ours.head, theirs.lm_head),
    ]
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
    compared = {id(mine.weight) for mine, _ in pairs}
    assert {id(parameter) for parameter in ours.parameters()} == compared


# --------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
def test_loads_exactly_what_transformers_saved(tmp_path, family, tied, max_shard_size):
    reference = save_model(
        tmp_path, family, max_shard_size=max_shard_size, tie_word_embeddings=tied
    )
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards > 3 if max_shard_size == "10KB" else shards == 1
    model = load_model(tmp_path, device="cpu")
    assert_same_weights(model, reference)
    assert (model.head.weight is model.embed.weight) == tied
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_weights_do_not_depend_on_the_file_afterwards(tmp_path):
    reference = save_model(tmp_path)
    model = load_model(tmp_path, device="cpu")
    file = tmp_path / "model.safetensors"
    # Written in place: a view of the mapped file would turn to zeros.
    with file.open("r+b") as raw:
        raw.write(bytes(file.stat().st_size))
    assert_same_weights(model, reference)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("auto", torch.float32),  # on the CPU
        ("bfloat16", torch.bfloat16),
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
    ],
)
def test_dtypes(tmp_path, stored, wanted, expected):
    reference = save_model(tmp_path, dtype=stored)
    model = load_model(tmp_path, device="cpu", dtype=wanted)
    assert_same_weights(model, reference, expected)


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
    assert (config.rope_theta, config.norm_eps) == (5e5, 1e-5)
    assert config.tied
    assert config.window is None
    assert config.rope_scaling | {"rope_type": "llama3"} == LLAMA3


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
        ({"rope_scaling": OLD_LLAMA3}, 10000.0, True),
    ],
)
def test_old_style_rope_settings(tmp_path, old_style, theta, scaled):
    save_model(tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters=..., **old_style)
    config = read_config(tmp_path)
    assert config.rope_theta == theta
    assert type(config.rope_theta) is float
    if scaled:
        assert config.rope_scaling["factor"] == 8.0
    else:
        assert config.rope_scaling is None


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
    """As safetensors' save_model does, which keeps the first of a tensor's names.

    Transformers ties from either side.
    """
    reference = save_model(tmp_path, tie_word_embeddings=True, max_shard_size=max_shard_size)
    files = tmp_path.glob("*.safetensors")
    (file,) = [path for path in files if "model.embed_tokens.weight" in load_file(path)]
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    metadata = {"model.embed_tokens.weight": "lm_head.weight"} if note else {}
    save_file(tensors, file, metadata=metadata)
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
    """Layers that share a matrix, and an output projection that shares the embedding's.

    The configuration does not say that it does.
    """
    reference = save_model(tmp_path)
    layers = reference.model.layers
    layers[0].mlp.gate_proj.weight = layers[0].mlp.up_proj.weight
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layers[1].input_layernorm.weight = layers[0].post_attention_layernorm.weight
    reference.lm_head.weight = reference.model.embed_tokens.weight
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_model(reference, str(file))
    assert len(load_file(file)) == 30 - 4
    model = load_model(tmp_path, device="cpu")
    for block, layer in zip(model.blocks, layers, strict=True):
        assert torch.equal(block.mlp.up.weight, layer.mlp.up_proj.weight)
        assert torch.equal(block.mlp.gate.weight, layer.mlp.gate_proj.weight)
    assert torch.equal(model.blocks[1].attn_norm.weight, layers[1].input_layernorm.weight)
    assert torch.equal(model.head.weight, model.embed.weight)
    # A note that leads nowhere.
    save_file(load_file(file), file, metadata={"format": "pt", "lm_head.weight": "nowhere"})
    assert "is missing" in fails(load_model, tmp_path)


@pytest.mark.parametrize(
    "disagreement", ["listed, not stored", "stored, not listed", "stored in another shard"]
)
def test_index_and_shards_may_disagree_about_tensors_that_nothing_needs(tmp_path, disagreement):
    """RoPE's frequencies, and a head that is the embedding."""
    reference = save_model(tmp_path, tie_word_embeddings=True, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    extra = {
        "lm_head.weight": reference.lm_head.weight.clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5),
    }
    first, *_, last = sorted(set(weight_map.values()))
    if disagreement != "listed, not stored":
        save_file(load_file(tmp_path / first) | extra, tmp_path / first)
    if disagreement != "stored, not listed":
        edit_json(index, weight_map=weight_map | dict.fromkeys(extra, last))
    assert_same_weights(load_model(tmp_path, device="cpu"), reference)
    # Now the head is one that something needs.
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert "'lm_head.weight'" in fails(load_model, tmp_path)


def test_progress_goes_to_stderr(tmp_path, capfd):
    save_model(tmp_path)
    capfd.readouterr()
    load_model(tmp_path, device="cpu")
    assert capfd.readouterr() == ("", "")
    load_model(tmp_path, device="cpu", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "30/30" in err


# Prints the peak of the memory that loading takes, over the size of the model.
PEAK = """
import re
import sys
import threading
import time
from pathlib import Path

import torch

import load_weights

def resident():
    # Without the pages of mapped files.
    (kilobytes,) = re.findall(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024

def watch():
    while not done:
        peaks.append(resident())
        time.sleep(0.0005)

# For the first of these torch imports some 70 MB of itself.
torch.nn.Embedding(1, 1, device="meta")
done = False
peaks = []
before = resident()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_weights.load_model(sys.argv[1], "cpu")
done = True
watcher.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((max(peaks) - before) / size)
"""


def test_splitting_fused_tensors_needs_memory_for_one_copy(tmp_path):
    """Counted for a model of which a single tensor is two thirds."""
    C = 512
    D = 128
    M = 16384
    config = transformers.Phi3Config(
        vocab_size=64,
        hidden_size=C,
        intermediate_size=M,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=2,
    )
    config.save_pretrained(tmp_path)
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (64, C),
        "lm_head.weight": (64, C),
        "model.norm.weight": (C,),
        f"{layer}.self_attn.qkv_proj.weight": (8 * D, C),
        f"{layer}.self_attn.o_proj.weight": (C, 4 * D),
        f"{layer}.mlp.gate_up_proj.weight": (2 * M, C),
        f"{layer}.mlp.down_proj.weight": (C, M),
        f"{layer}.input_layernorm.weight": (C,),
        f"{layer}.post_attention_layernorm.weight": (C,),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.95 < float(done.stdout) < 1.2


# ------------------------------------------------------------------------------- bad checkpoints


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
    assert "pytorch_model.bin" in message
    assert "convert the weights to safetensors" in message
    (tmp_path / "model.gguf").touch()
    message = fails(load_model, tmp_path)
    assert message.startswith(f"{tmp_path}/model.gguf: GGUF and pickles are not read")


@pytest.mark.parametrize("name", ["a.gguf", "A.GGUF", "pytorch_model.bin", "consolidated.00.pth"])
def test_a_folder_with_only_weights_of_another_format(tmp_path, name):
    (tmp_path / name).touch()
    problem = f"has no config.json, but {name}; GGUF and pickles are not read"
    assert fails(load, str(tmp_path)).startswith(f"{tmp_path}: {problem}")
    (tmp_path / "model.safetensors").touch()
    assert fails(load, str(tmp_path)) == f"{tmp_path}/config.json: no such file"


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_a_name_of_nothing(name):
    assert fails(load, name).startswith("checkpoint: the name is empty; give a folder")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'"x"', b"[" * 100_000, b"\xef\xbb\xbf{}", b"\xff\xfe"]
)
def test_config_is_not_a_json_object(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    assert fails(read_config, tmp_path).startswith(f"{tmp_path}/config.json: ")


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported (supported: llama, mistral, phi3, qwen2, qwen3)",
        ),
        ({"model_type": ...}, "model_type is missing"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set ('gptq')"),
        ({"quantization_config": 4}, "quantization_config is set (4)"),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5; the family has no such setting",
        ),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.5},
            "head_dim is 10, of which RoPE turns 5",
        ),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.01},
            "head_dim is 10, of which RoPE turns 0",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        (
            {"model_type": "phi3", "rope_parameters": ..., "rope_scaling": {"type": "longrope"}},
            "rope type 'longrope'",
        ),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic'",
        ),
        (
            {"rope_parameters": ..., "rope_scaling": {"factor": 2.0}},
            "rope_scaling has the rope type",
        ),
        ({"rope_parameters": {**LLAMA3, "factor": None}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": {**LLAMA3, "factor": -8}}, "rope_parameters.factor"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor is not below"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_parameters.rope_theta"),
        (
            {"rope_parameters": {"rope_theta": -1e10}},
            "rope_parameters.rope_theta is -10000000000.0, not between 0 and",
        ),
        ({"rope_scaling": LLAMA3}, "rope_scaling differs from rope_parameters"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling differs from rope_parameters",
        ),
        (
            {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta is 500.0, but rope_parameters.rope_theta",
        ),
        (
            {"rope_parameters": {**LLAMA3, "type": "linear"}},
            "rope_parameters.type is 'linear', but rope_type",
        ),
        (
            {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64},
            "original_max_position_embeddings is 64, but",
        ),
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
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "max_window_layers is 1; only full_attention or",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 2},
            "same in all 3 layers, is supported here",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers is -1",
        ),
        (
            {"model_type": "qwen2", "layer_types": 2 * FULL + WINDOW},
            "layer_types is ['full_attention', 'full_attention', 'sliding",
        ),
        (
            {"model_type": "mistral", "sliding_window": 9, "layer_types": FULL + 2 * WINDOW},
            "layer_types is ['full_attention'",
        ),
        (
            {"model_type": "mistral", "sliding_window": 9, "layer_types": FULL},
            "layer_types is ['full_attention']; only full_",
        ),
        (
            {
                "model_type": "mistral",
                "sliding_window": 9,
                "layer_types": 3 * ["chunked_attention"],
            },
            "layer_types is ['chunked",
        ),
        (
            {"model_type": "mistral", "sliding_window": None, "layer_types": 3 * WINDOW},
            "; only full_attention, the same in all",
        ),
        (
            {"model_type": "qwen2", "layer_types": 3 * WINDOW},
            "; only full_attention, the same in all",
        ),  # not switched on
        (
            {"model_type": "phi3", "sliding_window": 9, "layer_types": 3 * FULL},
            "; only sliding_attention, the same in all",
        ),
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
    assert message.startswith(f"{tmp_path}/config.json: ")
    assert words in message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__norm__weight": None}, "the tensor 'model.norm.weight' is missing"),
        ({"lm_head__weight": None}, "the tensor 'lm_head.weight' is missing"),
        (
            {"model__layers__0__self_attn__q_proj__bias": torch.ones(40)},
            "q_proj.bias' is not part of the model",
        ),
        (
            {"model__layers__3__input_layernorm__weight": torch.ones(24)},
            "layers.3.input_layernorm.weight' is not part",
        ),
        (
            {"model__norm__weight": torch.ones(25)},
            "'model.norm.weight' has the shape [25], config.json asks for [24]",
        ),
        ({"model__layers__1__mlp__up_proj__weight": torch.ones(24, 40)}, "has the shape [24, 40]"),
        (
            {"model__norm__weight": torch.ones(24, dtype=torch.int64)},
            "'model.norm.weight' has the dtype I64",
        ),
        (
            {"model__norm__weight": torch.ones(24).to(torch.float8_e4m3fn)},
            "'model.norm.weight' has the dtype F8_E4M3",
        ),
        (
            {"model__norm__weight": torch.tensor([float("nan")] + 23 * [1.0])},
            "'model.norm.weight' has values that",
        ),
        (
            {"model__norm__weight": torch.tensor([float("inf")] + 23 * [1.0])},
            "'model.norm.weight' has values that",
        ),
        (
            {"model__norm__weight": torch.tensor(23 * [1.0] + [float("-inf")])},
            "'model.norm.weight' has values that",
        ),
    ],
)
def test_bad_tensors(tmp_path, changes, words):
    save_model(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", **changes)
    message = fails(load_model, tmp_path, device="cpu")
    assert message.startswith(f"{tmp_path}/model.safetensors: ")
    assert words in message


def test_weights_that_the_wanted_dtype_cannot_hold(tmp_path):
    save_model(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", model__norm__weight=torch.full((24,), 1e6))
    load_model(tmp_path, device="cpu")
    message = fails(load_model, tmp_path, device="cpu", dtype="float16")
    assert "model.norm.weight" in message
    assert "stored as F32, loaded as torch.float16" in message


def header_alone(data):
    """What is left of a safetensors file without its tensors."""
    header_bytes = int.from_bytes(data[:8], "little")
    return data[: 8 + header_bytes]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        header_alone,
        lambda data: b"",
        lambda data: b"PK\x03\x04" + bytes(1000),
        lambda data: b"\xff" * 1000,
    ],
    ids=["truncated", "header only", "empty", "not safetensors", "huge header"],
)
def test_damaged_safetensors(tmp_path, damage):
    save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    message = fails(load_model, tmp_path)
    assert message.startswith(f"{file}: cannot be read as safetensors")


def test_a_folder_in_place_of_the_weights(tmp_path):
    save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.unlink()
    file.mkdir()
    assert fails(load_model, tmp_path).startswith(f"{file}: is not a file")


def test_bad_shards(tmp_path):
    save_model(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    original = index.read_text()
    weight_map = json.loads(original)["weight_map"]
    norm_file = weight_map["model.norm.weight"]
    other = next(file for file in weight_map.values() if file != norm_file)

    above = ["../model.safetensors", "/etc/passwd", ".."]
    below = ["a/b.safetensors", "a\\b.safetensors"]
    for bad in [*above, *below, "", "x.bin", 7]:
        edit_json(index, weight_map=weight_map | {"model.norm.weight": bad})
        message = fails(load_model, tmp_path)
        assert message.startswith(f"{index}: the tensor 'model.norm.weight' is put in {bad!r}")
    unlisted = f"{norm_file}: holds the tensor 'model.norm.weight', unlike"
    edit_json(index, weight_map=weight_map | {"model.norm.weight": other})
    assert unlisted in fails(load_model, tmp_path)
    without_norm = dict(weight_map)
    del without_norm["model.norm.weight"]
    edit_json(index, weight_map=without_norm)
    assert unlisted in fails(load_model, tmp_path)
    edit_json(index, weight_map=weight_map | {"model.norm2.weight": norm_file})
    missing = f"{norm_file}: the tensor 'model.norm2.weight' is missing, though"
    assert missing in fails(load_model, tmp_path)
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
    q = stored_name("blocks.11.attn.q.weight", HUGGING_FACE)
    assert q == "model.layers.11.self_attn.q_proj.weight"
    assert stored_name("head.weight", HUGGING_FACE) == "lm_head.weight"
    up = stored_name("blocks.1.mlp.up.weight", FUSED)
    assert up == "model.layers.1.mlp.gate_up_proj.weight"


def test_transformers_is_not_needed_to_load():
    program = "import sys, load_weights; sys.exit('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_what_does_not_fit_is_said_before_a_weight_is_read(tmp_path, monkeypatch):
    save_model(tmp_path)
    count = sum(p.numel() for p in load_model(tmp_path, "cpu").parameters())

    def must_not_be_called(*_):
        pytest.fail("the weights were opened")

    monkeypatch.setattr("load_weights.find_tensors", must_not_be_called)
    hints = {3 * count: "it fits with --dtype bfloat16", count: "no --dtype makes it fit"}
    for free, hint in hints.items():
        monkeypatch.setattr("loading.memory.free_bytes", lambda _, free=free: free)
        message = fails(load_model, tmp_path, "cpu")
        problem = f"needs 0.0 GB as float32, and the cpu has 0.0 GB free; {hint}"
        assert message == f"{tmp_path}: {problem}"
    # Not what the file holds: that is said instead, when the file has been opened.
    edit_json(tmp_path / "config.json", hidden_size=2400)
    with pytest.raises(pytest.fail.Exception):
        load_model(tmp_path, "cpu")


def needed_bytes(folder, count, dtype, monkeypatch):
    """How many bytes a number of a model takes: 2, 4 or 8, whichever is just enough.

    Asked for a device that keeps the files' dtype, by default. count: of the model's numbers.
    """
    monkeypatch.setattr("loading.memory.free_bytes", lambda _: 0)
    assert "no --dtype makes it fit" in fails(make_plan, folder, "meta", dtype)
    hints = {2: "it fits with --dtype bfloat16", 4: "it fits with --dtype float32"}
    for size, hint in hints.items():
        monkeypatch.setattr("loading.memory.free_bytes", lambda _, size=size: size * count)
        try:
            make_plan(folder, "meta", dtype)
            return size
        except CheckpointError as error:
            assert hint in str(error)
    monkeypatch.setattr("loading.memory.free_bytes", lambda _: 8 * count)
    make_plan(folder, "meta", dtype)
    return 8


def rename_shards(folder):
    """Give the shards names that no other program gives them."""
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    new_names = {shard: shard.replace("model-", "part.") for shard in weight_map.values()}
    for shard, new_name in new_names.items():
        (folder / shard).rename(folder / new_name)
    edit_json(index, weight_map={name: new_names[shard] for name, shard in weight_map.items()})


def test_weights_are_counted_as_they_are_read(tmp_path, monkeypatch):
    """Whether a model fits depends on the weights alone.

    Not on what else lies there, what its shards are called, or how often a tied head is stored.
    """
    whole = tmp_path / "whole"
    shards = tmp_path / "shards"
    model = save_model(whole, dtype=torch.bfloat16)
    save_model(shards, dtype=torch.bfloat16, max_shard_size="10KB")
    count = sum(parameter.numel() for parameter in model.parameters())

    def check(folder, auto=2):
        assert needed_bytes(folder, count, "auto", monkeypatch) == auto
        assert needed_bytes(folder, count, "float32", monkeypatch) == 4

    check(whole)
    check(shards)
    file = whole / "model.safetensors"
    again = ["model.fp16.safetensors", "model-00001-of-00001.safetensors"]
    for name in (*again, "consolidated.safetensors"):
        for folder in (whole, shards):
            shutil.copy(file, folder / name)
    check(whole)
    check(shards)
    shutil.copy(file, shards)
    check(shards)
    assert_same_weights(load_model(shards, "cpu", "bfloat16"), model, torch.bfloat16)

    (shards / "model.safetensors").unlink()
    rename_shards(shards)
    check(shards)
    assert_same_weights(load_model(shards, "cpu", "bfloat16"), model, torch.bfloat16)

    save_model(tmp_path / "float32")
    check(tmp_path / "float32", auto=4)
    save_model(tmp_path / "float64", dtype=torch.float64)
    check(tmp_path / "float64", auto=8)

    tied_folder = tmp_path / "tied"
    tied = save_model(tied_folder, dtype=torch.bfloat16, tie_word_embeddings=True)
    count = sum(parameter.numel() for parameter in tied.parameters())
    head = tied.lm_head.weight.detach().clone()
    edit_tensors(tied_folder / "model.safetensors", lm_head__weight=head)
    check(tied_folder)


MEMINFO = Path("/proc/meminfo")


@pytest.mark.skipif(not MEMINFO.exists(), reason="reads what Linux says of its memory")
def test_free_memory_is_below_all_there_is():
    (kilobytes,) = re.findall(r"MemTotal: *(\d+)", MEMINFO.read_text())
    assert 0 < memory.free_bytes(torch.device("cpu")) < 1024 * int(kilobytes)


def test_a_padding_token_without_an_embedding_is_refused_in_a_prompt(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    size = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    edit_json(tmp_path / "added_tokens.json", **{"<pad>": size})
    model, tokenizer = load(tmp_path, "cpu")
    ids = tokenizer.encode("the<pad>", parse_special=True)
    assert ids[-1] == size
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.plain_size <= size
    with pytest.raises(ValueError, match=f"the token {size}, but the model only {size} embeddings"):
        model.prefill([ids], model.new_cache(1))
    edit_json(tmp_path / "added_tokens.json", **{"<pad>": size + 1})
    assert f"gives '<pad>' the id {size + 1}, unlike tokenizer.json" in fails(load, tmp_path, "cpu")
