"""Kernels compiled without a GPU, and what is read of them: the gate passes the shipped table and can fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from hope_kernels.backends.triton import OLDEST

ROOT = Path(__file__).parents[2]
INSTALLED = importlib.util.find_spec("triton") is not None
TOO_OLD = INSTALLED and tuple(map(int, version("triton").split(".")[:2])) < OLDEST
pytestmark = pytest.mark.skipif(not INSTALLED or TOO_OLD, reason="Triton is not installed, or too old")


def run(*command: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may have its kernels interpreted."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        env=inherited | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def compiled(function: str, *arguments: object, **environment: str) -> dict:
    found = run("-m", "tests.backends.triton_compiling", function, *map(str, arguments), **environment)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


# ---- reading binaries ------------------------------------------------------------------------------------------------


def test_a_kernel_within_its_registers_is_clean_and_uses_tensor_cores():
    found = compiled("squares", "sm_90", 64, 4)
    assert (found["kernel"], found["grid"], found["options"]) == ("sum_of_squares", [3], {"num_warps": 4})
    assert found["clean"] and found["failures"] == []
    resources = found["resources"]
    assert resources["stack_bytes"] == resources["spill_instructions"] == 0
    assert 32 <= resources["registers"] <= 255
    assert resources["tensor_core"] > 0 and resources["barriers"] > 0
    assert 64 * 64 * 2 <= resources["shared_bytes"] < 100_000  # the tile, at least


@pytest.mark.parametrize(
    ("architecture", "rows"), [("sm_80", 128), pytest.param("gfx942", 256, marks=pytest.mark.slow)]
)
def test_a_kernel_beyond_its_registers_fails_the_gate_with_spills_in_its_innermost_loop(architecture, rows):
    """Accumulators ``[rows, rows]`` of float32 on one warp, of 32 or 64 threads: 512 or 1024 registers each."""
    found = compiled("squares", architecture, rows, 1)
    resources = found["resources"]
    assert resources["stack_bytes"] > 400
    assert 0 < resources["inner_spill_instructions"] <= resources["spill_instructions"]
    assert not found["clean"]
    assert any(failure.startswith("spills: ") for failure in found["failures"])


@pytest.mark.parametrize(
    ("plan", "kernel"), [("resident", "backward_kernel"), ("tiled", "write_kernel"), ("pairs", "sums_kernel")]
)
def test_sizes_of_one_compile_and_no_other_sizes_compile_anew(plan, kernel):
    counts = compiled("variants", plan)
    assert kernel in counts
    for five, all_sizes in counts.values():
        assert five == all_sizes


def test_kernels_of_the_interpreter_are_refused():
    message = compiled("interpreted", TRITON_INTERPRET="1")["message"]
    assert "sum_of_squares" in message and "TRITON_INTERPRET" in message


# ---- the first call --------------------------------------------------------------------------------------------------

# Kind of memory, bits, features, chunk sizes of the levels; bodies of the forward's and of the backward's kernel, which
# are functions.
FIRST_CALLS = [
    pytest.param("mlp/gd/l2", 16, 64, (1, 2, 4, 8), 1, id="four levels of one body"),
    pytest.param("mlp/gd/l2", 16, 64, (1, 2, 4, 8, 16, 64), 2, id="six levels of two", marks=pytest.mark.slow),
    pytest.param("glu/dgd/self", 16, 64, (32,), 0, id="one level", marks=pytest.mark.slow),
    pytest.param("glu/dgd/self", 16, 1024, (512,), 0, id="one tiled level", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "bits", "dim", "chunk_sizes", "bodies"), FIRST_CALLS)
def test_a_first_call_compiles_in_less_than_a_minute(kind, bits, dim, chunk_sizes, bodies, tmp_path):
    """Of CPU time, which does not depend on what else runs. Four bodies in one function would take minutes."""
    if len(chunk_sizes) > 3 and tuple(map(int, version("triton").split(".")[:2])) < (3, 9):
        pytest.skip("older Tritons compile a body for every chunk size")
    found = compiled("first_call", "sm_90", kind, bits, dim, *chunk_sizes, TRITON_CACHE_DIR=str(tmp_path))
    assert found["seconds"] < 60
    assert found["plans"] == (["tiled"] if dim > 128 else ["resident"])
    assert found["functions"] == [1 + bodies] * 2 * (bodies > 0)
    assert found["inner_spills"] == [0, 0] * (bodies > 0)
    assert bodies == 0 or found["launches"] == 2


def test_bodies_are_functions_where_a_compiler_can_call_them():
    """Not where they use tensor memory; on AMD's, where calls cost stack, only from three on."""
    one, several = "forward_kernel", "forward_levels_kernel"
    assert compiled("joint_kernels", "sm_80", "sm_90", "sm_100", "gfx942") == {
        "sm_80": [several, several],
        "sm_90": [several, several],
        "sm_100": [one, one],
        "gfx942": [one, several],
    }


