"""Load a checkpoint: load(folder, or a name on the Hugging Face hub) -> (Transformer, Tokenizer).

    config.json                                   the model's dimensions
    model.safetensors                             the weights, or in several files:
    model.safetensors.index.json + the files it names
    tokenizer.json, tokenizer.model, ...          see tokenizer.py

or, in the form that Mistral AI gives out, params.json and consolidated.safetensors in place of the first two.

Nothing is guessed: a tensor too many or too few, a wrong shape, a value that is not finite, or a setting that this
model does not compute is refused. Whatever is wrong is raised as CheckpointError: one line that names the file and the
tensor or key.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from cli.process import N_RANKS
from loading.checkpoint_files import (
    CheckpointError,
    JsonObject,
    check_file,
    checkpoint_folder,
    folder_weights,
    misplaced_weights,
    unreadable,
    weights_name,
)
from loading.tokenizer import Tokenizer
from model import ModelConfig, Transformer
from runtime import cuda_graph, tensor_parallel

# ------------------------------------------------------------------------------------------------------- families

# Modules of the Transformer -> their names in the files; N is the layer. Modules with the same name lie in one tensor, row
# upon row in the Transformer's order.
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
    **dict.fromkeys(("blocks.N.attn.q", "blocks.N.attn.k", "blocks.N.attn.v"), "model.layers.N.self_attn.qkv_proj"),
    **dict.fromkeys(("blocks.N.mlp.gate", "blocks.N.mlp.up"), "model.layers.N.mlp.gate_up_proj"),
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


class Family(NamedTuple):
    """What sets the files of one family apart; all else is the same in all of them."""

    names: dict[str, str] = HUGGING_FACE
    config: str = "config.json"
    biases: tuple[str, ...] = ()  # keys of config.json that may add biases; other families may carry them, but do not use them
    qkv_bias: bool = False  # always there
    qk_norm: bool = False
    windowed: bool = False  # sliding_window counts; other families may carry the key, but do not use it
    default_window: int | None = None  # what it means if sliding_window is missing
    by_layer: bool = False  # where layer_types is there, it says which layers have the window
    switched: bool = False  # none has it without use_sliding_window, nor one of the first max_window_layers
    partial_rotary: bool = False  # partial_rotary_factor may be below 1
    interleaved: bool = False  # rows of q and k: channels 2i and 2i + 1 are RoPE's pairs, not i and i + D/2


FAMILIES = {  # by model_type
    "llama": Family(biases=("attention_bias", "mlp_bias")),
    "mistral": Family(windowed=True, default_window=4096, by_layer=True),
    "phi3": Family(names=FUSED, windowed=True, partial_rotary=True),
    "qwen2": Family(qkv_bias=True, windowed=True, default_window=4096, by_layer=True, switched=True),
    "qwen3": Family(biases=("attention_bias",), qk_norm=True, windowed=True, default_window=4096, by_layer=True, switched=True),
}
PARAMS = Family(MISTRAL_OWN, "params.json", windowed=True, interleaved=True)
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

IGNORED = ".rotary_emb.inv_freq"  # LLaMA-2's files carry RoPE's frequencies; ours are computed from config.json
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# --------------------------------------------------------------------------------------------------------- config


def read_config(folder: str | Path) -> ModelConfig:
    """config.json (or params.json) as a ModelConfig. Raises CheckpointError, also for what our model does not compute."""
    return _read_config(checkpoint_folder(folder))[0]


def _source(folder: Path) -> tuple[JsonObject, Family]:
    """The file with the dimensions, and whose conventions it follows."""
    if not os.path.lexists(folder / "config.json") and os.path.lexists(folder / PARAMS.config):
        config = JsonObject.read(folder / PARAMS.config, aliases=PARAMS_KEYS)
        for key, value in config.values.items():
            if key not in PARAMS_KEYS.values() and value not in (None, False):
                raise config.error(key, f"is {value!r:.80}, which is not supported")
        config.values.setdefault("max_position_embeddings", 32768)  # often not said; the context of Mistral's 7B models
        return config, PARAMS
    config = JsonObject.read(folder / "config.json")
    name = config.get("model_type", str)
    if name not in FAMILIES:
        raise config.error("model_type", f"{name!r} is not supported (supported: {', '.join(FAMILIES)})")
    return config, FAMILIES[name]


def _read_config(folder: Path) -> tuple[ModelConfig, Family]:
    config, family = _source(folder)
    if (activation := config.get("hidden_act", str, "silu")) not in ("silu", "swish"):  # two names of one function
        raise config.error("hidden_act", f"{activation!r} is not supported (supported: silu)")
    attention_bias, mlp_bias = (key in family.biases and config.get(key, bool, False) for key in ("attention_bias", "mlp_bias"))
    if (quantised := config.raw("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise config.error("quantization_config", f"is set ({method!r:.80}); use the checkpoint with unquantised weights")

    width = config.get("hidden_size", int, most=2**20)
    n_layers = config.get("num_hidden_layers", int, most=1000)
    heads = config.get("num_attention_heads", int, most=2**12)
    kv_heads = config.get("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"is {kv_heads}, which does not divide num_attention_heads, {heads}")
    if config.raw("head_dim") is None and width % heads:
        raise config.error("num_attention_heads", f"is {heads}, which does not divide hidden_size, {width}")
    head_dim = config.get("head_dim", int, width // heads, most=2**12)
    rope_theta, rope_scaling, rotary_dim = _rope(config, family, head_dim)
    return ModelConfig(
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
        window=_window(config, family, n_layers),
        rope_scaling=rope_scaling,
        rotary_dim=rotary_dim,
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
    ), family


def _rope(config: JsonObject, family: Family, head_dim: int) -> tuple[float, dict[str, float] | None, int]:
    """RoPE's theta, its scaling (Llama 3.1's four numbers, or linear's one) and the channels that turn. They stand in
    rope_parameters today; before, in rope_theta and rope_scaling. Where both say something they must agree."""
    keys = [key for key in ("rope_parameters", "rope_scaling") if config.raw(key)]
    if len(keys) == 2 and config.raw(keys[0]) != config.raw(keys[1]):
        raise config.error("rope_scaling", "differs from rope_parameters, which is the newer name of the same thing: remove one")
    key = keys[0] if keys else "rope_scaling"
    rope = JsonObject(config.path, config.get(key, dict, {}), f"{key}.")
    default = () if family is PARAMS else (10000.0,)  # in params.json, none has meant 10000 as well as 1000000
    theta = rope.shared("rope_theta", float, config, *default)
    untyped = "default" if "factor" not in rope.values else "(none)"
    kind = rope.get("rope_type", str, rope.get("type", str, untyped))
    if kind != rope.get("type", str, kind):
        raise rope.error("type", f"is {rope.raw('type')!r:.80}, but rope_type, its newer name, {kind!r:.80}: remove one")
    if kind not in ("default", "linear", "llama3"):
        raise config.error(key, f"has the rope type {kind!r}, which is not supported (supported: default, linear, llama3)")
    factor = rope.shared("partial_rotary_factor", float, config, 1.0, most=1)
    if factor != 1 and not family.partial_rotary:
        raise config.error("partial_rotary_factor", f"is {factor}; the family has no such setting")
    rotary_dim = int(head_dim * factor)
    if rotary_dim % 2 or not rotary_dim:
        raise config.error("head_dim", f"is {head_dim}, of which RoPE turns {rotary_dim}; it needs an even number")
    names = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[kind]
    scaling = {name: rope.get(name, float) for name in names}
    if kind == "llama3":
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise rope.error("low_freq_factor", "is not below high_freq_factor")
        scaling["original_max_position_embeddings"] = rope.shared("original_max_position_embeddings", int, config)
    return theta, scaling or None, rotary_dim


def _window(config: JsonObject, family: Family, n_layers: int) -> int | None:
    """The sliding window that every layer has, or None where none has one. Raises CheckpointError for anything between."""
    window, first = None, 0  # the first layer that has it
    if family.windowed and (not family.switched or config.get("use_sliding_window", bool, False)):
        missing = "sliding_window" not in config.values
        window = family.default_window if missing else config.get("sliding_window", int, None, most=math.inf)
    if family.switched and window is not None:
        first = config.get("max_window_layers", int, 28, above=-1)
    kinds = ["full_attention" if window is None or layer < first else "sliding_attention" for layer in range(n_layers)]
    named, key = config.get("layer_types", list, kinds), "max_window_layers" if config.raw("layer_types") is None else "layer_types"
    possible = ["full_attention", "sliding_attention"][: 1 if window is None else 2] if family.by_layer else kinds[:1]
    if named not in ([kind] * n_layers for kind in possible):
        value = first if named is kinds else named
        raise config.error(key, f"is {value!r:.80}; only {' or '.join(possible)}, the same in all {n_layers} layers, is supported here")
    return None if window is None or named[0] == "full_attention" else min(window, 2**31)  # no text is longer


# -------------------------------------------------------------------------------------------------------- weights


class Stored(NamedTuple):
    """Where a tensor lies, and what its file's header says about it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    check_file(file)
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: no room to map it
        raise CheckpointError(file, f"cannot be read as safetensors, is it complete? ({error})") from None


