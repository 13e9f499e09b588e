"""The engine seam: what a module under engines/ implements, and the manifest that travels with every engine.

An engine folder holds `engine.json` (an `EngineManifest`) and the engine's own files. Adding an engine is one
module with an object `ENGINE`, one entry in `engines.ENGINES`, and a subclass of the contract tests.
"""

import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from slipstream import digests
from slipstream.contract import Document
from slipstream.engines import ENGINES
from slipstream.errors import DataError, EngineError
from slipstream.spec import Target

MANIFEST = "engine.json"


class Runner(Protocol):
    """A loaded engine. One runner serves one thread."""

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(N, …) inputs in the candidate's dtype to (N, …) float32 outputs; N may vary from call to call."""
        ...


class Engine(Protocol):
    """What differs between OpenVINO, ONNX Runtime and the others."""

    distributions: tuple[str, ...]
    """PyPI distributions whose versions belong to the identity of what it builds."""

    def check(self, target: Target) -> None:
        """Raise EngineError, with what to do, when the target cannot be served on this machine."""
        ...

    def fingerprint(self, target: Target) -> dict[str, str]:
        """Versions, device and hardware facts that must be equal where an engine is built and where it is loaded."""
        ...

    def build(self, candidate: Path, target: Target, folder: Path) -> None:
        """Write the engine's files into `folder`. `candidate` is a candidate folder (frameworks/base.py)."""
        ...

    def load(self, folder: Path, target: Target) -> Runner:
        """Load the files that `build` wrote. The fingerprint has been checked before."""
        ...


class EngineManifest(Document):
    """What `engine.json` says."""

    engine: str
    target: Target
    fingerprint: dict[str, str]
    candidate_sha256: str
    input_shape: tuple[int, ...]
    """Shape of one sample, without the batch dimension; -1 where it varies from batch to batch."""
    input_dtype: str
    output_shape: tuple[int, ...]
    files: dict[str, str]
    """File name → sha256."""
    quantized: bool = False


def engine_for(name: str) -> Engine:
    """The engine that a spec names. Raises EngineError when its libraries are not in this environment."""
    try:
        module = importlib.import_module(ENGINES[name].module)
    except ImportError as error:
        raise EngineError(f"engine {name}: {error}; this environment lacks its libraries") from error
    engine: Engine = module.ENGINE
    return engine


def read_manifest(folder: Path) -> EngineManifest:
    """Read `engine.json`. Raises EngineError."""
    try:
        return EngineManifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise EngineError(f"{folder}: not an engine folder: {error}") from error


def require_batch(batch: npt.NDArray[Any], shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    """Raise DataError unless `batch` is (N, *shape) of `dtype` with N ≥ 1; NumPy would broadcast or cast silently."""
    if batch.shape[1:] != shape or batch.ndim != len(shape) + 1 or batch.shape[0] < 1 or batch.dtype != dtype:
        wanted = "×".join(("N", *map(str, shape)))
        raise DataError(f"the engine takes {wanted} {dtype} with N at least 1, not {batch.shape} {batch.dtype}")


def build_engine(candidate: Path, target: Target, folder: Path) -> EngineManifest:
    """Build a candidate folder for a target into `folder`, with its manifest. Raises EngineError, ModelError."""
    from slipstream.frameworks import base as frameworks

    engine = engine_for(target.engine)
    engine.check(target)
    given = frameworks.read_manifest(candidate)
    folder.mkdir(parents=True)
    engine.build(candidate, target, folder)
    manifest = EngineManifest(
        engine=target.engine,
        target=target,
        fingerprint=engine.fingerprint(target),
        candidate_sha256=digests.folder(candidate),
        input_shape=given.input_shape,
        input_dtype=given.input_dtype,
        output_shape=given.output_shape,
        files={f.relative_to(folder).as_posix(): digests.file(f) for f in sorted(folder.rglob("*")) if f.is_file()},
        quantized=given.quantized,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
    return manifest


def load_engine(folder: Path) -> Runner:
    """Load an engine after its files and its fingerprint have been checked.

    Raises EngineError, naming each fact that differs, when it was built for other hardware or versions, and
    when a file is not the one that was built.
    """
    manifest = read_manifest(folder)
    engine = engine_for(manifest.engine)
    engine.check(manifest.target)
    here = engine.fingerprint(manifest.target)
    differing = [
        f"{k}: built with {v!r}, here {here.get(k)!r}" for k, v in manifest.fingerprint.items() if here.get(k) != v
    ]
    if differing:
        raise EngineError(f"{folder.name}: built for another machine ({'; '.join(differing)}); build it here again")
    for name, sha256 in manifest.files.items():
        if not (folder / name).is_file() or digests.file(folder / name) != sha256:
            raise EngineError(f"{folder / name}: missing, or not the file that was built; fetch the engine again")
    return engine.load(folder, manifest.target)
