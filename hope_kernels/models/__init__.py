"""The Hope model and a language model on top of it."""

from hope_kernels.models.config import PLAIN_MLP, HopeConfig
from hope_kernels.models.generation import HopeDecoder
from hope_kernels.models.hope import HopeBlock, HopeForCausalLM, HopeModel, HopeOutput
from hope_kernels.models.state import BlockState, HopeState

__all__ = [
    "PLAIN_MLP",
    "BlockState",
    "HopeBlock",
    "HopeConfig",
    "HopeDecoder",
    "HopeForCausalLM",
    "HopeModel",
    "HopeOutput",
    "HopeState",
]
