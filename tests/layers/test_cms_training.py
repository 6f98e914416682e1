"""A CMS trains from its own initialisation: associative recall, which a layer without in-context writes cannot do.

Every sequence shows eight pairs of a key (one-hot) and a value (random signs), then asks for the value of each key in
another order. Values are drawn anew for every sequence, so weights learned across sequences are no help: predicting
anything fixed has a mean squared error of 1.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hope_kernels import CMS, CMSLevel
from tests.layers.common import VARIANTS

PAIRS = KEY = VALUE = 8
DIM = 32


def recall_batch(size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, 2 * PAIRS, KEY + VALUE]`` (pairs shown, then keys asked for) and the values asked for."""
    value = torch.randint(0, 2, (size, PAIRS, VALUE), generator=random).float() * 2 - 1
    order = torch.stack([torch.randperm(PAIRS, generator=random) for _ in range(size)])
    key = torch.eye(KEY)
    shown = torch.cat([key.expand(size, -1, -1), value], -1)
    asked = torch.cat([key[order], torch.zeros(size, PAIRS, VALUE)], -1)
    answer = value.gather(1, order.unsqueeze(-1).expand(-1, -1, VALUE))
    return torch.cat([shown, asked], 1), answer


class Recall(nn.Module):
    def __init__(self, cms: CMS) -> None:
        super().__init__()
        self.read_in, self.norm, self.cms = nn.Linear(KEY + VALUE, DIM), nn.LayerNorm(DIM), cms
        self.read_out = nn.Linear(DIM, VALUE)

    def forward(self, x: Tensor) -> Tensor:
        return self.read_out(self.cms(self.norm(self.read_in(x)))[:, PAIRS:])


def train(variant: str, steps: int, **options) -> list[float]:
    """Losses of training with Adam. Every gradient and parameter on the way is finite."""
    torch.manual_seed(0)
    levels = [CMSLevel(2, **options), CMSLevel(8, **options), CMSLevel(None)]
    model = Recall(CMS(DIM, levels, heads=2, variant=variant))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    random = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens, answer = recall_batch(16, random)
        loss = F.mse_loss(model(tokens), answer)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        assert norm > 0
        optimizer.step()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    return losses


@pytest.mark.parametrize("options", [{}, {"momentum": True}, {"rule": "dgd"}], ids=["gd", "momentum", "dgd"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recall_within_the_context_is_learned_in_a_hundred_steps(variant, options) -> None:
    losses = train(variant, 100, **options)
    assert losses[0] > 0.9
    assert sum(losses[-10:]) / 10 < 0.5, losses[::10]


def test_without_writes_nothing_is_recalled() -> None:
    losses = train("sequential", 100, lr_max=1e-9)
    assert sum(losses[-10:]) / 10 > 0.9, losses[::10]
