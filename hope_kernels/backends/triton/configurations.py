"""Which block sizes and how many warps a kernel is launched with: a table, read from ``configurations.json``.

An entry holds for one kernel, on one device (or an architecture, or any), for the shape classes it lists; a field of a
class that it does not list may have any value. The choice is made from these alone: never by timing, never from batch
size or length, so that results do not depend on them either. :func:`tune` is the one place that times; it writes what
it found to a file of the user's, which takes precedence.
Without Triton this module imports.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hope_kernels.backends import tables
from hope_kernels.backends.interface import ScanProblem
from hope_kernels.backends.tables import ANY, Device, demand, padded

SHIPPED = Path(__file__).with_name("configurations.json")
USER_FILE_VARIABLE = "HOPE_KERNELS_TRITON_CONFIGURATIONS"

_TILE = ("rows", "columns", "inner")
# The block sizes that each kernel wants, beside num_warps and num_stages.
KERNELS: dict[str, tuple[str, ...]] = {
    "resident_forward": ("block_hidden",),
    "resident_backward": ("block_hidden",),
    # The tiled plan: products, in the order of a chunk's launches; products of sizes that no block divides; the
    # triangular systems of dgd; passes without a product.
    "tiled_hidden": _TILE,
    "tiled_output": _TILE,
    "tiled_errors": _TILE,
    "tiled_write": _TILE,
    "tiled_corrected_adjoint": _TILE,
    "tiled_errors_adjoint": _TILE,
    "tiled_delta_adjoint": _TILE,
    "tiled_hidden_adjoint": _TILE,
    "tiled_token_adjoint": _TILE,
    "tiled_state_adjoint": _TILE,
    "tiled_odd": _TILE,
    "tiled_triangle": ("rows", "inner"),
    "tiled_triangle_adjoint": (),
    "tiled_pass": ("rows", "columns"),
    # Products with written pairs: scores, their adjoint, sums over pairs or tokens; of odd numbers of features.
    "pairs_scores": _TILE,
    "pairs_adjoint": _TILE,
    "pairs_sums": _TILE,
    "pairs_odd": _TILE,
}


class ShapeClass(NamedTuple):
    """What a configuration may depend on: chunk and token padded to powers of two, at least 16; bits of a number."""

    form: str
    rule: str
    operand_bits: int
    block_chunk: int
    block_dim: int


@dataclass(frozen=True)
class Configuration:
    """How to launch a kernel.

    Attributes:
        blocks: compile-time block sizes by name.
        num_warps, num_stages: options of the launch; ``num_stages`` None leaves it to Triton.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int | None = None

    @classmethod
    def of(cls, *, num_warps: int, num_stages: int | None = None, **blocks: int) -> Configuration:
        return cls(tuple(sorted(blocks.items())), num_warps, num_stages)

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    @property
    def options(self) -> dict[str, int]:
        """Keywords of the launch."""
        return {"num_warps": self.num_warps} | ({} if self.num_stages is None else {"num_stages": self.num_stages})

    def settings(self) -> dict[str, int]:
        """Blocks and options in one dictionary, as the table has them."""
        return dict(self.blocks) | self.options


@dataclass(frozen=True, eq=False)
class Entry:
    """One line of a table.

    Attributes:
        kernel: of :data:`KERNELS`.
        device: name or architecture it is for, or ``"any"``.
        classes: by field of :class:`ShapeClass` the values it holds for; any value of a field that is not there.
        configuration: what to launch with.
        measured: where it was measured (machine, versions, times), or None.
        reason: why this one, where it was not measured.
    """

    kernel: str
    device: str
    classes: Mapping[str, tuple[Any, ...]]
    configuration: Configuration
    measured: Mapping[str, Any] | None
    reason: str

    def holds_for(self, shape: ShapeClass) -> bool:
        return all(getattr(shape, name) in values for name, values in self.classes.items())

    def overlaps(self, other: Entry) -> bool:
        """Whether some shape class of one kernel and device is of both."""
        same = (self.kernel, self.device) == (other.kernel, other.device)
        return same and tables.overlap(self.classes, other.classes)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "device": self.device,
            **{name: list(values) for name, values in self.classes.items()},
            **self.configuration.settings(),
            "measured": None if self.measured is None else dict(self.measured),
            "reason": self.reason,
        }


