"""The engine seam: what a module under engines/ implements, and the manifest of every engine.

An engine folder holds `engine.json` (an `EngineManifest`) and the engine's own files. Adding an engine takes one module
with an object `ENGINE`, one entry in `plugins.ENGINES`, and a subclass of the contract tests.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy.typing as npt
from pydantic import ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from slipstream import digests
from slipstream.contract import Document, Section
from slipstream.contract.arrays import Array
from slipstream.data import tokens
from slipstream.engines import lengths, recorded
from slipstream.engines.compatibility import Relation, differences
from slipstream.errors import DataError, EngineError
from slipstream.onnx.agreement.bounds import repeated
from slipstream.plugins import ENGINES, SERVE
from slipstream.spec import Target

MANIFEST = "engine.json"
LAYERS = "layers.json"
"""Table of an engine's layers, for engines that report them: `columns`, and `data` with a list for each row."""


class Runner(Protocol):
    """A loaded engine. One runner serves one thread.

    Equal batches get equal bits, in every runner of the same engine on the same machine: the contract suite tests it,
    and docs/engines.md gives the evidence for each engine. Another batch size may round differently.
    """

    def run(self, batch: Array) -> Array:
        """Return (N, …) float32 outputs for inputs (N, …) in the candidate's dtype; N may vary from call to call."""
        ...


class Engine(Protocol):
    """Differences between OpenVINO, ONNX Runtime and the others."""

    distributions: tuple[str, ...]
    """PyPI distributions whose versions are part of the identity of what it builds."""

    def check(self, target: Target) -> None:
        """Raise EngineError, saying what to do, if the target cannot be served on this machine."""
        ...

    def fingerprint(self, target: Target) -> dict[str, str]:
        """Return versions, device and hardware facts: recorded when an engine is built, compared when it is loaded."""
        ...

    def relations(self, manifest: "EngineManifest") -> Mapping[str, Relation]:
        """Return how facts of the fingerprint may differ when an engine that was built this way is loaded.

        A fact that is not named must be equal.
        """
        ...

    def build(self, candidate: Path, target: Target, folder: Path) -> dict[str, float] | None:
        """Write the engine's files into `folder`. `candidate` is a candidate folder (frameworks/base.py).

        Return measurements made during the build, if any: numbers by name with unit. They are recorded with the build.
        """
        ...

    def load(self, folder: Path, target: Target) -> Runner:
        """Load the files that `build` wrote. The fingerprint has already been compared."""
        ...


@runtime_checkable
class BuildsAhead(Protocol):
    """Additional methods of an engine that also builds for hardware in other machines."""

    def check_load(self, target: Target) -> None:
        """Raise EngineError if an engine that `check` allows to build here cannot be loaded here."""
        ...


@runtime_checkable
class Caches(Protocol):
    """Additional methods of an engine whose build or load produces something that speeds up the next one."""

    def cache_file(self, target: Target) -> Path | None:
        """Return the file that `build` and `load` read, if it exists, and keep up to date; None if there is none.

        Its name must identify everything that its content depends on: it is shared with every machine that asks for the
        name.
        """
        ...


@runtime_checkable
class UsesGpu(Protocol):
    """Additional methods of an engine that runs on NVIDIA GPUs, which are then monitored during measurements."""

    def gpu(self, target: Target) -> int:
        """Return CUDA's number of the GPU that the target names."""
        ...


class Options(Section):
    """Base of an engine's options: what a target may set under `options`, one field with a docstring for each.

    Values are taken as written: `"2"` is not a number, and `true` is not 1.
    """

    model_config = ConfigDict(strict=True)


OptionsT = TypeVar("OptionsT", bound=Options)


def read_options(target: Target, model: type[OptionsT]) -> OptionsT:
    """Return the target's options as the engine's class of options.

    Raise EngineError with a line for each unknown key and each wrong value, and all options that the engine has.
    """
    try:
        return model.model_validate(target.options)
    except ValidationError as error:
        problems = [f"{target.engine}: {_problem(e)}" for e in error.errors()]
    options = "; ".join(f"`{name}`: {_in_a_line(field.description)}" for name, field in model.model_fields.items())
    raise EngineError("\n".join((*problems, f"{target.engine} has {options or 'no options'}")))


def _in_a_line(text: str | None) -> str:
    return " ".join(str(text).split()).rstrip(".")


def _problem(error: ErrorDetails) -> str:
    where = ".".join(("options", *map(str, error["loc"])))
    if error["type"] == "extra_forbidden":
        return f"{where}: no such option; remove it or check its spelling"
    if error["type"] == "value_error":  # a validator's own message
        return f"{where}: {str(error['msg']).removeprefix('Value error, ')}"
    return f"{where}: {str(error['msg']).replace('Input should be', 'must be')}, not {error['input']!r}"


class EngineManifest(Document):
    """Contents of `engine.json`."""

    engine: str
    target: Target
    fingerprint: dict[str, str]
    candidate_sha256: str
    input_shape: tuple[int, ...]
    """Shape of one sample, without the batch dimension; -1 where it varies between batches."""
    input_dtype: str
    output_shape: tuple[int, ...]
    files: dict[str, str]
    """sha256 by file name."""
    quantized: bool = False
    figures: dict[str, float] = Field(default={})
    """Measurements that the engine made during its build; metrics of the step."""


