"""Peak memory of one call, measured in a process of its own.

On a CPU: the child makes the inputs, runs a tiny call of the same kind (libraries loaded, thread pools started), notes
its resident memory as the baseline, sets the kernel's high-water mark back to it, runs the real call once and reports
by how much the high-water mark exceeds the baseline. Inputs are therefore not counted, outputs and gradients are.
The child's allocator returns every large block to the system when it is freed, so that one temporary does not hide
behind the memory another left. Where the mark cannot be set back (no ``/proc``), growth beyond the process's earlier
peak is reported, a lower bound. On a GPU: growth of the peak that torch's allocator counts.

``python -m hope_kernels.bench.peak_memory REQUEST`` is the child; :func:`measure_peak_memory` starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from hope_kernels.bench.shapes import Shape

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def measure_peak_memory(
    shape: Shape,
    backend: str,
    mode: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> int:
    """Bytes by which one call of ``backend`` on ``shape`` raises the peak memory of a fresh process.

    Raises:
        RuntimeError: the child failed; the message holds what it printed.
    """
    request = {
        "shape": asdict(shape),
        "backend": backend,
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    # A fixed mmap threshold keeps glibc from raising it, after which freed blocks would stay in the heap.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    child = subprocess.run(
        [sys.executable, "-m", "hope_kernels.bench.peak_memory", json.dumps(request)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        raise RuntimeError(
            f"measuring the memory of {backend} at {shape.name} failed (exit {child.returncode}):\n{child.stderr}"
        )
    return int(json.loads(child.stdout.splitlines()[-1])["peak_bytes"])


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


def _earlier_peak() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")  # see proc(5): resets VmHWM to the present resident size
    except OSError:
        return False
    return True


def _child(request: dict) -> int:
    from hope_kernels.bench.implementations import Implementation, make_call
    from hope_kernels.bench.problems import shape_problem

    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["dtype"])
    shape, device, mode = Shape(**request["shape"]), request["device"], request["mode"]
    implementation = Implementation(request["backend"])

    def prepare(sized: Shape):
        problem = shape_problem(sized, dtype=dtype, device=device, seed=request["seed"])
        return make_call(implementation, problem, mode)

    call = prepare(shape)
    chunk = min(shape.chunk_size, 4)
    prepare(shape.scaled(batch=1, tokens=2 * chunk, heads=2, dim=8, hidden=16, chunk_size=chunk))()

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        baseline = torch.cuda.memory_allocated(device)
        results = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    elif _STATUS.exists() and _reset_high_water_mark():
        baseline = _status_bytes("VmRSS")
        results = call()
        peak = _status_bytes("VmHWM")
    else:
        baseline = _earlier_peak()
        results = call()
        peak = _earlier_peak()
    if not all(torch.isfinite(value).all() for value in results.values()):
        raise RuntimeError("the measured call returned numbers that are not finite")
    return max(0, peak - baseline)


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": _child(json.loads(sys.argv[1]))}))
