"""One level of a Continuum Memory System: what it is (``CMSLevel``) and the modules that run it.

``MemoryLevel`` is written once per chunk, with weights of its own for every sequence; ``PlainLevel`` (chunk size
None) is an ordinary MLP. Both map ``[B, T, dim]`` to ``[B, T, dim]`` and know nothing of the other levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hope_kernels import backends
from hope_kernels.backends.interface import ScanRequest
from hope_kernels.layers.checks import check_bool, check_bound, check_int, check_momentum
from hope_kernels.layers.cms_state import LevelBuffer
from hope_kernels.layers.primitives import (
    GateProjection,
    inverse_sigmoid,
    inverse_softplus,
    l2_norm,
    memory_gates,
    rms_norm,
)
from hope_kernels.memory import MemorySpec, MemoryState, memory_read, memory_scan, memory_write
from hope_kernels.memory.reference import memory_forward
from hope_kernels.memory.spec import Activation, Form, Rule

# Where the gates start, before any training. The step starts in the middle of its range, where its gradient is
# largest. A chunk's retention is exp(-sum lr * softplus): with sum lr <= 1/4 a forgetting rate of 0.02 keeps 99.5 %
# of the learned initial weights per chunk. Momentum multiplies a lasting gradient's step by 1 / (1 - momentum) = 1.33.
START_STEP = 0.5
START_FORGETTING = 0.02
START_MOMENTUM = 0.25


def default_lr_max(chunk_size: int) -> float:
    """The bound of a token's step with ``gd``: a quarter of a full step for a chunk, see :class:`CMSLevel`."""
    return min(0.1, 0.25 / chunk_size)


@dataclass(frozen=True)
class CMSLevel:
    """One level of a :class:`hope_kernels.CMS`: a memory per head, and how often it is written.

    Args:
        chunk_size: tokens per write. None: a level that is never written, one full-width plain MLP.
        form, activation, rule: as in :class:`hope_kernels.MemorySpec`; objective ``"l2"``, with residual.
        expansion: hidden features ``H = expansion * D`` of ``mlp`` and ``glu``, with ``D = dim / heads``. A plain
            level has ``D = dim`` and takes fractions, such as 8/3, rounded to whole features.
        lr_max: upper bound of a token's inner learning rate. None takes ``min(0.1, 0.25 / chunk_size)``: all steps
            of a chunk are taken at its start and add up, so a chunk of C tokens with one and the same unit key moves
            the memory by up to ``C lr_max``. At 1 that is one full step towards the target, beyond 2 gradient
            descent on a linear memory overshoots more than it corrects. The curvature of a deep memory starts near
            that of a linear one and grows in training, hence the quarter; it is not bounded: where long training
            diverges, lower this first. 0.1 bounds levels with small chunks.
        retention: whether old weights decay with a learned, data-dependent factor.
        momentum: whether a learned, data-dependent momentum carries gradients on to later writes (``gd`` only).
        bptt_chunks: n: the outer gradient does not flow through the state written into chunk ``n, 2n, ..``
            (``nested``: counted from the last reset). None: it flows through all writes.

    Raises:
        ValueError, TypeError: a field is out of range, or an option of a written level is given to a plain one.
    """

    chunk_size: int | None
    form: Form = "mlp"
    activation: Activation = "gelu_tanh"
    expansion: int | float = 4
    rule: Rule = "gd"
    lr_max: float | None = None
    retention: bool = True
    momentum: bool = False
    bptt_chunks: int | None = None

    def __post_init__(self) -> None:
        for name, optional in (("chunk_size", True), ("bptt_chunks", True)):
            check_int("CMSLevel", name, getattr(self, name), optional=optional)
        if self.chunk_size is None and isinstance(self.expansion, float):
            check_bound("CMSLevel", "expansion", self.expansion)
        else:
            check_int("CMSLevel", "expansion", self.expansion)
        for name in ("retention", "momentum"):
            check_bool("CMSLevel", name, getattr(self, name))
        check_bound("CMSLevel", "lr_max", self.lr_max)
        _ = self.spec  # validates form, activation and rule
        check_momentum("CMSLevel", self.rule, self.momentum)
        if self.chunk_size is None:
            for name, default in (
                ("rule", "gd"),
                ("lr_max", None),
                ("momentum", False),
                ("bptt_chunks", None),
            ):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"CMSLevel: {name} is {getattr(self, name)!r} with chunk_size None; such a level is never "
                        f"written, want {name}={default!r} or a chunk size"
                    )

    @property
    def spec(self) -> MemorySpec:
        """What each of the level's memories is."""
        return MemorySpec(self.form, self.activation, residual=True, objective="l2", rule=self.rule)

    @property
    def step_bound(self) -> float:
        """The bound of a token's learning rate: ``lr_max``, or its default; 0 for a plain level."""
        if self.chunk_size is None:
            return 0.0
        return default_lr_max(self.chunk_size) if self.lr_max is None else float(self.lr_max)

    def describe(self) -> str:
        """``mlp x4, C=16, gd, lr<=0.015625, retention``."""
        size = self.form if self.form == "linear" else f"{self.form} x{self.expansion:.4g}"
        if self.chunk_size is None:
            return f"{size}, never written"
        parts = [size, f"C={self.chunk_size}", self.rule, f"lr<={self.step_bound:g}"]
        parts += [name for name in ("retention", "momentum") if getattr(self, name)]
        if self.bptt_chunks is not None:
            parts.append(f"bptt={self.bptt_chunks}")
        return ", ".join(parts)


