"""What a GPU is timed at: the named shapes, ``torch.compile``, growth with length and batch, decoding; and tuning.

Every part runs in a process of its own and alone on the machine, measures the peaks it is held against itself, and
leaves each row as it is taken. Times follow :mod:`hope_kernels.bench.timing`; nothing is timed before its results are
finite and those of the reference in the same dtype.
"""

from __future__ import annotations

import datetime
import gc
import json
import statistics
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace

import torch

from benchmarks.gpu.checks import first_line, sized
from benchmarks.gpu.children import result_file
from benchmarks.gpu.setting import Setting
from hope_kernels.backends import choice
from hope_kernels.backends.tables import padded
from hope_kernels.bench.decode import DECODE, DecodeShape, measure_decode, refusal
from hope_kernels.bench.gpu import bytes_kept_by_reference, copy_peak, gemm_peak, peak_memory
from hope_kernels.bench.implementations import REFERENCE, Implementation, make_call
from hope_kernels.bench.machine import describe_machine
from hope_kernels.bench.problems import Problem, shape_problem
from hope_kernels.bench.shapes import GPU_SHAPES, MODES, SHAPES, Shape
from hope_kernels.bench.speed import DisagreementError, compare_speed
from hope_kernels.bench.timing import Timer, time_side_by_side

COMPILED = Implementation("reference", compiled=True)
# torch.compile unrolls the reference's loop over chunks: it is compared over this many.
COMPILED_CHUNKS = 8
# A reference that keeps more than this part of the free memory for its backward is compared at fewer tokens.
ROOM = 0.6


def peaks(setting: Setting) -> dict:
    """Rates measured now: dense products in the benchmark's dtype, copies within the device."""
    tiny = {"size": 256, "repeats": 3} if setting.dry else {}
    gemm = gemm_peak(setting.dtype, setting.device, **tiny)
    copy = copy_peak(setting.device, **(tiny and {"size": 1 << 20, "repeats": 3}))
    return {"gemm_tflops": gemm / 1e12, "copy_tb_s": copy / 1e12}


def gathered(setting: Setting, names: list[str]) -> dict:
    """The parts one after the other: their rows, problems, and the highest peaks any of them measured."""
    result: dict = {"rows": [], "problems": [], "refusals": [], "peaks": {}}

    def finished(name: str, part: dict) -> None:
        result["rows"] += part.get("rows", [])
        result["problems"] += part.get("problems", [])
        result["refusals"] += part.get("refusals", [])
        if part["passed"] is not True and not part.get("problems"):
            result["problems"].append(f"{name}: {part['summary']}")
        for peak, value in part.get("peaks", {}).items():
            result["peaks"][peak] = max(value, result["peaks"].get(peak, 0.0))
        setting.leave(**result)

    done = setting.parts(names, at_once=1, finished=finished)
    result["problems"] += [f"{name}: no time was left" for name in names if name not in done]
    said = [f"{len(result['rows'])} rows", f"{len(result['problems'])} not measured", *result["problems"][:2]]
    said += [f"{name} {value:.3g}" for name, value in result["peaks"].items()]
    return result | {"passed": bool(result["rows"]) and not result["problems"], "summary": "; ".join(said)}


