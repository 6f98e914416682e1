"""Hope models in transformers' form, small, and padded batches for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hope_kernels.models import HopeForCausalLM
from tests.models.common import ids_of, make_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed (hope_kernels[integrations])")

# Behind the line above, and for tests to take from here: without transformers they are skipped.
from hope_kernels.integrations.transformers_model import (  # noqa: E402
    HopeCache,
    TransformersHopeConfig,
    TransformersHopeForCausalLM,
    TransformersHopeModel,
)

__all__ = [
    "TIGHT",
    "HopeCache",
    "TransformersHopeConfig",
    "TransformersHopeForCausalLM",
    "TransformersHopeModel",
    "gradients",
    "make",
    "make_writer",
    "padded",
    "rows_of",
    "transformers",
    "varied",
]

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def make(mixer: str = "titans", **changes) -> tuple[TransformersHopeForCausalLM, HopeForCausalLM]:
    """A model in the library's form, in inference mode, and in its own; they share their parameters."""
    hope = make_model(mixer, **changes)
    return TransformersHopeForCausalLM.from_hope(hope).eval(), hope


def make_writer(mixer: str = "titans", **changes) -> tuple[TransformersHopeForCausalLM, HopeForCausalLM]:
    """The same of a model that writes many tokens, and others behind another prompt; :func:`make`'s repeats one."""
    model, hope = make(mixer, tie_embeddings=False, **changes)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        hope.model.embedding.weight.normal_(std=0.4, generator=random)
        hope.model.norm.weight.fill_(1.0)
        hope.head.weight.normal_(generator=random)
    return model, hope


def varied(text: torch.Tensor) -> torch.Tensor:
    """A text, once it was seen that a wrong state would have changed it: it has four tokens or more."""
    assert len(text.unique()) >= 4, text
    return text


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[T_i]`` as one batch of ids, and its mask; padding is an id that means something elsewhere."""
    length = max(len(row) for row in rows)
    where = [(length - len(row), 0) if side == "left" else (0, length - len(row)) for row in rows]
    ids = torch.stack([F.pad(row, pad, value=3) for row, pad in zip(rows, where, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, where, strict=True)])
    return ids, mask


def rows_of(*lengths: int) -> list[torch.Tensor]:
    return [ids_of(1, length, seed=length)[0] for length in lengths]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
