"""Which backend runs a call: what it is told of the call, that splits and lengths do not change it, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hope_kernels import CMS, CMSLevel, MemorySpec, backends, memory_read, memory_scan, memory_write
from hope_kernels.backends.interface import BackendStatus, ScanRequest
from tests.cases import STATUS, Problem, make_problem, make_request, scan_stream

pytestmark = pytest.mark.skipif(not STATUS["cpu"], reason=STATUS["cpu"].reason)

# One change each of a plain scan.
CHANGES = {
    "operation": {"operation": "write"},
    "spec": {"spec": MemorySpec("glu")},
    "dtype": {"dtype": torch.bfloat16},
    **{name: {name: 65} for name in ("heads", "dim", "hidden", "chunk_size")},
    **{name: {name: True} for name in ("retention", "momentum", "table", "gradients")},
}


class Picky:
    """The CPU engine under another name; takes what ``takes`` says, and keeps what it was asked and what it ran."""

    def __init__(self) -> None:
        self.asked: list[ScanRequest] = []
        self.ran: list[str] = []
        self.takes = lambda request: True

    def __getattr__(self, name: str):
        self.__dict__["ran"].append(name)
        return getattr(backends.implementation("cpu"), name)

    def status(self) -> BackendStatus:
        return BackendStatus("picky", True, "for this test")

    def refuses(self, request: ScanRequest) -> str | None:
        self.asked.append(request)
        return None if self.takes(request) else "picky does not like it"


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Picky]:
    """A backend in front of all others."""
    found, before = Picky(), backends.implementation
    monkeypatch.setattr(backends, "implementation", lambda name: found if name == "picky" else before(name))
    monkeypatch.setattr(backends, "_COMPILED", (*backends._COMPILED, "picky"))
    monkeypatch.setattr(backends, "_PREFERENCE", {"cpu": ("picky", "cpu", "reference")})
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def problem_of(tokens: int = 14, seed: int = 0, **options) -> Problem:
    options = {"retention": True, "momentum": True} | options
    return make_problem(MemorySpec(), chunk_size=4, tokens=tokens, seed=seed, **options).cast(torch.float32)


def scan(problem: Problem, **options):
    gates = {name: problem.get(name) for name in ("retention", "momentum")}
    tokens = (problem[name] for name in ("q", "k", "v", "lr"))
    return memory_scan(*tokens, problem.memory(), spec=problem.spec, chunk_size=problem.chunk_size, **gates, **options)


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_a_backend_may_refuse_by_any_part_of_a_request(picky, change):
    plain, changed = make_request(), make_request(**CHANGES[change])
    picky.takes = lambda request: request == plain
    assert backends.select(None, plain) == backends.select("picky", plain) == "picky"
    assert backends.select(None, changed) == "cpu"
    with pytest.raises(RuntimeError, match="backend='picky' cannot run this: picky does not like it"):
        backends.select("picky", changed)


def test_a_backend_that_does_not_run_here_is_refused_with_its_reason(picky):
    picky.status = lambda: BackendStatus("picky", False, "it has gone home")
    assert backends.select(None, make_request()) == "cpu"
    with pytest.raises(RuntimeError, match="it has gone home"):
        backends.select("picky", make_request())
    assert not picky.asked


def test_a_request_says_what_the_call_is(picky):
    problem = problem_of().map(lambda _, t: t.requires_grad_())
    batch, heads, dim = problem["q"].shape[0], *problem["q"].shape[2:]
    usual = {"heads": heads, "dim": dim, "hidden": problem.weights[0].shape[-1], "gradients": True}
    gates = {"retention": True, "momentum": True}

    def last() -> ScanRequest:
        return picky.asked[-1]

    scan(problem)
    assert last() == make_request(chunk_size=4, **usual, **gates)
    scan(problem, valid=torch.tensor([[0, 14]] * batch))
    assert last() == make_request(chunk_size=4, table=True, **usual, **gates)
    with torch.no_grad():
        scan(problem_of(momentum=False).cast(torch.bfloat16))
    want = usual | {"gradients": False}
    assert last() == make_request(chunk_size=4, dtype=torch.bfloat16, retention=True, **want)
    memory_read(problem["q"], problem.weights, spec=problem.spec)
    assert last() == make_request(operation="read", chunk_size=1, **usual)
    memory_write(problem["k"], problem["v"], problem["lr"], problem.weights, spec=problem.spec)
    assert last() == make_request(operation="write", chunk_size=14, **usual)


@pytest.mark.parametrize("name", ["q", "k", "v", "lr", "retention", "momentum", "weight1", "initial_momentum0"])
def test_gradients_are_asked_for_where_any_tensor_wants_one(picky, name):
    problem = problem_of(initial_momentum=True)
    scan(problem)
    scan(problem.map(lambda n, t: t.clone().requires_grad_(n == name)))
    with torch.no_grad():
        scan(problem.map(lambda n, t: t.clone().requires_grad_(n == name)))
    assert [request.gradients for request in picky.asked] == [False, True, False]


@pytest.mark.parametrize("gradients", [False, True])
def test_every_split_of_a_stream_makes_the_same_request(picky, gradients):
    problem = problem_of().map(lambda _, t: t.requires_grad_(gradients))
    for lengths in ([14], [1] * 14, [3, 4, 7], [0, 5, 9], [8, 6]):
        scan_stream(problem, lengths, backend=None)
    assert len(set(picky.asked)) == 1 and len(picky.asked) == 23
    assert picky.asked[0].gradients is gradients


def test_rows_and_lengths_are_no_part_of_a_request(picky):
    for tokens in (1, 3, 4, 50):
        for batch in (1, 3):
            scan(problem_of(tokens=tokens, batch=batch))
    assert len(set(picky.asked)) == 1


def test_a_backward_runs_where_its_forward_ran(picky):
    problem = problem_of().map(lambda _, t: t.requires_grad_())
    output = scan(problem).output
    picky.takes = lambda request: False
    output.sum().backward()
    assert picky.ran.count("scan_forward") == picky.ran.count("scan_backward") == 1


# ---- torch.compile ---------------------------------------------------------------------------------------------------


# One object: a compiled function is guarded by the identity of its spec.
MEMORY = MemorySpec()


@pytest.mark.parametrize("backend", [None, "picky"])
def test_no_length_and_no_batch_becomes_a_constant_of_a_trace(picky, backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(memory_scan, fullgraph=True, dynamic=True, backend=counter)
    # Sizes that are equal in the first call are one symbol: of two rows and two heads both would become constants.
    for tokens, batch in ((74, 3), (131, 6), (250, 9)):
        p = problem_of(tokens=tokens, batch=batch)
        arguments = (p["q"], p["k"], p["v"], p["lr"], p.weights)
        compiled(*arguments, spec=MEMORY, chunk_size=4, backend=backend)
    assert counter.frame_count == 1
    assert picky.asked and all(r == picky.asked[0] for r in picky.asked)
    assert picky.asked[0].chunk_size == 4 and "scan_forward" in picky.ran


def test_a_compiled_call_takes_the_backend_of_an_eager_one(picky):
    picky.takes = lambda request: not request.gradients
    compiled = torch.compile(memory_scan, fullgraph=True, dynamic=True, backend="aot_eager")
    for gradients, runs in ((False, 1), (True, 0)):
        p = problem_of().map(lambda _, t, g=gradients: t.requires_grad_(g))
        picky.ran.clear()
        compiled(*(p[n] for n in ("q", "k", "v", "lr")), p.weights, spec=MEMORY, chunk_size=4)
        assert picky.ran.count("scan_forward") == runs
    with pytest.raises(Exception, match="picky does not like it"):
        compiled(*(p[n] for n in ("q", "k", "v", "lr")), p.weights, spec=MEMORY, chunk_size=4, backend="picky")


def test_a_compiled_write_of_unknown_length_goes_to_a_backend_that_takes_any(picky):
    """Its one chunk is as long as the call, a symbol of the trace."""
    compiled = torch.compile(memory_write, fullgraph=True, dynamic=True, backend="aot_eager")

    def write(**options) -> list[str]:
        picky.ran.clear()
        p = problem_of(seed=1)
        compiled(p["k"], p["v"], p["lr"], p.weights, spec=MEMORY, **options)
        return picky.ran

    assert "scan_forward" in write()
    torch._dynamo.reset()
    picky.takes = lambda request: request.chunk_size <= 64
    assert "scan_forward" not in write()
    assert "scan_forward" in write(backend="picky")


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_a_buffer_is_refused_where_a_step_could_not_run(picky):
    cms = CMS(16, [CMSLevel(4), CMSLevel(None)], heads=2, backend=None).float()
    for level in cms.levels:
        level.backend = "picky"
    cms.make_buffer(2)
    assert [r.operation for r in picky.asked] == ["read", "write"] and picky.asked[1].chunk_size == 4
    picky.takes = lambda request: request.operation == "read"
    with pytest.raises(RuntimeError, match="picky does not like it"):
        cms.make_buffer(2)


def test_levels_of_one_system_may_run_on_different_backends(picky):
    picky.takes = lambda request: request.chunk_size <= 4
    cms = CMS(16, [CMSLevel(4), CMSLevel(8)], heads=2, variant="independent").float()
    cms(torch.randn(2, 16, 16)).sum().backward()
    assert picky.ran.count("scan_forward") == picky.ran.count("scan_backward") == 1
