"""A CMS served by one call of an engine: what that is told of a layer and its buffer, and when it takes them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hope_kernels.backends.cpu import step as cpu_step
from hope_kernels.backends.cuda import step as cuda_step
from hope_kernels.layers.hooks import is_hooked
from hope_kernels.layers.level import MemoryLevel, PlainLevel
from hope_kernels.layers.primitives import GateProjection
from hope_kernels.memory import memory_read, plain

if TYPE_CHECKING:
    from types import ModuleType

    from hope_kernels.layers.cms import CMS
    from hope_kernels.layers.cms_state import LevelBuffer

# Those that step through a whole stack, each on devices of its own.
_ENGINES = (cuda_step, cpu_step)

# Tensors that are what they hold, no subclass.
_PLAIN = (nn.Parameter, Tensor)

_FORMS = {"linear": 0, "mlp": 1, "glu": 2}
_RULES = {"gd": 0, "dgd": 1}
_ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2, "relu2": 3}
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Refused(Exception):
    """No kernel serves this layer; the message says why."""


class OneLaunch:
    """The steps of one buffer as single launches, or single calls of the compiled core on a CPU.

    Attributes:
        positions: int64 ``[B]``, tokens each sequence has seen. The kernel reads them and moves them on, so that a
            captured graph serves every token.
        predictions: per level, float32 ``[B, C, N, D]``: what the memory answered to the tokens kept, where the engine
            wants that for the write. The weights it came from do not change within a chunk.

    Raises:
        Refused: the kernel does not serve this layer.
    """

    def __init__(self, cms: CMS, buffers: Sequence[LevelBuffer | None], batch_size: int, position: int) -> None:
        parameter = next(cms.parameters())
        self._engine = _engine_for(cms, parameter.device)
        self.buffers, self.batch_size, self.width = tuple(buffers), batch_size, cms.dim
        self.dtype, self.device = parameter.dtype, parameter.device
        self.positions = torch.full((batch_size,), position, dtype=torch.int64, device=self.device)
        self.predictions = tuple(
            torch.zeros(held.k.shape, dtype=torch.float32, device=self.device)
            if held is not None and self._engine.KEEPS_PREDICTIONS
            else None
            for held in buffers
        )
        self._shapes = (batch_size, cms.dim), (batch_size, 1, cms.dim)
        self._layer = weakref.ref(cms)
        self._backends, self._modules, self._parameters = _looked_at(cms)
        self._described: tuple = ()
        self._tables: tuple[tuple, tuple] = ((), ())
        if (reason := self._tabulate(cms)) is not None:
            raise Refused(reason)
        size = self._engine.workspace_bytes(*self._tables)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._predict(slice(None))

    def ready(self, cms: CMS, x: Any) -> bool:
        """Whether a call is known to fit and to be served: nothing has changed since that was last found out.

        A few microseconds, where finding it out takes a hundred.
        """
        return (
            type(x) is Tensor
            and x.shape in self._shapes
            and x.dtype is self.dtype
            and x.device == self.device
            and self._layer() is cms
            and not torch.is_autocast_enabled(self.device.type)
            and plain.without_modes()
            and all(owner.backend in (None, self._engine.NAME) for owner in self._backends)
            and all(
                places.get(name) is module and type(module) is kind and not is_hooked(module)
                for places, name, module, kind in self._modules
            )
            and self._described == _described(places.get(name) for places, name in self._parameters)
        )

    def serves(self, cms: CMS) -> bool:
        """Whether the kernel takes the next step: parameters may have moved since the last one."""
        self._layer = weakref.ref(cms)
        self._backends, self._modules, self._parameters = _looked_at(cms)
        return _refusal(cms, self._engine.NAME, self.device) is None and self._tabulate(cms) is None

    def step(self, x: Tensor) -> Tensor:
        """One token per sequence, ``x [B, dim]`` -> ``[B, dim]``, after ``serves`` said yes."""
        if x.stride(-1) != 1:
            x = x.contiguous()
        output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._engine.step(*self._tables, x, output, self.workspace)
        return output

    def follow(self) -> None:
        """The buffer was moved on by other means."""
        self.positions += 1
        self._predict(slice(None))

    def replace(self, rows: Tensor, position: int) -> None:
        """The sequences ``rows``, int64 ``[R]``, of the buffer were replaced by others, which stand at ``position``."""
        rows = rows.to(self.device)
        self.positions[rows] = position
        self._predict(rows)

    def _predict(self, rows: slice | Tensor) -> None:
        """Predictions of tokens kept by others than the kernel: of a state, or of steps level by level."""
        for held, predictions in zip(self.buffers, self.predictions, strict=True):
            if held is None or predictions is None:
                continue
            # Where sequences have kept different numbers of tokens, some have room behind theirs: it is not read.
            kept = held.pending if isinstance(held.pending, int) else int(held.pending.max())
            if kept > 0:
                keys, weights = held.k[rows, :kept].float(), tuple(w[rows] for w in held.weights)
                predictions[rows, :kept] = memory_read(keys, weights, spec=held.spec, backend="reference")

    def _tabulate(self, cms: CMS) -> str | None:
        """Tables of the layer's parameters and the buffer, made anew when a parameter lies elsewhere or otherwise."""
        flat = [places[name] for places, name in self._parameters]
        described = _described(flat)
        if described == self._described:
            return None
        mix = cms.mix if cms.variant == "independent" else None
        for p in flat:
            if type(p) not in _PLAIN:
                return f"it wants plain tensors as parameters, got a {type(p).__name__}"
            if p.dtype != self.dtype:
                return f"it wants all parameters in one dtype, got {p.dtype} beside {self.dtype}"
            if p.device != self.device:
                return f"it wants all parameters on {self.device}, got {p.device}"
            if not p.is_contiguous():
                return f"it wants contiguous parameters, got strides {p.stride()} of shape {tuple(p.shape)}"
        split = self.batch_size * cms.heads <= self._engine.SPLIT_PAIRS
        settings = (
            _DTYPES[self.dtype],
            int(mix is not None),
            int(split),
            self.batch_size,
            cms.heads,
            cms.dim // cms.heads,
            None if mix is None else mix.data_ptr(),
            self.positions.data_ptr(),
        )
        levels = tuple(
            _level_table(level, held, predictions)
            for level, held, predictions in zip(cms.levels, self.buffers, self.predictions, strict=True)
        )
        if (reason := self._engine.refuses_stack(settings, levels, self.device)) is not None:
            return reason
        self._described, self._tables = described, (settings, levels)
        return None


