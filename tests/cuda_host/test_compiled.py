"""Every CUDA source compiles alone for each architecture, and its kernels keep their numbers in registers.

The kernels that test the host layer are among them: what is tested there is CUDA.

`nvcc -std=c++17 -Icsrc -c`, with no definition on the command line; registers, stack and spills are ptxas's own words.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hope_kernels.bench.cuda_resources import Kernel, compile_source, nvcc, read_report
from tests.cuda_host import build

pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc is not here; the CUDA sources are not compiled")

CSRC = build.ROOT / "csrc"
KERNELS = CSRC / "cuda"
# Registers of a thread. With 80, three blocks of 256 threads share a multiprocessor's 65536.
REGISTERS = {KERNELS / "level_update.cu": 80, build.HERE / "layer.cu": 255}
HOST_ONLY = {KERNELS / "scan_forward.cu", KERNELS / "scan_backward.cu"}  # their kernels have files of their own
# Those that take long to compile are left to the slow tier.
SOURCES = [
    *REGISTERS,
    *(pytest.param(s, marks=pytest.mark.slow) for s in sorted(KERNELS.glob("*.cu")) if s not in REGISTERS),
]


# A kernel that is allowed too few registers.
SPILLING = (
    "__global__ void __launch_bounds__(1024, 2) spilling(float* x) {\n"
    "  float kept[64];\n"
    "  for (int i = 0; i < 64; ++i) kept[i] = x[i * 1024 + threadIdx.x];\n"
    "  for (int round = 0; round < 100; ++round)\n"
    "#pragma unroll\n"
    "    for (int i = 0; i < 64; ++i) kept[i] = kept[i] * kept[(i + 1) % 64] + x[round];\n"
    "  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = kept[i];\n"
    "}\n"
)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_source_compiles_alone_and_nothing_spills(source: Path, architecture: int, tmp_path: Path) -> None:
    kernels = compile_source(source, tmp_path, CSRC, [architecture], ptx=False).kernels
    assert bool(kernels) == (source not in HOST_ONLY)
    for kernel in kernels:
        assert kernel.failures == [], kernel
        assert kernel.architecture == architecture
        assert 0 < kernel.registers <= REGISTERS.get(source, 255), kernel


def test_a_spill_is_reported(tmp_path: Path) -> None:
    """The gate can close: a kernel that is allowed too few registers."""
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    (kernel,) = compile_source(source, tmp_path, CSRC, [90], ptx=False).kernels
    assert kernel.spill_store_bytes > 0 and kernel.failures[0].startswith("spills: ")
    assert kernel.name == "spilling"


def test_the_report_of_a_spill_fails_and_is_written_for_programs_and_people(tmp_path: Path) -> None:
    source, broken = tmp_path / "spilling.cu", tmp_path / "broken.cu"
    source.write_text(SPILLING)
    broken.write_text("this is no source")
    report = tmp_path / "report.json"
    command = [sys.executable, str(build.ROOT / "benchmarks/cuda_resources.py"), "--json", str(report), "--source"]
    found = subprocess.run([*command, str(source), str(broken)], capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stderr
    content = json.loads(report.read_text())
    assert content["passed"] is False and content["broken"][0].startswith("broken.cu: ")
    assert {row["architecture"] for row in content["rows"]} == {80, 90}
    assert all(row["failures"] for row in content["rows"])
    text = report.with_suffix(".md").read_text()
    assert "| spilling.cu | spilling | sm_90 |" in text and "FAILS" in text and "* broken.cu" in text


def test_kernels_are_named_as_they_are_written() -> None:
    said = (
        "ptxas info    : Compiling entry function '_ZN4hope4cuda1fILNS_5DTypeE2EEEvi' for 'sm_90'\n"
        "ptxas info    : Function properties for x\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 30 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]\n"
    )
    (kernel,) = read_report("f.cu", said)
    assert kernel == Kernel("f.cu", "f<bfloat16>", 90, 30, 0, 0, 0, 128)
