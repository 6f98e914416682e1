"""The resources of the engine's compiled Triton kernels: of each shipped configuration, and of candidates for one.

Needs Triton but no GPU. Every configuration of the table is compiled through the engine's own host code, at the largest
chunk and width it is meant for, as a plain scan (objective ``l2``) and as a full one (objective
``self``, momentum where the rule has it), both with retention and pending tokens, and judged by
:meth:`~hope_kernels.backends.triton.resources.Resources.failures`. Kernels of the tiled plan are also compiled at sizes
that no tile divides (``odd``: a full scan), each for the scans that ask the most of it. Products with written pairs
are compiled for one token (``plain``) and for a chunk and its gradients (``full``, ``odd``), with a layer's inputs and
with its errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from types import ModuleType
from typing import NamedTuple

import torch
import triton

from hope_kernels.backends import triton as triton_engine
from hope_kernels.backends.interface import ScanProblem
from hope_kernels.backends.triton import pairs, resident, tiled
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
ODD = 3  # by so much a chunk and a token are shorter in the variant "odd"
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

    @property
    def name(self) -> str:
        """Of the shipped subjects no two have the same."""
        shape = self.shape
        return (
            f"{self.kernel} {shape.form} {shape.rule} {shape.operand_bits}-bit C{shape.block_chunk} "
            f"D{shape.block_dim} {self.variant} on {self.architecture}"
        )


@dataclass(frozen=True)
class Row:
    """What came of a subject: ``settings`` of the launch; ``resources`` None where it does not compile.

    ``failures`` say why it must not be shipped. ``tolerated``: no failure, and yet not free of spills. ``digest`` is
    that of what was compiled (:mod:`hope_kernels.backends.triton.digest`), empty where it does not compile.
    """

    subject: Subject
    function: str
    settings: dict[str, int]
    resources: Resources | None
    failures: list[str]
    digest: str = ""

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
            "digest": self.digest,
        }


def launches_of(subject: Subject, *, describe: bool = False) -> list[Launch]:
    """The launches of a subject's kernel, compiled, or only described: each different one once, though a kernel may be
    launched once per chunk."""
    shape, full = subject.shape, subject.variant != "plain"
    architecture = ARCHITECTURES[subject.architecture]
    assumed = {} if subject.configuration is None else {subject.kernel: subject.configuration}
    if subject.kernel in _PAIRS:
        functions = _PAIRS[subject.kernel].functions
        with compile_only(architecture, functions, describe=describe) as launches, assume(assumed):
            _pair_calls(subject)
        return list({launch.digest: launch for launch in launches}.values())
    tiled_scan = _TILED.get(subject.kernel)
    less = ODD if subject.variant == "odd" else 0
    chunk, dim = shape.block_chunk - less, shape.block_dim - less
    # A tiled scan of one chunk launches every kernel once.
    tokens, pending = (chunk // 2, chunk - chunk // 2) if tiled_scan else (4 * chunk, chunk - 1)
    spec = MemorySpec(form=shape.form, rule=shape.rule, objective="self" if full else "l2")  # type: ignore[arg-type]
    problem = meta_problem(
        spec,
        batch=8,
        tokens=tokens,
        heads=16,
        dim=dim,
        hidden=HIDDEN_PER_DIM * dim,
        chunk_size=chunk,
        dtype=DTYPES[shape.operand_bits],
        retention=True,
        momentum=full,
        pending=pending,
    )
    if tiled_scan is None:
        with compile_only(architecture, describe=describe) as launches, assume(assumed):
            _LAUNCHERS[subject.kernel](problem)
    else:
        with assume(assumed):
            with compile_only(architecture, tiled_scan.forward, describe=describe) as launches:
                tiled.scan_forward(problem, save=True)
            with compile_only(architecture, tiled_scan.backward, describe=describe) as backward_launches:
                _backward(problem, tiled)
        launches = launches + backward_launches
    return list({launch.digest: launch for launch in launches}.values())


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
}


class _TiledScans(NamedTuple):
    """What is compiled for a kernel of the table: functions of the forward and of the backward, in these scans."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]
    scans: tuple[str, ...]  # form, rule and variant


_TILED_CHUNK, _TILED_DIM = 512, 256  # large enough for whole tiles, of products with pairs as well
_TILED = {
    "tiled_hidden": _TiledScans((), ("hidden_kernel",), ("mlp gd full", "glu dgd full")),
    "tiled_output": _TiledScans(("out_kernel",), (), ("mlp gd plain", "mlp gd full", "glu dgd full")),
    "tiled_errors": _TiledScans((), ("errors_kernel",), ("mlp gd full", "glu gd full", "glu dgd full")),
    "tiled_write": _TiledScans(("write_kernel",), (), ("mlp gd full", "linear dgd full")),
    "tiled_corrected_adjoint": _TiledScans((), ("corrected_adjoint_kernel",), ("mlp dgd full",)),
    "tiled_errors_adjoint": _TiledScans(
        (), ("input_errors_adjoint_kernel", "delta_adjoint_kernel"), ("mlp gd full", "glu gd full")
    ),
    "tiled_delta_adjoint": _TiledScans((), ("delta_adjoint_kernel",), ("mlp gd plain", "glu dgd full")),
    "tiled_hidden_adjoint": _TiledScans(
        (), ("hidden_adjoint_kernel",), ("mlp gd plain", "glu gd full", "glu dgd full")
    ),
    "tiled_token_adjoint": _TiledScans(
        (), ("token_adjoint_kernel",), ("mlp gd plain", "glu gd full", "glu dgd full", "linear dgd full")
    ),
    "tiled_state_adjoint": _TiledScans((), ("state_adjoint_kernel",), ("mlp gd full",)),
    "tiled_odd": _TiledScans(
        ("write_kernel",),
        (
            "hidden_kernel",
            "out_kernel",
            "errors_kernel",
            "corrected_adjoint_kernel",
            "input_errors_adjoint_kernel",
            "delta_adjoint_kernel",
            "hidden_adjoint_kernel",
            "token_adjoint_kernel",
            "state_adjoint_kernel",
        ),
        ("mlp gd odd", "glu gd odd", "glu dgd odd"),
    ),
    "tiled_triangle": _TiledScans(
        ("steps_kernel", "overlap_kernel", "solve_kernel"),
        ("solve_adjoint_kernel", "lower_adjoint_kernel"),
        ("linear dgd full", "linear dgd odd"),
    ),
    "tiled_triangle_adjoint": _TiledScans(
        (), ("triangle_adjoint_kernel", "retention_adjoint_kernel"), ("linear dgd full", "linear dgd odd")
    ),
    "tiled_pass": _TiledScans(
        ("checkpoint_kernel",), ("gather_kernel", "errors_adjoint_kernel"), ("glu dgd full", "glu dgd odd")
    ),
}


