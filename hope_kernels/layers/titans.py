"""Titans layers: a memory that is written with keys, targets and gates made of the tokens.

``NeuralMemory`` makes them by linear maps (*Titans*, 2501.00663); ``SelfModifyingTitans`` by memories that are
written as well, and that generate their own targets (equations 83 to 93 of *Nested Learning*).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hope_kernels import backends
from hope_kernels.layers.checks import (
    check_batch_size,
    check_bool,
    check_bound,
    check_input,
    check_int,
    check_momentum,
    check_width,
)
from hope_kernels.layers.level import START_MOMENTUM, Tokens, default_lr_max
from hope_kernels.layers.primitives import CausalConvolution, GateProjection, inverse_sigmoid, l2_norm
from hope_kernels.layers.projections import (
    GATE_STARTS,
    ProjectionMemories,
    checked_adaptive,
    starting_weights,
    tokens_of,
)
from hope_kernels.layers.titans_state import TitansState
from hope_kernels.memory import MemorySpec, MemoryState, memory_scan
from hope_kernels.memory.spec import Activation, Objective, Rule
from hope_kernels.memory.state import state_dtype

# The bound of the step with `dgd`, which does not add up over a chunk as that of `gd` does.
DELTA_LR_MAX = 0.1
# The norm per head that the convolution's results start with in a self-modifying layer, for inputs of unit entries. A
# key along x̃ is moved towards M_v(v), v = M_v(x̃) = |x̃| M_v(k): in the linear regime M_v = f I follows, with `dgd`,
# f' = 1 - 2 f + |x̃| f², which has a fixed point for |x̃| < 1 only, and grows beyond all bounds from any f above
# (1 + sqrt(1 - |x̃|)) / |x̃|: 7.5 here. With `gd` it is f' = |x̃| f² - f, and the bound of f is 4.
START_MIXED_NORM = 0.25


class TitansLayer(nn.Module):
    """What Titans layers share: convolution, queries, linear projections, the main memory, states and streams.

    Args:
        adaptive: the projections that are no linear maps here; a subclass makes their results in :meth:`_tokens`.
        lr_max, value_norm_max, weight_norm_max: bounds of the step, of a target's norm and of the spectral norm of
            an initial ``W_out``; None for no bound of the last two.
        mixed_norm: the norm per head that the convolution's results start with.
        mixes_heads: whether a linear map follows the memory.
        The others as in :class:`SelfModifyingTitans`.
    """

    # Parameters that a token's output depends on before anything is written; all others take part through a write.
    _READING = ("conv", "query", "weights", "output")

    def __init__(
        self,
        dim: int,
        heads: int,
        chunk_size: int,
        *,
        expansion: int,
        activation: Activation,
        objective: Objective,
        rule: Rule,
        retention: bool,
        momentum: bool,
        adaptive: tuple[str, ...],
        lr_max: float,
        value_norm_max: float | None,
        weight_norm_max: float | None,
        mixed_norm: float,
        mixes_heads: bool,
        bptt_chunks: int | None,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_width(name, dim, heads)
        for argument, value in (("chunk_size", chunk_size), ("expansion", expansion)):
            check_int(name, argument, value)
        check_int(name, "bptt_chunks", bptt_chunks, optional=True)
        for argument, value in (("retention", retention), ("momentum", momentum)):
            check_bool(name, argument, value)
        self.spec = MemorySpec("mlp", activation, residual=True, objective=objective, rule=rule)
        check_momentum(name, rule, momentum)
        backends.check_name(backend)
        self.dim, self.heads, self.head_dim, self.chunk_size = dim, heads, dim // heads, chunk_size
        self.retention, self.momentum, self.adaptive = retention, momentum, adaptive
        self.lr_max, self.value_norm_max, self.weight_norm_max = float(lr_max), value_norm_max, weight_norm_max
        self.bptt_chunks, self.backend = bptt_chunks, backend
        self.hidden = expansion * self.head_dim

        def linear() -> nn.Linear:
            return nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

        self.conv = CausalConvolution(dim, output_rms=mixed_norm * self.head_dim**-0.5, device=device, dtype=dtype)
        self.query = linear()
        self.key = None if "k" in adaptive else linear()
        self.value = None if "v" in adaptive else linear()
        starts = {**GATE_STARTS, "momentum": inverse_sigmoid(START_MOMENTUM)}
        given = {"lr": True, "retention": retention, "momentum": momentum}
        self.fixed_gates = tuple(gate for gate, used in given.items() if used and gate not in adaptive)
        self.gates = None
        if self.fixed_gates:
            starts = tuple(starts[gate] for gate in self.fixed_gates)
            self.gates = GateProjection(dim, heads, starts, device=device, dtype=dtype)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(heads, *shape, device=device, dtype=dtype))
            for shape in self.spec.weight_shapes(self.head_dim, self.hidden)
        )
        self.output = linear() if mixes_heads else nn.Identity()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for weight in self.weights:
            nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)
        for module in self.children():
            if type(module) is nn.Linear:
                nn.init.normal_(module.weight, std=self.dim**-0.5)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def extra_repr(self) -> str:
        parts = [f"dim={self.dim}, heads={self.heads}, C={self.chunk_size}, {self.spec.rule}, lr<={self.lr_max:g}"]
        parts += [name for name in ("retention", "momentum") if getattr(self, name)]
        parts += [] if self.value_norm_max is None else [f"|v|<={self.value_norm_max:g}"]
        parts += [] if self.weight_norm_max is None else [f"|W_out|<={self.weight_norm_max:g}"]
        parts += [] if self.bptt_chunks is None else [f"bptt={self.bptt_chunks}"]
        return ", ".join([*parts, f"backend={self.backend!r}"])

    def forward(self, x: Tensor) -> Tensor:
        """Fresh sequences, ``x [B, T, dim]`` -> ``[B, T, dim]``."""
        self._check_input(x)
        return self._run(x, self.init_state(x.shape[0]))[0]

    def init_state(self, batch_size: int) -> TitansState:
        """The state before the first token of ``batch_size`` sequences.

        It refers to the parameters: gradients through it reach them.
        """
        check_batch_size(type(self).__name__, batch_size)
        weights = starting_weights(self.weights, self.weight_norm_max)
        memory = MemoryState.initial(weights, spec=self.spec, chunk_size=self.chunk_size, batch_size=batch_size)
        return TitansState(0, batch_size, self.conv.initial_tail(batch_size), memory)

    def stream(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        """The next tokens of sequences that have a state: ``x [B, T, dim]`` -> output, and a new state.

        ``state`` is not changed. Gradients flow through it (``state.detach()`` cuts them).

        Raises:
            ValueError, TypeError: ``x`` or ``state`` does not fit this layer or the other.
        """
        self._check_input(x)
        self._check_state(state, x)
        return self._run(x, state)

    def _run(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        mixed, tail = self.conv(x, state.tail)
        query = self._per_head(self.query(mixed))
        tokens, projections, pending = self._tokens(x, mixed, state)
        output, memory = memory_scan(
            l2_norm(query).to(query.dtype),
            tokens.k,
            tokens.v,
            tokens.lr,
            state.memory,
            spec=self.spec,
            chunk_size=self.chunk_size,
            retention=tokens.retention,
            momentum=tokens.momentum,
            bptt_chunks=self.bptt_chunks,
            backend=self.backend,
        )
        output = self.output(output.flatten(-2))
        if state.position % self.chunk_size + x.shape[1] < self.chunk_size and torch.is_grad_enabled():
            # Nothing was written, so keys, targets and gates had no part in the output. Which parameters have a
            # gradient must not depend on the length of a sequence: an empty sum gives theirs a gradient of zeros.
            writing = (p for name, p in self.named_parameters() if name.split(".")[0] not in self._READING)
            output = output + sum(p.flatten()[:0].sum() for p in writing)
        position = state.position + x.shape[1]
        return output, TitansState(position, state.batch_size, tail, memory, self.adaptive, projections, pending)

    def _tokens(self, x: Tensor, mixed: Tensor, state: TitansState) -> tuple[Tokens, MemoryState | None, Tokens | None]:
        """What the main memory is given for ``x [B, T, dim]`` and what the convolution makes of it, ``mixed``; and
        the projections and their pending tokens as the new state has them."""
        return tokens_of(self._fixed(x, mixed), self.lr_max, self.value_norm_max), None, None

    def _fixed(self, x: Tensor, mixed: Tensor) -> dict[str, Tensor]:
        """The results of all projections that are no memories, by name, see :func:`tokens_of`."""
        found = {}
        if self.key is not None:
            found["k"] = self._per_head(self.key(mixed))
        if self.value is not None:
            found["v"] = self._per_head(self.value(mixed))
        if self.gates is not None:
            found.update(zip(self.fixed_gates, self.gates(x).unbind(-2), strict=True))
        return found

    def _per_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))

    def _check_input(self, x: Tensor) -> None:
        check_input(type(self).__name__, x, self.dim, self.query.weight)

    def _check_state(self, state: TitansState, x: Tensor) -> None:
        """That a state was made by a layer like this one, and for as many sequences as ``x`` has."""
        name = type(self).__name__
        if not isinstance(state, TitansState):
            raise TypeError(f"{name}: state is a {type(state).__name__}; want a TitansState")
        if state.batch_size != x.shape[0]:
            raise ValueError(f"{name}: state has batch size {state.batch_size}, x has {x.shape[0]} rows; want the same")
        shape = (x.shape[0], self.conv.weight.shape[0] - 1, self.dim)
        if tuple(state.tail.shape) != shape:
            raise ValueError(f"{name}: state has a tail of shape {tuple(state.tail.shape)}; want {shape}")
        if state.tail.device != x.device or state_dtype(state.tail.dtype) != state_dtype(x.dtype):
            raise ValueError(
                f"{name}: state has a tail of {state.tail.dtype} on {state.tail.device}; want one for x, {x.dtype} on "
                f"{x.device}"
            )
        if state.adaptive != self.adaptive:
            raise ValueError(f"{name}: state is for adaptive projections {state.adaptive}; want {self.adaptive}")
        self._check_memory("memory", state.memory, tuple(self.weights), self.chunk_size)
        came, want = state.memory.gates, (self.retention, self.momentum)
        if came is not None and came != want:
            raise ValueError(f"{name}: state has (retention, momentum) {came}; want {want}")
        if state.memory.position != state.position:
            raise ValueError(f"{name}: state has its memory at token {state.memory.position}; want {state.position}")

    def _check_memory(self, part: str, held: MemoryState, weights: tuple[Tensor, ...], chunk_size: int) -> None:
        """That a state's ``part`` is of memories such as this layer's."""
        name = type(self).__name__
        if (held.spec, held.chunk_size) != (self.spec, chunk_size):
            raise ValueError(
                f"{name}: state has a {part} for {held.spec} and chunk size {held.chunk_size}; want {self.spec} and "
                f"{chunk_size}"
            )
        came, want = ([tuple(w.shape[-3:]) for w in x] for x in (held.stored_weights, weights))
        if came != want:
            raise ValueError(f"{name}: state has a {part} with weights {came}; want {want}")


class NeuralMemory(TitansLayer):
    """The plain Titans layer: a memory whose keys, targets and gates are linear maps of the tokens.

    With ``x̃ = conv(x)`` cut into heads::

        q, k = (x̃ W_q)_n, (x̃ W_k)_n, each of unit length         v = (x̃ W_v)_n
        lr = lr_max * sigmoid(x w_lr + b_lr)                     momentum = sigmoid(x w_m + b_m)
        retention = exp(-lr * softplus(x w_r + b_r))

    every token reads ``f_{W_c}(q)`` from the memory of its head, an MLP with residual; after each complete chunk the
    memory is written by gradient descent on ``1/2 |f(k) - v|^2``. The output is what was read, times ``W_o``.

    ``layer(x)`` treats ``x [B, T, dim]`` as fresh sequences. :meth:`stream` carries a state across calls: any split of
    a sequence into calls gives the same outputs, states and gradients, to rounding. Rows of a batch never influence
    each other. Inputs have about unit entries; their dtype is that of the parameters, or, under autocast, any that it
    takes; gates, norms and state are float32 (float64 for float64) throughout.

    Args:
        dim: features of a token.
        heads: memories, each ``D = dim / heads`` wide.
        chunk_size: tokens per write.
        expansion: hidden features ``H = expansion * D``.
        activation: as in :class:`hope_kernels.MemorySpec`.
        retention, momentum: whether there is such a gate.
        lr_max: bound of the step; None for ``min(0.1, 0.25 / chunk_size)``, see :class:`hope_kernels.CMSLevel`.
        bptt_chunks: n: the outer gradient does not flow through the weights written into chunk ``n, 2n, ..``.
        backend: as in :func:`hope_kernels.memory_scan`; None picks the fastest.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        chunk_size: int = 16,
        *,
        expansion: int = 4,
        activation: Activation = "gelu_tanh",
        retention: bool = True,
        momentum: bool = True,
        lr_max: float | None = None,
        bptt_chunks: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int(type(self).__name__, "chunk_size", chunk_size)
        check_bound(type(self).__name__, "lr_max", lr_max)
        super().__init__(
            dim,
            heads,
            chunk_size,
            expansion=expansion,
            activation=activation,
            objective="l2",
            rule="gd",
            retention=retention,
            momentum=momentum,
            adaptive=(),
            lr_max=default_lr_max(chunk_size) if lr_max is None else lr_max,
            value_norm_max=None,
            weight_norm_max=None,
            mixed_norm=1.0,  # and targets of the size of the keys
            mixes_heads=True,
            bptt_chunks=bptt_chunks,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()


class SelfModifyingTitans(TitansLayer):
    """A memory whose keys, targets and gates are read off memories that change as it does (equations 83 to 93).

    ``M_k, M_v, M_η, M_α`` and the main memory ``M_mem`` are MLPs with residual, one of each per head. With
    ``x̃ = conv(x)`` cut into heads, each memory at the weights of the start of its chunk::

        q = (x̃ W_q)_n and k = M_k(x̃_n), each of unit length       v = M_v(x̃_n)
        lr = lr_max * sigmoid(M_η(x_n) w_η + b_η)               retention = exp(-lr * softplus(M_α(x_n) w_α + b_α))

    and the output is ``M_mem(q)``. After each complete chunk, of ``chunk_size`` tokens for ``M_mem`` and of
    ``projection_chunk_size`` for the others, every memory is written with the key ``k`` towards a target of its own
    making, ``M(v)``, by delta gradient descent with retention. There is no map after the memory; heads are mixed by
    ``W_q`` and by what follows the layer.

    Sequences, streams, rows and dtypes as in :class:`NeuralMemory`.

    Args:
        dim: features of a token.
        heads: memories of each kind, each ``D = dim / heads`` wide.
        chunk_size: tokens per write of ``M_mem``.
        projection_chunk_size: tokens per write of the others; need not divide or be divided by ``chunk_size``. Its
            chunks are computed one after the other, each by one read and one write of all projections at once.
        expansion: hidden features ``H = expansion * D`` of every memory.
        activation: as in :class:`hope_kernels.MemorySpec`.
        rule: ``"dgd"``, or ``"gd"``, plain gradient descent.
        retention: whether old weights decay; False: there is no ``M_α``.
        momentum: whether the writes of ``M_mem`` have a momentum, ``sigmoid(x w_m + b_m)``; with rule ``"gd"`` only.
        adaptive: the projections that are memories, some of ``"k"``, ``"v"``, ``"lr"``, ``"retention"``; all others are
            linear maps, as in :class:`NeuralMemory`. None for all.
        lr_max: bound of the step, ``η_max``; None for 0.1, or for ``min(0.1, 0.25 / C)`` with ``"gd"`` and C the
            larger chunk size.
        value_norm_max: ``v`` is shortened to this norm where it is longer; None leaves it as the equations have it. A
            bound of 1 takes away what makes self-made targets grow, see docs/titans.md.
        weight_norm_max: bound of the spectral norm of every memory's initial ``W_out``, which training may raise to
            where one write overshoots, see docs/titans.md; None has none, as the equations. Fresh ones have about 1.5.
        bptt_chunks: n: the outer gradient does not flow through weights written into chunk ``n, 2n, ..``, each memory
            by its own chunks.
        backend: as in :func:`hope_kernels.memory_scan`; None picks the fastest.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        chunk_size: int = 16,
        projection_chunk_size: int = 64,
        *,
        expansion: int = 4,
        activation: Activation = "gelu_tanh",
        rule: Rule = "dgd",
        retention: bool = True,
        momentum: bool = False,
        adaptive: Sequence[str] | None = None,
        lr_max: float | None = None,
        value_norm_max: float | None = None,
        weight_norm_max: float | None = None,
        bptt_chunks: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int(type(self).__name__, "chunk_size", chunk_size)
        check_int(type(self).__name__, "projection_chunk_size", projection_chunk_size)
        check_bound(type(self).__name__, "lr_max", lr_max)
        check_bound(type(self).__name__, "value_norm_max", value_norm_max)
        check_bound(type(self).__name__, "weight_norm_max", weight_norm_max)
        check_bool(type(self).__name__, "retention", retention)
        if lr_max is None:
            lr_max = DELTA_LR_MAX if rule == "dgd" else default_lr_max(max(chunk_size, projection_chunk_size))
        super().__init__(
            dim,
            heads,
            chunk_size,
            expansion=expansion,
            activation=activation,
            objective="self",
            rule=rule,
            retention=retention,
            momentum=momentum,
            adaptive=checked_adaptive(type(self).__name__, adaptive, retention),
            lr_max=lr_max,
            value_norm_max=value_norm_max,
            weight_norm_max=weight_norm_max,
            mixed_norm=START_MIXED_NORM,
            mixes_heads=False,
            bptt_chunks=bptt_chunks,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.projection_chunk_size = projection_chunk_size
        self.projections = None
        if self.adaptive:
            self.projections = ProjectionMemories(
                self.adaptive,
                heads,
                self.head_dim,
                self.hidden,
                projection_chunk_size,
                spec=self.spec,
                lr_max=self.lr_max,
                value_norm_max=value_norm_max,
                weight_norm_max=weight_norm_max,
                bptt_chunks=bptt_chunks,
                backend=backend,
                device=device,
                dtype=dtype,
            )
        self.reset_parameters()

    def init_state(self, batch_size: int) -> TitansState:
        """The state before the first token of ``batch_size`` sequences.

        It refers to the parameters: gradients through it reach them.
        """
        state = super().init_state(batch_size)
        if self.projections is None:
            return state
        return replace(state, adaptive=self.adaptive, projections=self.projections.initial_state(batch_size))

    def _tokens(self, x: Tensor, mixed: Tensor, state: TitansState) -> tuple[Tokens, MemoryState | None, Tokens | None]:
        if self.projections is None:
            return super()._tokens(x, mixed, state)
        fixed = self._fixed(x, mixed)
        momentum = fixed.pop("momentum", None)  # of the main memory alone
        tokens, projections, pending = self.projections(
            self._per_head(x), self._per_head(mixed), fixed, state.projections, state.pending
        )
        if momentum is not None:
            tokens = tokens._replace(momentum=torch.sigmoid(momentum))
        return tokens, projections, pending

    def _check_state(self, state: TitansState, x: Tensor) -> None:
        super()._check_state(state, x)
        if self.projections is None:
            return
        held, size = state.projections, self.projection_chunk_size
        self._check_memory("projections", held, tuple(self.projections.weights), size)
        kept = 0 if state.pending is None else state.pending.k.shape[1]
        if held.position + kept != state.position or kept != state.position % size:
            raise ValueError(
                f"{type(self).__name__}: state has projections at token {held.position} and {kept} tokens pending; "
                f"want {state.position - state.position % size} and {state.position % size}"
            )
