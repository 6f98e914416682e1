"""The resources of the engine's compiled Triton kernels: of each shipped configuration, and of candidates for one.

Needs Triton but no GPU. Every configuration of the table is compiled through the engine's own host code, at the largest
chunk and width it is meant for, as a plain scan (objective ``l2``) and as a full one (objective
``self``, momentum where the rule has it), both with retention and pending tokens, and judged by
:meth:`~hope_kernels.backends.triton.resources.Resources.failures`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from types import ModuleType

import torch
import triton

from hope_kernels.backends import triton as triton_engine
from hope_kernels.backends.interface import ScanProblem
from hope_kernels.backends.triton import resident, tiled
from hope_kernels.backends.triton.compile_only import ARCHITECTURES, Launch, compile_only, meta_problem
from hope_kernels.backends.triton.configurations import (
    ANY,
    SHIPPED,
    Configuration,
    Entry,
    ShapeClass,
    assume,
    load,
)
from hope_kernels.backends.triton.resources import Resources, read_resources
from hope_kernels.memory.spec import MemorySpec

VARIANTS = ("plain", "full")
DTYPES = {16: torch.bfloat16, 32: torch.float32}
HIDDEN_PER_DIM = 4  # a memory's usual hidden width over its token's


@dataclass(frozen=True)
class Subject:
    """One kernel to compile: for a shape class and variant, with a configuration, for an architecture.

    ``configuration`` None takes what the table gives.
    """

    kernel: str
    shape: ShapeClass
    variant: str
    architecture: str
    configuration: Configuration | None = None


@dataclass(frozen=True)
class Row:
    """What came of a subject: ``settings`` of the launch; ``resources`` None where it does not compile.

    ``failures`` say why it must not be shipped. ``tolerated``: no failure, and yet not free of spills.
    """

    subject: Subject
    function: str
    settings: dict[str, int]
    resources: Resources | None
    failures: list[str]

    @property
    def tolerated(self) -> bool:
        return self.resources is not None and not self.failures and not self.resources.clean

    def as_dict(self) -> dict[str, object]:
        return {
            "kernel": self.subject.kernel,
            "function": self.function,
            "architecture": self.subject.architecture,
            "variant": self.subject.variant,
            **self.subject.shape._asdict(),
            **self.settings,
            **({} if self.resources is None else asdict(self.resources)),
            "failures": self.failures,
            "tolerated": self.tolerated,
        }


def launches_of(subject: Subject) -> list[Launch]:
    """The launches of a subject's kernel, compiled."""
    shape, full = subject.shape, subject.variant == "full"
    spec = MemorySpec(form=shape.form, rule=shape.rule, objective="self" if full else "l2")  # type: ignore[arg-type]
    problem = meta_problem(
        spec,
        batch=8,
        tokens=4 * shape.block_chunk,
        heads=16,
        dim=shape.block_dim,
        hidden=HIDDEN_PER_DIM * shape.block_dim,
        chunk_size=shape.block_chunk,
        dtype=DTYPES[shape.operand_bits],
        retention=True,
        momentum=full,
        pending=shape.block_chunk - 1,
    )
    assumed = {} if subject.configuration is None else {subject.kernel: subject.configuration}
    with compile_only(ARCHITECTURES[subject.architecture]) as launches, assume(assumed):
        _LAUNCHERS[subject.kernel](problem)
    return launches


def _forward(problem: ScanProblem) -> None:
    """A scan, and a read, which takes the same configuration."""
    resident.scan_forward(problem, save=True)
    problem.k = problem.v = problem.pending_k = problem.pending_v = problem.step = problem.retention = None
    problem.decay = problem.momentum_step = problem.momentum_carry = problem.momentum_decay = None
    problem.momentum, problem.chunks = (), 0
    resident.scan_forward(problem, save=False)


def _backward(problem: ScanProblem, engine: ModuleType = resident) -> None:
    saved = [torch.empty(shape, device="meta") for shape in triton_engine.saved_shapes(problem)]
    weights = [torch.empty((problem.sequence_count, *w.shape[-3:]), device="meta") for w in problem.weights]
    momentum = weights if problem.has_momentum else []
    engine.scan_backward(problem, saved, torch.empty_like(problem.v), weights, momentum)


_LAUNCHERS: dict[str, Callable[[ScanProblem], None]] = {
    "resident_forward": _forward,
    "resident_backward": _backward,
    "tiled_forward": lambda problem: tiled.scan_forward(problem, save=True) and None,
    "tiled_backward": lambda problem: _backward(problem, tiled),
}

