"""Everything that needs a GPU, in a command of under ten minutes: build, parity, operators, graphs, sanitizer, speed.

``python benchmarks/gpu_suite.py --out DIR`` runs every stage in a process of its own, with a time limit, one after the
other whatever became of the one before, and leaves ``gpu-suite.json``, ``gpu-suite.md`` and a log per stage in DIR (and
a plot, where matplotlib is installed). ``--stage parity bench`` runs some of them. It needs torch and Triton and no
network. Without a GPU it exits with 2 and has done nothing; ``--dry-run`` then runs each stage's code on the CPU, at
tiny sizes, the kernels in Triton's interpreter: for those who change this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

# Seconds each stage may take, in the order they run; all together may take TOTAL_LIMIT.
LIMITS = {"build": 120, "parity": 130, "bench": 230, "opcheck": 80, "compile": 70, "graph": 50, "sanitizer": 80}
TOTAL_LIMIT = 560

# Part of the measured peak of dense bfloat16 products that the Triton engine is meant to reach.
TARGETS = {
    ("G16", "forward"): 0.06,
    ("G16", "forward+backward"): 0.05,
    ("G64", "forward"): 0.18,
    ("G64", "forward+backward"): 0.13,
    ("GL", "forward"): 0.78,
    ("GL", "forward+backward"): 0.65,
}
# torch.compile unrolls the reference's loop over chunks: it is timed over this many, and scaled to the whole length.
COMPILED_CHUNKS = 8


class Setting:
    """Where and how large a stage runs: on the GPU, or (``dry``) as a stand-in on the CPU."""

    def __init__(self, out: Path, *, dry: bool) -> None:
        import torch

        self.out, self.dry = out, dry
        self.device = "cpu" if dry else "cuda"
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.dtypes = ("float32",) if dry else ("float32", "bfloat16", "float16")
        self.compiler = "aot_eager" if dry else "inductor"

    def backends(self) -> list[str]:
        """Compiled backends that take tensors on this device, options included."""
        import torch

        from hope_kernels import MemorySpec, available_backends
        from hope_kernels.backends import implementation

        found = []
        for name, status in available_backends().items():
            if not status or name in ("reference", "cpu"):
                continue
            options = ("", ":tiled") if name == "triton" and not self.dry else ("",)
            names = [name + option for option in options]
            found += [
                each
                for each in names
                if implementation(each).refuses(MemorySpec(), torch.float32, torch.device(self.device)) is None
            ]
        if not found:
            raise RuntimeError(f"no compiled backend runs on {self.device} tensors here")
        return found

    def problem(self, *, tokens: int = 40, chunk_size: int = 16, dim: int = 24, hidden: int = 40, rule: str = "gd"):
        """A small scan with every gate of its rule, float32."""
        from hope_kernels import MemorySpec
        from hope_kernels.bench.problems import make_problem

        part = 4 if self.dry else 1
        return make_problem(
            MemorySpec(rule=rule),  # type: ignore[arg-type]
            batch=2,
            tokens=tokens // part,
            heads=2 // min(2, part),
            dim=dim // part,
            hidden=hidden // part,
            chunk_size=chunk_size // part,
            retention=True,
            momentum=rule == "gd",
            device=self.device,
        )


# ---- stages ----------------------------------------------------------------------------------------------------------


def build(setting: Setting) -> dict:
    """The compiled core, in place."""
    command = [sys.executable, "setup.py", *(["--version"] if setting.dry else ["build_ext", "--inplace"])]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HOPE_KERNELS_REQUIRE_CORE": "1"}, check=False)
    return {"passed": done.returncode == 0, "summary": f"{' '.join(command[1:])}: exit {done.returncode}"}


def parity(setting: Setting) -> dict:
    """Every backend and dtype against float64, token by token; gradients included. Cases run side by side: most of the
    time goes to compiling kernels."""
    jobs = list(_parity_jobs(setting))
    workers = 1 if setting.dry else max(1, min(12, (os.cpu_count() or 2) - 1))
    rows: list[dict] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for report in pool.map(_parity_of, *zip(*jobs, strict=True)):
            rows += report["rows"]
            _leave(setting, "parity", {"passed": False, "summary": f"stopped after {len(rows)} rows", "rows": rows})
    failed = [row for row in rows if not row["passed"]]
    worst = max(rows, key=lambda row: row["used"])
    summary = (
        f"{len(rows)} comparisons, {len(failed)} over budget; worst {worst['used']:.2f} of its budget: "
        f"{worst['case']} on {worst['backend']} in {worst['dtype']}"
    )
    return {"passed": bool(rows) and not failed, "summary": summary, "rows": rows}


def _parity_jobs(setting: Setting) -> Iterator[tuple]:
    """Trial, dtype, device, backends. What differs in a type or in the plan alone is spread over the cases: each
    combination is compiled anew. The large ones come first, they take longest."""
    backends = setting.backends()
    for i in range(2) if setting.dry else reversed(range(len(_trials()))):
        names = ["reference", *(name for name in backends if ":" not in name or i % 3 == 0)]
        for dtype in setting.dtypes:
            if dtype != "float16" or i % 3 == 1:
                yield i, dtype, setting.device, names


def _trials() -> list[tuple]:
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
    ]


def _parity_of(index: int, dtype: str, device: str, backends: list[str]) -> dict:
    import torch

    from hope_kernels.bench.parity import check_parity
    from hope_kernels.bench.parity_cases import make_trial

    torch.set_num_threads(1)  # many of these run at once
    case, sizes = _trials()[index]
    return check_parity([make_trial(case, **sizes)], backends, [dtype], device=device).as_dict()


def opcheck(setting: Setting) -> dict:
    """``torch.library.opcheck`` on the operators as the public function calls them."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    from hope_kernels.bench.implementations import scan

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple] = []

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.namespace == "hope_kernels":
                self.calls.append((function, arguments, keywords or {}))
            return function(*arguments, **(keywords or {}))

    checked = []
    for backend in setting.backends():
        leaves = setting.problem().requires_grad()
        with Recorder() as recorder:
            scan(leaves, backend)[0].sum().backward()
        for function, arguments, keywords in recorder.calls:
            forward = function.name() == "hope_kernels::scan"

            def fresh(x: torch.Tensor, forward: bool = forward) -> torch.Tensor:
                return x.detach().clone().requires_grad_(forward and x.is_floating_point())

            torch.library.opcheck(function, tree_map_only(torch.Tensor, fresh, arguments), keywords)
            checked.append(f"{function.name()} on {backend}")
    return {"passed": len(checked) >= 2, "summary": f"{len(checked)} operators: {', '.join(checked)}"}


