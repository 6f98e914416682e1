"""Layers built from memories."""

from hope_kernels.layers.attention import CausalAttention
from hope_kernels.layers.cms import CMS
from hope_kernels.layers.cms_state import CMSBuffer, CMSState
from hope_kernels.layers.level import CMSLevel
from hope_kernels.layers.titans import NeuralMemory, SelfModifyingTitans
from hope_kernels.layers.titans_state import TitansState

__all__ = [
    "CMS",
    "CMSBuffer",
    "CMSLevel",
    "CMSState",
    "CausalAttention",
    "NeuralMemory",
    "SelfModifyingTitans",
    "TitansState",
]
