"""The demo's one page: what was run, what came out, and what it means, in Markdown."""

from __future__ import annotations

from hope_kernels.bench.parity import ParityReport
from hope_kernels.bench.speed import SpeedReport
from hope_kernels.cli.demo_training import FAST, NAIVE, PLAIN, TrainingReport


def summary(
    head: dict,
    parity: ParityReport,
    speed: SpeedReport,
    training: TrainingReport,
    checks: list[tuple[bool, str]],
) -> str:
    """The page. ``head`` is :func:`hope_kernels.bench.machine.stamp`'s, ``checks`` hold outcome and claim."""
    return (
        "\n\n".join(
            [
                "# hope_kernels demo",
                _where(head),
                "\n".join(f"- {'**yes**' if passed else '**NO**'}: {claim}" for passed, claim in checks),
                _parity_part(parity),
                _speed_part(speed),
                _training_part(training),
            ]
        )
        + "\n"
    )


def _where(head: dict) -> str:
    machine, versions = head["machine"], head["versions"]
    return (
        f"`{head['command']}` on {machine['processor']} ({machine['cores']} cores, {machine['threads']} threads, "
        f"instruction set of the core: {machine['core_isa'] or 'core not built'}), "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f", {head['date']}."
    )


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _parity_part(parity: ParityReport) -> str:
    backends = list(dict.fromkeys(row.backend for row in parity.rows))
    dtypes = list(dict.fromkeys(row.dtype for row in parity.rows))
    rows = []
    for backend in backends:
        cells = []
        for dtype in dtypes:
            errors = [row.worst_error for row in parity.rows if (row.backend, row.dtype) == (backend, dtype)]
            cells.append(f"{max(errors):.1e}" if errors else "-")
        rows.append([backend, *cells])
    cases = len({row.case for row in parity.rows})
    return (
        "## 1. Is it right?\n\n"
        f"{cases} memories of different form, objective, rule and gates ran on every backend: fed whole, in ragged "
        "calls with the state carried between them, packed and padded. Output, final state and every gradient were "
        "compared with an oracle that goes token by token in float64 and takes the inner gradients by automatic "
        "differentiation. The worst relative error that was met:\n\n"
        + _table(["backend", *dtypes], rows)
        + "\n\nBudgets: 1e-10 in float64; in lower precision twice the error of the eager reference in the same dtype "
        "plus 4 units in the last place.\n\n![parity](parity.png)"
    )


def _speed_part(speed: SpeedReport) -> str:
    rows = [
        [
            row.shape,
            row.mode,
            row.implementation,
            f"{row.ms:.2f}",
            f"{row.ratio:.2f}x",
            f"{row.gflops:.0f}",
            "-" if row.peak_fraction is None else f"{100 * row.peak_fraction:.0f} %",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        ]
        for row in speed.rows
    ]
    sizes = "; ".join(f"{shape}: {text}" for shape, text in {row.shape: row.sizes for row in speed.rows}.items())
    peak = "not measured" if speed.peak_gflops is None else f"{speed.peak_gflops:.0f} GFLOP/s"
    return (
        "## 2. Is it fast?\n\n"
        "The same scan by the naive path (`reference`: eager PyTorch, chunk by chunk) and by every backend that runs "
        "here, alternating in one process, after their results were found to be equal. Medians; multiply-add peak "
        f"measured in the same run: {peak}; peak memory: of one call, beyond its inputs, in a process of its own "
        "(-: not measured).\n\n"
        + _table(["shape", "mode", "backend", "ms", "ratio", "GFLOP/s", "of peak", "peak MiB"], rows)
        + f"\n\n{sizes} (B sequences, T tokens, N heads, D features, H hidden, C tokens per write).\n\n"
        "![speed](speed.png)"
    )


def _training_part(training: TrainingReport) -> str:
    size = training.size
    rows = [
        [
            name,
            f"{training.parameters[name]:,}",
            f"{training.losses[name][-1]:.4f}",
            f"{training.bits_per_byte[name]:.3f}",
            f"{training.tokens_per_second[name]:,.0f}",
        ]
        for name in (PLAIN, NAIVE, FAST)
    ]
    return (
        "## 3. Does it learn real text?\n\n"
        f"A {size.depth}-block byte-level Transformer ({size.dim} wide) read CPython's own documentation "
        f"({training.train_bytes:,} bytes; {training.held_out_bytes:,} bytes of other topics held out) for "
        f"{size.steps} steps of {size.batch} windows of {size.context} bytes. Three times from one seed, on the same "
        "bytes: with its plain MLPs; with CMS layers in their place on the naive path; with the same CMS layers on "
        f"the fast path (backend `{training.fast_backend}`).\n\n"
        + _table(["model", "parameters", "last loss (nats)", "held-out bits per byte", "tokens/s"], rows)
        + f"\n\nThe two CMS curves are at most {training.curve_distance:.1e} nats apart over all steps (tolerance "
        f"{training.tolerance:.0e}): same layer, same training, {training.ratio:.2f} times the speed. Lower bits per "
        "byte are better; after so short a training the comparison with the plain MLP says that the layer learns, "
        "not which model wins in the end.\n\n![losses](losses.png)\n\n![throughput](throughput.png)"
    )