def compile(setting: Setting) -> dict:
    """``torch.compile(fullgraph=True)`` at two lengths, forward and backward: the eager call's results, one graph."""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    from hope_kernels.bench.implementations import difference

    rows = []
    for backend in setting.backends():
        counter = CompileCounterWithBackend(setting.compiler)
        scan = _scan_function(setting.problem(), backend)
        compiled = torch.compile(scan, fullgraph=True, dynamic=True, backend=counter)
        for tokens in (44, 60):  # no other size, which PyTorch would take for the same
            results, expected = (_with_gradients(setting.problem(tokens=tokens), f) for f in (compiled, scan))
            rows.append({"backend": backend, "tokens": tokens, "difference": difference(results, expected)})
        rows[-1]["graphs"] = counter.frame_count
        rows[-1]["passed"] = counter.frame_count == 1 and all(row["difference"] <= 1e-5 for row in rows[-2:])
        torch._dynamo.reset()
    failed = [row for row in rows if row.get("passed") is False]
    return {"passed": not failed, "summary": "; ".join(map(str, failed or rows)), "rows": rows}


def graph(setting: Setting) -> dict:
    """A call of fixed shape captured in a CUDA graph and replayed on other inputs: the eager call's results."""
    import torch

    from hope_kernels.bench.implementations import difference

    rows = []
    for backend in setting.backends():
        first, second = setting.problem(), setting.problem()
        second = second.with_inputs({name: x.flip(0) for name, x in second.inputs().items()})
        scan = _scan_function(first, backend)
        for mode in ("forward", "forward+backward"):

            def call(problem, mode: str = mode, scan=scan) -> dict:
                if mode == "forward":
                    with torch.no_grad():
                        return {"output": scan(problem.inputs())}
                return _with_gradients(problem, scan)

            static = first.map(torch.clone)
            if setting.dry:
                replay, results = call, None
            else:
                results, replay = _captured(call, static)
            for name, x in static.inputs().items():
                x.copy_(second.inputs()[name])
            results = replay(static) or results
            rows.append({"backend": backend, "mode": mode, "difference": difference(results, call(second))})
    passed = all(row["difference"] <= 1e-6 for row in rows)
    return {"passed": passed, "summary": "; ".join(map(str, rows)), "rows": rows}


