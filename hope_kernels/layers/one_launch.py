"""A CMS served by one kernel: what the engine is told of a layer and its buffer, and when the kernel takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hope_kernels.backends.cuda import step as cuda_step
from hope_kernels.layers.level import MemoryLevel
from hope_kernels.memory import memory_read

if TYPE_CHECKING:
    from hope_kernels.layers.cms import CMS
    from hope_kernels.layers.cms_state import LevelBuffer

_FORMS = {"linear": 0, "mlp": 1, "glu": 2}
_ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2, "relu2": 3}
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Refused(Exception):
    """The kernel does not serve this layer; the message says why."""


class OneLaunch:
    """The steps of one buffer as single launches.

    Attributes:
        positions: int64 ``[B]``, tokens each sequence has seen. The kernel reads them and moves them on, so that a
            captured graph serves every token.
        predictions: per level, float32 ``[B, C, N, D]``: what the memory answered to the tokens kept. A write needs it,
            and the weights it came from do not change within a chunk.

    Raises:
        Refused: the kernel does not serve this layer.
    """

    def __init__(self, cms: CMS, buffers: Sequence[LevelBuffer | None], batch_size: int, position: int) -> None:
        parameter = next(cms.parameters())
        reason = _refusal(cms, parameter.device) or cuda_step.refuses(parameter.device)
        if reason is not None:
            raise Refused(reason)
        self.buffers, self.batch_size, self.width = tuple(buffers), batch_size, cms.dim
        self.dtype, self.device = parameter.dtype, parameter.device
        self.positions = torch.full((batch_size,), position, dtype=torch.int64, device=self.device)
        self.predictions = tuple(
            None if held is None else torch.zeros(held.k.shape, dtype=torch.float32, device=self.device)
            for held in buffers
        )
        self._predicted = False
        self._described: tuple = ()
        self._tables: tuple[tuple, tuple] = ((), ())
        if (reason := self._tabulate(cms)) is not None:
            raise Refused(reason)
        size = cuda_step.workspace_bytes(*self._tables)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._predict(slice(None))

    def serves(self, cms: CMS) -> bool:
        """Whether the kernel takes the next step: parameters may have moved since the last one."""
        return _refusal(cms, self.device) is None and self._tabulate(cms) is None

    def step(self, x: Tensor) -> Tensor:
        """One token per sequence, ``x [B, dim]`` -> ``[B, dim]``, after ``serves`` said yes."""
        if not self._predicted:
            self._predict(slice(None))
        if x.stride(-1) != 1:
            x = x.contiguous()
        output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        cuda_step.step(*self._tables, x, output, self.workspace)
        return output

    def follow(self) -> None:
        """The buffer was moved on by other means."""
        self.positions += 1
        self._predicted = False

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
        self._predicted = self._predicted or isinstance(rows, slice)

    def _tabulate(self, cms: CMS) -> str | None:
        """Tables of the layer's parameters and the buffer, made anew when a parameter lies elsewhere or otherwise."""
        parameters = [_parameters(level) for level in cms.levels]
        mix = cms.mix if cms.variant == "independent" else None
        flat = [p for of_level in parameters for p in of_level] + ([] if mix is None else [mix])
        described = tuple((p.data_ptr(), p.dtype, p.stride()) for p in flat)
        if described == self._described:
            return None
        for p in flat:
            if p.dtype != self.dtype:
                return f"it wants all parameters in one dtype, got {p.dtype} beside {self.dtype}"
            if p.device != self.device:
                return f"it wants all parameters on {self.device}, got {p.device}"
            if not p.is_contiguous():
                return f"it wants contiguous parameters, got strides {p.stride()} of shape {tuple(p.shape)}"
        split = self.batch_size * cms.heads <= cuda_step.SPLIT_PAIRS
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
        if (reason := cuda_step.refuses_stack(settings, levels)) is not None:
            return reason
        self._described, self._tables = described, (settings, levels)
        return None


def _refusal(cms: CMS, device: torch.device) -> str | None:
    """Why the kernel does not serve a layer as it is now, as far as its modules tell."""
    written = [level for level in cms.levels if isinstance(level, MemoryLevel)]
    for name in (cms.backend, *(level.backend for level in written)):
        if name not in (None, "cuda"):
            return f"backend {name!r} was asked for"
    if torch.is_autocast_enabled(device.type):
        return "under autocast tokens and parameters differ in dtype"
    if any(level.spec.rule == "dgd" for level in written):
        return "rule 'dgd' solves a triangular system at each write, which the kernel does not"
    return None


def _parameters(level: torch.nn.Module) -> list[Tensor]:
    if isinstance(level, MemoryLevel):
        return [*level.weights, level.target.weight, level.gates.weight, level.gates.bias]
    return list(level.weights)


def _level_table(level: torch.nn.Module, held: LevelBuffer | None, predictions: Tensor | None) -> tuple:
    def address(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(x.data_ptr() for x in tensors)

    spec = level.spec
    hidden = 0 if spec.form == "linear" else level.weights[0].shape[-1]
    common = (_FORMS[spec.form], _ACTIVATIONS[spec.activation])
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
