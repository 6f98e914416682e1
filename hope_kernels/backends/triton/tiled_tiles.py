"""How the work of a tiled kernel is cut into tiles, one a program: sizes from the table, made to fit the matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from triton import next_power_of_2

from hope_kernels.backends.triton.configurations import Configuration, Device, ShapeClass, choose

GROUP = 8
LEAST = 32  # rows, columns or terms: a block that divides a size is not made smaller than this


@dataclass(frozen=True)
class Tile:
    """A program makes ``rows x columns`` of a product, ``inner`` terms at a time."""

    rows: int
    columns: int
    inner: int
    group: int  # row blocks that go through all column blocks together: they find their operands in the L2 cache
    warps: int
    stages: int | None
    even: bool  # C, D and H are multiples of rows, columns and inner: products need no masks

    @property
    def options(self) -> dict[str, int]:
        """Keywords of a launch."""
        return {"num_warps": self.warps} | ({} if self.stages is None else {"num_stages": self.stages})


def fit(block: int, *sizes: int) -> int:
    """The largest block, of at most ``block``, that divides the sizes; if it were smaller than :data:`LEAST`, a larger
    one that does not divide them."""
    for smaller in (block >> i for i in range(block.bit_length())):
        if smaller >= min(LEAST, block) and all(size % smaller == 0 for size in sizes):
            return smaller
    return min(block, max(16, next_power_of_2(max(sizes))))


def product_tile(
    kernel: str, shape: ShapeClass, device: Device, rows: int, columns: int, terms: tuple[int, ...]
) -> Tile:
    """The tile of a product ``[rows, columns]`` summed over ``terms``, by a kernel of the table. It depends on sizes of
    the memory only, never on how much there is to do: results are the same whatever the batch."""
    tile = _cut(configuration_of(kernel, shape, device), rows, columns, terms)
    return tile if tile.even else _cut(configuration_of("tiled_odd", shape, device), rows, columns, terms)


def _cut(full: Configuration, rows: int, columns: int, terms: tuple[int, ...]) -> Tile:
    block_rows, block_columns = fit(full["rows"], rows), fit(full["columns"], columns)
    inner = fit(full["inner"], *terms)
    smaller = block_rows * block_columns < full["rows"] * full["columns"]
    return Tile(
        rows=block_rows,
        columns=block_columns,
        inner=inner,
        group=GROUP,
        warps=min(4, full.num_warps) if smaller else full.num_warps,
        stages=full.num_stages,
        even=rows % block_rows == 0 and columns % block_columns == 0 and all(n % inner == 0 for n in terms),
    )


def pass_tile(shape: ShapeClass, device: Device, rows: int, columns: int) -> Tile:
    """The tile of a kernel that goes through ``[rows, columns]`` without a product."""
    full = configuration_of("tiled_pass", shape, device)
    sizes = {name: min(full[name], max(16, next_power_of_2(n))) for name, n in (("rows", rows), ("columns", columns))}
    return Tile(**sizes, inner=16, group=GROUP, warps=full.num_warps, stages=full.num_stages, even=False)


def triangle_tiles(shape: ShapeClass, device: Device, chunk: int, widths: tuple[int, ...]) -> tuple[Tile, Tile]:
    """The square blocks that a triangular system ``[C, C]`` is cut into: for its products, and for the passes of its
    adjoint. ``widths``: of the layers' inputs."""
    full = configuration_of("tiled_triangle", shape, device)
    side, inner = min(full["rows"], max(16, next_power_of_2(chunk))), fit(full["inner"], *widths)
    even = chunk % side == 0 and all(n % inner == 0 for n in widths)
    tile = Tile(side, side, inner, GROUP, full.num_warps, full.num_stages, even)
    adjoint = configuration_of("tiled_triangle_adjoint", shape, device)
    return tile, replace(tile, warps=adjoint.num_warps, stages=adjoint.num_stages)


def configuration_of(kernel: str, shape: ShapeClass, device: Device) -> Configuration:
    """Of the table, which has one for every device."""
    found = choose(kernel, shape, device)
    if found is None:
        raise RuntimeError(f"the table of configurations has no {kernel} for {shape} on {device.name}")
    return found
