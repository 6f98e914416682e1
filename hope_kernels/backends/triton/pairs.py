"""Launches of the products with written pairs: two forward, four backward, however many chunks wrote the pairs.

``results_n = (a . (u K^T)) V_n`` with ``u [B, T, N, in]``, ``K [B, N, S, in]``, ``V_n [B, N, S, out]`` and ``a [B, N,
S]``. Tokens and pairs may have any strides; what is not contiguous in its last dimension is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from triton import cdiv, next_power_of_2

from hope_kernels.backends.tables import padded
from hope_kernels.backends.triton import configurations, launch
from hope_kernels.backends.triton.configurations import Configuration, ShapeClass
from hope_kernels.backends.triton.operands import MatrixView
from hope_kernels.backends.triton.pair_kernels import PAD, PairPlan, scores_adjoint_kernel, scores_kernel, sums_kernel
from hope_kernels.backends.triton.tiled_chunk import turned
from hope_kernels.backends.triton.tiled_tiles import GROUP, Tile, configuration_of, fit

if TYPE_CHECKING:
    from torch import Tensor


class PairGradients(NamedTuple):
    """Of ``u``, the weights, keys and each list of values, in their dtypes; None where not wanted."""

    u: Tensor | None
    weights: Tensor | None
    keys: Tensor | None
    values: list[Tensor | None]


def products(
    u: Tensor, keys: Tensor, values: Sequence[Tensor], weights: Tensor, operand: torch.dtype
) -> tuple[Tensor, ...]:
    """The results, ``[B, T, N, out]`` in float32, operands rounded to ``operand``; all values of one width."""
    call = _Call(u, keys, values, weights, operand)
    results = tuple(u.new_empty((*u.shape[:3], call.outer), dtype=torch.float32) for _ in values)
    if call.nothing:
        return tuple(x.zero_() for x in results)
    scores = call.scratch()
    tile = call.tile("pairs_scores", call.tokens, None, call.inner)
    scores_kernel[(call.programs(tile, call.tokens, call.pairs),)](
        call.u, turned(call.keys), call.weights, scores, *call.sizes,
        features=call.inner, plan=call.plan, tile=tile, **tile.options,
    )  # fmt: skip
    call.sum_over_pairs(scores, call.values, results, call.outer)
    return results


def gradients(
    u: Tensor,
    keys: Tensor,
    values: Sequence[Tensor],
    weights: Tensor,
    operand: torch.dtype,
    upstream: Sequence[Tensor],
    wanted: Sequence[bool],
) -> PairGradients:
    """Those of :func:`products`, from the results' ``upstream``; ``wanted``: of u, weights, keys and each of values."""
    for_u, for_weights, for_keys, *for_values = wanted
    call = _Call(u, keys, values, weights, operand)

    def like(x: Tensor, is_wanted: bool) -> Tensor | None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if is_wanted else None

    d_u, d_keys = like(u, for_u), like(keys, for_keys)
    d_values = [like(x, want) for x, want in zip(values, for_values, strict=True)]
    if call.nothing:
        found = PairGradients(d_u, like(weights, for_weights), d_keys, d_values)
        for x in (found.u, found.weights, found.keys, *found.values):
            if x is not None:
                x.zero_()
        return found
    tile = call.tile("pairs_adjoint", call.tokens, None, call.inner, call.outer)
    row_blocks = cdiv(call.tokens, tile.rows)
    partials = u.new_empty((*weights.shape[:2], row_blocks, call.pairs), dtype=torch.float32) if for_weights else None
    scores = call.scratch() if any(for_values) else None
    d_products = call.scratch() if for_u or for_keys else None
    arrived = tuple(map(_view_of_tokens, upstream))
    scores_adjoint_kernel[(call.programs(tile, call.tokens, call.pairs),)](
        call.u, turned(call.keys), arrived, tuple(map(turned, call.values)), call.weights, scores, d_products, partials,
        *call.sizes, features=call.inner, outer=call.outer, plan=call.plan, tile=tile, **tile.options,
    )  # fmt: skip
    if d_u is not None:
        call.sum_over_pairs(d_products, (call.keys,), (d_u,), call.inner)
    if d_keys is not None:
        call.sum_over_tokens(d_products, (call.u,), (d_keys,), call.inner)
    chosen = [i for i, want in enumerate(for_values) if want]
    if chosen:
        call.sum_over_tokens(scores, [arrived[i] for i in chosen], [d_values[i] for i in chosen], call.outer)
    d_weights = partials
    if partials is not None:
        d_weights = partials[:, :, 0] if row_blocks == 1 else partials.sum(2)
    return PairGradients(d_u, d_weights, d_keys, d_values)


