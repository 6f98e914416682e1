"""Memories in the place of the MLPs of any module: put in (``replace_mlps``), listed, stored, taken out again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hope_kernels.integrations.in_context import CHILD, CMSGates, MemoryMLP, MLPStructure, ModuleNetwork, in_features
from hope_kernels.integrations.levels import Levels, chunk_sizes

Model = TypeVar("Model", bound=nn.Module)
Match = Callable[[str, nn.Module], "MLPStructure | None"]

DEFAULT_RANK = 16
FILE = "cms.safetensors"
_ATTRIBUTES = ("cms_name", "cms_number", "cms_structure", "cms_chunk_size", "cms_told")


def replace_mlps(
    module: Model,
    match: Match,
    levels: Levels,
    *,
    layers: str | list[int] = "all",
    rank: int = DEFAULT_RANK,
) -> Model:
    """Give the MLPs of ``module`` fast memories: in place, and exactly what they were until their scale is trained.

    Every matching submodule becomes a memory whose initial weights are its own: it reads and writes weights of the
    sequence at hand, ``f_{W_c}(x)`` with ``q = k = x``, objective ``l2``, rule ``gd`` with retention, one head, no
    residual. It keeps its place, its names and its parameters, and gets a child ``cms`` (:class:`CMSGates`). Each
    call is a context of its own, unless it runs inside :func:`hope_kernels.integrations.context.carrying`.

    Args:
        module: takes and gives ``[batch, tokens, features]`` at its MLPs.
        match: called with the name and the module of every submodule; returns its :class:`MLPStructure`, or None
            where it is no MLP to replace.
        levels: chunk sizes in tokens, fastest first, spread over the L MLPs in the order in which ``match`` finds
            them: MLP i gets ``levels[i * len(levels) // L]``; or ``{number of the MLP: chunk size}``.
        layers: ``"all"``, or numbers of the MLPs to spread them over.
        rank: of the low-rank part of the target's correction; 0 for none.

    Returns:
        ``module``.

    Raises:
        ValueError, TypeError: nothing matches, an MLP cannot become a memory, or has become one before; the message
            says which and what to do. The module is then unchanged.
    """
    found = [(name, child, match(name, child)) for name, child in module.named_modules(remove_duplicate=False)]
    mlps = [(name, child, structure) for name, child, structure in found if structure is not None]
    if not mlps:
        raise ValueError(
            f"match: found no MLP in {type(module).__name__}; want a function of (name, module) that "
            f"returns an MLPStructure for some of its {len(found)} submodules"
        )
    install(mlps, chunk_sizes(levels, layers, len(mlps)), rank, told=False)
    return module


def install(mlps: list[tuple[str, nn.Module, MLPStructure]], sizes: dict[int, int], rank: int, *, told: bool) -> None:
    """Make the MLPs numbered in ``sizes`` memories, all or none. ``told``: a model's hooks say more of each call."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: got {rank!r}; want an int, 0 for a diagonal correction alone")
    if rank < 0:
        raise ValueError(f"rank: got {rank}; want at least 0")
    places: dict[int, str] = {}
    for name, module, structure in mlps:
        if (other := places.setdefault(id(module), name)) != name:
            raise ValueError(f"{name}: the same module as {other}; want MLPs of their own, each is to be a memory")
        if isinstance(module, MemoryMLP):
            raise ValueError(f"{name}: already a memory; want a model without, remove_cms(model) gives it back")
        _check_mlp(name, module, structure)
    for number, size in sizes.items():
        name, module, structure = mlps[number]
        weight = getattr(module, structure.linears[0]).weight
        dim = in_features(getattr(module, structure.linears[0]))
        gates = CMSGates(dim, size, rank, device=weight.device, dtype=weight.dtype)
        gates.train(module.training)
        module.cms = gates
        for key, value in zip(_ATTRIBUTES, (name, number, structure, size, told), strict=True):
            setattr(module, key, value)
        module.__class__ = _memory_class(type(module))


@cache
def _memory_class(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with the forward pass of a memory; an instance of it can be pickled."""
    values = {"__module__": kind.__module__, "__qualname__": f"CMS{kind.__qualname__}", "__reduce_ex__": _reduce}
    return type(f"CMS{kind.__name__}", (MemoryMLP, kind), values)


def _original_class(module: nn.Module) -> type[nn.Module] | None:
    """What the class of a memory was; None where something else has changed it since (FSDP makes a class of its
    own).
    """
    kind = type(module)
    return kind.__bases__[1] if kind.__bases__[:1] == (MemoryMLP,) else None


def _reduce(self: nn.Module, protocol: int) -> Any:
    kind = _original_class(self)
    return object.__reduce_ex__(self, protocol) if kind is None else (_blank, (kind,), self.__dict__)


def _blank(kind: type[nn.Module]) -> nn.Module:
    """An instance without its attributes, as unpickling makes it."""
    made = _memory_class(kind)
    return made.__new__(made)


def _check_mlp(name: str, module: nn.Module, structure: MLPStructure) -> None:
    """That ``module`` is what ``structure`` says, of layers that a memory can start from.

    Raises:
        ValueError, TypeError: it is not; the message says what to do.
    """
    owner = f"{name} ({type(module).__name__})"
    if "forward" in vars(module):
        raise ValueError(
            f"{owner}: its forward was replaced on the instance (by a hook of Accelerate or a kernel?), which "
            "would hide the memory; want add_cms first, and that afterwards"
        )
    if any(hasattr(child, "_hf_hook") for child in module.modules()):
        raise ValueError(
            f"{owner}: has hooks of Accelerate (device_map, offloading), which may move weights away from "
            "memories; want add_cms first, and the model dispatched afterwards, without offloading"
        )
    missing = [child for child in structure.names() if not hasattr(module, child)]
    if missing:
        raise ValueError(f"{owner}: has no {', '.join(missing)}; want the children that {structure} names")
    if getattr(getattr(module, structure.activation), "inplace", False):
        raise ValueError(
            f"{owner}: {structure.activation} works in place, and memories need what it is given for its slope; "
            "want inplace=False"
        )
    for child in structure.linears:
        linear = getattr(module, child)
        weight = getattr(linear, "weight", None)
        if not isinstance(weight, Tensor):
            raise TypeError(f"{owner}: {child} is a {type(linear).__name__} without a weight; want a linear layer")
        if not weight.is_floating_point() or weight.element_size() < 2 or hasattr(weight, "quant_state"):
            raise TypeError(
                f"{owner}: {child} has quantised weights ({weight.dtype}); want floating-point ones: load the model "
                "without a "
                "quantization_config, or call model.dequantize() first"
            )
        if type(weight.data).__name__ == "DTensor":
            raise TypeError(
                f"{owner}: {child} is sharded (its weight is a DTensor); want add_cms before the model is sharded "
                "by FSDP, and a "
                "model loaded without tp_plan: tensor parallelism is not supported"
            )
        if weight.dim() != 2:
            raise TypeError(f"{owner}: {child} has a weight of shape {tuple(weight.shape)}; want two dimensions")
    weight = getattr(module, structure.linears[0]).weight
    if weight.device.type != "meta" and not _computes(module, structure, weight):
        raise ValueError(
            f"{owner}: its forward pass is not that of {structure}; want a structure that gives the same bits, or a "
            "match that "
            "leaves this module out"
        )


@torch.no_grad()
def _computes(module: nn.Module, structure: MLPStructure, weight: Tensor) -> bool:
    """Whether the structure's forward pass is the module's own, on two tokens, in inference mode of its children."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, in_features(getattr(module, structure.linears[0])), generator=generator)
    x = x.to(weight.device, weight.dtype)
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        own, computed = module.forward(x), ModuleNetwork(module, structure)(x)
    except (RuntimeError, TypeError):  # shapes or arguments that do not fit: not this structure
        return False
    finally:
        for child, training in modes:
            child.training = training
    if not (isinstance(own, Tensor) and own.shape == computed.shape and own.dtype == computed.dtype):
        return False
    return torch.allclose(own, computed, rtol=0, atol=0, equal_nan=True)  # NaN weights are not the structure's fault


def memories(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of all MLPs that are memories."""
    for name, module in model.named_modules():
        if isinstance(module, MemoryMLP):
            yield name, module


def cms_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that memories have added, with the names that ``model.named_parameters()`` gives them.

    Of gates that PEFT's ``modules_to_save`` wraps, the copies that it trains, not the originals that it puts aside.

    To train them alone::

        model.requires_grad_(False)
        for _, parameter in cms_parameters(model):
            parameter.requires_grad_(True)

    Raises:
        ValueError: the model has no memories.
    """
    prefixes = tuple(f"{name}.{CHILD}." if name else f"{CHILD}." for name, _ in memories(model))
    if not prefixes:
        raise ValueError(f"model: {type(model).__name__} has no CMS; want add_cms(model, levels) first")
    aside = tuple(f"{prefix}original_module." for prefix in prefixes)
    named = model.named_parameters()
    return [(name, p) for name, p in named if name.startswith(prefixes) and not name.startswith(aside)]


def uninstall(model: nn.Module) -> None:
    """Give every memory of ``model`` the class back that it had, and drop what it was given.

    Raises:
        ValueError: there are none, or one is wrapped by something that has to go first.
    """
    found = list(memories(model))
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no CMS to remove; want a model after add_cms")
    for name, module in found:
        if _original_class(module) is None or "forward" in vars(module):
            raise ValueError(
                f"{name}: the memory was wrapped by something else since, as a {type(module).__name__} (FSDP? a hook "
                "of Accelerate?); want that undone first"
            )
    for _, module in found:
        module.__class__ = _original_class(module)
        delattr(module, CHILD)
        for key in _ATTRIBUTES:
            delattr(module, key)


def save_cms(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Store what add_cms has added, and nothing else, as one safetensors file.

    Args:
        path: a file, or a folder for ``cms.safetensors``.

    Returns:
        The file.

    Raises:
        ValueError: the model has no memories, or its parameters are sharded.
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import save_file

    found = list(memories(model))
    cms_parameters(model)
    path = _file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for _, module in found:
        for name, parameter in _gates_of(module).state_dict().items():
            if type(parameter).__name__ == "DTensor":
                raise ValueError(f"model: {module.cms_name} is sharded; want its full state, gathered on one process")
            tensors[f"{module.cms_number}.{name}"] = parameter.detach().cpu().contiguous()
    levels = {str(module.cms_number): module.cms_chunk_size for _, module in found}
    settings = {"levels": levels, "rank": _gates_of(found[0][1]).rank}
    save_file(tensors, path, metadata={"hope_kernels_cms": json.dumps(settings)})
    return path


def read_cms(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a file of :func:`save_cms`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is of another kind.
    """
    from safetensors import safe_open

    path = _file(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} is no file; want what save_cms wrote, or its folder")
    with safe_open(path, framework="pt") as file:
        settings = (file.metadata() or {}).get("hope_kernels_cms")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    if settings is None:
        raise ValueError(f"path: {path} was not written by save_cms")
    return json.loads(settings), tensors


def fill_cms(model: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of a file into the memories of ``model``, which are those that its settings name.

    Raises:
        ValueError: they are not.
    """
    found = {module.cms_number: module for _, module in memories(model)}
    levels = {int(number): size for number, size in settings["levels"].items()}
    have = {number: module.cms_chunk_size for number, module in found.items()}
    if have != levels:
        raise ValueError(f"model: has a CMS with levels {have}; the file is of one with {levels}")
    fitting = []
    for number, module in found.items():
        gates = _gates_of(module)
        prefix = f"{number}."
        own = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        want = {name: tuple(tensor.shape) for name, tensor in gates.state_dict().items()}
        got = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if want != got:
            raise ValueError(f"model: layer {number} wants parameters {want}; the file has {got}")
        fitting.append((gates, own))
    for gates, own in fitting:  # all or none
        gates.load_state_dict(own)


def _gates_of(module: nn.Module) -> CMSGates:
    """Of a memory.

    Raises:
        ValueError: something has wrapped them (PEFT's modules_to_save).
    """
    gates = module.get_submodule(CHILD)
    if not isinstance(gates, CMSGates):
        raise ValueError(
            f"model: the gates of {module.cms_name} are inside a {type(gates).__name__}; want them stored by what "
            "wrapped them, or unwrapped first (model.merge_and_unload() of PEFT)"
        )
    return gates


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / FILE if path.is_dir() or path.suffix != ".safetensors" else path
