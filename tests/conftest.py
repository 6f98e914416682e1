"""Settings of the whole suite: hypothesis profiles, and how the GPUs' engines are tested without one.

`HYPOTHESIS_PROFILE=thorough` draws many more, and random, examples; the default profile draws the same ones on every
run."""

from __future__ import annotations

import ctypes
import os
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

# In Triton's interpreter a case takes seconds. Of a test's cases only those run that together show every two values of
# its parameters (see `tests.fewest`): in the default tier the first of them, or as many as the test's marker
# `interpreted_cases(n)` says, in the slow tier the others.
INTERPRETED_CASES = 1


def _is_interpreted(item: pytest.Item) -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1" or not hasattr(item, "callspec"):
        return False
    if item.path.name in ("test_triton.py", "test_triton_pairs.py"):
        return True
    return any(str(value).startswith("triton") for value in item.callspec.params.values())


def pytest_sessionstart() -> None:
    from hope_kernels import available_backends
    from tests.interpreter import patch_once_per_launch

    if available_backends()["triton"].interpreted:
        patch_once_per_launch()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from tests.fewest import by_what_they_add

    cases, left_out = defaultdict(list), set()
    for item in items:
        if not _is_interpreted(item):
            continue
        if torch.bfloat16 in item.callspec.params.values():  # the interpreter computes it wrongly
            left_out.add(item)
        else:
            cases[item.path, item.originalname].append(item)
    for found in cases.values():
        marker = found[0].get_closest_marker("interpreted_cases")
        default = marker.args[0] if marker else INTERPRETED_CASES
        order, enough = by_what_they_add([item.callspec.params for item in found], found[0].originalname)
        for index in order[default:]:
            found[index].add_marker(pytest.mark.slow)
        left_out.update(found[index] for index in order[max(default, enough) :])
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


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
