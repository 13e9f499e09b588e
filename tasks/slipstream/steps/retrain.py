"""retrain: provides the baseline: trains and registers it, registers a file, or takes a version of the registry.

A file is registered once: from then on a run starts from its version in the registry. Details: `version` (of the
registered model), `origin` (`trained`, `file` or `registry`).
"""

import logging
import shutil
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from slipstream import storage
from slipstream.contract import Artifact, Json, StepInput, StepOutput
from slipstream.contract.handover import Retrained
from slipstream.data.user_code import user_code_digest
from slipstream.digests import file as file_digest
from slipstream.digests import folder as folder_digest
from slipstream.errors import DataError, ModelError
from slipstream.frameworks.base import (
    MANIFEST,
    Framework,
    Network,
    framework_for,
    read_manifest,
    toolchain,
    trainer_for,
)
from slipstream.home import Home
from slipstream.runner.context import Context, workers
from slipstream.spec import Model, Spec
from slipstream.store.registry import ABSENT_CODES, KIND, PIPELINE_RUN, SHA256, Registry, translated
from slipstream.store.tracking import connected
from slipstream.techniques import candidates

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
FILE_SHA256 = "slipstream.file_sha256"
"""Tag of a version that was registered from a file: the digest of that file, or folder."""


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return what determines the result: the user's code and the seed, or the version to start from."""
    version = version_to_load(spec, inputs, connected())
    return {
        "architecture": user_code_digest(spec.model.architecture),
        "seed": spec.seed,
        "model": spec.model.name,
        "version": version,
        "versions": toolchain(spec.model.framework),
    } | (_anew(spec) if version is None else {})


def _anew(spec: Spec) -> Json:
    """Return the settings of a run that makes a version: the file's content, or the training."""
    if spec.model.file is not None:
        return {"file": _digest(given_file(spec.model))}
    # The loss of a train function that gives `fit` none.
    return {"train": user_code_digest(spec.model.train), "loss": user_code_digest(spec.model.loss)} | workers(spec)


def run(context: Context) -> StepOutput:
    """Train or load, log the candidate, and return its version of the registered model."""
    spec = context.spec
    framework = framework_for(spec.model.framework)
    client, run_key = context.tracking.client, context.inputs.run_key
    version, file_sha256, origin = version_to_load(spec, context.inputs, client), None, "registry"
    if version is None and spec.model.file is not None:
        origin, file_sha256 = "file", _digest(given_file(spec.model))
        version = _registered(client, spec.model.name, FILE_SHA256, file_sha256)
    if version is not None:
        network = _load(context, framework, version)
    elif file_sha256 is not None:
        context.run.params({"file": spec.model.file, "file_sha256": file_sha256})
        network = from_file(spec, framework)
    else:
        origin, network = "trained", _train(context)
    folder = candidates.fresh_folder(context)
    manifest = framework.save(network, spec.model.architecture, context.data.test, folder)
    artifact = candidates.log(context, folder, "baseline")
    metrics = candidates.quality(spec, framework.logits(network, context.data.test.inputs), context.data.test)
    metrics["parameters"] = float(manifest.parameters)
    if version is None:
        version = register_checkpoint(client, spec.model, artifact, run_key, file_sha256)
    elif origin == "file":
        Registry(spec.model.name, client).set_alias(spec.model.alias, version)
    return context.output(artifact=artifact, metrics=metrics, details=Retrained(version=version, origin=origin))


def version_to_load(spec: Spec, inputs: StepInput, client: MlflowClient) -> str | None:
    """Return the registered version to start from: the run's, else the one behind the alias.

    Return None if the model is to be trained, or to be taken from a file. Raise ModelError if the version does not
    exist.
    """
    if requested := inputs.params.get("source_version"):
        return str(requested)
    if spec.model.train is not None or spec.model.file is not None:
        return None
    version = Registry(spec.model.name, client).alias(spec.model.alias)
    if version is None:
        raise ModelError(
            f"{spec.model.registry}: there is no such alias or model in the registry; register a version and set "
            "the alias, or name a train function under model.train, or a trained model's file under model.file"
        )
    return version


