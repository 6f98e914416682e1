"""Calls of plain CPU tensors skip the dispatcher and repeated checks; everything else sees what it saw before.

What a call gives through the registered operator, checked as a whole, is what it has to give in every other case too:
``through_the_operator`` makes the package do that.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hope_kernels import MemorySpec, MemoryState, memory_read, memory_scan, memory_write
from hope_kernels.memory import plain
from hope_kernels.memory import validation as check
from tests.cases import BACKENDS, make_problem, state_results

SPEC = MemorySpec("mlp", "silu")
pytestmark = [m for p in BACKENDS if p.values == ("cpu",) for m in p.marks]


def problem(tokens: int = 1, spec: MemorySpec = SPEC, **options):
    options = {"chunk_size": 4, "batch": 2, "heads": 3, "dim": 8, "hidden": 12, **options}
    return make_problem(spec, tokens=tokens, **options).cast(torch.float32)


P = problem()
GATED = problem(spec=SPEC, retention=True, momentum=True)


def read(q: Tensor = P["q"], memory: Any = P.weights, **options) -> Tensor:
    return memory_read(q, memory, spec=SPEC, **options)


def scan(p=P, memory: Any = None, **options):
    gates = {"retention": p.get("retention"), "momentum": p.get("momentum")}
    options = {"spec": p.spec, "chunk_size": p.chunk_size, **gates, **options}
    return memory_scan(p["q"], p["k"], p["v"], p["lr"], p.weights if memory is None else memory, **options)


def write(p=P, memory: Any = None, **options) -> MemoryState:
    gates = {"retention": p.get("retention"), "momentum": p.get("momentum")}
    memory = p.weights if memory is None else memory
    return memory_write(p["k"], p["v"], p["lr"], memory, spec=p.spec, **gates, **options)


def stream(p, count: int):
    """``count`` calls of one token each; the last one's result."""
    result = scan(p)
    for _ in range(count - 1):
        result = scan(p, result.state)
    return result


CALLS: dict[str, Callable[[], Any]] = {
    "read": read,
    "read of a state": lambda: read(memory=MemoryState.initial(P.weights, spec=SPEC, chunk_size=4)),
    "read of a written state": lambda: read(memory=write()),
    "read of no rows": lambda: read(P["q"][:0]),
    "read of no tokens": lambda: read(P["q"][:, :0]),
    "scan that keeps its token": scan,
    "scan that keeps its tokens and all gates": lambda: stream(GATED, 2),
    "scan with tokens pending": lambda: stream(P, 3),
    "scan that completes a chunk": lambda: stream(P, 4),
    "scan beyond a chunk, all gates": lambda: stream(GATED, 6),
    "scan of several chunks": lambda: scan(problem(11)),
    "scan of delta gradient descent": lambda: stream(problem(spec=MemorySpec("glu", rule="dgd"), retention=True), 5),
    "scan written every token": lambda: scan(problem(3, chunk_size=1)),
    "write": write,
    "write with all gates": lambda: write(GATED),
    "scan of bfloat16": lambda: stream(P.cast(torch.bfloat16), 5),
    "scan of bfloat16 in chunks whose products round": lambda: stream(problem(chunk_size=16).cast(torch.bfloat16), 3),
    "scan of strided tokens": lambda: scan(P.map(lambda _, x: x.mT.contiguous().mT if x.dim() == 4 else x)),
}


@pytest.fixture
def operators(monkeypatch) -> list[str]:
    """Names of the package's operators as they are called."""
    called = []
    operator = torch.ops.hope_kernels.scan
    monkeypatch.setattr(torch.ops.hope_kernels, "scan", lambda *args: called.append("scan") or operator(*args))
    return called