class _Call:
    """Sizes and views of a call, its scratch, and the launches that several have in common."""

    def __init__(
        self, u: Tensor, keys: Tensor, values: Sequence[Tensor], weights: Tensor, operand: torch.dtype
    ) -> None:
        shapes = {tuple(x.shape) for x in values}
        if len(shapes) != 1:
            raise ValueError(f"values: got shapes {sorted(shapes)}; want lists of one shape")
        self.batch, self.tokens, self.heads, self.inner = u.shape
        self.pairs, self.outer = keys.shape[2], values[0].shape[3]
        self.nothing = u.numel() == 0 or self.pairs == 0 or self.outer == 0
        self.operand, self.device = operand, u.device
        self.padded = tuple(cdiv(n, PAD) * PAD for n in (self.tokens, self.pairs))
        self.sizes = (self.tokens, self.pairs, *self.padded)
        precision = launch.precision_of(u) if operand == torch.float32 else "ieee"
        self.plan = PairPlan(self.heads, launch.OPERANDS[operand], precision)
        self.u, self.keys = _view_of_tokens(u), _view(keys)
        self.values = tuple(map(_view, values))
        self.weights = weights.contiguous()
        form, bits = "glu" if len(values) > 1 else "mlp", torch.finfo(operand).bits
        self.shape = ShapeClass(form, "gd", bits, padded(self.tokens), padded(min(self.inner, self.outer)))

    def scratch(self) -> MatrixView:
        shape = (self.batch, self.heads, *self.padded)
        return _view(torch.empty(shape, dtype=self.operand, device=self.device))

    def programs(self, tile: Tile, rows: int, columns: int) -> int:
        return self.batch * self.heads * cdiv(rows, tile.rows) * cdiv(columns, tile.columns)

    def tile(self, kernel: str, rows: int | None, columns: int | None, *terms: int) -> Tile:
        """The table's tile made to fit what does not change from call to call; that for odd sizes where none fits.

        ``rows``: tokens, ``columns`` and ``terms``: features of a product; None (and no terms) for pairs: the table's.
        Never of the batch, so that results do not depend on it.
        """
        on = configurations.device_of(self.weights)
        tile = self._cut(configuration_of(kernel, self.shape, on), rows, columns, terms)
        if tile.even and (columns is None or columns % tile.columns == 0):
            return tile
        return self._cut(configuration_of("pairs_odd", self.shape, on), rows, columns, terms)

    @staticmethod
    def _cut(full: Configuration, rows: int | None, columns: int | None, terms: tuple[int, ...]) -> Tile:
        block_rows = full["rows"] if rows is None else min(full["rows"], max(16, next_power_of_2(rows)))
        block_columns = full["columns"] if columns is None else fit(full["columns"], columns)
        inner = fit(full["inner"], *terms) if terms else full["inner"]
        smaller = block_rows * block_columns < full["rows"] * full["columns"]
        return Tile(
            rows=block_rows,
            columns=block_columns,
            inner=inner,
            group=GROUP,
            warps=min(4, full.num_warps) if smaller else full.num_warps,
            stages=full.num_stages,
            even=all(n % inner == 0 for n in terms),
        )

    def sum_over_pairs(
        self, scores: MatrixView, values: Sequence[MatrixView], results: Sequence[Tensor], features: int
    ) -> None:
        """``results = scores V``, ``[B, T, N, features]``."""
        tile = self.tile("pairs_sums", self.tokens, features)
        views = tuple(map(_view_of_tokens, results))
        self._sum(scores, values, views, self.sizes, features, tile)

    def sum_over_tokens(
        self, scores: MatrixView, values: Sequence[MatrixView], results: Sequence[Tensor], features: int
    ) -> None:
        """``results = scores^T X``, ``[B, N, S, features]``."""
        tile = self.tile("pairs_sums", None, features)
        tokens, pairs, padded_tokens, padded_pairs = self.sizes
        sizes = (pairs, tokens, padded_pairs, padded_tokens)
        self._sum(turned(scores), values, tuple(map(_view, results)), sizes, features, tile)

    def _sum(
        self,
        scores: MatrixView,
        values: Sequence[MatrixView],
        views: tuple[MatrixView, ...],
        sizes: tuple[int, ...],
        features: int,
        tile: Tile,
    ) -> None:
        sums_kernel[(self.programs(tile, sizes[0], features),)](
            scores, tuple(values), views, *sizes, features=features, plan=self.plan, tile=tile, **tile.options
        )


def _view(x: Tensor) -> MatrixView:
    """Of ``[B, N, rows, columns]``, contiguous in the last dimension or copied."""
    x = launch.readable(x)
    return MatrixView(x, *x.stride())


def _view_of_tokens(x: Tensor) -> MatrixView:
    """Of ``[B, T, N, .]`` as ``[B, N, T, .]``."""
    return _view(launch.readable(x).transpose(1, 2))