def _read(stored: Stored, *part: slice) -> torch.Tensor:
    """One tensor, a view of the file, or a part of it, a copy. Each call maps the file anew, so that dropping the tensor also drops the
    file's pages from this process: the peak is one copy of the model, not two."""
    with _opened(stored.file) as opened:
        return opened.get_slice(stored.name)[part] if part else opened.get_tensor(stored.name)


def _stored_tensors(folder: Path, optional: tuple[str, ...]) -> tuple[Path, dict[str, Stored]]:
    """The file that lists the tensors, and all tensors by name. Reads headers only; a missing shard shows up here.

    Where one tensor has several names, savers keep it under one of them and note the others in __metadata__; it is found under
    all. About the `optional` ones index and shards may disagree.
    """
    found = folder_weights(folder)
    if found is None:
        raise _missing_weights(folder)
    source, weight_map = folder / found.source, found.weight_map
    if weight_map is not None:
        weight_map = {name: file for name, file in weight_map.items() if not name.endswith(IGNORED)}
    tensors: dict[str, Stored] = {}
    twins: dict[str, str] = {}  # a name that was left out -> the tensor's other one
    for file in found.files:
        with _opened(folder / file) as opened:
            twins |= opened.metadata() or {}
            for name in opened.offset_keys():
                if name.endswith(IGNORED):
                    continue
                if weight_map is not None and weight_map.get(name) != file and (name not in optional or name in tensors):
                    raise CheckpointError(folder / file, f"holds the tensor {name!r}, unlike {source.name} says")
                header = opened.get_slice(name)
                tensors[name] = Stored(folder / file, name, header.get_dtype(), tuple(header.get_shape()))
    tensors |= {name: tensors[twin] for name, twin in twins.items() if twin in tensors and name not in tensors}
    for name, file in (weight_map or {}).items():
        if name not in tensors and name not in optional:
            raise CheckpointError(folder / file, f"the tensor {name!r} is missing, though {source.name} says it is here")
    return source, tensors


