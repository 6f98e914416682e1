"""Launches of the tiled scan: a fixed number of kernels per chunk, each a product over all sequences and heads.

For chunks or tokens that one program cannot hold. The host walks the chunks; how many a sequence of a packed table has
is known to the device only, so it walks to the bound that the host knows and programs without work leave at once.
Nothing waits for the device.

Scratch: the activations of one chunk (the backward has about a dozen such matrices) and, in the backward, the states of
at most K chunks, K the checkpoint interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton import cdiv, next_power_of_2

from hope_kernels.backends.interface import ScanGradients
from hope_kernels.backends.triton import launch
from hope_kernels.backends.triton import tiled_backward as backward
from hope_kernels.backends.triton import tiled_delta_rule as delta_rule
from hope_kernels.backends.triton import tiled_kernels as forward
from hope_kernels.backends.triton.launch import matrix_view, matrix_views, token_view
from hope_kernels.backends.triton.operands import MatrixView
from hope_kernels.backends.triton.tiled_kernels import Sections, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.backends.interface import ScanProblem

# Rows, columns, inner, warps and stages of a product's tile, by the bytes of an operand and the number of sums that a
# program holds at once.
TILES = {
    (2, 1): (128, 128, 64, 8, 3),
    (2, 2): (128, 64, 64, 8, 3),
    (2, 4): (64, 64, 64, 4, 3),
    (4, 1): (64, 64, 32, 4, 2),
    (4, 2): (64, 32, 32, 4, 2),
    (4, 4): (32, 32, 32, 4, 2),
}
# The same where sizes are no multiples of those blocks: masks and unaligned loads take registers.
MASKED_TILES = {2: (64, 32, 32, 4, 2), 4: (32, 32, 32, 4, 2)}
GROUP = 8
TRIANGLE = 64  # side of the blocks that the triangular systems of dgd are cut into
READ_ROWS = 2048  # queries read at once where no write bounds their number
FINISH = 128  # tokens whose partial sums one program adds up


@lru_cache
def choose_tile(bytes_: int, sums: int, rows: int, columns: int, terms: tuple[int, ...]) -> Tile:
    """The tile of a product ``[rows, columns]`` summed over ``terms``. It depends on sizes of the memory only, never on
    how much there is to do: results are the same whatever the batch."""

    def fit(block: int, *sizes: int) -> int:
        return min(block, max(16, next_power_of_2(max(sizes))))

    def cut(full_rows: int, full_columns: int, full_inner: int, warps: int, stages: int) -> Tile:
        block_rows, block_columns, inner = fit(full_rows, rows), fit(full_columns, columns), fit(full_inner, *terms)
        return Tile(
            rows=block_rows,
            columns=block_columns,
            inner=inner,
            group=GROUP,
            warps=warps if block_rows * block_columns == full_rows * full_columns else 4,
            stages=stages,
            even=rows % block_rows == 0 and columns % block_columns == 0 and all(n % inner == 0 for n in terms),
        )

    tile = cut(*TILES[bytes_, sums])
    return tile if tile.even else cut(*MASKED_TILES[bytes_])


def turned(view: MatrixView) -> MatrixView:
    """The transposed matrix."""
    return MatrixView(view.data, view.sequence, view.head, view.outer, view.inner)


class States(NamedTuple):
    """Matrices of weights and of momentum: views, one per weight (no momentum: empty)."""

    weights: tuple[Any, ...]
    speeds: tuple[Any, ...]


class LayerGroup(NamedTuple):
    """dgd: scratch of the layers that share their inputs."""

    inputs: MatrixView
    width: int
    square: Tensor
    step: Tensor
    weight: Tensor
    lower: MatrixView
    inverse: MatrixView
    gram: MatrixView | None


class _Scan:
    """One call: its arguments as the kernels take them, its scratch, and the launches of a chunk."""

    def __init__(self, problem: ScanProblem, sections: Sections, *, rows: int | None = None, keep: bool = False):
        """``sections``: the most any chunk has. ``rows``: tokens per chunk where nothing is written. ``keep``: what the
        backward needs beyond the forward."""
        self.problem = problem
        self.described, self.sizes = launch.problem_arguments(problem)
        plan = launch.make_plan(problem, block_hidden=16)
        self.plan = plan = plan if rows is None else replace(plan, chunk=rows)
        # For kernels that touch no tokens: fewer arguments.
        self.places = self.described._replace(
            q=None, k=None, v=None, pending_k=None, pending_v=None, weights=(), momentum=()
        )
        self.device = problem.tokens.device
        self.operand = problem.tokens.dtype
        self.sequences, self.heads = problem.sequence_count, plan.heads
        self.tasks = self.sequences * self.heads
        self.keep = keep
        self.deep = plan.form != "linear"
        self.delta = plan.rule == "dgd"
        self.chunk, self.dim, self.hidden_size = plan.chunk, plan.dim, plan.hidden
        self.shapes = problem.spec.weight_shapes(self.dim, self.hidden_size)
        self.last = plan.weights - 1
        self._allocate(sections)

    # ---- scratch -----------------------------------------------------------------------------------------------------

    def matrix(self, rows: int, columns: int, dtype: torch.dtype | None = None, *, zero: bool = False) -> MatrixView:
        """Scratch ``[S, N, rows, columns]``."""
        make = torch.zeros if zero else torch.empty
        shape = (self.sequences, self.heads, rows, columns)
        return matrix_view(make(shape, dtype=dtype or self.operand, device=self.device))

    def vector(self, *shape: int) -> Tensor:
        return torch.empty((self.tasks, *shape), dtype=torch.float32, device=self.device)

    def _allocate(self, sections: Sections) -> None:
        C, D, H, plan = self.chunk, self.dim, self.hidden_size, self.plan
        writes, glu = sections.keys > 0, plan.form == "glu"
        rows = sections.count * C
        kept = rows if self.keep else C
        self.x = self.matrix(rows, D)
        self.hidden = self.z = self.gate = self.up = self.slope = self.curve = None
        if self.deep:
            self.hidden = self.matrix(rows, H)
            if writes or self.keep:
                self.slope = self.matrix(kept, H)
                if glu:
                    self.gate, self.up = self.matrix(kept, H), self.matrix(kept, H)
        self.u = self.hidden if self.deep else self.x  # inputs of the last layer
        self.delta_view = self.product = self.error_hidden = self.before = self.after = self.gamma = None
        self.weighted = self.momentum_weighted = self.right = self.corrected = ()
        self.groups: tuple[LayerGroup, ...] = ()
        if not writes:
            return
        self.delta_view = self.matrix(C, D)
        if self.keep and self.deep:
            self.curve, self.error_hidden = self.matrix(C, H), self.matrix(C, H)
        widths = [out for _, out in self.shapes]
        self.weighted = tuple(self.matrix(C, n) for n in widths)
        if self.problem.has_momentum:
            self.momentum_weighted = tuple(self.matrix(C, n) for n in widths)
        if not self.delta:
            return
        if self.deep:
            self.z = self.matrix(C, H)
        self.product = self.matrix(C, D)
        self.right = tuple(self.matrix(C, n, torch.float32) for n in widths)
        self.corrected = tuple(self.matrix(C, n) for n in widths)
        self.before, self.after, self.gamma = self.vector(C), self.vector(C), self.vector()
        self.triangle = self._triangle_tile()
        blocks = cdiv(C, self.triangle.rows)
        self.groups = tuple(
            LayerGroup(
                inputs,
                width,
                self.vector(C),
                self.vector(C),
                self.vector(C),
                self.matrix(C, C),
                self.matrix(blocks * self.triangle.rows, self.triangle.rows, torch.float32),
                self.matrix(C, C, torch.float32) if self.keep else None,
            )
            for inputs, width in ([(self.x, D)] + ([(self.hidden, H)] if self.deep else []))
        )

    def group_of(self, layer: int) -> int:
        return 0 if layer < self.plan.inputs else 1

    # ---- launching ---------------------------------------------------------------------------------------------------

    def tile(self, rows: int, columns: int, *terms: int, sums: int = 1) -> Tile:
        return choose_tile(self.operand.itemsize, sums, rows, columns, terms)

    def _triangle_tile(self) -> Tile:
        side = min(TRIANGLE, max(16, next_power_of_2(self.chunk)))
        terms = (self.dim, self.hidden_size)
        inner = self.tile(self.chunk, self.chunk, *terms).inner
        even = self.chunk % side == 0 and all(n % inner == 0 for n in terms)
        return Tile(side, side, min(inner, 32), GROUP, 4, 2, even)

    def run(self, kernel: Any, programs: int, *args: Any, tile: Tile, **constants: Any) -> None:
        """``programs`` of them for each sequence and head."""
        kernel[(programs * self.tasks,)](
            *args, plan=self.plan, tile=tile, num_warps=tile.warps, num_stages=tile.stages, **constants
        )

    def tiles(self, rows: int, columns: int, tile: Tile, sections: int = 1) -> int:
        return sections * cdiv(rows, tile.rows) * cdiv(columns, tile.columns)

    # ---- a chunk, forward --------------------------------------------------------------------------------------------

    def read_chunk(
        self,
        chunk: int,
        read: Sequence[MatrixView],
        sections: Sections,
        output: Tensor | None,
        grad_output: Any = None,
        d_out: MatrixView | None = None,
    ) -> None:
        """Up to the outputs of all rows and, with keys among them, the errors of all layers, by step."""
        C, D, H, plan = self.chunk, self.dim, self.hidden_size, self.plan
        writes = sections.keys > 0 and self.delta_view is not None
        tile = self.tile(C, D, D)
        self.run(
            forward.gather_kernel, self.tiles(C, D, tile, sections.count),
            self.described, self.sizes, chunk, grad_output, self.x, d_out, sections=sections, tile=tile,
        )  # fmt: skip
        if writes and self.delta:
            self._overlaps(chunk, 0)
        if self.deep:
            tile = self.tile(C, H, D, sums=plan.inputs)
            self.run(
                forward.hidden_kernel, self.tiles(C, H, tile, sections.count),
                self.places, self.sizes, chunk, self.x, tuple(read[: plan.inputs]), self.hidden, self.z, self.gate,
                self.up, self.slope, self.curve, keep=self.keep, sections=sections, tile=tile,
            )  # fmt: skip
            if writes and self.delta:
                self._overlaps(chunk, 1)
        if writes or output is not None:
            reads = sections if output is not None else replace(sections, queries=0)
            tile = self.tile(C, D, H, sums=2 if plan.objective == "self" else 1)
            self.run(
                forward.out_kernel, self.tiles(C, D, tile, reads.keys + reads.queries),
                self.described, self.sizes, chunk, None if output is None else token_view(output), self.x, self.u,
                read[self.last], self.delta_view, self.weighted[self.last] if writes else None,
                self.momentum_weighted[self.last] if writes and self.momentum_weighted else None, self.product,
                self.right[self.last] if writes and self.delta else None, self.before,
                writes=writes, sections=reads, tile=tile,
            )  # fmt: skip
        if not writes:
            return
        if self.deep:
            tile = self.tile(C, H, D, sums=plan.inputs)
            self.run(
                forward.errors_kernel, self.tiles(C, H, tile),
                self.places, self.sizes, chunk, self.delta_view, turned(read[self.last]), self.slope, self.gate,
                self.up, self.z, self.before, self.error_hidden, self.weighted, self.momentum_weighted, self.right,
                tile=tile,
            )  # fmt: skip
        if self.delta:
            for i, (_, width) in enumerate(self.shapes):
                group, tile = self.groups[self.group_of(i)], self.triangle
                self.run(
                    delta_rule.solve_kernel, cdiv(width, tile.columns),
                    self.places, self.sizes, chunk, self.right[i], group.lower, group.inverse, group.weight,
                    self.corrected[i], self.weighted[i], width=width, tile=tile,
                )  # fmt: skip

    def _overlaps(self, chunk: int, index: int) -> None:
        group, tile = self.groups[index], self.triangle
        blocks = cdiv(self.chunk, tile.rows)
        self.run(
            delta_rule.steps_kernel, blocks,
            self.places, self.sizes, chunk, group.inputs, group.square, group.step, group.weight, self.before,
            self.after, self.gamma, width=group.width, tile=tile,
        )  # fmt: skip
        self.run(
            delta_rule.overlap_kernel, blocks * blocks,
            self.places, self.sizes, chunk, group.inputs, turned(group.inputs), group.step, group.lower, group.inverse,
            group.gram, width=group.width, tile=tile,
            block_plan=replace(self.plan, chunk=tile.rows, block_chunk=tile.rows),
        )  # fmt: skip

    def write_chunk(self, chunk: int, before: States, after: States, copies: States) -> None:
        """The state ``after`` the chunk, whose errors are at hand, from the one ``before`` it; they may be the same."""
        coefficients = self.described.coefficients
        for i, (inner, outer) in enumerate(self.shapes):
            u = self.x if i < self.plan.inputs else self.hidden
            tile = self.tile(inner, outer, self.chunk)
            speed = before.speeds[i] if before.speeds else None

            def write(weighted, matrix, speed, after, copy, decay, inner=inner, outer=outer, u=u, tile=tile) -> None:
                self.run(
                    forward.write_kernel, self.tiles(inner, outer, tile),
                    self.places, self.sizes, chunk, turned(u), weighted, matrix, speed, after, copy, self.gamma, decay,
                    coefficients.momentum_carry, inner=inner, outer=outer, tile=tile,
                )  # fmt: skip

            # The weight first: it takes the momentum that the chunk starts with.
            write(self.weighted[i], before.weights[i], speed, after.weights[i], copies.weights[i], coefficients.decay)
            if speed is not None:
                write(
                    self.momentum_weighted[i],
                    speed,
                    None,
                    after.speeds[i],
                    copies.speeds[i],
                    coefficients.momentum_decay,
                )

    def checkpoint(self, chunk: int, saved: Sequence[Tensor], states: States, copies: States, *, save: bool) -> None:
        """Saves the states at the start of ``chunk``, or loads them."""
        if not saved or not saved[0].numel():
            return
        matrices, doubles = states.weights + states.speeds, copies.weights + copies.speeds
        for i, (matrix, double, stored) in enumerate(zip(matrices, doubles, saved, strict=True)):
            inner, outer = self.shapes[i % len(self.shapes)]
            tile = self.tile(inner, outer, self.chunk)
            self.run(
                forward.checkpoint_kernel, self.tiles(inner, outer, tile),
                self.places, self.sizes, chunk, matrix_view(stored), matrix, double,
                save=save, inner=inner, outer=outer, tile=tile,
            )  # fmt: skip


def _most_chunks(problem: ScanProblem) -> int:
    """A bound of the complete chunks of any sequence."""
    if problem.k is None or problem.tokens.shape[1] == 0:
        return 0
    pending = 0 if problem.pending_k is None else problem.pending_k.shape[1]
    return min(problem.chunks, (problem.tokens.shape[1] + pending) // problem.chunk_size)


def _most_tokens(problem: ScanProblem) -> int:
    """A bound of the tokens of any sequence."""
    return problem.tokens.shape[1] + (0 if problem.pending_k is None else problem.pending_k.shape[1])


def _read_rows(problem: ScanProblem) -> int | None:
    """Tokens per chunk of a problem that only reads."""
    if problem.k is not None:
        return None
    return min(READ_ROWS, max(16, next_power_of_2(problem.tokens.shape[1])))


def _sections(problem: ScanProblem, *, reads: bool, share: bool) -> Sections:
    writes = problem.k is not None
    shared = share and reads and writes and launch.same_view(problem.q, problem.k)
    return Sections(
        keys=int(writes),
        values=int(writes and problem.spec.objective == "self"),
        queries=int(reads and not shared),
        shared=shared,
    )


def _operands(problem: ScanProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What products read of float32 matrices: these, or copies in the dtype of the tokens, to be filled."""
    dtype = problem.tokens.dtype
    return [x if x.dtype == dtype else torch.empty_like(x, dtype=dtype) for x in tensors]


