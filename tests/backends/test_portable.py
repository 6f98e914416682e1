"""The CPU engine with other compilers and for other processors, over the random problems of the sanitizers.

Each build is one instruction set, the portable one, compiled without CMake: what a new platform needs at least. The
sums of its results are held against those of the machine's own compiler. Skipped where a compiler or the emulator is
missing.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    ROOT / path
    for path in (
        "tests/sanitize/driver.cpp",
        "csrc/cpu/variant.cpp",
        "csrc/cpu/engine.cpp",
        "csrc/cpu/thread_pool.cpp",
    )
]
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-pthread"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-DHOPE_ISA=baseline", f"-I{ROOT / 'csrc'}"]
CASES = 40
# Of the sum of magnitudes: one rounding of a result, and what the order of sums and the activations' errors make of it.
TOLERANCES = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 4e-3, "float16": 1e-3}

Sums = dict[tuple[str, str], tuple[str, float, float]]


def sums_of(build: Path, compiler: list[str], emulator: list[str]) -> Sums:
    """Compile the driver, run it; by case and result: element type, sum, sum of magnitudes."""
    driver, file = build / "driver", build / "sums.txt"
    compiled = subprocess.run(
        [*compiler, *FLAGS, *map(str, SOURCES), "-o", str(driver), "-ldl"], capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run(
        [*emulator, str(driver), str(CASES), "0", str(file)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    sums: Sums = {}
    for number, line in enumerate(file.read_text().splitlines()):
        case, name, dtype, total, magnitude = line.split()
        sums[f"{number} case {case}", name] = (dtype, float(total), float(magnitude))
    return sums


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Sums:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return sums_of(tmp_path_factory.mktemp("own"), [compiler, "-Wno-maybe-uninitialized"], [])


BUILDS = {
    "clang": (["clang++"], []),
    "arm64": (["aarch64-linux-gnu-g++", "-Wno-maybe-uninitialized", "-static"], ["qemu-aarch64"]),
}


@pytest.mark.parametrize("build", BUILDS)
def test_another_build_computes_the_same(build: str, own: Sums, tmp_path: Path) -> None:
    compiler, emulator = BUILDS[build]
    if build == "arm64" and platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this machine's own build is one for arm64")
    for tool in (compiler[0], *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    found = sums_of(tmp_path, compiler, emulator)
    assert found.keys() == own.keys()
    for key, (dtype, total, magnitude) in own.items():
        _, other, other_magnitude = found[key]
        allowed = TOLERANCES[dtype] * max(1.0, magnitude)
        assert abs(other - total) <= allowed and abs(other_magnitude - magnitude) <= allowed, (key, found[key])
