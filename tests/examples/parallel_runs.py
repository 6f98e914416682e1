"""Run by torchrun in `test_train_parallel.py`: the same training shared between processes in each way, one by one.

Each run is stopped behind its first checkpoint and continued from there.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from tests.examples.training import train_lm, words_of


class Stopped(Exception):
    pass


def stopped_at(step: int):
    honest = train_lm.Trainer.step

    def stepping(self):
        if self.step_count == step:
            raise Stopped
        return honest(self)

    return honest, stepping


def main(folder: Path, runs: list[str]) -> None:
    joined = train_lm.join(1)
    for out, more in (run.split(":") for run in runs):
        arguments = train_lm.arguments_of(words_of(folder, out, more))
        layout = dataclasses.replace(joined, chain=arguments.sequence_parallel)
        honest, train_lm.Trainer.step = stopped_at(8)
        try:
            train_lm.train(arguments, layout)
        except Stopped:
            pass
        else:
            raise AssertionError("the run did not stop")
        train_lm.Trainer.step = honest
        train_lm.train(arguments, layout)
    train_lm.leave()
    # Gloo's threads may still release tensors while the interpreter ends, which aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
