"""Everything that needs a GPU, in a command of under ten minutes: build, checks, sanitizer, speed against its targets.

``python benchmarks/gpu_suite.py --out DIR`` runs every stage in a process of its own with a time limit, whatever became
of the ones before, and leaves ``gpu-suite.json``, ``gpu-suite.md``, a log per stage and (where matplotlib is installed)
a picture in DIR; report and table are written anew after every stage. It needs torch and Triton and no network.

``--stage parity bench`` runs some stages, ``--stage tune`` one that is not run unless it is named. Without a GPU it
exits with 2 and has done nothing; ``--dry-run`` then runs each stage's code on the CPU, at tiny sizes, the kernels in
Triton's interpreter: for those who change this file. ``--publish`` runs nothing: it puts the report of DIR, or that
there is none, into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

from benchmarks.gpu import report as reporting  # noqa: E402
from benchmarks.gpu.children import Child, leave, run_children  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
# Seconds each stage may take. Stages of a group run side by side, groups one after the other: checks mostly compile,
# what is timed has the machine to itself.
GROUPS: tuple[dict[str, int], ...] = (
    {"build": 100},
    {"parity": 170, "shapes": 150, "opcheck": 150, "compile": 150, "graph": 150, "sanitizer": 170},
    {"bench": 130},
    {"decode": 80},
    {"scale": 60},
    {"compiled": 100},
    {"factored": 100},
    {"tune": 240},
)
STAGES = [stage for group in GROUPS for stage in group]
OPT_IN = ("tune",)
TOTAL_LIMIT = 570


def run(options: argparse.Namespace, report: dict) -> None:
    """The chosen stages, group by group; the report is written after each."""
    deadline = time.monotonic() + TOTAL_LIMIT

    def finished(stage: str, result: dict) -> None:
        for text in (str(ROOT) + "/", str(options.out) + "/"):
            result["summary"] = result["summary"].replace(text, "")
        found[stage] = result
        report["stages"] = {name: found[name] for name in STAGES if name in found}
        print(
            f"{stage:10} {reporting.verdict(result):8} {result.get('seconds', 0):6.1f} s  {result['summary'][:600]}",
            flush=True,
        )
        write(options, report)

    found: dict[str, dict] = {}
    for group in GROUPS:
        chosen = {stage: limit for stage, limit in group.items() if stage in options.stage}
        starts = [
            partial(lambda left, stage, limit: Child(stage, options, min(left, limit)), stage=stage, limit=limit)
            for stage, limit in chosen.items()
        ]
        done = run_children(starts, at_once=1 if options.dry_run else len(group), deadline=deadline, finished=finished)
        for stage in chosen.keys() - done.keys():
            finished(stage, {"passed": False, "summary": "no time was left"})


def write(options: argparse.Namespace, report: dict) -> None:
    (options.out / "gpu-suite.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "gpu-suite.md").write_text(reporting.markdown(report))


def child(options: argparse.Namespace) -> int:
    """A stage, or a part of one, in this process."""
    from benchmarks.gpu import checks, speed
    from benchmarks.gpu.setting import Setting

    def stop(*_: object) -> None:
        raise SystemExit(1)  # so that the children of this process are ended too

    signal.signal(signal.SIGTERM, stop)
    stages, parts = checks.STAGES | speed.STAGES, checks.PARTS | speed.PARTS
    name, *arguments = options.child.split(":")
    setting = Setting(options.child, options)
    result = stages[name](setting) if options.child in stages else parts[name](setting, *arguments)
    leave(options.out, options.child, result)
    return 0


def publish(options: argparse.Namespace) -> int:
    """The report of ``--out`` copied to the results, whose table is made anew; without any, the table says so."""
    found = options.out / "gpu-suite.json"
    found = found if found.exists() else RESULTS / "gpu-suite.json"
    report = json.loads(found.read_text()) if found.exists() else None
    if report is not None and report["dry_run"]:
        print(f"{found} is of a dry run: it is not published.")
        return 2
    for name in ("gpu-suite.json", "gpu-suite.md", "gpu-suite.png"):
        if found.parent != RESULTS and (found.parent / name).exists():
            shutil.copyfile(found.parent / name, RESULTS / name)
    document = RESULTS / "README.md"
    document.write_text(reporting.in_document(document.read_text(), report))
    print(f"written: {document.relative_to(ROOT)}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    usual = [stage for stage in STAGES if stage not in OPT_IN]
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=usual, help="some stages only")
    parser.add_argument("--out", type=Path, default=Path("gpu_suite_output"), help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny sizes, interpreted kernels")
    parser.add_argument("--publish", action="store_true", help="put the report of --out into benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=float(TOTAL_LIMIT), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.child:
        return child(options)
    if options.publish:
        return publish(options)
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("There is no GPU that torch can use: nothing was run. --dry-run goes through the stages on the CPU.")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    from hope_kernels.bench.machine import stamp

    words = [] if options.stage == usual else ["--stage", *options.stage]
    command = ["python", "benchmarks/gpu_suite.py", *words]
    report = stamp("gpu-suite", command) | {"dry_run": options.dry_run, "stages": {}}
    report["versions"] |= {"triton": triton_version(), "cuda": torch.version.cuda or torch.version.hip}
    run(options, report)
    report["plot"] = reporting.plot(report, options.out / "gpu-suite.png")
    write(options, report)
    return 0 if all(result["passed"] is not False for result in report["stages"].values()) else 1


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


if __name__ == "__main__":
    sys.exit(main())