def _missing_weights(folder: Path) -> CheckpointError:
    """The error of a folder in which there are no weights, or only in a form that is not read."""
    other = unreadable(folder)
    if other:
        return CheckpointError(other, "GGUF and pickles are not read; convert the weights to safetensors")

    def has(name):
        return os.path.lexists(folder / name)

    name = weights_name(has)
    return CheckpointError(folder / name, f"no such file, nor {name}.index.json{misplaced_weights(has)}")


def stored_name(parameter: str, names: dict[str, str]) -> str:
    """blocks.3.attn.q.weight -> model.layers.3.self_attn.q_proj.weight, if names is HUGGING_FACE"""
    module, _, kind = parameter.rpartition(".")
    layer = "".join(filter(str.isdigit, module))
    return names[re.sub(r"\d+", "N", module)].replace("N", layer) + f".{kind}"


def _ends(family: Family) -> tuple[str, str]:
    """The files' names of the embedding and of the output projection."""
    return stored_name("embed.weight", family.names), stored_name("head.weight", family.names)


def _match(model: Transformer, family: Family, source: Path, tensors: dict[str, Stored]) -> dict[str, list[str]]:
    """Every tensor to read -> our parameters in it, row upon row. Raises CheckpointError unless each is there exactly once, in the
    right shape, and nothing else is."""
    config = model.config
    embedding, head = _ends(family)
    if config.tied and head in tensors:
        tensors.setdefault(embedding, tensors[head])

    # every tensor exactly once, in the right shape
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    wanted: dict[str, list[str]] = {}  # tensor in the files -> our parameters in it, row upon row
    for name in shapes:
        wanted.setdefault(stored_name(name, family.names), []).append(name)
    for name, ours in wanted.items():
        if config.tied and name == head and name not in tensors:
            continue
        if name not in tensors:
            raise CheckpointError(source, f"the tensor {name!r} is missing")
        stored, shape = tensors[name], (sum(shapes[part][0] for part in ours), *shapes[ours[0]][1:])
        if stored.shape != shape:
            sizes = f"{list(stored.shape)}, {family.config} asks for {list(shape)}"
            raise CheckpointError(stored.file, f"the tensor {name!r} has the shape {sizes}")
        if stored.dtype not in DTYPES:
            problem = f"has the dtype {stored.dtype}, which is not supported (supported: {', '.join(DTYPES)})"
            raise CheckpointError(stored.file, f"the tensor {name!r} {problem}")
    for name, stored in tensors.items():
        if name not in wanted and name == stored.name:
            raise CheckpointError(stored.file, f"the tensor {name!r} is not part of the model in {family.config}")
    if config.tied and head in tensors and not torch.equal(_read(tensors[embedding]), _read(tensors[head])):
        problem = f"differs from {embedding!r}, but config.json says tie_word_embeddings"
        raise CheckpointError(tensors[head].file, f"the tensor {head!r} {problem}")
    if config.tied:
        del wanted[head]
    return wanted


