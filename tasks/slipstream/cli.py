"""The command `slipstream`. Results go to stdout, everything else to stderr."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from slipstream import log_lines
from slipstream.errors import InputError, SlipstreamError, of_system

if TYPE_CHECKING:  # imports of a command's dependencies are inside it
    from slipstream.home import Home
    from slipstream.orchestrate.watch.start import Started

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
    """Check a spec; exit with 0, or with 2 and every error."""
    from slipstream import spec as specs
    from slipstream.reports.wording import count

    loaded = specs.load(spec)
    recipes, targets = count(len(loaded.recipes), "recipe"), count(len(loaded.targets), "target")
    typer.echo(f"{spec}: valid; {recipes} × {targets}")


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="New folder; its name becomes the spec's.")],
) -> None:
    """Write a project to start from: spec, network, data, Makefile, README, CI file."""
    from slipstream.tools import new as command

    for path in command.new(folder):
        typer.echo(path)


@app.command()
def setup(
    specs: Annotated[
        list[Path], typer.Argument(help="Spec files whose environments are installed.", metavar="SPEC...")
    ],
) -> None:
    """Install the virtual environments that specs need, into .envs; a checkout has `make setup` for that."""
    from slipstream.home import Home
    from slipstream.spec import load
    from slipstream.tools import setup as command

    command.make(Home.from_environment(), command.environments([load(spec) for spec in specs]))


@app.command()
def init(
    model: Annotated[
        str,
        typer.Argument(
            help="models:/NAME@ALIAS or /VERSION, an ONNX file, a SavedModel's folder, a .keras or .h5 file, PyTorch "
            "weights as .safetensors with --architecture, or module:function that builds the network."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Write the spec here, and a data function next to it.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Your data: a function as module:function, or two files with arrays `inputs` and `labels`, "
            "TRAIN.npz,TEST.npz. Files OUT-train.npz and OUT-test.npz next to OUT are found without it."
        ),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="The function that builds the network into which weights are loaded, as module:function."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Inspect a model and this machine, and write a spec to start from, which marks what it could not determine."""
    from slipstream.home import Home
    from slipstream.tools.init import command

    command.init(Home.from_environment(), model, out, data=data, architecture=architecture, force=force)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference in docs/ instead.")] = False,
    settings: Annotated[bool, typer.Option("--settings", help="Of the installation's settings instead.")] = False,
) -> None:
    """Print the JSON Schema of the spec."""
    from slipstream.plan.settings import Settings
    from slipstream.spec import json_schema
    from slipstream.tools import docs as reference

    if markdown:
        typer.echo(reference.settings_markdown() if settings else reference.markdown(), nl=False)
    else:
        typer.echo(json.dumps(Settings.model_json_schema() if settings else json_schema(), indent=2))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Run key, MLflow run id, or name of a spec (its latest run).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what became of a run: every engine with its evidence, the release, and where to look."""
    from slipstream.reports.show import show

    show(run, as_json=as_json)


@app.command()
def run(
    spec: SpecFile,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show the run live until it ends.")] = False,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A choice of the trigger form: max_drop, recipes (a,b or a JSON list), stop_after, …",
        ),
    ] = None,
) -> None:
    """Publish a spec and start a run of it in Airflow; prints the run's id."""
    from slipstream.home import Home
    from slipstream.orchestrate.watch import start

    home = Home.from_environment()
    started = start.start(home, spec, start.choices(param or []))
    typer.echo(started.run_id)
    if watch:
        _follow(home, started)


@app.command()
def watch(
    name: Annotated[str, typer.Argument(help="Name of a published spec.")],
    run_id: Annotated[str, typer.Argument(help="Id of a run, as `slipstream run` printed it.")],
) -> None:
    """Show a run live until it ends; ends with the run's exit code."""
    from slipstream.home import Home
    from slipstream.orchestrate.watch.start import Started
    from slipstream.plan import catalog

    home = Home.from_environment()
    _follow(home, Started(catalog.read(home, name), catalog.dag_id(name), run_id))


def _follow(home: "Home", started: "Started") -> None:
    from rich.console import Console

    from slipstream.orchestrate.watch.follow import follow

    if code := follow(home, started, Console()):
        raise typer.Exit(code)


