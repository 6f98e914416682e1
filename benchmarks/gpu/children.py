"""Processes of their own for everything the suite runs: what hangs, crashes or corrupts a GPU's context ends with them.

A child is ``gpu_suite.py --child NAME``; it leaves its result, or as much of it as there is so far, as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

SUITE = Path(__file__).resolve().parents[1] / "gpu_suite.py"
GRACE = 5.0  # seconds a child has to stop its own children


def result_file(out: Path, name: str) -> Path:
    return out / "parts" / (name.replace(":", "-") + ".json")


def log_file(out: Path, name: str) -> Path:
    return out / "logs" / (name.replace(":", "-") + ".log")


def leave(out: Path, name: str, result: dict) -> None:
    """What a child has so far, in one step: it stays if the child is stopped."""
    path = result_file(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(path)


class Child:
    """One of them, running.

    Args:
        name: of the child, as ``--child`` takes it.
        limit: seconds it may take. It is told, so that it can end in time with what it has.
        prefix: a command to run it under.
        environment: beside the present one.
    """

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        limit: float,
        *,
        prefix: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        label: str | None = None,
    ) -> None:
        self.name, self.out, self.limit = label or name, options.out, limit
        self.log = log_file(self.out, self.name)
        self._left = result_file(self.out, name)
        self._left.unlink(missing_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        settings = dict(os.environ) | (environment or {})
        if options.dry_run:
            settings |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            settings.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(SUITE), "--child", name, "--out", str(self.out), "--limit", f"{limit:.1f}"]
        self.start = time.monotonic()
        with self.log.open("w") as output:
            self._process = subprocess.Popen(
                [*prefix, *command, *(["--dry-run"] * options.dry_run)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=settings,
                start_new_session=True,
            )
        self._stopped = False

    def poll(self) -> bool:
        """Whether it has ended; one that is over its limit is stopped."""
        if self._process.poll() is not None:
            return True
        if time.monotonic() - self.start > self.limit:
            self.stop()
            return True
        return False

    def stop(self) -> None:
        """End it and its children."""
        if self._process.poll() is not None:
            return
        self._stopped = True
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def result(self) -> dict:
        """What it left, and how it ended."""
        result = json.loads(self._left.read_text()) if self._left.exists() else {"passed": False, "summary": ""}
        code = self._process.returncode
        said = result.get("summary", "")
        if self._stopped:
            result |= {"passed": False, "summary": f"stopped after {self.limit:.0f} s. {said}"}
        elif code != 0:
            result |= {"passed": False, "summary": f"exit {code}: {self.last_words()}. {said}"}
        return result | {"exit": code, "seconds": round(time.monotonic() - self.start, 1)}

    def last_words(self) -> str:
        """The last line of its log that is no blank."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else "no output"


def run_children(
    starts: Iterable[Callable[[float], Child]],
    *,
    at_once: int,
    deadline: float,
    finished: Callable[[str, dict], None] = lambda name, result: None,
) -> dict[str, dict]:
    """Run children, ``at_once`` of them side by side, until all have ended or ``deadline`` (monotonic) has come.

    Args:
        starts: functions that start a child, given the seconds that are left.
        finished: told the name and the result of each as it ends.

    Returns:
        The results by name; a child that was not reached has none.
    """
    waiting = list(starts)[::-1]
    running: list[Child] = []
    results: dict[str, dict] = {}
    try:
        while waiting or running:
            left = deadline - time.monotonic()
            if left <= 1:
                waiting.clear()
            while waiting and len(running) < at_once:
                running.append(waiting.pop()(left))
            for child in [child for child in running if child.poll()]:
                running.remove(child)
                results[child.name] = child.result()
                finished(child.name, results[child.name])
            time.sleep(0.05)
    finally:
        for child in running:
            child.stop()
    return results