def _engine_for(cms: CMS, device: torch.device) -> ModuleType:
    """The engine that serves a layer on ``device``.

    Raises:
        Refused: there is none.
    """
    reasons = []
    for engine in _ENGINES:
        if (reason := engine.refuses(device)) is not None:
            reasons.append(f"{engine.NAME}: {reason}")
        elif (reason := _refusal(cms, engine.NAME, device)) is not None:
            raise Refused(reason)
        else:
            return engine
    raise Refused("; ".join(reasons))


def _refusal(cms: CMS, engine: str, device: torch.device) -> str | None:
    """Why an engine does not serve a layer as it is now, as far as its modules and the mode of the call tell."""
    written = [level for level in cms.levels if isinstance(level, MemoryLevel)]
    for name in (cms.backend, *(level.backend for level in written)):
        if name not in (None, engine):
            return f"backend {name!r} was asked for"
    if torch.is_autocast_enabled(device.type):
        return "under autocast tokens and parameters differ in dtype"
    if not plain.without_modes():
        return "a trace or a mode wants to see the operators"
    for _, _, module, kind in _looked_at(cms)[1]:
        if type(module) is not kind or is_hooked(module):
            return f"a {type(module).__name__} of the layer was replaced or has hooks"
    return None


# Where a module keeps another, its name there, the module, and the class whose calls the kernel stands for.
Place = tuple[dict[str, Any], str, nn.Module, type]


def _looked_at(cms: CMS) -> tuple[list[nn.Module], list[Place], list[tuple[dict[str, Any], str]]]:
    """What a step depends on: modules with a backend of their own, all that are called, and the parameters.

    Each is named by where it is kept: asking modules for their attributes takes longer than a step.
    """
    backends, modules, parameters = [cms], [], []

    def keep(owner: nn.Module, name: str, kind: type) -> nn.Module:
        module = getattr(owner, name)
        modules.append((owner._modules, name, module, kind))
        parameters.extend((module._parameters, key) for key, value in module._parameters.items() if value is not None)
        return module

    levels = keep(cms, "levels", nn.ModuleList)
    for number, level in enumerate(levels):
        written = isinstance(level, MemoryLevel)
        keep(levels, str(number), MemoryLevel if written else PlainLevel)
        keep(level, "weights", nn.ParameterList)
        if written:
            backends.append(level)
            keep(level, "target", nn.Linear)
            keep(level, "gates", GateProjection)
    if cms.variant == "independent":
        parameters.append((cms._parameters, "mix"))
    return backends, modules, parameters


def _described(parameters: Iterable[Tensor | None]) -> tuple:
    """Where parameters lie, and as what."""
    return tuple([(p.data_ptr(), p.dtype, p.stride()) if type(p) in _PLAIN else type(p) for p in parameters])


def _level_table(level: torch.nn.Module, held: LevelBuffer | None, predictions: Tensor | None) -> tuple:
    def address(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(x.data_ptr() for x in tensors)

    spec = level.spec
    hidden = 0 if spec.form == "linear" else level.weights[0].shape[-1]
    common = (_FORMS[spec.form], _ACTIVATIONS[spec.activation], _RULES[spec.rule])
    if held is None:
        no_projections, no_tokens = (None,) * 3, (None,) * 6
        return (*common, 0, 0, hidden, 0.0, addresses(level.weights), *no_projections, (), (), *no_tokens)
    return (
        *common,
        level.chunk_size,
        level.segment or 0,
        hidden,
        level.level.step_bound,
        addresses(level.weights),
        *addresses((level.target.weight, level.gates.weight, level.gates.bias)),
        addresses(held.weights),
        addresses(held.momentum or ()),
        address(held.k),
        address(held.v),
        address(held.lr),
        address(held.retention),
        address(held.momentum_gate),
        address(predictions),
    )
