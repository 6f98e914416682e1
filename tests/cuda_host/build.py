"""Compiles .cu files for the CPU with the host layer of this folder; `include/cuda_runtime.h` says how it works.

library = build(folder / "kernels.so", [ROOT / "csrc/cuda/kernels.cu", HERE / "driver.cu"])
program = build(folder / "kernels", [...], thread_sanitizer=True)
races(program, "case")                                  # [] or the reports
races(program, "case", without="kernels.cu:123")        # with the barrier of that line taken out
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RACES_FOUND = 66  # exit status of a program in which ThreadSanitizer saw a race
TSAN_OPTIONS = f"atexit_sleep_ms=0 exitcode={RACES_FOUND}"
LAYER = HERE / "execution.cpp"


@cache
def toolkit() -> Path | None:
    """Where the CUDA toolkit lies, whose headers hold the types."""
    nvcc = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"
    places = [Path(name) for name in named if name] + ([Path(nvcc).resolve().parents[1]] if nvcc else [])
    return next((place for place in places if (place / "include" / "cuda_bf16.h").exists()), None)


@cache
def unavailable() -> str | None:
    """Why kernels cannot be compiled for the CPU here, or None."""
    if shutil.which("g++") is None:
        return "the host layer is compiled with g++, which is not here"
    if os.uname().sysname != "Linux":
        return "the host layer's threads use Linux futexes"
    if toolkit() is None:
        return "the CUDA toolkit's headers were not found (cuda_bf16.h; CUDA_HOME names the toolkit)"
    return None


@cache
def thread_sanitizer_unavailable() -> str | None:
    """Why ThreadSanitizer cannot be used here, or None."""
    if (reason := unavailable()) is not None:
        return reason
    command = ["g++", "-fsanitize=thread", "-x", "c++", "-", "-o", "/dev/null"]
    found = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
    return None if found.returncode == 0 else f"g++ has no ThreadSanitizer here: {found.stderr.strip()[-200:]}"


def _compile(output: Path, source: Path, flags: Sequence[str]) -> None:
    includes = ["-I", str(HERE / "include"), "-I", str(ROOT / "csrc"), "-isystem", str(toolkit() / "include")]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # No unique symbols: two libraries in one process would share the static variables that stand for shared memory.
    command = ["g++", "-x", "c++", "-std=c++17", "-fPIC", "-fno-gnu-unique", *warnings, *flags, *includes]
    _run([*command, "-c", str(source), "-o", str(output)])


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="cuda_host")
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


@cache
def _object(source: Path, flags: tuple[str, ...]) -> Path:
    """An object file, compiled once for each set of flags: most kernels take long, and several tests use them."""
    output = _folder() / f"{source.name}.{zlib.crc32(repr((source, flags)).encode())}.o"
    _compile(output, source, flags)
    return output


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"


def build(output: Path, sources: list[Path], *, thread_sanitizer: bool = False, options: Sequence[str] = ()) -> Path:
    """A shared library (`output` ends in .so) or a program of these sources, CUDA and C++, with the host layer.

    ``options`` are for the C++ sources alone.
    """
    # -O1 keeps the sanitizer's reports readable and compiles in half the time of -O2.
    # An access that is not aligned to its type is a fault on a GPU. Here the sanitizer finds it, and ends the program.
    sanitizers = ["-g", "-fsanitize=thread", "-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    flags = ("-O1", *(sanitizers if thread_sanitizer else ()))
    objects = [output.with_name(f"{output.name}.{source.name}.o") for source in sources]

    def compiled(source: Path, own: Path) -> Path:
        if source.suffix == ".cu" or source == LAYER:
            return _object(source, flags)
        _compile(own, source, [*flags, *options])
        return own

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compiled, [*sources, LAYER], [*objects, LAYER]))
    kind = ["-shared"] if output.suffix == ".so" else []
    _run(["g++", *flags[1:], *kind, *map(str, objects), "-pthread", "-o", str(output)])
    return output


def python_module(folder: Path, name: str, sources: list[Path]) -> ModuleType:
    """A Python module of these sources, one of which says PYBIND11_MODULE(name, ..), with the host layer."""
    import pybind11

    options = ["-fvisibility=hidden", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    specification = spec_from_file_location(name, build(folder / f"{name}.so", sources, options=options))
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program; a kernel that hangs says so after some seconds."""
    variables = os.environ | {"TSAN_OPTIONS": TSAN_OPTIONS} | environment
    command = [str(program), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def races(program: Path, *arguments: str, without: str | None = None) -> list[str]:
    """What ThreadSanitizer reports: one text per race.

    ``without`` takes its order away from the barrier at ``file.cu:line``.
    """
    environment = {} if without is None else {"CUDA_HOST_SKIP_BARRIER": without}
    result = run(program, *arguments, **environment)
    reports = re.findall(r"^WARNING: ThreadSanitizer: data race.*?^SUMMARY: .*?$", result.stderr, re.M | re.S)
    assert result.returncode in (0, RACES_FOUND), f"exit status {result.returncode}\n{result.stderr[-3000:]}"
    assert bool(reports) == (result.returncode == RACES_FOUND), result.stderr[-3000:]
    return reports


def barriers(program: Path, report: Path, *arguments: str) -> list[str]:
    """The barriers that a run passes, each ``file.cu:line``."""
    result = run(program, *arguments, CUDA_HOST_BARRIERS=str(report))
    assert result.returncode == 0, result.stderr[-3000:]
    return [line.split()[0] for line in report.read_text().splitlines()]
