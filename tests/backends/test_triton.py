"""The Triton engine: its two plans, launches, sizes, precision and what it refuses.

What every backend must satisfy is tested in tests/memory. Without a GPU the kernels run in Triton's interpreter, which
the suite's settings ask for.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hope_kernels import MemorySpec, available_backends, memory_read, memory_scan
from tests.cases import (
    Problem,
    assert_within_budget,
    device_of,
    evaluate_oracle,
    evaluate_package,
    make_problem,
    make_request,
    package_results,
)

STATUS = available_backends()["triton"]
pytestmark = pytest.mark.skipif(not STATUS, reason=f"triton: {STATUS.reason}")

if STATUS:
    from hope_kernels.backends import triton as engine
    from hope_kernels.backends.triton.compile_only import meta_problem
    from hope_kernels.backends.triton.configurations import Configuration, assume
    from hope_kernels.backends.triton.plan import choose_plan

PLANS = ("resident", "tiled")
DTYPES = (torch.float32, torch.float16)
SPECS = [
    MemorySpec("linear", rule="dgd"),
    MemorySpec("linear", residual=False, objective="dot"),
    MemorySpec("mlp", "gelu_tanh"),
    MemorySpec("mlp", "silu", residual=False, objective="self", rule="dgd"),
    MemorySpec("glu", "gelu", objective="error"),
    MemorySpec("glu", "relu2", objective="self", rule="dgd"),
]


def spec_id(spec: MemorySpec) -> str:
    return spec.key.replace("/", "-")


def problem_for(spec: MemorySpec, dtype: torch.dtype = torch.float32, **sizes) -> Problem:
    """Every gate the rule has; gates small enough for long chunks to stay bounded."""
    problem = make_problem(spec, retention=True, momentum=spec.rule == "gd", **({"max_lr": 0.1} | sizes))
    return problem.cast(dtype).to(device_of("triton"))


# ---- values ----------------------------------------------------------------------------------------------------------

SIZES = [
    # dim, hidden, chunk_size, tokens: no multiple of any block
    (1, 1, 1, 3),
    (3, 5, 2, 7),
    (17, 33, 20, 47),
    (40, 70, 16, 35),
]


@pytest.mark.interpreted_cases(10)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_any_size_stays_within_twice_the_eager_error(spec, sizes, plan, dtype):
    dim, hidden, chunk_size, tokens = sizes
    problem = problem_for(spec, dtype, dim=dim, hidden=hidden, chunk_size=chunk_size, tokens=tokens)
    found = evaluate_package(problem, f"triton:{plan}")
    assert_within_budget(found, evaluate_package(problem, "reference"), evaluate_oracle(problem), dtype)


def test_small_hidden_values_times_small_steps_stay_within_the_range_of_float16():
    """Steps weigh the errors of the last layer: hidden values times the late steps of a chunk would be subnormal."""
    problem = problem_for(
        MemorySpec("glu", "gelu", objective="error"), torch.float16, dim=17, hidden=33, chunk_size=20, tokens=47
    )
    found = evaluate_package(problem, "triton:resident")
    assert_within_budget(found, evaluate_package(problem, "reference"), evaluate_oracle(problem), torch.float16)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_chunk_of_several_blocks_stays_within_twice_the_eager_error(spec):
    """Chunks and features beyond what one program holds."""
    problem = problem_for(spec, batch=1, heads=1, dim=130, hidden=140, chunk_size=70, tokens=150, max_lr=0.05)
    found = evaluate_package(problem, "triton")
    assert_within_budget(found, evaluate_package(problem, "reference"), evaluate_oracle(problem), torch.float32)


@pytest.mark.interpreted_cases(4)
@pytest.mark.parametrize("empty", ["batch", "tokens"])
@pytest.mark.parametrize("plan", PLANS)
def test_no_sequences_or_no_tokens_leave_the_state_and_gradients_of_the_eager_path(plan, empty):
    problem = problem_for(MemorySpec("glu"), chunk_size=2, **{empty: 0})
    found, expected = (evaluate_package(problem, name).named() for name in (f"triton:{plan}", "reference"))
    assert sorted(found) == sorted(expected)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=0, atol=0)


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.interpreted_cases(9)
@pytest.mark.parametrize(
    ("chunk_size", "dim", "dtype", "name", "reason"),
    [
        (1, 1, torch.float32, "resident", "a chunk of 1 tokens of 1 features fits one program"),
        (16, 64, torch.float16, "resident", "fits one program"),
        (64, 64, torch.float16, "resident", "fits one program"),
        (65, 64, torch.float16, "tiled", "a chunk of 65 tokens is over the 64"),
        (16, 129, torch.float16, "tiled", "a token of 129 features is over the 128"),
        (2048, 1024, torch.float16, "tiled", "a chunk of 2048 tokens"),
        (64, 128, torch.float32, "tiled", "no resident configuration of the forward is known"),
    ],
)
def test_the_plan_follows_from_the_sizes_and_the_table(chunk_size, dim, dtype, name, reason):
    sizes = {"batch": 1, "tokens": 2 * chunk_size, "heads": 1, "dim": dim, "hidden": 8, "chunk_size": chunk_size}
    choice = choose_plan(meta_problem(MemorySpec(), dtype=dtype, **sizes), "forward")
    assert choice.name == name
    assert reason in choice.reason


def test_forward_and_backward_each_follow_their_own_configurations():
    problem = meta_problem(
        MemorySpec(), dtype=torch.float16, batch=1, tokens=66, heads=1, dim=64, hidden=8, chunk_size=33
    )
    for absent, present in (("forward", "backward"), ("backward", "forward")):
        known = {f"resident_{absent}": None, f"resident_{present}": Configuration.of(block_hidden=16, num_warps=4)}
        with assume(known):
            choice = choose_plan(problem, absent)
            assert choice.name == "tiled"
            assert f"no resident configuration of the {absent} is known for" in choice.reason
            assert choose_plan(problem, present).name == "resident"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.interpreted_cases(2)
def test_where_there_is_no_device_small_scans_of_every_form_and_rule_are_resident(dtype):
    """So the resident kernels are what tests of "triton" interpret, beside the tiled ones of larger sizes."""
    sizes = {"batch": 1, "tokens": 40, "heads": 1, "dim": 16, "hidden": 16, "chunk_size": 16}
    for form in ("linear", "mlp", "glu"):
        for rule in ("gd", "dgd"):
            problem = meta_problem(MemorySpec(form, rule=rule), dtype=dtype, **sizes)
            for direction in ("forward", "backward"):
                assert choose_plan(problem, direction).name == "resident", (form, rule, direction)


@contextmanager
def either_plan(directions: dict[str, bool]) -> Iterator[None]:
    """The resident plan for those directions that are true, the tiled plan for the others."""
    configuration = Configuration.of(block_hidden=16, num_warps=4)
    known = {f"resident_{name}": configuration if resident else None for name, resident in directions.items()}
    with assume(known):
        yield


@pytest.mark.parametrize("forward", [True, False], ids=["resident-tiled", "tiled-resident"])
@pytest.mark.parametrize("bptt_chunks", [None, 3])
@pytest.mark.parametrize(
    "spec", [MemorySpec("mlp"), MemorySpec("glu", "silu", objective="self", rule="dgd")], ids=spec_id
)
def test_the_backward_of_one_plan_takes_the_checkpoints_of_the_other(spec, bptt_chunks, forward, monkeypatch):
    """Two calls, of four chunks and of two, with checkpoints and pending tokens; momentum with gd."""
    problem = problem_for(spec, chunk_size=2, tokens=13, heads=1)
    with either_plan({"forward": forward, "backward": not forward}), monkeypatch.context() as patch:
        counted = Launches(patch)
        found = evaluate_package(problem, "triton", lengths=[9, 4], bptt_chunks=bptt_chunks)
    assert (counted.names["forward_kernel"], counted.names["backward_kernel"]) == ((2, 0) if forward else (0, 2))
    expected = evaluate_package(problem, "reference", bptt_chunks=bptt_chunks)
    assert_within_budget(found, expected, evaluate_oracle(problem, bptt_chunks=bptt_chunks), torch.float32)


@pytest.mark.parametrize("forward", [True, False], ids=["resident-tiled", "tiled-resident"])
def test_so_it_does_where_sequences_are_packed(forward):
    problem = problem_for(MemorySpec("mlp", "silu"), batch=1, chunk_size=2, tokens=21, heads=1)
    offsets = torch.tensor([0, 7, 7, 8, 21], device=device_of("triton"))

    def gradients(backend: str) -> list[torch.Tensor]:
        leaves = problem.map(lambda _, t: t.detach().clone().requires_grad_())
        found = memory_scan(
            leaves["q"], leaves["k"], leaves["v"], leaves["lr"], leaves.weights, spec=leaves.spec, chunk_size=2,
            retention=leaves["retention"], momentum=leaves["momentum"], cu_seqlens=offsets, backend=backend,
        )  # fmt: skip
        loss = found.output.square().sum() + sum(w.square().sum() for w in found.state.weights)
        return list(torch.autograd.grad(loss, list(leaves.tensors.values())))

    with either_plan({"forward": forward, "backward": not forward}):
        mixed = gradients("triton")
    for found, expected in zip(mixed, gradients("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_scans_launched_together_are_grouped_by_the_plan_of_the_direction(monkeypatch):
    """Three scans: one that is tiled both ways, two whose backward alone is."""
    problems = [
        meta_problem(
            MemorySpec(), dtype=torch.float32, batch=1, tokens=70, heads=1, dim=4, hidden=4, chunk_size=chunk_size
        )
        for chunk_size in (4, 70, 8)
    ]
    called: list[tuple[str, list[int]]] = []
    for plan in PLANS:
        module = importlib.import_module(f"hope_kernels.backends.triton.{plan}")
        for direction in ("forward", "backward"):

            def scans(some, *_, name=f"{plan} {direction}", **__):
                called.append((name, [problem.chunk_size for problem in some]))
                return [problem.chunk_size for problem in some]

            monkeypatch.setattr(module, f"scans_{direction}", scans)
    with either_plan({"forward": True, "backward": False}):
        assert engine.scans_forward(problems, save=True) == [4, 70, 8]
        assert engine.scans_backward(problems, [[]] * 3, [(None, [], [])] * 3) == [4, 70, 8]
    assert called == [("resident forward", [4, 8]), ("tiled forward", [70]), ("tiled backward", [4, 70, 8])]


@pytest.mark.parametrize(
    "spec", [MemorySpec("mlp"), MemorySpec("glu", "silu", objective="self", rule="dgd")], ids=spec_id
)
@pytest.mark.interpreted_cases(2)
def test_scans_launched_together_give_what_each_gives_alone(spec, monkeypatch):
    """Chunk sizes that one compiled body serves, one that needs another, and pending tokens."""
    sizes = {"batch": 2, "tokens": 19, "heads": 1, "dim": 5, "hidden": 7, "dtype": torch.float32}
    options = {"retention": True, "momentum": True, "device": device_of("triton")}
    problems = [
        meta_problem(spec, chunk_size=chunk_size, pending=chunk_size - 1, **sizes, **options)
        for chunk_size in (4, 5, 16, 18)
    ]
    random = torch.Generator().manual_seed(0)
    for problem in problems:
        for x in (*problem.token_tensors, *problem.coefficients, *problem.weights, *problem.momentum):
            if x is not None:
                noise = torch.randn(x.shape, generator=random) / 3
                x.copy_(noise.sigmoid() / 20 if any(x is gate for gate in problem.coefficients) else noise)
    upstream = [
        (torch.randn(problem.q.shape, generator=random).to(problem.q), [None] * len(problem.weights), [])
        for problem in problems
    ]
    resident = either_plan({"forward": True, "backward": True})
    with resident, monkeypatch.context() as patch:
        counted = Launches(patch)
        together = engine.scans_forward(problems, save=True)
        gradients = engine.scans_backward(problems, [result[3] for result in together], upstream)
    assert counted.names == {"forward_levels_kernel": 1, "backward_levels_kernel": 1}
    for problem, found, found_gradients, given in zip(problems, together, gradients, upstream, strict=True):
        with either_plan({"forward": True, "backward": True}):
            alone = engine.scan_forward(problem, save=True)
            alone_gradients = engine.scan_backward(problem, alone[3], *given)
        torch.testing.assert_close(found[:3], alone[:3], rtol=1e-5, atol=1e-6)  # checkpoints have rows nobody reads
        for part, expected in zip(found_gradients, alone_gradients, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)


class Launches:
    """Kernels launched inside the ``with`` block, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        self.names: Counter[str] = Counter()
        for kind in (InterpretedFunction, JITFunction):
            original = kind.run

            def run(kernel, *args, original=original, **options):
                self.names[getattr(kernel, "__name__", None) or kernel.fn.__name__] += 1
                return original(kernel, *args, **options)

            monkeypatch.setattr(kind, "run", run)

    @property
    def total(self) -> int:
        return sum(self.names.values())


