"""What the Titans tests share: layers whose writes matter, and everything differentiable in their results."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_kernels import NeuralMemory, SelfModifyingTitans
from hope_kernels.layers import TitansState
from hope_kernels.layers.titans import TitansLayer
from tests.cases import state_results
from tests.layers.common import DIM, HEADS, spread

# One layer of each kind, and the ablations; chunk sizes that do not divide one another.
LAYERS = {
    "titans": {},
    "gd": {"rule": "gd", "momentum": True},
    "no retention": {"retention": False},
    "bounded targets": {"value_norm_max": 0.3},
    "bounded weights": {"weight_norm_max": 0.8},
    "fixed k and v": {"adaptive": ("lr", "retention")},
    "fixed gates": {"adaptive": ("v", "k"), "rule": "gd", "momentum": True},
    "only k, no retention": {"adaptive": ("k",), "retention": False, "rule": "gd"},
    "all fixed": {"adaptive": ()},
    "plain": {"kind": NeuralMemory},
    "plain, no gates": {"kind": NeuralMemory, "retention": False, "momentum": False},
}


def make_titans(name: str = "titans", seed: int = 0, **options) -> TitansLayer:
    """A layer of ``LAYERS`` in float64 with every parameter off its starting value, and large steps."""
    settings = {"chunk_size": 3, "expansion": 2, "lr_max": 0.3, "dtype": torch.float64, **LAYERS[name], **options}
    kind = settings.pop("kind", SelfModifyingTitans)
    if kind is SelfModifyingTitans:
        settings = {"projection_chunk_size": 2, **settings}
    torch.manual_seed(seed)
    layer = spread(kind(DIM, HEADS, **settings), seed)
    with torch.no_grad():
        layer.conv.weight.mul_(0.2)  # results of the convolution beyond unit norm make the memories diverge
    return layer


def results_of(output: Tensor, state: TitansState) -> dict[str, Tensor]:
    """The output and everything differentiable in the state, by name."""
    results = {"output": output, "tail": state.tail}
    results |= {f"memory {name}": value for name, value in state_results(state.memory).items()}
    if state.projections is not None:
        results |= {f"projections {name}": value for name, value in state_results(state.projections).items()}
    if state.pending is not None:
        results |= {f"pending {name}": x for name, x in state.pending._asdict().items() if x is not None}
    return results


def positions_of(state: TitansState) -> list:
    held = [state.memory, *([] if state.projections is None else [state.projections])]
    return [state.position, state.batch_size, *((m.position, m.chunk_index, m.pending_count) for m in held)]