class Rows:
    """The rows of one part, left behind as they come."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.peaks = peaks(setting)
        self.rows: list[dict] = []
        self.problems: list[str] = []
        self.refusals: list[str] = []  # no failure: a backend says what it does not run
        self._leave()

    def add(self, rows: Iterable[dict]) -> None:
        self.rows += rows
        self._leave()

    def _leave(self) -> None:
        self._setting.leave(rows=self.rows, problems=self.problems, refusals=self.refusals, peaks=self.peaks)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """One that fails is noted, and its memory given back: the next ones are still worth having."""
        try:
            yield
        except Exception as error:
            self.problems.append(f"{what}: {first_line(error)}")
        finally:
            release(self._setting)
            self._leave()

    def result(self) -> dict:
        summary = f"{len(self.rows)} rows, {len(self.problems)} not measured"
        return {
            "passed": bool(self.rows) and not self.problems,
            "summary": "; ".join([summary, *self.problems[:1]]),
            "rows": self.rows,
            "problems": self.problems,
            "refusals": self.refusals,
            "peaks": self.peaks,
        }


def release(setting: Setting) -> None:
    """Memory that nothing refers to, back to the device."""
    gc.collect()
    torch._dynamo.reset()
    if not setting.dry:
        torch.cuda.empty_cache()


def engines(setting: Setting, problem: Problem, mode: str) -> list[Implementation]:
    """The compiled backends that run this, each with the plan it chooses."""
    request = problem.request(gradients=mode != "forward")
    return [Implementation(name) for name in setting.backends(request) if ":" not in name]


# ---- the named shapes ------------------------------------------------------------------------------------------------


def bench(setting: Setting) -> dict:
    """Each GPU shape, forward and forward+backward: the reference and every compiled backend, alternating.

    Where both of a GPU's engines ran, the faster one goes into a table in the suite's folder: with
    ``HOPE_KERNELS_ENGINES=<that file>``, or its entries in ``hope_kernels/backends/choice.json``, it is what
    ``backend=None`` means.
    """
    result = gathered(setting, [f"bench:{name}" for name in GPU_SHAPES])
    found = faster_engines(result["rows"], setting.dtype, describe_machine()["gpu"] or "a CPU")
    if found:
        choice.record(setting.out / "engines.json", found)
    return result | {"engines": [entry.as_dict() for entry in found]}


def faster_engines(rows: Iterable[dict], dtype: torch.dtype, device: str) -> list[choice.Entry]:
    """The table's entry for each shape and mode that every engine of a GPU was timed at."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["implementation"] in choice.ENGINES:
            times.setdefault((row["shape"], row["mode"]), {})[row["implementation"]] = row["ms"]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    entries = []
    for (name, mode), ms in times.items():
        if ms.keys() != set(choice.ENGINES):
            continue
        shape = SHAPES[name]
        call = choice.CallClass(
            form=shape.form,
            rule=shape.spec.rule,
            operand_bits=torch.finfo(dtype).bits,
            block_chunk=padded(shape.chunk_size),
            block_dim=padded(shape.dim),
            gradients=mode != "forward",
        )
        classes = {field: (value,) for field, value in call._asdict().items()}
        measured = {"device": device, "torch": torch.__version__, "date": today, "shape": f"{name} {mode}", "ms": ms}
        entries.append(choice.Entry(device, classes, min(ms, key=ms.__getitem__), measured, ""))
    return entries


