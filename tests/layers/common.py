"""What the layer tests share: a layer whose writes matter, its results and gradients under any split, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hope_kernels import CMS, CMSLevel
from hope_kernels.layers import CMSState
from tests.cases import cotangent, state_results

VARIANTS = ("sequential", "independent", "nested")
DIM, HEADS = 6, 2
Layer = TypeVar("Layer", bound=nn.Module)


def spread(layer: Layer, seed: int = 0) -> Layer:
    """Move every parameter off its starting value: gates then depend on the token, mixing weights differ.

    Without this, zero gate weights would hide a gate that is read from the wrong token or head.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            parameter.add_((0.4 * noise).to(parameter))
    return layer


def make_cms(variant: str, *, momentum: bool = False, seed: int = 0, **options) -> CMS:
    """Three written levels and a plain one, all different; chunk sizes 1, 2, 6 (so segments of 2 and 6)."""
    rule = "gd" if momentum else "dgd"
    levels = [
        CMSLevel(1, momentum=momentum, lr_max=0.3),
        CMSLevel(
            2,
            form="glu",
            activation="silu",
            expansion=2,
            momentum=momentum,
            retention=not momentum,
            lr_max=0.3,
        ),
        CMSLevel(6, form="mlp", expansion=2, rule=rule, lr_max=0.2),
        CMSLevel(None, expansion=2),
    ]
    options = {"heads": HEADS, "dtype": torch.float64, **options}
    torch.manual_seed(seed)
    return spread(CMS(DIM, levels, variant=variant, **options), seed)


def tokens(batch: int, length: int, dim: int = DIM, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, dim, generator=random, dtype=torch.float64).to(dtype)


def run_stream(layer: nn.Module, x: Tensor, lengths: Sequence[int], state: Any = None) -> tuple[Tensor, Any]:
    """``x`` in calls of the given lengths: all outputs, and the last state."""
    assert sum(lengths) == x.shape[1]
    state = layer.init_state(x.shape[0]) if state is None else state
    outputs = []
    for part in x.split(list(lengths), 1):
        output, state = layer.stream(part, state)
        outputs.append(output)
    return torch.cat(outputs, 1), state


def results_of(output: Tensor, state: CMSState) -> dict[str, Tensor]:
    """The output and everything differentiable in the state, by name."""
    results = {"output": output}
    for index, level in enumerate(state.levels):
        if level is not None:
            results |= {f"level {index} {name}": value for name, value in state_results(level).items()}
    return results


def positions_of(state: CMSState) -> list:
    held = [(x.position, x.chunk_index, x.pending_count) if x is not None else None for x in state.levels]
    return [state.position, state.batch_size, *held]


def with_gradients(
    layer: nn.Module,
    x: Tensor,
    lengths: Sequence[int],
    results_of: Callable[[Tensor, Any], dict[str, Tensor]] = results_of,
) -> dict[str, Tensor]:
    """Results of a stream, and the gradient of their sum against fixed cotangents for ``x`` and every parameter."""
    x = x.detach().clone().requires_grad_()
    results = results_of(*run_stream(layer, x, lengths))
    results |= gradients_of(results, {"x": x, **dict(layer.named_parameters())})
    return {name: value.detach() for name, value in results.items()}


def gradients_of(results: dict[str, Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the results' sum against fixed cotangents, for every named leaf."""
    loss = sum((value * cotangent(name, value)).sum() for name, value in results.items())
    found = {}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for (name, leaf), gradient in zip(named.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """The same names and shapes; values within ``tolerance`` times the largest entry (at least 1)."""
    assert sorted(actual) == sorted(expected)
    wrong = []
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
        if want.numel() == 0:
            continue
        error = (got - want).abs().max().item()
        bound = tolerance * max(1.0, want.abs().max().item())
        if not error <= bound:  # written so that NaN is wrong
            wrong.append(f"{name}: error {error:.2e}, allowed {bound:.2e}")
    assert not wrong, "; ".join(wrong)
