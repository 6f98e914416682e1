"""Draws the pictures of the documentation: `python docs/pictures/draw.py` writes the SVG files beside it.

What a CMS does when is not drawn by hand: a small layer reads tokens one by one, and the picture shows at which of
them the weights of each level changed.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from hope_kernels import CMS, CMSLevel

HERE = Path(__file__).parent
TOKENS = 32
WRITTEN, KEPT, PLAIN = "#1f6f8b", "#d7e5ea", "#eeeeee"


def writes(cms: CMS) -> list[list[bool] | None]:
    """For each level, whether its weights changed at each of the tokens; None where there are none to change."""
    torch.manual_seed(0)
    state = cms.init_state(1)
    changed: list[list[bool] | None] = [None if held is None else [] for held in state.levels]
    with torch.no_grad():
        for _ in range(TOKENS):
            before = [held and [w.clone() for w in held.weights] for held in state.levels]
            _, state = cms.stream(torch.randn(1, 1, cms.dim), state)
            for found, old, held in zip(changed, before, state.levels, strict=True):
                if found is not None:
                    pairs = zip(old, held.weights, strict=True)
                    found.append(not all(torch.equal(a, b) for a, b in pairs))
    return changed


def cms_over_time() -> None:
    """Which level is written at which token."""
    levels = [CMSLevel(1), CMSLevel(4), CMSLevel(16), CMSLevel(None)]
    found = writes(CMS(8, levels, heads=2))
    figure, axes = plt.subplots(figsize=(9, 2.4), layout="constrained")
    for row, changed in enumerate(found):
        for token in range(TOKENS):
            color = PLAIN if changed is None else WRITTEN if changed[token] else KEPT
            axes.add_patch(plt.Rectangle((token, -row), 0.9, 0.8, color=color, linewidth=0))
    axes.set_xlim(-0.3, TOKENS)
    axes.set_ylim(-len(levels) + 0.9, 1)
    axes.set_yticks(
        [0.4 - row for row in range(len(levels))],
        ["never written" if level.chunk_size is None else f"every {level.chunk_size}" for level in levels],
    )
    axes.set_xlabel("token: dark where the level's weights change, light where its token is kept; all are read by all")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _save(figure, "cms_over_time")


def _box(axes: Axes, x: float, y: float, text: str, color: str = KEPT, width: float = 2.6) -> None:
    axes.add_patch(
        FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, "round,pad=0.05", facecolor=color, edgecolor="#444")
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="#444", connectionstyle=style)
    )


def hope_block() -> None:
    """A Hope block: what feeds what, and what is written how often."""
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for x, text, color in (
        (0, "x", "white"),
        (3.2, "norm, self-modifying Titans", KEPT),
        (6.4, "+", "white"),
        (9.6, "norm, CMS", KEPT),
        (12.8, "+", "white"),
    ):
        _box(axes, x, 0, text, color, 0.7 if len(text) == 1 else 4.2)
    for start, end in (((0.45, 0), (1.0, 0)), ((5.4, 0), (5.95, 0)), ((6.85, 0), (7.4, 0)), ((11.8, 0), (12.35, 0))):
        _arrow(axes, start, end)
    _arrow(axes, (0, 0.4), (6.4, 0.4), -0.25)
    _arrow(axes, (6.4, 0.4), (12.8, 0.4), -0.25)
    titans = ("conv, q: fixed", "M_k, M_v: keys, targets", "M_η, M_α: step, decay", "M_mem: read by q")
    for row, text in enumerate(titans):
        _box(axes, 3.2, -1.2 - 0.85 * row, text, "white" if row == 0 else KEPT, 4.2)
    for row, text in enumerate(("level, every C tokens", "level, every 4 C", "..", "plain MLP: never")):
        _box(axes, 9.6, -1.2 - 0.85 * row, text, PLAIN if row == 3 else KEPT, 4.2)
    for x in (3.2, 9.6):
        _arrow(axes, (x, -0.4), (x, -0.85))
    axes.set_xlim(-0.8, 13.6)
    axes.set_ylim(-4.3, 1.8)
    axes.set_aspect("equal")
    axes.axis("off")
    _save(figure, "hope_block")


def _save(figure: plt.Figure, name: str) -> None:
    # Neither a date nor random names: the same code draws the same file.
    with plt.rc_context({"svg.hashsalt": "hope_kernels", "svg.fonttype": "none"}):
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    cms_over_time()
    hope_block()
