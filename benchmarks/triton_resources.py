"""Registers, stack, shared memory and spills of every shipped configuration of the Triton kernels; needs no GPU.

``python benchmarks/triton_resources.py`` brings ``benchmarks/results/triton-resources-3.9.json`` (named for the Triton
at hand) up to date with the table (``hope_kernels/backends/triton/configurations.json``), with a Markdown table beside
it, for sm_80, sm_90, sm_100 and gfx942: what the report holds of exactly these kernels is kept, the rest is compiled
(``--all``: everything), what is no longer shipped goes. It exits with 1 if a configuration must not be shipped.

``--check`` is for continuous integration: it compiles what the report does not hold, and a small sample of what it
holds to compare, and writes nothing.

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
SAMPLE = 24  # subjects that a check compiles again
MOST_UNREPORTED = 60  # subjects that a check compiles because the report lacks them: more are for whoever changed them
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
    from hope_kernels.bench import kernel_resources

    architectures = options.arch or list(ARCHITECTURES)
    if options.sweep:
        return _sweep(list(_swept(options, architectures)), options)
    every = kernel_resources.shipped_subjects(list(ARCHITECTURES), every_class=options.every_class)
    chosen = [
        subject
        for subject in every
        if subject.architecture in architectures and (options.kernel is None or subject.kernel in options.kernel)
    ]
    if not chosen:
        print("No shipped configuration matches: nothing to do.", file=sys.stderr)
        return 2
    if options.report is None:
        options.report = RESULTS / f"triton-resources-{'.'.join(triton.__version__.split('.')[:2])}.json"
    return _check(chosen, options) if options.check else _update(every, chosen, options)


def _sweep(subjects: list, options: argparse.Namespace) -> int:
    _show(_compile(subjects, options))
    return 0


def _check(chosen: list, options: argparse.Namespace) -> int:
    """Compiles what the report lacks of the chosen subjects and a sample of what it holds; writes if it is told where
    to."""
    from hope_kernels.bench import resource_report

    kept = resource_report.reported(chosen, resource_report.load(options.report))
    known = resource_report.known_lacking(options.report)
    unknown = [subject for subject in chosen if subject not in kept and subject.name in known]
    lacking = [subject for subject in chosen if subject not in kept and subject.name not in known]
    print(f"{options.report.name} holds {len(kept)} of {len(chosen)} configurations and targets.")
    if unknown:
        print(f"It says that it lacks {len(unknown)}: those are NOT checked.")
    if len(lacking) > MOST_UNREPORTED:
        print(
            f"It lacks {len(lacking)}, more than the {MOST_UNREPORTED} a check compiles: run make triton-resources "
            "(with the oldest Triton make triton-resources-oldest) and commit the report.",
            file=sys.stderr,
        )
        return 1
    sampled = resource_report.sample(kept, SAMPLE)
    compiled = _compile(lacking + sampled, options)
    _show(compiled)
    rows = [row for subject in chosen for row in kept.get(subject) or compiled.get(subject, [])]
    failed = [row for row in rows + [row for subject in sampled for row in compiled[subject]] if row.failures]
    differing = {
        subject: different
        for subject in sampled
        if (different := resource_report.differences(kept[subject], compiled[subject]))
    }
    print(f"{len(lacking)} compiled that it lacks, {len(sampled)} compiled to compare: {len(differing)} differ")
    for subject, different in differing.items():
        print(f"not as reported: {subject.name}: {'; '.join(different)}")
    if options.json:
        _write(options.json, rows, unknown)
    return 1 if failed or differing else 0


def _update(every: list, chosen: list, options: argparse.Namespace) -> int:
    """Writes the report of every subject that it holds or that is among the chosen, which are compiled if need be."""
    from hope_kernels.bench import resource_report

    again = set(chosen) if options.all else set()
    held = resource_report.load(options.report)
    kept = resource_report.reported([subject for subject in every if subject not in again], held)
    lacking = [subject for subject in chosen if subject not in kept]
    print(f"{len(kept)} of {len(every)} configurations and targets stay as reported, {len(lacking)} are compiled.")
    rows = kept | _compile(lacking, options)
    _show({subject: rows[subject] for subject in every if subject in rows})
    unknown = [subject for subject in every if subject not in rows]
    _write(options.json or options.report, [row for subject in every for row in rows.get(subject, ())], unknown)
    if unknown:
        print(f"{len(unknown)} configurations and targets are not in the report, which says so.")
    return 1 if any(row.failures for found in rows.values() for row in found) else 0


def _compile(subjects: list, options: argparse.Namespace) -> dict:
    """The rows of each, compiled."""
    from hope_kernels.bench import kernel_resources

    rows = {}
    for subject, found in zip(subjects, kernel_resources.examine_all(subjects, jobs=options.jobs), strict=True):
        rows[subject] = found
        if sys.stderr.isatty():
            print(f"\r{len(rows)}/{len(subjects)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    return rows


def _show(rows_of: dict) -> None:
    import triton

    from hope_kernels.bench import resource_tables

    rows = [row for found in rows_of.values() for row in found]
    title = f"Triton {triton.__version__}: {len(rows)} kernels of {len(rows_of)} configurations and targets"
    resource_tables.show(title, COLUMNS, [_cells(row) for row in rows])
    print(_summary(rows))
    for row in rows:
        if row.failures:
            print(f"failed: {row.subject.name}: {'; '.join(row.failures)}")


def _summary(rows: list) -> str:
    tolerated = sum(row.tolerated for row in rows)
    failed = sum(bool(row.failures) for row in rows)
    return f"{len(rows) - tolerated - failed} clean, {tolerated} tolerated, {failed} failed."


def _write(target: Path, rows: list, lacking: list) -> None:
    """``lacking``: subjects that are shipped and not among the rows."""
    import triton

    from hope_kernels.bench import resource_tables
    from hope_kernels.bench.machine import stamp

    report = stamp("triton-resources", ["python", *sys.argv])
    report["versions"] |= {"triton": triton.__version__}
    report |= {
        "passed": not any(row.failures for row in rows),
        "lacking": [subject.name for subject in lacking],
        "rows": [row.as_dict() for row in rows],
    }
    resource_tables.write(target, report, _markdown(report, rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", help="only for sm_80, sm_90, sm_100, gfx942")
    parser.add_argument("--kernel", nargs="+", help="only these kernels of the table")
    parser.add_argument("--all", action="store_true", help="compile what the report holds, too")
    parser.add_argument("--check", action="store_true", help="compile what the report lacks and a sample of the rest")
    parser.add_argument("--every-class", action="store_true", help="smaller chunks and widths too; wants --json")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument(
        "--report", type=Path, help="what is known; by default that in benchmarks/results of the Triton at hand"
    )
    parser.add_argument(
        "--json", type=Path, help="where to write, by default the report; without it a check writes none"
    )
    parser.add_argument("--sweep", metavar="KERNEL", help="compare candidates instead")
    parser.add_argument("--shape", nargs="+", default=["mlp/gd/16/64/64"], help="form/rule/bits/chunk/width")
    parser.add_argument("--candidate", nargs="+", default=["block_hidden=32,num_warps=4"], help="name=value,..")
    parser.add_argument("--scan", nargs="+", default=["full"], help="plain, full or both")
    options = parser.parse_args()
    if options.every_class and options.json is None:
        parser.error("--every-class wants --json: the report has the largest chunk and width of each entry alone")
    if options.check and options.all:
        parser.error("--check compares with what the report holds, --all does without")
    return options


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


def _markdown(report: dict, rows: list) -> list[str]:
    from hope_kernels.bench.resource_tables import markdown_table

    tolerated, failed = [row for row in rows if row.tolerated], [row for row in rows if row.failures]
    lines = [
        "# Resources of the shipped Triton configurations",
        "",
        f"Triton {report['versions']['triton']}, brought up to date {report['date']} by `{report['command']}`: rows of "
        "kernels that had not changed stay as they were read before. Read from binaries; nothing here was timed. "
        "`plain`: objective l2; `full`: objective self and momentum; both with retention and pending tokens; of "
        "products with pairs, `plain` is one token, `full` a chunk and its gradients. Each entry is compiled at the "
        "largest chunk and width it holds for, hidden width 4 D. MMA: tensor-core instructions (float32 products are "
        "IEEE and use none).",
        "",
        "A configuration passes with stack 0 and no access to local memory, or, listed by name below, with at most 64 "
        "B of stack of which no innermost loop touches any; within the shared memory of the architecture; with "
        "tensor-core instructions where the tokens have 16 bits.",
        "",
        _summary(rows),
        "",
        *markdown_table(COLUMNS, [_cells(row) for row in rows]),
    ]
    for title, some in (("Tolerated", tolerated), ("Failed", failed)):
        if some:
            lines += ["", f"## {title}", "", *(f"* {row.subject.name}: {_reason(row)}" for row in some)]
    if report["lacking"]:
        lines += [
            "",
            "## Not in this report",
            "",
            "Shipped, and not compiled with this Triton since they last changed:",
            "",
            *(f"* {name}" for name in report["lacking"]),
        ]
    return lines


def _reason(row) -> str:
    if row.failures:
        return "; ".join(row.failures)
    return (
        f"{row.resources.stack_bytes} B of stack, {row.resources.spill_instructions} accesses, none in innermost loops"
    )


if __name__ == "__main__":
    sys.exit(main())