# The tiled plan's kernels take their tiles from a table in its own code; they are compiled at a large memory's sizes.
TILED_SHAPES = (ShapeClass("mlp", "gd", 16, 512, 256), ShapeClass("glu", "dgd", 32, 512, 256))


def examine(subject: Subject) -> list[Row]:
    """Compile a subject: a row per launch; one without resources if it does not compile."""
    settings = {} if subject.configuration is None else subject.configuration.settings()
    try:
        launches = launches_of(subject)
    except (triton.TritonError, RuntimeError) as error:
        return [Row(subject, "", settings, None, [f"does not compile: {str(error).strip().splitlines()[-1]}"])]
    architecture = ARCHITECTURES[subject.architecture]
    rows = []
    # A kernel may be launched once per chunk: once is enough.
    for launch in {(launch.kernel, launch.compiled.hash): launch for launch in launches}.values():
        multiplies = "tt.dot" in launch.compiled.asm["ttir"]
        resources = read_resources(launch.compiled, architecture)
        failures = resources.failures(architecture, tensor_core=multiplies and subject.shape.operand_bits == 16)
        if settings and launch.options["num_warps"] != settings["num_warps"]:
            failures.append(f"the engine launches it with num_warps={launch.options['num_warps']} all the same")
        rows.append(Row(subject, launch.kernel, settings or _settings(launch), resources, failures))
    return rows


def _settings(launch: Launch) -> dict[str, int]:
    """Tile and options of a launch whose configuration is not of the table."""
    tile = launch.options.get("tile")
    blocks = {} if tile is None else {name: getattr(tile, name) for name in ("rows", "columns", "inner")}
    return blocks | {name: launch.options[name] for name in ("num_warps", "num_stages") if name in launch.options}


def examine_all(subjects: Iterable[Subject], *, jobs: int = 1) -> Iterator[list[Row]]:
    """:func:`examine` of each, in order, ``jobs`` at a time in processes of their own."""
    if jobs == 1:
        yield from map(examine, subjects)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(examine, subjects)


def shipped_subjects(
    architectures: Iterable[str], *, kernels: Iterable[str] | None = None, every_class: bool = False
) -> list[Subject]:
    """Every configuration of the shipped table on every architecture it can be chosen on.

    Args:
        architectures: of :data:`~hope_kernels.backends.triton.compile_only.ARCHITECTURES`.
        kernels: only these.
        every_class: also at the smaller chunks and widths an entry lists, not at the largest alone.

    Raises:
        ValueError: unknown architecture.
    """
    subjects = []
    for architecture in architectures:
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {architecture!r}; want one of {', '.join(ARCHITECTURES)}")
        for entry, shapes in _chosen(architecture).items():
            if kernels is None or entry.kernel in kernels:
                subjects += [
                    Subject(entry.kernel, shape, variant, architecture, entry.configuration)
                    for shape in shapes
                    if every_class or not any(_exceeds(other, shape) for other in shapes)
                    for variant in VARIANTS
                ]
        subjects += [
            Subject(kernel, shape, "full", architecture)
            for kernel in ("tiled_forward", "tiled_backward")
            if kernels is None or kernel in kernels
            for shape in TILED_SHAPES
        ]
    return subjects


def _chosen(architecture: str) -> dict[Entry, list[ShapeClass]]:
    """The entries that hold on an architecture, each with the classes for which no closer one does."""
    chosen: dict[Entry, list[ShapeClass]] = {}
    taken: set[tuple[str, ShapeClass]] = set()
    entries = [entry for entry in load(SHIPPED) if entry.device in (architecture, ANY)]
    for entry in sorted(entries, key=lambda entry: entry.device == ANY):
        for values in itertools.product(*(entry.classes[name] for name in ShapeClass._fields)):
            shape = ShapeClass(*values)
            if (entry.kernel, shape) not in taken:
                taken.add((entry.kernel, shape))
                chosen.setdefault(entry, []).append(shape)
    return chosen


def _exceeds(other: ShapeClass, shape: ShapeClass) -> bool:
    """Whether ``other`` is of the same kind, as large and larger in something."""
    same_kind = (other.form, other.rule, other.operand_bits) == (shape.form, shape.rule, shape.operand_bits)
    as_large = other.block_chunk >= shape.block_chunk and other.block_dim >= shape.block_dim
    return same_kind and as_large and other != shape
