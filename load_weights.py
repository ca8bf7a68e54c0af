"""Load a checkpoint: load(folder, or a name on the Hugging Face hub) -> (Transformer, Tokenizer).

    config.json                                   the model's dimensions
    model.safetensors                             the weights, or in several files:
    model.safetensors.index.json + the files it names
    tokenizer.json, tokenizer.model, ...          see loading/tokenizer.py

or, in the form that Mistral AI gives out, params.json and consolidated.safetensors in place of the
first two. Nothing is guessed: a tensor too many or too few, a wrong shape, a value that is not
finite, or a setting that this model does not compute is refused. Whatever is wrong is raised as
CheckpointError: one line that names the file and the tensor or key.

Loading goes through five steps, the first four in files of their own:

    loading/read_config.py      the configuration -> ModelConfig and Family (loading/families.py)
    loading/memory.py           does the model fit into the device's memory?
    loading/find_tensors.py     the files' headers -> which tensor lies where
    loading/match_tensors.py    which tensor holds which of the model's parameters
    load_weights.py             reading the tensors, onto the device
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from cli.process import N_RANKS
from loading.checkpoint_files import CheckpointError, checkpoint_folder
from loading.families import Family
from loading.find_tensors import DTYPES, find_tensors, read_tensor
from loading.match_tensors import Match, embedding_and_head, match_tensors, parameter_shapes
from loading.memory import check_memory
from loading.read_config import read_model_config
from loading.tokenizer import Tokenizer
from model import ModelConfig, Transformer
from runtime import cuda_graph, tensor_parallel

__all__ = ["CheckpointError", "Tokenizer", "load", "load_model", "read_config"]


def load(
    checkpoint: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a checkpoint.

    checkpoint  a folder, or a model of the Hugging Face hub, org/name or org/name@revision, which
                is downloaded into the hub's cache first
    device      where the weights go; "auto" is CUDA where there is one, else the CPU
    dtype       of the weights; "auto" is the checkpoint's own on CUDA, float32 on the CPU
    progress    show a bar on stderr

    The weights do not require gradients. Needs memory for one copy of the model and one tensor.
    Raises CheckpointError; missing files are reported before any weight is read.
    """
    plan = make_plan(checkpoint_folder(checkpoint), device, dtype)
    tokenizer = Tokenizer(plan.folder)
    # Added tokens may lie beyond the embeddings: in some models one for padding has none.
    if tokenizer.plain_size > plan.config.vocab_size:
        sizes = f"{tokenizer.plain_size} tokens, more than config.json's vocab_size"
        problem = f"has {sizes}, {plan.config.vocab_size}: it belongs to another model"
        raise CheckpointError(tokenizer.path, problem)
    return load_planned(plan, progress), tokenizer


def load_model(
    checkpoint: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: bool = False,
) -> Transformer:
    """The model alone; see load."""
    plan = make_plan(checkpoint_folder(checkpoint), device, dtype)
    return load_planned(plan, progress)


def read_config(checkpoint: str | Path) -> ModelConfig:
    """A checkpoint's dimensions alone. Raises CheckpointError, as load does."""
    config, _ = read_model_config(checkpoint_folder(checkpoint))
    return config


# ---------------------------------------------------------------------------- what to load, where


class LoadPlan(NamedTuple):
    """What is loaded, and where to: all that is known before the weights' files are opened."""

    folder: Path
    config: ModelConfig
    family: Family
    device: torch.device
    dtype: torch.dtype | None  # None: that of the files


def make_plan(folder: Path, device: str | torch.device, dtype: str | torch.dtype) -> LoadPlan:
    """Decide what to load where. Raises CheckpointError if that cannot be, or does not fit.

    Reads the configuration and the weights' index alone.
    """
    config, family = read_model_config(folder)
    found_device = find_device(folder, device)
    found_dtype = find_dtype(folder, dtype, found_device)
    check_memory(folder, config, found_device, found_dtype)
    return LoadPlan(folder, config, family, found_device, found_dtype)


