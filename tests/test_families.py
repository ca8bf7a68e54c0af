"""Every family: transformers' logits, the filter's promises, and the published models' sizes."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from load_weights import load_model, read_config
from model import Transformer
from test_load_weights import edit_json, fails
from test_model import hf_logits, our_logits
from filter_config import PRESETS, preset

SIZES = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
MQA, GQA = ({"num_attention_heads": 4, "num_key_value_heads": n} for n in (1, 2))
PHI = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # the default ones lie outside this vocabulary
SMALL = {
    "llama": transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5),
    "llama-mqa-tied": transformers.LlamaConfig(**SIZES, **MQA, tie_word_embeddings=True),
    "llama3-scaling": transformers.LlamaConfig(
        **SIZES, num_attention_heads=6, num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3
    ),
    "llama-linear": transformers.LlamaConfig(**SIZES, **GQA, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}),
    "llama-biases": transformers.LlamaConfig(**SIZES, **MQA, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**SIZES, **GQA, sliding_window=None),
    "mistral-window": transformers.MistralConfig(**SIZES, **GQA, sliding_window=24),
    "phi3": transformers.Phi3Config(**SIZES, **PHI, **MQA, rope_parameters={"rope_theta": 500.0}),
    "phi3-partial-window": transformers.Phi3Config(
        **SIZES, **PHI, **GQA, sliding_window=24, rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5}
    ),
    "qwen2": transformers.Qwen2Config(**SIZES, **GQA, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, **MQA, head_dim=20),
    "qwen3-biases": transformers.Qwen3Config(**SIZES, **GQA, head_dim=8, attention_bias=True),
}


@pytest.fixture(scope="module", params=SMALL)
def folder(request, tmp_path_factory):
    """A small random model of the family, every weight and bias different, as transformers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model = transformers.AutoModelForCausalLM.from_config(SMALL[request.param])
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(folder, max_shard_size="100KB" if request.param in ("llama", "phi3") else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == (request.param in ("llama", "phi3"))
    return folder


def test_logits_equal_transformers(folder):
    """A prefill of 60 tokens and 40 steps of decode."""
    ids = torch.randint(0, 131, (2, 100))
    ours, theirs = our_logits(load_model(folder, "cpu"), ids, 40), hf_logits(folder, ids, 40)
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


FULL, WINDOW = ["full_attention"] * 3, ["sliding_attention"] * 3
ON = {"use_sliding_window": True, "sliding_window": 24, "layer_types": ...}
SETTINGS = {  # that mean what is supported: a family, changes to its config.json, the window that comes out
    "qwen2: all layers windowed": ("qwen2", ON | {"max_window_layers": 0}, 24),
    "qwen2: no layer windowed": ("qwen2", ON | {"max_window_layers": 3}, None),
    "qwen2: 28 layers without a window, unless said": ("qwen2", ON | {"max_window_layers": ...}, None),
    "qwen2: layer_types come first, full": ("qwen2", ON | {"max_window_layers": 0, "layer_types": FULL}, None),
    "qwen2: layer_types come first, windowed": ("qwen2", ON | {"max_window_layers": 3, "layer_types": WINDOW}, 24),
    "qwen2: switched off": ("qwen2", ON | {"use_sliding_window": False, "max_window_layers": 0}, None),
    "qwen2: no window to switch on": ("qwen2", ON | {"sliding_window": None, "max_window_layers": 0}, None),
    "qwen3: all layers windowed": ("qwen3", ON | {"max_window_layers": 0}, 24),
    "mistral: layer_types, full": ("mistral-window", {"layer_types": FULL}, None),
    "mistral: layer_types, windowed": ("mistral-window", {"layer_types": WINDOW}, 24),
    "mistral: a switch of other families": ("mistral-window", {"use_sliding_window": False}, 24),
    "mistral: a huge window": ("mistral-window", {"sliding_window": 10**12}, 2**31),
    "llama: others' settings": ("llama", {"use_sliding_window": True, "max_window_layers": 1}, None),
    "phi3: a huge context": ("phi3-partial-window", {"max_position_embeddings": 10**12}, 24),
    "swish": ("llama", {"hidden_act": "swish"}, None),
    "qwen2: attention_bias": ("qwen2", {"attention_bias": True, "mlp_bias": True}, None),
    "mistral: attention_bias": ("mistral", {"attention_bias": True, "mlp_bias": True}, None),
    "qwen3: mlp_bias": ("qwen3", {"mlp_bias": True}, None),
    "theta of 3.6 billion": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 3580165449.0}}, None),
    "theta of 46 billion, in its old place": ("llama", {"rope_parameters": ..., "rope_theta": 45845675536}, None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_mean_what_is_supported(name, tmp_path):
    family, changes, window = SETTINGS[name]
    model = transformers.AutoModelForCausalLM.from_config(SMALL[family])
    for tensor, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in tensor else 0.0, 0.15)
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    assert read_config(tmp_path).window == window
    ids = torch.randint(0, 131, (2, 60))
    torch.testing.assert_close(our_logits(load_model(tmp_path, "cpu"), ids, 5), hf_logits(tmp_path, ids, 5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_filtered_it_is_chunk_free_and_batch_invariant(folder, name):
    model, filter = load_model(folder, "cpu", "float64"), preset(name, prune=0.5)
    torch.manual_seed(1)
    text, other = torch.randint(0, 131, (2, 90))
    alone = model.new_cache(1, filter)
    expected = model(text[None], alone)[0]
    pairs, skipped = alone.usage()[0, :2]
    assert pairs == 90 * 3 and 0.2 < skipped / pairs < 0.7
    cache, logits, start = model.new_cache(2, filter), [], 0
    for size in (30, 1, 1, 20, 38):
        n_new = [min(max(50 - start, 0), size), size]  # the other one has 50 tokens
        logits.append(model(torch.stack((other, text))[:, start : start + size], cache, n_new)[1])
        start += size
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=1e-9)
    assert cache.usage()[1, 1] == skipped


# ------------------------------------------------------------------------------------------- Mistral's own format


def in_mistrals_format(folder, target):
    """A Hugging Face folder of a Mistral model written as params.json and consolidated.safetensors."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"wq": config["num_attention_heads"], "wk": config["num_key_value_heads"]}
    parts = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm", "model.layers": "layers",
    }  # fmt: skip
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for theirs, mistrals in parts.items():
            name = name.replace(theirs, mistrals)
        rows = heads.get(name.split(".")[-2])
        if rows:  # halves of a head become neighbours: row i to 2i, row i + D/2 to 2i + 1
            D = len(tensor) // rows
            order = [h * D + i + half for h in range(rows) for i in range(D // 2) for half in (0, D // 2)]
            tensor = tensor[order].contiguous()
        tensors[name] = tensor
    target.mkdir()
    save_file(tensors, target / "consolidated.safetensors")
    params = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"], "n_heads": config["num_attention_heads"], "vocab_size": config["vocab_size"],
        "n_kv_heads": config["num_key_value_heads"], "norm_eps": config["rms_norm_eps"], "sliding_window": 24,
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }  # fmt: skip
    (target / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("folder", ["mistral-window"], indirect=True)
def test_mistrals_own_format_loads_as_the_same_model(folder, tmp_path):
    in_mistrals_format(folder, tmp_path / "own")
    expected, own = load_model(folder, "cpu"), load_model(tmp_path / "own", "cpu")
    assert own.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(own.state_dict()[name], weight), name
    assert vars(own.config) == vars(expected.config) | {"max_positions": 32768}
    params = tmp_path / "own" / "params.json"
    edit_json(params, max_position_embeddings=256, moe=None)
    assert read_config(tmp_path / "own") == expected.config
    edit_json(params, moe={"num_experts": 8})
    assert fails(load_model, tmp_path / "own") == f"{params}: moe is {{'num_experts': 8}}, which is not supported"
    edit_json(params, moe=..., n_layers=...)
    assert fails(load_model, tmp_path / "own") == f"{params}: n_layers is missing"
    edit_json(params, n_layers=4)
    assert "own/consolidated.safetensors: the tensor 'layers.3.attention_norm.weight'" in fails(load_model, tmp_path / "own")
    edit_json(params, n_layers=2)
    assert fails(load_model, tmp_path / "own").endswith("is not part of the model in params.json")


# --------------------------------------------------------------------------------------------- the published models

LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-05, "tie_word_embeddings": False}
LLAMA2 = LLAMA | {"vocab_size": 32000, "max_position_embeddings": 4096, "rope_scaling": None}
LLAMA3_8B = LLAMA | {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0, "attention_bias": False,
}  # fmt: skip
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}  # fmt: skip
PUBLISHED = {  # the dimensions in each model's config.json, and its parameters
    "LLaMA-2 7B": (6_738_415_616, LLAMA2 | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }),
    "LLaMA-2 13B": (13_015_864_320, LLAMA2 | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40,
    }),
    "LLaMA-3 8B": (8_030_261_248, LLAMA3_8B),
    "Llama 3.1 8B": (8_030_261_248, LLAMA3_8B | {"max_position_embeddings": 131072, "rope_scaling": LLAMA31}),
    "Llama 3.2 1B": (1_235_814_400, LLAMA3_8B | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "rope_scaling": LLAMA31 | {"factor": 32.0},
    }),
    "Mistral 7B v0.1": (7_241_732_096, MISTRAL | {"vocab_size": 32000, "rope_theta": 10000.0, "sliding_window": 4096}),
    "Mistral 7B v0.3": (7_248_023_552, MISTRAL | {"vocab_size": 32768, "rope_theta": 1000000.0, "sliding_window": None}),
    "Phi-4": (14_659_507_200, {
        "model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "vocab_size": 100352,
        "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 10, "max_position_embeddings": 16384, "original_max_position_embeddings": 16384,
        "rope_theta": 250000, "rope_scaling": None, "sliding_window": None, "partial_rotary_factor": 1.0,
        "attention_bias": False, "bos_token_id": 100257, "eos_token_id": 100265, "pad_token_id": 100349,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_size(name, tmp_path):
    parameters, values = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    with torch.device("meta"):
        ours = Transformer(config)
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert sum(math.prod(p.shape) for p in ours.parameters()) == parameters == theirs.num_parameters()
    assert config.window == values.get("sliding_window") and config.rope_theta == values.get("rope_theta", 10000.0)
    assert config.max_positions == values["max_position_embeddings"]
    assert ours.new_cache(1).slot_bytes == 2 * 4 * theirs.model.layers[0].self_attn.head_dim * config.kv_heads  # K and V, float32


def test_published_params_json_of_mistral(tmp_path):
    params = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
              "norm_eps": 1e-05, "vocab_size": 32768, "rope_theta": 1000000.0}  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params))
    own = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Mistral 7B v0.3"][1]))
    assert own == read_config(tmp_path)
