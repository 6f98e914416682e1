"""The layer in float32 on every compiled backend, those without float64 included; float64 tests see the others
alone."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import available_backends
from tests.cases import COMPILED_BACKENDS, device_of
from tests.layers.common import VARIANTS, make_cms, results_of, run_stream, tokens, with_gradients

LENGTH = 13


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_outputs_states_and_gradients_follow_the_eager_path_under_a_split(backend, variant, momentum):
    device = device_of(backend)
    cms = make_cms(variant, momentum=momentum, backend=backend).float().to(device)
    eager = make_cms(variant, momentum=momentum, backend="reference").to(device)
    x = tokens(2, LENGTH).float().to(device)
    for parameter, exact in zip(cms.parameters(), eager.parameters(), strict=True):
        exact.data = parameter.data.double()
    found = with_gradients(cms, x, [5, 1, 7])
    expected = with_gradients(eager, x.double(), [LENGTH])
    assert sorted(found) == sorted(expected)
    for name, want in expected.items():
        scale = max(want.abs().max().item(), 1e-3) if want.numel() else 1.0
        torch.testing.assert_close(
            found[name].double(), want, rtol=0, atol=2e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_steps_follow_the_stream(backend, variant):
    device = device_of(backend)
    cms = make_cms(variant, backend=backend).float().to(device)
    x = tokens(2, 7).float().to(device)
    with torch.no_grad():
        output, state = run_stream(cms, x, [7])
        buffer = cms.make_buffer(2)
        steps = torch.stack([cms.step(x[:, t], buffer) for t in range(7)], 1)
    torch.testing.assert_close(steps, output, rtol=1e-4, atol=1e-4)
    found, expected = results_of(steps, buffer.to_state()), results_of(output, state)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not available_backends()["triton"], reason=available_backends()["triton"].reason)
@pytest.mark.parametrize(("variant", "launches"), [("independent", 1), ("sequential", 3)])
def test_levels_are_one_launch_together_or_each_whatever_the_length(variant, launches, monkeypatch):
    """The three written levels of an independent system share one, those of a sequential system have one each."""
    from tests.backends.test_triton import Launches

    cms = make_cms(variant, backend="triton").float().to(device_of("triton"))
    for length in (6, 8):  # the slowest level writes: a level that only reads is a launch of another kernel
        x = tokens(1, length).float().to(device_of("triton")).requires_grad_()
        with monkeypatch.context() as patch:
            counted = Launches(patch)
            output = cms(x)
            forward = counted.total
            output.sum().backward()
        assert (forward, counted.total - forward) == (launches, launches)
