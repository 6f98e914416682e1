"""The predictions of benchmarks/factored_crossover.py: its counts are those of what runs."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hope_kernels.bench.implementations import Implementation, make_call
from hope_kernels.bench.shapes import MODES, Shape
from hope_kernels.memory.factors import merge_after


def loaded() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "factored_crossover.py"
    specification = importlib.util.spec_from_file_location("factored_crossover", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # its dataclasses look themselves up
    specification.loader.exec_module(module)
    return module


pytest.importorskip("typer")
crossover = loaded()


def counted(shape: Shape, mode: str, backend: str) -> int:
    """Operations of the matrix products of a call."""

    def in_place(total: list[int], a: list[int], b: list[int], **_: Any) -> int:  # torch does not count this one
        return 2 * a[0] * a[1] * a[2] * b[2]

    problem = crossover.problem_of(shape)
    if mode == crossover.SHARED:
        problem, mode = replace(problem, q=problem.k), "forward"
    call = make_call(Implementation(backend), problem, mode)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", [*MODES, crossover.SHARED])
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_counts_of_a_scan_are_what_it_executes(chunks: int, mode: str) -> None:
    shape = Shape("small", "", 2, 8 * chunks, 1, 16, 40, 8)
    assert crossover.factored_flops(shape, mode) == counted(shape, mode, "reference:factored")
    # The reference forms nothing again; the convention has a product per read and three per write for that.
    again = chunks + 3 * (chunks - 1) if mode == "forward+backward" else 0
    if mode == crossover.SHARED:  # it reads with a pass of its own, which the engine spares
        again = -2 * chunks
    product = 2 * shape.dim * shape.hidden * shape.chunk_size * shape.batch
    assert crossover.dense_flops(shape, mode) == counted(shape, mode, "reference") + again * product


def test_bytes_of_a_read_are_those_of_the_states() -> None:
    shape = Shape("small", "", 3, 32, 1, 16, 40, 8)
    problem = crossover.problem_of(shape)
    dense, factored = (crossover.scan(problem, f"reference{plan}")[1] for plan in ("", ":factored"))

    def size(tensors: tuple[torch.Tensor, ...]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    assert crossover.dense_bytes(shape) == size(dense.stored_weights)
    pairs = (*factored.factors.inputs, *factored.factors.errors)
    assert crossover.factored_bytes(shape) == size((*factored.stored_weights, *pairs))


def test_decode_crosses_where_the_plan_merges_for_many_sequences() -> None:
    shape = Shape("small", "", 10**6, 0, 1, 768, 3072, 128)
    limit = merge_after(shape.spec, shape.dim, shape.hidden)
    below, above = (crossover.predicted_ratio(shape.scaled(tokens=limit + n), "decode") for n in (-1, 1))
    assert below > 1 > above
