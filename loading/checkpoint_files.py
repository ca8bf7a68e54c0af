"""A checkpoint's files: the folder that is meant, which files in it are the weights, reading JSON.

Whatever is wrong is raised as CheckpointError: one line that names the file and the key.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cli.process import one_line


class CheckpointError(Exception):
    """A checkpoint cannot be used. The message is one line: file, tensor or key, what is wrong."""

    def __init__(self, where: Path | str, problem: object):
        super().__init__(one_line(f"{where}: {problem}"))


# --------------------------------------------------------------------------------- single files


def check_file(path: Path):
    """Raise CheckpointError unless `path` is a plain file that opens.

    Reading a pipe or a device might never end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(path, "is not a file")
        path.open("rb").close()
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except OSError as error:  # no permission, or symbolic links that lead in a circle
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from None


def read_file(path: Path) -> bytes:
    """A plain file's bytes. Raises CheckpointError."""
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:  # a bad disk
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from None


# ----------------------------------------------------------------------------------------- JSON

REQUIRED: Any = object()  # in place of a default: the key must be there
KIND_NAMES = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "string",
    dict: "object",
    list: "list",
}
# The limits of numbers where the caller gives no other.
LARGEST = {int: 2**31, float: sys.float_info.max}


class JsonObject:
    """A JSON object that knows where it came from, so that a complaint can name file and key.

    path     the file
    values   what is in it: {key: value}
    prefix   of the keys in complaints, for an object within another: "rope_parameters."
    aliases  {our name of a key: the file's}, where the file calls keys differently
    """

    def __init__(
        self,
        path: Path,
        values: Any,
        prefix: str = "",
        aliases: dict[str, str] | None = None,
    ):
        if not isinstance(values, dict):
            what = prefix.rstrip(".") or "the file"
            raise CheckpointError(path, f"{what} is not a JSON object")
        self.path = path
        self.values = values
        self.prefix = prefix
        self.aliases = aliases or {}

    @classmethod
    def read(
        cls, path: Path, optional: bool = False, aliases: dict[str, str] | None = None
    ) -> JsonObject:
        """The object in a file; an empty one where there is no file, if it is `optional`."""
        if optional and not os.path.lexists(path):
            return cls(path, {})
        text = read_file(path)
        try:
            values = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(path, f"cannot be read as JSON ({error})") from None
        return cls(path, values, aliases=aliases)

    def raw(self, key: str) -> Any:
        """The value of a key as it stands in the file; None if it is missing."""
        return self.values.get(self.aliases.get(key, key))

    def get(
        self,
        key: str,
        kind: Any,
        default: Any = REQUIRED,
        *,
        above: float = 0,
        most: float | None = None,
    ) -> Any:
        """The value of a key, which must be of this kind; null is as good as missing.

        A number must also be > above and <= most, by default LARGEST; so it is finite.
        """
        value = self.raw(key)
        if value is None:
            if default is REQUIRED:
                raise self.error(key, "is missing")
            return default
        is_whole = kind is float and type(value) is int
        if type(value) is not kind and not is_whole:
            raise self.error(key, f"is {value!r:.80}, not of the kind: {KIND_NAMES[kind]}")
        if kind in LARGEST:
            largest = LARGEST[kind] if most is None else most
            if not above < value <= largest:
                raise self.error(key, f"is {value!r:.80}, not between 0 and {largest}")
        return kind(value)

    def shared(
        self,
        key: str,
        kind: Any,
        outer: JsonObject,
        default: Any = REQUIRED,
        *,
        most: float | None = None,
    ) -> Any:
        """The value of a key that may stand here, or in `outer`, the object around this one.

        Where it stands in both, they must agree.
        """
        if self.raw(key) is None:
            return outer.get(key, kind, default, most=most)
        value = self.get(key, kind, most=most)
        older = outer.get(key, kind, value, most=most)
        if older != value:
            newer = f"{self.prefix}{key}, its newer place, {value!r}"
            raise outer.error(key, f"is {older!r}, but {newer}: remove one")
        return value

    def error(self, key: str, problem: str) -> CheckpointError:
        """A CheckpointError about a key, for the caller to raise."""
        return CheckpointError(self.path, f"{self.prefix}{self.aliases.get(key, key)} {problem}")


