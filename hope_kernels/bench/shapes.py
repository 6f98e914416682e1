"""The named problem sizes, and how many floating point operations each one is counted as."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hope_kernels.memory.spec import MemorySpec

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """One scan to measure: ``batch`` sequences of ``tokens`` tokens, ``heads`` memories each, objective ``l2``.

    Attributes:
        name: as given on the command line.
        purpose: what such a memory is used for.
        batch, tokens, heads, dim, hidden, chunk_size: B, T, N, D, H, C.
        form: ``"linear"``, ``"mlp"`` or ``"glu"``.
    """

    name: str
    purpose: str
    batch: int
    tokens: int
    heads: int
    dim: int
    hidden: int
    chunk_size: int
    form: str = "mlp"

    @property
    def spec(self) -> MemorySpec:
        return MemorySpec(form=self.form)  # type: ignore[arg-type]

    @property
    def sizes(self) -> str:
        """``B2 T1024 N4 D64 H256 C16``."""
        return f"B{self.batch} T{self.tokens} N{self.heads} D{self.dim} H{self.hidden} C{self.chunk_size}" + (
            f" {self.form}" if self.form != "mlp" else ""
        )

    @property
    def head_tokens(self) -> int:
        """Tokens that some memory reads and writes: ``B T N``."""
        return self.batch * self.tokens * self.heads

    def flops(self, mode: str) -> int:
        """Floating point operations of one call by the convention of :func:`products_per_token`."""
        weight_size = self.dim * (self.dim if self.form == "linear" else self.hidden)
        return 2 * weight_size * products_per_token(self.form, mode) * self.head_tokens

    def scaled(self, **sizes: int) -> Shape:
        """The same kind of scan at other sizes (tests, quick runs)."""
        return replace(self, **sizes)


def products_per_token(form: str, mode: str) -> int:
    """Matrix-vector (or outer) products per token and head; each is ``2 in out`` operations, multiply-add = 2.

    With ``n`` weights (1 linear, 2 mlp, 3 glu), of which ``n - 1`` lie before the hidden activation, and the
    objective ``l2`` with ``q != k``:

    * forward: read ``n``, error ``n`` (the key's own pass) ``+ 1`` with a hidden layer (``delta W_out^T``), update
      ``n``. For mlp 7, that is ``14 D H``.
    * backward: two products for each of the forward's, plus what is formed again from the chunk-start state:
      hidden layers of query and key (``n - 1`` each), the key's output (1) and ``delta W_out^T``. For mlp 18, that
      is ``36 D H``.

    Rebuilding chunk states from checkpoints, gate scalars, activations and the triangular solve of ``dgd`` are not
    counted.
    """
    weights = {"linear": 1, "mlp": 2, "glu": 3}[form]
    through_hidden = 1 if weights > 1 else 0
    forward = weights + (weights + through_hidden) + weights
    if mode == "forward":
        return forward
    if mode == "forward+backward":
        recomputed = 2 * (weights - 1) + 1 + through_hidden
        return forward + 2 * forward + recomputed
    raise ValueError(f"mode is {mode!r}; want one of {', '.join(map(repr, MODES))}")


def rebuilt_products_per_token(form: str) -> int:
    """Further products per token and head of a backward that rebuilds every chunk state from checkpoints, errors too.

    For mlp 5, that is ``10 D H``.
    """
    weights = {"linear": 1, "mlp": 2, "glu": 3}[form]
    through_hidden = 1 if weights > 1 else 0
    return weights + (weights + through_hidden)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("S1", "per-token level", 2, 256, 4, 64, 256, 1),
        Shape("S16", "fast level, Titans memory", 2, 1024, 4, 64, 256, 16),
        Shape("S64", "middle level", 2, 1024, 4, 64, 256, 64),
        Shape("L", "large memory, slow level", 1, 2048, 1, 768, 3072, 512),
        Shape("L-glu", "large gated memory, slow level", 1, 2048, 1, 768, 3072, 512, form="glu"),
        Shape("G16", "GPU, fast level", 8, 8192, 16, 64, 256, 16),
        Shape("G64", "GPU, middle level", 8, 8192, 16, 64, 256, 64),
        Shape("GL", "GPU, slow level", 8, 16384, 1, 1024, 4096, 2048),
    )
}
CPU_SHAPES = ("S1", "S16", "S64", "L", "L-glu")
GPU_SHAPES = ("G16", "G64", "GL")


def get_shape(name: str) -> Shape:
    """The shape of that name (upper or lower case).

    Raises:
        ValueError: there is none.
    """
    for known, shape in SHAPES.items():
        if known.lower() == name.lower():
            return shape
    raise ValueError(f"shape is {name!r}; want one of {', '.join(SHAPES)}")