def _captured(call: Callable, static) -> tuple[dict, Callable]:
    """Results of ``call(static)`` in a graph's own memory, and a function that replays it."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels, fills caches
        for _ in range(2):
            call(static)
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        results = call(static)

    def replay(_) -> None:
        recorded.replay()
        torch.cuda.synchronize()

    return results, replay


def sanitizer(setting: Setting) -> dict:
    """compute-sanitizer's memcheck and racecheck on small scans."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None and not setting.dry:
        return {"passed": None, "summary": "compute-sanitizer is not installed"}
    rows = []
    for check in ("memcheck", "racecheck"):
        # Torch's own allocator would hide accesses beyond a tensor's end.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        prefix = [] if setting.dry else [tool, "--tool", check, "--error-exitcode", "9"]
        target = [sys.executable, __file__, "--child", "sanitized", "--out", str(setting.out)]
        done = subprocess.run([*prefix, *target, *(["--dry-run"] * setting.dry)], env=environment, check=False)
        rows.append({"tool": check, "exit": done.returncode})
    (setting.out / "sanitized.json").unlink(missing_ok=True)
    passed = all(row["exit"] == 0 for row in rows)
    return {"passed": passed, "summary": "; ".join(map(str, rows)), "rows": rows}


def sanitized(setting: Setting) -> dict:
    """What the sanitizer watches: forward and backward of each backend and rule at small sizes."""
    for backend in setting.backends():
        for rule in ("gd", "dgd"):
            problem = setting.problem(rule=rule)
            _with_gradients(problem, _scan_function(problem, backend))
    return {"passed": True, "summary": "ran"}


