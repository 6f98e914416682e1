"""What a Hope model is made of: sizes, token mixer, CMS levels; presets up to the paper's sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hope_kernels.layers import CMSLevel
from hope_kernels.layers.checks import check_bool, check_bound, check_int, check_momentum, check_width
from hope_kernels.layers.cms import checked_levels
from hope_kernels.layers.projections import checked_adaptive
from hope_kernels.memory.spec import Rule

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
        rule: of the writes of ``"titans"``, ``"dgd"`` or ``"gd"``, plain gradient descent.
        retention: whether the mixer's memories forget.
        momentum: whether the writes of the mixer's main memory have a momentum; None takes the layer's own default:
            ``"neural_memory"`` has one, ``"titans"`` has none, nor can have with ``"dgd"``.
        adaptive: the projections of ``"titans"`` that are memories, some of ``"k"``, ``"v"``, ``"lr"``,
            ``"retention"``; the others are linear maps. None for all.
        lr_max: upper bound of an inner learning rate of the mixer; None takes the layer's own default.
        value_norm_max: longer targets of ``"titans"`` are shortened to this norm; None leaves them as the equations
            have them, and training may then move the layer to where it diverges.
        weight_norm_max: bound of the spectral norm that the memories of ``"titans"`` start with in their last layer;
            None leaves it to training, which may raise it to where reading on diverges, see docs/titans.md.
        window: tokens that attention looks back on, itself counted; None is all of them, and a cache that grows.
        rope_base: of attention's rotary positions.
        levels: the CMS, fastest level first. ``(CMSLevel(None),)``, :data:`PLAIN_MLP`, is no CMS: a plain MLP without
            the norm and the residual that such a level has in a CMS, since the block has both.
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
    rule: Rule = "dgd"
    retention: bool = True
    momentum: bool | None = None
    adaptive: tuple[str, ...] | None = None
    lr_max: float | None = None
    value_norm_max: float | None = 1.0
    weight_norm_max: float | None = 1.5
    window: int | None = None
    rope_base: float = 10000.0
    levels: tuple[CMSLevel, ...] = (CMSLevel(16), CMSLevel(64), CMSLevel(None))
    cms_variant: Variant = "sequential"
    tie_embeddings: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("vocab_size", "depth", "chunk_size", "projection_chunk_size"):
            check_int(owner, name, getattr(self, name))
        check_int(owner, "window", self.window, optional=True)
        check_width(owner, self.dim, self.heads)
        for name in ("norm_eps", "rope_base"):
            if getattr(self, name) is None:
                raise TypeError(f"HopeConfig: {name} is None; want a positive float")
            check_bound(owner, name, getattr(self, name))
        check_bound(owner, "lr_max", self.lr_max)
        check_bound(owner, "value_norm_max", self.value_norm_max)
        check_bound(owner, "weight_norm_max", self.weight_norm_max)
        check_bool(owner, "tie_embeddings", self.tie_embeddings)
        check_bool(owner, "retention", self.retention)
        if self.momentum is not None:
            check_bool(owner, "momentum", self.momentum)
        for name, kind in (("mixer", Mixer), ("cms_variant", Variant), ("rule", Rule)):
            if getattr(self, name) not in get_args(kind):
                want = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"HopeConfig: {name} is {getattr(self, name)!r}; want one of {want}")
        if self.mixer == "attention" and self.dim // self.heads % 2:
            raise ValueError(f"HopeConfig: dim is {self.dim} and heads is {self.heads}; attention wants an even width")
        if self.mixer == "titans":
            check_momentum(owner, self.rule, self.momentum)
        if self.adaptive is not None:
            object.__setattr__(self, "adaptive", checked_adaptive(owner, self.adaptive, self.retention))
        object.__setattr__(self, "levels", checked_levels(self.levels, owner))

    @property
    def has_cms(self) -> bool:
        """Whether any level is ever written; else a block has a plain MLP."""
        return any(level.chunk_size is not None for level in self.levels)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; :meth:`from_dict` is the inverse."""
        adaptive = None if self.adaptive is None else list(self.adaptive)
        levels = [dataclasses.asdict(level) for level in self.levels]
        return dataclasses.asdict(self) | {"adaptive": adaptive, "levels": levels}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> HopeConfig:
        """The inverse of :meth:`to_dict`; what is missing takes its default.

        Raises:
            ValueError, TypeError: a name is unknown, or a value out of range.
        """
        _known(values, HopeConfig)
        levels = values.get("levels", ())
        if not isinstance(levels, Sequence) or isinstance(levels, str):
            raise TypeError(f"HopeConfig: levels is {levels!r}; want a list of dictionaries of CMSLevel's fields")
        for level in levels:
            _known(level, CMSLevel)
            if "chunk_size" not in level:
                raise ValueError(
                    f"CMSLevel: got {dict(level)}; want a chunk_size, null for a level that is never written"
                )
        if "levels" not in values:
            return HopeConfig(**values)
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