@app.command()
def bench(
    specs: Annotated[list[Path], typer.Argument(help="Spec files; those without a finished run are left out.")],
    out: Annotated[Path | None, typer.Option(help="Page to write; its figures are in a folder next to it.")] = None,
    run: Annotated[str, typer.Option(help="Run key; `latest` is the newest with validated engines.")] = "latest",
) -> None:
    """Measure all engines of a run and the eager baseline in one interleaved run; print the table."""
    from slipstream.tools.bench import command

    typer.echo(command.measure(specs, out, run))


@app.command()
def step(
    name: Annotated[str, typer.Argument(help="Step, such as quantize.")],
    *,
    spec: Annotated[str, typer.Option(help="Spec: a path, an s3:// URI, or the document itself as JSON.")],
    outputs: Annotated[str, typer.Option(help="Where the OUT document is written: a path or an s3:// URI.")],
    inputs: Annotated[str | None, typer.Option(help="IN document (JSON): a path or an s3:// URI.")] = None,
    run_key: Annotated[str, typer.Option(help="Instead of an IN document: name of the pipeline run.")] = "",
    cell: Annotated[str, typer.Option(help="Recipe or recipe@target, with --run-key.")] = "",
    upstream: Annotated[list[str] | None, typer.Option(help="OUT document of an earlier step; repeatable.")] = None,
) -> None:
    """Run one step: the same command in a virtual environment, a container or a pod."""
    from slipstream import spec as specs
    from slipstream import storage
    from slipstream.plugins import STEPS
    from slipstream.runner.run import run_step, wrong_environment
    from slipstream.store import documents

    if name not in STEPS:
        raise InputError(f"unknown step {name!r}; known: {', '.join(STEPS)}")
    if (inputs is None) == (not run_key):
        raise InputError("a step is given either --inputs or --run-key, with --cell and --upstream as it needs them")
    chosen = specs.load(spec)
    step_input = documents.read(inputs) if inputs else documents.gather(name, chosen, run_key, cell, upstream or [])
    for variable, value in STEPS[name].variables.items():
        os.environ.setdefault(variable, value)
    try:
        output = run_step(name, chosen, step_input)
    except ImportError as error:
        if (wrong := wrong_environment(name, chosen, step_input.cell, error)) is not None:
            raise wrong from error
        raise
    if output is not None:
        storage.write_text(outputs, output.model_dump_json(indent=2))


@app.command(name="compile")
def compile_(
    spec: SpecFile,
    kfp: Annotated[Path, typer.Option(help="Write a Kubeflow Pipelines v2 package (YAML) here.")],
    stop_after: Annotated[str, typer.Option(help="Leave the stages after this one out.")] = "none",
) -> None:
    """Write the flow of a spec for Kubeflow Pipelines: the same steps in the same images."""
    import subprocess

    from slipstream.home import Home

    if not kfp.absolute().parent.is_dir():
        raise InputError(f"--kfp {kfp}: there is no folder {kfp.parent}")
    python = Home.from_environment().require_python("kubeflow", "`slipstream compile`")
    command = [str(python), "-m", "slipstream.orchestrate.kubeflow", str(spec), str(kfp), "--stop-after", stop_after]
    if code := subprocess.run(command, check=False).returncode:
        raise typer.Exit(code)
    typer.echo(f"{kfp}: written; upload it in the Kubeflow Pipelines UI, or run it with the kfp SDK")


Model = Annotated[str, typer.Argument(help="Registered model, such as fashion-resnet.")]


