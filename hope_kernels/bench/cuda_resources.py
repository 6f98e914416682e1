"""The resources of the CUDA kernels, as the compiler reports them; needs nvcc, no GPU.

Every source is compiled alone, as ``nvcc -std=c++17 -Icsrc`` with no definition on the command line, to machine code of
each architecture and to PTX: of the newest one for what knows its instructions, clusters of blocks (``*_cluster.cu``),
of the oldest one for all else, whose machine code comes from that PTX too. A kernel is to keep its numbers in
registers: one that spills, or whose stack is not empty, must not be shipped. Shared memory is what a kernel has fixed;
what scans take beside it depends on the chunk and is chosen at the launch.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ARCHITECTURES = (80, 90)
DTYPES = ("float32", "float64", "bfloat16", "float16")  # in the order of hope::DType
_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


class DoesNotCompileError(RuntimeError):
    """nvcc refuses a source; the message is what it says."""


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; bytes per thread, but shared memory per block."""

    source: str
    name: str
    architecture: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int

    @property
    def failures(self) -> list[str]:
        """Why it must not be shipped; empty if it may."""
        if not (self.stack_bytes or self.spill_store_bytes or self.spill_load_bytes):
            return []
        spilled = f"{self.spill_store_bytes} B stored, {self.spill_load_bytes} B loaded"
        return [f"spills: {self.stack_bytes} B of stack, {spilled}"]

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"failures": self.failures}


@dataclass(frozen=True)
class Compiled:
    """A source: its kernels, architecture by architecture, and the seconds of a processor it took."""

    source: Path
    kernels: tuple[Kernel, ...]
    seconds: float


def nvcc() -> str | None:
    """The compiler, or None where it is not."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version() -> str:
    """``13.0.88``, as nvcc says it."""
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    return found[1] if found else said.strip().splitlines()[-1]


def compile_source(
    source: Path, folder: Path, include: Path, architectures: Sequence[int] = ARCHITECTURES, *, ptx: bool = True
) -> Compiled:
    """A source compiled into ``folder``.

    Args:
        source: a ``.cu`` file.
        folder: where the object goes.
        include: the folder its includes are found in (``csrc``).
        architectures: as in ``sm_80``: 80.
        ptx: whether the object has PTX as well.

    Raises:
        DoesNotCompileError: with nvcc's words; or a kernel's report is not one that :func:`read_report` understands.
    """
    target = folder / f"{source.stem}.o"
    command = [
        str(nvcc()),
        "-std=c++17",
        f"-I{include}",
        *_targets(source, architectures, ptx),
        "-Xptxas=-v",
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if result.returncode:
        raise DoesNotCompileError(f"{source.name}: {result.stderr.strip()}")
    kernels = tuple(read_report(source.name, result.stderr))
    if len(kernels) != result.stderr.count("Compiling entry function"):
        raise DoesNotCompileError(f"{source.name}: what ptxas says of its kernels was not understood")
    return Compiled(source, kernels, seconds)


def _targets(source: Path, architectures: Sequence[int], ptx: bool) -> list[str]:
    """As the core is built: clusters for each architecture, all else through PTX of the oldest."""
    if not source.stem.endswith("_cluster"):
        codes = [f"sm_{a}" for a in architectures] + ["compute_80"] * ptx
        return [f"-gencode=arch=compute_80,code=[{','.join(codes)}]"]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    if ptx:
        targets.append(f"-gencode=arch=compute_{max(architectures)},code=compute_{max(architectures)}")
    return targets


def read_report(source: str, said: str) -> Iterable[Kernel]:
    """The kernels that ``ptxas -v`` speaks of, with their names as they are written."""
    found = [match.groupdict() for match in _REPORT.finditer(said)]
    names = _demangled([each["name"] for each in found])
    for each, name in zip(found, names, strict=True):
        yield Kernel(
            source=source,
            name=name,
            architecture=int(each["architecture"]),
            registers=int(each["registers"]),
            stack_bytes=int(each["stack"]),
            spill_store_bytes=int(each["stores"]),
            spill_load_bytes=int(each["loads"]),
            shared_bytes=int(each["shared"] or 0),
        )


def _demangled(names: list[str]) -> list[str]:
    """Names as written, without namespaces and arguments; mangled where no tool is here to tell."""
    tool = shutil.which("cu++filt") or shutil.which("cu++filt", path="/usr/local/cuda/bin") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    said = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [_short(name) for name in said]


def _short(name: str) -> str:
    """``void hope::cuda::f<hope::T<(hope::DType)2> >(hope::P)`` as ``f<T<bfloat16> >``."""
    for noise in ("void ", "hope::cuda::", "hope::", "(anonymous namespace)::", "<unnamed>::"):
        name = name.replace(noise, "")
    name = re.sub(r"\([^()]*\)$", "", name)
    return re.sub(r"\(DType\)(\d)", lambda match: DTYPES[int(match[1])], name)
