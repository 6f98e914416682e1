"""The backend "cuda": its Python side, the kernels running on the CPU (`tests/cuda_host`).

What the kernels compute is tested in `tests/cuda_host`; here problems go the whole way, from the public functions
through the choice, the operators and the bindings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hope_kernels import CMS, CMSLevel, MemorySpec, available_backends, backends, memory_read, memory_scan, memory_write
from hope_kernels.backends import cuda
from hope_kernels.backends.cuda import runtime
from tests.cases import (
    Evaluation,
    Problem,
    assert_within_budget,
    evaluate,
    evaluate_package,
    make_problem,
    make_request,
    package_results,
    state_results,
)
from tests.cuda_host.backend import on_host
from tests.memory.test_operators import RecordedCalls, tree_map_only

HALVES = [torch.bfloat16, torch.float16]
SPEC = MemorySpec()


@pytest.fixture(scope="module", autouse=True)
def host(cuda_module: ModuleType) -> Iterator[None]:
    with on_host(cuda_module):
        yield


@pytest.fixture
def device(cuda_host: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The host layer, whose device a test may change."""
    yield cuda_host
    cuda_host.cuda_host_set_device(9, 0, 2, 1)


def small(**options) -> Problem:
    """One head of one short sequence, with mild retention: a result is made by many tokens."""
    sizes = {"batch": 1, "heads": 1, "dim": 16, "hidden": 32, "chunk_size": 4, "tokens": 11, "retention": True}
    problem = make_problem(options.pop("spec", SPEC), **(sizes | {"max_lr": 0.1} | options))
    return problem.map(lambda name, t: 1 - 0.1 * (1 - t) if name == "retention" else t)


def arguments(problem: Problem) -> dict[str, Tensor]:
    return {name: problem.get(name) for name in ("q", "k", "v", "lr", "retention", "momentum")}


def scan(problem: Problem, backend: str = "cuda", **options):
    given = {"memory": problem.memory(), "spec": problem.spec, "chunk_size": problem.chunk_size, "backend": backend}
    return memory_scan(**(given | arguments(problem) | options))


def forward(problem: Problem, backend: str, **options) -> Evaluation:
    with torch.no_grad():
        return Evaluation(package_results(problem, backend=backend, **options), {})