# ---- the choice -----------------------------------------------------------------------------------------------------


def choose(kernel: str, shape: ShapeClass, device: Device) -> Configuration | None:
    """The configuration of ``kernel`` for ``shape`` on ``device``; None where the table has none.

    An entry for the device's name comes before one for its architecture, and that before one for any; at each step the
    user's file before the shipped table.

    Raises:
        ValueError: no such kernel, or a table is not valid; the message names the file and the entry.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; want one of {', '.join(map(repr, KERNELS))}")
    if kernel in _assumed.configurations:
        return _assumed.configurations[kernel]
    return _choose(kernel, shape, device, user_file())


@lru_cache(maxsize=1024)
def _choose(kernel: str, shape: ShapeClass, device: Device, user: Path) -> Configuration | None:
    known = [*([load(user)] if user.exists() else []), load(SHIPPED)]
    for wanted in device.closest_first:
        for table in known:
            for entry in table:
                if entry.kernel == kernel and entry.device == wanted and entry.holds_for(shape):
                    return entry.configuration
    return None


def shape_class(problem: ScanProblem) -> ShapeClass:
    """The class of a scan."""
    tokens = problem.tokens
    return ShapeClass(
        form=problem.spec.form,
        rule=problem.spec.rule,
        operand_bits=torch.finfo(tokens.dtype).bits,
        block_chunk=padded(problem.chunk_size),
        block_dim=padded(tokens.shape[3]),
    )


def device_of(tensor: torch.Tensor) -> Device:
    """The device a launch on this tensor runs on; off a GPU (interpreter, compiling only) the assumed one."""
    if tensor.device.type != "cuda":
        return _assumed.device
    return tables.gpu(tensor.device)


@dataclass
class _Assumed:
    """What stands in for the table and the device; for the whole process, since backward passes run in threads."""

    configurations: dict[str, Configuration] = field(default_factory=dict)
    device: Device = field(default_factory=lambda: Device(ANY, ANY))


_assumed = _Assumed()


@contextmanager
def assume(configurations: Mapping[str, Configuration] | None = None, device: Device | None = None) -> Iterator[None]:
    """Inside, :func:`choose` gives these configurations by kernel, and :func:`device_of` this device off a GPU.

    For tuning and for compiling without a GPU; it holds for the whole process.
    """
    global _assumed
    before = _assumed
    _assumed = _Assumed(dict(before.configurations) | dict(configurations or {}), device or before.device)
    try:
        yield
    finally:
        _assumed = before


# ---- tables ---------------------------------------------------------------------------------------------------------


def user_file() -> Path:
    """``$HOPE_KERNELS_TRITON_CONFIGURATIONS``, by default in the user's cache folder. It need not exist."""
    return tables.user_file(USER_FILE_VARIABLE, "triton_configurations.json")


@lru_cache(maxsize=16)
def load(path: Path) -> tuple[Entry, ...]:
    """The entries of a table, checked. Read once per process.

    Raises:
        ValueError: the file is not such a table; the message names file, entry and field.
        OSError: it cannot be read.
    """
    entries = tables.read(path, _entry)
    for i, entry in enumerate(entries):
        for j, other in enumerate(entries[:i]):
            if entry.overlaps(other):
                raise ValueError(f"{path}: entries {j} and {i} both hold for one {entry.kernel} on {entry.device!r}")
    return entries


