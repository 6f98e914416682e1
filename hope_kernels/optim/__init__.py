"""Updates of parameters at several frequencies: what an optimizer of a multi-frequency model is made of."""

from hope_kernels.optim.level_update import LevelUpdate, level_update
from hope_kernels.optim.problem import UpdateLevel

__all__ = ["LevelUpdate", "UpdateLevel", "level_update"]
