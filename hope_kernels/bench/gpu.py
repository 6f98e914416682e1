"""A GPU's limits, measured: dense matrix products, device-to-device copies; what calls take of its memory; graphs.

On a CPU the two peaks are measured as well, so that everything above runs there (small sizes are then a good idea).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hope_kernels.bench.implementations import REFERENCE, scan
from hope_kernels.bench.problems import Problem
from hope_kernels.bench.shapes import Shape
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


def bytes_kept_by_reference(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes that a forward of the reference at ``shape`` keeps for its backward, inputs included.

    Counted on tensors without memory behind them. Every chunk keeps the same, so two short lengths tell it for all.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def kept(chunks: int) -> int:
        storages: dict[int, Any] = {}  # they are held, so that no address is used twice

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            storages[storage._cdata] = storage
            return x

        with FakeTensorMode():

            def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
                return torch.empty(size, dtype=dtype)

            tokens, heads, dim = chunks * shape.chunk_size, shape.heads, shape.dim
            q, k, v, d_output = (empty(shape.batch, tokens, heads, dim, dtype=dtype) for _ in range(4))
            weights = tuple(empty(heads, *size) for size in shape.spec.weight_shapes(dim, shape.hidden))
            lr = empty(shape.batch, tokens, heads)
            problem = Problem(shape.spec, shape.chunk_size, q, k, v, lr, None, None, weights, d_output)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                scan(problem.requires_grad(), REFERENCE.backend)
        return sum(storage.nbytes() for storage in storages.values())

    two, three = kept(2), kept(3)
    return two + (three - two) * max(0, -(-shape.tokens // shape.chunk_size) - 2)


def capture(call: Callable[[], Any], *, warmup: int = 2, pool: Any = None) -> tuple[Any, torch.cuda.CUDAGraph]:
    """``call`` recorded in a CUDA graph: its results, in the graph's own memory, and the graph.

    ``warmup`` calls run before, on a stream of their own: they compile kernels and fill caches, which a capture may
    not. Graphs that share a ``pool`` of memory are replayed in the order of their capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = call()
    return results, graph
