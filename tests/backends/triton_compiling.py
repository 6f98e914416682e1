"""What the tests of compiled kernels run in a process of their own, without TRITON_INTERPRET: prints one JSON object.

``python -m tests.backends.triton_compiling FUNCTION [ARGUMENT ...]``
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from hope_kernels.backends.triton.compile_only import ARCHITECTURES, compile_only
from hope_kernels.backends.triton.resources import read_resources


@triton.jit
def sum_of_squares(x, out, repeats, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Holds a tile ``[ROWS, COLUMNS]`` and its square across a loop."""
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tile = tl.load(x + offsets)
    square = tl.dot(tile, tl.trans(tile))
    for i in range(repeats):
        tile += tl.load(x + i * ROWS * COLUMNS + offsets)
        square += tl.dot(tile, tl.trans(tile))
    tl.store(out + tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :], square)


def squares(architecture: str, rows: int, warps: int) -> dict:
    """The kernel above at a tile of ``[rows, 64]``: resources, and why it would not be shipped."""
    target = ARCHITECTURES[architecture]
    x = torch.empty(1 << 16, device="meta", dtype=torch.float16)
    out = torch.empty(1 << 16, device="meta")
    with compile_only(target) as launches:
        sum_of_squares[(3,)](x, out, 5, rows, 64, num_warps=warps)
    (launch,) = launches
    resources = read_resources(launch.compiled, target)
    return {
        "kernel": launch.kernel,
        "grid": launch.grid,
        "options": launch.options,
        "resources": asdict(resources),
        "clean": resources.clean,
        "failures": resources.failures(target, tensor_core=True),
    }


def shipped(architecture: str, *wanted: str) -> dict:
    """The rows of shipped configurations whose ``kernel form rule bits chunk width scan`` are among ``wanted``."""
    from hope_kernels.bench.kernel_resources import examine, shipped_subjects

    subjects = {
        " ".join(map(str, (subject.kernel, *subject.shape, subject.variant))): subject
        for subject in shipped_subjects([architecture])
    }
    return {name: [row.as_dict() for row in examine(subjects[name])] for name in wanted}


def variants(plan: str) -> dict:
    """By kernel, how often it is compiled for five sequences, tokens and pending tokens, and for five, 1 and 16."""
    from importlib import import_module

    from hope_kernels.backends.triton.compile_only import meta_problem
    from hope_kernels.memory.spec import MemorySpec

    engine = import_module(f"hope_kernels.backends.triton.{plan}")
    fixed = {"heads": 1, "dim": 16, "hidden": 16, "chunk_size": 1, "dtype": torch.float16}
    counts: dict[str, list[int]] = {}
    for numbers in ((5,), (5, 1, 16)):
        with compile_only(ARCHITECTURES["sm_90"]) as launches:
            for n in numbers:
                problem = meta_problem(MemorySpec(), batch=n, tokens=n, pending=n, **fixed)
                _, _, _, saved = engine.scan_forward(problem, save=True)
                engine.scan_backward(problem, saved, problem.q, [None, None], [])
        for kernel in {launch.kernel for launch in launches}:
            hashes = {launch.compiled.hash for launch in launches if launch.kernel == kernel}
            counts.setdefault(kernel, []).append(len(hashes))
    return counts


def interpreted() -> dict:
    """The message when kernels were defined for the interpreter."""
    try:
        squares("sm_90", 16, 4)
    except RuntimeError as error:
        return {"message": str(error)}
    return {"message": ""}


if __name__ == "__main__":
    function, *arguments = sys.argv[1:]
    values = [int(text) if text.isdigit() else text for text in arguments]
    print(json.dumps(globals()[function](*values)))
