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

SIZES = {"dim": 8, "depth": 2, "heads": 2, "levels": [{"chunk_size": 3}, {"chunk_size": None, "expansion": 2}]}
CONFIGS = {
    "titans": {**SIZES, "mixer": "titans", "chunk_size": 3, "projection_chunk_size": 5},
    "attention": {**SIZES, "mixer": "attention", "window": 5},
}
# Windows of 8 tokens, documents of up to 5 of them: checkpoints fall inside documents.
USUAL = "--batch 4 --window 8 --span 40 --lr 0.01 --warmup 3 --steps 12 --checkpoint-every 7 --eval-every 6"
USUAL += " --eval-windows 2 --dtype float64 --no-tensorboard"
LENGTHS = (70, 3, 41, 12, 200, 33, 1, 25, 9, 64)


def write_inputs(folder: Path) -> None:
    """A folder ``text`` of documents, which repeat themselves a little, ``titans.json`` and ``attention.json``."""
    draw = random.Random(0)
    (folder / "text").mkdir()
    for number, length in enumerate(LENGTHS):
        words = (draw.choice(("memory ", "reads ", "and é ", "writes, ")) for _ in range(length))
        (folder / "text" / f"{number:02d}.txt").write_bytes("".join(words).encode()[:length])
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


def words_of(folder: Path, out: str, more: str = "") -> list[str]:
    """Of a run on :func:`write_inputs`; ``more`` replaces what is usual, ``IN`` in it standing for the folder."""
    usual = f"IN/text IN/{out} --config IN/titans.json {USUAL}"
    return [word.replace("IN", str(folder)) for word in f"{usual} {more}".split()]


def run(folder: Path, out: str, more: str = "") -> list[dict[str, float]]:
    """A whole run in this process; its metrics."""
    train_lm.main(words_of(folder, out, more))
    return metrics(folder / out)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
