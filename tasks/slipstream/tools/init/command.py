"""The command `slipstream init`: what it inspects, in which order, and what it writes and prints."""

import re
import tempfile
from pathlib import Path

import typer

from slipstream import spec as specs
from slipstream.contract.ask import Unanswered, ask
from slipstream.digests import folder_size
from slipstream.errors import InputError, ModelError
from slipstream.frameworks.base import WEIGHTS
from slipstream.home import Home, write_atomically
from slipstream.plugins import FRAMEWORKS
from slipstream.spec.fields import function
from slipstream.tools.init import registered
from slipstream.tools.init.compose import Plan, about, data_text, spec_text
from slipstream.tools.init.facts import Facts, Question, Reply
from slipstream.tools.init.machine import this_machine
from slipstream.tools.init.source import NPZ, Source, about_pickled, about_weights, name_of, source_of

ENVIRONMENT = {kind: FRAMEWORKS[kind].environment for kind in ("onnx", "keras")}


def init(home: Home, model: str, out: Path, *, data: str | None, architecture: str | None, force: bool) -> None:
    """Inspect MODEL and this machine, and write a spec and, unless there is data already, a data function.

    `data` is a function or `TRAIN.npz,TEST.npz`; without it, such files next to `out` are used if they exist. Raise
    InputError if an output file already exists, ModelError if the model cannot be used.
    """
    files = _data_files(data, out)
    function_given = data if files is None else None
    for name, value in (("--data", function_given), ("--architecture", architecture)):
        _require_function(name, value)
    beside = _data_file(out)
    has_data = data is not None or files is not None
    _require_absent([out, *([] if has_data else [beside])], force=force)
    plan = _plan(home, source_of(model), out, files or function_given, architecture)
    text = spec_text(plan)
    specs.parse(text, str(out))  # what is written is valid, or nothing is written
    write_atomically(out, text)
    if not has_data:
        write_atomically(beside, data_text(plan, out.stem))
    _tell(home, plan, out, None if has_data else beside)


def _data_file(out: Path) -> Path:
    """Return the path of the data function: next to the spec, under a name that Python can import."""
    return out.with_name(re.sub(r"\W", "_", out.stem) + "_data.py")


def _data_files(data: str | None, out: Path) -> tuple[Path, Path] | None:
    """Return the .npz files that `--data` names, or those where the written data function would look for them.

    Raise InputError if a named one is missing.
    """
    if data is None:
        beside = (out.with_name(f"{out.stem}-train{NPZ}"), out.with_name(f"{out.stem}-test{NPZ}"))
        return beside if all(path.is_file() for path in beside) else None
    if not data.endswith(NPZ):
        return None
    paths = [Path(part.strip()) for part in data.split(",")]
    missing = [str(path) for path in paths if not path.is_file()]
    if len(paths) != 2 or missing:
        why = f"no such file: {', '.join(missing)}" if missing else f"{len(paths)} files instead of two"
        raise InputError(f"--data {data}: {why}; name both splits, TRAIN{NPZ},TEST{NPZ}")
    return paths[0], paths[1]


def _require_function(option: str, value: str | None) -> None:
    try:
        if value is not None:
            function(value)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error


def _require_absent(paths: list[Path], *, force: bool) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        raise InputError(f"{', '.join(there)}: there already; choose another --out, or overwrite it with --force")


def _plan(
    home: Home, source: Source, out: Path, data: str | tuple[Path, Path] | None, architecture: str | None
) -> Plan:
    """Return everything for the two files; `data` is a function, or the files of both splits."""
    samples = str(data[0].resolve()) if isinstance(data, tuple) else data
    registry, file, size = f"models:/{source.name}@source", None, None
    notes: tuple[str, ...] = ()
    if source.kind == "registered":
        with tempfile.TemporaryDirectory() as folder:
            version = registered.download(source.location, Path(folder), architecture)
            facts = _look(home, version.question)
        registry, size, notes, architecture = version.registry, version.size_bytes, version.notes, version.architecture
    elif source.kind in ("function", "pickled"):
        architecture = source.location if source.kind == "function" else architecture
        if architecture is None:
            raise ModelError(about_pickled(Path(source.location)))
        facts = _look(home, Question(kind="function", location=architecture, data=samples))
        notes = (
            f"weights: save them as safetensors, and say `file: {WEIGHTS}` under model; nothing is unpickled. Or log "
            f"that file as a version of {source.name}, and set its alias source",
        )
    elif source.kind == "weights":
        path = Path(source.location)
        if architecture is None:
            raise ModelError(
                f"{path}: holds weights alone; name the function that builds the network:\n  {about_weights(path)}"
            )
        facts = _look(home, Question(kind="function", location=architecture, weights=str(path.resolve()), data=samples))
        file, size = _from_code(home, path.resolve()), path.stat().st_size
    else:
        path = Path(source.location).resolve()
        facts = _look(home, Question(kind=source.kind, location=str(path)))
        file, size = _from_code(home, path), folder_size(path) if path.is_dir() else path.stat().st_size
    return Plan(
        name=name_of(out.stem),
        model=source.location,
        registry=registry,
        facts=facts,
        machine=this_machine(),
        data=data if isinstance(data, str) else f"{_module(home, _data_file(out))}:data",
        data_files=_splits(home, data) if isinstance(data, tuple) else None,
        data_known=data is not None,
        size_bytes=size,
        file=file,
        architecture=architecture,
        notes=notes,
    )


def _look(home: Home, question: Question) -> Facts:
    """Return the framework's facts on the model, from a process in its environment. Raise ModelError."""
    environment = ENVIRONMENT.get(question.kind) or FRAMEWORKS[question.framework].environment
    python = home.require_python(environment, "looking at the model")
    variables = {"SLIPSTREAM_CODE": str(home.code), "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        reply = ask("slipstream.tools.init.inspect", question, Reply, python=python, variables=variables, quiet=False)
    except Unanswered as error:
        raise ModelError(f"{question.location}: looking at it failed: {error}; see above") from error
    if reply.facts is None:
        raise ModelError(str(reply.error))
    return reply.facts


def _from_code(home: Home, path: Path) -> str:
    """Return a path for a spec: relative to the user's code if below it, else absolute."""
    return str(path.relative_to(home.code) if path.is_relative_to(home.code) else path)


def _splits(home: Home, files: tuple[Path, Path]) -> tuple[str, str]:
    train, test = (_from_code(home, path.resolve()) for path in files)
    return train, test


def _module(home: Home, path: Path) -> str:
    """Return the module of a file below the user's code; its bare name if it is elsewhere."""
    path = path.resolve()
    if not path.is_relative_to(home.code):
        return path.stem
    parts = path.relative_to(home.code).with_suffix("").parts
    return ".".join(parts) if all(part.isidentifier() for part in parts) else path.stem


def _tell(home: Home, plan: Plan, out: Path, beside: Path | None) -> None:
    """Print what was found, what was written, what could not be determined, and how to continue."""
    for line in about(plan):
        typer.echo(line)
    for path in filter(None, (out, beside)):
        typer.echo(f"{path}: written")
    typer.echo("Could not be known, and is marked CHECK in the spec:")
    for line in plan.unknown:
        typer.echo(f"  {line}")
    if beside is not None and "." not in plan.data and beside.resolve().parent != home.code:
        typer.echo(
            f"The data function is found only with SLIPSTREAM_CODE={beside.resolve().parent}, set for `slipstream up` "
            "and for every other command; slipstream's own DAGs need not lie there"
        )
    typer.echo(f"Next: slipstream validate {out}, then slipstream run {out} --watch")
