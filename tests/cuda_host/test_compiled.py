"""Every CUDA source compiles alone for each architecture, and its kernels keep their numbers in registers.

The kernels that test the host layer are among them: what is tested there is CUDA.

`nvcc -std=c++17 -Icsrc -c`, with no definition on the command line; registers, stack and spills are ptxas's own words.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda_host import build

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not here; the CUDA sources are not compiled"
)

KERNELS = build.ROOT / "csrc/cuda"
# Registers of a thread. With 80, three blocks of 256 threads share a multiprocessor's 65536.
REGISTERS = {KERNELS / "level_update.cu": 80, build.HERE / "layer.cu": 255}
WITH_KERNELS = {source for source in [*KERNELS.glob("*.cu"), *REGISTERS] if source.name != "scan_forward.cu"}
# Those that take long to compile are left to the slow tier.
SOURCES = [
    *REGISTERS,
    *(pytest.param(s, marks=pytest.mark.slow) for s in sorted(KERNELS.glob("*.cu")) if s not in REGISTERS),
]


class Kernel(NamedTuple):
    name: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int


def compiled(source: Path, architecture: int, folder: Path) -> list[Kernel]:
    """The kernels of a source, as `-Xptxas -v` reports them."""
    options = ["-std=c++17", f"-I{build.ROOT / 'csrc'}", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    command = ["nvcc", *options, "-c", str(source), "-o", str(folder / "kernels.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.S,
    )
    return [Kernel(found[0], *map(int, found[1:])) for found in report.findall(result.stderr)]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_source_compiles_alone_and_nothing_spills(source: Path, architecture: int, tmp_path: Path) -> None:
    kernels = compiled(source, architecture, tmp_path)
    assert kernels or source not in WITH_KERNELS
    for kernel in kernels:
        assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), kernel
        assert kernel.registers <= REGISTERS.get(source, 255), kernel


def test_a_spill_is_reported(tmp_path: Path) -> None:
    """The gate can close: a kernel that is allowed too few registers."""
    source = tmp_path / "spilling.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spilling(float* x) {\n"
        "  float kept[64];\n"
        "  for (int i = 0; i < 64; ++i) kept[i] = x[i * 1024 + threadIdx.x];\n"
        "  for (int round = 0; round < 100; ++round)\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < 64; ++i) kept[i] = kept[i] * kept[(i + 1) % 64] + x[round];\n"
        "  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = kept[i];\n"
        "}\n"
    )
    (kernel,) = compiled(source, 90, tmp_path)
    assert kernel.spill_stores > 0