def engine_for(name: str) -> Engine:
    """Return the engine that a spec names. Raise EngineError if its libraries are not in this environment."""
    try:
        module = importlib.import_module(ENGINES[name].module)
    except ImportError as error:
        raise EngineError(f"engine {name}: {error}; this environment lacks its libraries") from error
    engine: Engine = module.ENGINE
    return engine


def read_manifest(folder: Path) -> EngineManifest:
    """Read `engine.json`. Raise EngineError."""
    try:
        return EngineManifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise EngineError(f"{folder}: not an engine folder: {error}") from error


def require_batch(batch: Array, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    """Raise DataError unless `batch` is (N, *shape) of `dtype` with N ≥ 1; NumPy would broadcast or cast silently.

    -1 in `shape` stands for any size of at least 1.
    """
    fits = batch.ndim == len(shape) + 1 and batch.shape[0] >= 1 and batch.dtype == dtype
    if not fits or any(n != s and (s != -1 or n < 1) for n, s in zip(batch.shape[1:], shape, strict=True)):
        expected = "×".join(("N", *map(str, shape)))
        raise DataError(f"the engine takes {expected} {dtype} with N at least 1, not {batch.shape} {batch.dtype}")


def why_not_loadable(target: Target) -> str | None:
    """Return why an engine that can be built here cannot be loaded here, or None if it can. Raise EngineError."""
    engine = engine_for(target.engine)
    try:
        if isinstance(engine, BuildsAhead):
            engine.check_load(target)
    except EngineError as error:
        return str(error)
    return None


def gpu_of(target: Target) -> int | None:
    """Return CUDA's number of the GPU that the target's engine runs on, or None for other devices."""
    engine = engine_for(target.engine)
    return engine.gpu(target) if isinstance(engine, UsesGpu) else None


def server_environment(folder: Path) -> str:
    """Return the environment of an engine folder's model server. Raise EngineError for an engine that is never
    released."""
    if not (folder / MANIFEST).exists():
        return SERVE  # whose server reports what is wrong with the folder
    engine = read_manifest(folder).engine
    environment = ENGINES[engine].server
    if environment is None:
        raise EngineError(f"engine {engine}: it is measured for comparison with others and not served")
    return environment


def cache_file(target: Target) -> Path | None:
    """Return the file in which the target's engine caches what speeds up the next build or load, if any."""
    engine = engine_for(target.engine)
    return engine.cache_file(target) if isinstance(engine, Caches) else None


def build_engine(candidate: Path, target: Target, folder: Path, tokenizer: str | None = None) -> EngineManifest:
    """Build a candidate folder for a target into `folder`, with its manifest, and a tokenizer's JSON.

    Raise EngineError, ModelError.
    """
    from slipstream.frameworks import base as frameworks

    engine = engine_for(target.engine)
    engine.check(target)
    source = frameworks.read_manifest(candidate)
    lengths.require_varying(target.lengths, source.input_shape, source.input_dtype)
    folder.mkdir(parents=True)
    figures = engine.build(candidate, target, folder)
    if tokenizer is not None:
        (folder / tokens.TOKENIZER).write_text(tokenizer)
    manifest = EngineManifest(
        engine=target.engine,
        target=target,
        fingerprint=engine.fingerprint(target),
        candidate_sha256=digests.folder(candidate),
        input_shape=source.input_shape,
        input_dtype=source.input_dtype,
        output_shape=source.output_shape,
        files={f.relative_to(folder).as_posix(): digests.file(f) for f in sorted(folder.rglob("*")) if f.is_file()},
        quantized=source.quantized,
        figures=figures or {},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
    return manifest


def load_engine(folder: Path) -> Runner:
    """Load an engine after its files and its fingerprint have been checked, with the target's length buckets, if any.

    If the facts differ from those of its build, it must also reproduce its recorded answers. Raise EngineError, naming
    each fact, if its relations forbid loading it here or if its answers differ, and if a file is not the one that was
    built.
    """
    manifest = read_manifest(folder)
    engine = engine_for(manifest.engine)
    engine.check(manifest.target)
    if isinstance(engine, BuildsAhead):
        engine.check_load(manifest.target)
    here = engine.fingerprint(manifest.target)
    if problems := differences(engine.relations(manifest), manifest.fingerprint, here):
        raise EngineError(
            f"{folder.name}: built for another machine ({'; '.join(problems)}); build it here again: "
            "`slipstream rebuild MODEL` does that for a champion"
        )
    for name, sha256 in manifest.files.items():
        if not (folder / name).is_file() or digests.file(folder / name) != sha256:
            raise EngineError(f"{folder / name}: missing, or not the file that was built; fetch the engine again")
    runner = engine.load(folder, manifest.target)
    runner = lengths.Bucketed(runner, manifest.target.lengths) if manifest.target.lengths else runner
    if changes := differences({}, manifest.fingerprint, here):
        bound = repeated(manifest.target.precision, quantized=manifest.quantized)
        recorded.require_repeated(folder, runner, bound, changes)
    return runner


def size_bytes(folder: Path) -> int:
    """Return the size of an engine folder without its recorded answers, which are evidence, not part of the engine."""
    evidence = folder / recorded.FILE
    return digests.folder_size(folder) - (evidence.stat().st_size if evidence.exists() else 0)


def record_answers(folder: Path, runner: Runner, samples: Array) -> None:
    """Record a new engine's answers to the first of the samples (N, …), and add the file to its manifest."""
    path = recorded.record(folder, runner, samples)
    manifest = read_manifest(folder)
    files = manifest.files | {path.name: digests.file(path)}
    (folder / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json(indent=2))
