"""The host layer keeps CUDA's promises: indices, lanes, fragments, barriers; ThreadSanitizer sees a missing barrier.

The layouts of fragments are written down here a second time, from the PTX ISA's figures, element by element.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda_host import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
needs_thread_sanitizer = pytest.mark.skipif(
    build.thread_sanitizer_unavailable() is not None, reason=str(build.thread_sanitizer_unavailable())
)

KERNELS = build.HERE / "layer.cu"
BARRIER_CASES = ("block", "warp", "named", "leavers", "copies", "cluster", "grid")
BARRIER_CALL = re.compile(r"__syncthreads\(|__syncwarp\(|\.sync\(|named_barrier_sync\(")


@pytest.fixture(scope="session")
def layer(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(build.build(tmp_path_factory.mktemp("layer") / "layer.so", [KERNELS])))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [KERNELS, build.HERE / "case_main.cpp"]
    return build.build(tmp_path_factory.mktemp("sanitized") / "layer", sources, thread_sanitizer=True)


def address(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def test_indices_count_up_x_first(layer: ctypes.CDLL) -> None:
    grid, block = np.array([2, 3, 2], np.uint32), np.array([4, 3, 2], np.uint32)
    blocks, threads = int(grid.prod()), int(block.prod())
    found = np.zeros((blocks, threads, 11), np.uint32)
    assert layer.run_indices(address(grid), address(block), address(found)) == 0
    for b in range(blocks):
        for t in range(threads):
            thread = t % 4, t // 4 % 3, t // 12
            block_index = b % 2, b // 2 % 3, b // 6
            assert tuple(found[b, t]) == (*thread, *block_index, 4, 3, 2, t, threads)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not here")
def test_libraries_in_one_process_share_no_shared_memory(layer: ctypes.CDLL) -> None:
    """The statics that stand for shared memory are each library's own, not the process's (GNU unique symbols)."""
    found = subprocess.run(["nm", layer._name], capture_output=True, text=True, check=True).stdout
    kinds = {line.split()[-2] for line in found.splitlines()}
    assert "t" in kinds and "u" not in kinds


def test_shuffles_and_votes_reach_the_lanes_they_name(layer: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    x[40] = 5  # one warp has a lane above 2
    x[:32] = np.clip(x[:32], -2, 2)
    found = np.zeros((64, 12), np.float32)
    assert layer.run_lanes(address(x), address(found)) == 0
    for i in range(64):
        warp, lane, of = i // 32 * 32, i % 32, i // 8 * 8
        positive = x > 0
        ballot = sum(int(positive[warp + 8 + j]) << j for j in range(16))
        eight = sum(int(positive[of + j]) << j for j in range(8))
        expected = [
            x[warp + 5],
            x[i - 3] if lane >= 3 else x[i],
            x[i + 3] if lane + 3 < 32 else x[i],
            x[warp + (lane ^ 9)],
            x[of + (i + 1) % 8],
            ballot,
            int(any(x[warp : warp + 32] > 2)) + 2,
            x[warp + (lane ^ 16)],
            x[i + 2] if lane % 8 + 2 < 8 else x[i],
            eight,
            100 * (i // 8) + i % 8,
            x[i ^ 1] if lane < 16 else x[i ^ 2],
        ]
        np.testing.assert_array_equal(found[i], np.array(expected, np.float32), err_msg=f"thread {i}")


def test_matrices_are_loaded_into_the_fragments_of_the_isa(layer: ctypes.CDLL) -> None:
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    found = np.zeros((32, 15), np.uint32)
    assert layer.run_fragments(address(matrices), address(found)) == 0

    def loaded(m: np.ndarray) -> list[int]:
        """Lane l holds the elements 2l and 2l + 1 of the matrix, row by row."""
        return [int(m.flat[2 * lane]) | int(m.flat[2 * lane + 1]) << 16 for lane in range(32)]

    plain, transposed = [loaded(m) for m in matrices], [loaded(m.T) for m in matrices]
    first, first_t = [plain[0]], [transposed[0]]
    columns = [*plain, *transposed, *plain[:2], *transposed[:2], *first, *first_t, *first_t]
    np.testing.assert_array_equal(found, np.array(columns).T)


def fragment(matrix: np.ndarray, places: list[tuple[int, int]], bits: int) -> list[int]:
    """One register per group of places: the elements at these rows and columns, the first in the low half."""
    per_register = 32 // bits
    values = [int(matrix[place]) for place in places]
    registers = [values[i : i + per_register] for i in range(0, len(values), per_register)]
    return [sum(value << bits * h for h, value in enumerate(register)) for register in registers]


def places(lane: int, bits: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows and columns of a lane's elements of A, B and D, from the figures of the PTX ISA."""
    g, t = lane // 4, lane % 4
    if bits == 16:  # m16n8k16
        a = [(g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)) for i in range(8)]
        b = [(2 * t + i % 2 + 8 * (i // 2), g) for i in range(4)]
    else:  # m16n8k8
        a = [(g + 8 * (i % 2), t + 4 * (i // 2)) for i in range(4)]
        b = [(t + 4 * i, g) for i in range(2)]
    d = [(g + 8 * (i // 2), 2 * t + i % 2) for i in range(4)]
    return a, b, d


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "tf32"])
def test_tensor_core_products_are_products(layer: ctypes.CDLL, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    inner = 8 if kind == "tf32" else 16
    a, b, c = (torch.randn(shape, generator=generator) for shape in ((16, inner), (inner, 8), (16, 8)))
    if kind == "tf32":
        bits, left, right = 32, a.numpy().view(np.uint32), b.numpy().view(np.uint32)
        # Rounded to ten fraction bits, as cvt.rna does; no operand here is a tie.
        a, b = ((torch.from_numpy((x + 0x1000) & 0xFFFFE000).view(torch.float32)) for x in (left, right))
    else:
        bits, dtype = 16, getattr(torch, kind)
        a, b = a.to(dtype), b.to(dtype)
        left, right = (x.view(torch.int16).numpy().view(np.uint16) for x in (a, b))
    parts = [places(lane, bits) for lane in range(32)]
    left_registers = np.array([fragment(left, p[0], bits) for p in parts], np.uint32)
    right_registers = np.array([fragment(right, p[1], bits) for p in parts], np.uint32)
    sums = np.array([[float(c[place]) for place in p[2]] for p in parts], np.float32)
    number = ["bfloat16", "float16", "tf32"].index(kind)
    assert layer.run_product(number, address(left_registers), address(right_registers), address(sums)) == 0
    product = torch.zeros(16, 8)
    for lane, (_, _, d) in enumerate(parts):
        for i, place in enumerate(d):
            product[place] = float(sums[lane, i])
    torch.testing.assert_close(product.double(), a.double() @ b.double() + c.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("cooperative", "blocks", "cluster", "shared_bytes", "error"),
    [
        # Three blocks cannot run together on a device of two multiprocessors.
        pytest.param(1, 3, 1, 0, "cudaErrorCooperativeLaunchTooLarge", id="too-many-blocks-together"),
        pytest.param(0, 3, 2, 0, "cudaErrorInvalidConfiguration", id="no-whole-number-of-clusters"),
        pytest.param(0, 1, 1, 300_000, "cudaErrorInvalidValue", id="more-shared-memory-than-there-is"),
    ],
)
def test_impossible_launches_are_refused(
    layer: ctypes.CDLL, cooperative: int, blocks: int, cluster: int, shared_bytes: int, error: str
) -> None:
    message = ctypes.create_string_buffer(256)
    ok = layer.run_refused(cooperative, blocks, cluster, ctypes.c_size_t(shared_bytes), message, ctypes.c_size_t(256))
    assert ok == 0
    assert message.value.decode().startswith("refused: ")
    assert error in message.value.decode()


@needs_thread_sanitizer
@pytest.mark.parametrize("case", BARRIER_CASES)
def test_barriers_order_memory_and_each_is_missed(sanitized: Path, tmp_path: Path, case: str) -> None:
    assert build.races(sanitized, case) == []
    passed = build.barriers(sanitized, tmp_path / "barriers", case)
    assert passed
    for barrier in passed:
        assert build.races(sanitized, case, without=barrier), f"taking out {barrier} goes unnoticed"


@needs_thread_sanitizer
def test_every_barrier_of_the_kernels_is_tried(sanitized: Path, tmp_path: Path) -> None:
    tried = {one for case in BARRIER_CASES for one in build.barriers(sanitized, tmp_path / case, case)}
    lines = enumerate(KERNELS.read_text().splitlines(), 1)
    written = {f"layer.cu:{number}": line for number, line in lines if BARRIER_CALL.search(line)}
    elsewhere = [line.strip() for barrier, line in written.items() if barrier not in tried]
    # The first takes its input from a caller, the second hangs.
    assert elsewhere == ["__syncwarp();", "__global__ void left_alone() { named_barrier_sync(3, 64); }"]


@needs_thread_sanitizer
@pytest.mark.parametrize("case", ["shuffle", "blocks"])
def test_what_orders_nothing_in_cuda_orders_nothing_here(sanitized: Path, case: str) -> None:
    """A shuffle is no barrier; blocks run one after the other here, and yet a race between them is one."""
    assert build.races(sanitized, case)


@needs_thread_sanitizer
def test_a_barrier_that_nobody_else_reaches_is_named_instead_of_hanging(sanitized: Path) -> None:
    result = build.run(sanitized, "alone", CUDA_HOST_PATIENCE="1")
    assert result.returncode != 0
    assert re.search(r"waits for ever at named_barrier_sync, .*layer\.cu:\d+: not all threads arrive", result.stderr)


def test_both_versions_of_the_instructions_have_the_same_names() -> None:
    def names(path: Path) -> set[str]:
        text = path.read_text().split("namespace host {")
        public = text[0] + text[-1].split("}  // namespace host")[-1]
        return set(re.findall(r"^(?! )[\w:*& ]+[ *&](\w+)\(", public, re.M))

    device = names(build.ROOT / "csrc/cuda/ptx.h") - {"shared_address"}  # which only the PTX needs
    host = names(build.HERE / "include/cuda/ptx.h") - {"named_barrier"}
    assert device == host
    assert {"mma_bf16", "ldmatrix", "dynamic_shared", "cp_async_wait", "named_barrier_sync"} <= device