def load_model(
    folder: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: bool = False,
) -> Transformer:
    """The Transformer with its weights on `device` as `dtype`, not requiring gradients.

    device "auto" is CUDA where there is one, else the CPU; dtype "auto" is the checkpoint's own on CUDA, float32 on the
    CPU. Needs memory for one copy of the model and one tensor. Raises CheckpointError.
    """
    folder = checkpoint_folder(folder)
    return _load_model(folder, *_plan(folder, device, dtype), progress)


def _load_model(folder: Path, config: ModelConfig, family: Family, device, asked, progress) -> Transformer:
    with torch.device("meta"):  # shapes without memory
        whole, model = Transformer(config), tensor_parallel.shard(config)  # of all, and of what this process is to have
    source, tensors = _stored_tensors(folder, _ends(family) if config.tied else ())
    wanted = _match(whole, family, source, tensors)
    final = asked or DTYPES[tensors[_ends(family)[0]].dtype]
    shapes, own = ({name: p.shape for name, p in each.named_parameters(remove_duplicate=False)} for each in (whole, model))
    for name, ours in tqdm(wanted.items(), "load weights", unit=" tensors", disable=not progress):
        stored, row = tensors[name], 0
        for part in ours:
            weight = _read(stored, *(() if own[part] == stored.shape else tensor_parallel.shard_slices(shapes[part], own[part], row)))
            row += shapes[part][0]
            module, _, kind = part.rpartition(".")
            if family.interleaved and module.endswith(("attn.q", "attn.k")):
                weight = weight.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)  # (H*D, C)
            weight = weight.to(device, final, copy=True)  # never a view of the file
            if not torch.stack(weight.aminmax()).isfinite().all():  # min and max of a tensor with a NaN are NaN
                problem = f"has values that are not finite (stored as {stored.dtype}, loaded as {final})"
                raise CheckpointError(stored.file, f"the tensor {name!r} {problem}")
            setattr(model.get_submodule(module), kind, nn.Parameter(weight, requires_grad=False))
    if config.tied:
        model.head.weight = model.embed.weight
    if N_RANKS > 1:
        tensor_parallel.connect(model, config.vocab_size)
    if device.type == "cuda":
        cuda_graph.record_decode(model)
    return model.eval()


