"""What a Hope model is made of: sizes, token mixer, CMS levels; presets up to the paper's sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hope_kernels.layers import CMSLevel

Mixer = Literal["titans", "neural_memory", "attention"]
Variant = Literal["sequential", "independent", "nested"]

PLAIN_MLP = (CMSLevel(None),)  # the levels of a block without a CMS


@dataclass(frozen=True)
class HopeConfig:
    """Sizes and parts of a :class:`hope_kernels.models.HopeModel`. Frozen, comparable, plain JSON as a dictionary.

    Args:
        vocab_size: token ids are ``0 .. vocab_size - 1``; 256 for bytes.
        dim: features of a token.
        depth: blocks.
        heads: of the token mixer and of the CMS, each ``dim / heads`` wide.
        mixer: the first half of a block. ``"titans"``: :class:`~hope_kernels.layers.SelfModifyingTitans`, which makes
            a Hope block; ``"attention"``: :class:`~hope_kernels.layers.CausalAttention`, Hope-Attention;
            ``"neural_memory"``: :class:`~hope_kernels.layers.NeuralMemory`, plain Titans.
        chunk_size: tokens per write of the mixer's main memory.
        projection_chunk_size: tokens per write of the memories that make keys, values and gates (``"titans"``).
        lr_max: upper bound of an inner learning rate of the mixer; None takes the layer's own default.
        window: tokens that attention looks back on, itself counted; None is all of them, and a cache that grows.
        rope_base: of attention's rotary positions.
        levels: the CMS, fastest level first. ``(CMSLevel(None),)`` is a plain MLP: no CMS.
        cms_variant: how levels are joined, see :class:`hope_kernels.CMS`.
        tie_embeddings: whether logits are products with the token embeddings, or with weights of their own.
        norm_eps: of the RMS norms in front of each half of a block, and of the last one.

    Raises:
        ValueError, TypeError: a field is out of range.
    """

    vocab_size: int = 256
    dim: int = 256
    depth: int = 4
    heads: int = 4
    mixer: Mixer = "titans"
    chunk_size: int = 16
    projection_chunk_size: int = 64
    lr_max: float | None = None
    window: int | None = None
    rope_base: float = 10000.0
    levels: tuple[CMSLevel, ...] = (CMSLevel(16), CMSLevel(64), CMSLevel(None))
    cms_variant: Variant = "sequential"
    tie_embeddings: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        for name in ("vocab_size", "dim", "depth", "heads", "chunk_size", "projection_chunk_size", "window"):
            value = getattr(self, name)
            if value is None and name == "window":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"HopeConfig: {name} is {value!r}; want a positive int")
            if value < 1:
                raise ValueError(f"HopeConfig: {name} is {value}; want at least 1")
        if self.dim % self.heads:
            raise ValueError(f"HopeConfig: dim is {self.dim} and heads is {self.heads}; want dim divisible by heads")
        for name, kind in (("mixer", Mixer), ("cms_variant", Variant)):
            if getattr(self, name) not in get_args(kind):
                want = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"HopeConfig: {name} is {getattr(self, name)!r}; want one of {want}")
        if not self.levels or not all(isinstance(level, CMSLevel) for level in self.levels):
            raise TypeError(f"HopeConfig: levels is {self.levels!r}; want CMSLevels, at least one")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; :meth:`from_dict` is the inverse."""
        return dataclasses.asdict(self) | {"levels": [dataclasses.asdict(level) for level in self.levels]}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> HopeConfig:
        """The inverse of :meth:`to_dict`; what is missing takes its default.

        Raises:
            ValueError, TypeError: a name is unknown, or a value out of range.
        """
        _known(values, HopeConfig)
        levels = values.get("levels")
        if levels is None:
            return HopeConfig(**values)
        for level in levels:
            _known(level, CMSLevel)
        return HopeConfig(**{**values, "levels": tuple(CMSLevel(**level) for level in levels)})

    @staticmethod
    def preset(name: str) -> HopeConfig:
        """A named size, see :data:`PRESETS`: ``"1m"`` and ``"20m"`` for bytes, ``"340m"``, ``"760m"`` and ``"1.3b"`` of
        the paper, with a vocabulary of 32,000.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: got {name!r}; want one of {', '.join(map(repr, PRESETS))}")
        return PRESETS[name]


def _known(values: Mapping[str, Any], kind: type) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"{kind.__name__}: got a {type(values).__name__}; want a dictionary of its fields")
    unknown = set(values) - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__}: got unknown names {sorted(unknown)}")


def _paper(dim: int, depth: int, heads: int) -> HopeConfig:
    levels = (CMSLevel(16), CMSLevel(64), CMSLevel(256), CMSLevel(None))
    return HopeConfig(vocab_size=32000, dim=dim, depth=depth, heads=heads, levels=levels)


PRESETS = {
    "1m": HopeConfig(dim=96, depth=4, heads=4),
    "20m": HopeConfig(dim=320, depth=9, heads=5),
    "340m": _paper(1024, 18, 16),
    "760m": _paper(1536, 19, 16),
    "1.3b": _paper(2048, 21, 32),
}
