"""Inputs of a scan: normalised queries and keys, small learning rates, random weights; never zeros.

``q, k`` are L2-normalised, ``v`` is standard normal, ``lr`` is uniform in [0, 0.1), retention and momentum (where
asked for) are uniform in [0.9, 1) and [0, 0.9), weights are ``randn / sqrt(in)``. Un-normalised keys would diverge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hope_kernels.backends.interface import ScanRequest, state_dtype
from hope_kernels.bench.shapes import Shape
from hope_kernels.memory.spec import MemorySpec


@dataclass(frozen=True)
class Problem:
    """The arguments of one ``memory_scan`` and the gradient its output is given.

    ``q, k, v, d_output [B, T, N, D]`` share one dtype; ``lr, retention, momentum [B, T, N]`` and ``weights`` (each
    ``[N, in, out]``) have the state dtype: float32, or float64 with float64 tokens.
    """

    spec: MemorySpec
    chunk_size: int
    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    retention: Tensor | None
    momentum: Tensor | None
    weights: tuple[Tensor, ...]
    d_output: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """Every differentiable input by name: ``q, k, v, lr, [retention], [momentum], weight names``."""
        named = {"q": self.q, "k": self.k, "v": self.v, "lr": self.lr}
        if self.retention is not None:
            named["retention"] = self.retention
        if self.momentum is not None:
            named["momentum"] = self.momentum
        return named | dict(zip(self.spec.weight_names, self.weights, strict=True))

    def with_inputs(self, named: Mapping[str, Tensor]) -> Problem:
        """A problem with other tensors in the place of :meth:`inputs`."""
        return replace(
            self,
            **{name: named.get(name) for name in ("q", "k", "v", "lr", "retention", "momentum")},
            weights=tuple(named[name] for name in self.spec.weight_names),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """A problem with ``function(tensor)`` in the place of every tensor."""
        return replace(
            self,
            **{name: function(getattr(self, name)) for name in ("q", "k", "v", "lr", "d_output")},
            retention=None if self.retention is None else function(self.retention),
            momentum=None if self.momentum is None else function(self.momentum),
            weights=tuple(function(weight) for weight in self.weights),
        )

    def first(self, tokens: int) -> Problem:
        """The problem cut to its first ``tokens`` tokens, in memory of its own; weights are shared."""
        names = ("q", "k", "v", "lr", "retention", "momentum", "d_output")
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: tensor[:, :tokens].contiguous() for name, tensor in present.items()})

    def to(self, dtype: torch.dtype) -> Problem:
        """Tokens in ``dtype``, everything else in the state dtype that belongs to it."""
        state = state_dtype(dtype)
        return replace(
            self.map(lambda tensor: tensor.to(state)),
            **{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "d_output")},
        )

    def request(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        *,
        table: bool = False,
        gradients: bool = True,
    ) -> ScanRequest:
        """What a backend is asked to run this, with tokens of ``dtype`` on ``device`` (None: as they are)."""
        _, _, heads, dim = self.q.shape
        return ScanRequest(
            operation="scan",
            key=self.spec.key,
            dtype=dtype or self.q.dtype,
            device=device or self.q.device,
            heads=heads,
            dim=dim,
            hidden=self.weights[0].shape[-1],
            chunk_size=self.chunk_size,
            retention=self.retention is not None,
            momentum=self.momentum is not None,
            table=table,
            gradients=gradients,
        )

    def requires_grad(self) -> Problem:
        """A copy whose inputs are leaves that require gradients."""
        leaves = self.map(lambda tensor: tensor.detach().clone().requires_grad_())
        return replace(leaves, d_output=self.d_output)


def make_problem(
    spec: MemorySpec,
    *,
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    hidden: int,
    chunk_size: int,
    retention: bool = False,
    momentum: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """Random inputs as the module's docstring says, the same on every device for one seed."""
    generator = torch.Generator().manual_seed(seed)
    state = state_dtype(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=state)

    def uniform(low: float, high: float) -> Tensor:
        values = torch.rand((batch, tokens, heads), generator=generator, dtype=state)
        return low + (high - low) * values

    def unit(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    shape = (batch, tokens, heads, dim)
    problem = Problem(
        spec=spec,
        chunk_size=chunk_size,
        q=unit(normal(*shape)),
        k=unit(normal(*shape)),
        v=normal(*shape),
        d_output=normal(*shape),
        lr=uniform(0.0, 0.1),
        retention=uniform(0.9, 1.0) if retention else None,
        momentum=uniform(0.0, 0.9) if momentum else None,
        weights=tuple(normal(heads, rows, columns) * rows**-0.5 for rows, columns in spec.weight_shapes(dim, hidden)),
    )
    return problem.to(dtype).map(lambda tensor: tensor.to(device))


def shape_problem(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """Inputs for one of the named shapes."""
    return make_problem(
        shape.spec,
        batch=shape.batch,
        tokens=shape.tokens,
        heads=shape.heads,
        dim=shape.dim,
        hidden=shape.hidden,
        chunk_size=shape.chunk_size,
        dtype=dtype,
        device=device,
        seed=seed,
    )
