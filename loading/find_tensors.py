"""Finding tensors: which ones a checkpoint's safetensors files hold, and reading one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from loading.checkpoint_files import CheckpointError, check_file, folder_weights, missing_weights

# safetensors' names of the dtypes that are read.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# LLaMA-2's files carry RoPE's frequencies; ours are computed from config.json.
IGNORED = ".rotary_emb.inv_freq"


class StoredTensor(NamedTuple):
    """Where a tensor lies, and what its file's header says about it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """A safetensors file. Whatever is wrong with it is raised as CheckpointError."""
    check_file(file)
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError, RuntimeError) as error:
        # RuntimeError: there is no room to map it.
        problem = f"cannot be read as safetensors, is it complete? ({error})"
        raise CheckpointError(file, problem) from None


def read_tensor(stored: StoredTensor, part: tuple[slice, ...] = ()) -> torch.Tensor:
    """One tensor, a view of the file; or, if `part` is given, that part of it, a copy.

    Each call maps the file anew, so that dropping the tensor also drops the file's pages from this
    process. So loading needs room for one copy of the model, not for two.
    """
    with open_safetensors(stored.file) as opened:
        if part:
            return opened.get_slice(stored.name)[part]
        return opened.get_tensor(stored.name)


def find_tensors(folder: Path, optional: tuple[str, ...]) -> tuple[Path, dict[str, StoredTensor]]:
    """The file that lists the tensors, for messages, and all tensors by name.

    Reads headers only. Raises CheckpointError if a shard is missing, or if the index and the shards
    disagree about any but the `optional` tensors.

    Where one tensor has several names, savers keep it under one of them and note the others in the
    header's __metadata__, {another name: its name}. It is found under all of them.
    """
    found = folder_weights(folder)
    if found is None:
        raise missing_weights(folder)
    source = folder / found.source
    weight_map = None
    if found.weight_map is not None:
        weight_map = {
            name: file for name, file in found.weight_map.items() if not name.endswith(IGNORED)
        }

    tensors: dict[str, StoredTensor] = {}
    aliases: dict[str, str] = {}
    for file in found.files:
        path = folder / file
        headers, metadata = read_headers(path)
        aliases |= metadata
        for name, stored in headers.items():
            is_listed = weight_map is None or weight_map.get(name) == file
            if not is_listed and (name not in optional or name in tensors):
                raise CheckpointError(path, f"holds the tensor {name!r}, unlike {source.name} says")
            tensors[name] = stored

    for alias, name in aliases.items():
        if name in tensors:
            tensors.setdefault(alias, tensors[name])

    for name, file in (weight_map or {}).items():
        if name not in tensors and name not in optional:
            problem = f"the tensor {name!r} is missing, though {source.name} says it is here"
            raise CheckpointError(folder / file, problem)
    return source, tensors


def read_headers(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """A file's tensors by name, without the ignored ones, and its __metadata__."""
    tensors = {}
    with open_safetensors(path) as opened:
        metadata = opened.metadata() or {}
        for name in opened.offset_keys():
            if not name.endswith(IGNORED):
                header = opened.get_slice(name)
                shape = tuple(header.get_shape())
                tensors[name] = StoredTensor(path, name, header.get_dtype(), shape)
    return tensors, metadata