def given_file(model: Model) -> Path:
    """Return the file or folder that `model.file` names, on this machine; a relative path starts at the user's code.

    Raise ModelError if there is none.
    """
    assert model.file is not None
    uri = model.file if storage.is_remote(model.file) else str(Home.from_environment().code / model.file)
    local = Path(uri)
    try:
        if not storage.is_remote(uri):
            return local if local.is_dir() else storage.fetch(uri)
        return storage.fetch_folder(uri) if uri.endswith("/") else storage.fetch(uri)
    except DataError as error:
        raise ModelError(f"model.file: {error}") from error


def from_file(spec: Spec, framework: Framework) -> Network:
    """Return the network in the file or folder that `model.file` names. Raise ModelError."""
    path = given_file(spec.model)
    try:
        model_path = framework.find_model(path)
    except ModelError as error:
        raise ModelError(f"{spec.model.file}: {error}") from error
    return framework.load_weights(model_path, spec.model.architecture)


def _digest(path: Path) -> str:
    return folder_digest(path) if path.is_dir() else file_digest(path)


def require_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """Return a version of a registered model. Raise ModelError if there is none."""
    with translated(f"reading {name} version {version}"):
        try:
            return client.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code not in ABSENT_CODES:
                raise
            raise ModelError(
                f"{name} has no version {version} in the registry; source_version names one of its versions by number"
            ) from error


def train(context: Context) -> Network:
    """Return the network that the user's train function trains; every process of the group calls it."""
    function = context.spec.model.train
    assert function is not None
    return trainer_for(context.spec.model.framework).train(function, context.job)


def _train(context: Context) -> Network:
    function = context.spec.model.train
    assert function is not None
    context.run.params({"train": function.function, **function.params, "seed": context.spec.seed})
    log.info("training with %s", function.function)
    return context.train_on_all(train)


def _load(context: Context, framework: Framework, version: str) -> Network:
    """Return the network of a registered version. Raise ModelError unless it was logged as weights."""
    name = context.spec.model.name
    model_version = require_version(context.tracking.client, name, version)
    log.info("starting from %s version %s", name, version)
    context.run.params({"version": version})
    target = context.workdir / "registered"
    shutil.rmtree(target, ignore_errors=True)
    with translated(f"downloading {name} version {version}"):
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(target)))
    return framework.load_weights(_weights(framework, folder, model_version), context.spec.model.architecture)


def _weights(framework: Framework, folder: Path, model_version: ModelVersion) -> Path:
    """Return a downloaded version's trained model. Raise ModelError if there is none, or not the registered one."""
    where = f"{model_version.name} version {model_version.version}"
    candidate, expected = folder / "data" / "candidate", model_version.tags.get(SHA256)
    if (candidate / MANIFEST).is_file():
        if expected is not None and folder_digest(candidate) != expected:
            raise ModelError(f"{where}: its files are not those that were registered (tag {SHA256})")
        if read_manifest(candidate).sparsity > 0:
            raise ModelError(
                f"{where}: is a pruned candidate, but a baseline is a whole network; set the alias to the version "
                "that it was made from"
            )
    try:
        return framework.find_model(folder)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error


def register_checkpoint(
    client: MlflowClient, model: Model, artifact: Artifact, run_key: str, file_sha256: str | None = None
) -> str:
    """Return the version for these weights, created if there is none, and move the spec's alias to it.

    `file_sha256` is the digest of the file that they came from.

    Tags are set at creation: a webhook that saw a version without `slipstream.pipeline_run` would take it for a
    person's and start another run. Each write may be repeated after a crash.
    """
    registry = Registry(model.name, client)
    with translated(f"registering {model.name}"):
        version = _registered(client, model.name, SHA256, artifact.sha256)
        if version is None:
            registry.ensure_model()
            tags = {KIND: CHECKPOINT, SHA256: artifact.sha256, PIPELINE_RUN: run_key}
            tags |= {FILE_SHA256: file_sha256} if file_sha256 is not None else {}
            source = f"models:/{artifact.model_id}"
            model_version = client.create_model_version(model.name, source, tags=tags, model_id=artifact.model_id)
            version = str(model_version.version)
    registry.set_alias(model.alias, version)
    return version


def _registered(client: MlflowClient, name: str, tag: str, sha256: str) -> str | None:
    """Return the checkpoint with this digest under `tag`."""
    versions = client.search_model_versions(f"name = '{name}' and tags.`{tag}` = '{sha256}'")
    return next((str(v.version) for v in versions if v.tags.get(KIND) == CHECKPOINT), None)
