"""The commands and their options, each handed to the module that carries it out."""

from __future__ import annotations

import typer

from hope_kernels.cli import bench, demo, profile, scaling, verify
from hope_kernels.cli.output import console, write_json

app = typer.Typer(
    help="Memories read and written in chunks: check them, measure them, see them learn.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("scaling")(scaling.scaling)
app.command("profile")(profile.profile)
app.command("demo")(demo.demo)


@app.command("doctor")
def doctor(json_output: bool = typer.Option(False, "--json", help="Print the report as JSON.")) -> None:
    """What this machine has, which backends run here, and how to get those that do not."""
    from hope_kernels.cli import doctor as machine_report

    report = machine_report.collect()
    if json_output:
        write_json(report, None)
    else:
        machine_report.render(report, console)
