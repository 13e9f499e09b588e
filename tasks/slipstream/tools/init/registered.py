"""A model of the MLflow registry: downloaded, and recognized by its files. Nothing of it is loaded here."""

import os
from dataclasses import dataclass
from pathlib import Path

from slipstream.digests import folder_size
from slipstream.engines.base import MANIFEST as ENGINE
from slipstream.errors import ModelError
from slipstream.frameworks.base import MANIFEST, WEIGHTS, read_manifest
from slipstream.home import Home
from slipstream.platform import addresses
from slipstream.spec.fields import RELEASE_ALIASES
from slipstream.store.registry import translated
from slipstream.tools.init.facts import Question
from slipstream.tools.init.source import KERAS, REGISTERED, SAVED_MODEL

SOURCE = "source"
"""Alias in the spec if the model was named by its version."""


@dataclass(frozen=True)
class Downloaded:
    """A registered version on this machine."""

    question: Question
    registry: str
    size_bytes: int
    architecture: str | None = None
    notes: tuple[str, ...] = ()


def download(uri: str, folder: Path, architecture: str | None) -> Downloaded:
    """Fetch a version. Raise ModelError for one that is only pickled, RegistryError, Unavailable."""
    import mlflow

    addresses.reach_mlflow(Home.from_environment(), os.environ)
    mlflow.set_tracking_uri(os.environ[addresses.MLFLOW])
    with translated(f"downloading {uri}"):
        path = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
    match = REGISTERED.fullmatch(uri)
    assert match is not None, "source_of has matched it"
    notes: tuple[str, ...] = ()
    if match["version"]:
        notes = (f"alias: set {match['name']}'s alias {SOURCE} to version {match['version']}",)
    question, function = _question(uri, path, architecture)
    alias = match["alias"] or SOURCE
    if alias.lower() in RELEASE_ALIASES:
        notes = (f"alias: slipstream moves {alias} itself; set {match['name']}'s alias {SOURCE} to its version",)
        alias = SOURCE
    registry = f"models:/{match['name']}@{alias}"
    return Downloaded(question, registry, folder_size(path), function, notes)


def _question(uri: str, folder: Path, architecture: str | None) -> tuple[Question, str | None]:
    """Return how to inspect a downloaded model, and the function that builds it, if any."""
    if list(folder.rglob(ENGINE)):
        raise ModelError(f"{uri}: is an engine that was built already; name the version of the trained model")
    if manifests := sorted(folder.rglob(MANIFEST)):
        recorded = read_manifest(manifests[0].parent).architecture
        architecture = architecture or (recorded.function if recorded else None)
    if list(folder.rglob(WEIGHTS)) and not list(folder.rglob("*.keras")):
        if architecture is None:
            raise ModelError(f"{uri}: holds weights alone; name the function that builds the network by --architecture")
        return Question(kind="function", location=architecture), architecture
    if any(list(folder.rglob(f"*{suffix}")) for suffix in KERAS) or list(folder.rglob(SAVED_MODEL)):
        return Question(kind="keras", location=str(folder)), None
    if files := sorted(folder.rglob("*.onnx")):
        return Question(kind="onnx", location=str(files[0].parent)), None
    raise ModelError(
        f"{uri}: holds neither ONNX, nor a Keras model, nor {WEIGHTS}; a pickled model is never loaded, so log its "
        f"weights by safetensors.torch.save_file(model.state_dict(), '{WEIGHTS}'), and that file as the model"
    )