def _device(folder: Path, device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if N_RANKS > 1:
            tensor_parallel.init_distributed(device)
        torch.empty(0, device=device)  # raises where there is no such device
        return device
    except (AssertionError, RuntimeError) as error:
        raise CheckpointError(folder, f"cannot be loaded on the device {str(device)!r} ({error})") from None


def _plan(folder: Path, device, dtype) -> tuple[ModelConfig, Family, torch.device, torch.dtype | None]:
    """What to load, the device, and the dtype, None for that of the files. Raises CheckpointError if the model has no room there,
    unless the files do not hold so large a model anyway. Reads config.json and the weights' index alone."""
    config, family = _read_config(folder)
    device = _device(folder, device)
    known = {str(each).removeprefix("torch."): each for each in DTYPES.values()}
    auto = torch.float32 if device.type == "cpu" else None
    asked = dtype if isinstance(dtype, torch.dtype) else auto if dtype == "auto" else known.get(dtype, torch.int8)
    if asked not in (None, *known.values()):
        raise CheckpointError(folder, f"cannot be loaded as {dtype} (supported: {', '.join(known)})")

    try:
        with torch.device("meta"):
            counts = [[sum(p.numel() for p in make(replace(config, n_layers=n)).parameters()) for n in (0, 1)]
                      for make in (Transformer, tensor_parallel.shard)]  # fmt: skip
    except ValueError as error:
        raise CheckpointError(folder, error) from None
    whole, numbers = (none + (one - none) * config.n_layers for none, one in counts)
    found = folder_weights(folder)
    paths = [folder / file for file in found.files] if found else []
    stored = sum(path.stat().st_size for path in paths if path.is_file())
    if asked:
        itemsize = asked.itemsize
    else:  # The files' dtype. They may hold more than the model, a tied head once again, but never twice as much.
        itemsize = max((size for size in (2, 4, 8) if size * whole <= stored), default=2)
    need, free = numbers * itemsize, _free_bytes(device)
    free /= N_RANKS if device.type == "cpu" else 1  # which they share
    if need > free and stored >= 2 * whole:
        fitting = [name for name, size in (("float32", 4), ("bfloat16", 2)) if numbers * size <= free]
        hint = f"it fits with --dtype {fitting[0]}" if fitting else "no --dtype makes it fit"
        name = f" as {str(asked)[6:]}" if asked else ""
        problem = f"needs {need / 1e9:.1f} GB{name}, and the {device.type} has {free / 1e9:.1f} GB free; {hint}"
        raise CheckpointError(folder, problem)
    return config, family, device, asked


def _free_bytes(device: torch.device) -> float:
    """Memory that the device has for weights; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [math.inf]
    if device.type == "cpu":
        with suppress(OSError, ValueError, AttributeError):
            free += [1024 * int(re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[0])]
        with suppress(OSError, ValueError):  # a container's own limit
            limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
            cached = int(re.findall(r"^inactive_file (\d+)", Path("/sys/fs/cgroup/memory.stat").read_text(), re.M)[0])
            free += [limit - used + cached]
    return min(free)


def load(
    folder: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a checkpoint: a folder, or org/name or org/name@revision on the Hugging Face hub, which is
    downloaded into the hub's cache first. See load_model for device and dtype.

    progress shows a bar on stderr. Raises CheckpointError; missing files are reported before any weight is read.
    """
    folder = checkpoint_folder(folder)
    plan = _plan(folder, device, dtype)
    tokenizer, config = Tokenizer(folder), plan[0]
    if tokenizer.plain_size > config.vocab_size:  # added tokens may lie beyond: one for padding has no embedding in some models
        sizes = f"{tokenizer.plain_size} tokens, more than config.json's vocab_size, {config.vocab_size}"
        raise CheckpointError(tokenizer.path, f"has {sizes}: it belongs to another model")
    return _load_model(folder, *plan, progress), tokenizer
