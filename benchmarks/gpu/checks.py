"""What must be right before speed means anything: build, parity, operators, ``torch.compile``, graphs, sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.children import Child, run_children
from benchmarks.gpu.setting import FUNCTIONS, ROOT, Setting, with_gradients
from hope_kernels.backends import refusal
from hope_kernels.backends.cuda import refuses_level_update
from hope_kernels.bench.implementations import (
    AGREEMENT,
    REFERENCE,
    Implementation,
    Results,
    difference,
    make_call,
)
from hope_kernels.bench.problems import Problem, shape_problem
from hope_kernels.bench.shapes import GPU_SHAPES, MODES, SHAPES, Shape


def build(setting: Setting) -> dict:
    """The compiled core, in place."""
    command = [sys.executable, "setup.py", *(["--version"] if setting.dry else ["build_ext", "--inplace"])]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HOPE_KERNELS_REQUIRE_CORE": "1"}, check=False)
    return {"passed": done.returncode == 0, "summary": f"{' '.join(command[1:])}: exit {done.returncode}"}


# ---- parity ----------------------------------------------------------------------------------------------------------


def parity(setting: Setting) -> dict:
    """Every backend, plan and dtype against float64, token by token; gradients included. float32 is checked with full
    products and with tf32 ones. Cases run side by side: most of the time goes to compiling kernels."""
    names = parity_parts(setting)
    rows: list[dict] = []
    refused: dict[str, dict] = {}
    broken: list[str] = []

    def finished(name: str, result: dict) -> None:
        rows.extend(result.get("rows", []))
        for backend, reasons in result.get("refused", {}).items():
            refused.setdefault(backend, {}).update(reasons)
        found = [f"{name}: {each}" for each in result.get("broken", [])]
        if not result["passed"] and not found and all(row["passed"] for row in result.get("rows", [])):
            found = [f"{name}: {result['summary']}"]
        broken.extend(found)
        setting.leave(rows=rows, refused=refused, broken=broken)

    done = setting.parts(names, at_once=side_by_side(setting), finished=finished)
    failed = [row for row in rows if not row["passed"]]
    compared = {row["backend"] for row in rows}
    broken += [f"{name}: it refused every case" for name in setting.backends() if name not in compared]
    missing = [name for name in names if name not in done]
    summary = f"{len(rows)} comparisons, {len(failed)} over budget, {len(broken)} broke off, {len(missing)} not reached"
    if rows:
        worst = max(rows, key=lambda row: row["used"])
        summary += (
            f"; worst {worst['used']:.2f} of its budget: {worst['case']} on {worst['backend']} in {worst['dtype']}"
        )
    if broken:
        summary += f"; first: {broken[0]}"
    return {
        "passed": bool(rows) and not failed and not broken and not missing,
        "summary": summary,
        "rows": rows,
        "refused": refused,
        "broken": broken,
        "not_reached": missing,
    }


def side_by_side(setting: Setting) -> int:
    """Processes at once where compiling takes the time."""
    return 1 if setting.dry else max(1, min(12, (os.cpu_count() or 2) - 4))


def parity_parts(setting: Setting) -> list[str]:
    """``parity:TRIAL:DTYPE:DEVICE``, the large ones first: they take longest.

    A kernel is compiled for each combination of plan, spec, sizes and dtype, so not all of them are run: the plan that
    is chosen and the resident one (mostly the same) see every trial, the tiled one every third in each dtype.
    """
    if setting.dry:
        return ["parity:0:float32:cpu", "parity:1:float32:cpu"]
    count = len(trials())
    parts = [f"parity:{i}:{dtype}:cuda" for i in reversed(range(count)) for dtype in ("bfloat16", "float32")]
    parts += [f"parity:{i}:{dtype}:cuda" for i in reversed(range(count)) if i % 2 == 0 for dtype in ("tf32", "float16")]
    return [*parts, *(f"parity:all:{dtype}:cpu" for dtype in ("float32", "bfloat16", "float16"))]


def parity_part(setting: Setting, trial: str, dtype: str, device: str) -> dict:
    """One trial on the GPU, or all small ones on the CPU's engine."""
    from hope_kernels import available_backends
    from hope_kernels.backends import FACTORED
    from hope_kernels.backends.triton.plan import RESIDENT_CHUNK, RESIDENT_DIM
    from hope_kernels.bench.parity import TF32, check_parity
    from hope_kernels.bench.parity_cases import make_trial

    torch.set_num_threads(1)  # many of these run at once
    if trial == "all":
        status = available_backends()["cpu"]
        if not status:
            return {"passed": False, "summary": f"cpu: {status.reason}"}
        made = [make_trial(case, **sizes) for case, sizes in trials()]
        report = check_parity(made, ["reference", "cpu"], [dtype], device=device).as_dict()
        return report | {"summary": f"{len(report['rows'])} comparisons"}
    index = int(trial)
    case, sizes = trials()[index]
    resident = sizes.get("chunk_size", 0) <= RESIDENT_CHUNK and sizes.get("dim", 0) <= RESIDENT_DIM
    names = [
        name
        for name in setting.backends()
        if (not name.endswith(":resident") or resident) and (not name.endswith(":tiled") or index % 3 == 0)
    ]
    names += [name + FACTORED for name in names if name == "triton"]  # where it takes the case
    made = make_trial(case, **sizes)
    rows: list[dict] = []
    refused: dict[str, dict] = {}
    broken: list[str] = []
    for name in ["reference", *names]:  # one by one: a kernel that does not compile is no reason to skip the next plan
        try:
            report = check_parity(
                [made], [name], ["float32" if dtype == TF32 else dtype], device=device, tf32=dtype == TF32
            ).as_dict()
        except Exception as error:
            broken.append(f"{name}: {first_line(error)}")
            continue
        rows += report["rows"]
        refused |= report["refused"]
        setting.leave(rows=rows, refused=refused, broken=broken)
    return {
        "passed": bool(rows) and not broken and all(row["passed"] for row in rows),
        "summary": "; ".join([f"{len(rows)} comparisons", *broken]),
        "rows": rows,
        "refused": refused,
        "broken": broken,
    }


