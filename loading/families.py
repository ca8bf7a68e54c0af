"""The families of models that can be loaded, and what sets the files of each apart.

A new family is a line in FAMILIES. Where it computes something new, it also needs a field of
ModelConfig and the line in model.py that computes it.
"""

from __future__ import annotations

from typing import NamedTuple

# --------------------------------------------------------------------------------- tensor names

# Modules of the Transformer -> their names in the files; N is the layer. Modules with the same name
# lie in one tensor, row upon row in the Transformer's order.
HUGGING_FACE = {
    "embed": "model.embed_tokens",
    "blocks.N.attn_norm": "model.layers.N.input_layernorm",
    "blocks.N.attn.q": "model.layers.N.self_attn.q_proj",
    "blocks.N.attn.k": "model.layers.N.self_attn.k_proj",
    "blocks.N.attn.v": "model.layers.N.self_attn.v_proj",
    "blocks.N.attn.o": "model.layers.N.self_attn.o_proj",
    "blocks.N.attn.q_norm": "model.layers.N.self_attn.q_norm",
    "blocks.N.attn.k_norm": "model.layers.N.self_attn.k_norm",
    "blocks.N.mlp_norm": "model.layers.N.post_attention_layernorm",
    "blocks.N.mlp.gate": "model.layers.N.mlp.gate_proj",
    "blocks.N.mlp.up": "model.layers.N.mlp.up_proj",
    "blocks.N.mlp.down": "model.layers.N.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
FUSED = HUGGING_FACE | {
    "blocks.N.attn.q": "model.layers.N.self_attn.qkv_proj",
    "blocks.N.attn.k": "model.layers.N.self_attn.qkv_proj",
    "blocks.N.attn.v": "model.layers.N.self_attn.qkv_proj",
    "blocks.N.mlp.gate": "model.layers.N.mlp.gate_up_proj",
    "blocks.N.mlp.up": "model.layers.N.mlp.gate_up_proj",
}
MISTRAL_OWN = {
    "embed": "tok_embeddings",
    "blocks.N.attn_norm": "layers.N.attention_norm",
    "blocks.N.attn.q": "layers.N.attention.wq",
    "blocks.N.attn.k": "layers.N.attention.wk",
    "blocks.N.attn.v": "layers.N.attention.wv",
    "blocks.N.attn.o": "layers.N.attention.wo",
    "blocks.N.mlp_norm": "layers.N.ffn_norm",
    "blocks.N.mlp.gate": "layers.N.feed_forward.w1",
    "blocks.N.mlp.up": "layers.N.feed_forward.w3",
    "blocks.N.mlp.down": "layers.N.feed_forward.w2",
    "norm": "norm",
    "head": "output",
}

# ------------------------------------------------------------------------------------- families


class Family(NamedTuple):
    """What sets the files of one family apart; all else is the same in all of them."""

    names: dict[str, str] = HUGGING_FACE  # of the tensors
    config: str = "config.json"  # the file with the dimensions

    # Keys of config.json that may add biases. Other families may carry them, but do not use them.
    biases: tuple[str, ...] = ()
    qkv_bias: bool = False  # queries, keys and values always have biases
    qk_norm: bool = False  # queries and keys are normed, head by head

    rope_theta: float | None = 10000.0  # what a missing rope_theta means; None: it must be there
    partial_rotary: bool = False  # partial_rotary_factor may be below 1
    # How the rows of q and k are ordered: True if channels 2i and 2i + 1 of a head are the pairs
    # that RoPE rotates, False if i and i + D/2 are.
    interleaved: bool = False

    # Whether sliding_window counts. Other families may carry the key, but do not use it.
    windowed: bool = False
    default_window: int | None = None  # what it means if sliding_window is missing
    by_layer: bool = False  # layer_types, where it is there, says which layers have the window
    # No layer has it without use_sliding_window, nor has one of the first max_window_layers.
    switched: bool = False


FAMILIES = {  # by model_type
    "llama": Family(biases=("attention_bias", "mlp_bias")),
    "mistral": Family(windowed=True, default_window=4096, by_layer=True),
    "phi3": Family(names=FUSED, windowed=True, partial_rotary=True),
    "qwen2": Family(
        qkv_bias=True,
        windowed=True,
        default_window=4096,
        by_layer=True,
        switched=True,
    ),
    "qwen3": Family(
        biases=("attention_bias",),
        qk_norm=True,
        windowed=True,
        default_window=4096,
        by_layer=True,
        switched=True,
    ),
}

# The form that Mistral AI gives out. Without a rope_theta, its files have meant 10000 and 1000000.
PARAMS = Family(
    names=MISTRAL_OWN,
    config="params.json",
    rope_theta=None,
    windowed=True,
    interleaved=True,
)
PARAMS_KEYS = {  # config.json's keys -> those of params.json, all that we know
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "rms_norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "max_position_embeddings": "max_position_embeddings",
}
PARAMS_CONTEXT = 32768  # of Mistral's 7B models, whose params.json often does not say it
