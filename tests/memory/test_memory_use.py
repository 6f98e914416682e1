"""Memory of forward and backward: a tenth of the eager reference's, growing like the root of the chunks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hope_kernels import MemorySpec, memory_scan
from tests.cases import COMPILED_BACKENDS, Problem, device_of, make_problem

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is read from Linux's /proc"
)

# Makes the inputs, warms up with a tiny call of the same kind, resets the high-water mark of the resident memory,
# runs one forward and backward pass and prints by how many bytes the mark rose.
CHILD = """
import json, sys
from pathlib import Path
import torch
from hope_kernels import MemorySpec
from tests.cases import make_problem, package_results

request = json.loads(sys.argv[1])
backend = request.pop("backend")
torch.set_num_threads(2)

def run(**sizes):
    problem = make_problem(MemorySpec("mlp", "gelu_tanh"), max_lr=0.1, **sizes).cast(torch.float32)
    leaves = problem.map(lambda _, t: t.requires_grad_())
    def call():
        output = package_results(leaves, backend=backend)["output"]
        output.backward(torch.ones_like(output))
        assert all(t.grad.isfinite().all() for t in leaves.tensors.values())
    return call

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

call = run(**request)
run(chunk_size=1, batch=1, tokens=3, heads=1, dim=8, hidden=16)()
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
call()
print(resident("VmHWM") - before)
"""


def peak_bytes(backend: str, **sizes: int) -> int:
    """Growth of the resident memory of a fresh process, freed blocks going back to the system at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    request = json.dumps({"backend": backend, **sizes})
    found = subprocess.run(
        [sys.executable, "-c", CHILD, request],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout.splitlines()[-1])


# The per-token level: a write after every token, so that a state kept per chunk is a state kept per token.
S1 = {"chunk_size": 1, "batch": 2, "tokens": 256, "heads": 4, "dim": 64, "hidden": 256}


@needs_proc
@pytest.mark.parametrize("backend", [b for b in COMPILED_BACKENDS if "cpu" in b.values])
def test_forward_and_backward_of_the_per_token_level_take_a_tenth_of_the_references_memory(backend):
    fused, eager = peak_bytes(backend, **S1), peak_bytes("reference", **S1)
    states = 4 * S1["batch"] * S1["heads"] * S1["tokens"] * 2 * S1["dim"] * S1["hidden"]
    assert eager > states, "the reference keeps every chunk's weights: the measurement misses them"
    assert fused <= eager / 10, f"{fused / 2**20:.0f} MiB against {eager / 2**20:.0f} MiB"


@needs_proc
@pytest.mark.parametrize("backend", [b for b in COMPILED_BACKENDS if "cpu" in b.values])
def test_peak_memory_grows_no_faster_than_the_square_root_of_the_chunks(backend):
    """From 64 to 1024 chunks the states in flight may grow fourfold; tokens are few bytes beside them."""
    sizes = {"chunk_size": 1, "batch": 1, "heads": 4, "dim": 16, "hidden": 1024}
    short, long = peak_bytes(backend, tokens=64, **sizes), peak_bytes(backend, tokens=1024, **sizes)
    tokens = 4 * 1024 * 4 * 16 * 8  # the longer call's output, gradients of its inputs and their like, together
    # A quarter more for what a process allocates besides.
    assert long <= 4 * 1.25 * short + tokens, f"{short / 2**20:.1f} MiB, then {long / 2**20:.1f} MiB"


def saved_state_bytes(problem: Problem, backend: str, **layout: torch.Tensor) -> int:
    """Bytes of all state-sized tensors that autograd keeps between forward and backward."""
    shapes = set(problem.spec.weight_shapes(problem["q"].shape[-1], problem["weight0"].shape[-1]))
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.dim() >= 3 and tuple(t.shape[-2:]) in shapes:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    leaves = problem.map(lambda _, t: t.clone().requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        memory_scan(
            *(leaves[n] for n in ("q", "k", "v", "lr")),
            leaves.weights,
            spec=problem.spec,
            chunk_size=problem.chunk_size,
            momentum=leaves.get("momentum"),
            backend=backend,
            **layout,
        )
    return sum(kept.values())


@pytest.mark.parametrize("layout", ["uniform", "packed"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_what_autograd_keeps_grows_like_the_square_root_of_the_chunks(backend, momentum, layout):
    spec = MemorySpec("mlp", "silu")

    def kept(chunks: int) -> int:
        problem = make_problem(
            spec, chunk_size=2, batch=1, tokens=2 * chunks, heads=2, dim=6, hidden=8, momentum=momentum
        )
        problem = problem.cast(torch.float32).to(device_of(backend))
        offsets = {"cu_seqlens": torch.tensor([0, 3, 2 * chunks], device=problem["q"].device)}
        return saved_state_bytes(problem, backend, **(offsets if layout == "packed" else {}))

    state = 4 * 2 * (6 * 8 + 8 * 6) * (2 if momentum else 1)
    most = 64 if backend == "triton" and device_of(backend).type == "cpu" else 1024  # interpreted, 1024 take minutes
    few, many = kept(16), kept(most)
    assert few >= state, "nothing was kept: the count misses the checkpoints"
    # One state every sqrt(chunks) or more chunks, and the initial one.
    assert many <= (most**0.5 + 2) * state, f"{many} bytes kept for {most} chunks; one state has {state}"
    assert few <= (16**0.5 + 2) * state
