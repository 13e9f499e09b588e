"""The command `slipstream`. Results go to stdout, everything else to stderr."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from slipstream.errors import SlipstreamError

EXIT_CODES = "Exit codes: 0 done, 1 failed (a retry may help), 2 bad input (a retry will not help), 3 a gate said no."

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog=EXIT_CODES,
    help="Makes trained models fast and puts them into production safely, again and again.",
)

SpecFile = Annotated[Path, typer.Argument(help="Spec file (YAML).", metavar="SPEC")]


@app.command()
def validate(spec: SpecFile) -> None:
    """Check a spec; exits 0, or 2 with every error."""
    from slipstream import spec as specs

    loaded = specs.load(spec)
    typer.echo(f"{spec}: valid; {len(loaded.recipes)} recipes × {len(loaded.targets)} targets")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the spec."""
    from slipstream.spec import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def step(
    name: Annotated[str, typer.Argument(help="Step, such as quantize.")],
    spec: Annotated[Path, typer.Option(help="Spec file.")],
    inputs: Annotated[Path, typer.Option(help="IN document (JSON).")],
    outputs: Annotated[Path, typer.Option(help="Where the OUT document is written.")],
) -> None:
    """Run one step: the same command in a virtual environment, a container or a pod."""
    from slipstream import spec as specs
    from slipstream.contract import StepInput
    from slipstream.errors import InputError
    from slipstream.home import write_atomically
    from slipstream.steps import STEPS
    from slipstream.steps.base import run_step

    if name not in STEPS:
        raise InputError(f"unknown step {name!r}; known: {', '.join(STEPS)}")
    try:
        given = StepInput.model_validate_json(inputs.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{inputs}: not an IN document: {error}") from error
    output = run_step(name, specs.load(spec), given)
    write_atomically(outputs, output.model_dump_json(indent=2))


def main() -> None:
    """Run the command line, and turn an error raised on purpose into its message and its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("httpx", "mlflow", "nncf", "urllib3", "botocore", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except SlipstreamError as error:
        typer.secho(f"{error.headline}: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(str(error), err=True)
        raise SystemExit(error.exit_code) from error