class _PairCalls(NamedTuple):
    """What is compiled for a kernel of products with pairs: its functions, for these calls."""

    functions: tuple[str, ...]
    scans: tuple[str, ...]  # form, rule and variant


_PAIRS = {
    "pairs_scores": _PairCalls(("scores_kernel",), ("mlp gd plain", "mlp gd full")),
    "pairs_adjoint": _PairCalls(("scores_adjoint_kernel",), ("mlp gd full", "glu gd full")),
    "pairs_sums": _PairCalls(("sums_kernel",), ("mlp gd plain", "mlp gd full", "glu gd full")),
    "pairs_odd": _PairCalls(
        ("scores_kernel", "scores_adjoint_kernel", "sums_kernel"), ("mlp gd odd", "glu gd odd")
    ),
}  # fmt: skip
# Kernels that one size is compiled of: those of the table hold for every class.
_BY_SCAN = {kernel: calls.scans for kernel, calls in (_TILED | _PAIRS).items()}


def _pair_calls(subject: Subject) -> None:
    """Products with the pairs of the first layers, and with those of the last one the other way round."""
    shape, odd = subject.shape, subject.variant == "odd"
    less, operand, count = ODD if odd else 0, DTYPES[shape.operand_bits], 2 if shape.form == "glu" else 1
    dim, hidden = shape.block_dim - less, HIDDEN_PER_DIM * shape.block_dim - less
    batch, heads, length = 8, 16, 1 if subject.variant == "plain" else shape.block_chunk - less
    pair_count = 3 * shape.block_chunk

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    weights, inputs = empty(batch, heads, pair_count), empty(batch, heads, pair_count, dim, dtype=operand)
    errors = [empty(batch, heads, pair_count, hidden) for _ in range(count)]
    forward = empty(batch, length, heads, dim, dtype=operand), inputs, errors
    back = empty(batch, length, heads, hidden), errors[0], [inputs]
    for u, keys, values in (forward, back):
        results = pairs.products(u, keys, values, weights, operand)
        if subject.variant != "plain":
            pairs.gradients(u, keys, values, weights, operand, results, [True] * (3 + len(values)))


def examine(subject: Subject) -> list[Row]:
    """Compile a subject: a row per launch; one without resources if it does not compile."""
    settings = {} if subject.configuration is None else subject.configuration.settings()
    try:
        launches = launches_of(subject)
    except (triton.TritonError, RuntimeError) as error:
        return [Row(subject, "", settings, None, [f"does not compile: {str(error).strip().splitlines()[-1]}"])]
    architecture = ARCHITECTURES[subject.architecture]
    rows = []
    for launch in launches:
        multiplies = "tt.dot" in launch.compiled.asm["ttir"]
        resources = read_resources(launch.compiled, architecture)
        failures = resources.failures(architecture, tensor_core=multiplies and subject.shape.operand_bits == 16)
        failures += launch_failures(launch, subject)
        rows.append(Row(subject, launch.kernel, settings_of(launch, subject), resources, failures, launch.digest))
    return rows


def launch_failures(launch: Launch, subject: Subject) -> list[str]:
    """Why a launch is not the subject's, whatever it takes."""
    warps = launch.options["num_warps"]
    if subject.configuration is None or warps == subject.configuration.num_warps:
        return []
    return [f"the engine launches it with num_warps={warps} all the same"]


def settings_of(launch: Launch, subject: Subject) -> dict[str, int]:
    """The subject's configuration; where it takes what the table gives, tile and options of the launch."""
    if subject.configuration is not None:
        return subject.configuration.settings()
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
            Subject(kernel, ShapeClass(form, rule, bits, _TILED_CHUNK, _TILED_DIM), variant, architecture)
            for kernel, scans in _BY_SCAN.items()
            if kernels is None or kernel in kernels
            for form, rule, variant in map(str.split, scans)
            for bits in DTYPES
        ]
    return subjects


def _chosen(architecture: str) -> dict[Entry, list[ShapeClass]]:
    """The entries that hold on an architecture, each with the classes for which no closer one does."""
    chosen: dict[Entry, list[ShapeClass]] = {}
    taken: set[tuple[str, ShapeClass]] = set()
    entries = [e for e in load(SHIPPED) if e.kernel in _LAUNCHERS and e.device in (architecture, ANY)]
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