class Tokens(NamedTuple):
    """What a memory is given of each token to be written: ``k, v [B, T, N, D]``, gates ``[B, T, N]``."""

    k: Tensor
    v: Tensor
    lr: Tensor
    retention: Tensor | None
    momentum: Tensor | None

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Tokens:
        """``function(name, tensor)`` in the place of each tensor that is there."""
        return Tokens(*(None if x is None else function(name, x) for name, x in zip(self._fields, self, strict=True)))

    def span(self, start: int, length: int) -> Tokens:
        """Tokens ``start .. start + length`` of every row."""
        return self.map(lambda _, x: x.narrow(1, start, length))

    def folded(self, segments: int, length: int) -> Tokens:
        """``[B, segments * length, ..]`` as ``[B * segments, length, ..]``: every segment a row of its own."""
        return self.map(lambda _, x: x.unflatten(1, (segments, length)).flatten(0, 1))


class MemoryLevel(nn.Module):
    """A level with a chunk size: a memory per sequence and head, read by every token, written once per chunk.

    With ``x [B, T, dim]`` cut into heads ``x_n [D]``::

        q = k = x_n / |x_n|        v = (x W_v)_n        lr = step_bound * sigmoid(x w_lr + b_lr)
        retention = exp(-lr * softplus(x w_r + b_r))    momentum = sigmoid(x w_m + b_m)

    and the output is ``f_{W_c}(q)`` at the chunk-start weights, see :func:`hope_kernels.memory_scan`.

    Args:
        dim, heads: features and memories of a token.
        level: what the memories are.
        segment: start again from the initial weights and zero momentum every so many tokens (a multiple of the
            chunk size), or None.
        input_rms: the size of the input's entries that the target projection is initialised for, so that targets
            start at about the norm of the (unit) keys.
        backend: as in :func:`hope_kernels.memory_scan`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        level: CMSLevel,
        *,
        segment: int | None = None,
        input_rms: float = 1.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert level.chunk_size is not None
        self.level, self.spec, self.chunk_size = level, level.spec, level.chunk_size
        self.heads, self.head_dim, self.segment = heads, dim // heads, segment
        self.input_rms, self.backend = input_rms, backend
        starts = [inverse_sigmoid(START_STEP)]
        starts += [inverse_softplus(START_FORGETTING)] if level.retention else []
        starts += [inverse_sigmoid(START_MOMENTUM)] if level.momentum else []
        shapes = self.spec.weight_shapes(self.head_dim, level.expansion * self.head_dim)
        self.weight_shapes = [(heads, *shape) for shape in shapes]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in self.weight_shapes
        )
        self.target = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.gates = GateProjection(dim, heads, tuple(starts), device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weights:
            nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)
        # Entries of a unit key are 1 / sqrt(D): so are those of v for inputs of the stated size.
        std = (self.target.in_features * self.head_dim) ** -0.5 / self.input_rms
        nn.init.normal_(self.target.weight, std=std)
        self.gates.reset_parameters()

    def extra_repr(self) -> str:
        reset = "" if self.segment is None else f", reset every {self.segment} tokens"
        return f"{self.level.describe()}{reset}"

    def initial_state(self, batch_size: int) -> MemoryState:
        """The state before the first token; it refers to the parameters, so gradients reach them."""
        return MemoryState.initial(
            tuple(self.weights), spec=self.spec, chunk_size=self.chunk_size, batch_size=batch_size
        )

    def tokens(self, x: Tensor) -> Tokens:
        """Keys, targets and gates of ``x [B, T, dim]``."""
        v = self.target(x)
        # The dtype of a linear map's result is the dtype to compute in, under autocast and without it.
        k = l2_norm(x.unflatten(-1, (self.heads, self.head_dim))).to(v.dtype)
        gates = iter(self.gates(x).unbind(-2))
        gates = memory_gates(
            self.level.step_bound,
            next(gates),
            next(gates) if self.level.retention else None,
            next(gates) if self.level.momentum else None,
        )
        return Tokens(k, v.unflatten(-1, (self.heads, self.head_dim)), *gates)

    def forward(self, x: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState | None]:
        """``x [B, T, dim]`` and the state before it (None: a fresh one) -> output and the state after it.

        A fresh level (``state`` None) returns None for a state that is again the initial one.
        """
        tokens = self.tokens(x)
        begun = 0 if state is None else state.position
        if self.segment is None:
            output, state = self._scan(tokens, state)
        else:
            output, state = self._scan_segments(tokens, state, self.segment)
        return self.joined_heads(x, begun, output), state

    def joined_heads(self, x: Tensor, begun: int, output: Tensor) -> Tensor:
        """The level's output ``[B, T, dim]`` for ``x`` from that of its memories, ``begun`` tokens into the stream."""
        output = output.flatten(-2)
        if begun % self.chunk_size + x.shape[1] < self.chunk_size and torch.is_grad_enabled():
            # No chunk was completed, so targets and gates had no part in the output. Which parameters have a
            # gradient must not depend on the length of a sequence (data parallel training stops when it does):
            # an empty sum adds 0 and gives them a gradient of zeros.
            output = output + sum(p.flatten()[:0].sum() for p in (self.target.weight, *self.gates.parameters()))
        return output

    def scan_arguments(self, tokens: Tokens, state: MemoryState | None) -> dict[str, Any]:
        """Of the :func:`memory_scan` of one stretch without a reset; ``state`` None starts from the parameters."""
        return {
            "q": tokens.k,
            "k": tokens.k,
            "v": tokens.v,
            "lr": tokens.lr,
            "memory": tuple(self.weights) if state is None else state,
            "spec": self.spec,
            "chunk_size": self.chunk_size,
            "retention": tokens.retention,
            "momentum": tokens.momentum,
            "bptt_chunks": self.level.bptt_chunks,
            "backend": self.backend,
        }

    def _scan(self, tokens: Tokens, state: MemoryState | None) -> tuple[Tensor, MemoryState]:
        return memory_scan(**self.scan_arguments(tokens, state))

    def _scan_segments(
        self, tokens: Tokens, state: MemoryState | None, segment: int
    ) -> tuple[Tensor, MemoryState | None]:
        """Segments are independent: all complete ones run in one call, folded into the batch.

        The tokens are the rest of a segment begun in an earlier call, whole segments, and the beginning of one.
        """
        batch, length = tokens.k.shape[:2]
        begun = 0 if state is None else state.position
        head = min(length, segment - begun) if begun else 0
        whole = (length - head) // segment
        tail = length - head - whole * segment
        outputs = []
        if head:
            output, state = self._scan(tokens.span(0, head), state)
            outputs.append(output)
            if begun + head == segment:
                state = self.initial_state(batch)
        if whole:
            folded = tokens.span(head, whole * segment).folded(whole, segment)
            output, _ = self._scan(folded, None)
            outputs.append(output.unflatten(0, (batch, whole)).flatten(1, 2))
        if tail:
            output, state = self._scan(tokens.span(length - tail, tail), None)
            outputs.append(output)
        return (torch.cat(outputs, 1) if outputs else tokens.k), state

    def make_buffer(self, state: MemoryState, dtype: torch.dtype) -> LevelBuffer:
        """A copy of ``state`` that :meth:`step` updates in place, for tokens of ``dtype``."""
        return LevelBuffer(state, dtype, retention=self.level.retention, momentum=self.level.momentum)

    def check_backend(self, dtype: torch.dtype) -> None:
        """That the backend asked for runs :meth:`step` on tokens of ``dtype``.

        Raises:
            RuntimeError: it does not; the message says why.
        """
        for operation in ("read", "write"):
            backends.select(self._step_backend, self.request(operation, dtype))

    @property
    def _step_backend(self) -> str | None:
        """That of :meth:`step`: a buffer holds dense weights of each sequence's own, whatever plan a scan takes."""
        return None if self.backend is None else self.backend.removesuffix(backends.FACTORED)

    def request(self, operation: str, dtype: torch.dtype, *, gradients: bool = False) -> ScanRequest:
        """What the level asks of a backend for a ``"scan"``, ``"read"`` or ``"write"`` of tokens of ``dtype``."""
        writes = operation != "read"
        return ScanRequest(
            operation=operation,
            key=self.spec.key,
            dtype=dtype,
            device=self.target.weight.device,
            heads=self.heads,
            dim=self.head_dim,
            hidden=self.weights[0].shape[-1],
            chunk_size=self.chunk_size if writes else 1,
            retention=writes and self.level.retention,
            momentum=writes and self.level.momentum,
            table=False,
            gradients=gradients,
        )

    def step(self, x: Tensor, buffer: LevelBuffer) -> Tensor:
        """One token per sequence, ``x [B, 1, dim]``: read, keep the token, write when it completes a chunk."""
        tokens = self.tokens(x)
        output = memory_read(tokens.k, buffer.weights, spec=self.spec, backend=self._step_backend)
        buffer.append(tokens)
        rows = buffer.due(self.chunk_size)
        if rows is not None:
            memory, chunk = buffer.chunk(rows)
            buffer.take_over(memory_write(memory=memory, **chunk, spec=self.spec, backend=self._step_backend), rows)
        if self.segment is not None:
            rows = buffer.due(self.segment)
            if rows is not None:
                buffer.restart(tuple(self.weights), rows)
            buffer.position = buffer.position % self.segment
        return output.flatten(-2)


class PlainLevel(nn.Module):
    """A level that is never written (frequency 0): ``x + f(x / rms(x))`` with one network over the full width.

    Weights ``[in, out]`` are shared by all sequences, as in any MLP; there is no state. With ``bare`` it is ``f(x)``,
    for a block that has a norm and a residual of its own.
    """

    def __init__(
        self,
        dim: int,
        level: CMSLevel,
        *,
        bare: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.level, self.bare = level, bare
        # The residual is around the norm, as in a pre-normed Transformer block: inside it, the input's scale is lost.
        self.spec = MemorySpec(level.form, level.activation, residual=False)
        shapes = self.spec.weight_shapes(dim, max(1, round(level.expansion * dim)))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in shapes
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weights:
            nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)

    def extra_repr(self) -> str:
        return self.level.describe()

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        """``x [B, T, dim]`` -> output of the same shape; there is no state."""
        inputs = x if self.bare else rms_norm(x).to(x.dtype)
        output, _ = memory_forward(self.spec, tuple(self.weights), inputs)
        return output if self.bare else x.to(output.dtype) + output, None

    def step(self, x: Tensor, buffer: None) -> Tensor:
        """One token per sequence: the same as :meth:`forward`."""
        return self(x)[0]
