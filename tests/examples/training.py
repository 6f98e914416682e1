"""What the tests of `examples/train_lm.py` share: its modules, a small text, and short runs of a tiny model."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))  # as for a script that is run there: its modules import each other

import train_lm  # noqa: E402

CONFIG = {
    "dim": 8,
    "depth": 2,
    "heads": 2,
    "mixer": "attention",
    "window": 5,
    "levels": [{"chunk_size": 3}, {"chunk_size": None, "expansion": 2}],
}
# Windows of 8 tokens, documents of up to 5 of them: checkpoints fall inside documents.
USUAL = "--batch 4 --window 8 --span 40 --lr 0.01 --warmup 3 --steps 12 --checkpoint-every 7 --eval-every 6"
USUAL += " --eval-windows 2 --dtype float64 --no-tensorboard"
LENGTHS = (70, 3, 41, 12, 200, 33, 1, 25, 9, 64)


def write_inputs(folder: Path, config: dict = CONFIG) -> None:
    """A folder ``text`` of documents, which repeat themselves a little, and ``config.json``."""
    draw = random.Random(0)
    (folder / "text").mkdir()
    for number, length in enumerate(LENGTHS):
        words = (draw.choice(("memory ", "reads ", "and é ", "writes, ")) for _ in range(length))
        (folder / "text" / f"{number:02d}.txt").write_bytes("".join(words).encode()[:length])
    (folder / "config.json").write_text(json.dumps(config))


def words_of(folder: Path, out: str, more: str = "") -> list[str]:
    """Of a run on :func:`write_inputs`; ``more`` replaces what is usual."""
    return [
        str(folder / "text"),
        str(folder / out),
        "--config",
        str(folder / "config.json"),
        *f"{USUAL} {more}".split(),
    ]


def run(folder: Path, out: str, more: str = "") -> list[dict[str, float]]:
    """A whole run in this process; its metrics."""
    train_lm.main(words_of(folder, out, more))
    return metrics(folder / out)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
