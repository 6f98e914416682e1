"""Where the time of a Hope block goes on a CPU, and what a fused scan of its projection memories could save.

``python benchmarks/hope_block.py`` times a block and its parts on one thread, side by side; ``--publish`` puts the
report into ``benchmarks/results/hope-block.json`` and the table into ``docs/titans.md``. Only a quiet machine gives
numbers worth keeping.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

from benchmarks.learning.report import put  # noqa: E402
from hope_kernels.bench.machine import stamp  # noqa: E402
from hope_kernels.bench.timing import thread_count, time_side_by_side  # noqa: E402
from hope_kernels.memory import MemoryState, memory_scan  # noqa: E402
from hope_kernels.models import HopeBlock, HopeConfig  # noqa: E402

REPORT = ROOT / "benchmarks" / "results" / "hope-block.json"
DOCUMENT = ROOT / "docs" / "titans.md"
# The last one is no part: the same reads and writes as "projections" by one call, which the keys would have to be
# known for beforehand. A fused scan of the coupled memories cannot take less.
PARTS = ("block", "CMS", "self-modifying Titans", "main memory", "projections", "projections in one scan")


def parts(dim: int, heads: int, batch: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """A call for each of :data:`PARTS` on fresh sequences ``[batch, tokens, dim]``, whose sum can be differentiated.

    Raises:
        AssertionError: the scan reads other keys off the projection memories than the layer does.
    """
    torch.manual_seed(0)
    block = HopeBlock(HopeConfig(dim=dim, depth=1, heads=heads))
    layer, x = block.mixer, torch.randn(batch, tokens, dim, requires_grad=True)
    count = len(layer.adaptive)

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_()

    with torch.no_grad():
        normed = block.mixer_norm(x)
        tokens_in, mixed = (layer._per_head(y) for y in (normed, layer.conv(normed, layer.conv.initial_tail(batch))[0]))
    tokens_in, mixed = leaf(tokens_in), leaf(mixed)

    def projections() -> Any:
        return layer.projections(tokens_in, mixed, {}, layer.projections.initial_state(batch), None)[0]

    found = projections()
    inputs = leaf(torch.cat([mixed, mixed, tokens_in, tokens_in], 2))
    main, all_of_them = ([leaf(torch.cat([value] * n, 2)) for value in found[:4]] for n in (1, count))

    def scan(queries: Tensor, given: list[Tensor], state: MemoryState) -> Tensor:
        k, v, lr, retention = given
        options = {"spec": layer.spec, "chunk_size": state.chunk_size, "retention": retention}
        return memory_scan(queries, k, v, lr, state, **options).output

    def in_one_scan() -> Tensor:
        return scan(inputs, all_of_them, layer.projections.initial_state(batch))

    read = in_one_scan()[:, :, :heads]
    torch.testing.assert_close(read / read.norm(dim=-1, keepdim=True), found.k, rtol=1e-3, atol=1e-4)
    calls = (
        lambda: block(x).sum(),
        lambda: block.cms(block.cms_norm(x)).sum(),
        lambda: layer(block.mixer_norm(x)).sum(),
        lambda: scan(main[0], main, layer.init_state(batch).memory).sum(),
        lambda: sum(value.sum() for value in projections()[:4]),
        lambda: in_one_scan().sum(),
    )
    return dict(zip(PARTS, calls, strict=True))


def measure(dim: int, heads: int, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of each part, forward without gradients and forward with backward: median and spread of ``repeats``."""
    found: dict[str, Any] = {"dim": dim, "heads": heads, "batch": batch, "tokens": tokens}
    calls = parts(dim, heads, batch, tokens)
    modes = {
        "forward": {name: torch.no_grad()(call) for name, call in calls.items()},
        "forward and backward": {name: (lambda call=call: call().backward()) for name, call in calls.items()},
    }
    with thread_count(1):
        for mode, functions in modes.items():
            timings = time_side_by_side(functions, repeats=repeats)
            found[mode] = {name: {"median": t.median, "spread": t.spread} for name, t in timings.items()}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds, and the share of the block's."""
    lines = [f"| | {' | '.join(PARTS)} |", f"|{'---|' * (len(PARTS) + 1)}"]
    for row in rows:
        for mode in ("forward", "forward and backward"):
            seconds = [row[mode][name]["median"] for name in PARTS]
            cells = [f"{1e3 * s:.0f} ms" + (f", {s / seconds[0]:.0%}" if i else "") for i, s in enumerate(seconds)]
            lines.append(f"| {row['batch']} x {row['tokens']} tokens, {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    batches: Annotated[list[int] | None, typer.Option("--batch", help="Sequences; without, 1 and 4.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of each sequence.")] = 1024,
    dim: Annotated[int, typer.Option(min=1)] = HopeConfig.dim,
    heads: Annotated[int, typer.Option(min=1)] = HopeConfig.heads,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, behind one that is not.")] = 5,
    publish: Annotated[bool, typer.Option(help="Write the report and the document's table.")] = False,
) -> None:
    """Time a block with the configuration's defaults, and its parts."""
    rows = [measure(dim, heads, batch, tokens, repeats) for batch in batches or (1, 4)]
    print(table(rows))
    if publish:
        REPORT.write_text(json.dumps(stamp("hope block") | {"rows": rows}, indent=1) + "\n")
        put(DOCUMENT, "hope-block", table(rows))


if __name__ == "__main__":
    typer.run(main)