def _entry(where: str, item: Any) -> Entry:
    demand(isinstance(item, dict), where, f"is {item!r}; want an object")
    kernel = item.get("kernel")
    demand(kernel in KERNELS, where, f"kernel is {kernel!r}; want one of {', '.join(map(repr, KERNELS))}")
    where = f"{where} ({kernel}, {item.get('device')!r})"
    needed = {"kernel", "device", *KERNELS[kernel], "num_warps", "measured", "reason"}
    demand(needed <= item.keys(), where, f"lacks {', '.join(sorted(needed - item.keys()))}")
    unknown = item.keys() - needed - {"num_stages", *ShapeClass._fields}
    demand(not unknown, where, f"has unknown fields {', '.join(sorted(unknown))}")
    demand(isinstance(item["device"], str) and item["device"] != "", where, "device is no name")
    classes = tables.classes_of(where, item, ShapeClass._fields)
    for name in KERNELS[kernel]:
        good = tables.power_of_two(item[name], 16, 512)
        demand(good, where, f"{name} is {item[name]!r}; want a power of two in 16..512")
    warps, stages = item["num_warps"], item.get("num_stages")
    demand(tables.power_of_two(warps, 1, 32), where, f"num_warps is {warps!r}; want a power of two in 1..32")
    good = stages is None or (type(stages) is int and 1 <= stages <= 8)
    demand(good, where, f"num_stages is {stages!r}; want 1..8")
    tables.check_origin(where, item, ("torch", "triton"))
    return Entry(
        kernel=kernel,
        device=item["device"],
        classes=classes,
        configuration=Configuration.of(
            num_warps=warps, num_stages=stages, **{name: item[name] for name in KERNELS[kernel]}
        ),
        measured=item["measured"],
        reason=item["reason"],
    )


def write(path: Path, entries: Iterable[Entry]) -> None:
    """A table of these entries, one a line, replacing the file at once."""
    tables.write(path, (entry.as_dict() for entry in entries))
    load.cache_clear()
    _choose.cache_clear()


# ---- tuning ---------------------------------------------------------------------------------------------------------


def tune(
    kernel: str,
    shape: ShapeClass,
    run: Callable[[], object],
    candidates: Iterable[Configuration],
    *,
    repeats: int = 7,
    path: Path | None = None,
) -> dict[Configuration, float | str]:
    """Time ``run`` with each candidate on the current GPU and write the fastest to the user's table.

    Entries there of this kernel and device that hold for the same class are replaced.

    Args:
        kernel, shape: what the entry is for.
        run: launches ``kernel`` (through host code that calls :func:`choose`) on inputs of that class; it must not
            change them.
        candidates: configurations to try.
        repeats: timed calls of each, after one that compiles and one that warms up; candidates alternate.
        path: of the table; None for :func:`user_file`.

    Returns:
        Seconds (the median) by candidate, or why it does not run.

    Raises:
        RuntimeError: there is no GPU, or no candidate runs.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning times kernels on a GPU, and there is none")
    from triton.runtime.errors import OutOfResources

    path = user_file() if path is None else path
    samples: dict[Configuration, list[float]] = {}
    outcome: dict[Configuration, float | str] = {}
    for candidate in candidates:
        try:
            with assume({kernel: candidate}):
                run()
                run()
            torch.cuda.synchronize()
            samples[candidate] = []
        except OutOfResources as error:
            outcome[candidate] = str(error)
    if not samples:
        raise RuntimeError(f"no candidate for {kernel} runs here: {'; '.join(map(str, outcome.values()))}")
    for _ in range(repeats):
        for candidate, times in samples.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with assume({kernel: candidate}):
                start.record()
                run()
                end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    outcome |= {candidate: statistics.median(times) for candidate, times in samples.items()}
    best = min(samples, key=lambda candidate: outcome[candidate])
    device = tables.gpu(torch.device("cuda", torch.cuda.current_device()))
    entry = Entry(
        kernel=kernel,
        device=device.name,
        classes={name: (value,) for name, value in shape._asdict().items()},
        configuration=best,
        measured={
            "device": device.name,
            "torch": torch.__version__,
            "triton": version("triton"),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "seconds": outcome[best],
            "candidates": len(outcome),
        },
        reason="the fastest of the candidates timed",
    )
    kept = [old for old in (load(path) if path.exists() else ()) if not entry.overlaps(old)]
    write(path, [*kept, entry])
    return outcome