def first_line(error: BaseException) -> str:
    """An error in a line: its kind, its message's first line and, where that says little, its last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}{' .. ' + lines[-1] if len(lines) > 1 else ''}"[:400]


def trials() -> list[tuple]:
    """Cases with their sizes: the small ones of ``hope-kernels verify``, and some of several blocks."""
    from hope_kernels import MemorySpec
    from hope_kernels.bench.parity_cases import Case, cases

    plain = Case(MemorySpec(), retention=True, momentum=True)
    delta = Case(MemorySpec(objective="self", rule="dgd"), retention=True)
    glu = Case(MemorySpec(form="glu"), retention=True, layout="split")
    usual = {"dim": 64, "hidden": 256}
    return [
        *((case, {}) for case in cases(small=True)),
        (plain, usual | {"chunk_size": 16, "tokens": 70}),
        (plain, usual | {"chunk_size": 64, "tokens": 150}),
        (delta, usual | {"chunk_size": 16, "tokens": 70}),
        (glu, {"dim": 50, "hidden": 100, "chunk_size": 20, "tokens": 90}),
        (plain, {"dim": 136, "hidden": 200, "chunk_size": 100, "tokens": 230}),
        (delta, {"dim": 40, "hidden": 72, "chunk_size": 100, "tokens": 230}),
        (Case(MemorySpec(), retention=True), {"dim": 128, "hidden": 256, "chunk_size": 130, "tokens": 300}),
    ]


# ---- the benchmark's shapes ------------------------------------------------------------------------------------------


def shapes(setting: Setting) -> dict:
    """Two chunks of each shape of the benchmark against the reference in the same dtype.

    This also compiles, side by side, the kernels that the benchmark would else wait for one after the other.
    """
    rows: list[dict] = []
    broken: list[str] = []

    def finished(name: str, result: dict) -> None:
        rows.extend(result.get("rows", []))
        if not result["passed"] and not result.get("rows"):
            broken.append(f"{name}: {result['summary']}")
        setting.leave(rows=rows, broken=broken)

    names = [f"shapes:{name}" for name in GPU_SHAPES]
    done = setting.parts(names, at_once=1 if setting.dry else len(names), finished=finished)
    broken += [f"{name}: not reached" for name in names if name not in done]
    passed = bool(rows) and not broken and all(row["passed"] for row in rows)
    said = (f"{r['shape']} {r['mode']} {r['backend']} {r['outcome']}" for r in rows)
    summary = "; ".join([*said, *broken])
    return {"passed": passed, "summary": summary, "rows": rows}


def shapes_part(setting: Setting, name: str) -> dict:
    shape = sized(SHAPES[name], setting)
    problem = shape_problem(shape.scaled(tokens=2 * shape.chunk_size), dtype=setting.dtype, device=setting.device)
    rows = []
    for mode in MODES:
        expected = make_call(REFERENCE, problem, mode)()
        for backend in setting.backends(problem.request(gradients=mode != "forward")):
            if ":" in backend:
                continue
            row = {"shape": name, "mode": mode, "backend": backend}
            try:
                found = difference(make_call(Implementation(backend), problem, mode)(), expected)
                row |= {"passed": found <= AGREEMENT[setting.dtype], "outcome": f"{found:.1e}"}
            except Exception as error:
                row |= {"passed": False, "outcome": first_line(error)}
            rows.append(row)
            setting.leave(rows=rows)
    return {"passed": all(row["passed"] for row in rows), "summary": f"{len(rows)} comparisons", "rows": rows}


def sized(shape: Shape, setting: Setting) -> Shape:
    """The shape, or a tiny one of its kind in a dry run."""
    tiny = {"batch": 1, "tokens": 32, "heads": 1, "dim": 16, "hidden": 32, "chunk_size": 16}
    return shape.scaled(**tiny) if setting.dry else shape


# ---- operators -------------------------------------------------------------------------------------------------------


def opcheck(setting: Setting) -> dict:
    """``torch.library.opcheck`` on the operators, one scan and several at once, as the public functions call them."""
    return _in_parts(setting, "opcheck")


def opcheck_part(setting: Setting, *words: str) -> dict:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple] = []

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.namespace == "hope_kernels":
                self.calls.append((function, arguments, keywords or {}))
            return function(*arguments, **(keywords or {}))

    rows: list[dict] = []
    backend, kind = _backend_and_kind(words)
    problem = setting.problem(dtype=setting.plain_dtype(backend))
    with Recorder() as recorder:
        with_gradients(problem, FUNCTIONS[kind](problem, backend))
    for function, arguments, keywords in recorder.calls:
        forward = not function.name().endswith("_backward")

        def fresh(x: torch.Tensor, forward: bool = forward) -> torch.Tensor:
            return x.detach().clone().requires_grad_(forward and x.is_floating_point())

        given = tree_map_only(torch.Tensor, fresh, arguments)
        row = {"operator": function.name(), "kind": kind, "backend": backend} | checked(
            lambda function=function, given=given, keywords=keywords: str(
                torch.library.opcheck(function, given, keywords)
            )
        )
        rows.append(row)
        setting.leave(rows=rows)
    seen = {row["operator"] for row in rows}
    if not {f"hope_kernels::{kind}", f"hope_kernels::{kind}_backward"} <= seen:
        rows.append({"kind": kind, "backend": backend, "passed": False, "outcome": f"only {seen} ran"})
    return _verdict(rows, _of_operator)


def _in_parts(setting: Setting, stage: str) -> dict:
    """``stage:BACKEND:KIND`` of all backends and operators, side by side: each compiles kernels of its own."""
    parts = {
        f"{stage}:{backend}:{kind}": {"backend": backend, "kind": kind}
        for backend in setting.distinct_backends()
        for kind in setting.kinds(backend)
    }
    rows: list[dict] = []

    def finished(name: str, result: dict) -> None:
        found = result.get("rows", [])
        rows.extend(found)
        if result["passed"] is not True and all(row["passed"] for row in found):
            rows.append(parts[name] | {"passed": False, "outcome": result["summary"] or "no summary"})
        setting.leave(rows=rows)

    done = setting.parts(parts, at_once=1 if setting.dry else len(parts), finished=finished)
    rows += [parts[name] | {"passed": False, "outcome": "not reached"} for name in parts if name not in done]
    return _verdict(rows, _of_operator)


def _backend_and_kind(words: tuple[str, ...]) -> tuple[str, str]:
    """A backend's name may have a colon itself."""
    return ":".join(words[:-1]), words[-1]


