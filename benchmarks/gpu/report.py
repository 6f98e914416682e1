"""What a run of the suite says: each row against its target, tables for people, a picture.

``results_table`` of no report is the table of what was never measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

UNMEASURED = "not measured: no GPU was at hand"
START, END = "<!-- gpu-suite: begin -->", "<!-- gpu-suite: end -->"


@dataclass(frozen=True)
class Target:
    """One promise about speed on a GPU.

    Attributes:
        row: what it is about, as the table names it.
        stage: of the suite, that measures it.
        goal: in words.
        value: of a stage's result, for an engine; None where the run has none.
        bound, least: the number it is held to, and whether that is the least or the most it may be.
        show: the value in words.
    """

    row: str
    stage: str
    goal: str
    value: Callable[[dict, str], float | None]
    bound: float
    least: bool
    show: Callable[[float], str]

    def met(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _times(value: float) -> str:
    return f"{value:.1f}x"


def _bench(shape: str, mode: str, field: str) -> Callable[[dict, str], float | None]:
    def value(result: dict, engine: str) -> float | None:
        for row in result.get("rows", []):
            if (row["shape"], row["mode"], row["implementation"]) == (shape, mode, engine):
                return row[field]
        return None

    return value


def _over_compiled(shape: str, mode: str) -> Callable[[dict, str], float | None]:
    """How many times faster than the reference through ``torch.compile``, both over the same chunks."""

    def value(result: dict, engine: str) -> float | None:
        ms = {
            row["implementation"]: row["ms"]
            for row in result.get("rows", [])
            if (row["shape"], row["mode"]) == (shape, mode)
        }
        if engine not in ms or "reference + torch.compile" not in ms:
            return None
        return ms["reference + torch.compile"] / ms[engine]

    return value


def _over_dense(mode: str) -> Callable[[dict, str], float | None]:
    """How many times faster than the engine's dense plan its factored one is."""

    def value(result: dict, engine: str) -> float | None:
        ms = {row["implementation"]: row["ms"] for row in result.get("rows", []) if row["mode"] == mode}
        plan = f"{engine}:factored"
        return ms[engine] / ms[plan] if engine in ms and plan in ms else None

    return value


def _decode(batch: int, field: str) -> Callable[[dict, str], float | None]:
    def value(result: dict, engine: str) -> float | None:
        for row in result.get("rows", []):
            if (row["batch"], row["backend"], row["graph"]) == (batch, engine, True):
                return row[field]
        return None

    return value


def _growth(mode: str, field: str, by: Callable[[list[dict]], float]) -> Callable[[dict, str], float | None]:
    """A number from the rows of one mode at the least batch, shortest first; they need all their lengths."""

    def value(result: dict, engine: str) -> float | None:
        rows = [r for r in result.get("rows", []) if (r["mode"], r["implementation"]) == (mode, engine)]
        rows = [r for r in rows if r["batch"] == min(row["batch"] for row in rows)]
        rows.sort(key=lambda row: row["tokens"])
        return None if len(rows) < 3 or any(row[field] is None for row in rows) else by(rows)

    return value


def _spread(rows: list[dict]) -> float:
    each = [row["ns_per_head_token"] for row in rows]
    return max(each) / min(each) - 1


def _memory_growth(rows: list[dict]) -> float:
    """Growth of the working memory from the second to the last length over that of the chunks' square root."""
    first, last = rows[-2], rows[-1]
    return last["working_bytes"] / max(1, first["working_bytes"]) / (last["chunks"] / first["chunks"]) ** 0.5


def _shape_targets(
    shape: str, mode: str, part: float, times: float | None, stretch: float | None = None
) -> list[Target]:
    goal = f"at least {part:.0%} of the GEMM peak" + ("" if stretch is None else f" (stretch {stretch:.0%})")
    row = f"{shape} {mode}"
    found = [Target(row, "bench", goal, _bench(shape, mode, "peak_fraction"), part, True, _percent)]
    if times is not None:
        goal = f"at least {times:.0f}x eager"
        found.append(Target(row, "bench", goal, _bench(shape, mode, "ratio"), times, True, _times))
    return found


