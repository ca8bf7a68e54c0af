"""Reading a configuration: config.json, or Mistral's params.json, as a ModelConfig and a Family.

Nothing is guessed. A setting that our model does not compute is refused, by CheckpointError.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from loading.checkpoint_files import REQUIRED, JsonObject
from loading.families import FAMILIES, PARAMS, PARAMS_CONTEXT, PARAMS_KEYS, Family
from model import ModelConfig

LONGEST_WINDOW = 2**31  # no text is longer, and so wide a window is none

FULL = "full_attention"
SLIDING = "sliding_attention"

# The numbers that each kind of RoPE scaling has.
SCALING_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read_model_config(folder: Path) -> tuple[ModelConfig, Family]:
    """The model's dimensions, and whose conventions its files follow. Raises CheckpointError.

    Limits (`most`) are far beyond any model. They keep a damaged file from asking for all memory.
    """
    config, family = open_config(folder)
    check_activation(config)
    check_not_quantised(config)
    width = config.get("hidden_size", int, most=2**20)
    n_layers = config.get("num_hidden_layers", int, most=1000)
    heads, kv_heads, head_dim = read_heads(config, width)
    rope_theta, rope_scaling, rotary_dim = read_rope(config, family, head_dim)
    attention_bias = read_bias(config, family, "attention_bias")
    model_config = ModelConfig(
        vocab_size=config.get("vocab_size", int, most=2**24),
        width=width,
        n_layers=n_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=config.get("intermediate_size", int, most=2**24),
        rope_theta=rope_theta,
        norm_eps=config.get("rms_norm_eps", float, most=1),
        max_positions=config.get("max_position_embeddings", int, most=math.inf),
        tied=config.get("tie_word_embeddings", bool, False),
        window=read_window(config, family, n_layers),
        rope_scaling=rope_scaling,
        rotary_dim=rotary_dim,
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=read_bias(config, family, "mlp_bias"),
        qk_norm=family.qk_norm,
    )
    return model_config, family


def open_config(folder: Path) -> tuple[JsonObject, Family]:
    """The file with the dimensions, and the family that it names."""
    path = folder / "config.json"
    params_path = folder / PARAMS.config
    if not os.path.lexists(path) and os.path.lexists(params_path):
        return open_params(params_path), PARAMS
    config = JsonObject.read(path)
    name = config.get("model_type", str)
    if name not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise config.error("model_type", f"{name!r} is not supported (supported: {supported})")
    return config, FAMILIES[name]


def open_params(path: Path) -> JsonObject:
    """params.json, under config.json's keys. Keys that we do not know must be off."""
    config = JsonObject.read(path, aliases=PARAMS_KEYS)
    for key, value in config.values.items():
        if key not in PARAMS_KEYS.values() and value not in (None, False):
            raise config.error(key, f"is {value!r:.80}, which is not supported")
    config.values.setdefault("max_position_embeddings", PARAMS_CONTEXT)
    return config


def check_activation(config: JsonObject):
    """Refuse an MLP with another function than SiLU, which is also called swish."""
    activation = config.get("hidden_act", str, "silu")
    if activation not in ("silu", "swish"):
        raise config.error("hidden_act", f"{activation!r} is not supported (supported: silu)")


def check_not_quantised(config: JsonObject):
    """Refuse quantised weights."""
    settings = config.raw("quantization_config")
    if settings is None:
        return
    method = settings
    if isinstance(settings, dict):
        method = settings.get("quant_method")
    problem = f"is set ({method!r:.80}); use the checkpoint with unquantised weights"
    raise config.error("quantization_config", problem)


