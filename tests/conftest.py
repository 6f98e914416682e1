"""Settings of the whole suite: hypothesis profiles, and how the GPUs' engines are tested without one.

`HYPOTHESIS_PROFILE=thorough` draws many more, and random, examples; the default profile draws the same ones on every
run."""

from __future__ import annotations

import ctypes
import os
import random
from collections import defaultdict
from datetime import timedelta
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Read by Triton when the first kernel is defined: here, before any is.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The oracle differentiates token by token: an example takes up to some seconds on a busy machine. The deadline
# catches a hang.
_shared = {"deadline": timedelta(seconds=60), "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("default", derandomize=True, database=None, max_examples=60, **_shared)
settings.register_profile("thorough", max_examples=400, **_shared)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# In Triton's interpreter a case takes seconds. The default tier runs this many of a test's cases, drawn once and for
# all, or as many as its marker `interpreted_cases(n)` says; the slow tier runs the others.
INTERPRETED_CASES = 1


def _is_interpreted(item: pytest.Item) -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1" or not hasattr(item, "callspec"):
        return False
    if item.path.name in ("test_triton.py", "test_triton_pairs.py"):
        return True
    return any(str(value).startswith("triton") for value in item.callspec.params.values())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases = defaultdict(list)
    for item in items:
        if _is_interpreted(item):
            cases[item.path, item.originalname].append(item)
    for item in (item for found in cases.values() for item in found):
        if torch.bfloat16 in item.callspec.params.values():
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter computes bfloat16 wrongly"))
    for found in cases.values():
        marker = found[0].get_closest_marker("interpreted_cases")
        count = marker.args[0] if marker else INTERPRETED_CASES
        if len(found) <= count:
            continue
        kept = random.Random(found[0].originalname).sample(range(len(found)), count)
        for index in set(range(len(found))) - set(kept):
            found[index].add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_call_has_passed_its_checks() -> None:
    """Tests change what backends there are and what they take."""
    from hope_kernels.memory import plain

    plain.forget()


@pytest.fixture(scope="session")
def cuda_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA engine's part of the compiled core, its kernels running on the CPU."""
    from tests.cuda_host import backend, build

    if (reason := build.unavailable()) is not None:
        pytest.skip(reason)
    pytest.importorskip("pybind11")
    return backend.compiled(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture(scope="session")
def cuda_host(cuda_module: ModuleType) -> ctypes.CDLL:
    """What that module says about its launches, and its device, which can be changed."""
    return ctypes.CDLL(cuda_module.__file__)
