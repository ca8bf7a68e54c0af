"""Finding a checkpoint's folder and reading its files, so that whatever is wrong with one is said in a line that names it."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class CheckpointError(Exception):
    """A checkpoint cannot be used. The message is one line: the file, the tensor or key, what is wrong."""

    def __init__(self, where: Path | str, problem: object):
        super().__init__(one_line(f"{where}: {problem}"))


def one_line(message: object) -> str:
    """What other people wrote (names, keys, a template's complaint) goes into messages through this: no line breaks, and nothing that
    a terminal obeys."""
    text = " ".join(str(message).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The folder that is meant: an existing one, or, for org/name and org/name@revision, a model of the Hugging Face hub, whose
    files are downloaded first if they are not in its cache. Raises CheckpointError, saying what to give instead.
    """
    name, folder = str(checkpoint), Path(checkpoint)
    if not name.strip():
        raise CheckpointError("checkpoint", "the name is empty; give a folder, or a model of the Hugging Face hub, org/name")
    if os.path.isdir(folder):
        if not any(os.path.lexists(folder / file) for file in ("config.json", "params.json")):
            inside = sorted(path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json"))
            if inside:
                raise CheckpointError(folder, f"has no config.json itself; did you mean {', '.join(map(str, inside[:3]))}?")
            if found := unreadable(folder):
                problem = f"has no config.json, but {found.name}; GGUF and pickles are not read: give a folder with safetensors"
                raise CheckpointError(folder, problem)
        return folder
    if os.path.lexists(folder):
        other = " (GGUF is not read)" if folder.suffix == ".gguf" else ""
        raise CheckpointError(folder, f"is a file{other}, or cannot be opened; give the folder that it is in")
    if link := re.match(r"https?:/+[^/]+/([\w.-]+/[\w.-]+)", name):
        address = re.sub("^(https?:)/+", r"\1//", name)
        raise CheckpointError(address, f"no such folder; a model of the Hugging Face hub is given by its name alone, {link[1]}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", name) or isinstance(checkpoint, Path):
        raise CheckpointError(folder, "no such folder")
    return _from_hub(name)


def unreadable(folder: Path) -> Path | None:
    """A file there of weights in a format that is not read, if there is one, and no safetensors."""
    files = {path.suffix.lower(): path for path in sorted(folder.glob("*"), reverse=True)}
    return None if ".safetensors" in files else next((files[kind] for kind in (".gguf", ".bin", ".pth", ".pt") if kind in files), None)


class WeightFiles(NamedTuple):
    """The files that hold a checkpoint's weights, by name."""

    source: str  # The file that says which tensors there are: the only one, or the index of several.
    files: list[str]
    weight_map: dict[str, str] | None  # Tensor -> file, as the index says. None if there is only one file.


def weights_name(has: Callable[[str], bool]) -> str:
    """What the weights' only file would be called: params.json, without a config.json, is Mistral's own form. See weight_files."""
    if has("params.json") and not has("config.json"):
        return "consolidated.safetensors"
    return "model.safetensors"


def weight_files(has: Callable[[str], bool], path_of: Callable[[str], Path]) -> WeightFiles | None:
    """The files that hold the weights of a folder or of a repository on the hub; None if there are none.

    That is weights_name(), or, if it is not there, the shards that its index names, whatever they are called. In this order
    transformers looks for them too. Nothing else that lies there counts, as none of it is read: the same weights again in shards
    or in Mistral's form, other variants, other folders.

    has(name) says whether there is such a file, path_of(name) gives the index's own path. Raises CheckpointError for a bad index.
    """
    name = weights_name(has)
    if has(name):
        return WeightFiles(name, [name], None)
    source = f"{name}.index.json"
    if not has(source):
        return None
    index = path_of(source)
    weight_map = JsonObject.read(index).get("weight_map", dict)
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
            raise CheckpointError(index, f"the tensor {tensor!r} is put in {file!r}, not a safetensors file here")
    return WeightFiles(source, sorted(set(weight_map.values())), weight_map)


def folder_weights(folder: Path) -> WeightFiles | None:
    """weight_files() of a folder. What the index names may be missing."""
    return weight_files(lambda name: os.path.lexists(folder / name), folder.joinpath)


def misplaced_weights(has: Callable[[str], bool]) -> str:
    """The end of the line that says that weights are missing: a hint, if they are there in a form that goes with another file."""
    other = "consolidated.safetensors"
    if weights_name(has) != other:
        for file in (other, f"{other}.index.json"):
            if has(file):
                return f"; {file} is there, but goes with params.json"
    return ""


FROM_HUB = re.compile(
    r"(generation_config|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
)
FIRST_FROM_HUB = (  # Of these only the first that is there is read.
    ("config.json", "params.json"),
    ("tokenizer.json", "tokenizer.model", "tokenizer.model.v3"),
)


def _from_hub(name: str) -> Path:
    """The model's folder in the hub's cache, complete: what is missing of the files that we read is downloaded, with a progress bar."""
    from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download  # takes a while to import

    repo, _, revision = name.partition("@")
    where: dict[str, Any] = {"repo_id": repo, "revision": revision or None}
    label = f"{name} (no such folder; taken as a model of the Hugging Face hub)"
    try:
        listed = {each.rfilename for each in HfApi().model_info(**where).siblings or []}
        found = weight_files(listed.__contains__, lambda file: Path(hf_hub_download(filename=file, **where)))
        if found is None:
            raise CheckpointError(label, _no_weights(listed))
        missing = [file for file in found.files if file not in listed]
        if missing:
            raise CheckpointError(label, f"has no {missing[0]}, which its {found.source} names")
        wanted = {found.source, *found.files, *filter(FROM_HUB.fullmatch, listed)}
        for alternatives in FIRST_FROM_HUB:
            wanted.update([file for file in alternatives if file in listed][:1])
        return Path(snapshot_download(**where, allow_patterns=sorted(wanted)))
    except errors.GatedRepoError:
        problem = "is gated: ask for access on its page, then set HF_TOKEN or run `hf auth login`"
    except errors.RevisionNotFoundError:
        problem = f"has no revision {revision!r}"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        problem = "is not there either, or is private: then set HF_TOKEN"
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 (no network, or told not to use it, or it broke off: the cache may have everything)
        try:
            return Path(snapshot_download(**where, local_files_only=True, allow_patterns="config.json"))
        except errors.LocalEntryNotFoundError:
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer ({error})"
            problem = f"is not in the cache, {constants.HF_HUB_CACHE}, and {why}"
    raise CheckpointError(label, problem)


def _no_weights(listed: set[str]) -> str:
    """What is wrong with a repository of these files, in which weight_files() finds none."""
    if not any(file.endswith(".safetensors") for file in listed):
        return "has no safetensors weights; pickles and GGUF are not read"
    name = weights_name(listed.__contains__)
    return f"has no {name}, nor {name}.index.json{misplaced_weights(listed.__contains__)}"


def check_file(path: Path) -> None:
    """Raises CheckpointError unless `path` is a plain file that opens: reading a pipe or a device might never end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(path, "is not a file")
        path.open("rb").close()
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except OSError as error:  # no permission, a loop of symbolic links
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from None


def read_file(path: Path) -> bytes:
    """A plain file's bytes. Raises CheckpointError."""
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:  # a bad disk
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from None


class JsonObject:
    """A JSON object that knows where it came from, so that every complaint can name the file and the key.

    `aliases` are for a file that calls the keys differently: {our name: the file's}.
    """

    def __init__(self, path: Path, values: Any, prefix: str = "", aliases: dict[str, str] | None = None):
        if not isinstance(values, dict):
            raise CheckpointError(path, f"{prefix.rstrip('.') or 'the file'} is not a JSON object")
        self.path, self.values, self.prefix, self.aliases = path, values, prefix, aliases or {}

    @classmethod
    def read(cls, path: Path, optional: bool = False, aliases: dict[str, str] | None = None) -> JsonObject:
        """The object in a file; if `optional`, an empty one where there is no file."""
        if optional and not os.path.lexists(path):
            return cls(path, {})
        try:
            return cls(path, json.loads(read_file(path).decode("utf-8")), aliases=aliases)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(path, f"cannot be read as JSON ({error})") from None

    def raw(self, key: str) -> Any:
        """The value of a key as it stands in the file; None if it is missing."""
        return self.values.get(self.aliases.get(key, key))

    def get(self, key: str, kind: Any, *default: Any, above: float = 0, most: float | None = None) -> Any:
        """The value of a key, of the kind asked for; a number also finite, > above and <= most, which is 2**31 for whole numbers
        if it is not given. null is as good as missing."""
        value = self.raw(key)
        if value is None:
            if default:
                return default[0]
            raise self.error(key, "is missing")
        if type(value) is not kind and not (kind is float and type(value) is int):
            words = {int: "whole number", float: "number", bool: "true or false", str: "string", dict: "object", list: "list"}
            raise self.error(key, f"is {value!r:.80}, not of the kind: {words[kind]}")
        most = most or {int: 2**31, float: sys.float_info.max}.get(kind)
        if most and not above < value <= most:
            raise self.error(key, f"is {value!r:.80}, not between 0 and {most}")
        return kind(value)

    def shared(self, key: str, kind: Any, outer: JsonObject, *default: Any, most: float | None = None) -> Any:
        """The value of a key that may stand here or in an object around this one; if in both, it must be the same."""
        values = [each.get(key, kind, most=most) for each in (self, outer) if each.raw(key) is not None]
        if values and values[0] != values[-1]:
            raise outer.error(key, f"is {values[-1]!r}, but {self.prefix}{key}, its newer place, {values[0]!r}: remove one")
        return values[0] if values else outer.get(key, kind, *default, most=most)

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(self.path, f"{self.prefix}{self.aliases.get(key, key)} {problem}")


def token_name(token: Any) -> Any:
    """A token as files name it: by a string, or by an object that has the string as its content."""
    return token.get("content") if isinstance(token, dict) else token


def special_tokens(config: JsonObject) -> tuple[dict[str, str], set[str]]:
    """The tokens that tokenizer_config.json gives a name, {"bos_token": "<s>"}, and these together with those that it lists as special."""
    extra = config.values.get("extra_special_tokens") or config.values.get("additional_special_tokens")
    values = {key: value for key, value in config.values.items() if key.endswith("_token")} | (extra if isinstance(extra, dict) else {})
    named = {key: token for key, token in zip(values, map(token_name, values.values())) if isinstance(token, str)}
    listed = {token for token in map(token_name, extra if isinstance(extra, list) else []) if isinstance(token, str)}
    return named, {*named.values(), *listed} - {""}


def added_tokens(config: JsonObject) -> dict[str, tuple[int, dict[str, bool]]]:
    """Tokens -> (id, flags), of added_tokens.json, which has no flags, and of tokenizer_config.json's added_tokens_decoder; whose ids
    must agree. Raises CheckpointError."""
    added: dict[str, tuple[int, dict[str, bool]]] = {}
    old = JsonObject.read(config.path.with_name("added_tokens.json"), optional=True)
    try:
        listed: list[tuple[str, int, dict[str, bool]]] = [(name, int(i), {}) for name, i in old.values.items()]
        for i, values in config.get("added_tokens_decoder", dict, {}).items():
            entry = JsonObject(config.path, values, f"added_tokens_decoder.{i}.")
            flags = {key: entry.get(key, bool, False) for key in ("special", "lstrip", "rstrip", "single_word")}
            flags["normalized"] = entry.get("normalized", bool, not flags["special"])
            listed.append((entry.get("content", str), int(i), flags))
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(config.path, "or added_tokens.json: not a table of added tokens") from None
    for name, i, flags in listed:
        if not name or i < 0 or added.get(name, (i,))[0] != i:
            raise CheckpointError(config.path, f"or added_tokens.json: the added token {name!r:.80} has two ids, or a bad one")
        added[name] = i, flags
    return added