def _of_operator(row: dict) -> str:
    return f"{row.get('operator', row['kind'])} on {row['backend']}"


def checked(run: Callable[[], object]) -> dict:
    """Whether ``run`` ends, and what it returned or raised: one check that fails leaves the others their turn."""
    try:
        return {"passed": True, "outcome": str(run())}
    except Exception as error:
        return {"passed": False, "outcome": f"{first_line(error)}\n{error}"[:4000]}


def _verdict(rows: list[dict], name: Callable[[dict], str]) -> dict:
    failed = [f"{name(row)}: {row['outcome'].splitlines()[0][:200]}" for row in rows if not row["passed"]]
    summary = f"{len(rows)} checks" + (f", {len(failed)} failed: " + "; ".join(failed) if failed else "")
    return {"passed": bool(rows) and not failed, "summary": summary, "rows": rows}


def compile(setting: Setting) -> dict:
    """``torch.compile(fullgraph=True)`` at two lengths, forward and backward: the eager call's results, one graph."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # of each part
    return _in_parts(setting, "compile")


def compile_part(setting: Setting, *words: str) -> dict:
    from torch._dynamo.testing import CompileCounterWithBackend

    def compare(backend: str, kind: str) -> str:
        counter = CompileCounterWithBackend(setting.compiler)
        dtype = setting.plain_dtype(backend)
        function = FUNCTIONS[kind](setting.problem(dtype=dtype), backend)
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
        found = []
        for tokens in (44, 60):  # no other size, which PyTorch would take for the same
            problem = setting.problem(tokens=tokens, dtype=dtype)
            results, expected = (with_gradients(problem, each) for each in (compiled, function))
            found.append(difference(results, expected))
        outcome = f"{counter.frame_count} graph, relative differences {found}"
        # Gates are compiled in float32; what they change may tip the rounding of a result to 16 bits.
        allowed = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        if counter.frame_count != 1 or not max(found) <= allowed:
            raise AssertionError(outcome)
        return outcome

    return _checked_part(words, compare)


def _checked_part(words: tuple[str, ...], check: Callable[[str, str], str]) -> dict:
    """``check(backend, kind)``."""
    backend, kind = _backend_and_kind(words)
    return _verdict([{"backend": backend, "kind": kind} | checked(partial(check, backend, kind))], _of_operator)


def graph(setting: Setting) -> dict:
    """A call of fixed shape captured in a CUDA graph and replayed on other inputs: the eager call's results."""
    return _in_parts(setting, "graph")


