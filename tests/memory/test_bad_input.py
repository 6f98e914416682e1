"""Bad input is refused by name before anything is computed: what came, what is wanted, and nothing changed."""

from __future__ import annotations

import re

import pytest
import torch

from hope_kernels import MemorySpec, MemoryState, available_backends, memory_read, memory_scan, memory_write
from tests.cases import BACKENDS, Problem, make_problem, state_results

SPEC = MemorySpec("mlp", "silu")


def assert_names(message: str, argument: str, *words: str) -> None:
    """The message has the argument's name as a word of its own, and all the other words."""
    assert re.search(rf"(^|\W){argument}(\W|$)", message), f"{message!r} does not name {argument}"
    assert all(word in message for word in words), f"{message!r} lacks one of {words}"


def problem_of(spec: MemorySpec = SPEC, **options) -> Problem:
    options = {
        "chunk_size": 4,
        "batch": 2,
        "tokens": 6,
        "heads": 3,
        "dim": 5,
        "hidden": 7,
        "retention": True,
        **options,
    }
    return make_problem(spec, **options).cast(torch.float32)


def arguments(problem: Problem, **changes) -> dict:
    found = {name: problem.get(name) for name in ("q", "k", "v", "lr", "retention", "momentum")}
    found |= {"memory": problem.weights, "spec": problem.spec, "chunk_size": problem.chunk_size, "backend": "reference"}
    return {**found, **changes}


P = problem_of()
W_IN, W_OUT = P.weights
META = torch.device("meta")
OTHER = problem_of(MemorySpec("mlp", "gelu"))

