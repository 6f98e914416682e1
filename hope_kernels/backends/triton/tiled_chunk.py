"""The launches of one chunk of a tiled scan, and the scratch they share: the activations of one chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl
from triton import cdiv, next_power_of_2

from hope_kernels.backends.triton import configurations, launch
from hope_kernels.backends.triton import tiled_delta_rule as delta_rule
from hope_kernels.backends.triton import tiled_forward as forward
from hope_kernels.backends.triton.launch import matrix_view, token_view
from hope_kernels.backends.triton.operands import MatrixView
from hope_kernels.backends.triton.tiled_products import Sections
from hope_kernels.backends.triton.tiled_tiles import Tile, pass_tile, product_tile, triangle_tiles

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.backends.interface import ScanProblem

READ_ROWS = 2048  # tokens of a chunk where none is written


def fixed_view(x: Tensor) -> MatrixView:
    """View of ``[S, heads, rows, columns]`` whose strides the kernels are compiled for.

    They become offsets inside instructions; as run-time values the addresses of a tile would fill registers.
    """
    view = matrix_view(x)
    return MatrixView(view.data, *map(tl.constexpr, view[1:]))


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


class ChunkScan:
    """One call: its arguments as the kernels take them, its scratch, and the launches of a chunk."""

    def __init__(self, problem: ScanProblem, sections: Sections, *, keep: bool = False):
        """``sections``: the most any chunk has. ``keep``: what the backward needs beyond the forward."""
        self.problem = problem
        self.described, self.sizes = launch.problem_arguments(problem)
        plan = launch.make_plan(problem, block_hidden=16)
        if problem.k is None:
            rows = min(READ_ROWS, max(16, next_power_of_2(problem.tokens.shape[1])))
            plan = replace(plan, chunk=rows)
        self.plan = plan
        # For kernels that touch no tokens: fewer arguments.
        self.places = self.described._replace(
            q=None, k=None, v=None, pending_k=None, pending_v=None, weights=(), momentum=()
        )
        self.device = problem.tokens.device
        self.table_keys = configurations.shape_class(problem), configurations.device_of(problem.tokens)
        self.known_tiles: dict[tuple, Tile] = {}
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
        return fixed_view(make(shape, dtype=dtype or self.operand, device=self.device))

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
        self.u, self.u_width = (self.hidden, H) if self.deep else (self.x, D)  # inputs of the last layer
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
        self.triangle, self.triangle_adjoint = triangle_tiles(*self.table_keys, C, (D, H) if self.deep else (D,))
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

    def tile(self, kernel: str, rows: int, columns: int, *terms: int) -> Tile:
        """Of the product ``tiled_<kernel>``, ``[rows, columns]`` summed over ``terms``."""
        key = kernel, rows, columns, terms
        if key not in self.known_tiles:
            self.known_tiles[key] = product_tile(f"tiled_{kernel}", *self.table_keys, rows, columns, terms)
        return self.known_tiles[key]

    def run(self, kernel: Any, programs: int, *args: Any, tile: Tile, **constants: Any) -> None:
        """``programs`` of them for each sequence and head."""
        kernel[(programs * self.tasks,)](*args, plan=self.plan, tile=tile, **tile.options, **constants)

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
        tile = pass_tile(*self.table_keys, C, D)
        self.run(
            forward.gather_kernel, self.tiles(C, D, tile, sections.count),
            self.described, self.sizes, chunk, grad_output, self.x, d_out, sections=sections, tile=tile,
        )  # fmt: skip
        if writes and self.delta:
            self._overlaps(chunk, 0)
        if self.deep:
            tile = self.tile("hidden", C, H, D)
            self.run(
                forward.hidden_kernel, self.tiles(C, H, tile, sections.count),
                self.places, self.sizes, chunk, self.x, tuple(read[: plan.inputs]), self.hidden, self.z, self.gate,
                self.up, self.slope, self.curve, keep=self.keep, sections=sections, tile=tile,
            )  # fmt: skip
            if writes and self.delta:
                self._overlaps(chunk, 1)
        if writes or output is not None:
            reads = sections if output is not None else replace(sections, queries=0)
            tile = self.tile("output", C, D, self.u_width)
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
            tile = self.tile("errors", C, H, D)
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
            tile = self.tile("write", inner, outer, self.chunk)
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
            tile = pass_tile(*self.table_keys, inner, outer)
            self.run(
                forward.checkpoint_kernel, self.tiles(inner, outer, tile),
                self.places, self.sizes, chunk, fixed_view(stored), matrix, double,
                save=save, inner=inner, outer=outer, tile=tile,
            )  # fmt: skip
