"""Few of many parametrized cases: every two values that meet in some case meet in one of those."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations

from hope_kernels import MemorySpec

Goals = frozenset


def _fields(parameters: Mapping[str, object]) -> dict[str, object]:
    """Parameters by name, a memory's spec and dictionaries by their items."""
    found: dict[str, object] = {}
    for name, value in parameters.items():
        if isinstance(value, MemorySpec):
            found |= {f"{name}.{field}": x for field, x in asdict(value).items()}
        elif isinstance(value, Mapping):
            found |= {f"{name}.{key}": str(x) for key, x in value.items()}
        else:
            found[name] = getattr(value, "__name__", str(value))
    return found


def _goals(parameters: Mapping[str, object], names: Sequence[str]) -> Goals:
    """What this case shows: each value, every two of them, and the form, objective and rule of a memory together."""
    fields = _fields(parameters)
    values = [(name, fields.get(name)) for name in names]
    specs = ((v.form, v.objective, v.rule) for v in parameters.values() if isinstance(v, MemorySpec))
    return Goals([*((v,) for v in values), *combinations(values, 2), *specs])


def by_what_they_add(cases: Sequence[Mapping[str, object]], seed: str) -> tuple[list[int], int]:
    """The indices of the cases, each time the one with the most that those before it have not shown; and how many of
    them show everything. ``seed`` decides between equals."""
    names = sorted({name for case in cases for name in _fields(case)})
    left = dict(enumerate(_goals(case, names) for case in cases))
    order: list[int] = []
    tied = random.Random(seed).sample(range(len(cases)), len(cases))
    while any(left.values()):
        best = max((i for i in tied if i in left), key=lambda i: len(left[i]))
        shown = left.pop(best)
        left = {i: goals - shown for i, goals in left.items()}
        order.append(best)
    return [*order, *(i for i in tied if i in left)], len(order)