# name: (changed arguments, exception, what the message must contain). Each message names the argument, what it got
# and what is wanted; `got` is checked by a number, shape, dtype or word that is only in the bad value.
BAD = {
    "q without heads": ({"q": P["q"][0]}, ValueError, ["q", "(6, 3, 5)", "[batch, tokens, heads, dim]"]),
    "k of another length": ({"k": P["k"][:, :5]}, ValueError, ["k", "(2, 5, 3, 5)", "(2, 6, 3, 5)"]),
    "v of other features": ({"v": P["v"][..., :4]}, ValueError, ["v", "(2, 6, 3, 4)", "(2, 6, 3, 5)"]),
    "q is a list": ({"q": [1.0]}, TypeError, ["q", "list", "tensor"]),
    "q of integers": ({"q": P["q"].long()}, TypeError, ["q", "int64", "float32"]),
    "k of another dtype": ({"k": P["k"].bfloat16()}, TypeError, ["k", "bfloat16", "float32"]),
    "v of another dtype": ({"v": P["v"].double()}, TypeError, ["v", "float64", "float32"]),
    "v on another device": ({"v": P["v"].to(META)}, ValueError, ["v", "meta", "cpu"]),
    "lr with features": ({"lr": P["lr"][..., None]}, ValueError, ["lr", "(2, 6, 3, 1)", "(2, 6, 3)"]),
    "lr heads before tokens": ({"lr": P["lr"].mT}, ValueError, ["lr", "(2, 3, 6)", "(2, 6, 3)"]),
    "lr without heads": ({"lr": P["lr"][..., 0]}, ValueError, ["lr", "(2, 6)", "(2, 6, 3)"]),
    "lr of low precision": ({"lr": P["lr"].bfloat16()}, TypeError, ["lr", "bfloat16", "float32"]),
    "lr is a number": ({"lr": 0.1}, TypeError, ["lr", "0.1", "tensor"]),
    "lr missing": ({"lr": None}, TypeError, ["lr", "None", "tensor"]),
    "retention of one head": ({"retention": P["lr"][..., :1]}, ValueError, ["retention", "(2, 6, 1)", "(2, 6, 3)"]),
    "retention on another device": ({"retention": P["lr"].to(META)}, ValueError, ["retention", "meta", "cpu"]),
    "momentum of float64": ({"momentum": P["lr"].double()}, TypeError, ["momentum", "float64", "float32"]),
    "momentum of one row": ({"momentum": P["lr"][:1]}, ValueError, ["momentum", "(1, 6, 3)", "(2, 6, 3)"]),
    "chunk_size zero": ({"chunk_size": 0}, ValueError, ["chunk_size", "0", "positive"]),
    "chunk_size negative": ({"chunk_size": -4}, ValueError, ["chunk_size", "-4", "positive"]),
    "chunk_size a fraction": ({"chunk_size": 4.0}, TypeError, ["chunk_size", "4.0", "int"]),
    "chunk_size a bool": ({"chunk_size": True}, TypeError, ["chunk_size", "True", "int"]),
    "chunk_size missing": ({"chunk_size": None}, TypeError, ["chunk_size", "None", "int"]),
    "bptt_chunks zero": ({"bptt_chunks": 0}, ValueError, ["bptt_chunks", "0", "positive"]),
    "bptt_chunks negative": ({"bptt_chunks": -1}, ValueError, ["bptt_chunks", "-1", "positive"]),
    "bptt_chunks a fraction": ({"bptt_chunks": 1.5}, TypeError, ["bptt_chunks", "1.5", "int"]),
    "chunk_size beyond 64 bits": ({"chunk_size": 2**63}, ValueError, ["chunk_size", str(2**63), "2^63"]),
    "retention above 1": ({"retention": P["lr"] + 1.5}, ValueError, ["retention", "1.5", "[0, 1]"]),
    "momentum below 0": ({"momentum": P["lr"] - 0.5}, ValueError, ["momentum", "-0.4", "[0, 1]"]),
    "lr below 0 with dgd": (
        {"spec": MemorySpec("mlp", "silu", rule="dgd"), "lr": P["lr"] - 0.5},
        ValueError,
        ["lr", "-0.4", "[0, inf]"],
    ),
    "no heads": ({name: P[name][:, :, :0] for name in "qkv"}, ValueError, ["q", "(2, 6, 0, 5)", "head"]),
    "no features": ({name: P[name][..., :0] for name in "qkv"}, ValueError, ["q", "(2, 6, 3, 0)", "feature"]),
    "no hidden features": ({"memory": (W_IN[..., :0], W_OUT[:, :0])}, ValueError, ["memory", "(3, 5, 0)", "output"]),
    "dgd with momentum": (
        {"spec": MemorySpec("mlp", "silu", rule="dgd"), "momentum": P["lr"]},
        ValueError,
        ["momentum", "dgd"],
    ),
    "spec is a string": ({"spec": "mlp"}, TypeError, ["spec", "mlp", "MemorySpec"]),
    "too few weights": ({"memory": (W_IN,)}, ValueError, ["memory", "1", "2", "W_in"]),
    "weights are one tensor": ({"memory": W_IN}, TypeError, ["memory", "tensor", "tuple"]),
    "a weight is None": ({"memory": (W_IN, None)}, TypeError, ["memory", "None", "tensor"]),
    "weights transposed": ({"memory": (W_IN.mT, W_OUT.mT)}, ValueError, ["memory", "(3, 7, 5)", "5"]),
    "hidden sizes differ": ({"memory": (W_IN, W_OUT[:, :6])}, ValueError, ["memory", "(3, 6, 5)", "(3, 7, 5)"]),
    "weights of other heads": ({"memory": (W_IN[:2], W_OUT[:2])}, ValueError, ["memory", "(2, 5, 7)", "3"]),
    "weights of other rows": (
        {"memory": tuple(w.expand(5, *w.shape) for w in P.weights)},
        ValueError,
        ["memory", "(5, 3, 5, 7)", "2"],
    ),
    "one weight per row, one shared": (
        {"memory": (W_IN, W_OUT.expand(2, *W_OUT.shape))},
        ValueError,
        ["memory", "(2, 3, 7, 5)", "[heads, in, out]"],
    ),
    "weights without heads": ({"memory": (W_IN[0], W_OUT[0])}, ValueError, ["memory", "(5, 7)", "[heads, in, out]"]),
    "weights of float64": ({"memory": (W_IN.double(), W_OUT.double())}, TypeError, ["memory", "float64", "float32"]),
    "weights of bfloat16 with float32 tokens": (
        {"memory": (W_IN.bfloat16(), W_OUT.bfloat16())},
        TypeError,
        ["memory", "bfloat16", "float32"],
    ),
    "weights of two dtypes": ({"memory": (W_IN, W_OUT.bfloat16())}, TypeError, ["memory", "bfloat16", "float32"]),
    "weights on another device": ({"memory": (W_IN.to(META), W_OUT.to(META))}, ValueError, ["memory", "meta", "cpu"]),
    "valid of another shape": (
        {"valid": torch.tensor([0, 6], dtype=torch.int32)},
        ValueError,
        ["valid", "(2,)", "(2, 2)"],
    ),
    "valid of floats": ({"valid": torch.tensor([[0.0, 6.0]] * 2)}, TypeError, ["valid", "float32", "int32"]),
    "valid past the end": ({"valid": torch.tensor([[0, 6], [0, 7]])}, ValueError, ["valid", "[0, 7]", "6"]),
    "valid before the start": ({"valid": torch.tensor([[-1, 6], [0, 6]])}, ValueError, ["valid", "[-1, 6]", "0 <="]),
    "valid backwards": ({"valid": torch.tensor([[4, 2], [0, 6]])}, ValueError, ["valid", "[4, 2]", "<="]),
    "valid a list": ({"valid": [[0, 6], [0, 6]]}, TypeError, ["valid", "list", "tensor"]),
    "backend unknown": ({"backend": "gpu"}, ValueError, ["backend", "gpu", "reference", "cpu"]),
    "backend not a name": ({"backend": 3}, (ValueError, TypeError), ["backend", "3", "reference"]),
}


