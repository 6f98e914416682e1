"""What the tests of compiled kernels run in a process of their own, without TRITON_INTERPRET: prints one JSON object.

``python -m tests.backends.triton_compiling FUNCTION [ARGUMENT ...]``
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

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


def report(folder: str) -> dict:
    """Which configurations the report in ``folder`` for the Triton at hand lacks, which of them without saying so or
    saying so wrongly, and how many digests it has that are of none; ``path`` None: there is no report of this very
    version."""
    from hope_kernels.bench import resource_report
    from hope_kernels.bench.kernel_resources import shipped_subjects

    path = Path(folder) / f"triton-resources-{'.'.join(triton.__version__.split('.')[:2])}.json"
    if not path.exists() or json.loads(path.read_text())["versions"]["triton"] != triton.__version__:
        return {"triton": triton.__version__, "path": None}
    held = resource_report.load(path)
    every = shipped_subjects(list(ARCHITECTURES))
    kept = resource_report.reported(every, held)
    rows = [row for found in kept.values() for row in found]
    return {
        "triton": triton.__version__,
        "path": str(path),
        "shipped": len(every),
        "lacking": len(every) - len(kept),
        "undeclared": sorted({s.name for s in every if s not in kept} ^ resource_report.known_lacking(path)),
        "left": len(held.keys() - {row.digest for row in rows}),
        "failures": [row.as_dict() for row in rows if row.failures],
    }


def digests(architectures: str, *files: str) -> dict:
    """By file, the digests of what ``launch(x)`` of that module would compile for each of the architectures, which a
    comma separates; all files go by one module name."""
    found = {}
    for file in files:
        spec = importlib.util.spec_from_file_location("kernels_of_a_test", file)
        assert spec is not None and spec.loader is not None
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for architecture in architectures.split(","):
            with compile_only(ARCHITECTURES[architecture], describe=True) as launches:
                module.launch(torch.empty(64, device="meta"))
            (launch,) = launches
            assert launch.compiled is None
            found.setdefault(Path(file).stem, []).append(launch.digest)
    return found


def variants(plan: str) -> dict:
    """By kernel, how often it is compiled for five sequences, tokens and pending tokens (or pairs), and for five, 1 and
    16."""
    from importlib import import_module

    from hope_kernels.backends.triton.compile_only import meta_problem
    from hope_kernels.memory.spec import MemorySpec

    engine = import_module(f"hope_kernels.backends.triton.{plan}")

    def run(n: int) -> None:
        if plan == "pairs":
            u, keys = torch.empty(n, n, 2, 16, device="meta"), torch.empty(n, 2, n, 16, device="meta")
            given = (u.half(), keys.half(), [keys], torch.empty(n, 2, n, device="meta"), torch.float16)
            engine.gradients(*given, engine.products(*given), [True] * 4)
            return
        problem = meta_problem(MemorySpec(), batch=n, tokens=n, pending=n, **fixed)
        _, _, _, saved = engine.scan_forward(problem, save=True)
        engine.scan_backward(problem, saved, problem.q, [None, None], [])

    fixed = {"heads": 1, "dim": 16, "hidden": 16, "chunk_size": 1, "dtype": torch.float16}
    counts: dict[str, list[int]] = {}
    for numbers in ((5,), (5, 1, 16)):
        with compile_only(ARCHITECTURES["sm_90"]) as launches:
            for n in numbers:
                run(n)
        for kernel in {launch.kernel for launch in launches}:
            hashes = {launch.compiled.hash for launch in launches if launch.kernel == kernel}
            counts.setdefault(kernel, []).append(len(hashes))
    return counts


def first_call(architecture: str, kind: str, bits: int, dim: int, *chunk_sizes: int) -> dict:
    """What a first forward and backward of memories ``kind`` (form/rule/objective) of these chunk sizes, run at once,
    compile: CPU seconds of this process and its children, plans, launches; and of kernels of several functions how many
    those are, and accesses to spilled registers in innermost loops."""
    from hope_kernels.backends import triton as engine
    from hope_kernels.backends.triton.plan import choose_plan

    problems = _levels(kind, bits, dim, chunk_sizes)
    before = _cpu_seconds()
    with compile_only(ARCHITECTURES[architecture]) as launches:
        plans = {choose_plan(p, direction).name for p in problems for direction in ("forward", "backward")}
        saved = [result[3] for result in engine.scans_forward(problems, save=True)]
        gradients = [(torch.empty_like(p.v), [None] * len(p.weights), []) for p in problems]
        engine.scans_backward(problems, saved, gradients)
    seconds = _cpu_seconds() - before
    resident = [launch.compiled for launch in launches if launch.compiled.asm["ttgir"].count("tt.func") > 1]
    return {
        "seconds": seconds,
        "plans": sorted(plans),
        "launches": len(launches),
        "functions": [kernel.asm["ttgir"].count("tt.func") for kernel in resident],
        "inner_spills": [
            read_resources(kernel, ARCHITECTURES[architecture]).inner_spill_instructions for kernel in resident
        ],
    }


def joint_kernels(*architectures: str) -> dict:
    """By architecture, the kernel that runs two and the one that runs three memories at once."""
    from hope_kernels.backends import triton as engine

    found: dict[str, list[str]] = {}
    for architecture in architectures:
        for chunk_sizes in ((4, 16), (1, 4, 16)):
            with compile_only(ARCHITECTURES[architecture], describe=True) as launches:
                engine.scans_forward(_levels("mlp/gd/l2", 16, 64, chunk_sizes), save=True)
            found.setdefault(architecture, []).extend(launch.kernel for launch in launches)
    return found


def _levels(kind: str, bits: int, dim: int, chunk_sizes: tuple[int, ...]) -> list:
    from hope_kernels.backends.triton.compile_only import meta_problem
    from hope_kernels.memory.spec import MemorySpec

    form, rule, objective = kind.split("/")
    return [
        meta_problem(
            MemorySpec(form, objective=objective, rule=rule),
            batch=2,
            heads=2,
            tokens=2 * max(chunk_sizes),
            dim=dim,
            hidden=4 * dim,
            chunk_size=chunk_size,
            dtype={16: torch.bfloat16, 32: torch.float32}[bits],
            retention=True,
            momentum=True,
        )
        for chunk_size in chunk_sizes
    ]


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


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