# ---- digests ---------------------------------------------------------------------------------------------------------

KERNELS = '''
from typing import Any, NamedTuple

import triton
import triton.language as tl

SCALE = tl.constexpr(2)


class Pair(NamedTuple):
    left: Any
    right: Any


@triton.constexpr_function
def shift(n):
    return n + 1


@triton.jit
def scaled(x, n):
    return x * SCALE + shift(n)


@triton.jit
def unused(x):
    return x - 1


@triton.jit
def kernel(pair, n: tl.constexpr):
    """Scales the left into the right."""
    tl.store(pair.right, scaled(tl.load(pair.left), n))


def launch(x):
    kernel[(1,)](Pair(x, x), 8, num_warps=4)
'''
# What is changed in it, and whether something else would be compiled.
CHANGES = {
    "nothing": ("", "", False),
    "a comment": ("    return x * SCALE", "    # twice\n    return x * SCALE", False),
    "a line above": ("class Pair", "\n\nclass Pair", False),
    "the layout": ("return x * SCALE + shift(n)", "return (x\n        * SCALE) + shift(n)", False),
    "a docstring": ("Scales the left into the right.", "Other words.", False),
    "another docstring": ("    return n + 1", "    'Adds one.'\n    return n + 1", False),
    "an unused function": ("return x - 1", "return x - 2", False),
    "a called function": ("return x * SCALE +", "return x + SCALE +", True),
    "a function called at compile time": ("return n + 1", "return n + 2", True),
    "a global": ("constexpr(2)", "constexpr(3)", True),
    "the kernel": ("tl.store(pair.right", "tl.store(pair.right + 1", True),
    "the order of an argument": ("    left: Any\n    right: Any", "    right: Any\n    left: Any", True),
    "a constant": ("Pair(x, x), 8", "Pair(x, x), 16", True),
    "an option": ("num_warps=4", "num_warps=8", True),
    "a type": ("Pair(x, x)", "Pair(x, x.half())", True),
    "alignment": ("Pair(x, x)", "Pair(x, 3)", True),
}


def test_digests_change_with_what_is_compiled_and_with_nothing_else(tmp_path):
    files = {}
    for i, (what, (old, new, _)) in enumerate(CHANGES.items()):
        assert KERNELS.count(old) == 1 or not old, what
        files[what] = tmp_path / f"changed_{i}.py"
        files[what].write_text(KERNELS.replace(old, new) if old else KERNELS)
    found = dict(zip(files, compiled_digests(*files.values()), strict=True))
    sm_80, sm_90 = found["nothing"]
    assert sm_80 != sm_90
    changed = {what: sm_90 != compiled_for[1] for what, compiled_for in found.items()}
    assert changed == {what: different for what, (_, _, different) in CHANGES.items()}
    assert compiled_digests(files["nothing"], PYTHONHASHSEED="1") == [[sm_80, sm_90]]


def compiled_digests(*files: Path, **environment: str) -> list[list[str]]:
    found = compiled("digests", "sm_80,sm_90", *files, **environment)
    return [found[file.stem] for file in files]


# ---- the gate --------------------------------------------------------------------------------------------------------


def resources(**changed: int):
    from hope_kernels.backends.triton.resources import Resources

    clean = Resources(
        registers=200,
        stack_bytes=0,
        local_bytes=0,
        shared_bytes=40_000,
        tensor_memory_columns=0,
        spill_instructions=0,
        inner_spill_instructions=0,
        spilled_registers=None,
        scalar_spills=None,
        tensor_core=8,
        barriers=4,
        special_functions=2,
        instructions=1000,
    )
    return replace(clean, **changed)


