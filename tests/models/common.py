"""Small models that the tests of this folder share: every mixer, a written and a plain level, all parameters spread."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_kernels import CMSLevel
from hope_kernels.models import HopeConfig, HopeForCausalLM

MIXERS = ("titans", "neural_memory", "attention")
VOCABULARY = 11


def config_of(mixer: str, **changes) -> HopeConfig:
    usual = {"vocab_size": VOCABULARY, "dim": 8, "depth": 2, "heads": 2, "chunk_size": 3, "projection_chunk_size": 4}
    return HopeConfig(
        mixer=mixer, **{**usual, "levels": (CMSLevel(2, lr_max=0.2), CMSLevel(None, expansion=2)), **changes}
    )


def make_model(
    mixer: str, dtype: torch.dtype = torch.float64, backend: str | None = None, **changes
) -> HopeForCausalLM:
    torch.manual_seed(0)
    model = HopeForCausalLM(config_of(mixer, **changes), backend, dtype=dtype)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            parameter.add_((0.2 * noise).to(parameter))
    return model


def ids_of(batch: int, length: int, seed: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
