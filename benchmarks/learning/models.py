"""The models that are compared: configurations of :mod:`hope_kernels.models`, all with about as many parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from hope_kernels.layers import CMSLevel
from hope_kernels.models import HopeConfig, HopeForCausalLM
from hope_kernels.models.config import Mixer

# Token mixer, and whether a CMS or a plain MLP follows.
MODELS: dict[str, tuple[Mixer, bool]] = {
    "Hope": ("titans", True),
    "Hope without CMS": ("titans", False),
    "Titans": ("neural_memory", False),
    "Hope-Attention": ("attention", True),
    "Transformer": ("attention", False),
}
# The MLP (the CMS's slowest level) is four times as wide as the model, or as near to that as the budget lets it be.
EXPANSION = 4.0
TOLERANCE = 0.01


@dataclass(frozen=True)
class Size:
    """What the models of a task have in common.

    Attributes:
        parameters: of each model, to within :data:`TOLERANCE`.
        depth, heads: blocks, heads of every layer.
        chunk_size, projection_chunk_size: of the Titans layers.
        levels: chunk sizes of the CMS; a plain MLP follows as the slowest level.
        own_bounds: take the layers' own bounds of the mixer's inner step, see :func:`inner_step`.
    """

    parameters: int = 88_000
    depth: int = 2
    heads: int = 2
    chunk_size: int = 8
    projection_chunk_size: int = 16
    levels: tuple[int, ...] = (8, 32)
    own_bounds: bool = False


LEARNING_RATES = (3e-3, 1e-2)  # of the optimiser; every model chooses


def inner_step(mixer: Mixer, size: Size) -> float | None:
    """The bound of the mixer's inner step; None for the layer's own, and for a mixer that has none.

    The layers' own bounds are for long sequences. At a dozen writes a memory must learn a pair from one showing, for
    which they are too small. With ``gd`` the steps of a chunk add up: 1.6 in all is below the 2 from which on they
    overshoot; ``dgd`` bounds their sum itself.
    """
    if size.own_bounds:
        return None
    return {"titans": 1.0, "neural_memory": 1.6 / size.chunk_size}.get(mixer)


@cache
def config_of(name: str, vocab_size: int, size: Size) -> HopeConfig:
    """The configuration of a model with the parameters asked for.

    Widths go in steps of four features per head; of those that some MLP of one to eight times the width brings to the
    budget, the one whose MLP is nearest to :data:`EXPANSION`.

    Raises:
        ValueError: the name is unknown, or no width meets the tolerance.
    """
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}; want one of {', '.join(map(repr, MODELS))}")
    mixer, cms = MODELS[name]

    def config(dim: int, expansion: float) -> HopeConfig:
        return HopeConfig(
            vocab_size=vocab_size,
            dim=dim,
            depth=size.depth,
            heads=size.heads,
            mixer=mixer,
            chunk_size=size.chunk_size,
            projection_chunk_size=size.projection_chunk_size,
            lr_max=inner_step(mixer, size),
            levels=(*map(CMSLevel, size.levels if cms else ()), CMSLevel(None, expansion=expansion)),
        )

    found = []
    for dim in range(4 * size.heads, 257, 4 * size.heads):
        one, two = (parameters_of(config(dim, float(expansion))) for expansion in (1, 2))
        if one > size.parameters:
            break
        expansion = 1 + (size.parameters - one) / (two - one)
        if expansion <= 8:
            found.append(config(dim, round(expansion * dim) / dim))
    found.sort(key=lambda config: abs(config.levels[-1].expansion - EXPANSION))
    if not found or abs(parameters_of(found[0]) - size.parameters) > TOLERANCE * size.parameters:
        raise ValueError(f"parameters is {size.parameters}; no width of {name} is within {TOLERANCE:.0%} of that")
    return found[0]


@cache
def parameters_of(config: HopeConfig) -> int:
    """Numbers in all parameters, tied ones once."""
    return HopeForCausalLM(config, device="meta").parameter_count()