def assert_close_to_truth(problem: Problem, dtype: torch.dtype, **options) -> None:
    """Within twice the eager reference's error and one rounding, both against float64, gradients included."""
    problem = problem.cast(dtype)
    truth = evaluate_package(problem.map(lambda _, t: t.double()), "reference")
    assert_within_budget(
        evaluate_package(problem, "cuda", **options), evaluate_package(problem, "reference"), truth, dtype
    )


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "dtype"),
    [
        (True, torch.float16),
        (False, torch.bfloat16),
        pytest.param(True, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(False, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_a_stream_of_calls_stays_within_twice_the_eager_error(momentum, dtype):
    problem = small(batch=2, heads=2, momentum=momentum, initial_momentum=momentum)
    assert_close_to_truth(problem, dtype, lengths=[3, 6, 2])


@pytest.mark.parametrize("spec", [MemorySpec("glu"), MemorySpec("mlp", rule="dgd")], ids=["glu", "dgd"])
def test_another_memory_stays_within_twice_the_eager_error(spec):
    assert_close_to_truth(small(spec=spec), torch.bfloat16, lengths=[3, 8])


def test_a_forward_without_a_backward_stays_within_twice_the_eager_error():
    problem = small(spec=MemorySpec("glu"), dim=72).cast(torch.bfloat16)
    exact = problem.map(lambda _, t: t.double())
    found, eager, truth = forward(problem, "cuda"), forward(problem, "reference"), forward(exact, "reference")
    assert_within_budget(found, eager, truth, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("objective", ["l2", "dot", "error", "self"])
@pytest.mark.parametrize("sizes", [(64, 256, 16, 40), (64, 128, 16, 40), (32, 128, 20, 46), (7, 33, 5, 12)], ids=str)
def test_sizes_and_objectives(sizes, objective, dtype):
    dim, hidden, chunk_size, tokens = sizes
    problem = small(spec=MemorySpec(objective=objective), dim=dim, hidden=hidden, chunk_size=chunk_size, tokens=tokens)
    assert_close_to_truth(problem, dtype, lengths=[tokens // 3, tokens - tokens // 3])


@pytest.mark.parametrize("layout", ["cu_seqlens", "valid"])
def test_packed_and_padded_rows_give_the_bits_of_each_row_alone(layout):
    problem = small(batch=2).cast(torch.bfloat16)
    problem = problem.map(lambda n, t: t.expand(2, *t.shape) if n.startswith("weight") else t)
    rows = [(0, 11), (2, 7)]

    def results(p: Problem) -> dict[str, Tensor]:
        parts = [p.row(b).span(start, end) for b, (start, end) in enumerate(rows)]
        if layout == "valid":
            output, state = scan(p, valid=torch.tensor(rows))
            assert not output[1, :2].any() and not output[1, 7:].any()
            outputs = [output[b : b + 1, start:end] for b, (start, end) in enumerate(rows)]
        else:
            packed = {
                n: torch.cat([arguments(part)[n] for part in parts], 1) for n in ("q", "k", "v", "lr", "retention")
            }
            output, state = scan(p, **packed, cu_seqlens=torch.tensor([0, 11, 16]))
            outputs = [output[:, :11], output[:, 11:]]
        return named(outputs, [[w[b : b + 1] for w in state.weights] for b in range(2)])

    def alone(p: Problem) -> dict[str, Tensor]:
        found = [scan(p.row(b).span(start, end)) for b, (start, end) in enumerate(rows)]
        return named([x.output for x in found], [x.state.weights for x in found])

    def named(outputs, weights) -> dict[str, Tensor]:
        values = {f"output{b}": x for b, x in enumerate(outputs)}
        return values | {f"row{b} weight{i}": w for b, ws in enumerate(weights) for i, w in enumerate(ws)}

    found, expected = evaluate(problem, results).named(), evaluate(problem, alone).named()
    assert all(torch.equal(found[name], want) for name, want in expected.items())


def test_any_strides_give_the_same_bits():
    problem = small().cast(torch.bfloat16)
    layouts = {
        "q": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
        "k": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        "v": lambda t: torch.cat([t[..., :1], t], -1)[..., 1:],
        "lr": lambda t: t.expand(1, *t.shape[1:]),
        "weight0": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    }
    order = {name: (lambda t: t) for name in problem.tensors} | layouts

    def arranged(p: Problem) -> dict[str, Tensor]:
        changed = p.map(lambda name, t: order[name](t))
        assert not any(changed[name].is_contiguous() for name in ("q", "k", "v", "weight0"))
        # What goes up comes down as strided: a view of a result gives its gradient other strides.
        return {name: x.transpose(0, -1) for name, x in package_results(changed, backend="cuda").items()}

    def plain(p: Problem) -> dict[str, Tensor]:
        return {name: x.transpose(0, -1).contiguous() for name, x in package_results(p, backend="cuda").items()}

    found, expected = evaluate(problem, arranged).named(), evaluate(problem, plain).named()
    assert all(torch.equal(found[name], want) for name, want in expected.items())


def test_a_read_and_a_write_are_what_a_scan_is_made_of():
    problem = small(tokens=4).cast(torch.bfloat16)
    options = {"spec": SPEC, "backend": "cuda"}
    with torch.no_grad():
        whole = scan(problem)
        state = memory_write(
            problem["k"], problem["v"], problem["lr"], problem.weights, retention=problem["retention"], **options
        )
        output = memory_read(problem["q"], problem.weights, **options)
    assert torch.equal(output, whole.output)
    assert all(torch.equal(w, v) for w, v in zip(state.weights, whole.state.weights, strict=True))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"tokens": 0}, {"tokens": 3}], ids=str)
def test_a_call_that_completes_no_chunk(sizes):
    problem = small(**sizes).cast(torch.bfloat16)
    found, expected = (forward(problem, backend).values for backend in ("cuda", "reference"))
    assert found["output"].shape == expected["output"].shape
    torch.testing.assert_close(found["output"], expected["output"], rtol=2**-7, atol=2**-7)
    assert all(torch.equal(found[name], want) for name, want in expected.items() if name != "output")


def test_a_continuum_memory_system_streams_and_steps():
    torch.manual_seed(0)
    cms = CMS(16, [CMSLevel(2), CMSLevel(4), CMSLevel(None)], heads=1, backend="cuda").to(torch.bfloat16)
    eager = CMS(16, [CMSLevel(2), CMSLevel(4), CMSLevel(None)], heads=1, backend="reference").to(torch.bfloat16)
    eager.load_state_dict(cms.state_dict())
    x = torch.randn(1, 5, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        found, _ = cms.stream(x, cms.init_state(1))
        expected, _ = eager.stream(x, eager.init_state(1))
        buffer = cms.make_buffer(1)
        steps = torch.stack([cms.step(x[:, t], buffer) for t in range(5)], 1)
    for result in (found, steps):
        torch.testing.assert_close(result, expected, rtol=2**-6, atol=2**-6)


# ---- PyTorch's machinery ---------------------------------------------------------------------------------------------


def test_opcheck_passes_on_the_operator():
    problem = small(momentum=True, tokens=6, dim=8, hidden=16).cast(torch.bfloat16)
    leaves = problem.map(lambda _, t: t.requires_grad_())
    with RecordedCalls() as recorded:
        output, state = scan(leaves, valid=torch.tensor([[1, 6]]))
        (output.sum() + sum(w.sum() for w in state.weights)).backward()
    assert [func.name() for func, _, _ in recorded.calls] == ["hope_kernels::scan", "hope_kernels::scan_backward"]
    for func, given, options in recorded.calls:
        forward = func.name() == "hope_kernels::scan"

        def fresh(t: Tensor, forward=forward) -> Tensor:
            return t.detach().clone().requires_grad_(forward and t.is_floating_point())

        torch.library.opcheck(func, tree_map_only(Tensor, fresh, given), options)


def test_a_compiled_scan_equals_eager_at_many_lengths_from_one_graph_forward_and_backward():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(memory_scan, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (22, 27):  # 5 and 6 chunks: one interval between checkpoints
        problem = small(tokens=tokens, seed=tokens, dim=8, hidden=16).cast(torch.bfloat16)

        def results(function, p: Problem) -> dict[str, Tensor]:
            output, state = function(**arguments(p), memory=p.weights, spec=SPEC, chunk_size=4, backend="cuda")
            return {"output": output} | state_results(state)

        found = evaluate(problem, lambda p: results(compiled, p)).named()
        expected = evaluate(problem, lambda p: results(memory_scan, p)).named()
        for name, want in expected.items():
            # The kernels give the same bits; what a compiler reorders is the arithmetic of gates around them.
            torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "takes bfloat16 or float16 tokens"),
        ({"spec": MemorySpec("linear")}, "computes mlp and glu memories only"),
        ({"chunk_size": 10**9}, "chunk_size is too large"),
        ({"chunk_size": 2**31 - 1, "operation": "write"}, "chunk_size is too large"),
        ({"dim": 300}, "dim"),
        ({"hidden": 1025}, "hidden is too large"),
        ({"device": torch.device("meta")}, "takes CPU tensors, got meta"),
    ],
    ids=str,
)
def test_the_kernels_say_what_they_do_not_compute(change, reason):
    request = make_request(**({"dtype": torch.bfloat16} | change))
    assert reason in cuda.refuses(request)
    assert cuda.refuses(make_request(dtype=torch.bfloat16)) is None
    with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run this: .*{reason}"):
        backends.select("cuda", request)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spec": MemorySpec("glu"), "hidden": 256}, "of a glu in the registers of one block: dim at most 64"),
        ({"spec": MemorySpec("glu"), "dim": 64, "momentum": True}, "no registers for momentum"),
        ({"spec": MemorySpec(rule="dgd"), "hidden": 256}, "no registers for momentum or dgd"),
        ({"spec": MemorySpec(rule="dgd"), "dim": 128}, "dim at most 64, hidden at most 128"),
        ({"dim": 128, "momentum": True}, "no registers for momentum"),
        ({"hidden": 256, "momentum": True}, "no registers for momentum"),
    ],
    ids=str,
)
def test_what_has_no_backward_runs_without_gradients_only(change, reason):
    request = make_request(**({"dtype": torch.bfloat16} | change))
    assert cuda.refuses(request) is None
    assert reason in cuda.refuses(request._replace(gradients=True))
    with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run this: .*{reason}"):
        backends.select("cuda", request._replace(gradients=True))


