"""Matching: which stored tensor holds which of the model's parameters.

Every parameter must be there exactly once, in the right shape, and nothing else may be.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from loading.checkpoint_files import CheckpointError
from loading.families import Family
from loading.find_tensors import DTYPES, StoredTensor, read_tensor
from model import Transformer


class Match(NamedTuple):
    """A tensor to read, and what it holds."""

    name: str  # under which the family's files list it
    stored: StoredTensor
    parameters: list[str]  # the model's parameters in it, row upon row


def stored_name(parameter: str, names: dict[str, str]) -> str:
    """A parameter's name in the files.

    names: see families. With HUGGING_FACE, blocks.3.attn.q.weight is
    model.layers.3.self_attn.q_proj.weight.
    """
    module, _, kind = parameter.rpartition(".")
    layer = "".join(c for c in module if c.isdigit())
    pattern = names[re.sub(r"\d+", "N", module)]
    return pattern.replace("N", layer) + f".{kind}"


def embedding_and_head(family: Family) -> tuple[str, str]:
    """The files' names of the embedding and of the output projection. They may be one tensor."""
    embedding = stored_name("embed.weight", family.names)
    head = stored_name("head.weight", family.names)
    return embedding, head


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of all parameters by name, a tied one under both of its names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: parameter.shape for name, parameter in parameters}


def match_tensors(
    model: Transformer, family: Family, source: Path, tensors: dict[str, StoredTensor]
) -> list[Match]:
    """Every tensor to read, in the model's order.

    model: whole, on the meta device; source and tensors: as find_tensors gives them.
    Raises CheckpointError.
    """
    tied = model.config.tied
    embedding, head = embedding_and_head(family)
    available = dict(tensors)
    if tied and head in available:
        # Some savers keep the matrix under the head's name alone.
        available.setdefault(embedding, available[head])

    shapes = parameter_shapes(model)
    wanted: dict[str, list[str]] = {}  # a tensor's name in the files -> our parameters in it
    for parameter in shapes:
        name = stored_name(parameter, family.names)
        wanted.setdefault(name, []).append(parameter)

    for name, parameters in wanted.items():
        if name in available:
            rows = sum(shapes[parameter][0] for parameter in parameters)
            shape = (rows, *shapes[parameters[0]][1:])
            check_tensor(name, available[name], shape, family)
        elif not (tied and name == head):
            raise CheckpointError(source, f"the tensor {name!r} is missing")

    for name, stored in available.items():
        is_alias = name != stored.name
        if name not in wanted and not is_alias:
            problem = f"the tensor {name!r} is not part of the model in {family.config}"
            raise CheckpointError(stored.file, problem)

    if tied:
        if head in available:
            check_tied(embedding, available[embedding], head, available[head])
        del wanted[head]
    return [Match(name, available[name], parameters) for name, parameters in wanted.items()]


def check_tensor(name: str, stored: StoredTensor, shape: tuple[int, ...], family: Family):
    """Raise CheckpointError unless a tensor has the right shape and a dtype that is read."""
    if stored.shape != shape:
        sizes = f"{list(stored.shape)}, {family.config} asks for {list(shape)}"
        raise CheckpointError(stored.file, f"the tensor {name!r} has the shape {sizes}")
    if stored.dtype not in DTYPES:
        supported = ", ".join(DTYPES)
        problem = f"the dtype {stored.dtype}, which is not supported (supported: {supported})"
        raise CheckpointError(stored.file, f"the tensor {name!r} has {problem}")


def check_tied(
    embedding: str, stored_embedding: StoredTensor, head: str, stored_head: StoredTensor
):
    """Raise CheckpointError if embedding and head are to be one matrix, but are stored as two."""
    if not torch.equal(read_tensor(stored_embedding), read_tensor(stored_head)):
        problem = f"differs from {embedding!r}, but config.json says tie_word_embeddings"
        raise CheckpointError(stored_head.file, f"the tensor {head!r} {problem}")
