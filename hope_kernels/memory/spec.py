"""The vocabulary: which network a memory is and how it is written (``MemorySpec``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

Form = Literal["linear", "mlp", "glu"]
Activation = Literal["gelu_tanh", "gelu", "silu", "relu2"]
Objective = Literal["l2", "dot", "error", "self"]
Rule = Literal["gd", "dgd"]

_WEIGHT_NAMES: dict[str, tuple[str, ...]] = {
    "linear": ("W",),
    "mlp": ("W_in", "W_out"),
    "glu": ("W_gate", "W_up", "W_out"),
}


@dataclass(frozen=True)
class MemorySpec:
    """What a memory computes, what its inner loss is and how a write changes it.

    Row-vector convention: a token is a row ``x [D]``, weights are stored ``[in, out]``.

    Args:
        form: the network ``f_W(x)``, with ``r = 1`` if ``residual`` else ``0``:

            * ``"linear"``: ``r x + x W``, ``W [D, D]`` (``activation`` is ignored);
            * ``"mlp"``: ``r x + act(x W_in) W_out``, ``W_in [D, H]``, ``W_out [H, D]`` (equation 89);
            * ``"glu"``: ``r x + (act(x W_gate) * x W_up) W_out``.
        activation: ``"gelu_tanh"``, ``"gelu"`` (erf), ``"silu"`` or ``"relu2"`` (squared ReLU).
        residual: whether the input is added to the output.
        objective: the inner loss of one token, given by ``delta = d loss / d f(k)``:

            * ``"l2"``: ``1/2 |f(k) - v|^2``, ``delta = f(k) - v``;
            * ``"dot"``: ``-<f(k), v>``, ``delta = -v``;
            * ``"error"``: the caller supplies ``delta = v`` (a task loss's gradient);
            * ``"self"``: the target is the memory's own ``f(v)``, ``delta = f(k) - f(v)`` (equation 84).
        rule: ``"gd"`` (gradient descent, with optional retention and momentum) or ``"dgd"`` (delta gradient
            descent, equations 57 and 88: the exact proximal step of each linear layer; no momentum).

    Raises:
        ValueError: a field is not one of the values above.
        TypeError: ``residual`` is not a bool.
    """

    form: Form = "mlp"
    activation: Activation = "gelu_tanh"
    residual: bool = True
    objective: Objective = "l2"
    rule: Rule = "gd"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("form", get_args(Form)),
            ("activation", get_args(Activation)),
            ("objective", get_args(Objective)),
            ("rule", get_args(Rule)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"MemorySpec: {name} is {value!r}; want one of {', '.join(map(repr, allowed))}")
        if not isinstance(self.residual, bool):
            raise TypeError(f"MemorySpec: residual is {self.residual!r}; want True or False")

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the weights, in the order every function of the package takes them."""
        return _WEIGHT_NAMES[self.form]

    @property
    def weight_count(self) -> int:
        """Number of weights: 1 (linear), 2 (mlp) or 3 (glu)."""
        return len(_WEIGHT_NAMES[self.form])

    def weight_shapes(self, dim: int, hidden: int) -> tuple[tuple[int, int], ...]:
        """``(in, out)`` of each weight for tokens of ``dim`` features; ``hidden`` is ignored by ``linear``."""
        if self.form == "linear":
            return ((dim, dim),)
        if self.form == "mlp":
            return ((dim, hidden), (hidden, dim))
        return ((dim, hidden), (dim, hidden), (hidden, dim))

    @property
    def key(self) -> str:
        """The spec as one string, the form in which the registered operators carry it."""
        residual = "residual" if self.residual else "plain"
        return f"{self.form}/{self.activation}/{residual}/{self.objective}/{self.rule}"

    @staticmethod
    @lru_cache(maxsize=512)
    def from_key(key: str) -> MemorySpec:
        """The inverse of :attr:`key`.

        Raises:
            ValueError: ``key`` is not such a string.
        """
        parts = key.split("/")
        if len(parts) != 5 or parts[2] not in ("residual", "plain"):
            raise ValueError(f"key: got {key!r}; want form/activation/residual or plain/objective/rule")
        form, activation, residual, objective, rule = parts
        return MemorySpec(form, activation, residual == "residual", objective, rule)  # type: ignore[arg-type]
