"""Builds the compiled core, ``hope_kernels._core``, with CMake and ninja; all else is in pyproject.toml.

The core is torch-free, and so is this file. A machine that cannot build the core still gets the package: the
reason is printed, kept in ``hope_kernels/_build_info.json`` and repeated by ``hope-kernels doctor``.

Environment:
    HOPE_KERNELS_REQUIRE_CORE  1: a core that cannot be built fails the install (``make`` and CI ask for it).
    HOPE_KERNELS_CUDA          0: without the CUDA kernels. 1: with them, or the install fails. Unset: with them where
                               nvcc is found and compiles them; where not, the reason is kept and the rest is built.
    HOPE_KERNELS_CUDA_ARCHS    architectures of the CUDA kernels, as in "80;90", the default.
    MAX_JOBS                   compile jobs at a time; by default the processors this process may use.
    CXX, CXXFLAGS, LDFLAGS     as everywhere; CMAKE_ARGS is appended to CMake's command line.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Environment variables that CMake reads only when it first configures a folder, so each set needs its own.
CONFIGURING_VARIABLES = (
    *("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CMAKE_ARGS", "MACOSX_DEPLOYMENT_TARGET"),
    *("CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "HOPE_KERNELS_CUDA_ARCHS"),
)
LINES_OF_A_FAILED_COMMAND = 30


class CoreNotBuilt(Exception):
    """The core cannot be built here; the message says why, and how to change that."""


def flag(name: str) -> bool:
    """A 0-or-1 environment variable; unset and empty mean 0."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r}: expected 0 or 1.")
    return value == "1"


def cuda_wanted() -> tuple[bool, str | None]:
    """Whether to build the CUDA kernels; if not, the reason."""
    required = flag("HOPE_KERNELS_CUDA")
    if os.environ.get("HOPE_KERNELS_CUDA", "").strip() == "0":
        return False, "HOPE_KERNELS_CUDA=0 left them out"
    compiler = os.environ.get("CUDACXX", "").strip() or "nvcc"
    if shutil.which(compiler) is not None:
        return True, None
    if required:
        raise SystemExit(f"HOPE_KERNELS_CUDA=1: {compiler} was not found. Put it on PATH, or name it with CUDACXX.")
    return False, f"{compiler} was not found; it comes with NVIDIA's CUDA Toolkit, and CUDACXX names it"


def cuda_architectures() -> str:
    """HOPE_KERNELS_CUDA_ARCHS as CMake's list; empty for the default."""
    value = os.environ.get("HOPE_KERNELS_CUDA_ARCHS", "").strip()
    architectures = value.replace(",", " ").replace(";", " ").split()
    if not all(architecture.isdecimal() for architecture in architectures):
        raise SystemExit(f'HOPE_KERNELS_CUDA_ARCHS={value!r}: expected numbers such as "80;90".')
    return ";".join(architectures)


def compile_jobs() -> int:
    """MAX_JOBS, or the number of processors this process may run on."""
    value = os.environ.get("MAX_JOBS", "").strip()
    if not value:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not value.isdecimal() or int(value) < 1:
        raise SystemExit(f"MAX_JOBS={value!r}: expected a positive whole number.")
    return int(value)


def find_tool(name: str, directory_attribute: str) -> Path:
    """CMake or ninja: from the Python package of that name where installed, else from PATH.

    The package comes first because a virtual environment that is not activated has no scripts on PATH. PATH
    is still needed: in pip's isolated builds ninja's package cannot name its folder.
    """
    try:
        directory = str(getattr(importlib.import_module(name), directory_attribute))
    except (ImportError, AttributeError):
        directory = ""
    found = shutil.which(name, path=directory) or shutil.which(name)
    if found is None:
        raise CoreNotBuilt(f"{name} was not found. Get it with: pip install {name}")
    return Path(found)


def find_pybind11() -> str:
    """The folder of pybind11's CMake files."""
    try:
        return importlib.import_module("pybind11").get_cmake_dir()
    except ImportError:
        raise CoreNotBuilt("pybind11 was not found. Get it with: pip install pybind11") from None


def find_compiler() -> str | None:
    """Path of the C++ compiler: what CXX names, else the usual names; None lets CMake look (Windows)."""
    named = os.environ.get("CXX", "").strip()
    if named:
        # The last word that is no option: CXX="ccache g++ -m64" names g++.
        compiler = [word for word in shlex.split(named) if not word.startswith("-")][-1]
        found = shutil.which(compiler)
        if found is None:
            raise CoreNotBuilt(f"the C++ compiler that CXX={named} names was not found")
        return found
    if sys.platform == "win32":
        return None
    for name in ("c++", "g++", "clang++"):
        if (found := shutil.which(name)) is not None:
            return found
    raise CoreNotBuilt(
        "no C++ compiler was found (looked for c++, g++ and clang++; CXX names another). Get one with apt "
        "install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora, RHEL) or xcode-select --install (macOS)"
    )


def first_line_of_version(tool: str | Path) -> str:
    """First line of ``tool --version``; an empty string where it does not answer."""
    try:
        answer = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (answer.stdout.strip() or answer.stderr.strip()).partition("\n")[0]