def find_device(folder: Path, device: str | torch.device) -> torch.device:
    """The device that is meant. Where there are several ranks, this one joins the others."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if N_RANKS > 1:
            tensor_parallel.init_distributed(found)
        torch.empty(0, device=found)  # raises where there is no such device
    except (AssertionError, RuntimeError) as error:
        problem = f"cannot be loaded on the device {str(device)!r} ({error})"
        raise CheckpointError(folder, problem) from None
    return found


def find_dtype(folder: Path, dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype that is meant, None for that of the files."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    by_name = {str(each).removeprefix("torch."): each for each in DTYPES.values()}
    for name, each in by_name.items():
        if dtype in (name, each):
            return each
    supported = ", ".join(by_name)
    raise CheckpointError(folder, f"cannot be loaded as {dtype} (supported: {supported})")


# -------------------------------------------------------------------------------------- loading


def load_planned(plan: LoadPlan, progress: bool) -> Transformer:
    """The Transformer of a plan, with its weights."""
    with torch.device("meta"):  # shapes without memory
        whole = Transformer(plan.config)
        model = tensor_parallel.shard(plan.config)  # what this rank holds of it
    embedding, head = embedding_and_head(plan.family)
    optional = (embedding, head) if plan.config.tied else ()
    source, tensors = find_tensors(plan.folder, optional)
    matches = match_tensors(whole, plan.family, source, tensors)

    dtype = plan.dtype or stored_dtype(matches)
    whole_shapes = parameter_shapes(whole)
    for match in tqdm(matches, "load weights", unit=" tensors", disable=not progress):
        read_parameters(model, match, whole_shapes, plan, dtype)
    if plan.config.tied:
        model.head.weight = model.embed.weight

    if N_RANKS > 1:
        tensor_parallel.connect(model, plan.config.vocab_size)
    if plan.device.type == "cuda":
        cuda_graph.record_decode(model)
    return model.eval()


def stored_dtype(matches: list[Match]) -> torch.dtype:
    """The dtype of the files, which is that of the embedding; norms are float32 in some files."""
    (dtype,) = [match.stored.dtype for match in matches if "embed.weight" in match.parameters]
    return DTYPES[dtype]


def read_parameters(
    model: Transformer,
    match: Match,
    whole_shapes: dict[str, torch.Size],
    plan: LoadPlan,
    dtype: torch.dtype,
):
    """Set the model's parameters that lie in one stored tensor.

    model: what this rank holds; whole_shapes: the parameters' shapes in the whole model.
    """
    stored = match.stored
    first_row = 0  # of the parameter, in the stored tensor
    for parameter in match.parameters:
        module_name, _, kind = parameter.rpartition(".")
        module = model.get_submodule(module_name)
        own_shape = getattr(module, kind).shape
        whole_shape = whole_shapes[parameter]
        part: tuple[slice, ...] = ()
        if own_shape != stored.shape:
            part = tensor_parallel.shard_slices(whole_shape, own_shape, first_row)
        first_row += whole_shape[0]

        weight = read_tensor(stored, part)
        if plan.family.interleaved and module_name.endswith(("attn.q", "attn.k")):
            weight = halves_from_pairs(weight, plan.config.head_dim)
        weight = weight.to(plan.device, dtype, copy=True)  # never a view of the file
        smallest, largest = weight.aminmax()  # both are NaN where any value is
        if not (smallest.isfinite() and largest.isfinite()):
            problem = f"values that are not finite (stored as {stored.dtype}, loaded as {dtype})"
            raise CheckpointError(stored.file, f"the tensor {match.name!r} has {problem}")
        setattr(module, kind, nn.Parameter(weight, requires_grad=False))


def halves_from_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows of each head in the order that apply_rope wants, for files that have RoPE's pairs
    side by side: channels 0 1 2 3 4 5 become 0 2 4 1 3 5.

    weight (H * D, C) -> the same shape.
    """
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # (H, D/2, 2, C)
    return pairs.transpose(1, 2).flatten(0, 2)