@pytest.mark.parametrize("after", ["nothing", "good calls"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_by_name(case, after):
    changes, exception, words = BAD[case]
    backend = "reference"
    if after == "good calls":  # whose like the default backend need not check again
        backend = None
        for spec in (SPEC, MemorySpec("mlp", "silu", rule="dgd")):
            for gates in ({}, {"retention": P["lr"], "momentum": P["lr"] if spec.rule == "gd" else None}):
                memory_scan(**arguments(P, spec=spec, backend=backend, **gates))
    with pytest.raises(exception) as refused:
        memory_scan(**{**arguments(P, backend=backend), **changes})
    assert_names(str(refused.value), *words)


PACKED = problem_of(batch=1)
BAD_OFFSETS = {
    "decreasing": (torch.tensor([0, 4, 3, 6]), ValueError, ["[0, 4, 3, 6]", "6"]),
    "not from 0": (torch.tensor([1, 6]), ValueError, ["[1, 6]", "0 first"]),
    "too long": (torch.tensor([0, 7]), ValueError, ["[0, 7]", "6"]),
    "too short": (torch.tensor([0, 5]), ValueError, ["[0, 5]", "6"]),
    "negative": (torch.tensor([0, -2, 6]), ValueError, ["[0, -2, 6]"]),
    "empty": (torch.tensor([], dtype=torch.int64), ValueError, ["(0,)", "sequences + 1"]),
    "two-dimensional": (torch.tensor([[0, 6]]), ValueError, ["(1, 2)", "sequences + 1"]),
    "floats": (torch.tensor([0.0, 6.0]), TypeError, ["float32", "int32"]),
    "a list": ([0, 6], TypeError, ["list", "tensor"]),
    "another device": (torch.tensor([0, 6], device=META), ValueError, ["meta", "cpu"]),
}


@pytest.mark.parametrize("case", BAD_OFFSETS)
def test_bad_cu_seqlens_are_refused(case):
    offsets, exception, words = BAD_OFFSETS[case]
    with pytest.raises(exception) as refused:
        memory_scan(**arguments(PACKED, cu_seqlens=offsets))
    assert_names(str(refused.value), "cu_seqlens", *words)


def test_cu_seqlens_want_one_row_and_no_valid_beside_them():
    with pytest.raises(ValueError, match=r"cu_seqlens.*2.*batch of 1"):
        memory_scan(**arguments(P, cu_seqlens=torch.tensor([0, 6])))
    both = {"cu_seqlens": torch.tensor([0, 6]), "valid": torch.tensor([[0, 6]])}
    with pytest.raises(ValueError, match=r"cu_seqlens"):
        memory_scan(**arguments(PACKED, **both))


def test_packed_weights_are_one_per_sequence():
    own = tuple(w.expand(3, *w.shape) for w in PACKED.weights)
    with pytest.raises(ValueError, match=r"memory.*3.*2 sequences"):
        memory_scan(**arguments(PACKED, memory=own, cu_seqlens=torch.tensor([0, 2, 6])))


# A state that does not fit the call: made by 6 tokens in chunks of 4, so it has written once and has two tokens
# pending.
def carried_state(backend: str = "reference") -> MemoryState:
    return memory_scan(**arguments(P, backend=backend)).state


STATE_CASES = {
    "another spec": (lambda: arguments(OTHER), ["memory", "silu", "gelu"]),
    "another chunk size with tokens pending": (lambda: arguments(P, chunk_size=3), ["chunk_size", "3", "4"]),
    "tokens of another dtype": (lambda: arguments(P.cast(torch.bfloat16)), ["memory", "float32", "bfloat16"]),
    "tokens of float64": (lambda: arguments(P.cast(torch.float64)), ["memory", "float32", "float64"]),
    "another batch": (lambda: arguments(P.row(0)), ["memory", "2", "1"]),
    "other heads": (lambda: arguments(problem_of(heads=2)), ["memory", "3", "2"]),
    "other features": (lambda: arguments(problem_of(dim=4)), ["memory", "5", "4"]),
    "retention left out": (lambda: arguments(P, retention=None), ["retention", "None"]),
    "momentum added": (lambda: arguments(P, momentum=P["lr"]), ["momentum", "None"]),
}


@pytest.mark.parametrize("case", STATE_CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_does_not_fit_the_call_is_refused_and_unchanged(case, backend):
    make, words = STATE_CASES[case]
    state = carried_state(backend)
    memory_scan(**arguments(P, memory=state, backend=backend))
    before = {name: value.clone() for name, value in state_results(state).items()}
    # The contract says ValueError for a state of another spec, dtype or chunk size.
    with pytest.raises((ValueError, TypeError)) as refused:
        memory_scan(**{**make(), "memory": state, "backend": backend})
    assert_names(str(refused.value), *words)
    assert state.position == 6
    for name, want in before.items():
        assert torch.equal(state_results(state)[name], want), name
    # Still good for the call it fits.
    assert memory_scan(**arguments(P, memory=state, backend=backend)).state.position == 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_call_changes_no_input(backend):
    kept = {name: t.clone() for name, t in P.tensors.items()}
    for changes, exception, _ in BAD.values():
        with pytest.raises(exception):
            memory_scan(**{**arguments(P, backend=backend), **changes})
    for name, want in kept.items():
        assert torch.equal(P[name], want), name


@pytest.mark.parametrize("after", ["nothing", "good calls"])
def test_reads_and_writes_check_their_arguments_too(after):
    if after == "good calls":
        memory_read(P["q"], P.weights, spec=SPEC)
        memory_read(P["q"], carried_state(), spec=SPEC)
        memory_write(P["k"], P["v"], P["lr"], P.weights, spec=SPEC)
    with pytest.raises(ValueError, match=r"q.*\(6, 3, 5\)"):
        memory_read(P["q"][0], P.weights, spec=SPEC)
    with pytest.raises(ValueError, match=r"memory.*\(2, 5, 7\)"):
        memory_read(P["q"], (W_IN[:2], W_OUT[:2]), spec=SPEC)
    with pytest.raises(ValueError, match=r"memory.*silu.*gelu"):
        memory_read(P["q"], carried_state(), spec=OTHER.spec)
    with pytest.raises(ValueError, match=r"v.*\(2, 5, 3, 5\)"):
        memory_write(P["k"], P["v"][:, :5], P["lr"], P.weights, spec=SPEC)
    with pytest.raises(TypeError, match=r"lr.*float64"):
        memory_write(P["k"], P["v"], P["lr"].double(), P.weights, spec=SPEC)
    dgd = MemorySpec("mlp", "silu", rule="dgd")
    with pytest.raises(ValueError, match=r"momentum.*dgd"):
        memory_write(P["k"], P["v"], P["lr"], P.weights, spec=dgd, momentum=P["lr"])


def test_initial_states_check_their_arguments():
    with pytest.raises(ValueError, match=r"chunk_size.*0"):
        MemoryState.initial(P.weights, spec=SPEC, chunk_size=0)
    with pytest.raises(ValueError, match=r"momentum.*\(3, 5, 6\)"):
        MemoryState.initial(P.weights, (W_IN[..., :6], W_OUT[:, :6]), spec=SPEC, chunk_size=4)
    with pytest.raises(TypeError, match=r"momentum.*bfloat16"):
        MemoryState.initial(P.weights, (W_IN.bfloat16(), W_OUT.bfloat16()), spec=SPEC, chunk_size=4)
    with pytest.raises(ValueError, match=r"weights.*1.*2"):
        MemoryState.initial((W_IN,), spec=SPEC, chunk_size=4)
    with pytest.raises(ValueError, match=r"batch_size.*-1"):
        MemoryState.initial(P.weights, spec=SPEC, chunk_size=4, batch_size=-1)
    own = tuple(w.expand(2, *w.shape) for w in P.weights)
    with pytest.raises(ValueError, match=r"batch_size.*3.*2"):
        MemoryState.initial(own, spec=SPEC, chunk_size=4, batch_size=3)


@pytest.mark.parametrize(
    ("field", "value", "exception"),
    [
        ("form", "mlp2", ValueError),
        ("activation", "relu", ValueError),
        ("objective", "mse", ValueError),
        ("rule", "adam", ValueError),
        ("residual", 1, TypeError),
        ("residual", "yes", TypeError),
    ],
)
def test_a_spec_refuses_what_is_not_in_its_vocabulary(field, value, exception):
    with pytest.raises(exception) as refused:
        MemorySpec(**{field: value})
    assert field in str(refused.value) and repr(value) in str(refused.value)


def test_specs_are_frozen_hashable_values():
    spec = MemorySpec("glu", "silu", False, "self", "dgd")
    assert spec == MemorySpec("glu", "silu", False, "self", "dgd") != MemorySpec("glu", "silu", True, "self", "dgd")
    assert len({spec, MemorySpec("glu", "silu", False, "self", "dgd"), MemorySpec()}) == 2
    with pytest.raises(AttributeError):
        spec.rule = "gd"
    assert spec.weight_count == 3 and spec.weight_shapes(5, 7) == ((5, 7), (5, 7), (7, 5))
    assert MemorySpec("linear").weight_shapes(5, 7) == ((5, 5),)


def test_every_backend_has_a_status_with_a_reason():
    statuses = available_backends()
    assert list(statuses) == ["reference", "cpu", "triton", "cuda"] and statuses["reference"]
    assert all(len(status.reason) > 10 for status in statuses.values())


@pytest.mark.parametrize("name", [name for name, status in available_backends().items() if not status])
def test_an_unavailable_backend_asked_for_by_name_is_refused_with_its_reason(name):
    status = available_backends()[name]
    with pytest.raises(RuntimeError) as refused:
        memory_scan(**arguments(P, backend=name))
    assert name in str(refused.value) and status.reason in str(refused.value)


def test_the_default_backend_equals_the_fastest_available_one_bit_for_bit():
    name = "cpu" if available_backends()["cpu"] else "reference"
    found, expected = memory_scan(**arguments(P, backend=None)), memory_scan(**arguments(P, backend=name))
    assert torch.equal(found.output, expected.output)
    for result, want in state_results(expected.state).items():
        assert torch.equal(state_results(found.state)[result], want), result


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_at_its_bounds_or_not_finite_is_no_bad_input(backend):
    gates = {"retention": torch.ones_like(P["lr"]), "momentum": torch.zeros_like(P["lr"])}
    for value in (1 + 1e-6, -1e-6, float("nan"), float("inf")):  # a finite-difference probe; one sequence gone wrong
        probed = {name: gate.clone() for name, gate in gates.items()}
        probed["retention"][1] = value
        output, _ = memory_scan(**arguments(P, **probed, backend=backend))
        expected, _ = memory_scan(**arguments(P, **gates, backend=backend))
        assert torch.equal(output[0], expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [4, 6], ids=["at a chunk's end", "with tokens pending"])
def test_a_state_of_another_dtype_is_a_value_error(backend, tokens):
    problem = problem_of(tokens=tokens)
    double = problem.cast(torch.float64)
    _, state = memory_scan(**arguments(double, backend=backend if backend in ("reference", "cpu") else "reference"))
    with pytest.raises(ValueError, match=r"memory: got a state of torch.float64; want torch.float32"):
        memory_scan(**arguments(problem, memory=state, backend=backend))
    with pytest.raises(ValueError, match=r"memory: got a state of torch.float64; want torch.float32"):
        memory_read(problem["q"], state, spec=SPEC, backend=backend)


def test_initial_momentum_of_another_batch_is_refused():
    weights = tuple(w.expand(2, *w.shape) for w in P.weights)
    momentum = tuple(torch.zeros(3, *w.shape) for w in P.weights)
    with pytest.raises(ValueError, match=r"momentum\[0\]: .*\(3, 3, 5, 7\).*\(2, 3, 5, 7\)"):
        MemoryState.initial(weights, momentum, spec=SPEC, chunk_size=4)


def test_a_state_dict_with_a_senseless_spec_is_refused():
    state_dict = MemoryState.initial(P.weights, spec=SPEC, chunk_size=4).state_dict()
    for spec in ("mlp", None, "mlp/silu/maybe/l2/gd"):
        with pytest.raises(ValueError, match=r"spec|key"):
            MemoryState.from_state_dict({**state_dict, "spec": spec})


def test_forward_mode_derivatives_of_a_compiled_backend_are_refused_rather_than_zero():
    if not available_backends()["cpu"]:
        pytest.skip(available_backends()["cpu"].reason)

    def output(k, backend):
        return memory_scan(**arguments(P, k=k, backend=backend)).output

    with pytest.raises(RuntimeError, match=r"forward-mode.*reference"):
        torch.func.jvp(lambda k: output(k, "cpu"), (P["k"],), (P["k"],))
    _, tangent = torch.func.jvp(lambda k: output(k, "reference"), (P["k"],), (P["k"],))
    assert tangent.abs().max() > 0
