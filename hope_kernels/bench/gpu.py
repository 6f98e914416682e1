"""A GPU's limits, measured: dense matrix products, device-to-device copies; peak memory of a call.

On a CPU the two peaks are measured as well, so that everything above runs there (small sizes are then a good idea).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hope_kernels.bench.timing import Timer


def gemm_peak(dtype: torch.dtype, device: torch.device | str = "cuda", *, size: int = 8192, repeats: int = 15) -> float:
    """Operations per second (multiply-add = 2) of the fastest of ``repeats`` products of two ``[size, size]``."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timer = Timer(device)
    seconds = [timer(lambda: torch.mm(a, b, out=out)) for _ in range(3 + repeats)][3:]
    return 2 * size**3 / min(seconds)


def copy_peak(device: torch.device | str = "cuda", *, size: int = 1 << 31, repeats: int = 15) -> float:
    """Bytes per second, read and written together, of the fastest of ``repeats`` copies of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    timer = Timer(device)
    seconds = [timer(lambda: to.copy_(source)) for _ in range(3 + repeats)][3:]
    return 2 * size / min(seconds)


def peak_memory(call: Callable[[], object], device: torch.device | str) -> int:
    """Bytes by which one call raises the memory torch has allocated on a GPU: results and temporaries, not inputs."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del results
    return peak - before
