"""Small models that the tests of this folder share: every mixer, a written and a plain level, all parameters spread."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_kernels import CMSLevel
from hope_kernels.models import PLAIN_MLP, HopeConfig, HopeForCausalLM

MIXERS = ("titans", "neural_memory", "attention", "windowed attention", "transformer")
_OPTIONS = {
    "windowed attention": {"mixer": "attention", "window": 4},
    "transformer": {"mixer": "attention", "levels": PLAIN_MLP},
}
# The Hope model without one of its parts each.
ABLATIONS = {
    "no delta rule": {"rule": "gd"},
    "momentum": {"rule": "gd", "momentum": True},
    "no retention": {"retention": False},
    "fixed keys and targets": {"adaptive": ("lr", "retention")},
    "no adaptive projection": {"adaptive": ()},
    "no CMS": {"levels": PLAIN_MLP},
}
VOCABULARY = 11


def config_of(mixer: str, **changes) -> HopeConfig:
    usual = {"vocab_size": VOCABULARY, "dim": 8, "depth": 2, "heads": 2, "chunk_size": 3, "projection_chunk_size": 4}
    levels = (CMSLevel(2, lr_max=0.2), CMSLevel(None, expansion=2))
    return HopeConfig(**{**usual, "levels": levels, "mixer": mixer, **_OPTIONS.get(mixer, {}), **changes})


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