@pytest.fixture
def through_the_operator(monkeypatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function with every call checked as a whole and handed to the dispatcher."""

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(plain, "unwatched", lambda: False)
            return function()

    return run


def tensors_of(result: Any) -> dict[str, Any]:
    """Everything in the result of a public function, by name."""
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, MemoryState):
        numbers = {name: getattr(result, name) for name in ("position", "chunk_index", "pending_count", "gates")}
        return {**state_results(result), **numbers}
    return {"output": result.output, **tensors_of(result.state)}


def assert_same(found: Any, expected: Any) -> None:
    found, expected = tensors_of(found), tensors_of(expected)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        if not isinstance(want, Tensor):
            assert found[name] == want, name
            continue
        got = found[name]
        assert torch.equal(got, want) and got.dtype == want.dtype and got.stride() == want.stride(), name
        assert (got.requires_grad, got.is_inference()) == (want.requires_grad, want.is_inference()), name


@pytest.mark.parametrize("within", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_plain_calls_give_the_operators_results_without_it(name, within, operators, through_the_operator):
    with within():
        first, again = CALLS[name](), CALLS[name]()
        assert not operators
        expected = through_the_operator(CALLS[name])
    assert operators
    assert_same(first, expected)
    assert_same(again, expected)


def test_parameters_are_plain_where_no_gradient_is_wanted(operators):
    parameters = tuple(nn.Parameter(w) for w in P.weights)
    with torch.no_grad():
        output = read(memory=parameters)
    assert not operators and not output.requires_grad
    assert torch.equal(output, read())


@pytest.mark.parametrize("name", ["q", "k", "lr", "weight1", "pending_k"])
def test_gradients_flow_after_calls_without(name, operators, through_the_operator):
    """Of four tokens and what they write, with respect to one tensor, when the same calls ran without gradients."""
    begun = scan().state

    def gradient() -> Tensor:
        leaf = (begun.pending_k if name == "pending_k" else P[name]).detach().clone().requires_grad_()
        if name == "pending_k":
            p, memory = P, replace(begun, pending_k=leaf)
        else:
            p = P.with_tensors(**{name: leaf})
            memory = replace(begun, stored_weights=p.weights)
        loss = 0
        for _ in range(4):
            output, memory = scan(p, memory)
            loss = loss + output.square().sum()
        loss = loss + sum(w.square().sum() for w in memory.weights)
        return torch.autograd.grad(loss, leaf)[0]

    stream(P, 7)
    assert not operators
    found = gradient()
    assert operators and found.abs().max() > 0
    assert torch.equal(found, through_the_operator(gradient))


class Subclass(Tensor):
    pass


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def in_a_dispatch_mode():
    with Seen() as mode:
        output = read()
    assert "hope_kernels.scan.default" in mode.names
    return output


def in_a_function_mode():
    with SeenFunctions() as mode:
        output = read()
    assert any("hope_kernels" in name for name in mode.names)
    return output


def on_a_default_device():
    with torch.device("cpu"):
        return read()


def profiled():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = read()
    assert "hope_kernels::scan" in {event.key for event in profile.key_averages()}
    return output


def fake():
    with FakeTensorMode() as mode:
        output = read(mode.from_tensor(P["q"]), tuple(mode.from_tensor(w) for w in P.weights))
        assert isinstance(output, FakeTensor) and output.shape == P["q"].shape
    return output.shape


def proxied():
    graph = make_fx(read)(P["q"]).graph
    assert torch.ops.hope_kernels.scan.default in {node.target for node in graph.nodes}
    return len(graph.nodes)


def out_of_vmap():
    kept = []
    torch.vmap(lambda x: kept.append(x) or x)(P["q"][None])
    return read(kept[0])


def forward_mode():
    with forward_ad.dual_level():
        return read(forward_ad.make_dual(P["q"], P["q"]))


def functional():
    return torch._from_functional_tensor(read(torch._to_functional_tensor(P["q"])))


def profiled_with_all_threads() -> Any:
    """The operators that a profiler of the whole process sees of its own thread's call and of another's."""
    settings = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=settings
    ) as profiler:
        read()
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    return sorted((event.key, event.count) for event in profiler.key_averages() if "hope_kernels" in event.key)


WATCHERS: dict[str, Callable[[], Any]] = {
    "dispatch mode": in_a_dispatch_mode,
    "function mode": in_a_function_mode,
    "default device": on_a_default_device,
    "profiler": profiled,
    "profiler of all threads": profiled_with_all_threads,
    "fake tensors": fake,
    "make_fx": proxied,
    "vmap": lambda: torch.vmap(read)(P["q"][None]),
    "tensor from inside vmap": out_of_vmap,
    "func.grad": lambda: torch.func.grad(lambda q: read(q).sum())(P["q"]),
    "func.functionalize": lambda: torch.func.functionalize(read)(P["q"]),
    "functional tensor": functional,
    "forward mode": forward_mode,
    "subclass": lambda: read(P["q"].as_subclass(Subclass)),
    "subclass as a weight": lambda: read(memory=(P.weights[0], P.weights[1].as_subclass(Subclass))),
    "negative view": lambda: read(torch._neg_view(P["q"])),
    "negative view as a weight": lambda: read(memory=(torch._neg_view(P.weights[0]), P.weights[1])),
    "tensor of no storage": lambda: read(torch._efficientzerotensor(P["q"].shape)),
}


def outcome(function: Callable[[], Any]) -> Any:
    """What a function returns, or the error it ends with, as something to compare."""
    try:
        result = function()
    except RuntimeError as error:
        return type(error), str(error).splitlines()[0]
    return (type(result), result.tolist()) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("name", WATCHERS)
def test_whoever_watches_sees_the_operator(name, through_the_operator, monkeypatch):
    read()  # from here on a plain call of these shapes is not checked
    signatures = []
    make = plain.Signature
    monkeypatch.setattr(plain, "Signature", lambda *args: signatures.append(args) or make(*args))
    found = outcome(WATCHERS[name])
    assert not signatures
    assert found == outcome(lambda: through_the_operator(WATCHERS[name]))


def test_a_compiled_call_has_the_operator_in_its_graph():
    targets = []

    def keep(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    def stepped(q: Tensor, state: MemoryState) -> Tensor:
        return memory_read(q, state, spec=SPEC) + memory_scan(q, q, q, P["lr"], state, spec=SPEC, chunk_size=4).output

    state = scan().state
    expected = stepped(P["q"], state)
    found = torch.compile(stepped, backend=keep, fullgraph=True)(P["q"], state)
    assert sum("hope_kernels.scan" in str(target) for target in targets) == 2
    assert torch.equal(found, expected)
    assert torch.equal(stepped(P["q"], state), expected)


@pytest.fixture
def whole_checks(monkeypatch) -> list[int]:
    """One entry for each call that is checked as a whole."""
    checked = []
    tokens = check.check_tokens
    monkeypatch.setattr(check, "check_tokens", lambda named: checked.append(1) or tokens(named))
    return checked


def test_a_signature_is_checked_once(whole_checks):
    for _ in range(3):
        stream(P, 9)
    # Before the first call there is no state, after it there is one with a token pending, then one written, whose
    # weights are each sequence's own, without and with a token pending.
    assert len(whole_checks) == 4
    for _ in range(3):
        read()
        write()
    assert len(whole_checks) == 6
    read(P["q"][:, :0])
    assert len(whole_checks) == 7


def test_signatures_kept_are_bounded(monkeypatch, whole_checks):
    monkeypatch.setattr(plain, "_MOST", 4)
    p = problem(12)
    for length in [*range(13), *range(13)]:
        output = read(p["q"][:, :length])
        assert torch.equal(output, read(p["q"])[:, :length])
        assert len(plain._passed) <= 4
    assert len(whole_checks) > 13


def test_values_are_checked_in_every_call():
    p = problem(retention=True)
    dgd = problem(spec=MemorySpec("mlp", "silu", rule="dgd"))
    scan(p)
    scan(dgd)
    write(p)
    with pytest.raises(ValueError, match=r"retention: got values"):
        scan(p, retention=p["retention"] + 1)
    with pytest.raises(ValueError, match=r"retention: got values"):
        write(p.with_tensors(retention=p["retention"] - 1))
    with pytest.raises(ValueError, match=r"lr: got values"):
        scan(dgd.with_tensors(lr=dgd["lr"] - 1))


@pytest.mark.parametrize("value", [True, 1.0])
def test_what_equals_a_number_is_not_that_number(value):
    scan(chunk_size=1, bptt_chunks=1)
    with pytest.raises(TypeError, match="chunk_size"):
        scan(chunk_size=value)
    with pytest.raises(TypeError, match="bptt_chunks"):
        scan(chunk_size=1, bptt_chunks=value)


def test_a_parameter_that_changed_its_dtype_or_shape_is_checked_anew():
    parameters = tuple(nn.Parameter(w.clone()) for w in P.weights)
    state = MemoryState.initial(parameters, spec=SPEC, chunk_size=4)
    with torch.no_grad():
        read(memory=parameters)
        expected = read(memory=state)
        parameters[0].data = parameters[0].data.bfloat16()
        with pytest.raises(TypeError, match="bfloat16"):
            read(memory=parameters)
        parameters[0].data = P.weights[0][:2]
        with pytest.raises(ValueError, match=r"\(2, 8, 12\)"):
            read(memory=state)
        parameters[0].data = P.weights[0].mT.contiguous().mT  # another layout is as good
        assert torch.equal(read(memory=state), expected)


def test_autocast_casts_after_calls_without_it():
    plain_output = read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert read().dtype == torch.bfloat16
    assert torch.equal(read(), plain_output)


def test_packed_and_padded_calls_and_states_of_theirs_have_no_signature(whole_checks):
    p = problem(6)
    valid = torch.tensor([[0, 6], [2, 5]])
    scan(p)
    for _ in range(2):
        state = scan(p, valid=valid).state
        read(p["q"], state)
    assert len(whole_checks) == 5
    with pytest.raises(ValueError, match=r"valid: got \[2, 7\]"):
        scan(p, valid=valid + torch.tensor([[0, 0], [0, 2]]))


LOW = P.cast(torch.bfloat16, weight_dtype=torch.bfloat16)
# name: (problem, what is changed of a state that fits it, what the message says)
UNFIT_STATES = {
    "spec": (P, {"spec": MemorySpec("mlp", "gelu")}, "memory: got a state of MemorySpec"),
    "chunk size": (P, {"chunk_size": 8}, "chunk_size: got 4"),
    "sequences": (P, {"batch_size": 3}, "memory: got a state of 3 sequences"),
    "written in low precision": (LOW, {"chunk_index": 1}, "memory: got a state of torch.bfloat16"),
    "retention": (P, {"has_retention": True}, "retention: got None"),
    "momentum": (P, {"has_momentum": True}, "momentum: got None"),
    "pending dtype": (P, {"pending_k": P["k"].bfloat16()}, "memory: got a state with pending tokens of torch.bfloat16"),
    "fewer heads": (P, {"stored_weights": tuple(w[:2] for w in P.weights)}, "memory[0]: got a tensor of shape (2, 8,"),
    "momentum's dtype": (P, {"stored_momentum": LOW.weights}, "memory: got momentum of torch.bfloat16"),
}


@pytest.mark.parametrize("name", UNFIT_STATES)
def test_a_state_that_differs_from_a_good_one_in_one_thing_is_refused(name):
    p, changes, message = UNFIT_STATES[name]
    state = scan(p).state
    scan(p, state)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        scan(p, replace(state, **changes))
    scan(p, state)
