"""Tables of choices as JSON: entries for a device and for classes of calls, shipped ones and those of the user's file.

What is chosen from such a table is a matter of the table alone: never of timing, batch size or length, so that results
do not depend on them either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

FORMAT = 1
ANY = "any"

_Entry = TypeVar("_Entry")


class Device(NamedTuple):
    """``name`` as the driver gives it (``"NVIDIA H200"``), ``architecture`` as the compiler does (``"sm_90"``)."""

    name: str
    architecture: str

    @property
    def closest_first(self) -> tuple[str, str, str]:
        """What an entry for it may be for: the device, its architecture, any."""
        return self.name, self.architecture, ANY


@lru_cache(maxsize=64)
def gpu(device: torch.device) -> Device:
    """A GPU that torch sees."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device(properties.name, properties.gcnArchName.split(":")[0])
    return Device(properties.name, f"sm_{properties.major}{properties.minor}")


def padded(size: int) -> int:
    """The least power of two that is at least ``size`` and 16, the least a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


def power_of_two(value: Any, least: int, most: int) -> bool:
    """Whether ``value`` is one of that range."""
    return type(value) is int and least <= value <= most and value & (value - 1) == 0


# The fields of a class that tables have, and which values they may list.
CLASS_VALUES: dict[str, Callable[[Any], bool]] = {
    "form": lambda value: value in ("linear", "mlp", "glu"),
    "rule": lambda value: value in ("gd", "dgd"),
    "operand_bits": lambda value: value in (16, 32),
    "block_chunk": lambda value: power_of_two(value, 16, 1 << 20),
    "block_dim": lambda value: power_of_two(value, 16, 1 << 20),
    "gradients": lambda value: value in (False, True) and type(value) is bool,
}


def classes_of(where: str, item: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """The classes that an entry lists, by field; any value of a field that is not there.

    Raises:
        ValueError: a field is no list of its values.
    """
    found = {name: item[name] for name in names if name in item}
    for name, values in found.items():
        demand(isinstance(values, list) and bool(values), where, f"{name} is {values!r}; want a list of values")
        for value in values:
            demand(CLASS_VALUES[name](value), where, f"{name} has {value!r}")
    return {name: tuple(values) for name, values in found.items()}


def overlap(one: Mapping[str, tuple[Any, ...]], other: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether some class is of both."""
    return all(set(values) & set(other.get(name, values)) for name, values in one.items())


def demand(good: bool, where: str, message: str) -> None:
    """Raises a ValueError that says where, unless ``good``."""
    if not good:
        raise ValueError(f"{where}: {message}")


def check_origin(where: str, item: Mapping[str, Any], versions: Iterable[str]) -> None:
    """That an entry says where it was measured, or why it is as it is."""
    measured, reason = item["measured"], item["reason"]
    wanted = {"device", *versions, "date"}
    good = measured is None or (isinstance(measured, dict) and wanted <= measured.keys())
    demand(good, where, f"measured is {measured!r}; want null or an object with {', '.join(sorted(wanted))}")
    good = isinstance(reason, str) and (measured is not None or reason != "")
    demand(good, where, "lacks a reason: it was not measured")


def user_file(variable: str, name: str) -> Path:
    """The file that an environment variable names, else ``name`` in the user's cache folder. It need not exist."""
    named = os.environ.get(variable)
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hope_kernels" / name


def read(path: Path, parse: Callable[[str, Any], _Entry]) -> tuple[_Entry, ...]:
    """The entries of a table, each ``parse(where, item)``.

    Raises:
        ValueError: the file is no table; the message names it.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), list):
        raise ValueError(f'{path}: want an object with "format": {FORMAT} and a list "entries"')
    return tuple(parse(f"{path}: entry {i}", item) for i, item in enumerate(content["entries"]))


def write(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """A table of these entries, one a line, replacing the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(entry) for entry in entries)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(f'{{\n  "format": {FORMAT},\n  "entries": [\n{lines}\n  ]\n}}\n')
    temporary.replace(path)
