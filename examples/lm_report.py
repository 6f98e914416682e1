"""What `train_lm.py` tells while it runs: lines and a progress bar, ``metrics.jsonl``, TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Report:
    """Of one run; of several processes only the first one speaks.

    Args:
        folder: of ``metrics.jsonl`` and ``tensorboard/``. A run that goes on behind step ``done`` forgets what was
            written of later steps.
        done, steps: of the run.
        tensorboard: whether to write for it, where it is installed.
        speaks: whether this process does.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self, folder: Path, done: int, steps: int, tensorboard: bool, speaks: bool) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            raise ImportError("progress needs rich: pip install 'hope_kernels[train]'") from None
        self.speaks, self.console, self.writer = speaks, Console(quiet=not speaks, soft_wrap=True), None
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        self.progress = Progress(*columns, console=self.console, disable=not speaks)
        self.task = self.progress.add_task("", total=steps, completed=done)
        self.tokens, self.seconds = 0, 0.0
        if not speaks:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = folder / "metrics.jsonl"
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        # A killed process may have left half a line behind, but only behind the checkpoint. The held-out text is read
        # again at the end of a finished run.
        found = [(line, json.loads(line)) for line in lines if line.endswith("}\n")]
        kept = [
            line for line, told in found if told["step"] <= done and not (told["step"] == steps and "loss" not in told)
        ]
        beside = self.metrics.with_suffix(".writing")
        beside.write_text("".join(kept))
        os.replace(beside, self.metrics)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.say(
                    "TensorBoard is not installed, so nothing is written for it: pip install 'hope_kernels[train]'"
                )
            else:
                self.writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

    def __enter__(self) -> Report:
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def step(self, told: dict[str, float], seconds: float, loudly: bool) -> None:
        """A step's numbers; ``loudly`` as a line too, its speed that of the steps since the last such line."""
        self.tokens, self.seconds = self.tokens + told["tokens"], self.seconds + seconds
        speed = self.tokens / self.seconds
        self.progress.update(self.task, completed=told["step"], description=f"loss {told['loss']:.3f}")
        self._write(told)
        if loudly:
            self.say(
                f"step {told['step']:6d}  loss {told['loss']:.4f}  gradient {told['gradient_norm']:.3f}  "
                f"lr {told['lr']:.2e}  {speed:,.0f} tokens/s"
            )
            self.tokens, self.seconds = 0, 0.0
        if self.writer is not None:
            for name in ("loss", "gradient_norm", "lr"):
                self.writer.add_scalar(f"train/{name}", told[name], told["step"])
            if loudly:
                self.writer.add_scalar("train/tokens_per_second", speed, told["step"])

    def held_out(self, step: int, bits: float) -> None:
        self._write({"step": step, "held_out_bits_per_byte": bits})
        self.say(f"step {step:6d}  held out: {bits:.4f} bits per byte")
        if self.writer is not None:
            self.writer.add_scalar("held_out/bits_per_byte", bits, step)

    def _write(self, values: dict[str, float]) -> None:
        if self.speaks:
            with open(self.metrics, "a") as file:
                file.write(json.dumps(values) + "\n")