@pytest.mark.parametrize("operation", ["scan", "read", "write"])
@pytest.mark.parametrize("gates", [{}, {"retention": True}, {"momentum": True, "retention": True}, {"table": True}])
def test_what_is_not_refused_runs(operation, gates):
    """A request stands for its calls: the kernels are asked again when one runs, and then say the same."""
    request = make_request(operation=operation, dtype=torch.float16, dim=16, hidden=32, heads=1, chunk_size=4, **gates)
    assert cuda.refuses(request) is None
    ran = small(tokens=4, retention="retention" in gates, momentum="momentum" in gates).cast(torch.float16)
    with torch.no_grad():
        if operation == "read":
            memory_read(ran["q"], ran.weights, spec=SPEC, backend="cuda")
        elif operation == "write":
            rest = {name: ran.get(name) for name in ("retention", "momentum")}
            memory_write(ran["k"], ran["v"], ran["lr"], ran.weights, spec=SPEC, backend="cuda", **rest)
        else:
            scan(ran, **({"valid": torch.tensor([[0, 4]])} if "table" in gates else {}))


def test_the_device_decides_how_long_a_chunk_may_be(device):
    """Its architecture and shared memory are asked for each time: they are those of the tensors' device."""
    request = make_request(dtype=torch.bfloat16, dim=64, hidden=256, chunk_size=96)
    assert cuda.refuses(request) is None
    device.cuda_host_set_device(8, 0, 2, 1)
    assert "chunk_size is too large" in cuda.refuses(request)
    problem = small(dim=64, hidden=256, chunk_size=96, tokens=96).cast(torch.bfloat16)
    with pytest.raises(RuntimeError, match="chunk_size is too large"), torch.no_grad():
        scan(problem)


