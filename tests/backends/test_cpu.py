"""The compiled CPU engine: instruction sets, threads, strides, precision, checkpoints, activations, processes.

What every backend must satisfy is tested in tests/memory; here is what only this engine promises.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hope_kernels import MemorySpec, available_backends, memory_read, memory_scan
from hope_kernels.backends.interface import ScanProblem
from hope_kernels.bench.timing import thread_count
from tests.cases import (
    Evaluation,
    Problem,
    assert_equal_to_rounding,
    assert_within_budget,
    evaluate,
    evaluate_oracle,
    evaluate_package,
    make_problem,
    make_request,
    package_results,
)

STATUS = available_backends()["cpu"]
pytestmark = pytest.mark.skipif(not STATUS, reason=f"cpu: {STATUS.reason}")

if STATUS:
    from hope_kernels import _core
    from hope_kernels.backends import cpu

SPECS = [
    MemorySpec("linear", rule="dgd"),
    MemorySpec("mlp", "gelu_tanh"),
    MemorySpec("mlp", "silu", residual=False, objective="self", rule="dgd"),
    MemorySpec("glu", "gelu", objective="dot"),
    MemorySpec("glu", "relu2", objective="self", rule="dgd"),
]


def spec_id(spec: MemorySpec) -> str:
    return spec.key.replace("/", "-")


def problem_for(spec: MemorySpec, **sizes) -> Problem:
    """Every gate the rule has; gates small enough for long chunks to stay bounded."""
    return make_problem(spec, retention=True, momentum=spec.rule == "gd", **({"max_lr": 0.1} | sizes))


def assert_identical(found: Evaluation, expected: Evaluation) -> None:
    """Bit for bit."""
    found_named, expected_named = found.named(), expected.named()
    assert sorted(found_named) == sorted(expected_named)
    changed = [name for name, want in expected_named.items() if not torch.equal(found_named[name], want)]
    assert not changed, f"not identical: {', '.join(changed)}"


# ---- sizes that are no multiple of any block -------------------------------------------------------------------------

SIZES = [
    # dim, hidden, chunk_size, tokens
    (1, 1, 1, 5),
    (3, 5, 2, 7),
    (17, 33, 7, 23),
    (64, 1, 16, 50),
    (100, 64, 16, 37),  # transposed weights need more room than the weights
    (64, 256, 100, 210),
    (100, 33, 100, 130),
    (3, 256, 7, 20),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_any_size_agrees_with_the_eager_path_in_float64(spec, sizes):
    dim, hidden, chunk_size, tokens = sizes
    problem = problem_for(spec, dim=dim, hidden=hidden, chunk_size=chunk_size, tokens=tokens)
    found, expected = evaluate_package(problem, "cpu"), evaluate_package(problem, "reference")
    assert_equal_to_rounding(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_low_precision_stays_within_twice_the_eager_error(spec, dtype):
    problem = problem_for(spec, dim=17, hidden=33, chunk_size=7, tokens=24).cast(dtype)
    truth = evaluate_oracle(problem)
    assert_within_budget(evaluate_package(problem, "cpu"), evaluate_package(problem, "reference"), truth, dtype)


# Chunks long enough for products in bfloat16, in sizes that fill neither pairs nor panels nor a packed block.
PACKED_SIZES = [(1, 5, 16, 37), (17, 70, 19, 61), (64, 1, 8, 50), (65, 300, 33, 70)]


@pytest.mark.parametrize("sizes", PACKED_SIZES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_products_in_bfloat16_stay_within_twice_the_eager_error(spec, sizes):
    dim, hidden, chunk_size, tokens = sizes
    problem = problem_for(spec, dim=dim, hidden=hidden, chunk_size=chunk_size, tokens=tokens).cast(torch.bfloat16)
    truth = evaluate_oracle(problem)
    found, eager = evaluate_package(problem, "cpu"), evaluate_package(problem, "reference")
    assert_within_budget(found, eager, truth, torch.bfloat16)


# ---- instruction sets ------------------------------------------------------------------------------------------------

_RUN_VARIANT = """
import json, sys, torch
from hope_kernels import MemorySpec, available_backends, _core
from tests.backends.test_cpu import SPECS, problem_for
from tests.cases import evaluate_package, package_results
worst = {}
for dtype, chunk_size in ((torch.float64, 7), (torch.float32, 7), (torch.bfloat16, 19)):
    for spec in SPECS:
        problem = problem_for(spec, dim=17, hidden=70, chunk_size=chunk_size, tokens=2 * chunk_size + 5).cast(dtype)
        found, expected = (evaluate_package(problem, backend).named() for backend in ("cpu", "reference"))
        for name, want in expected.items():
            error = (found[name].double() - want.double()).abs().max() / max(1.0, want.double().abs().max())
            worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error.item() if error == error else float("inf"))
