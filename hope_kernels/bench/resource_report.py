"""The report of the Triton kernels' resources as a lock file: what it holds need not be compiled again.

A row carries the digest of what was compiled (:mod:`hope_kernels.backends.triton.digest`). As long as the engine would
compile the same, the row holds; nothing is said about the others until they are compiled. A report may be known to be
incomplete, where nobody has compiled all of it with an old Triton: it then names what it lacks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from hope_kernels.backends.triton.compile_only import ARCHITECTURES
from hope_kernels.backends.triton.resources import Resources
from hope_kernels.bench.kernel_resources import Row, Subject, launch_failures, launches_of, settings_of

# What a row that is compiled again must have in common with the reported one.
COMPARED = (
    "registers",
    "stack_bytes",
    "local_bytes",
    "shared_bytes",
    "spill_instructions",
    "inner_spill_instructions",
)


def load(path: Path) -> dict[str, Resources]:
    """By digest what a report holds, without rows that failed; nothing if there is no such file."""
    if not path.exists():
        return {}
    names = [field.name for field in fields(Resources)]
    return {
        row["digest"]: Resources(**{name: row[name] for name in names})
        for row in json.loads(path.read_text())["rows"]
        if row.get("digest") and not row["failures"]
    }


def known_lacking(path: Path) -> set[str]:
    """The names of the subjects that a report says it lacks."""
    return set(json.loads(path.read_text()).get("lacking", ())) if path.exists() else set()


def reported(subjects: Iterable[Subject], held: Mapping[str, Resources]) -> dict[Subject, list[Row]]:
    """The rows of those subjects of which every kernel is held, without compiling any."""
    found = {}
    for subject in subjects:
        launches = launches_of(subject, describe=True)
        if all(launch.digest in held for launch in launches):
            architecture = ARCHITECTURES[subject.architecture]
            found[subject] = [
                Row(
                    subject,
                    launch.kernel,
                    settings_of(launch, subject),
                    held[launch.digest],
                    # That products are on tensor cores was seen when it was compiled.
                    held[launch.digest].failures(architecture, tensor_core=False) + launch_failures(launch, subject),
                    launch.digest,
                )
                for launch in launches
            ]
    return found


def sample(rows: Mapping[Subject, Sequence[Row]], count: int) -> list[Subject]:
    """The same ``count`` subjects every time, spread over kernels, forms, rules, widths and architectures.

    Each is the one with most of what was taken least so far; of several, one that is short and so quick to compile.
    """
    remaining = sorted(rows, key=lambda subject: (_length(rows[subject]), repr(subject)))
    taken: list[Subject] = []
    seen: Counter[object] = Counter()
    while remaining and len(taken) < count:
        best = max(remaining, key=lambda subject: sum(2.0 ** -seen[trait] for trait in _traits(subject)))
        remaining.remove(best)
        taken.append(best)
        seen.update(_traits(best))
    return taken


def _length(rows: Iterable[Row]) -> int:
    return sum(row.resources.instructions for row in rows if row.resources is not None)


def _traits(subject: Subject) -> tuple[object, ...]:
    shape = subject.shape
    return (
        subject.kernel,
        subject.architecture,
        (shape.form, shape.rule),
        shape.operand_bits,
        subject.variant,
        (subject.kernel.partition("_")[0], subject.architecture),
    )


def differences(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """What is not as it was reported, per kernel of one subject; empty if all is."""
    before = {row.digest: row.resources for row in old}
    found = []
    for row in new:
        reported = before.get(row.digest)
        if reported is None or row.resources is None:
            found.append(f"{row.function or row.subject.kernel}: {'; '.join(row.failures) or 'not in the report'}")
            continue
        for name in COMPARED:
            was, now = getattr(reported, name), getattr(row.resources, name)
            if was != now:
                found.append(f"{row.function}: {name} is {now}, the report says {was}")
    return found