# ------------------------------------------------------------------------- the weights' files


class WeightFiles(NamedTuple):
    """The files that hold a checkpoint's weights, by name."""

    # The file that says which tensors there are: the only one, or the index of several.
    source: str
    files: list[str]
    # {tensor: file}, as the index says; None if there is no index.
    weight_map: dict[str, str] | None


MODEL = "model.safetensors"
CONSOLIDATED = "consolidated.safetensors"  # in the form that Mistral AI gives out


def weights_name(has: Callable[[str], bool]) -> str:
    """What the weights would be called if they lie in one file; has: see weight_files.

    params.json without a config.json is Mistral's own form.
    """
    if has("params.json") and not has("config.json"):
        return CONSOLIDATED
    return MODEL


def weight_files(has: Callable[[str], bool], path_of: Callable[[str], Path]) -> WeightFiles | None:
    """The files that hold the weights of a folder or of a repository on the hub; None without any.

    That is weights_name(), or, if it is not there, the shards that its index names, whatever they
    are called. Transformers looks for them in this order, too. Nothing else that lies there counts,
    as none of it is read: the same weights again in shards or in Mistral's form, variants, other
    folders.

    has(name) says whether there is such a file, path_of(name) gives the index's own path.
    Raises CheckpointError for a bad index.
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
            problem = f"the tensor {tensor!r} is put in {file!r}, not a safetensors file here"
            raise CheckpointError(index, problem)
    return WeightFiles(source, sorted(set(weight_map.values())), weight_map)


def folder_weights(folder: Path) -> WeightFiles | None:
    """weight_files() of a folder. Files that the index names may be missing."""
    return weight_files(lambda name: os.path.lexists(folder / name), folder.joinpath)


def missing_weights(folder: Path) -> CheckpointError:
    """The error of a folder without weights, or with weights only in a form that is not read."""
    other_format = unreadable_weights(folder)
    if other_format is not None:
        problem = "GGUF and pickles are not read; convert the weights to safetensors"
        return CheckpointError(other_format, problem)

    def has(name):
        return os.path.lexists(folder / name)

    name = weights_name(has)
    return CheckpointError(folder / name, f"no such file, nor {name}.index.json{misplaced(has)}")


def misplaced(has: Callable[[str], bool]) -> str:
    """A hint for the end of a line: the weights are there, but under another form's name."""
    if weights_name(has) == CONSOLIDATED:
        return ""
    for file in (CONSOLIDATED, f"{CONSOLIDATED}.index.json"):
        if has(file):
            return f"; {file} is there, but goes with params.json"
    return ""


def unreadable_weights(folder: Path) -> Path | None:
    """A file of weights in a format that is not read, where there is one and no safetensors."""
    files = sorted(folder.glob("*"))
    if any(path.suffix.lower() == ".safetensors" for path in files):
        return None
    for suffix in (".gguf", ".bin", ".pth", ".pt"):
        for path in files:
            if path.suffix.lower() == suffix:
                return path
    return None