def bench_part(setting: Setting, name: str) -> dict:
    found = Rows(setting)
    shape = sized(SHAPES[name], setting)
    problem = shape_problem(shape, dtype=setting.dtype, device=setting.device)
    for mode in MODES:
        note, fitting, inputs = "", shape, problem
        while not reference_fits(setting, fitting, mode) and fitting.tokens >= 2 * fitting.chunk_size:
            fitting = fitting.scaled(tokens=fitting.tokens // 2)
            inputs = problem.first(fitting.tokens)
            note = f"at {fitting.tokens} tokens: the reference keeps too much for this memory at {shape.tokens}"
        with found.attempt(f"{name} {mode}"):
            found.add(compared(setting, fitting, inputs, mode, [REFERENCE, *engines(setting, inputs, mode)], note))
            found.refusals += [
                f"{name} {mode}, {why}" for why in setting.refused(inputs.request(gradients=mode != "forward"))
            ]
    return found.result()


def compared(
    setting: Setting, shape: Shape, problem: Problem, mode: str, implementations: list[Implementation], note: str = ""
) -> list[dict]:
    """Rows of one shape and mode, each with the peak memory of a call."""
    report = compare_speed(
        [shape],
        implementations,
        modes=[mode],
        dtype=setting.dtype,
        device=setting.device,
        repeats=2 if setting.dry else 5,
        memory_modes=() if setting.dry else [mode],
        problem=problem,
    )
    return [asdict(row) | {"note": note} for row in report.rows]


def reference_fits(setting: Setting, shape: Shape, mode: str) -> bool:
    """Whether what the reference keeps for its backward leaves room for the rest of it; counted before it is run."""
    if setting.dry or mode == "forward":
        return True
    free, _ = torch.cuda.mem_get_info()
    return bytes_kept_by_reference(shape, setting.dtype) <= ROOM * free


def repeated(problem: Problem, times: int) -> Problem:
    """The problem with its tokens so many times over."""
    return replace(
        problem,
        **{
            name: getattr(problem, name).repeat(1, times, *[1] * (getattr(problem, name).dim() - 2))
            for name in ("q", "k", "v", "d_output", "lr")
        },
    )


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled(setting: Setting) -> dict:
    """The reference through ``torch.compile`` beside it and the compiled backends, over eight chunks of each shape."""
    return gathered(setting, [f"compiled:{name}" for name in ("G64", "G16", "GL")])


def compiled_part(setting: Setting, name: str) -> dict:
    found = Rows(setting)
    shape = sized(SHAPES[name], setting)
    shape = shape.scaled(tokens=min(shape.tokens, COMPILED_CHUNKS * shape.chunk_size))
    problem = shape_problem(shape, dtype=setting.dtype, device=setting.device)
    others = [] if setting.dry else [COMPILED]  # minutes on a CPU
    for mode in MODES:
        with found.attempt(f"{name} {mode} torch.compile"):
            note = f"over {shape.tokens // shape.chunk_size} chunks"
            found.add(
                compared(setting, shape, problem, mode, [REFERENCE, *others, *engines(setting, problem, mode)], note)
            )
    return found.result()


# ---- the factored plan -----------------------------------------------------------------------------------------------

# Weights of a sequence's own take 128 MiB, and 1638 pairs cost as much: the last chunk starts with 1536.
LARGE = Shape("GF", "GPU, large memory of many sequences", 16, 2048, 1, 2048, 8192, 512)


def factored(setting: Setting) -> dict:
    """A large memory by the dense and by the factored plan, its products with pairs by Triton and by the library."""
    return gathered(setting, [f"factored:{mode}" for mode in MODES])


def factored_part(setting: Setting, mode: str) -> dict:
    found = Rows(setting)
    shape, note = sized(LARGE, setting), ""
    while not reference_fits(setting, shape, mode) and shape.batch > 1:
        shape = shape.scaled(batch=shape.batch // 2)
        note = f"with {shape.batch} sequences: the reference keeps too much for this memory with {LARGE.batch}"
    problem = shape_problem(shape, dtype=setting.dtype, device=setting.device)
    plans = [Implementation(f"{name}:factored") for name in ("triton", "reference")]
    with found.attempt(f"{shape.name} {mode}, dense and factored"):
        dense = engines(setting, problem, mode)
        found.add(compared(setting, shape, problem, mode, [REFERENCE, *dense, *plans], note))
    return found.result()


# ---- growth ----------------------------------------------------------------------------------------------------------


def scale(setting: Setting) -> dict:
    """G64 at 1k, 8k and 64k tokens, and at twice the batch: milliseconds, memory beyond inputs and results, state."""
    return gathered(setting, ["scale:tokens"])


def scale_part(setting: Setting, what: str) -> dict:
    found = Rows(setting)
    shape = sized(SHAPES["G64"], setting)
    problem = shape_problem(shape, dtype=setting.dtype, device=setting.device)
    for mode in MODES:
        for implementation in engines(setting, problem, mode):
            with found.attempt(f"{implementation.name} {mode}"):
                # One length at a time: at 64k tokens inputs and gradients take 12 GB.
                for part, times in ((8, 1), (1, 1), (1, 2 if setting.dry else 8)):
                    long = shape.scaled(tokens=max(shape.chunk_size, shape.tokens // part) * times)
                    inputs = repeated(problem.first(max(shape.chunk_size, shape.tokens // part)), times)
                    found.add([growth_row(setting, implementation, long, inputs, mode)])
                    del inputs
                    release(setting)
                wide = shape.scaled(batch=2 * shape.batch)
                both = replace(
                    problem,
                    **{name: torch.cat([getattr(problem, name)] * 2) for name in ("q", "k", "v", "d_output", "lr")},
                )
                found.add([growth_row(setting, implementation, wide, both, mode)])
    return found.result()


def growth_row(setting: Setting, implementation: Implementation, shape: Shape, problem: Problem, mode: str) -> dict:
    """One length or batch: the results are compared with the reference's elsewhere, here they must be finite."""
    call = make_call(implementation, problem, mode)
    results = call()
    if not all(x.isfinite().all() for x in results.values()):
        raise DisagreementError(f"{implementation.name} at {shape.sizes}, {mode}: results are not finite")
    result_bytes = sum(x.numel() * x.element_size() for x in results.values())
    del results
    timing = time_side_by_side({"it": call}, repeats=3 if setting.dry else 7, device=setting.device)["it"]
    return {
        "implementation": implementation.name,
        "mode": mode,
        "sizes": shape.sizes,
        "batch": shape.batch,
        "tokens": shape.tokens,
        "chunks": shape.tokens // shape.chunk_size,
        "ms": timing.median * 1e3,
        "ns_per_head_token": timing.median * 1e9 / shape.head_tokens,
        "working_bytes": None if setting.dry else peak_memory(call, setting.device) - result_bytes,
    }


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode(setting: Setting) -> dict:
    """One token at a time through a sequential Continuum Memory System, launched by the host and as CUDA graphs."""
    return gathered(setting, [f"decode:{batch}" for batch in ((2,) if setting.dry else (1, 64))])


def decode_part(setting: Setting, batch: str) -> dict:
    found = Rows(setting)
    shape = DecodeShape(heads=1, dim=8, hidden=16, chunk_sizes=(1, 2, None)) if setting.dry else DECODE
    names = ["reference", *(name for name in setting.backends() if ":" not in name)]
    reasons = {name: refusal(shape, name, setting.dtype, setting.device) for name in names}
    found.refusals = [f"decode: {reason}" for reason in reasons.values() if reason is not None]
    names = [name for name in names if reasons[name] is None]
    with found.attempt(f"decode, batch {batch}"):
        rows = measure_decode(
            shape,
            int(batch),
            names,
            dtype=setting.dtype,
            device=setting.device,
            rounds=1 if setting.dry else 7,
            problems=found.problems,
        )
        copied = found.peaks["copy_tb_s"] * 1e12
        found.add(
            asdict(row) | {"copy_fraction": row.bytes_per_token / (row.us_median * 1e-6) / copied} for row in rows
        )
    return found.result()


# ---- tuning ----------------------------------------------------------------------------------------------------------

# What is tried: hidden units of a block, warps, stages (None: Triton's own choice).
CANDIDATES = tuple(
    {"block_hidden": hidden, "num_warps": warps, "num_stages": stages}
    for hidden in (16, 32, 64)
    for warps in (4, 8)
    for stages in (None, 1)
)
TUNED = tuple(f"{kernel}:{name}" for kernel in ("resident_forward", "resident_backward") for name in ("G64", "G16"))


def tune(setting: Setting) -> dict:
    """The resident kernels' configurations at G64 and G16, and the tiles of products at GL, timed.

    The fastest configurations go to a table in the suite's folder: ``HOPE_KERNELS_TRITON_CONFIGURATIONS=<that file>``
    makes the engine use it. A tile is tried for several products at once: its times are reported, not written. All
    candidates are compiled side by side at first, so that timing them waits for no compiler.
    """
    compiling = [f"compiling:{subject}:{i}" for subject in TUNED for i in range(len(CANDIDATES))]
    compiling = [f"tiles:GL:{i}" for i in range(len(TILES))] + compiling  # these take longest
    result = {"rows": [], "problems": [], "table": "triton_configurations.json"}
    done: dict[str, dict] = {}
    if not setting.dry:
        done = setting.parts(compiling, at_once=12)
    result["problems"] += [f"{name}: {part['summary']}" for name, part in done.items() if part["passed"] is not True]
    setting.leave(**result)
    measured = gathered(setting, [*(f"tune:{subject}" for subject in TUNED), "tiles:GL"])
    return measured | {"problems": result["problems"] + measured["problems"], "table": result["table"]}


def _subject(setting: Setting, kernel: str, name: str, tokens: int | None):
    """The class of the shape, and a function that launches the kernel on inputs of it."""
    from hope_kernels.backends.triton import configurations

    shape = sized(SHAPES[name], setting)
    shape = shape if tokens is None else shape.scaled(tokens=tokens, batch=1)
    problem = shape_problem(shape, dtype=setting.dtype, device=setting.device).requires_grad()
    bits = torch.finfo(setting.dtype).bits
    described = configurations.ShapeClass(
        shape.form, shape.spec.rule, bits, padded(shape.chunk_size), padded(shape.dim)
    )
    if kernel == "resident_forward":
        return described, make_call(Implementation("triton:resident"), problem, "forward")
    from hope_kernels.bench.implementations import scan

    output, inputs = scan(problem, "triton:resident")[0], list(problem.inputs().values())
    return described, lambda: torch.autograd.grad(output, inputs, problem.d_output, retain_graph=True)


def compiling_part(setting: Setting, kernel: str, name: str, candidate: str) -> dict:
    """One candidate compiled, by running it on two chunks; the compiler keeps it on disk."""
    from hope_kernels.backends.triton.configurations import Configuration, assume

    with assume({kernel: Configuration.of(**CANDIDATES[int(candidate)])}):
        _, run = _subject(setting, kernel, name, 2 * SHAPES[name].chunk_size)
        run()
    torch.cuda.synchronize()
    return {"passed": True, "summary": "compiled"}


def compiles(setting: Setting, part: str) -> bool:
    """Whether the part that compiled a candidate said that it did; no part, no reason to leave it out."""
    path = result_file(setting.out, part)
    return not path.exists() or json.loads(path.read_text())["passed"] is True


def tune_part(setting: Setting, kernel: str, name: str) -> dict:
    from hope_kernels.backends.triton import configurations
    from hope_kernels.backends.triton.configurations import Configuration

    found = Rows(setting)
    candidates = [
        Configuration.of(**each)
        for i, each in enumerate(CANDIDATES)
        if setting.dry or compiles(setting, f"compiling:{kernel}:{name}:{i}")
    ]
    with found.attempt(f"{kernel} {name}"):
        shape, run = _subject(setting, kernel, name, None)
        present = configurations.choose(kernel, shape, configurations.device_of(torch.empty(0, device=setting.device)))
        if present is not None and present not in candidates:
            candidates.insert(0, present)
        if setting.dry:  # nothing to tune: each candidate runs once
            outcome: dict = {}
            timer = Timer(setting.device)
            for candidate in candidates[:2]:
                with configurations.assume({kernel: candidate}):
                    outcome[candidate] = statistics.median(timer(run) for _ in range(1))
        else:
            outcome = configurations.tune(
                kernel, shape, run, candidates, path=setting.out / "triton_configurations.json"
            )
        found.add(
            {
                "kernel": kernel,
                "shape": name,
                "settings": candidate.settings(),
                "present": candidate == present,
                "ms": seconds * 1e3 if isinstance(seconds, float) else None,
                "reason": None if isinstance(seconds, float) else seconds,
            }
            for candidate, seconds in outcome.items()
        )
    return found.result()


# Products that add up one matrix, and those fused with more; tiles tried: rows, columns, inner, warps, stages.
PLAIN = tuple(f"tiled_{name}" for name in ("output", "write", "delta_adjoint", "token_adjoint", "state_adjoint"))
FUSED = tuple(f"tiled_{name}" for name in ("hidden", "errors", "hidden_adjoint", "errors_adjoint"))
TILES = (
    None,  # those of the table
    (PLAIN, (128, 128, 64, 8, 4)),
    (PLAIN, (128, 128, 64, 4, 3)),
    (PLAIN, (128, 256, 64, 8, 3)),
    (PLAIN, (256, 128, 64, 8, 3)),
    (FUSED, (128, 64, 64, 4, 4)),
    (FUSED, (128, 128, 64, 8, 3)),
    (FUSED, (64, 64, 64, 8, 3)),
    (FUSED, (128, 64, 64, 8, 3)),
)


def tiles(candidate: tuple[tuple[str, ...], tuple[int, ...]] | None) -> AbstractContextManager[None]:
    """Inside, those products are cut into these tiles."""
    from hope_kernels.backends.triton.configurations import Configuration, assume

    if candidate is None:
        return nullcontext()
    names = ("rows", "columns", "inner", "num_warps", "num_stages")
    configuration = Configuration.of(**dict(zip(names, candidate[1], strict=True)))
    return assume(dict.fromkeys(candidate[0], configuration))


def tiles_part(setting: Setting, name: str, only: str | None = None) -> dict:
    """The tiled plan at ``name`` with each candidate; ``only`` one: compiled, by running it on two chunks."""
    shape = sized(SHAPES[name], setting)
    tiled = Implementation("triton:tiled")
    if only is not None:
        shape = shape.scaled(tokens=2 * shape.chunk_size, batch=1)
        problem = shape_problem(shape, dtype=setting.dtype, device=setting.device)
        with tiles(TILES[int(only)]):
            for mode in MODES:
                make_call(tiled, problem, mode)()
        torch.cuda.synchronize()
        return {"passed": True, "summary": "compiled"}
    found = Rows(setting)
    problem = shape_problem(shape, dtype=setting.dtype, device=setting.device)
    timer = Timer(setting.device)
    chosen = [each for i, each in enumerate(TILES) if setting.dry or compiles(setting, f"tiles:{name}:{i}")]
    for mode in MODES:
        call = make_call(tiled, problem, mode)
        samples: dict = {each: [] for each in (chosen[:2] if setting.dry else chosen)}
        with found.attempt(f"tiles {name} {mode}"):
            for round_index in range(2 if setting.dry else 6):  # the first warms up
                for each, times in samples.items():
                    with tiles(each):
                        seconds = timer(call)
                    if round_index:
                        times.append(seconds)
            found.add(
                {
                    "kernel": f"tiled, {mode}",
                    "shape": name,
                    "settings": {} if each is None else {"of": " ".join(each[0]), "tile": "/".join(map(str, each[1]))},
                    "present": each is None,
                    "ms": statistics.median(times) * 1e3,
                    "reason": None,
                }
                for each, times in samples.items()
            )
    return found.result()


STAGES = {stage.__name__: stage for stage in (bench, decode, scale, compiled, factored, tune)}
PARTS = {
    "bench": bench_part,
    "decode": decode_part,
    "scale": scale_part,
    "compiled": compiled_part,
    "factored": factored_part,
    "compiling": compiling_part,
    "tune": tune_part,
    "tiles": tiles_part,
}