problem = problem_for(SPECS[1], dim=17, hidden=70, chunk_size=19, tokens=43).cast(torch.bfloat16)
state, exact = (package_results(p, backend="cpu")["weight0"] for p in (problem, problem.cast(torch.float32)))
print(json.dumps({"isa": _core.isa(), "worst": worst, "rounds": not torch.equal(state, exact)}))
"""


def run_python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOPE_KERNELS_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("isa", _core.isas() if STATUS else [])
def test_every_instruction_set_this_processor_has_agrees_with_the_eager_path(isa):
    run = run_python(_RUN_VARIANT, isa)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["isa"] == isa
    assert report["worst"]["torch.float64"] < 1e-12
    assert report["worst"]["torch.float32"] < 2e-5
    assert report["worst"]["torch.bfloat16"] < 0.1
    assert report["rounds"] == (isa == "avx512bf16")  # the state from the same tokens in float32 differs


def test_the_newest_instruction_set_is_the_default():
    if "HOPE_KERNELS_CPU_ISA" in os.environ:
        pytest.skip("HOPE_KERNELS_CPU_ISA is set")
    assert _core.isa() == _core.isas()[0]
    assert _core.isas()[-1] == "baseline"


def test_an_unknown_instruction_set_makes_the_backend_unavailable_and_says_why():
    run = run_python(
        "from hope_kernels import available_backends as a; s = a()['cpu']; print(bool(s), s.reason)", "sse9"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("False") and "HOPE_KERNELS_CPU_ISA" in run.stdout


# ---- threads, batches, checkpoints: bit for bit ----------------------------------------------------------------------

SMALL = {"batch": 3, "heads": 2, "dim": 17, "hidden": 33, "chunk_size": 7, "tokens": 24}
# Chunks long enough for products in bfloat16.
PACKED = {"batch": 3, "heads": 2, "dim": 17, "hidden": 33, "chunk_size": 18, "tokens": 50}
# One task with products large enough to be shared between threads.
LARGE = {"batch": 1, "heads": 1, "dim": 200, "hidden": 300, "chunk_size": 80, "tokens": 170}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["many small tasks", "one large task"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_the_thread_count_changes_no_bit(spec, sizes, dtype):
    problem = problem_for(spec, **sizes).cast(dtype)
    with thread_count(1):
        alone = evaluate_package(problem, "cpu")
    for count in (2, 3, 7):
        with thread_count(count):
            assert_identical(evaluate_package(problem, "cpu"), alone)


@pytest.mark.parametrize("sizes", [SMALL, PACKED], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_row_alone_equals_the_row_in_a_batch_bit_for_bit(spec, sizes):
    problem = problem_for(spec, shared=False, **sizes).cast(torch.bfloat16 if sizes is PACKED else torch.float32)

    def results(p: Problem) -> dict[str, Tensor]:
        return package_results(p, backend="cpu")

    whole = evaluate(problem, results, ones_like_results(problem, results))
    for b in range(problem.batch):
        row = problem.row(b)
        alone = evaluate(row, results, ones_like_results(row, results))
        for name, got in alone.named().items():
            assert torch.equal(got[0], whole.named()[name][b]), f"{name} of row {b}"


def ones_like_results(problem: Problem, results) -> dict[str, Tensor]:
    """Cotangents that a row and its batch share."""
    return {name: torch.ones_like(value, dtype=torch.float64) for name, value in results(problem).items()}


@pytest.mark.parametrize("sizes", [SMALL, PACKED], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_call_of_any_length_gives_the_same_bits(spec, sizes):
    problem = problem_for(spec, **sizes).cast(torch.bfloat16 if sizes is PACKED else torch.float32)
    whole = package_results(problem, backend="cpu")
    split = package_results(problem, backend="cpu", lengths=[3, 7, 1, sizes["tokens"] - 11])
    for name in ("output", *(n for n in whole if n.startswith(("weight", "momentum")))):
        # The chunk's own scalars are products whose grouping the split does not change; its tokens are the same.
        assert torch.equal(split[name], whole[name]), name


def operator_problem(
    spec: MemorySpec,
    *,
    chunk_size: int = 4,
    chunks: int = 7,
    pending: int = 3,
    tail: int = 2,
    bptt_chunks: int = 0,
    momentum: bool = True,
) -> ScanProblem:
    """A uniform operator-level problem: pending tokens in front, complete chunks, `tail` tokens behind them."""
    random = torch.Generator().manual_seed(0)
    batch, heads, dim, hidden = 2, 2, 9, 20
    tokens = chunks * chunk_size - pending + tail

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64) / 3

    def gate(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)

    rows = batch * chunks
    per_token, per_chunk = (rows, heads, chunk_size), (rows, heads)
    delta = spec.rule == "dgd"
    momentum = momentum and not delta
    shapes = spec.weight_shapes(dim, hidden)
    return ScanProblem(
        q=normal(batch, tokens, heads, dim),
        k=normal(batch, tokens, heads, dim),
        v=normal(batch, tokens, heads, dim),
        pending_k=normal(batch, pending, heads, dim) if pending else None,
        pending_v=normal(batch, pending, heads, dim) if pending else None,
        step=gate(0, 0.2, *per_token),
        retention=gate(0.5, 1, *per_token) if delta else None,
        decay=None if delta else gate(0.5, 1, *per_chunk),
        momentum_step=None if not momentum else gate(0, 0.2, *per_token),
        momentum_carry=None if not momentum else gate(0, 0.9, *per_chunk),
        momentum_decay=None if not momentum else gate(0, 0.9, *per_chunk),
        weights=tuple(normal(heads, *shape) for shape in shapes),
        momentum=() if not momentum else tuple(0.1 * normal(batch, heads, *shape) for shape in shapes),
        sequences=None,
        spec=spec,
        chunk_size=chunk_size,
        chunks=chunks,
        first_chunk=0,
        bptt_chunks=bptt_chunks,
    )


def run_operator(problem: ScanProblem, change_gradient=lambda g: g) -> list[Tensor]:
    """Results and all gradients of one forward and backward, with fixed upstream gradients."""
    random = torch.Generator().manual_seed(1)
    output, weights, momentum, saved = cpu.scan_forward(problem, save=True)

    def upstream(x: Tensor) -> Tensor:
        return change_gradient(torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype))

    gradients = cpu.scan_backward(
        problem, saved, upstream(output), [upstream(w) for w in weights], [upstream(m) for m in momentum]
    )
    tensors = [x for x in gradients[:11] if x is not None]
    return [output, *weights, *momentum, *tensors, *gradients.weights, *gradients.momentum]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("tail", [0, 2])
def test_the_checkpoint_spacing_changes_no_bit(spec, tail, monkeypatch):
    """Nor does what is saved: nothing of the last segment (1), all of it (2), or nothing but checkpoints."""
    problem = operator_problem(spec, tail=tail)

    def run(interval: int) -> list[Tensor]:
        monkeypatch.setattr(ScanProblem, "checkpoint_interval", property(lambda _: interval))
        return run_operator(problem)

    expected = run(1)
    for interval in (2, 3, 6, 7, 8, 16):
        found = run(interval)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"interval {interval}"


def test_checkpoints_are_the_states_of_shorter_calls(monkeypatch):
    monkeypatch.setattr(ScanProblem, "checkpoint_interval", 2)
    problem = operator_problem(MemorySpec("mlp"))
    _, _, _, saved = cpu.scan_forward(problem, save=True)
    checkpoints = saved[:4]
    per_sequence = problem.chunks // 2
    for chunk in (2, 4, 6):
        new = chunk * problem.chunk_size - 3
        shorter = replace(
            problem,
            q=problem.q[:, :new],
            k=problem.k[:, :new],
            v=problem.v[:, :new],
            chunks=chunk,
            **{
                name: getattr(problem, name).unflatten(0, (2, problem.chunks))[:, :chunk].flatten(0, 1).contiguous()
                for name in ("step", "decay", "momentum_step", "momentum_carry", "momentum_decay")
            },
        )
        _, weights, momentum, _ = cpu.scan_forward(shorter, save=False)
        for checkpoint, final in zip(checkpoints, [*weights, *momentum], strict=True):
            rows = [0 + chunk // 2 - 1, problem.chunks // 2 + chunk // 2 - 1]
            assert per_sequence == 3 and torch.equal(checkpoint[rows], final), f"state at chunk {chunk}"


# ---- layouts ---------------------------------------------------------------------------------------------------------


def in_a_larger_tensor(x: Tensor) -> Tensor:
    """The same numbers as a slice of a tensor that is larger in every dimension."""
    room = torch.full([2 * n + 1 for n in x.shape], float("nan"), dtype=x.dtype)
    view = room[tuple(slice(1, 1 + n) for n in x.shape)]
    view.copy_(x)
    return view


def last_dimension_outermost(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def tokens_transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("change", [in_a_larger_tensor, last_dimension_outermost, tokens_transposed])
def test_any_strides_of_tokens_weights_and_gradients_give_the_same_bits(change):
    problem = operator_problem(MemorySpec("glu", objective="self"))
    changed = replace(
        problem,
        **{name: change(getattr(problem, name)) for name in ("q", "k", "v", "pending_k", "pending_v")},
        weights=tuple(change(w) for w in problem.weights),
        momentum=tuple(change(m) for m in problem.momentum),
    )
    found, expected = run_operator(changed, change), run_operator(problem)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_expanded_gradient_and_expanded_tokens_are_read_with_stride_zero():
    problem = operator_problem(MemorySpec("mlp"))
    v = problem.v[:, :1].expand_as(problem.v)
    output, weights, _, checkpoints = cpu.scan_forward(replace(problem, v=v), save=True)
    grad = torch.tensor(0.5, dtype=torch.float64)
    results = [
        cpu.scan_backward(
            replace(problem, v=source),
            checkpoints,
            grad.expand_as(output) if source is v else torch.full_like(output, 0.5),
            [grad.expand_as(w) if source is v else torch.full_like(w, 0.5) for w in weights],
            [None] * len(weights),
        )
        for source in (v, v.contiguous())
    ]
    for expanded, dense in zip(*results, strict=True):
        if isinstance(dense, Tensor):
            assert torch.equal(expanded, dense)


def test_offsets_beyond_two_to_the_31_elements_are_followed():
    # The storage is never touched but for a few pages of it, which is all the memory it takes.
    far, tokens, heads, dim = 2**31 + 4096, 6, 2, 8
    spec = MemorySpec("mlp")
    try:
        rooms = [torch.empty(far + tokens * heads * dim, dtype=torch.bfloat16) for _ in range(4)]
    except RuntimeError:
        pytest.skip("no address space for four tensors of 2^31 elements")
    stride = (far, heads * dim, dim, 1)
    near = make_problem(spec, chunk_size=4, batch=2, tokens=tokens, heads=heads, dim=dim, hidden=16).cast(
        torch.bfloat16
    )
    distant = {}
    for name, room in zip("qkv", rooms, strict=False):
        distant[name] = room.as_strided((2, tokens, heads, dim), stride).copy_(near[name])
    assert_identical(evaluate_without_copies(near, distant), evaluate_without_copies(near, {}))


def evaluate_without_copies(problem: Problem, replaced: dict[str, Tensor]) -> Evaluation:
    """Values and gradients of the problem with some tokens given as they lie in memory."""
    tensors = problem.tensors | replaced
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    results = package_results(replace(problem, tensors=leaves), backend="cpu")
    loss = results["output"].double().sum() + results["weight0"].double().square().sum()
    names = [n for n in leaves if n != "lr"]
    gradients = torch.autograd.grad(loss, [leaves[n] for n in names])
    return Evaluation(
        {name: value.detach() for name, value in results.items() if not name.startswith("pending")},
        dict(zip(names, gradients, strict=True)),
    )


def test_a_read_shares_the_keys_pass_only_where_queries_are_the_keys():
    problem = problem_for(MemorySpec("mlp"), **SMALL).cast(torch.float32)
    same = problem.with_tensors(q=problem["k"])
    apart = problem.with_tensors(q=problem["k"].clone())
    one = memory_scan(
        same["k"], same["k"], same["v"], same["lr"], same.weights, spec=same.spec, chunk_size=7, backend="cpu"
    )
    two = memory_scan(
        apart["q"], apart["k"], apart["v"], apart["lr"], apart.weights, spec=apart.spec, chunk_size=7, backend="cpu"
    )
    assert torch.equal(one.output, two.output)
    assert all(torch.equal(a, b) for a, b in zip(one.state.weights, two.state.weights, strict=True))


# ---- activations -----------------------------------------------------------------------------------------------------


def exact_activation(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "relu2":
        return x.clamp(min=0).square()
    if name == "gelu":
        return 0.5 * x * torch.erfc(-x / math.sqrt(2))
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu2"])
def test_float32_activations_hold_their_error_bound_over_the_whole_range(activation):
    # Every exponent, both signs, spread mantissas; as the hidden unit of a 1-1-1 memory that multiplies by 1.
    bits = torch.arange(-(2**31), 2**31, 9973, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[torch.isfinite(x)]
    if activation == "relu2":
        x = x[x.abs() < 1e18]  # its square is finite
    x = x.view(1, -1, 1, 1).requires_grad_()
    spec = MemorySpec("mlp", activation, residual=False)
    ones = (torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    found = memory_read(x, ones, spec=spec, backend="cpu")
    (slope,) = torch.autograd.grad(found.sum(), x)

    wide = x.detach().double().requires_grad_()
    exact = exact_activation(activation, wide)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    for got, want in ((found, exact), (slope, exact_slope)):
        want = want.detach().nan_to_num(nan=0.0)  # float64's own 0 * inf, far out on the left
        error = (got.detach().double() - want).abs() / want.abs().clamp(min=1)
        worst = error.argmax()
        assert error.max() <= 4e-7, f"error {error.max():.2e} at {x.flatten()[worst].item()}"


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu2"])
def test_nan_passes_through_every_activation(activation):
    ones = (torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    x = torch.tensor([1.0, float("nan"), -1.0]).view(1, 3, 1, 1)
    found = memory_read(x, ones, spec=MemorySpec("mlp", activation, residual=False), backend="cpu").flatten()
    assert found.isnan().tolist() == [False, True, False]


# ---- threads and processes -------------------------------------------------------------------------------------------


def test_calls_from_several_python_threads_at_once_are_all_right():
    problems = [problem_for(spec, seed=i, **SMALL).cast(torch.float32) for i, spec in enumerate(SPECS)]
    with thread_count(2):
        expected = [evaluate_package(p, "cpu") for p in problems]
        wrong: list[str] = []

        def work(i: int) -> None:
            for _ in range(10):
                try:
                    assert_identical(evaluate_package(problems[i], "cpu"), expected[i])
                except Exception as error:
                    wrong.append(f"{i}: {error}")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not any(thread.is_alive() for thread in threads)
    assert not wrong, wrong[0]


_FORK = """
import os, signal, sys, torch
from tests.backends.test_cpu import SMALL, SPECS, problem_for
from tests.cases import package_results
torch.set_num_threads(2)
problem = problem_for(SPECS[1], **SMALL).cast(torch.float32)
x = torch.randn(2000, 2000)
(x + x).sum()                                                    # PyTorch's workers are running
output = lambda: package_results(problem, backend="cpu")["output"]
with torch.no_grad():
    before = output() if sys.argv[1] == "parent" else None
    child = os.fork()
    if child == 0:
        signal.alarm(60)                                         # a child that waits for workers it lacks is ended
        found = output()
        os._exit(0 if torch.equal(found, output()) and (before is None or torch.equal(found, before)) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    assert torch.equal(output(), output())
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_forked_child_starts_its_own_workers(first):
    """Whoever's call is the engine's first."""
    run = subprocess.run([sys.executable, "-c", _FORK, first], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0 and run.stdout.endswith("done\n"), run.stderr


_WORKERS = """
import os, torch
from tests.backends.test_cpu import SMALL, SPECS, problem_for
from tests.cases import package_results
torch.set_num_threads(2)
x = torch.randn(2000, 2000)
(x + x).sum()                                                    # PyTorch's own workers are running
before = len(os.listdir("/proc/self/task"))
problem = problem_for(SPECS[1], **SMALL).cast(torch.float32)
package_results(problem, backend="cpu")
assert torch.get_num_threads() == 2 and before > 1
print(len(os.listdir("/proc/self/task")) - before, "more")
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list a process's threads")
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="this PyTorch has no OpenMP workers")
def test_calls_run_on_the_workers_of_pytorch():
    """Workers of our own would share the cores with PyTorch's, which spin for a while after every operator."""
    run = subprocess.run([sys.executable, "-c", _WORKERS], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0 and run.stdout == "0 more\n", run.stdout + run.stderr


# ---- reads of few tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("form", "residual"), [("linear", True), ("mlp", False), ("glu", True)])
@pytest.mark.parametrize("sizes", [(528, 1104), (544, 32), (64, 80), (40, 1100)])
def test_tokens_read_a_few_at_a_time_are_those_read_together(sizes, form, residual, dtype):
    """Few tokens read the weights where they lie, row by row, in as many sums as a product of many tokens has."""
    dim, hidden = sizes
    spec = MemorySpec(form, residual=residual)
    weights = [torch.randn(2, *shape, dtype=dtype) / shape[0] ** 0.5 for shape in spec.weight_shapes(dim, hidden)]
    q = torch.randn(1, 11, 2, dim, dtype=dtype)
    with thread_count(2):
        together = memory_read(q, weights, spec=spec, backend="cpu")
    torch.testing.assert_close(together, memory_read(q, weights, spec=spec, backend="reference"))
    for threads in (1, 2):
        with thread_count(threads):
            for count in (1, 2, 3, 4, 5):
                parts = [memory_read(part, weights, spec=spec, backend="cpu") for part in q.split(count, 1)]
                assert torch.equal(torch.cat(parts, 1), together), (threads, count)


# ---- the boundary of the core ----------------------------------------------------------------------------------------


def test_a_core_that_is_missing_is_reported_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "hope_kernels._core", None)
    monkeypatch.delattr("hope_kernels._core", raising=False)
    cpu._load.cache_clear()
    try:
        status = cpu.status()
        assert not status
        assert "core" in status.reason and "compiler" in status.reason
        assert cpu.refuses(make_request()) == status.reason
        with pytest.raises(RuntimeError, match="not available"):
            cpu.scan_forward(operator_problem(SPECS[0]), save=False)
    finally:
        monkeypatch.undo()
        cpu._load.cache_clear()
    assert cpu.status()


def test_other_dtypes_and_devices_are_refused_with_the_reason():
    assert "int32" in cpu.refuses(make_request(dtype=torch.int32))
    assert "meta" in cpu.refuses(make_request(device=torch.device("meta")))


def test_an_inconsistent_problem_is_refused_before_anything_is_computed():
    problem = operator_problem(MemorySpec("mlp"))
    for change, words in (
        ({"chunks": problem.chunks + 1}, "chunks"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"step": None}, "step"),
        ({"momentum_carry": None}, "momentum"),
    ):
        with pytest.raises(ValueError, match=words):
            cpu.scan_forward(replace(problem, **change), save=False)


def test_the_machine_probes_return_plausible_numbers():
    assert 1e8 < _core.fma_peak(1) < 1e13
    assert 1e8 < _core.copy_bandwidth(1) < 1e13
