"""Several threads on one model: what a thread computes is what it computes alone."""

from __future__ import annotations

import faulthandler
import sys
import threading

import pytest
import torch
from torch import nn

from hope_kernels.integrations.drop_in import memories
from hope_kernels.integrations.in_context import ModuleNetwork
from hope_kernels.integrations.transformers import add_cms, cms_parameters
from hope_kernels.memory.networks import times_slope
from tests.integrations.support import make, switch_on, tokens, transformers

THREADS, ROUNDS = 4, 8


def at_once(work):
    """``work(i)`` of every thread, with all of them running and changing places often."""
    results, failures = [None] * THREADS, []
    start, interval = threading.Barrier(THREADS), sys.getswitchinterval()

    def run(i):
        try:
            start.wait(60)
            results[i] = [work(i) for _ in range(ROUNDS)]
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(THREADS)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
    finally:
        sys.setswitchinterval(interval)
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback(sys.__stderr__)
        pytest.fail("threads wait for each other: their stacks are in the standard error output")
    assert not failures, failures
    return results


@pytest.mark.parametrize("activation", ["silu", "quick_gelu", "relu"])
def test_threads_on_one_model_compute_what_each_computes_alone(activation):
    """``silu`` has a slope in closed form; the others are differentiated, by PyTorch."""
    model = switch_on(add_cms(make(dtype=torch.float64, hidden_act=activation), levels=[2, 4]))
    gates = [p for _, p in cms_parameters(model)]
    ids = [tokens(1, 12, seed=i) for i in range(THREADS)]

    def logits(i):
        with torch.no_grad():
            return model(ids[i]).logits

    def gradients(i):
        return torch.cat([g.flatten() for g in torch.autograd.grad(model(ids[i], labels=ids[i]).loss, gates)])

    for work in (logits, gradients):
        want = [work(i) for i in range(THREADS)]
        for i, found in enumerate(at_once(work)):
            for one in found:
                torch.testing.assert_close(one, want[i], rtol=1e-9, atol=1e-9)


KNOWN = ["silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "relu2"]


@pytest.mark.parametrize(
    "activation", [*KNOWN, nn.GELU(), nn.GELU("tanh"), nn.functional.silu], ids=lambda x: getattr(x, "__name__", str(x))
)
def test_slopes_in_closed_form_are_those_of_the_activation(activation):
    act = transformers.activations.ACT2FN[activation] if isinstance(activation, str) else activation
    module = next(memories(add_cms(make(dtype=torch.float64), levels=[2])))[1]
    network = ModuleNetwork(module, module.cms_structure)
    network.activate = act
    assert network.known_activation() is not None
    z = torch.linspace(-6, 6, 301, dtype=torch.float64, requires_grad=True)
    e = torch.randn_like(z, requires_grad=True)
    (want,) = torch.autograd.grad(act(z), z, e, create_graph=True)
    found = times_slope(network, z, e)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), (z, e)), torch.autograd.grad(want.square().sum(), (z, e)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_an_activation_that_something_hooks_into_is_not_taken_for_a_known_one():
    module = next(memories(add_cms(make(), levels=[2])))[1]
    network = ModuleNetwork(module, module.cms_structure)
    assert network.known_activation() == "silu"
    module.act_fn.register_forward_hook(lambda _, args, output: 2 * output)
    assert network.known_activation() is None
