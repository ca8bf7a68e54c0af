"""Load a Hugging Face checkpoint folder: load(folder) -> (Transformer, Tokenizer).

    config.json                                   the model's dimensions
    model.safetensors                             the weights, or in several files:
    model.safetensors.index.json + the files it names
    tokenizer.json or tokenizer.model             the tokenizer (`tokenizers` or SentencePiece format)
    tokenizer_config.json, generation_config.json, chat_template.jinja         optional: special tokens, chat template

Nothing is guessed: a tensor too many or too few, a wrong shape, a value that is not finite, or a setting that this
model does not compute is refused. Whatever is wrong is raised as CheckpointError: one line that names the file and the
tensor or key.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2.sandbox
import sentencepiece
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from model import ModelConfig, Transformer

# What differs between the families we read; everything else in their files is the same.
FAMILIES = {"llama": {"window": False}, "mistral": {"window": True}}

# Names in the Transformer -> names in the files: outside and inside the blocks (model.layers.N.)
NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
IGNORED = ".rotary_emb.inv_freq"  # LLaMA-2's files carry RoPE's frequencies; ours are computed from config.json
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(Exception):
    """A checkpoint cannot be used. The message is one line: the file, the tensor or key, what is wrong."""

    def __init__(self, where: Path, problem: object):
        super().__init__(" ".join(f"{where}: {problem}".split()))


class JsonObject:
    """A JSON object that knows where it came from, so that every complaint can name the file and the key."""

    def __init__(self, path: Path, values: Any, prefix: str = ""):
        if not isinstance(values, dict):
            raise CheckpointError(path, f"{prefix or 'the file '}is not a JSON object")
        self.path, self.values, self.prefix = path, values, prefix

    @classmethod
    def read(cls, path: Path, optional: bool = False) -> JsonObject:
        """The object in a file; if `optional`, an empty one where there is no file."""
        if optional and not os.path.exists(path):
            return cls(path, {})
        try:
            return cls(path, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise CheckpointError(path, "no such file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(path, f"cannot be read as JSON ({error})") from None

    def get(self, key: str, kind: Any, *default: Any, most: float = 2**31) -> Any:
        """The value of a key, of the kind asked for; a number also > 0 and <= most. null is as good as missing."""
        value = self.values.get(key)
        if value is None:
            if default:
                return default[0]
            raise self.error(key, "is missing")
        if type(value) is not kind and not (kind is float and type(value) is int):
            words = {int: "whole number", float: "number", bool: "true or false", str: "string", dict: "object"}
            raise self.error(key, f"is {value!r:.80}, not of the kind: {words[kind]}")
        if kind in (int, float) and not 0 < value <= most:
            raise self.error(key, f"is {value!r:.80}, not between 0 and {most}")
        return kind(value)

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(self.path, f"{self.prefix}{key} {problem}")


# --------------------------------------------------------------------------------------------------------- config


def read_config(folder: str | Path) -> ModelConfig:
    """config.json as a ModelConfig. Raises CheckpointError, also for settings that our model does not compute."""
    if not os.path.isdir(folder):  # os.path's tests are false, not an error, for a path out of reach
        raise CheckpointError(Path(folder), "no such folder")
    config = JsonObject.read(Path(folder) / "config.json")
    family = config.get("model_type", str)
    if family not in FAMILIES:
        raise config.error("model_type", f"{family!r} is not supported (supported: {', '.join(FAMILIES)})")
    activation = config.get("hidden_act", str, "silu")
    if activation != "silu":
        raise config.error("hidden_act", f"{activation!r} is not supported (supported: silu)")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key, bool, False):
            raise config.error(key, "is true; projections with a bias are not supported")
    if config.values.get("quantization_config") is not None:
        raise config.error("quantization_config", "is set; use the checkpoint with unquantised weights")

    width = config.get("hidden_size", int, most=2**20)
    heads = config.get("num_attention_heads", int, most=2**12)
    kv_heads = config.get("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"is {kv_heads}, which does not divide num_attention_heads, {heads}")
    if config.values.get("head_dim") is None and width % heads:
        raise config.error("num_attention_heads", f"is {heads}, which does not divide hidden_size, {width}")
    head_dim = config.get("head_dim", int, width // heads, most=2**12)
    if head_dim % 2:
        raise config.error("head_dim", f"is {head_dim}; RoPE needs an even number")
    window = None
    if FAMILIES[family]["window"] and config.values.get("sliding_window", 0) is not None:
        window = config.get("sliding_window", int, 4096)  # null: no window; missing: Mistral's default
    rope_theta, rope_scaling = _rope(config)
    return ModelConfig(
        vocab_size=config.get("vocab_size", int, most=2**24),
        width=width,
        n_layers=config.get("num_hidden_layers", int, most=1000),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=config.get("intermediate_size", int, most=2**24),
        rope_theta=rope_theta,
        norm_eps=config.get("rms_norm_eps", float, most=1),
        max_positions=config.get("max_position_embeddings", int),
        tied=config.get("tie_word_embeddings", bool, False),
        window=window,
        rope_scaling=rope_scaling,
    )


def _rope(config: JsonObject) -> tuple[float, dict[str, float] | None]:
    """RoPE's theta and Llama 3.1's scaling, from today's rope_parameters or from rope_theta and rope_scaling."""
    key = "rope_parameters" if config.values.get("rope_parameters") is not None else "rope_scaling"
    rope = JsonObject(config.path, config.get(key, dict, {}), f"{key}.")
    theta = rope.get("rope_theta", float, config.get("rope_theta", float, 10000.0))
    untyped = "default" if "factor" not in rope.values else "(none)"
    kind = rope.get("rope_type", str, rope.get("type", str, untyped))
    for part in (config, rope):
        if part.get("partial_rotary_factor", float, 1.0) != 1:
            raise part.error("partial_rotary_factor", "other than 1 is not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise config.error(key, f"has the rope type {kind!r}, which is not supported (supported: default, llama3)")
    scaling = {name: rope.get(name, float) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise rope.error("low_freq_factor", "is not below high_freq_factor")
    name = "original_max_position_embeddings"
    return theta, scaling | {name: rope.get(name, int)}


# -------------------------------------------------------------------------------------------------------- weights


class Stored(NamedTuple):
    """Where a tensor lies, and what its file's header says about it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except FileNotFoundError:
        raise CheckpointError(file, "no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(file, f"cannot be read as safetensors, is it complete? ({error})") from None


def _read(stored: Stored, name: str) -> torch.Tensor:
    """One tensor, a view of the file. Each call maps the file anew, so that dropping the tensor also drops the file's
    pages from this process: the peak is one copy of the model, not two."""
    with _opened(stored.file) as opened:
        return opened.get_tensor(name)


def _stored_tensors(folder: Path) -> tuple[Path, dict[str, Stored]]:
    """The file that lists the tensors, and all tensors by name. Reads headers only; a missing shard shows up here."""
    source = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    weight_map: dict[str, str] | None = None
    files = ["model.safetensors"]
    if not os.path.exists(source) and os.path.exists(index):
        source, weight_map = index, JsonObject.read(index).get("weight_map", dict)
        for name, file in weight_map.items():
            if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
                raise CheckpointError(index, f"the tensor {name!r} is put in {file!r}, not a safetensors file here")
        files = sorted(set(weight_map.values()))
    elif not os.path.exists(source):
        pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".pth", ".pt")]
        if pickles:
            raise CheckpointError(folder / pickles[0], "pickles are not read; convert the weights to safetensors")
        raise CheckpointError(source, "no such file, nor model.safetensors.index.json")
    tensors = {}
    for file in files:
        with _opened(folder / file) as opened:
            for name in opened.offset_keys():
                if weight_map is not None and weight_map.get(name) != file:
                    raise CheckpointError(folder / file, f"holds the tensor {name!r}, unlike {index.name} says")
                header = opened.get_slice(name)
                tensors[name] = Stored(folder / file, header.get_dtype(), tuple(header.get_shape()))
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise CheckpointError(folder / file, f"the tensor {name!r} is missing, though {index.name} says it is here")
    return source, tensors


def stored_name(parameter: str) -> str:
    """blocks.3.attn.q.weight -> model.layers.3.self_attn.q_proj.weight"""
    module, _, weight = parameter.rpartition(".")
    if module.startswith("blocks."):
        _, layer, inner = module.split(".", 2)
        return f"model.layers.{layer}.{BLOCK_NAMES[inner]}.{weight}"
    return f"{NAMES[module]}.{weight}"


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
    folder = Path(folder)
    config = read_config(folder)
    source, tensors = _stored_tensors(folder)
    with torch.device("meta"):  # shapes without memory
        model = Transformer(config)

    # every tensor exactly once, in the right shape
    wanted = {stored_name(name): parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, shape in wanted.items():
        if config.tied and name == "lm_head.weight" and name not in tensors:
            continue
        if name not in tensors:
            raise CheckpointError(source, f"the tensor {name!r} is missing")
        stored = tensors[name]
        if stored.shape != shape:
            sizes = f"{list(stored.shape)}, config.json asks for {list(shape)}"
            raise CheckpointError(stored.file, f"the tensor {name!r} has the shape {sizes}")
        if stored.dtype not in DTYPES:
            problem = f"has the dtype {stored.dtype}, which is not supported (supported: {', '.join(DTYPES)})"
            raise CheckpointError(stored.file, f"the tensor {name!r} {problem}")
    for name, stored in tensors.items():
        if name not in wanted and not name.endswith(IGNORED):
            raise CheckpointError(stored.file, f"the tensor {name!r} is not part of the model in config.json")
    embedding = stored_name("embed.weight")
    if config.tied and "lm_head.weight" in tensors:
        head = tensors["lm_head.weight"]
        if not torch.equal(_read(tensors[embedding], embedding), _read(head, "lm_head.weight")):
            problem = f"differs from {embedding!r}, but config.json says tie_word_embeddings"
            raise CheckpointError(head.file, f"the tensor 'lm_head.weight' {problem}")

    device = _device(folder, device)
    known = {str(each).removeprefix("torch."): each for each in DTYPES.values()}
    if dtype == "auto":
        dtype = DTYPES[tensors[embedding].dtype] if device.type == "cuda" else torch.float32
    final = dtype if isinstance(dtype, torch.dtype) else known.get(dtype)
    if final not in known.values():
        raise CheckpointError(folder, f"cannot be loaded as {dtype} (supported: {', '.join(known)})")

    for name, _ in tqdm(list(model.named_parameters()), "load weights", unit=" tensors", disable=not progress):
        stored = tensors[stored_name(name)]
        weight = _read(stored, stored_name(name)).to(device, final, copy=True)  # never a view of the file
        if not torch.stack(weight.aminmax()).isfinite().all():  # min and max of a tensor with a NaN are NaN
            problem = f"has values that are not finite (stored as {stored.dtype}, loaded as {final})"
            raise CheckpointError(stored.file, f"the tensor {stored_name(name)!r} {problem}")
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight, requires_grad=False))
    if config.tied:
        model.head.weight = model.embed.weight
    return model.eval()


def _device(folder: Path, device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)  # raises where there is no such device
        return device
    except (AssertionError, RuntimeError) as error:
        raise CheckpointError(folder, f"cannot be loaded on the device {str(device)!r} ({error})") from None


# ------------------------------------------------------------------------------------------------------ tokenizer


@contextmanager
def _tokenizing(path: Path, doing: str) -> Iterator[None]:
    """`tokenizers` raises bare Exceptions, and where a file makes no sense its Rust code may panic."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(path, f"cannot {doing} ({error})") from None
        raise


class _TokenizerJson:
    """tokenizer.json, through the `tokenizers` package."""

    def __init__(self, path: Path):
        values = JsonObject.read(path).values
        values |= {"truncation": None, "padding": None}  # some files carry their training's
        post = values.get("post_processor") or {}
        with _tokenizing(path, "be read as a tokenizer"):
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
            self.vocab: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
            templates = [p["single"] for p in post.get("processors", [post]) if p.get("type") == "TemplateProcessing"]
            first = [template[0]["SpecialToken"]["id"] for template in templates if "SpecialToken" in template[0]]
            self.bos = {self.vocab[token] for token in first}
        self.adds_bos, self.eos = bool(self.bos), set[int]()
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        self.tokenizer.encode_special_tokens = not parse_special
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class _SentencePiece:
    """tokenizer.model, through SentencePiece. Tokens that the JSON files beside it add count as special."""

    adds_bos = True

    def __init__(self, path: Path):
        try:
            proto = path.read_bytes() or b"empty"  # no bytes at all would pass for a model
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(path, f"cannot be read as a SentencePiece model ({error})") from None
        size = self.model.get_piece_size()
        self.vocab = {self.model.id_to_piece(i): i for i in range(size)}
        self.bos, self.eos = {self.model.bos_id()} - {-1}, {self.model.eos_id()} - {-1}
        self.special = {t: i for t, i in self.vocab.items() if self.model.is_control(i) or self.model.is_unknown(i)}
        config = JsonObject.read(path.with_name("tokenizer_config.json"), optional=True)
        added = JsonObject.read(path.with_name("added_tokens.json"), optional=True).values.items()
        try:
            described = config.get("added_tokens_decoder", dict, {}).items()
            tokens = {str(t): int(i) for t, i in [*added, *((d["content"], i) for i, d in described)]}
        except (KeyError, TypeError, ValueError, OverflowError):
            raise CheckpointError(config.path, "or added_tokens.json: not a table of added tokens") from None
        self.special |= {token: i for token, i in tokens.items() if i >= size}
        self.vocab |= self.special

    def encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return self.model.encode(text)
        longest_first = sorted(self.special, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
            ids += [self.special[part]] if part in self.special else self.model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class Tokenizer:
    """A checkpoint's tokenizer, from tokenizer.json or else SentencePiece's tokenizer.model, and its chat template.

    Attributes: vocab_size (highest id + 1), bos_id (None if there is none), eos_ids (a set: any of them ends a text).
    Raises CheckpointError.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.path = folder / "tokenizer.json"
        if os.path.exists(self.path):
            self._backend: _TokenizerJson | _SentencePiece = _TokenizerJson(self.path)
        else:
            self.path = folder / "tokenizer.model"
            if not os.path.exists(self.path):
                raise CheckpointError(folder, "has no tokenizer.json and no tokenizer.model")
            self._backend = _SentencePiece(self.path)
        tokens = {i: token for token, i in self._backend.vocab.items()}
        special = set(self._backend.special.values())
        self.vocab_size = max(tokens, default=-1) + 1
        self._shown = {i: token for i, token in tokens.items() if i not in special}  # what decode() does not drop

        # EOS: the first that names any. BOS: generation_config.json says nothing about it.
        files = ("tokenizer_config.json", "generation_config.json", "config.json")
        config, generation, model = (JsonObject.read(folder / name, optional=True) for name in files)
        named = self._named(config, "eos_token")
        numbered = self._numbered(generation, "eos_token_id") or self._numbered(model, "eos_token_id")
        self.eos_ids = numbered or named or self._backend.eos
        bos = self._named(config, "bos_token") or self._numbered(model, "bos_token_id") or self._backend.bos
        self.bos_id = min(bos, default=None)
        self._add_bos = config.get("add_bos_token", bool, self._backend.adds_bos)
        if self._add_bos and self.bos_id is None:
            raise CheckpointError(self.path, "BOS is to be added to a text, but no file says which token it is")

        eos = min(named or self.eos_ids, default=-1)
        self._template_tokens = {"bos_token": tokens.get(min(bos, default=-1), ""), "eos_token": tokens.get(eos, "")}
        self._template_path, template = config.path, config.values.get("chat_template")
        if os.path.exists(folder / "chat_template.jinja"):
            self._template_path = folder / "chat_template.jinja"
            try:
                template = self._template_path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise CheckpointError(self._template_path, f"cannot be read ({error})") from None
        if isinstance(template, list):  # several, by name
            default = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = default[0].get("template") if default else None
        if template is not None and not isinstance(template, str):
            raise config.error("chat_template", "is neither a string nor a list of named templates")
        self._template = template

    def _named(self, config: JsonObject, key: str) -> set[int]:
        """The id of a token that a file names: a string, or an object with the string as its content."""
        token = config.values.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not token:
            return set()
        if not isinstance(token, str) or token not in self._backend.vocab:
            raise config.error(key, f"{token!r:.80} is not in the vocabulary")
        return {self._backend.vocab[token]}

    def _numbered(self, config: JsonObject, key: str) -> set[int]:
        """The ids that a file gives: one number or a list."""
        value = config.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise config.error(key, f"is {value!r:.80}, not in the tokenizer's vocabulary of {self.vocab_size}")
        return set(ids)

    def encode(self, text: str, bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Text to ids. bos: put BOS in front (None: if the checkpoint's files say so).

        "<s>" and the like in `text` are ordinary characters unless parse_special. Raises CheckpointError.
        """
        bos = self._add_bos if bos is None else bos
        if bos and self.bos_id is None:
            raise CheckpointError(self.path, "there is no BOS token to add")
        with _tokenizing(self.path, "encode the text"):
            ids = self._backend.encode(text, parse_special)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text. Special tokens and ids outside the vocabulary are dropped."""
        with _tokenizing(self.path, "decode the tokens"):
            return self._backend.decode([i for i in ids if i in self._shown])

    def stream(self) -> Stream:
        """A new Stream: ids in one by one, text out as soon as it is certain."""
        return Stream(self)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation, [{"role": "user", "content": "..."}, ...], up to where the assistant speaks next.

        Raises CheckpointError if there is no chat template or it fails, which it may do on purpose.
        """
        if self._template is None:
            raise CheckpointError(self.path.parent, "has no chat template; is it a base model? prompt it without chat")

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # a template is a program that came with the checkpoint: the sandbox keeps it away from everything else
        sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        known = {"messages": messages, "add_generation_prompt": True, **self._template_tokens}
        try:
            text = sandbox.from_string(self._template).render(known)
        except Exception as error:  # noqa: BLE001 (a template can fail in as many ways as any program)
            raise CheckpointError(self._template_path, f"the chat template failed ({error})") from None
        return self.encode(text, bos=False, parse_special=True)


class Stream:
    """Text from ids that come one at a time: all of push()'s results and flush()'s, joined, are decode(all ids).

    A token may hold only part of a character, and text that was given out cannot be taken back, so some is held back:
    an unfinished character, which decodes to U+FFFD at the end, and a run of byte tokens (<0xE2>) while it goes on,
    because some decoders turn all of it into U+FFFD when any of it is not UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Only the latest ids are decoded again. The context is there because decoders treat the start of a text in a
        # special way (a space is stripped); once some text has come out, the rest no longer depends on what was before.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._given = 0  # characters of decode(context + pending) already given out

    def push(self, token: int) -> str:
        """The text that has become certain with this id, often of this id alone, maybe ""."""
        piece = self._tokenizer._shown.get(token)
        if piece is None:
            return ""
        self._pending.append(token)
        if len(piece) == 6 and piece.startswith("<0x"):
            return ""
        return self._give(last=False)

    def flush(self) -> str:
        """What is left, for after the last id."""
        return self._give(last=True)

    def _give(self, last: bool) -> str:
        text = self._tokenizer.decode(self._context + self._pending)
        end = len(text) - (text.endswith("\N{REPLACEMENT CHARACTER}") and not last)
        new, self._given = text[self._given : end], end
        alone = self._tokenizer.decode(self._pending)
        if end == len(text) and alone:
            self._context, self._pending, self._given = self._pending, [], len(alone)
        return new


def load(
    folder: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """A checkpoint folder's model and tokenizer; see load_model for device and dtype.

    progress shows a bar on stderr. Raises CheckpointError; missing files are reported before any weight is read.
    """
    config = read_config(folder)
    tokenizer = Tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, more than config.json's vocab_size, {config.vocab_size}"
        raise CheckpointError(tokenizer.path, f"has {sizes}: it belongs to another model")
    return load_model(folder, device, dtype, progress), tokenizer
