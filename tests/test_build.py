"""setup.py: the core is built where it can be, and an install says why where it cannot.

Each test runs the project's own setup.py and pyproject.toml over a stand-in core of a few lines, so that it
takes a second or two; the real core is built by the install that these tests run in.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULE = "_core" + sysconfig.get_config_var("EXT_SUFFIX")
NOTICE = "THE COMPILED CORE WAS NOT BUILT"

CMAKE_LISTS = """\
cmake_minimum_required(VERSION 3.18)
project(stand_in LANGUAGES CXX)
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
Python_add_library(_core MODULE WITH_SOABI csrc/core.cpp)
"""

CORE = """\
#include <Python.h>
#ifndef ANSWER
#define ANSWER 1
#endif
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_core", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__core() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", ANSWER);
  return module;
}
"""

# A module of this text, put in front of the real one, is the same as that one not being installed.
NOT_INSTALLED = "raise ImportError('not installed')\n"

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="compiles a stand-in core",
)


class Project:
    """A copy of the build files over a stand-in core."""

    def __init__(self, root: Path):
        self.root = root
        self.package = root / "hope_kernels"
        self.hidden = root / "hidden"
        (root / "csrc").mkdir(parents=True)
        self.package.mkdir()
        self.hidden.mkdir()
        for name in ("setup.py", "pyproject.toml", "LICENSE", "hope_kernels/__init__.py"):
            shutil.copy(ROOT / name, root / name)
        (root / "README.md").write_text("A stand-in.\n")
        (root / "CMakeLists.txt").write_text(CMAKE_LISTS)
        (root / "csrc" / "core.cpp").write_text(CORE)
        # The build must never import torch, nor the package, which does: here either would end it.
        (self.hidden / "torch.py").write_text("raise SystemExit('setup.py imported torch')\n")

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        steering = ("HOPE_KERNELS_", "CXX", "CPPFLAGS", "LDFLAGS", "CMAKE_ARGS", "MAX_JOBS", "CUDA")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.root,
            env=inherited | {"PYTHONPATH": str(self.hidden), "CUDACXX": "/nonexistent/nvcc"} | environment,
            capture_output=True,
            text=True,
        )

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("setup.py", "build_ext", "--inplace", **environment)

    @property
    def info(self) -> dict[str, str | None]:
        return json.loads((self.package / "_build_info.json").read_text())

    def answer(self) -> str:
        """What the core built in place says."""
        load = "import sys; sys.path.insert(0, 'hope_kernels'); import _core; print(_core.answer)"
        return self.run("-c", load).stdout.strip()

    def without_tools(self, tmp_path: Path) -> dict[str, str]:
        """An environment whose PATH holds nothing."""
        empty = tmp_path / "empty"
        empty.mkdir()
        return {"PATH": str(empty)}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    for module in ("setuptools", "cmake", "ninja", "pybind11"):
        pytest.importorskip(module, reason="builds a core")
    return Project(tmp_path / "project")


def assert_missing(project: Project, result: subprocess.CompletedProcess[str], reason: str) -> None:
    """The build went on without the core and gave the reason, on the screen and in the file."""
    assert result.returncode == 0, result.stderr
    assert NOTICE in result.stderr
    assert reason in result.stderr
    assert project.info["core"] == "missing"
    assert reason in project.info["reason"]
    assert not (project.package / MODULE).exists()


@needs_compiler
def test_the_core_is_built_in_place_without_importing_torch(project: Project) -> None:
    result = project.build(MAX_JOBS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert NOTICE not in result.stderr
    assert "--parallel 1\n" in result.stdout
    assert project.answer() == "1"
    info = project.info
    assert (info["core"], info["reason"]) == ("built", None)
    assert info["compiler"]
    assert info["cmake"].startswith("cmake version")
    assert info["python"] == ".".join(map(str, sys.version_info[:3]))


@needs_compiler
def test_other_flags_rebuild_a_core_that_was_already_configured(project: Project) -> None:
    # CMake reads CXXFLAGS only the first time it sees a build folder.
    project.build()
    assert project.answer() == "1"
    project.build(CXXFLAGS="-DANSWER=2")
    assert project.answer() == "2"
    project.build(CXXFLAGS="-DANSWER=2", CXX="/nonexistent/c++")
    project.build()
    assert project.answer() == "1"


@needs_compiler
def test_a_failing_compile_removes_the_older_core_and_keeps_the_compilers_words(project: Project) -> None:
    project.build()
    assert (project.package / MODULE).exists()
    (project.root / "csrc" / "core.cpp").write_text("#error the processor is on fire\n")
    assert_missing(project, project.build(), "the processor is on fire")


def test_a_compiler_that_does_not_exist_is_named(project: Project) -> None:
    assert_missing(project, project.build(CXX="/nonexistent/c++"), "CXX=/nonexistent/c++")


def test_without_a_compiler_the_reason_says_how_to_get_one(project: Project, tmp_path: Path) -> None:
    result = project.build(**project.without_tools(tmp_path))
    assert_missing(project, result, "no C++ compiler was found")
    assert "apt install g++" in project.info["reason"]


@needs_compiler
@pytest.mark.parametrize("tool", ["cmake", "ninja", "pybind11"])
def test_without_a_build_tool_the_reason_says_how_to_get_it(project: Project, tmp_path: Path, tool: str) -> None:
    (project.hidden / f"{tool}.py").write_text(NOT_INSTALLED)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    result = project.build(CXX=compiler, **project.without_tools(tmp_path))
    assert_missing(project, result, f"{tool} was not found. Get it with: pip install {tool}")


@needs_compiler
def test_a_tool_whose_package_names_no_folder_is_found_on_path(project: Project) -> None:
    # So it is with ninja's package in the isolated environments in which pip builds.
    folder = importlib.import_module("ninja").BIN_DIR
    (project.hidden / "ninja.py").write_text("BIN_DIR = ''\n")
    result = project.build(PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert NOTICE not in result.stderr
    assert project.answer() == "1"


def test_a_required_core_that_cannot_be_built_fails_the_build(project: Project) -> None:
    result = project.build(CXX="/nonexistent/c++", HOPE_KERNELS_REQUIRE_CORE="1")
    assert result.returncode != 0
    assert "HOPE_KERNELS_REQUIRE_CORE=1" in result.stderr
    assert project.info["core"] == "missing"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HOPE_KERNELS_CUDA": "1", "CUDACXX": "/nonexistent/nvcc"}, "HOPE_KERNELS_CUDA=1: /nonexistent/nvcc was not"),
        ({"HOPE_KERNELS_CUDA_ARCHS": "sm_80"}, "HOPE_KERNELS_CUDA_ARCHS='sm_80': expected numbers"),
        ({"HOPE_KERNELS_CUDA": "yes"}, "HOPE_KERNELS_CUDA='yes': expected 0 or 1"),
        ({"HOPE_KERNELS_REQUIRE_CORE": "2", "CXX": "/nonexistent/c++"}, "HOPE_KERNELS_REQUIRE_CORE='2'"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS='0': expected a positive whole number"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS='many': expected a positive whole number"),
    ],
)
def test_a_wrong_setting_fails_the_build_with_its_name(
    project: Project, environment: dict[str, str], message: str
) -> None:
    result = project.build(**environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (project.package / MODULE).exists()


# Takes the place of nvcc: what setup.py passes on is tested here, real kernels in tests/cuda_host.
WITH_CUDA = """
if(HOPE_KERNELS_CUDA)
  if(FAIL_CUDA)
    message(FATAL_ERROR "nvcc dislikes this compiler")
  endif()
  target_compile_definitions(_core PRIVATE ANSWER=2${HOPE_KERNELS_CUDA_ARCHS})
