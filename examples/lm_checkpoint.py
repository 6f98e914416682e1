"""Checkpoints of `train_lm.py`: folders ``checkpoint-STEP`` with a file per process, there whole or not at all.

They hold tensors and plain containers only, so that ``torch.load(.., weights_only=True)`` reads them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_parallel import Layout
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

PREFIX, WRITING = "checkpoint-", ".writing-"
VALUES = {"settings", "step", "reader", "random", "state"}  # of every process; the first one has the weights too


def save(folder: Path, step: int, values: Mapping[str, Any], layout: Layout, keep: int = 2) -> Path:
    """Write this process's values as part of the checkpoint of a step; the ``keep`` newest ones stay.

    The files are written beside, and come to their place together, by one renaming.
    """
    scratch, place = folder / f"{WRITING}{step:08d}", folder / f"{PREFIX}{step:08d}"
    if layout.rank == 0:
        for left in folder.glob(f"{WRITING}*"):  # by a process that was killed
            shutil.rmtree(left)
        scratch.mkdir(parents=True)
    _barrier(layout)
    with open(scratch / _name(layout), "wb") as file:
        torch.save(dict(values), file)
        file.flush()
        os.fsync(file.fileno())
    _barrier(layout)
    if layout.rank == 0:
        if place.exists():
            shutil.rmtree(place)
        os.replace(scratch, place)
        for old in all_of(folder)[:-keep]:
            shutil.rmtree(old)
    _barrier(layout)
    return place


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*"))


def load(checkpoint: Path, layout: Layout, rank: int | None = None) -> dict[str, Any]:
    """What a process wrote: this one, or ``rank``; tensors on this process's device.

    Raises:
        ValueError: there were other processes, or the file cannot be read or is another one.
    """
    found = len(list(checkpoint.glob("process-*.pt")))
    if found != layout.world:
        raise ValueError(f"resume: {checkpoint} was written by {found} processes; want {layout.world}, as there are")
    path = checkpoint / _name(layout, rank)
    try:
        values = torch.load(path, map_location=layout.device, weights_only=True)
    except Exception as error:  # whatever a broken file brings up
        raise ValueError(f"resume: {path} cannot be read: {error}") from error
    missing = VALUES - values.keys() if isinstance(values, dict) else VALUES
    if missing:
        raise ValueError(f"resume: {path} is no checkpoint of a training: it lacks {sorted(missing)}")
    return values


def check(found: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """That a checkpoint belongs to a run with these settings.

    Raises:
        ValueError: naming each that differs.
    """
    differ = [name for name in sorted(found.keys() | want.keys()) if found.get(name) != want.get(name)]
    if differ:
        told = "; ".join(f"{name} was {found.get(name)!r} and is {want.get(name)!r}" for name in differ)
        raise ValueError(f"resume: the run cannot continue exactly: {told}")


def weights_of(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters and AdamW's moments; with FSDP this process's parts of them."""
    local = lambda x: x.to_local() if isinstance(x, DTensor) else x  # noqa: E731
    model = {name: local(parameter.detach()) for name, parameter in parameters.items()}
    return {"model": model, "optimizer": tree_map(local, optimizer.state_dict())}


@torch.no_grad()
def load_weights(
    values: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """The inverse of :func:`weights_of`."""

    def like(x: Tensor, parameter: nn.Parameter) -> Tensor:
        if not isinstance(parameter.data, DTensor) or x.dim() == 0:  # AdamW's count of steps is of no parameter
            return x
        layout = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(x, parameter.device_mesh, parameter.placements, run_check=False, **layout)

    for name, parameter in parameters.items():
        parameter.copy_(like(values["model"][name], parameter))
    # The optimizer numbers parameters in the order of its groups.
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = values["optimizer"]["state"]
    state = {i: {name: like(x, ordered[i]) for name, x in moments.items()} for i, moments in state.items()}
    optimizer.load_state_dict({**values["optimizer"], "state": state})


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that torch draws from."""
    found = {"cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(values: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of :func:`random_state`."""
    torch.set_rng_state(values["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(values["cuda"].cpu(), device)


def _name(layout: Layout, rank: int | None = None) -> str:
    return f"process-{layout.rank if rank is None else rank:05d}.pt"


def _barrier(layout: Layout) -> None:
    if layout.world > 1:
        dist.barrier()