ENGINES = {"triton": "Triton", "cuda": "CUDA"}
FORWARD, BOTH = "forward", "forward+backward"
TARGETS = (
    *_shape_targets("G16", FORWARD, 0.06, 10),
    *_shape_targets("G16", BOTH, 0.05, None),
    *_shape_targets("G64", FORWARD, 0.18, 7, 0.25),
    *_shape_targets("G64", BOTH, 0.13, None, 0.18),
    *_shape_targets("GL", FORWARD, 0.78, None),
    *_shape_targets("GL", BOTH, 0.65, None),
    Target(
        "decode, batch 64, median token", "decode", "at least 85% of the copy bandwidth", _decode(64, "copy_fraction"),
        0.85, True, _percent,
    ),
    Target(
        "decode, batch 1, median token", "decode", "at most 12 µs for the stack", _decode(1, "us_median"), 12.0, False,
        lambda value: f"{value:.1f} µs",
    ),
    Target(
        "decode, batch 1, launches of a token", "decode", "1", _decode(1, "launches"), 1, False,
        lambda value: f"{value:.0f}",
    ),
    *(
        Target(
            f"time per token, 1k to 64k tokens, {mode}", "scale", "the same within 10%",
            _growth(mode, "ns_per_head_token", _spread), 0.10, False, _percent,
        )
        for mode in (FORWARD, BOTH)
    ),
    Target(
        "working memory, 8k to 64k tokens, forward+backward", "scale", "grows no faster than the root of the chunks",
        _growth(BOTH, "working_bytes", _memory_growth), 1.0, False, lambda value: f"{value:.2f} of that growth",
    ),
)  # fmt: skip
# Shown beside the targets without one of their own: the compiled reference is what a user could have instead, the
# factored plan what backend=None may take.
BESIDE = (
    *(
        Target(
            f"{shape} {mode}, 8 chunks", "compiled", "beside torch.compile", _over_compiled(shape, mode), 0.0, True,
            _times,
        )
        for shape in ("G16", "G64", "GL")
        for mode in (FORWARD, BOTH)
    ),
    *(
        Target(f"GF {mode}, factored", "factored", "beside the dense plan", _over_dense(mode), 0.0, True, _times)
        for mode in (FORWARD, BOTH)
    ),
)  # fmt: skip


def judged(report: dict | None, engine: str) -> list[tuple[Target, str, str]]:
    """Every target with what was measured of an engine and the verdict on it, both in words."""
    found = []
    for target in (*TARGETS, *BESIDE):
        if report is None:
            found.append((target, UNMEASURED, ""))
            continue
        stage = report["stages"].get(target.stage)
        value = None if stage is None else target.value(stage, engine)
        if value is None:
            why = f"{target.stage} was not run" if stage is None else f"no such row in {target.stage}"
            found.append((target, f"not measured: {why}", ""))
        else:
            verdict = "" if target in BESIDE else "met" if target.met(value) else "missed"
            found.append((target, target.show(value), verdict))
    return found


def results_table(report: dict | None) -> str:
    """Markdown: each row of the GPU benchmark with its target, what was measured of each engine and the verdict."""
    columns = zip(*(judged(report, engine) for engine in ENGINES), strict=True)
    head = (f"{heading}{part}" for heading in ENGINES.values() for part in ("", ": verdict"))
    return table(
        ("row (bfloat16)", "target", *head),
        ((row[0][0].row, row[0][0].goal, *(cell for _, *cells in row for cell in cells)) for row in columns),
    )


def machine_line(report: dict) -> str:
    machine, versions = report["machine"], report["versions"]
    return (
        f"{machine['gpu'] or machine['processor']}, Python {versions['python']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, CUDA {versions['cuda']}, {report['date']}, `{report['command']}`"
    )


def in_document(text: str, report: dict | None) -> str:
    """The document with the table between its two marks made anew.

    Raises:
        ValueError: it has not both marks.
    """
    before, begin, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"want the marks {START} and {END} in the document")
    said = "No run yet." if report is None else f"Measured: {machine_line(report)}."
    return f"{before}{START}\n\n{said}\n\n{results_table(report)}\n\n{END}{after}"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "/") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(result: dict) -> str:
    return {True: "passed", False: "FAILED", None: "skipped"}[result["passed"]]