def launches_of(problem: Problem, backend: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Launches of a forward and of its backward."""
    with monkeypatch.context() as patch:
        counted = Launches(patch)
        results = package_results(problem.map(lambda _, t: t.requires_grad_()), backend=backend)
        forward = counted.total
        sum(r.sum() for r in results.values()).backward()
        return forward, counted.total - forward


def test_a_resident_scan_is_one_launch_forward_and_one_backward_whatever_the_length(monkeypatch):
    for tokens in (3, 9, 40):
        problem = problem_for(MemorySpec(), chunk_size=4, tokens=tokens)
        assert launches_of(problem, "triton:resident", monkeypatch) == (1, 1)


@pytest.mark.interpreted_cases(2)
@pytest.mark.parametrize("packed", [False, True])
def test_reads_of_more_programs_than_a_grid_may_have_are_several_launches(packed, monkeypatch):
    from hope_kernels.backends.triton import resident

    problem = problem_for(MemorySpec("linear"), batch=1 if packed else 5, tokens=10 if packed else 2, chunk_size=16)
    device = problem["q"].device
    own = torch.randn(5, *problem["weight0"].shape, generator=torch.Generator().manual_seed(0)).to(device)
    layout = {"cu_seqlens": torch.tensor([0, 2, 2, 3, 7, 10], device=device)} if packed else {}

    def output() -> torch.Tensor:
        return memory_scan(
            problem["q"], problem["k"], problem["v"], problem["lr"], (own,), spec=problem.spec, chunk_size=16,
            retention=problem["retention"], momentum=problem["momentum"], backend="triton:resident", **layout,
        ).output  # fmt: skip

    expected = output()
    assert resident.MOST_READING_PROGRAMS == 65535
    monkeypatch.setattr(resident, "MOST_READING_PROGRAMS", 5)  # two sequences of two heads
    with monkeypatch.context() as patch:
        counted = Launches(patch)
        assert torch.equal(output(), expected)
    assert counted.names == {"read_kernel": 3}


def test_tiled_launches_grow_with_the_chunks_alone(monkeypatch):
    def launches(**sizes: int) -> tuple[int, int]:
        sizes = {"batch": 1, "heads": 1, "chunk_size": 20, **sizes}
        return launches_of(problem_for(MemorySpec(), **sizes), "triton:tiled", monkeypatch)

    one, two, three = (launches(tokens=20 * n) for n in (1, 2, 3))
    assert two[0] - one[0] == three[0] - two[0] <= 8
    assert three[1] > two[1] > one[1]
    assert launches(tokens=40, batch=2, heads=2, dim=17, hidden=33) == two


def test_a_plan_asked_for_by_name_is_obeyed_or_refused(monkeypatch):
    problem = problem_for(MemorySpec(), chunk_size=4, tokens=9)
    for plan in PLANS:
        with monkeypatch.context() as patch:
            counted = Launches(patch)
            package_results(problem, backend=f"triton:{plan}")
        assert ("forward_kernel" in counted.names) == (plan == "resident")
    large = problem_for(MemorySpec(), chunk_size=70, tokens=75, batch=1, heads=1)
    with pytest.raises(RuntimeError, match=r"'triton:resident' cannot run this: a chunk of 70 tokens"):
        package_results(large, backend="triton:resident")
    with pytest.raises(ValueError, match=r"backend is 'triton:fast'; want 'triton', 'triton:resident' or"):
        package_results(problem, backend="triton:fast")
    with pytest.raises(ValueError, match=r"backend is 'cpu:tiled'; 'cpu' takes no option"):
        package_results(problem, backend="cpu:tiled")


def test_plans_agree_to_rounding_and_either_may_continue_the_others_stream():
    problem = problem_for(MemorySpec("mlp", "silu"), chunk_size=4, tokens=19)
    whole = package_results(problem, backend="triton:resident")
    first, second = problem.span(0, 10), problem.span(10, 19)

    def scan(part: Problem, memory, plan: str):
        return memory_scan(
            part["q"], part["k"], part["v"], part["lr"], memory, spec=part.spec, chunk_size=part.chunk_size,
            retention=part["retention"], momentum=part["momentum"], backend=f"triton:{plan}",
        )  # fmt: skip

    for plans in (("tiled", "resident"), ("resident", "tiled")):
        a = scan(first, problem.memory(), plans[0])
        b = scan(second, a.state, plans[1])
        torch.testing.assert_close(torch.cat([a.output, b.output], 1), whole["output"], rtol=1e-5, atol=1e-6)
        for i, w in enumerate(b.state.weights):
            torch.testing.assert_close(w, whole[f"weight{i}"], rtol=1e-5, atol=1e-6)


# ---- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.interpreted_cases(7)
@pytest.mark.parametrize(
    ("block", "sizes", "found"),
    [
        (128, (512,), 128),
        (128, (576,), 64),
        (64, (256, 1056), 32),
        (128, (16,), 16),
        (128, (48,), 64),  # 16 would divide it, and is too small
        (128, (5,), 16),
        (64, (64, 7), 64),
    ],
)
def test_a_block_is_halved_until_it_divides_the_sizes_but_not_below_32(block, sizes, found):
    from hope_kernels.backends.triton.tiled_tiles import fit

    assert fit(block, *sizes) == found


def test_tiles_are_those_of_the_table_and_of_the_entry_for_odd_sizes_where_none_divides():
    from hope_kernels.backends.triton.configurations import ANY, Device, ShapeClass
    from hope_kernels.backends.triton.tiled_tiles import product_tile

    def cut(rows: int, columns: int, terms: int) -> tuple:
        tile = product_tile(
            "tiled_write", ShapeClass("mlp", "gd", 16, 64, 64), Device(ANY, ANY), rows, columns, (terms,)
        )
        return tile.rows, tile.columns, tile.inner, tile.options, tile.even

    whole = Configuration.of(rows=256, columns=128, inner=64, num_warps=8, num_stages=4)
    odd = Configuration.of(rows=64, columns=32, inner=16, num_warps=2)
    with assume({"tiled_write": whole, "tiled_odd": odd}):
        assert cut(512, 256, 128) == (256, 128, 64, {"num_warps": 8, "num_stages": 4}, True)
        assert cut(512, 192, 96) == (256, 64, 32, {"num_warps": 4, "num_stages": 4}, True)
        assert cut(512, 250, 128) == (64, 32, 16, {"num_warps": 2}, False)


def test_every_tile_of_the_shipped_table_is_compiled_by_the_report():
    from hope_kernels.backends.triton.configurations import ANY, SHIPPED, load
    from hope_kernels.bench.kernel_resources import shipped_subjects

    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
        subjects = shipped_subjects([architecture])
        entries = [e for e in load(SHIPPED) if not e.kernel.startswith("resident_")]
        entries = [e for e in entries if e.device in (architecture, ANY)]
        for entry in entries:
            assert any(s.kernel == entry.kernel and entry.holds_for(s.shape) for s in subjects), entry


# ---- status ----------------------------------------------------------------------------------------------------------


def test_what_it_cannot_run_is_refused_with_the_reason():
    problem = make_problem(MemorySpec(), chunk_size=4)
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 or float16 tokens, got torch.float64"):
        memory_read(problem["q"], problem.weights, spec=problem.spec, backend="triton")
    if engine.interpreted():
        low = problem.cast(torch.bfloat16)
        with pytest.raises(RuntimeError, match=r"interpreter computes bfloat16 wrongly"):
            memory_read(low["q"], low.weights, spec=low.spec, backend="triton")


@pytest.mark.interpreted_cases(2)
@pytest.mark.parametrize(("interpret", "available"), [("1", True), ("0", torch.cuda.is_available())])
def test_the_status_names_the_interpreter_or_the_gpu_that_is_missing(interpret, available):
    code = (
        "from hope_kernels import available_backends\n"
        "status = available_backends()['triton']\n"
        "print(bool(status), status.reason)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.startswith(f"{available} Triton 3.")
    wanted = "interpreted on CPU tensors" if interpret == "1" else "on " if available else "needs a GPU"
    assert wanted in result.stdout


def test_a_triton_that_is_too_old_is_not_available_and_no_kernel_of_it_is_imported():
    """PyTorch 2.6 brings Triton 3.2, in which the kernels cannot even be defined."""
    code = (
        "import sys, triton\n"
        "triton.__version__ = '3.2.0'\n"
        "from hope_kernels import available_backends\n"
        "status = available_backends()['triton']\n"
        "print(bool(status), 'hope_kernels.backends.triton.operands' in sys.modules, status.reason)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("False False Triton 3.2.0 is older than 3.6; install it with: pip install")


def test_automatic_choice_on_a_cpu_never_takes_the_interpreter():
    from hope_kernels.backends import select

    assert select(None, make_request()) != "triton"