def graph_part(setting: Setting, *words: str) -> dict:
    from hope_kernels.bench.gpu import capture

    def compare(backend: str, kind: str) -> str:
        first, second = (setting.problem(dtype=setting.plain_dtype(backend)) for _ in range(2))
        second = second.with_inputs({name: x.flip(0) for name, x in second.inputs().items()})
        function = FUNCTIONS[kind](first, backend)
        found = {}
        for mode in MODES:

            def call(problem: Problem, mode: str = mode) -> Results:
                if mode == "forward":
                    with torch.no_grad():
                        return {"output": function(problem.inputs())}
                return with_gradients(problem, function)

            static = first.map(torch.clone)
            results, recorded = (call(static), None) if setting.dry else capture(partial(call, static))
            for name, x in static.inputs().items():
                x.copy_(second.inputs()[name])
            if recorded is None:  # a CPU records nothing
                results = call(static)
            else:
                recorded.replay()
                torch.cuda.synchronize()
            found[mode] = difference(results, call(second))
        if not max(found.values()) <= 1e-6:
            raise AssertionError(f"relative differences {found}")
        return f"relative differences {found}"

    return _checked_part(words, compare)


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def sanitizer(setting: Setting) -> dict:
    """compute-sanitizer's tools, side by side, on small scans; before that the same scans without it."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None and not setting.dry:
        return {"passed": None, "summary": "compute-sanitizer is not installed: nothing was checked"}
    # Each in a process of its own at first: they compile, and what they compile the tools find on disk.
    names = [f"sanitized:none:{i}" for i in range(len(sanitized_scans(setting)))]
    bare = setting.parts(names, at_once=1 if setting.dry else len(names))
    rows = [{"tool": name} | _judged(bare.get(name), None) for name in names]
    setting.leave(rows=rows)
    if all(row["passed"] for row in rows):

        def start(check: str, left: float) -> Child:
            prefix = () if setting.dry else (str(tool), "--tool", check, "--error-exitcode", "9")
            # Torch's own allocator would hide accesses beyond a tensor's end.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            name = f"sanitized:{check}"
            return Child(name, setting.options, left, prefix=prefix, environment=alone)

        results = run_children(
            [partial(start, check) for check in TOOLS],
            at_once=1 if setting.dry else len(TOOLS),
            deadline=setting.deadline - 8,
        )
        for check in TOOLS:
            name = f"sanitized:{check}"
            log = setting.out / "logs" / f"sanitized-{check}.log"
            said = log.read_text(errors="replace") if log.exists() and not setting.dry else None
            rows.append({"tool": check} | _judged(results.get(name), said))
    return _verdict(rows, lambda row: row["tool"])


def _judged(result: dict | None, log: str | None) -> dict:
    """The verdict on one run; under a tool (``log``) the tool must have reached its own summary, and found nothing."""
    if result is None:
        return {"passed": False, "outcome": "not reached"}
    if log is None:
        return {"passed": result["passed"] is True, "outcome": result["summary"]}
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log)
    errors = re.findall(r"========= ((?!COMPUTE-SANITIZER|\s*$)\S.*)", log)
    if not found:
        return {"passed": False, "outcome": f"the tool reached no summary: {result['summary'] or 'see its log'}"}
    first = f"; first: {errors[0]}" if result["exit"] and errors else ""
    return {"passed": result["exit"] == 0, "outcome": f"{found[-1]}{first}"}


def sanitized_scans(setting: Setting) -> list[tuple[str, str, str, torch.dtype]]:
    """Backend, rule, operator and dtype of what the sanitizer watches; of each backend what it runs."""
    return [
        (backend, rule, kind, dtype)
        for backend in setting.distinct_backends()
        for rule, kind, dtype in (
            ("gd", "scan", setting.dtype),
            ("gd", "scan", torch.float16),
            ("dgd", "scan", torch.float32),
            ("gd", "scans", torch.float32),
        )
        if kind in setting.kinds(backend)
        and refusal(backend, setting.problem(rule=rule, dtype=dtype).request()) is None
        # float16 is another kernel than bfloat16 in CUDA; Triton's are the same but for the conversions.
        and (dtype != torch.float16 or backend == "cuda")
    ]


def sanitized_part(setting: Setting, tool: str, index: str = "all") -> dict:
    """Forward and backward of one of :func:`sanitized_scans`, or of all."""
    start = time.monotonic()
    scans = sanitized_scans(setting)
    scans = scans if index == "all" else [scans[int(index)]]
    for backend, rule, kind, dtype in scans:
        problem = setting.problem(rule=rule, dtype=dtype)
        results = with_gradients(problem, FUNCTIONS[kind](problem, backend))
        if not all(x.isfinite().all() for x in results.values()):
            raise RuntimeError(f"{kind} {rule} on {backend} in {dtype}: results are not finite")
    if index == "all" and not setting.dry and refuses_level_update(torch.device(setting.device)) is None:
        update_levels(setting.device)
    return {"passed": True, "summary": f"{len(scans)} scans ran ({tool}) in {time.monotonic() - start:.0f} s"}


def update_levels(device: str) -> None:
    """The CUDA update of two levels, one of which is not due, with norms and 16-bit copies."""
    from hope_kernels.optim import UpdateLevel, level_update

    params = [[torch.randn(*shape, device=device) for shape in ((300, 41), (7,))] for _ in range(2)]
    levels = [UpdateLevel.zeros(params[0], rule="momentum", copy_dtype=torch.bfloat16)]
    levels.append(UpdateLevel.zeros(params[1], rule="adam", period=4))
    grads = [[torch.randn_like(p) for p in level] for level in params]
    norms = level_update(levels, grads, 0, max_norm=1.0, backend="cuda").norms
    if not norms.isfinite().all():
        raise RuntimeError("level_update: norms are not finite")


STAGES = {stage.__name__: stage for stage in (build, parity, shapes, opcheck, compile, graph, sanitizer)}
PARTS = {
    "parity": parity_part,
    "shapes": shapes_part,
    "opcheck": opcheck_part,
    "compile": compile_part,
    "graph": graph_part,
    "sanitized": sanitized_part,
}