def markdown(report: dict) -> str:
    """The whole report for people."""
    stages = report["stages"]
    parts = [
        "# GPU suite" + (" (dry run on a CPU: no number below means anything)" if report["dry_run"] else ""),
        machine_line(report),
        table(
            ("stage", "", "s", ""),
            ((name, verdict(r), r.get("seconds", 0), r["summary"][:600]) for name, r in stages.items()),
        ),
        "## Targets",
        results_table(report),
        *_bench_section(stages),
        *_decode_section(stages),
        *_scale_section(stages),
        *_engines_section(stages),
        *_tune_section(stages),
        *[f"Refused: {why}" for result in stages.values() for why in result.get("refusals", [])],
        *[f"Not measured: {p}" for result in stages.values() for p in result.get("problems", [])],
        report.get("plot", ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bench_section(stages: dict) -> Iterable[str]:
    timed = [stages[name] for name in ("bench", "compiled", "factored") if name in stages]
    rows = [row for result in timed for row in result.get("rows", [])]
    if not rows:
        return
    measured = [result["peaks"] for result in timed if result.get("peaks")]
    yield "## Shapes"
    yield (
        f"Dense GEMM {max(p['gemm_tflops'] for p in measured):.3g} TFLOP/s, device copy "
        f"{max(p['copy_tb_s'] for p in measured):.3g} TB/s, measured in this run; FLOPs by the convention of "
        "`hope_kernels/bench/shapes.py`; ratios of rows of equal sizes, timed in the same rounds."
    )
    yield table(
        ("shape", "sizes", "mode", "implementation", "ms", "spread", "x reference", "of GEMM peak", "peak memory MB",
         "difference", ""),
        (
            (
                row["shape"], row["sizes"], row["mode"], row["implementation"], f"{row['ms']:.3f}",
                f"{row['spread']:.0%}", f"{row['ratio']:.2f}", _or_none(row["peak_fraction"], _percent),
                _or_none(row["peak_bytes"], lambda x: f"{x / 1e6:.0f}"), f"{row['difference']:.1e}", row["note"],
            )
            for row in rows
        ),
    )  # fmt: skip


def _or_none(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)


def _engines_section(stages: dict) -> Iterable[str]:
    entries = stages.get("bench", {}).get("engines", [])
    if entries:
        yield "## Which engine"
        yield (
            "The faster engine of each shape that both ran, as entries of a table: `engines.json` of this run. With "
            "`HOPE_KERNELS_ENGINES` naming that file, or with its entries in `hope_kernels/backends/choice.json`, they "
            "decide what `backend=None` means on this device."
        )
        yield table(
            ("shape", "engine", *ENGINES.values()),
            (
                (
                    entry["measured"]["shape"], entry["engine"],
                    *(f"{entry['measured']['ms'][name]:.3f} ms" for name in ENGINES),
                )
                for entry in entries
            ),
        )  # fmt: skip


def _decode_section(stages: dict) -> Iterable[str]:
    rows = stages.get("decode", {}).get("rows", [])
    if rows:
        yield "## One token"
        yield table(
            ("batch", "backend", "launched", "µs, median token", "µs, worst token", "MB a token", "of copy bandwidth",
             "kernels"),
            (
                (
                    row["batch"], row["backend"], "as CUDA graphs" if row["graph"] else "by the host",
                    f"{row['us_median']:.1f}", f"{row['us_worst']:.1f}", f"{row['bytes_per_token'] / 1e6:.1f}",
                    _percent(row["copy_fraction"]), row["launches"] or "not counted",
                )
                for row in rows
            ),
        )  # fmt: skip


def _scale_section(stages: dict) -> Iterable[str]:
    rows = stages.get("scale", {}).get("rows", [])
    if rows:
        yield "## Growth"
        yield table(
            ("sizes", "mode", "implementation", "ms", "ns per head and token", "working memory MB"),
            (
                (
                    row["sizes"], row["mode"], row["implementation"], f"{row['ms']:.3f}",
                    f"{row['ns_per_head_token']:.3g}", _or_none(row["working_bytes"], lambda x: f"{x / 1e6:.0f}"),
                )
                for row in rows
            ),
        )  # fmt: skip


def _tune_section(stages: dict) -> Iterable[str]:
    rows = stages.get("tune", {}).get("rows", [])
    if rows:
        yield "## Tuning"
        rows = sorted(rows, key=lambda row: (row["kernel"], row["shape"], row["ms"] is None, row["ms"]))
        yield table(
            ("kernel", "shape", "configuration", "ms", ""),
            (
                (
                    row["kernel"], row["shape"], " ".join(f"{k}={v}" for k, v in row["settings"].items()),
                    _or_none(row["ms"], lambda x: f"{x:.3f}"), "the table's" if row["present"] else row["reason"] or "",
                )
                for row in rows
            ),
        )  # fmt: skip


def plot(report: dict, path: Path) -> str:
    """Draws the benchmark's rows to ``path``; what became of that."""
    rows = report["stages"].get("bench", {}).get("rows", [])
    if not rows:
        return "No picture: the benchmark has no rows."
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return f"No picture: matplotlib does not import ({error})."
    from hope_kernels.bench.plots import plot_speed
    from hope_kernels.bench.speed import SpeedReport, SpeedRow

    names = {field.name for field in fields(SpeedRow)}
    chosen = [SpeedRow(**{name: value for name, value in row.items() if name in names}) for row in rows]
    plot_speed(SpeedReport(chosen, report["stages"]["bench"]["peaks"]["gemm_tflops"] * 1e3), path)
    return f"Picture: `{path.name}`."