def _copies(states: Sequence[Tensor], operands: Sequence[Tensor]) -> tuple[MatrixView | None, ...]:
    """Views of operands that are not the states themselves."""
    return tuple(None if x is y else matrix_view(y) for x, y in zip(states, operands, strict=True))


def _fill(tensors: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Copies ``values`` (shared ones to all sequences); without a value, zeros."""
    for i, tensor in enumerate(tensors):
        value = values[i] if i < len(values) else None
        if value is None:
            tensor.zero_()
        else:
            tensor.copy_(value)


def scan_forward(problem: ScanProblem, *, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """As :meth:`hope_kernels.backends.interface.Backend.scan_forward` says; launches per chunk are fixed."""
    tokens = problem.tokens
    result = launch.empty_results(problem, save=save)
    output, weights, momentum, saved = result
    if problem.q is None:
        output = None
    _fill(weights, problem.weights)
    _fill(momentum, problem.momentum)
    if problem.sequence_count * tokens.shape[1] * tokens.shape[2] == 0:
        return result

    sections = _sections(problem, reads=output is not None, share=True)
    scan = _Scan(problem, sections, rows=_read_rows(problem))
    if problem.k is None:
        read = matrix_views([w.to(tokens.dtype) for w in problem.weights])
        for chunk in range(cdiv(tokens.shape[1], scan.chunk)):
            scan.read_chunk(chunk, read, sections, output)
        return result
    operands = _operands(problem, weights)
    if operands[0] is not weights[0]:
        _fill(operands, problem.weights)
    read = matrix_views(operands)
    state = States(matrix_views(weights), matrix_views(momentum))
    copies = States(_copies(weights, operands), (None,) * len(momentum))
    most = _most_chunks(problem)
    for chunk in range(most):
        if chunk and chunk % problem.checkpoint_interval == 0:
            scan.checkpoint(chunk, saved, state, copies, save=True)
        scan.read_chunk(chunk, read, sections, output)
        scan.write_chunk(chunk, state, state, copies)
    if most and most % problem.checkpoint_interval == 0:
        scan.checkpoint(most, saved, state, copies, save=True)
    if output is not None and most * scan.chunk < _most_tokens(problem):
        # Queries behind the last complete chunk; with a table, of those sequences that have the most.
        tail = sections if sections.shared else Sections(0, 0, 1)
        scan.read_chunk(most, read, tail, output)
    return result


class _Adjoint(_Scan):
    """The backward of one call."""

    def __init__(self, problem: ScanProblem, sections: Sections, gradients: ScanGradients, grad_output: Tensor | None):
        super().__init__(problem, sections, rows=_read_rows(problem), keep=True)
        self.gradients = gradients
        self.grad_output = None if grad_output is None else token_view(launch.readable(grad_output))
        self._allocate_adjoints(sections)

    def _allocate_adjoints(self, sections: Sections) -> None:
        C, D, H, plan = self.chunk, self.dim, self.hidden_size, self.plan
        rows = sections.count * C
        self.d_out = self.matrix(rows, D)
        self.d_z = tuple(self.matrix(rows, H) for _ in range(plan.inputs)) if self.deep else (self.d_out,)
        self.d_error_hidden = self.d_prediction = None
        self.extra = self.d_errors = self.d_gram = self.d_norm = ()
        self.d_between = None
        self.step_partials = self.momentum_partials = None
        self.scalars: tuple[Tensor | None, ...] = (None, None, None)
        self.state_tiles = [self.tile(i, o, C, sums=2 if self.problem.has_momentum else 1) for i, o in self.shapes]
        self.tile_counts = [self.tiles(i, o, t) for (i, o), t in zip(self.shapes, self.state_tiles, strict=True)]
        if not sections.keys:
            return
        if self.deep:
            self.d_error_hidden = self.matrix(C, H)
            self.extra = tuple(self.matrix(C, H) for _ in range(plan.inputs))
        self.errors_tile = self.tile(C, H, D, sums=plan.inputs * (2 if self.problem.has_momentum else 1))
        self.delta_tile = self.tile(C, D, H, sums=2 if self.problem.has_momentum else 1)
        count = sum(self.tile_counts)
        factors = self.problem.retention if self.delta else self.problem.decay
        self.scalars = (
            self.vector(count) if factors is not None else None,
            self.vector(count) if self.problem.has_momentum else None,
            self.vector(count) if self.problem.has_momentum else None,
        )
        if not self.delta:
            self.first_delta = plan.inputs * cdiv(H, self.errors_tile.columns) if self.deep else 0
            self.sums = self.first_delta + cdiv(D, self.delta_tile.columns)
            self.step_partials = self.vector(self.sums, C)
            self.momentum_partials = self.vector(self.sums, C) if self.problem.has_momentum else None
            return
        self.d_prediction = self.matrix(C, D) if plan.needs_prediction else None
        self.d_errors = tuple(self.matrix(C, out) for _, out in self.shapes)
        # Blocks above the diagonal are never written, and are read where a product's tile spans several blocks.
        self.d_gram = tuple(self.matrix(C, C, torch.float32, zero=True) for _ in self.groups)
        self.d_norm = tuple(self.vector(C) for _ in self.groups)
        self.d_lower = self.matrix(C, C, torch.float32)
        self.d_between = self.matrix(C, C, torch.float32) if self.problem.retention is not None else None
        self.sums = len(self.groups)
        self.step_partials, self.after_partials = self.vector(self.sums, C), self.vector(self.sums, C)
        self.before_sums = sum(cdiv(out, self.triangle.columns) for _, out in self.shapes)
        self.before_partials = self.vector(self.before_sums, C)

    def chunk_adjoint(
        self, chunk: int, read: Sequence[MatrixView], slot: States, adjoint: States, copies: States, sections: Sections
    ) -> None:
        """``adjoint``, of the state behind the chunk, becomes that of the state before it, in ``slot``; tokens and
        coefficients get their gradients. ``read`` and ``copies``: what products read of the two."""
        d_out = self.d_out if sections.queries else None
        self.read_chunk(chunk, read, sections, None, self.grad_output, d_out)
        seen = States(
            tuple(c or a for c, a in zip(copies.weights, adjoint.weights, strict=True)),
            tuple(c or a for c, a in zip(copies.speeds, adjoint.speeds, strict=True)),
        )
        if sections.keys:
            self._write_adjoint(chunk, read, seen)
        self._read_adjoint(chunk, read, seen, sections)
        self.state_adjoint(chunk, slot, adjoint, copies, sections)
        if sections.keys:
            self._finish(chunk)

    def _write_adjoint(self, chunk: int, read: Sequence[MatrixView], seen: States) -> None:
        C, D, H, plan, gradients = self.chunk, self.dim, self.hidden_size, self.plan, self.gradients
        inputs, last = plan.inputs, self.last
        if self.delta:
            self._delta_rule_adjoint(chunk, seen)
        elif self.deep:
            tile = self.errors_tile
            self.run(
                backward.input_errors_adjoint_kernel, self.tiles(C, H, tile),
                self.places, self.sizes, chunk, self.x, seen.weights[:inputs], seen.speeds[:inputs], self.error_hidden,
                self.slope, self.curve, self.gate, self.up, self.d_error_hidden, self.extra,
                self.step_partials, self.momentum_partials, count=self.sums, tile=tile,
            )  # fmt: skip
        own_target = plan.objective != "self"
        tile = self.delta_tile
        self.run(
            backward.delta_adjoint_kernel, self.tiles(C, D, tile),
            self.places, self.sizes, chunk, self.u, seen.weights[last], seen.speeds[last] if seen.speeds else None,
            self.delta_view, self.d_error_hidden, read[last], self.d_errors[last] if self.delta else None, self.before,
            self.d_out, self.d_prediction, token_view(gradients.v) if own_target else None,
            token_view(gradients.pending_v) if own_target else None, self.step_partials, self.momentum_partials,
            first=0 if self.delta else self.first_delta, count=self.sums, tile=tile,
        )  # fmt: skip

    def _delta_rule_adjoint(self, chunk: int, seen: States) -> None:
        C, H, plan, square = self.chunk, self.hidden_size, self.plan, self.triangle
        products = (self.z, self.up, self.product) if plan.form == "glu" else (self.z, self.product)
        products = products if self.deep else (self.product,)
        blocks = cdiv(C, square.rows)
        before_first = 0
        for index, group in enumerate(self.groups):
            layers = [i for i in range(plan.weights) if self.group_of(i) == index]
            outer = self.shapes[layers[0]][1]
            tile = self.tile(C, outer, group.width)
            columns = cdiv(outer, tile.columns)
            weight_partials = self.vector(len(layers) * columns, C)
            for position, i in enumerate(layers):
                self.run(
                    delta_rule.corrected_adjoint_kernel, self.tiles(C, outer, tile),
                    self.places, self.sizes, chunk, group.inputs, seen.weights[i], group.weight, self.corrected[i],
                    self.right[i], weight_partials, first=position * columns, count=len(layers) * columns,
                    inner=group.width, outer=outer, tile=tile,
                )  # fmt: skip
                self.run(
                    delta_rule.solve_adjoint_kernel, cdiv(outer, square.columns),
                    self.places, self.sizes, chunk, self.right[i], group.lower, group.inverse, products[i],
                    self.d_errors[i], self.before_partials, first=before_first, count=self.before_sums, width=outer,
                    tile=square,
                )  # fmt: skip
                before_first += cdiv(outer, square.columns)
            self.run(
                delta_rule.lower_adjoint_kernel, blocks * blocks,
                self.places, self.sizes, chunk, tuple(self.d_errors[i] for i in layers),
                tuple(turned(self.corrected[i]) for i in layers), self.d_lower, width=outer, tile=square,
            )  # fmt: skip
            self.run(
                delta_rule.triangle_adjoint_kernel, blocks,
                self.places, self.sizes, chunk, self.d_lower, group.gram, group.square, group.step, self.after,
                weight_partials, self.d_gram[index], self.d_norm[index], self.d_between, self.step_partials,
                self.after_partials, group=index, groups=self.sums, count=len(layers) * columns,
                tile=replace(square, warps=8),
            )  # fmt: skip
        if self.deep:
            tile = self.tile(C, H, self.dim, sums=plan.inputs)
            self.run(
                delta_rule.errors_adjoint_kernel, self.tiles(C, H, tile),
                self.places, self.sizes, chunk, self.d_errors[: plan.inputs], self.error_hidden, self.slope, self.curve,
                self.gate, self.up, self.before, self.d_error_hidden, self.extra, tile=tile,
            )  # fmt: skip

    def _read_adjoint(self, chunk: int, read: Sequence[MatrixView], seen: States, sections: Sections) -> None:
        C, D, H, plan, gradients = self.chunk, self.dim, self.hidden_size, self.plan, self.gradients
        inputs, last = plan.inputs, self.last

        def through_write(layers: slice, group: int) -> tuple:
            d_gram = self.d_gram[group] if self.d_gram else None
            return (
                self.weighted[layers],
                self.momentum_weighted[layers],
                tuple(turned(g) for g in seen.weights[layers]),
                tuple(turned(g) for g in seen.speeds[layers]),
                d_gram,
                None if d_gram is None else turned(d_gram),
                self.d_norm[group] if self.d_norm else None,
            )

        if self.deep:
            tile = self.tile(C, H, D, sums=plan.inputs if self.delta else 1)
            self.run(
                backward.hidden_adjoint_kernel, self.tiles(C, H, tile, sections.count),
                self.places, self.sizes, chunk, self.d_out, turned(read[last]), *through_write(slice(last, None), 1),
                self.hidden, self.slope, self.gate, self.up, self.extra, self.d_z, sections=sections, tile=tile,
            )  # fmt: skip
        self_target = plan.objective == "self" and sections.keys
        tile = self.tile(C, D, H)
        self.run(
            backward.token_adjoint_kernel, self.tiles(C, D, tile, sections.count),
            self.places, self.sizes, chunk, self.d_z, tuple(turned(w) for w in read[:inputs]),
            *through_write(slice(inputs), 0), self.x, self.d_out, self.d_prediction,
            *(token_view(g) for g in (gradients.q, gradients.k, gradients.pending_k)),
            token_view(gradients.v) if self_target else None, token_view(gradients.pending_v) if self_target else None,
            sections=sections, tile=tile,
        )  # fmt: skip

    def state_adjoint(self, chunk: int, slot: States, adjoint: States, copies: States, sections: Sections) -> None:
        """The last step of a chunk; without sections, only the cut of truncated backpropagation."""
        plan, first = self.plan, 0
        for i, (inner, outer) in enumerate(self.shapes):
            is_last = i == self.last
            tile = self.state_tiles[i]
            deep_last = is_last and self.deep
            speeds = bool(adjoint.speeds)
            self.run(
                backward.state_adjoint_kernel, self.tile_counts[i],
                self.places, self.sizes, chunk, turned(self.hidden if deep_last else self.x),
                self.d_out if is_last else self.d_z[i],
                turned(self.d_error_hidden) if deep_last and sections.keys else None, self.delta_view,
                adjoint.weights[i], copies.weights[i], adjoint.speeds[i] if speeds else None,
                copies.speeds[i] if speeds else None, slot.weights[i], slot.speeds[i] if speeds else None,
                *self.scalars, first=first, count=sum(self.tile_counts), inner=inner, outer=outer,
                from_keys=not is_last or plan.needs_prediction or self.delta, gamma=self.gamma,
                sections=sections, tile=tile,
            )  # fmt: skip
            first += self.tile_counts[i]

    def _finish(self, chunk: int) -> None:
        g = self.gradients
        d_scalars = () if self.delta else (g.decay, g.momentum_carry, g.momentum_decay)
        scalars = [(p, d) for p, d in zip(self.scalars, d_scalars, strict=False) if d is not None]
        tokens = [(self.step_partials, g.step)]
        if g.momentum_step is not None:
            tokens.append((self.momentum_partials, g.momentum_step))
        width = min(FINISH, max(16, next_power_of_2(self.chunk)))
        backward.finish_kernel[(cdiv(self.chunk, width) * self.tasks,)](
            self.places, self.sizes, chunk, tuple(p for p, _ in tokens), tuple(d for _, d in tokens),
            tuple(p for p, _ in scalars), tuple(d for _, d in scalars),
            rows=self.sums, tiles=sum(self.tile_counts), plan=self.plan, width=width, num_warps=4,
        )  # fmt: skip
        if g.retention is not None:
            tile = replace(self.triangle, warps=8)
            self.run(
                delta_rule.retention_adjoint_kernel, cdiv(self.chunk, tile.rows),
                self.places, self.sizes, chunk, self.d_between, self.before, self.after, self.scalars[0],
                self.before_partials, self.after_partials, g.retention,
                tiles=sum(self.tile_counts), count=self.before_sums, groups=self.sums, tile=tile,
            )  # fmt: skip


def _empty_gradients(problem: ScanProblem) -> ScanGradients:
    """Zeros: what no kernel reaches (tokens behind the last complete chunk, rows of a table that are not used)."""

    def zeros(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros(x.shape, dtype=x.dtype, device=x.device)

    return ScanGradients(
        *(zeros(x) for x in problem.token_tensors),
        *(zeros(x) for x in problem.coefficients),
        weights=launch.empty_states(problem, problem.sequence_count),
        momentum=launch.empty_states(problem, problem.sequence_count) if problem.has_momentum else [],
    )


def scan_backward(
    problem: ScanProblem,
    saved: list[Tensor],
    grad_output: Tensor | None,
    grad_weights: list[Tensor | None],
    grad_momentum: list[Tensor | None],
) -> ScanGradients:
    """As :meth:`hope_kernels.backends.interface.Backend.scan_backward` says; launches per chunk are fixed."""
    gradients = _empty_gradients(problem)
    _fill(gradients.weights, grad_weights)
    _fill(gradients.momentum, grad_momentum)
    result = gradients if problem.momentum else gradients._replace(momentum=[])
    tokens = problem.tokens
    if problem.sequence_count * tokens.shape[1] * tokens.shape[2] == 0:
        return result

    reads = problem.q is not None and grad_output is not None
    sections = _sections(problem, reads=reads, share=False)
    if sections.count == 0:
        return result
    walk = _Adjoint(problem, sections, gradients, grad_output if reads else None)
    adjoint = States(matrix_views(gradients.weights), matrix_views(gradients.momentum))
    weight_operands = _operands(problem, gradients.weights)
    momentum_operands = _operands(problem, gradients.momentum)
    if weight_operands[0] is not gradients.weights[0]:
        _fill(weight_operands, grad_weights)
        _fill(momentum_operands, grad_momentum)
    copies = States(_copies(gradients.weights, weight_operands), _copies(gradients.momentum, momentum_operands))

    if problem.k is None:
        read = matrix_views([w.to(tokens.dtype) for w in problem.weights])
        slot = States(read, ())
        for chunk in reversed(range(cdiv(tokens.shape[1], walk.chunk))):
            walk.chunk_adjoint(chunk, read, slot, adjoint, copies, sections)
        return result

    most, interval = _most_chunks(problem), problem.checkpoint_interval
    tail = Sections(0, 0, sections.queries)
    end = most if reads and most * walk.chunk < _most_tokens(problem) else most - 1
    if end < most and problem.bptt_chunks and most:
        walk.state_adjoint(most, adjoint, adjoint, copies, Sections(0, 0, 0))
    if end < 0:
        return result

    # States at the starts of a segment's chunks, as products read them; the float32 state that runs through it, where
    # that is another one.
    rebuilding = replace(sections, queries=0)
    slots = [_slot(problem) for _ in range(min(interval, end + 1))]
    views = [States(matrix_views(w), matrix_views(s)) for w, s in slots]
    narrow = tokens.dtype != torch.float32
    if narrow:
        running_weights = launch.empty_states(problem, problem.sequence_count)
        running_momentum = launch.empty_states(problem, problem.sequence_count) if problem.has_momentum else []
        state = States(matrix_views(running_weights), matrix_views(running_momentum))
    nothing = States((None,) * len(problem.weights), (None,) * len(slots[0][1]))
    for segment in reversed(range(end // interval + 1)):
        first = segment * interval
        last = min(first + interval - 1, end)
        if segment == 0:
            for weights, speeds in [slots[0], *([(running_weights, running_momentum)] if narrow else [])]:
                _fill(weights, problem.weights)
                _fill(speeds, problem.momentum)
        elif narrow:
            walk.checkpoint(first, saved, state, views[0], save=False)
        else:
            walk.checkpoint(first, saved, views[0], nothing, save=False)
        for chunk in range(first, last):
            i = chunk - first
            walk.read_chunk(chunk, views[i].weights, rebuilding, None)
            if narrow:
                walk.write_chunk(chunk, state, state, views[i + 1])
            else:
                walk.write_chunk(chunk, views[i], views[i + 1], nothing)
        for chunk in reversed(range(first, last + 1)):
            slot = views[chunk - first]
            walk.chunk_adjoint(chunk, slot.weights, slot, adjoint, copies, sections if chunk < most else tail)
    return result


def scans_forward(
    problems: Sequence[ScanProblem], *, save: bool
) -> list[tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]]:
    """Scans that do not depend on one another, one after the other: each of them fills the GPU."""
    return [scan_forward(problem, save=save) for problem in problems]


def scans_backward(
    problems: Sequence[ScanProblem],
    saved: Sequence[list[Tensor]],
    upstream: Sequence[tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]],
) -> list[ScanGradients]:
    """Their gradients, likewise."""
    return [
        scan_backward(problem, kept, *gradients)
        for problem, kept, gradients in zip(problems, saved, upstream, strict=True)
    ]


def _slot(problem: ScanProblem) -> tuple[list[Tensor], list[Tensor]]:
    """A state in the dtype of the tokens, uninitialised."""
    tokens = problem.tokens

    def empty() -> list[Tensor]:
        shape = (problem.sequence_count, tokens.shape[2])
        return [torch.empty((*shape, *w.shape[-2:]), dtype=tokens.dtype, device=tokens.device) for w in problem.weights]

    return empty(), empty() if problem.has_momentum else []
