"""Bad arguments of ``level_update`` are refused before anything is written; the message names them."""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import hope_kernels.backends
from hope_kernels.backends import implementation
from hope_kernels.optim import UpdateLevel, level_update

X = torch.randn(4, 3)


def level(**changes: Any) -> UpdateLevel:
    made = UpdateLevel.zeros([torch.randn(4, 3), torch.randn(5)], period=2, copy_dtype=torch.bfloat16)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


BAD_LEVELS = {
    "period": ({"period": 0}, ValueError, r"levels\[0\]\.period: got 0; want an int of at least 1"),
    "period-kind": ({"period": 2.0}, TypeError, r"levels\[0\]\.period: got 2\.0 \(float\)"),
    "rule": ({"rule": "lion"}, ValueError, r"levels\[0\]\.rule: got 'lion'; want one of 'sgd', 'momentum', 'adam'"),
    "lr": ({"lr": -1.0}, ValueError, r"levels\[0\]\.lr: got -1\.0; want a finite number of at least 0"),
    "lr-tensor": ({"lr": torch.tensor(1.0)}, TypeError, r"levels\[0\]\.lr: got a tensor"),
    "betas": ({"betas": (0.9, 1.0)}, ValueError, r"levels\[0\]\.betas\[1\]: got 1\.0"),
    "betas-count": ({"betas": (0.9,)}, TypeError, r"levels\[0\]\.betas: got \(0\.9,\)"),
    "eps": ({"eps": float("nan")}, ValueError, r"levels\[0\]\.eps: got nan"),
    "decay": ({"weight_decay": -0.1}, ValueError, r"levels\[0\]\.weight_decay: got -0\.1"),
    "decays": ({"weight_decay": [0.1]}, ValueError, r"levels\[0\]\.weight_decay: got 1 entries; want 2"),
    "decays-one": ({"weight_decay": [0.1, "a"]}, TypeError, r"levels\[0\]\.weight_decay\[1\]: got 'a'"),
    "scale": ({"scale": float("inf")}, ValueError, r"levels\[0\]\.scale: got inf"),
    "max_norm": ({"max_norm": 0.0}, ValueError, r"levels\[0\]\.max_norm: got 0\.0; want a positive number, or None"),
    "nesterov": ({"nesterov": 1}, TypeError, r"levels\[0\]\.nesterov: got 1 \(int\); want a bool"),
    "params": ({"params": X}, TypeError, r"levels\[0\]\.params: got a tensor"),
    "param": ({"params": [X, None]}, TypeError, r"levels\[0\]\.params\[1\]: got None"),
    "param-dtype": (
        {"params": [X.half(), X]},
        TypeError,
        r"levels\[0\]\.params\[0\]: .*float16.*want a dense tensor of torch\.float32",
    ),
    "param-strides": (
        {"params": [torch.randn(3, 4).t(), torch.randn(5)]},
        ValueError,
        r"levels\[0\]\.params\[0\]: .* with strides \(1, 4\); want it contiguous",
    ),
    "no-accumulators": ({"accumulators": None}, ValueError, r"levels\[0\]\.accumulators: got None; a period above 1"),
    "no-second": ({"second_moments": None}, ValueError, r"levels\[0\]\.second_moments: got None; rule 'adam' wants"),
    "accumulators": (
        {"accumulators": [torch.zeros(4, 3)]},
        ValueError,
        r"levels\[0\]\.accumulators: got 1 entries; want 2",
    ),
    "moment-shape": (
        {"first_moments": [torch.zeros(3, 4), torch.zeros(5)]},
        ValueError,
        r"levels\[0\]\.first_moments\[0\]: got a tensor of shape \(3, 4\).*want the shape of its parameter, \(4, 3\)",
    ),
    "moment-dtype": (
        {"first_moments": [torch.zeros(4, 3).half(), torch.zeros(5)]},
        TypeError,
        r"levels\[0\]\.first_moments\[0\]: .*float16.*want a dense tensor of torch\.float32",
    ),
    "copies": (
        {"copies": [torch.zeros(4, 3), None]},
        TypeError,
        r"levels\[0\]\.copies\[0\]: .*want a dense tensor of torch\.bfloat16 or torch\.float16",
    ),
    "copies-device": (
        {"copies": [torch.zeros(4, 3, dtype=torch.bfloat16, device="meta"), None]},
        ValueError,
        r"levels\[0\]\.copies\[0\]: .*want the device of its parameter, cpu",
    ),
}


@pytest.mark.parametrize("case", BAD_LEVELS)
def test_a_level_that_does_not_fit_is_named(case: str) -> None:
    changes, error, message = BAD_LEVELS[case]
    with pytest.raises(error, match=message):
        level_update([level(**changes)], [[X, torch.randn(5)]], 1)


