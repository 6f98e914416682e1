"""The launches of the backward of one chunk of a tiled scan, and their scratch: about a dozen activations more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from triton import cdiv, next_power_of_2

from hope_kernels.backends.triton import launch
from hope_kernels.backends.triton import tiled_backward as backward
from hope_kernels.backends.triton import tiled_delta_rule as delta_rule
from hope_kernels.backends.triton.launch import token_view
from hope_kernels.backends.triton.tiled_chunk import ChunkScan, States, turned
from hope_kernels.backends.triton.tiled_tiles import pass_tile

if TYPE_CHECKING:
    from torch import Tensor

    from hope_kernels.backends.interface import ScanGradients, ScanProblem
    from hope_kernels.backends.triton.operands import MatrixView
    from hope_kernels.backends.triton.tiled_products import Sections

FINISH = 128  # tokens whose partial sums one program adds up


class ChunkAdjoint(ChunkScan):
    """The backward of one call."""

    def __init__(self, problem: ScanProblem, sections: Sections, gradients: ScanGradients, grad_output: Tensor | None):
        super().__init__(problem, sections, keep=True)
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
        self.state_tiles = [self.tile("state_adjoint", i, o, C) for i, o in self.shapes]
        self.tile_counts = [self.tiles(i, o, t) for (i, o), t in zip(self.shapes, self.state_tiles, strict=True)]
        if not sections.keys:
            return
        if self.deep:
            self.d_error_hidden = self.matrix(C, H)
            self.extra = tuple(self.matrix(C, H) for _ in range(plan.inputs))
            self.errors_tile = self.tile("errors_adjoint", C, H, D)
        # With momentum it holds two sums, as the input layers' kernel does.
        kernel = "errors_adjoint" if self.problem.has_momentum else "delta_adjoint"
        self.delta_tile = self.tile(kernel, C, D, self.u_width)
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
            tile = self.tile("corrected_adjoint", C, outer, group.width)
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
                tile=self.triangle_adjoint,
            )  # fmt: skip
        if self.deep:
            tile = pass_tile(*self.table_keys, C, H)
            self.run(
                backward.errors_adjoint_kernel, self.tiles(C, H, tile),
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
            tile = self.tile("hidden_adjoint", C, H, D)
            self.run(
                backward.hidden_adjoint_kernel, self.tiles(C, H, tile, sections.count),
                self.places, self.sizes, chunk, self.d_out, turned(read[last]), *through_write(slice(last, None), 1),
                self.hidden, self.slope, self.gate, self.up, self.extra, self.d_z, sections=sections, tile=tile,
            )  # fmt: skip
        self_target = plan.objective == "self" and sections.keys
        tile = self.tile("token_adjoint", C, D, H)
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
            tile = self.triangle_adjoint
            self.run(
                delta_rule.retention_adjoint_kernel, cdiv(self.chunk, tile.rows),
                self.places, self.sizes, chunk, self.d_between, self.before, self.after, self.scalars[0],
                self.before_partials, self.after_partials, g.retention,
                tiles=sum(self.tile_counts), count=self.before_sums, groups=self.sums, tile=tile,
            )  # fmt: skip