@pytest.mark.parametrize(
    ("changed", "architecture", "failure"),
    [
        ({}, "sm_80", None),
        ({"stack_bytes": 64, "spill_instructions": 9}, "sm_80", None),
        ({"stack_bytes": 65, "spill_instructions": 9}, "sm_80", "spills"),
        ({"stack_bytes": 8, "spill_instructions": 9, "inner_spill_instructions": 1}, "sm_80", "spills"),
        ({"local_bytes": 72}, "sm_80", "spills"),
        ({"shared_bytes": 166_912}, "sm_80", None),
        ({"shared_bytes": 166_913}, "sm_80", "shared memory"),
        ({"shared_bytes": 166_913}, "sm_90", None),
        ({"shared_bytes": 65_537}, "gfx942", "shared memory"),
        ({"tensor_memory_columns": 513}, "sm_100", "tensor memory"),
        ({"tensor_core": 0}, "sm_90", "no tensor-core instruction"),
    ],
)
def test_the_gate_is_the_stated_one(changed, architecture, failure):
    from hope_kernels.backends.triton.compile_only import ARCHITECTURES

    failures = resources(**changed).failures(ARCHITECTURES[architecture], tensor_core=True)
    assert len(failures) == (failure is not None)
    assert failure is None or failures[0].startswith(failure)


# ---- listings --------------------------------------------------------------------------------------------------------

# An outer loop (0x10 to 0x90) that spills, an inner one (0x30 to 0x50) that does not, a wait (0x60) and a far piece of
# code (0xb0) that jumps back to the middle.
SASS = """
        /*0000*/                   S2R R4, SR_CTAID.X ;
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/              @!P2 BRA 0xb0 ;
        /*0030*/                   LDG.E R2, [R4.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0050*/               @P0 BRA 0x30 ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R5], R6 ;
        /*0070*/              @!P1 BRA 0x60 ;
        /*0080*/                   STL.64 [R1+0x8], R2 ;
        /*0090*/                   BRA.U UP0, 0x10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   STL [R1], R2 ;
        /*00c0*/                   BRA 0x60 ;
        /*00d0*/                   BRA 0xd0;
"""

AMDGCN = """
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
\tscratch_load_dword v1, off, off
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
\tglobal_load_dwordx4 v[2:5], v[6:7], off
\tscratch_store_dword off, v1, off offset:4 ; 4-byte Folded Spill
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\ts_cbranch_scc1 .LBB0_2
; %bb.3:
\ts_barrier
\ts_cbranch_vccnz .LBB0_1
\ts_endpgm
"""


def test_innermost_loops_of_a_listing_are_found_past_waits_and_far_code():
    from hope_kernels.backends.triton.resources import innermost_loops, sass

    listing = sass(SASS)
    assert len(listing) == 14
    assert [sorted(loop) for loop in innermost_loops(listing)] == [[3, 4, 5]]


def test_innermost_loops_of_amd_assembly_are_found():
    from hope_kernels.backends.triton.resources import amdgcn, innermost_loops

    listing = amdgcn(AMDGCN)
    (loop,) = innermost_loops(listing)
    assert [listing[i].opcode for i in sorted(loop)] == [
        "global_load_dwordx4",
        "scratch_store_dword",
        "v_mfma_f32_32x32x8_bf16",
        "s_cbranch_scc1",
    ]


# ---- the shipped table -----------------------------------------------------------------------------------------------

REPRESENTATIVE = (
    "resident_forward mlp gd 16 64 64 plain",
    "resident_forward mlp dgd 16 32 64 full",
    "resident_forward linear gd 32 16 64 plain",
    "resident_backward mlp gd 16 64 64 full",
)


def test_representative_shipped_configurations_compile_within_the_gate():
    found = compiled("shipped", "sm_90", *REPRESENTATIVE)
    assert found.keys() == set(REPRESENTATIVE)
    for name, rows in found.items():
        assert rows, name
        for row in rows:
            assert row["failures"] == [], f"{name}: {row}"
            assert 0 < row["registers"] <= 255 and row["barriers"] > 0
            assert (row["tensor_core"] > 0) == (row["operand_bits"] == 16), name


CLI = "benchmarks/triton_resources.py"
FEW = ("--kernel", "tiled_triangle_adjoint", "--arch", "sm_90")  # four subjects that compile in seconds


def report_path() -> Path:
    """The committed report for the Triton at hand."""
    installed = version("triton")
    path = ROOT / "benchmarks" / "results" / f"triton-resources-{'.'.join(installed.split('.')[:2])}.json"
    if not path.exists() or json.loads(path.read_text())["versions"]["triton"] != installed:
        pytest.skip(f"there is no report of Triton {installed}")
    return path


