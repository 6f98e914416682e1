"""What a number was measured on: processor, versions, command, date, and the peaks measured in the same run."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path

import torch


def processor_name() -> str:
    """The processor's model as the operating system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(("model name", "hardware", "processor model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, object]:
    """Processor, cores, threads in use, instruction set of the compiled core, GPU if any."""
    core = compiled_core()
    return {
        "processor": processor_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "core_isa": core.isa() if core is not None else None,
        "system": f"{platform.system()} {platform.release()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe_versions() -> dict[str, str]:
    """Versions of Python, torch and this package."""
    import hope_kernels

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hope_kernels": getattr(hope_kernels, "__version__", "unknown"),
    }


def stamp(kind: str, command: list[str] | None = None) -> dict[str, object]:
    """The head of every JSON report: ``kind``, ``machine``, ``versions``, ``command``, ``date`` (UTC)."""
    words = sys.argv if command is None else command
    return {
        "kind": kind,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "command": " ".join([Path(words[0]).name, *words[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def compiled_core():
    """The compiled module ``hope_kernels._core``, or None where it was not built."""
    try:
        from hope_kernels import _core
    except ImportError:
        return None
    return _core


def fma_peak() -> float | None:
    """float32 operations per second of a register-blocked multiply-add probe on all of torch's threads, measured now.

    The probe is part of the compiled core; None without it.
    """
    core = compiled_core()
    return None if core is None else float(core.fma_peak(torch.get_num_threads()))


def copy_bandwidth(size: int = 1 << 28) -> float:
    """Bytes per second, read and written together, of copies of ``size`` bytes on all of torch's threads, measured now.

    By default far more than any cache holds.
    """
    from hope_kernels.bench.gpu import copy_peak

    return copy_peak("cpu", size=size, repeats=5)