def run_or_explain(step: str, command: list[str]) -> None:
    """Run a command with its output shown; when it fails, the end of that output becomes the reason."""
    print("+", shlex.join(command), flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(result.stdout, flush=True)
    if result.returncode:
        tail = "\n".join(result.stdout.strip().splitlines()[-LINES_OF_A_FAILED_COMMAND:])
        raise CoreNotBuilt(f"{step} failed with exit status {result.returncode}; its last words:\n{tail}")


def prepare_build_directory(compiler: str | None) -> Path:
    """A folder per Python that keeps object files between builds, emptied when the configuration changes."""
    directory = ROOT / "build" / f"core-{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}"
    variables = [os.environ.get(name) for name in CONFIGURING_VARIABLES]
    configuration = [str(ROOT), sys.prefix, compiler, *variables]
    digest = hashlib.sha256(json.dumps(configuration).encode()).hexdigest()
    digest_file = directory / "configuration.sha256"
    if not digest_file.exists() or digest_file.read_text() != digest:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        digest_file.write_text(digest)
    return directory


class BuildCore(build_ext):
    """Builds ``_core`` with CMake, and writes down what happened beside it."""

    def run(self) -> None:
        # Replaces setuptools' own run, which looks for a compiler of its own and copies only the module.
        with_cuda, without_cuda_because = cuda_wanted()
        architectures = cuda_architectures()
        root = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = root / "hope_kernels"
        module = root / self.get_ext_filename("hope_kernels._core")
        info: dict[str, str | None] = {
            "core": "missing",
            "reason": None,
            "cuda_reason": without_cuda_because,
            "compiler": None,
            "cmake": None,
            "python": platform.python_version(),
        }
        module.unlink(missing_ok=True)  # a core of older sources must not survive a failed build
        try:
            self.compile_core_with_what_compiles(module, info, with_cuda, architectures)
            info["core"] = "built"
        except CoreNotBuilt as error:
            info["reason"] = str(error)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        if info["reason"] is not None:
            report_missing_core(info["reason"])

    def compile_core_with_what_compiles(
        self, module: Path, info: dict[str, str | None], with_cuda: bool, architectures: str
    ) -> None:
        """The core with the CUDA kernels; without them where they do not compile and nobody insisted."""
        if with_cuda:
            try:
                self.compile_core(module, info, architectures)
                return
            except CoreNotBuilt as error:
                if flag("HOPE_KERNELS_CUDA"):
                    raise SystemExit(f"HOPE_KERNELS_CUDA=1, and the core was not built:\n{error}") from None
                info["cuda_reason"] = str(error)
                print("The core was not built with its CUDA kernels; now without them.", flush=True)
        self.compile_core(module, info)

    def compile_core(self, module: Path, info: dict[str, str | None], cuda_architectures: str | None = None) -> None:
        """Configure, compile, and put the core at ``module``; tells ``info`` which tools it used.

        ``cuda_architectures``: of the CUDA kernels, empty for the default; None builds none.
        """
        jobs = compile_jobs()
        compiler = find_compiler()
        if compiler is not None:
            info["compiler"] = first_line_of_version(compiler) or compiler
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        info["cmake"] = first_line_of_version(cmake)
        ninja = find_tool("ninja", "BIN_DIR")
        pybind11 = find_pybind11()
        directory = prepare_build_directory(compiler)
        output = directory / "module"
        shutil.rmtree(output, ignore_errors=True)
        # A compiler that CXX names is CMake's to read: CXX may hold a launcher or flags as well.
        chosen = [] if compiler is None or os.environ.get("CXX") else [f"-DCMAKE_CXX_COMPILER={compiler}"]
        configure = [
            *(str(cmake), "-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DHOPE_KERNELS_CUDA={'OFF' if cuda_architectures is None else 'ON'}",
            *([f"-DHOPE_KERNELS_CUDA_ARCHS={cuda_architectures}"] if cuda_architectures else []),
            *chosen,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        run_or_explain("CMake's configuration", configure)
        run_or_explain("The compilation", [str(cmake), "--build", str(directory), "--parallel", str(jobs)])
        built = output / module.name
        if not built.exists():
            made = sorted(path.name for path in output.glob("*"))
            raise CoreNotBuilt(f"The compilation made no {module.name}; it made {made or 'nothing'}.")
        module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, module)


def report_missing_core(reason: str) -> None:
    """Say prominently that the core is missing, and fail where it is required."""
    required = flag("HOPE_KERNELS_REQUIRE_CORE")
    outcome = (
        "HOPE_KERNELS_REQUIRE_CORE=1 makes that an error."
        if required
        else "The package works without it, on the slow reference path. `hope-kernels doctor` repeats this."
    )
    bar = "=" * 100
    notice = f"THE COMPILED CORE WAS NOT BUILT. The reason:\n{textwrap.indent(reason, '    ')}\n{outcome}"
    print(f"\n{bar}\nhope_kernels: {notice}\n{bar}\n", file=sys.stderr, flush=True)
    if required:
        raise SystemExit(1)


# The extension lists no sources: it tells setuptools the module's name and that a wheel is for one platform.
setup(ext_modules=[Extension("hope_kernels._core", sources=[])], cmdclass={"build_ext": BuildCore})
