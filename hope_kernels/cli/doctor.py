"""``hope-kernels doctor``: this machine, its versions and backends, what is missing and how to get it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import hope_kernels
from hope_kernels.backends import available_backends, choice, cuda
from hope_kernels.backends.tables import ANY
from hope_kernels.bench.machine import processor_name

# What setup.py wrote when it built the core, or could not.
BUILD_INFO = Path(hope_kernels.__file__).with_name("_build_info.json")
CPU_INFO = Path("/proc/cpuinfo")

# The instruction sets that matter to dense arithmetic, by their names in /proc/cpuinfo (x86-64, then arm64).
INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),
)


class Tool(NamedTuple):
    """A program that an install may call."""

    commands: tuple[str, ...]
    needed_for: str
    how: str


TOOLS = {
    "C++ compiler": Tool(
        ("c++", "g++", "clang++"),
        "building the core",
        "apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), xcode-select --install (macOS)",
    ),
    "cmake": Tool(("cmake",), "building the core; pip brings its own", "pip install cmake"),
    "ninja": Tool(("ninja",), "building the core; pip brings its own", "pip install ninja"),
    "nvcc": Tool(("nvcc",), "building the CUDA kernels", "NVIDIA's CUDA Toolkit"),
}

REBUILD = (
    "put right what the reason names, then `make install` in a checkout, or `pip install -v "
    "--force-reinstall --no-deps hope_kernels` where it was installed as a package"
)


def collect() -> dict[str, Any]:
    """Everything ``doctor`` knows, ready for JSON.

    Returns:
        ``machine``: processor, cores, instruction sets, memory in bytes, GPUs;
        ``versions``: of Python and the packages, None where one is not installed;
        ``tools``: by name ``version``, ``path`` (None where missing), ``needed_for`` and ``how`` to get it;
        ``core``: ``built``, and either ``file``, ``isa``, ``isas``, ``cuda`` (its kernels, or why there are none)
        or ``reason`` and ``how``; ``build`` is what setup.py wrote down, None where it never ran;
        ``backends``: by name ``available`` and ``reason``;
        ``engines``: which of them ``backend=None`` means on a GPU: for each entry of the table ``device``, ``calls``,
        ``engine``, ``because`` and the ``file`` it stands in, the first that hold first.
    """
    return {
        "machine": _machine(),
        "versions": _versions(),
        "tools": {name: _tool(name) for name in TOOLS},
        "core": _core(),
        "backends": {
            name: {"available": bool(status), "reason": status.reason} for name, status in available_backends().items()
        },
        "engines": _engines(),
    }


def _engines() -> list[dict[str, str]]:
    user = choice.user_file()
    files = [*([user] if user.exists() else []), choice.SHIPPED]
    entries = [(entry, file) for file in files for entry in choice.load(file)]
    entries.sort(key=lambda found: (found[0].device == ANY, found[0].device.startswith("sm_")))  # stable
    return [
        {
            "device": entry.device,
            "calls": ", ".join(f"{name} {'/'.join(map(str, values))}" for name, values in entry.classes.items())
            or "all",
            "engine": entry.engine,
            "because": entry.because(),
            "file": str(file),
        }
        for entry, file in entries
    ]


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    gpus, gpu_reason = _gpus()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor_name(),
        "architecture": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        # Fewer than the machine has inside a container or under taskset.
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "instruction_sets": _instruction_sets(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "gpus": gpus,
        "gpu_reason": gpu_reason,
    }


def _instruction_sets() -> list[str]:
    """Those of ``INSTRUCTION_SETS`` that the processor has; off Linux the one name that torch gives."""
    if not CPU_INFO.exists():
        return [torch.backends.cpu.get_cpu_capability().lower()]
    for line in CPU_INFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            found = set(value.split())
            return [instruction_set for instruction_set in INSTRUCTION_SETS if instruction_set in found]
    return []


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs that torch sees, or why it sees none."""
    if torch.version.cuda is None:
        return [], "this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return [], "torch finds no NVIDIA GPU, or no driver for it"
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return gpus, None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "hope_kernels": hope_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "numpy", "pybind11"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _search_path(tool: str) -> str:
    """Where an install finds a tool: PATH, the environment's own scripts, the usual CUDA folders."""
    folders = [os.environ.get("PATH", "")]
    if tool in ("cmake", "ninja"):
        folders.insert(0, str(Path(sys.executable).parent))
    if tool == "nvcc":
        roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        folders += [str(Path(root) / "bin") for root in roots if root]
    return os.pathsep.join(folders)


def _commands(name: str) -> tuple[str, ...]:
    """The programs that would do; where CXX names a compiler, no other is tried."""
    words = shlex.split(os.environ.get("CXX", "")) if name == "C++ compiler" else []
    # The last word that is no option: CXX="ccache g++ -m64" names g++.
    return tuple(word for word in words if not word.startswith("-"))[-1:] or TOOLS[name].commands


def _tool(name: str) -> dict[str, str | None]:
    tool, search_path = TOOLS[name], _search_path(name)
    path = next(filter(None, (shutil.which(command, path=search_path) for command in _commands(name))), None)
    return {
        "version": None if path is None else _version_line(path),
        "path": path,
        "needed_for": tool.needed_for,
        "how": tool.how if path is None else None,
    }


