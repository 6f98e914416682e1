"""Registers, stack, shared memory and spills of every shipped configuration of the Triton kernels; needs no GPU.

``python benchmarks/triton_resources.py`` compiles the table (``hope_kernels/backends/triton/configurations.json``) for
sm_80, sm_90, sm_100 and gfx942, prints one line per kernel, writes ``benchmarks/results/triton-resources-3.9.json``
(named for the Triton at hand) and a Markdown table beside it, and exits with 1 if a configuration must not be shipped.

``--sweep resident_forward --shape mlp/gd/16/64/64 --candidate block_hidden=32,num_warps=4`` looks for one instead: it
prints how candidates fare for a shape class (form/rule/bits/chunk/width), and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("kernel", "class", "scan", "target", "settings", "registers", "stack B", "shared B", "MMA", "barriers", "")


def main() -> int:
    options = _parse()
    if os.environ.get("TRITON_INTERPRET"):
        print("TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it.", file=sys.stderr)
        return 2
    try:
        import triton
    except ImportError as error:
        print(f"Triton is needed to compile its kernels, and does not import: {error}", file=sys.stderr)
        return 2
    from hope_kernels.backends.triton.compile_only import ARCHITECTURES
    from hope_kernels.bench import kernel_resources, resource_tables
    from hope_kernels.bench.machine import stamp

    architectures = options.arch or list(ARCHITECTURES)
    if options.sweep:
        subjects = list(_swept(options, architectures))
    else:
        subjects = kernel_resources.shipped_subjects(
            architectures, kernels=options.kernel, every_class=options.every_class
        )
    if not subjects:
        print("No shipped configuration matches: nothing to check.", file=sys.stderr)
        return 2
    rows = []
    for done, found in enumerate(kernel_resources.examine_all(subjects, jobs=options.jobs), start=1):
        rows += found
        if sys.stderr.isatty():
            print(f"\r{done}/{len(subjects)}", end="" if done < len(subjects) else "\r", file=sys.stderr, flush=True)
    title = f"Triton {triton.__version__}: {len(rows)} kernels of {len(subjects)} configurations and targets"
    resource_tables.show(title, COLUMNS, [_cells(row) for row in rows])
    failed = [row for row in rows if row.failures]
    tolerated = [row for row in rows if row.tolerated]
    summary = [f"{len(rows) - len(failed) - len(tolerated)} clean, {len(tolerated)} tolerated, {len(failed)} failed"]
    summary += [f"failed: {_name(row)}: {'; '.join(row.failures)}" for row in failed]
    print("\n".join(summary))
    if options.sweep:
        return 0
    target = options.json or RESULTS / f"triton-resources-{'.'.join(triton.__version__.split('.')[:2])}.json"
    report = stamp("triton-resources", ["python", *sys.argv])
    report["versions"] |= {"triton": triton.__version__}
    report |= {"passed": not failed, "rows": [row.as_dict() for row in rows]}
    resource_tables.write(target, report, _markdown(report, rows, tolerated, failed))
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", help="sm_80, sm_90, sm_100, gfx942; all by default")
    parser.add_argument("--kernel", nargs="+", help="only these kernels of the table")
    parser.add_argument("--every-class", action="store_true", help="smaller chunks and widths of each entry as well")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--json", type=Path, help="the report; by default in benchmarks/results, by Triton's version")
    parser.add_argument("--sweep", metavar="KERNEL", help="compare candidates instead")
    parser.add_argument("--shape", nargs="+", default=["mlp/gd/16/64/64"], help="form/rule/bits/chunk/width")
    parser.add_argument("--candidate", nargs="+", default=["block_hidden=32,num_warps=4"], help="name=value,..")
    parser.add_argument("--scan", nargs="+", default=["full"], help="plain, full or both")
    return parser.parse_args()


def _swept(options: argparse.Namespace, architectures: Iterable[str]) -> Iterator:
    from hope_kernels.backends.triton.configurations import Configuration, ShapeClass
    from hope_kernels.bench.kernel_resources import Subject

    for text in options.shape:
        form, rule, *numbers = text.split("/")
        shape = ShapeClass(form, rule, *map(int, numbers))
        for candidate in options.candidate:
            pairs = (pair.split("=") for pair in candidate.split(","))
            configuration = Configuration.of(**{name: int(value) for name, value in pairs})
            for variant in options.scan:
                for architecture in architectures:
                    yield Subject(options.sweep, shape, variant, architecture, configuration)


def _name(row) -> str:
    shape = row.subject.shape
    return (
        f"{row.subject.kernel} {shape.form} {shape.rule} {shape.operand_bits}-bit C{shape.block_chunk} "
        f"D{shape.block_dim} {row.subject.variant} on {row.subject.architecture}"
    )


def _cells(row) -> list[str]:
    shape, resources = row.subject.shape, row.resources
    name = f"{shape.form} {shape.rule} {shape.operand_bits}-bit C{shape.block_chunk} D{shape.block_dim}"
    settings = " ".join(f"{key.removeprefix('num_').removeprefix('block_')}={n}" for key, n in row.settings.items())
    cells = [row.function or row.subject.kernel, name, row.subject.variant, row.subject.architecture, settings]
    if resources is None:
        return [*cells, "", "", "", "", "", "does not compile"]
    stack = str(resources.stack_bytes + resources.local_bytes)
    if resources.spill_instructions:
        stack += f" ({resources.inner_spill_instructions} of {resources.spill_instructions} in inner loops)"
    verdict = "FAILS" if row.failures else "tolerated" if row.tolerated else "clean"
    numbers = (resources.registers, stack, resources.shared_bytes, resources.tensor_core, resources.barriers)
    return [*cells, *map(str, numbers), verdict]


def _markdown(report: dict, rows: list, tolerated: list, failed: list) -> list[str]:
    from hope_kernels.bench.resource_tables import markdown_table

    lines = [
        "# Resources of the shipped Triton configurations",
        "",
        f"Triton {report['versions']['triton']}, {report['date']}, `{report['command']}`. Read from binaries; nothing "
        "here was timed. `plain`: objective l2; `full`: objective self and momentum; both with retention and pending "
        "tokens. Each entry is compiled at the largest chunk and width it holds for, with hidden width 4 D. MMA: "
        "tensor-core instructions (float32 products are IEEE and use none).",
        "",
        "A configuration passes with stack 0 and no access to local memory, or, listed by name below, with at most 64 "
        "B of stack of which no innermost loop touches any; within the shared memory of the architecture; with "
        "tensor-core instructions where the tokens have 16 bits.",
        "",
        f"{len(rows) - len(tolerated) - len(failed)} clean, {len(tolerated)} tolerated, {len(failed)} failed.",
        "",
        *markdown_table(COLUMNS, [_cells(row) for row in rows]),
    ]
    for title, some in (("Tolerated", tolerated), ("Failed", failed)):
        if some:
            lines += ["", f"## {title}", "", *(f"* {_name(row)}: {_reason(row)}" for row in some)]
    return lines


def _reason(row) -> str:
    if row.failures:
        return "; ".join(row.failures)
    return (
        f"{row.resources.stack_bytes} B of stack, {row.resources.spill_instructions} accesses, none in innermost loops"
    )


if __name__ == "__main__":
    sys.exit(main())