BAD_CALLS = {
    "levels": ({"levels": level()}, TypeError, r"levels: got UpdateLevel"),
    "level": ({"levels": [3]}, TypeError, r"levels\[0\]: got 3 \(int\); want an UpdateLevel"),
    "grads": ({"grads": [[X]]}, ValueError, r"grads\[0\]: got 1 entries; want 2, one for each of levels\[0\]\.params"),
    "grads-levels": ({"grads": []}, ValueError, r"grads: got 0 entries; want 1, one for each of levels"),
    "grad": ({"grads": [[X, 1.0]]}, TypeError, r"grads\[0\]\[1\]: got 1\.0 \(float\); want a dense tensor or None"),
    "grad-dtype": ({"grads": [[X.double(), None]]}, TypeError, r"grads\[0\]\[0\]: .*float64.*want float32, bfloat16"),
    "grad-shape": ({"grads": [[X, torch.randn(6)]]}, ValueError, r"grads\[0\]\[1\]: got a tensor of shape \(6,\)"),
    "step": ({"step": -1}, ValueError, r"step: got -1; want an int of at least 0"),
    "step-tensor": ({"step": torch.tensor(1)}, TypeError, r"step: got a tensor"),
    "grad_scale": ({"grad_scale": float("inf")}, ValueError, r"grad_scale: got inf; want a finite number"),
    "max_norm": ({"max_norm": -1.0}, ValueError, r"max_norm: got -1\.0; want a positive number"),
    "two-bounds": (
        {"levels": [level(max_norm=1.0)], "max_norm": 1.0},
        ValueError,
        r"max_norm: got 1\.0 together with levels\[0\]\.max_norm",
    ),
    "backend": ({"backend": "metal"}, ValueError, r"backend is 'metal'"),
    "triton": ({"backend": "triton"}, RuntimeError, r"backend='triton' cannot run this: level_update runs on"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_an_argument_that_does_not_fit_is_named(case: str) -> None:
    changes, error, message = BAD_CALLS[case]
    arguments = {"levels": [level()], "grads": [[X, torch.randn(5)]], "step": 1} | changes
    with pytest.raises(error, match=message):
        level_update(**arguments)


def test_tensors_that_share_memory_are_refused() -> None:
    shared = torch.randn(10)
    made = UpdateLevel.zeros([shared[:6], shared[5:]], rule="sgd")
    with pytest.raises(ValueError, match=r"levels\[0\]\.params\[1\]: got memory that levels\[0\]\.params\[0\] has too"):
        level_update([made], [[None, None]], 0)
    neighbours = UpdateLevel.zeros([shared[:5], shared[5:]], rule="sgd")
    assert level_update([neighbours], [[None, None]], 0).due == (True,)


def test_a_refused_call_writes_nothing() -> None:
    made = level()
    before = [x.clone() for x in (*made.params, *made.accumulators)]
    with pytest.raises(ValueError, match="grads"):
        level_update([made], [[X, torch.randn(6)]], 1)
    assert all(torch.equal(x, y) for x, y in zip((*made.params, *made.accumulators), before, strict=True))


@pytest.fixture
def cuda() -> ModuleType:
    """The runtime of the `cuda` backend as it is, whatever other tests have put in its place."""
    (folder,) = hope_kernels.backends.__path__
    specification = importlib.util.spec_from_file_location("runtime_as_it_is", f"{folder}/cuda/runtime.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_cuda_engine_says_what_it_was_built_for_or_why_it_is_not_there(cuda: ModuleType) -> None:
    status = cuda.built()
    if status:
        assert "sm_" in status.reason
        assert cuda.device_refused(cuda.load(), torch.device("cpu")) == "it needs CUDA tensors, got cpu"
    else:
        assert cuda.load() == status.reason
        assert "nvcc" in status.reason or "does not load" in status.reason


@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True), ((10, 0), True)]
)
def test_an_architecture_that_was_not_built_is_named(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    reason = cuda.device_refused(SimpleNamespace(cuda_architectures="80 90"), torch.device("cuda", 0))
    if runs:
        assert reason is None
    else:
        assert reason == "it was built for sm_80, sm_90 and PTX of the newest; a GPU is sm_75"


def test_a_build_without_nvcc_is_told_from_one_that_does_not_load(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "import_module", lambda name: SimpleNamespace())
    assert "built without CUDA kernels" in cuda.load()
    with pytest.raises(RuntimeError, match="not available: the compiled core was built without"):
        cuda.loaded()
    monkeypatch.setattr(cuda, "import_module", lambda name: importlib.import_module("no_such_core"))
    assert "does not load: No module named 'no_such_core'" in cuda.built().reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_a_cuda_call_is_an_error_and_no_crash(cuda: ModuleType) -> None:
    core = cuda.load()
    if isinstance(core, str):
        pytest.skip(core)
    table = (0, True, False, *[0.0] * 10)
    norms = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"level_update chooses its device: .*\(cudaError"):
        core.cuda_level_update((), (table,), 1.0, 0.0, norms.data_ptr(), norms.data_ptr(), 4096, 0, 0)


def test_without_a_choice_the_engine_of_the_device_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = implementation("cpu")
    if not engine.status():
        pytest.skip(engine.status().reason)
    ran = []
    original = engine.level_update
    monkeypatch.setattr(engine, "level_update", lambda problem: ran.append("cpu") or original(problem))
    level_update([level()], [[X, None]], 1)
    assert ran == ["cpu"]
    level_update([level()], [[X, None]], 1, backend="reference")
    assert ran == ["cpu"]