def _version_line(path: str) -> str:
    """The line of ``path --version`` that holds the version."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    lines = [line for line in answer.splitlines() if any(character.isdigit() for character in line)]
    # nvcc puts a copyright before its version.
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown")


def _core() -> dict[str, Any]:
    build = json.loads(BUILD_INFO.read_text()) if BUILD_INFO.exists() else None
    try:
        core = import_module("hope_kernels._core")
    except ImportError as error:
        reason = _why_no_core(build, error)
        return {"built": False, "reason": reason, "how": REBUILD, "build": build}
    isas = list(core.isas())
    return {
        "built": True,
        "file": core.__file__,
        "isa": core.isa(),
        "isas": isas,
        "cuda": cuda.built().reason,
        "build": build,
    }


def _why_no_core(build: dict[str, Any] | None, error: ImportError) -> str:
    if build is None:
        return "it was never built: this is a source tree that has not been installed"
    if build["core"] == "missing":
        return build["reason"]
    if build["python"].rpartition(".")[0] != platform.python_version().rpartition(".")[0]:
        return f"it was built for Python {build['python']}; this is Python {platform.python_version()}"
    return f"it was built, but does not load: {error}"


def render(report: dict[str, Any], console: Console) -> None:
    """Print a report of :func:`collect` as tables, ending with what is missing and how to get it."""
    for table in (_machine_table(report["machine"]), _versions_table(report), _core_table(report["core"])):
        console.print(table)
    console.print(_backends_table(report["backends"]))
    console.print(_engines_table(report["engines"]))
    for line in _advice(report):
        console.print(line)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=len(columns) > 2)
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    return table


def _rows(table: Table, rows: list[tuple[str, ...]]) -> Table:
    for name, *values in rows:
        # Text, not markup: a compiler's message may hold square brackets.
        table.add_row(Text(name, "cyan"), *map(Text, values))
    return table


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _machine_table(machine: dict[str, Any]) -> Table:
    usable = machine["usable_cores"]
    cores = f"{machine['physical_cores'] or 'unknown'} physical, {machine['logical_cores']} logical"
    gpus = [
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {_gib(gpu['memory_bytes'])}"
        for gpu in machine["gpus"]
    ]
    return _rows(
        _table("Machine", "", ""),
        [
            ("system", f"{machine['system']} on {machine['architecture']}"),
            ("processor", machine["processor"]),
            ("cores", cores if usable is None else f"{cores}, {usable} usable by this process"),
            ("torch threads", str(machine["torch_threads"])),
            ("instruction sets", " ".join(machine["instruction_sets"]) or "unknown"),
            ("memory", f"{_gib(machine['memory_bytes'])}, {_gib(machine['memory_available_bytes'])} free"),
            ("GPU", "\n".join(gpus) or f"none: {machine['gpu_reason']}"),
        ],
    )


def _versions_table(report: dict[str, Any]) -> Table:
    packages = [(name, version or "not installed") for name, version in report["versions"].items()]
    tools = [
        (name, "not found" if tool["path"] is None else f"{tool['version']}\n{tool['path']}")
        for name, tool in report["tools"].items()
    ]
    return _rows(_table("Versions", "", ""), packages + tools)


def _core_table(core: dict[str, Any]) -> Table:
    if core["built"]:
        others = [isa for isa in core["isas"] if isa != core["isa"]]
        rows = [
            ("built", "yes"),
            ("instruction set", core["isa"] + (f" (also here: {', '.join(others)})" if others else "")),
            ("CUDA kernels", core["cuda"]),
            ("file", core["file"]),
        ]
    else:
        rows = [("built", "no"), ("reason", core["reason"]), ("how to get it", core["how"])]
    if core["build"] is not None:
        tools = ("compiler", "cmake", "python")
        rows += [(f"built with {name}", core["build"][name] or "none") for name in tools]
    return _rows(_table("Compiled core", "", ""), rows)


def _backends_table(backends: dict[str, Any]) -> Table:
    rows = [
        (name, "available" if status["available"] else "not available", status["reason"])
        for name, status in backends.items()
    ]
    return _rows(_table("Backends", "backend", "here", "because"), rows)


def _engines_table(engines: list[dict[str, str]]) -> Table:
    columns = ("device", "calls", "engine", "because")
    rows = [tuple(entry[column] for column in columns) for entry in engines]
    return _rows(_table("On a GPU, where no backend is named", *columns), rows)


def _advice(report: dict[str, Any]) -> list[Text]:
    missing = [
        Text.assemble((f"{name} not found", "bold yellow"), f" (for {tool['needed_for']}): {tool['how']}")
        for name, tool in report["tools"].items()
        if tool["path"] is None
    ]
    core = report["core"]
    if core["built"]:
        return [*missing, Text("The compiled core is in place.", "bold green")]
    headline = Text("The compiled core is missing; only the slow reference path runs here.", "bold red")
    return [headline, *missing, Text(f"To get the core, {core['how']}.")]