def test_a_check_compiles_what_the_report_lacks_and_finds_what_differs_from_it(tmp_path):
    content = json.loads(report_path().read_text())
    few = [row for row in content["rows"] if (row["kernel"], row["architecture"]) == (FEW[1], FEW[3])]
    changed, missing = few[0], few[-1]
    content["rows"].remove(missing)
    changed["registers"] += 1
    (tmp_path / "report.json").write_text(json.dumps(content))
    found = run(CLI, *FEW, "--check", "--report", str(tmp_path / "report.json"), "--json", str(tmp_path / "found.json"))
    assert found.returncode == 1, found.stderr[-3000:]
    assert "report.json holds 3 of 4" in found.stdout
    assert "1 compiled that it lacks, 3 compiled to compare: 1 differ" in found.stdout
    message = f"{changed['function']}: registers is {changed['registers'] - 1}, the report says {changed['registers']}"
    assert found.stdout.count("not as reported: ") == 1 and message in found.stdout
    written = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["digest"] for row in written] == [row["digest"] for row in few]
    assert written[-1] == missing


def test_a_check_does_not_compile_a_whole_table(tmp_path):
    found = run(CLI, "--arch", "sm_90", "--check", "--report", str(tmp_path / "none.json"))
    assert found.returncode == 1
    assert "run make triton-resources" in found.stderr and "commit the report" in found.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_update_compiles_what_is_new_keeps_what_holds_and_drops_the_rest(tmp_path):
    """A kept row comes out as the report has it, however wrong; ``--all`` reads it from the binary."""
    content = json.loads(report_path().read_text())
    rows = content["rows"]
    few = [i for i, row in enumerate(rows) if (row["kernel"], row["architecture"]) == (FEW[1], FEW[3])]
    rows[few[0]]["registers"] += 1
    kept = rows[: few[-1]] + rows[few[-1] + 1 :]
    gone = {**rows[few[-1]], "digest": "0123456789abcdef"}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({**content, "rows": [gone, *kept]}))
    found = run(CLI, *FEW, "--report", str(report))
    assert found.returncode == 0, found.stderr[-3000:]
    assert json.loads(report.read_text())["rows"] == rows
    assert run(CLI, *FEW, "--report", str(report), "--all").returncode == 0
    rows[few[0]]["registers"] -= 1
    assert json.loads(report.read_text())["rows"] == rows


def test_a_sample_is_spread_and_the_same_every_time():
    from hope_kernels.bench.kernel_resources import Row, shipped_subjects
    from hope_kernels.bench.resource_report import sample

    subjects = shipped_subjects(["sm_80", "sm_90", "sm_100", "gfx942"])
    rows = {subject: [Row(subject, "", {}, resources(), [])] for subject in subjects}
    taken = sample(rows, 24)
    assert len(set(taken)) == 24
    assert taken == sample(dict(reversed(rows.items())), 24)
    assert {subject.kernel for subject in taken} == {subject.kernel for subject in subjects}
    for name, least in (("architecture", 4), ("variant", 5)):
        counts = Counter(getattr(subject, name) for subject in taken)
        assert set(counts) == {getattr(subject, name) for subject in subjects} and min(counts.values()) >= least
    assert len({(subject.shape.form, subject.shape.rule) for subject in taken}) == 6


def test_the_committed_report_is_of_exactly_what_is_shipped():
    found = compiled("report", "benchmarks/results")
    if found["path"] is None:
        pytest.skip(f"there is no report of Triton {found['triton']}")
    what_to_do = "run make triton-resources (with the oldest Triton make triton-resources-oldest) and commit the report"
    undeclared = found["undeclared"]
    assert undeclared == [], (
        f"{found['path']} is not of {len(undeclared)} of {found['shipped']} as it says: {what_to_do}"
    )
    path = Path(found["path"])
    if path == max(path.parent.glob("triton-resources-*.json"), key=lambda p: [int(n) for n in p.stem[17:].split(".")]):
        assert found["lacking"] == 0, f"the report of the newest Triton has to be whole: {what_to_do}"
    assert found["left"] == 0, f"{found['path']} has rows of what is not shipped: {what_to_do}"
    assert found["failures"] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_shipped_configuration_passes_the_gate(architecture, tmp_path):
    report = tmp_path / "resources.json"  # holds nothing yet
    found = run(CLI, "--arch", architecture, "--report", str(report), timeout=7200)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    content = json.loads(report.read_text())
    assert content["passed"] and content["rows"] and content["versions"]["triton"]
    assert report.with_suffix(".md").read_text().count(f"| {architecture} |") == len(content["rows"])