def test_a_chunk_that_only_the_call_knows_is_refused_when_it_runs():
    """In a trace the length of a write is a symbol: a backend asked for by name is taken at its word."""
    torch._dynamo.reset()
    compiled = torch.compile(memory_write, fullgraph=True, dynamic=True, backend="eager")
    problem = small(dim=64, hidden=256, tokens=120).cast(torch.bfloat16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="chunk_size is too large"):
        compiled(problem["k"], problem["v"], problem["lr"], problem.weights, spec=SPEC, backend="cuda")


class Core:
    """The compiled module, with other functions in the place of some."""

    def __init__(self, module: ModuleType, **functions) -> None:
        self.__dict__ |= {name: getattr(module, name) for name in dir(module) if name.startswith("cuda_")} | functions


def test_a_call_whose_backward_is_refused_does_not_start(monkeypatch, cuda_module):
    def refusal(*arguments) -> str:
        return "no such gradients"

    monkeypatch.setattr(runtime, "load", lambda: core)
    core = Core(cuda_module, cuda_backward_refusal=refusal)
    problem = small(tokens=5).cast(torch.bfloat16)
    assert not forward(problem, "cuda").values["output"].requires_grad
    problem["v"].requires_grad_()
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this: no such gradients"):
        scan(problem)


# ---- status ----------------------------------------------------------------------------------------------------------


def test_the_status_says_what_it_was_built_for_and_where_it_runs():
    status = available_backends()["cuda"]
    assert status
    assert "sm_80, sm_90" in status.reason and "on the host layer" in status.reason


def test_the_status_says_why_it_cannot_run(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "no_device", lambda: "there is no GPU")
        assert not cuda.status() and cuda.status().reason.endswith("but there is no GPU")
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "device_refused", lambda core, device: "it was built for others")
        assert not cuda.status() and cuda.status().reason == "it was built for others"
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "load", lambda: "nvcc was not found")
        assert not cuda.status() and cuda.status().reason == "nvcc was not found"
        assert cuda.refuses(make_request(dtype=torch.bfloat16)) == "nvcc was not found"
        with pytest.raises(RuntimeError, match="not available: nvcc was not found"):
            cuda.scan_forward(None, save=False)


def test_kernels_run_on_the_device_of_the_tensors(monkeypatch, cuda_module):
    """Not on the one that happens to be current: its number and its stream go along, inside a guard."""
    seen = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            seen.append(("enter", self.device))

        def __exit__(self, *_):
            seen.append(("leave", self.device))

    def launched(name: str):
        def launch(*given):
            seen.append((name, *given[-2:]))
            getattr(cuda_module, name)(*given[:-2], 0, 0)

        return launch

    core = Core(
        cuda_module,
        cuda_device=lambda number: seen.append(("device", number)) or cuda_module.cuda_device(0),
        cuda_scan_forward=launched("cuda_scan_forward"),
        cuda_scan_backward=launched("cuda_scan_backward"),
    )
    monkeypatch.setattr(runtime, "load", lambda: core)
    monkeypatch.setattr(runtime, "on_device", Guard)
    monkeypatch.setattr(runtime, "number", lambda device: 3)
    monkeypatch.setattr(runtime, "stream", lambda device: 77)
    problem = small(tokens=4).cast(torch.bfloat16).map(lambda _, t: t.requires_grad_())
    output = scan(problem).output
    del seen[:3]  # what the choice asked of the device
    output.sum().backward()
    device = torch.device("cpu")
    assert seen == [
        step
        for name in ("cuda_scan_forward", "cuda_scan_backward")
        for step in (("enter", device), ("device", 3), (name, 3, 77), ("leave", device))
    ]