endif()
"""


def stand_in_nvcc(project: Project) -> str:
    (project.root / "CMakeLists.txt").write_text(CMAKE_LISTS + WITH_CUDA)
    nvcc = project.root / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@needs_compiler
def test_the_cuda_kernels_are_built_where_nvcc_is_found(project: Project) -> None:
    nvcc = stand_in_nvcc(project)
    project.build(CUDACXX=nvcc, HOPE_KERNELS_CUDA_ARCHS="90")
    assert project.answer() == "290"
    assert project.info["cuda_reason"] is None
    project.build(CUDACXX=nvcc, HOPE_KERNELS_CUDA="0")
    assert project.answer() == "1"
    assert project.info["cuda_reason"] == "HOPE_KERNELS_CUDA=0 left them out"
    project.build(CUDACXX="/nonexistent/nvcc")
    assert project.answer() == "1"
    assert "/nonexistent/nvcc was not found" in project.info["cuda_reason"]


@needs_compiler
def test_cuda_kernels_that_do_not_compile_leave_the_rest_of_the_core_unless_required(project: Project) -> None:
    environment = {"CUDACXX": stand_in_nvcc(project), "CMAKE_ARGS": "-DFAIL_CUDA=1"}
    result = project.build(**environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert project.answer() == "1"
    assert project.info["core"] == "built"
    assert "nvcc dislikes this compiler" in project.info["cuda_reason"]
    result = project.build(HOPE_KERNELS_CUDA="1", **environment)
    assert result.returncode != 0
    assert "nvcc dislikes this compiler" in result.stderr
    assert not (project.package / MODULE).exists()


@needs_compiler
def test_an_editable_install_builds_the_core_in_the_source_tree(project: Project) -> None:
    # What `pip install --editable .` calls.
    hook = ("-c", "from setuptools import build_meta; build_meta.build_editable('wheels')")
    result = project.run(*hook)
    assert result.returncode == 0, result.stdout + result.stderr
    assert project.answer() == "1"
    assert project.info["core"] == "built"
    assert_missing(project, project.run(*hook, CXX="/nonexistent/c++"), "CXX=/nonexistent/c++")


def wheel_contents(project: Project, **environment: str) -> tuple[set[str], dict[str, str | None]]:
    """Names in the wheel that pip makes, and the build info in it."""
    pytest.importorskip("pip")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "wheels")
    result = project.run("-m", "pip", "wheel", *options, ".", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (project.root / "wheels").glob("hope_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist()), json.loads(archive.read("hope_kernels/_build_info.json"))


@needs_compiler
def test_a_wheel_holds_the_core_and_what_built_it(project: Project) -> None:
    names, info = wheel_contents(project)
    assert f"hope_kernels/{MODULE}" in names
    assert info["core"] == "built"
    assert not (project.package / MODULE).exists()


@needs_compiler
def test_a_wheel_without_a_compiler_never_holds_the_core_of_an_earlier_build(project: Project) -> None:
    project.build()
    wheel_contents(project)
    shutil.rmtree(project.root / "wheels")
    names, info = wheel_contents(project, CXX="/nonexistent/c++")
    assert "hope_kernels/__init__.py" in names
    assert f"hope_kernels/{MODULE}" not in names
    assert info["core"] == "missing"
    assert "CXX=/nonexistent/c++" in info["reason"]