@app.command()
def rollback(
    model: Model,
    leave: Annotated[
        str | None,
        typer.Option("--from", help="Version to leave; without it the champion, once: asked again, nothing changes."),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
) -> None:
    """Put the last good release back: the traffic first, then the aliases; what is left is rejected by its digest."""
    from slipstream.home import Home
    from slipstream.steps.rollback import by_hand

    result = by_hand(model, Home.from_environment(), leave=leave, reason=reason)
    champion = result.champion
    if result.done is None:
        typer.echo(f"{model}: version {champion} serves again, instead of version {result.left}")
        return
    typer.echo(f"{model}: nothing to do: {result.done}, and version {champion} serves")
    if leave is None:
        typer.echo(f"To leave version {champion} as well: slipstream rollback {model} --from {champion}")


@app.command()
def rejections(model: Model, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the engines of a model that tests, rollouts or persons rejected, lifted rejections included."""
    from slipstream.home import Home
    from slipstream.release import rejections as records
    from slipstream.reports.find import connect
    from slipstream.store.registry import Registry

    entries = records.all_of(Registry(model, connect(Home.from_environment())))
    if as_json:
        typer.echo(json.dumps([r.model_dump(mode="json") for r in entries], indent=2))
        return
    for rejection in entries:
        typer.echo(f"{'rejected' if rejection.lifted is None else 'allowed '}  {rejection.sentence()}")
    if not entries:
        typer.echo(f"{model}: nothing was rejected")


@app.command()
def allow(
    model: Model,
    engine: Annotated[str, typer.Argument(help="Version, or at least 8 digits of the engine's sha256.")],
    reason: Annotated[str, typer.Option(help="Why it may be tried again; kept with the rejection.")],
    by: Annotated[str, typer.Option(help="Who allows it; by default this terminal's user.", show_default=False)] = "",
) -> None:
    """Lift a rejection, so that the next run may release the engine."""
    import getpass

    from slipstream.home import Home
    from slipstream.release import rejections as records
    from slipstream.reports.find import connect
    from slipstream.store.registry import Registry

    registry = Registry(model, connect(Home.from_environment()))
    typer.echo(f"{model}: {records.allow(registry, engine, by or getpass.getuser(), reason).sentence()}")


@app.command()
def rebuild(
    model: Annotated[str, typer.Argument(help="Registered model, such as fashion-resnet.")],
    alias: Annotated[
        Literal["champion", "previous"], typer.Option(help="The release that cannot be loaded here.")
    ] = "champion",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")] = False,
) -> None:
    """Build a release that cannot be loaded here again, from its candidate, and put it in place without an outage."""
    from slipstream.home import Home
    from slipstream.release import rebuild as command

    typer.echo(command.by_hand(model, Home.from_environment(), alias, dry_run=dry_run))


@app.command()
def sign(
    model: Annotated[str, typer.Argument(help="Registered model, such as fashion-resnet.")],
    version: Annotated[str, typer.Argument(help="Its version, such as 3.")],
) -> None:
    """Vouch for a registered engine whose signature does not verify: after a new key, or from before signatures."""
    from slipstream.home import Home
    from slipstream.reports.find import connect
    from slipstream.store.registry import Registry

    artifact = Registry(model, connect(Home.from_environment())).sign(version)
    typer.echo(f"{model}: version {version} is signed: engine sha256 {artifact.sha256}")


@app.command()
def up(
    new_ports: Annotated[bool, typer.Option(help="Where a remembered port is taken, choose another one.")] = False,
    profile: Annotated[
        Literal["local", "server"] | None,
        typer.Option(help="SQLite and files, or PostgreSQL and S3; remembered. [default: local]", show_default=False),
    ] = None,
) -> None:
    """Start the embedded platform (Airflow, MLflow, Envoy, model servers); harmless when it runs."""
    from slipstream.home import Home
    from slipstream.platform import console

    console.up(Home.from_environment(), new_ports=new_ports, profile=profile)


@app.command("env")
def environment() -> None:
    """Print what a shell needs to reach MLflow and the store, secrets included: eval "$(slipstream env)"."""
    from slipstream.home import Home
    from slipstream.platform import console

    console.environment(Home.from_environment())


@app.command()
def down() -> None:
    """Stop the embedded platform; data, ports and releases are kept for the next `up`."""
    from slipstream.home import Home
    from slipstream.platform import console

    console.down(Home.from_environment())


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show every service; exits 0 only when all are healthy."""
    from slipstream.home import Home
    from slipstream.platform import console

    if not console.status(Home.from_environment(), as_json=as_json):
        raise typer.Exit(1)


@app.command()
def logs(
    service: Annotated[str | None, typer.Argument(help="Service as `status` names it; all when left out.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing what is added.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines of each log to start with.")] = 50,
) -> None:
    """Print the logs of the platform's services."""
    from slipstream.home import Home
    from slipstream.platform import console

    console.logs(Home.from_environment(), service, lines, follow)


def main() -> None:
    """Run the command line, and turn an error raised on purpose into its message and its exit code."""
    log_lines.configure()
    try:
        app()
    except SlipstreamError as error:
        _exit_with(error)
    except OSError as error:
        _exit_with(of_system(error))
    except RecursionError as error:
        _exit_with(InputError(f"something that was given is nested too deeply: {error}"))


def _exit_with(error: SlipstreamError) -> NoReturn:
    typer.secho(f"{error.headline}: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(str(error), err=True)
    raise SystemExit(error.exit_code) from error