# ----------------------------------------------------------------------------------- the folder

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")  # org/name, org/name@revision
HUB_ADDRESS = re.compile(r"https?:/+[^/]+/([\w.-]+/[\w.-]+)")


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint: an existing one, or that of a model on the Hugging Face hub.

    The files of org/name and org/name@revision are downloaded first if they are not in the hub's
    cache. Raises CheckpointError, saying what to give instead.
    """
    name = str(checkpoint)
    folder = Path(checkpoint)
    if not name.strip():
        problem = "the name is empty; give a folder, or a model of the Hugging Face hub, org/name"
        raise CheckpointError("checkpoint", problem)
    if os.path.isdir(folder):
        check_has_config(folder)
        return folder
    if os.path.lexists(folder):
        note = " (GGUF is not read)" if folder.suffix == ".gguf" else ""
        problem = f"is a file{note}, or cannot be opened; give the folder that it is in"
        raise CheckpointError(folder, problem)
    link = HUB_ADDRESS.match(name)
    if link:
        # A Path has made one slash of two.
        address = re.sub("^(https?:)/+", r"\1//", name)
        problem = "no such folder; a model of the Hugging Face hub is given by its name alone,"
        raise CheckpointError(address, f"{problem} {link[1]}")
    if isinstance(checkpoint, Path) or not HUB_NAME.fullmatch(name):
        raise CheckpointError(folder, "no such folder")
    return download_from_hub(name)


def check_has_config(folder: Path):
    """Raise CheckpointError where a folder has no configuration, but it is clear what was meant."""
    for name in ("config.json", "params.json"):
        if os.path.lexists(folder / name):
            return
    # A folder of checkpoints, or a model's folder in the hub's cache.
    below = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    if below:
        folders = sorted(path.parent for path in below)
        meant = ", ".join(str(each) for each in folders[:3])
        raise CheckpointError(folder, f"has no config.json itself; did you mean {meant}?")
    other_format = unreadable_weights(folder)
    if other_format is not None:
        problem = (
            f"has no config.json, but {other_format.name}; GGUF and pickles are not read: "
            "give a folder with safetensors"
        )
        raise CheckpointError(folder, problem)


# -------------------------------------------------------------------------------------- the hub

# What is downloaded beside the weights, where it is there: all of these,
SMALL_FILES = re.compile(
    r"(generation_config|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
)
# and the first of each of these, as the others are not read then.
ALTERNATIVES = (
    ("config.json", "params.json"),
    ("tokenizer.json", "tokenizer.model", "tokenizer.model.v3"),
)


def download_from_hub(name: str) -> Path:
    """The folder of org/name or org/name@revision in the hub's cache, complete.

    What is missing of the files that we read is downloaded, with a progress bar.
    Raises CheckpointError.
    """
    # These take a while to import.
    from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download

    repo, _, revision = name.partition("@")
    where: dict[str, Any] = {"repo_id": repo, "revision": revision or None}
    label = f"{name} (no such folder; taken as a model of the Hugging Face hub)"
    try:
        siblings = HfApi().model_info(**where).siblings or []
        listed = {sibling.rfilename for sibling in siblings}
        found = weight_files(
            has=listed.__contains__,
            path_of=lambda file: Path(hf_hub_download(filename=file, **where)),
        )
        wanted = files_to_download(label, listed, found)
        return Path(snapshot_download(**where, allow_patterns=wanted))
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        problem = "is gated: ask for access on its page, then set HF_TOKEN or run `hf auth login`"
    except errors.RevisionNotFoundError:
        problem = f"has no revision {revision!r}"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        problem = "is not there either, or is private: then set HF_TOKEN"
    except Exception as error:  # noqa: BLE001 (no network, or told not to use it, or it broke off)
        # The cache may have everything.
        try:
            cached = snapshot_download(**where, local_files_only=True, allow_patterns="config.json")
            return Path(cached)
        except errors.LocalEntryNotFoundError:
            why = f"{constants.ENDPOINT} does not answer ({error})"
            if constants.HF_HUB_OFFLINE:
                why = "HF_HUB_OFFLINE is set"
            problem = f"is not in the cache, {constants.HF_HUB_CACHE}, and {why}"
    raise CheckpointError(label, problem)


def files_to_download(label: str, listed: set[str], found: WeightFiles | None) -> list[str]:
    """Those of a repository's files that we read. Raises CheckpointError where weights are missing.

    label: the repository, for messages; listed: all its files; found: its weights.
    """
    if found is None:
        if not any(file.endswith(".safetensors") for file in listed):
            problem = "has no safetensors weights; pickles and GGUF are not read"
            raise CheckpointError(label, problem)
        has = listed.__contains__
        name = weights_name(has)
        raise CheckpointError(label, f"has no {name}, nor {name}.index.json{misplaced(has)}")
    for file in found.files:
        if file not in listed:
            raise CheckpointError(label, f"has no {file}, which its {found.source} names")
    wanted = {found.source, *found.files}
    wanted.update(file for file in listed if SMALL_FILES.fullmatch(file))
    for names in ALTERNATIVES:
        there = [name for name in names if name in listed]
        wanted.update(there[:1])
    return sorted(wanted)