def bench(setting: Setting) -> dict:
    """Each GPU shape, forward and forward+backward: reference, its torch.compile, and every compiled backend."""
    from triton import TritonError

    from hope_kernels.bench.gpu import copy_peak, gemm_peak
    from hope_kernels.bench.implementations import REFERENCE, Implementation
    from hope_kernels.bench.shapes import GPU_SHAPES, MODES, SHAPES
    from hope_kernels.bench.speed import SpeedReport, SpeedRow, compare_speed

    tiny = {"size": 256, "repeats": 3} if setting.dry else {}
    peak = gemm_peak(setting.dtype, setting.device, **tiny)
    copy = copy_peak(setting.device, **(tiny and {"size": 1 << 20, "repeats": 3}))
    result: dict = {"gemm_tflops": peak / 1e12, "copy_tb_s": copy / 1e12, "rows": [], "problems": []}
    names = [name for name in setting.backends() if ":" not in name]
    repeats = 2 if setting.dry else 5

    def measure(shape, mode: str, implementations: list) -> list[SpeedRow]:
        report = compare_speed(
            [shape],
            implementations,
            modes=[mode],
            dtype=setting.dtype,
            device=setting.device,
            repeats=repeats,
            memory_modes=() if setting.dry else [mode],
        )
        return report.rows

    def attempt(name: str, mode: str, what: str, shape, implementations: list) -> list[SpeedRow]:
        try:
            with _memory_returned(setting):
                return measure(shape, mode, implementations)
        except (RuntimeError, TritonError) as error:  # out of memory, say: the other rows are still worth having
            result["problems"].append(f"{name} {mode} {what}: {str(error).splitlines()[0]}")
            return []

    for name, mode in itertools.product(GPU_SHAPES, MODES):
        rows = attempt(name, mode, "", _sized(SHAPES[name], setting), [REFERENCE, *map(Implementation, names)])
        result["rows"] += [_row(row, peak) for row in rows]
        _leave(setting, "bench", result | {"passed": False, "summary": "stopped early"})
    for name, mode in itertools.product(() if setting.dry else GPU_SHAPES, MODES):
        shape = SHAPES[name]
        short = shape.scaled(tokens=min(shape.tokens, COMPILED_CHUNKS * shape.chunk_size))
        rows = attempt(name, mode, "torch.compile", short, [REFERENCE, Implementation("reference", compiled=True)])
        for row in rows[1:]:
            result["rows"].append(_scaled(row, shape.tokens // short.tokens, result["rows"], peak))
            _leave(setting, "bench", result | {"passed": False, "summary": "stopped early"})
    result["rows"].sort(key=lambda row: (list(SHAPES).index(row["shape"]), row["mode"]))
    _plot(setting, SpeedReport([SpeedRow(**_fields(row)) for row in result["rows"]], peak / 1e9))
    missed = [row for row in result["rows"] if row["target"] is not None and row["peak_fraction"] < row["target"]]
    summary = (
        f"{len(result['rows'])} rows, {len(missed)} below target, {len(result['problems'])} not measured; "
        f"GEMM {peak / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s"
    )
    return result | {"passed": not result["problems"], "summary": summary}


def _sized(shape, setting: Setting):
    tiny = {"batch": 1, "tokens": 32, "heads": 1, "dim": 16, "hidden": 32, "chunk_size": 16}
    return shape.scaled(**tiny) if setting.dry else shape


def _scaled(row, times: int, rows: list[dict], peak: float) -> dict:
    """A row timed over a ``times``-th of the tokens, as of all: every chunk takes the same time."""
    timed = _row(row, peak)
    for name in ("ms", "ms_min", "gflop"):
        timed[name] *= times
    whole = [each["ms"] for each in rows if (each["shape"], each["mode"]) == (row.shape, row.mode)]
    timed["ratio"] = whole[0] / timed["ms"] if whole else timed["ratio"]
    if times > 1:
        timed |= {"timed_part": f"1/{times}", "peak_bytes": None}
    return timed


def _row(row, peak: float) -> dict:
    fraction = row.gflops * 1e9 / peak
    target = TARGETS.get((row.shape, row.mode)) if row.implementation == "triton" else None
    return asdict(row) | {"peak_fraction": fraction, "target": target}


def _fields(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("target", "timed_part")}


@contextmanager
def _memory_returned(setting: Setting) -> Iterator[None]:
    import gc

    import torch

    try:
        yield
    finally:
        gc.collect()
        torch._dynamo.reset()
        if not setting.dry:
            torch.cuda.empty_cache()


def _plot(setting: Setting, report) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    from hope_kernels.bench.plots import plot_speed

    plot_speed(report, setting.out / "gpu-suite.png")


def _scan_function(problem, backend: str) -> Callable:
    """Output of the scan as a function of its named inputs; of ``problem`` it keeps spec and chunk size alone."""
    from hope_kernels import memory_scan

    spec, chunk_size = problem.spec, problem.chunk_size

    def scan(named: dict):
        output, _ = memory_scan(
            *(named[name] for name in ("q", "k", "v", "lr")),
            tuple(named[name] for name in spec.weight_names),
            spec=spec,
            chunk_size=chunk_size,
            retention=named.get("retention"),
            momentum=named.get("momentum"),
            backend=backend,
        )
        return output

    return scan


def _with_gradients(problem, function: Callable) -> dict:
    import torch

    leaves = problem.requires_grad()
    inputs = leaves.inputs()
    output = function(inputs)
    gradients = torch.autograd.grad(output, list(inputs.values()), leaves.d_output)
    return {"output": output.detach()} | {f"d {name}": g for name, g in zip(inputs, gradients, strict=True)}


STAGES = {stage.__name__: stage for stage in (build, parity, bench, opcheck, compile, graph, sanitizer)}


# ---- running them ----------------------------------------------------------------------------------------------------


def _leave(setting: Setting, stage: str, result: dict) -> None:
    """What a stage has so far: it stays if the stage is stopped."""
    (setting.out / f"{stage}.json").write_text(json.dumps(result))


def run_stage(stage: str, options: argparse.Namespace, limit: float) -> dict:
    """One stage in a process of its own; its result, or why it has none."""
    left = options.out / f"{stage}.json"
    left.unlink(missing_ok=True)
    log = options.out / f"{stage}.log"
    environment = dict(os.environ)
    if options.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, "--child", stage, "--out", str(options.out)]
    start = time.monotonic()
    with log.open("w") as output:
        child = subprocess.Popen(
            [*command, *(["--dry-run"] * options.dry_run)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = None
    result = json.loads(left.read_text()) if left.exists() else {"passed": False, "summary": ""}
    left.unlink(missing_ok=True)
    if code is None:
        result |= {"passed": False, "summary": f"stopped after {limit:.0f} s. {result['summary']}"}
    elif code != 0:
        last = log.read_text().strip().splitlines()[-1:] or ["no output"]
        result |= {"passed": False, "summary": f"exit {code}: {last[0][:300]}. {result['summary']}"}
    return result | {"seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="some stages only")
    parser.add_argument("--out", type=Path, default=Path("gpu_suite_output"), help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny sizes, interpreted kernels")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.child:
        setting = Setting(options.out, dry=options.dry_run)
        _leave(setting, options.child, (STAGES | {"sanitized": sanitized})[options.child](setting))
        return 0
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("There is no GPU that torch can use: nothing was run. --dry-run goes through the stages on the CPU.")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    from hope_kernels.bench.machine import stamp

    report = stamp("gpu-suite", ["python", *sys.argv]) | {"dry_run": options.dry_run, "stages": {}}
    report["versions"] |= {"triton": _triton_version(), "cuda": torch.version.cuda or torch.version.hip}
    deadline = time.monotonic() + TOTAL_LIMIT
    for stage in (name for name in STAGES if name in options.stage):
        limit = min(LIMITS[stage], deadline - time.monotonic())
        result = run_stage(stage, options, limit) if limit > 1 else {"passed": False, "summary": "no time was left"}
        report["stages"][stage] = result
        print(f"{stage:10} {_verdict(result):8} {result.get('seconds', 0):6.1f} s  {result['summary']}", flush=True)
        (options.out / "gpu-suite.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "gpu-suite.md").write_text(_markdown(report))
    return 0 if all(result["passed"] is not False for result in report["stages"].values()) else 1


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _verdict(result: dict) -> str:
    return {True: "passed", False: "FAILED", None: "skipped"}[result["passed"]]


def _markdown(report: dict) -> str:
    machine, versions = report["machine"], report["versions"]
    lines = [
        "# GPU suite" + (" (dry run on a CPU: no number below means anything)" if report["dry_run"] else ""),
        "",
        f"{machine['gpu'] or machine['processor']}, torch {versions['torch']}, Triton {versions['triton']}, "
        f"{report['date']}, `{report['command']}`",
        "",
        "| stage | | s | |",
        "|---|---|---|---|",
        *(
            f"| {stage} | {_verdict(result)} | {result.get('seconds', 0)} | {result['summary'][:400]} |"
            for stage, result in report["stages"].items()
        ),
    ]
    measured = report["stages"].get("bench", {})
    if measured.get("rows"):
        lines += [
            "",
            f"Dense GEMM {measured['gemm_tflops']:.0f} TFLOP/s, device copy {measured['copy_tb_s']:.2f} TB/s, both "
            "measured in this run; FLOPs by the convention of `hope_kernels/bench/shapes.py`.",
            "",
            "| shape | mode | implementation | ms | x reference | of GEMM peak | target | peak memory MB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in measured["rows"]:
            target = "" if row["target"] is None else f"{row['target']:.0%}"
            memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
            name = row["implementation"]
            if "timed_part" in row:
                name += f" (timed over {row['timed_part']} of the tokens, scaled)"
            lines.append(
                f"| {row['shape']} | {row['mode']} | {name} | {row['ms']:.2f} | {row['ratio']:.1f} | "
                f"{row['peak_fraction']:.1%} | {target} | {memory} |"
            )
        lines += [f"\nNot measured: {problem}" for problem in measured.get("problems", [])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