def read_heads(config: JsonObject, width: int) -> tuple[int, int, int]:
    """How many query heads and key/value heads there are, and the size of one."""
    heads = config.get("num_attention_heads", int, most=2**12)
    kv_heads = config.get("num_key_value_heads", int, heads)
    if heads % kv_heads != 0:
        problem = f"is {kv_heads}, which does not divide num_attention_heads, {heads}"
        raise config.error("num_key_value_heads", problem)
    if config.raw("head_dim") is None and width % heads != 0:
        problem = f"is {heads}, which does not divide hidden_size, {width}"
        raise config.error("num_attention_heads", problem)
    head_dim = config.get("head_dim", int, width // heads, most=2**12)
    return heads, kv_heads, head_dim


def read_bias(config: JsonObject, family: Family, key: str) -> bool:
    """Whether there are the biases that a key is about, in a family that uses the key."""
    return key in family.biases and config.get(key, bool, False)


# ----------------------------------------------------------------------------------------- RoPE


def read_rope(
    config: JsonObject, family: Family, head_dim: int
) -> tuple[float, dict[str, float] | None, int]:
    """RoPE's theta, its scaling as in ModelConfig, and the channels that it rotates.

    They stand in rope_parameters today, and stood in rope_theta and rope_scaling before. Where both
    say something they must agree.
    """
    rope = open_rope(config)
    default = REQUIRED if family.rope_theta is None else family.rope_theta
    theta = rope.shared("rope_theta", float, config, default)
    rotary_dim = read_rotary_dim(config, rope, family, head_dim)
    return theta, read_rope_scaling(config, rope), rotary_dim


def open_rope(config: JsonObject) -> JsonObject:
    """The object with RoPE's settings, under its newer or older name; empty if there is none."""
    newer = config.raw("rope_parameters")
    older = config.raw("rope_scaling")
    if newer and older and newer != older:
        problem = "differs from rope_parameters, which is the newer name of the same thing"
        raise config.error("rope_scaling", f"{problem}: remove one")
    key = "rope_parameters" if newer else "rope_scaling"
    return JsonObject(config.path, config.get(key, dict, {}), f"{key}.")


def read_rope_scaling(config: JsonObject, rope: JsonObject) -> dict[str, float] | None:
    """Llama 3.1's four numbers, or the one of linear scaling; None without scaling."""
    # A factor without a type is a scaling of some kind, but we cannot tell which.
    untyped = "(none)" if "factor" in rope.values else "default"
    older = rope.get("type", str, untyped)
    kind = rope.get("rope_type", str, older)
    if rope.raw("type") is not None and older != kind:
        problem = f"is {older!r:.80}, but rope_type, its newer name, {kind!r:.80}: remove one"
        raise rope.error("type", problem)
    if kind not in SCALING_FACTORS:
        key = rope.prefix.rstrip(".")
        supported = ", ".join(SCALING_FACTORS)
        problem = f"has the rope type {kind!r}, which is not supported (supported: {supported})"
        raise config.error(key, problem)
    if kind == "default":
        return None
    scaling = {name: rope.get(name, float) for name in SCALING_FACTORS[kind]}
    if kind == "llama3":
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise rope.error("low_freq_factor", "is not below high_freq_factor")
        original = "original_max_position_embeddings"
        scaling[original] = rope.shared(original, int, config)
    return scaling


def read_rotary_dim(config: JsonObject, rope: JsonObject, family: Family, head_dim: int) -> int:
    """How many channels of a head RoPE rotates."""
    factor = rope.shared("partial_rotary_factor", float, config, 1.0, most=1)
    if factor != 1 and not family.partial_rotary:
        raise config.error("partial_rotary_factor", f"is {factor}; the family has no such setting")
    rotary_dim = int(head_dim * factor)
    if rotary_dim == 0 or rotary_dim % 2 != 0:
        problem = f"is {head_dim}, of which RoPE turns {rotary_dim}; it needs an even number"
        raise config.error("head_dim", problem)
    return rotary_dim


# --------------------------------------------------------------------------------------- window


def read_window(config: JsonObject, family: Family, n_layers: int) -> int | None:
    """The sliding window that every layer has, or None where no layer has one.

    Raises CheckpointError where only some layers have it.
    """
    window = stated_window(config, family)
    n_full = 0  # so many of the first layers are without it
    if family.switched and window is not None:
        n_full = config.get("max_window_layers", int, 28, above=-1)

    # What the layers are, if layer_types does not say it.
    implied = []
    for layer in range(n_layers):
        has_window = window is not None and layer >= n_full
        implied.append(SLIDING if has_window else FULL)
    layer_types = config.get("layer_types", list, implied)

    if not family.by_layer:
        possible = implied[:1]
    elif window is None:
        possible = [FULL]
    else:
        possible = [FULL, SLIDING]
    if layer_types not in [[kind] * n_layers for kind in possible]:
        kinds = " or ".join(possible)
        only = f"only {kinds}, the same in all {n_layers} layers, is supported here"
        if config.raw("layer_types") is None:
            raise config.error("max_window_layers", f"is {n_full}; {only}")
        raise config.error("layer_types", f"is {layer_types!r:.80}; {only}")

    if window is None or layer_types[0] == FULL:
        return None
    return min(window, LONGEST_WINDOW)


def stated_window(config: JsonObject, family: Family) -> int | None:
    """The window that the file states for some layers, if the family has one and it is not off."""
    if not family.windowed:
        return None
    if family.switched and not config.get("use_sliding_window", bool, False):
        return None
    if "sliding_window" not in config.values:
        return family.default_window
    return config.get("sliding_window", int, None, most=math.inf)  # null: there is none
