"""Whether a model fits into a device's memory: said before a weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from cli.process import N_RANKS
from loading.checkpoint_files import CheckpointError, folder_weights
from model import ModelConfig, Transformer
from runtime import tensor_parallel

CGROUP = Path("/sys/fs/cgroup")  # where Linux says how much memory a container may take


def check_memory(
    folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype | None
):
    """Raise CheckpointError if the model has no room on the device.

    Nothing is said if the files do not hold so large a model: then matching says what is wrong.
    dtype: None for that of the files.
    """
    try:
        n_whole = count_parameters(Transformer, config)
        n_own = count_parameters(tensor_parallel.shard, config)
    except ValueError as error:
        raise CheckpointError(folder, error) from None
    stored_bytes = weight_bytes(folder)
    if dtype is None:
        itemsize = stored_itemsize(stored_bytes, n_whole)
    else:
        itemsize = dtype.itemsize
    free = free_bytes(device)
    if device.type == "cpu":
        free /= N_RANKS  # the ranks share it
    need = n_own * itemsize
    if need <= free or stored_bytes < 2 * n_whole:
        return

    hint = "no --dtype makes it fit"
    for name, size in (("bfloat16", 2), ("float32", 4)):
        if n_own * size <= free:
            hint = f"it fits with --dtype {name}"
    as_dtype = ""
    if dtype is not None:
        as_dtype = " as " + str(dtype).removeprefix("torch.")
    problem = (
        f"needs {need / 1e9:.1f} GB{as_dtype}, "
        f"and the {device.type} has {free / 1e9:.1f} GB free; {hint}"
    )
    raise CheckpointError(folder, problem)


def count_parameters(make: Callable[[ModelConfig], torch.nn.Module], config: ModelConfig) -> int:
    """How many numbers the model that make(config) builds has.

    Counted from models of no layer and of one, so that any number of layers takes no time.
    """
    counts = []
    for n_layers in (0, 1):
        with torch.device("meta"):
            model = make(replace(config, n_layers=n_layers))
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    without_layers, with_one_layer = counts
    return without_layers + (with_one_layer - without_layers) * config.n_layers


def weight_bytes(folder: Path) -> int:
    """The size of the files that hold the weights."""
    found = folder_weights(folder)
    if found is None:
        return 0
    paths = [folder / file for file in found.files]
    return sum(path.stat().st_size for path in paths if path.is_file())


def stored_itemsize(stored_bytes: int, n_parameters: int) -> int:
    """Bytes of a number in the files, told from their size, as no header has been read yet.

    The files may hold more than the model, a tied head once again, but never twice as much.
    """
    for size in (8, 4, 2):
        if size * n_parameters <= stored_bytes:
            return size
    return 2


def free_bytes(device: torch.device) -> float:
    """Memory that the device has for weights; infinite where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    if device.type != "cpu":
        return math.inf
    return min(free_system_bytes(), free_container_bytes())


def free_system_bytes() -> float:
    """What Linux says is free."""
    with suppress(OSError, ValueError, AttributeError):
        text = Path("/proc/meminfo").read_text()
        (kilobytes,) = re.findall(r"MemAvailable: *(\d+)", text)
        return 1024 * int(kilobytes)
    return math.inf


def free_container_bytes() -> float:
    """What a container may still take. File contents that were not used lately can be dropped."""
    with suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text())  # a ValueError if it is "max"
        used = int((CGROUP / "memory.current").read_text())
        statistics = (CGROUP / "memory.stat").read_text()
        (cached,) = re.findall(r"^inactive_file (\d+)", statistics, re.MULTILINE)
        return limit - used + int(cached)
    return math.inf
