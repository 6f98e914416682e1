"""Which engine ``backend=None`` means on a GPU: a table, read from ``choice.json``.

An entry holds for a device, an architecture or any, and for the classes of calls it lists; it says where it was
measured or, where it was not, why it is as it is. The user's file (``$HOPE_KERNELS_ENGINES``) comes before the shipped
table. An engine that cannot run a call is passed over for the other one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hope_kernels.backends import tables
from hope_kernels.backends.interface import ScanRequest
from hope_kernels.backends.tables import Device, demand

SHIPPED = Path(__file__).with_name("choice.json")
USER_FILE_VARIABLE = "HOPE_KERNELS_ENGINES"
ENGINES = ("triton", "cuda")


class CallClass(NamedTuple):
    """What a choice may depend on: chunk and token padded to powers of two, bits of a number, gradients or not."""

    form: str
    rule: str
    operand_bits: int
    block_chunk: int
    block_dim: int
    gradients: bool

    @classmethod
    def of(cls, request: ScanRequest) -> CallClass:
        """The class of a call; its chunk size must be known."""
        return cls(
            form=request.spec.form,
            rule=request.spec.rule,
            operand_bits=torch.finfo(request.dtype).bits,
            block_chunk=tables.padded(request.chunk_size),  # type: ignore[arg-type]
            block_dim=tables.padded(request.dim),
            gradients=request.gradients,
        )


@dataclass(frozen=True, eq=False)
class Entry:
    """One line of a table.

    Attributes:
        device: name or architecture it is for, or ``"any"``.
        classes: by field of :class:`CallClass` the values it holds for; any value of a field that is not there.
        engine: of :data:`ENGINES`.
        measured: where it was measured (machine, versions, milliseconds of both engines), or None.
        reason: why this one, where it was not measured.
    """

    device: str
    classes: Mapping[str, tuple[Any, ...]]
    engine: str
    measured: Mapping[str, Any] | None
    reason: str

    def holds_for(self, call: CallClass) -> bool:
        return all(getattr(call, name) in values for name, values in self.classes.items())

    def overlaps(self, other: Entry) -> bool:
        """Whether some class of one device is of both."""
        return self.device == other.device and tables.overlap(self.classes, other.classes)

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            **{name: list(values) for name, values in self.classes.items()},
            "engine": self.engine,
            "measured": None if self.measured is None else dict(self.measured),
            "reason": self.reason,
        }

    def because(self) -> str:
        """The measurement, or the reason, in words."""
        if self.measured is None:
            return self.reason
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(self.measured["ms"].items()))
        return f"measured on {self.measured['device']}, {self.measured['date']}: {times}"


def user_file() -> Path:
    """``$HOPE_KERNELS_ENGINES``, by default in the user's cache folder. It need not exist."""
    return tables.user_file(USER_FILE_VARIABLE, "engines.json")


def engines_for(request: ScanRequest) -> tuple[str, ...]:
    """The engines to try for a call on a GPU, the one of the table first.

    Raises:
        ValueError: a table is not valid; the message names the file and the entry.
    """
    first = choose(CallClass.of(request), tables.gpu(request.device)).engine
    return first, *(name for name in ENGINES if name != first)


def choose(call: CallClass, device: Device) -> Entry:
    """The entry that holds: one for the device's name before one for its architecture, and that before one for any; at
    each step the user's file before the shipped table, which has one for anything."""
    return _choose(call, device, user_file())


@lru_cache(maxsize=1024)
def _choose(call: CallClass, device: Device, user: Path) -> Entry:
    known = [*([load(user)] if user.exists() else []), load(SHIPPED)]
    return next(
        entry
        for wanted in device.closest_first
        for table in known
        for entry in table
        if entry.device == wanted and entry.holds_for(call)
    )


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
            demand(
                not entry.overlaps(other), str(path), f"entries {j} and {i} both hold for one call on {entry.device!r}"
            )
    return entries


def _entry(where: str, item: Any) -> Entry:
    demand(isinstance(item, dict), where, f"is {item!r}; want an object")
    needed = {"device", "engine", "measured", "reason"}
    demand(needed <= item.keys(), where, f"lacks {', '.join(sorted(needed - item.keys()))}")
    unknown = item.keys() - needed - {*CallClass._fields}
    demand(not unknown, where, f"has unknown fields {', '.join(sorted(unknown))}")
    demand(isinstance(item["device"], str) and item["device"] != "", where, "device is no name")
    engine, known = item["engine"], ", ".join(map(repr, ENGINES))
    demand(engine in ENGINES, where, f"engine is {engine!r}; want one of {known}")
    classes = tables.classes_of(where, item, CallClass._fields)
    tables.check_origin(where, item, ("torch", "ms"))
    return Entry(item["device"], classes, engine, item["measured"], item["reason"])


def write(path: Path, entries: Iterable[Entry]) -> None:
    """A table of these entries, replacing the file at once; the next choices are made by it."""
    tables.write(path, (entry.as_dict() for entry in entries))
    load.cache_clear()
    _choose.cache_clear()


def record(path: Path, found: Iterable[Entry]) -> None:
    """Puts entries into the table at ``path``, in the place of those that hold for some of the same calls."""
    found = list(found)
    before = load(path) if path.exists() else ()
    write(path, [*(old for old in before if not any(old.overlaps(new) for new in found)), *found])
