"""Registers, stack, spills and fixed shared memory of the CUDA kernels; needs nvcc, no GPU.

``python benchmarks/cuda_resources.py`` compiles every source of ``csrc/cuda`` alone for sm_80 and sm_90, and to PTX,
prints one line per kernel, writes ``benchmarks/results/cuda-resources.json`` and a Markdown table beside it, and exits
with 1 if a kernel must not be shipped: one that spills or does not compile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

RESULTS = ROOT / "benchmarks" / "results" / "cuda-resources.json"
COLUMNS = ("source", "kernel", "target", "registers", "stack B", "spilled B", "fixed shared B", "")


def main() -> int:
    options = _parse()
    from hope_kernels.bench import cuda_resources, resource_tables
    from hope_kernels.bench.machine import stamp

    if cuda_resources.nvcc() is None:
        print("nvcc is needed to compile the CUDA kernels, and was not found", file=sys.stderr)
        return 2
    csrc = ROOT / "csrc"
    sources = options.source or sorted((csrc / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:

        def examine(source: Path) -> cuda_resources.Compiled | str:
            try:
                return cuda_resources.compile_source(source, Path(folder), csrc)
            except cuda_resources.DoesNotCompileError as error:
                return str(error)

        found = list(pool.map(examine, sources))
    broken = [each for each in found if isinstance(each, str)]
    compiled = [each for each in found if not isinstance(each, str)]
    kernels = [kernel for each in compiled for kernel in each.kernels]
    failed = [kernel for kernel in kernels if kernel.failures]
    title = f"nvcc {cuda_resources.nvcc_version()}: {len(kernels)} kernels of {len(sources)} sources"
    lines = [_cells(kernel) for kernel in kernels]
    resource_tables.show(title, COLUMNS, lines)
    print(f"{len(kernels) - len(failed)} clean, {len(failed)} failed, {len(broken)} sources did not compile")
    print("\n".join([*(f"failed: {k.name} on sm_{k.architecture}: {'; '.join(k.failures)}" for k in failed), *broken]))
    report = stamp("cuda-resources", ["python", *sys.argv])
    report["versions"] |= {"nvcc": cuda_resources.nvcc_version()}
    report |= {"passed": not failed and not broken, "broken": broken, "rows": [kernel.as_dict() for kernel in kernels]}
    resource_tables.write(options.json, report, _markdown(report, lines))
    return 1 if failed or broken else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", nargs="+", type=Path, help="only these; all of csrc/cuda by default")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the report; by default in benchmarks/results")
    return parser.parse_args()


def _cells(kernel) -> list[str]:
    spilled = kernel.spill_store_bytes + kernel.spill_load_bytes
    numbers = (kernel.registers, kernel.stack_bytes, spilled, kernel.shared_bytes)
    verdict = "FAILS" if kernel.failures else "clean"
    return [kernel.source, kernel.name, f"sm_{kernel.architecture}", *map(str, numbers), verdict]


def _markdown(report: dict, lines: list[list[str]]) -> list[str]:
    from hope_kernels.bench.resource_tables import markdown_table

    return [
        "# Resources of the CUDA kernels",
        "",
        f"nvcc {report['versions']['nvcc']}, {report['date']}, `{report['command']}`. What the compiler reports, per "
        "thread; nothing here was timed. A kernel passes with no stack and no spills. Each source is compiled as the "
        "core is built, PTX included. Scans take more shared memory when they are launched: it grows with the chunk "
        "(`docs/cuda_scan.md`).",
        "",
        *markdown_table(COLUMNS, lines),
        *(
            ["", "## Does not compile", "", *(f"* {each.splitlines()[0]}" for each in report["broken"])]
            if report["broken"]
            else []
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
