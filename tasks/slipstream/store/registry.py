"""The registry protocol: which version serves (`champion`), where rollback goes (`previous`), what is under test.

MLflow has neither compare-and-swap nor a transaction over two aliases. Therefore one rollout per model runs at a time
(an Airflow pool of one slot), `expect_champion` stops a rollout whose evidence is stale, every write can be repeated,
and tags of the registered model record what was begun (release/moves.py) and what was rejected (release/rejections.py).
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from slipstream.contract import Artifact, Release, Verdict
from slipstream.errors import RegistryError, SlipstreamError, Unavailable
from slipstream.plugins import VALIDATE
from slipstream.spec.fields import RELEASE_ALIASES
from slipstream.store import signing

log = logging.getLogger(__name__)

CHAMPION, PREVIOUS, CHALLENGER = RELEASE_ALIASES
ARTIFACT = "slipstream.artifact"
ARTIFACT_SIGNATURE = "slipstream.artifact_signature"
KIND = "slipstream.kind"
SHA256 = "slipstream.sha256"
PIPELINE_RUN = "slipstream.pipeline_run"
REBUILT_FROM = "slipstream.rebuilt_from"
"""Version whose engine could no longer be loaded, and from whose candidate this one was built."""
RELEASED_BY = "slipstream.released_by"
REPLACED = "slipstream.replaced"
ROLLOUT_RUN = "slipstream.rollout_run"
ABSENT_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What MLflow's stores raise for a missing alias; which one depends on the store and its version."""
OUTAGE_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""A refused connection is an INTERNAL_ERROR to MLflow's client."""


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Translate MLflow's exceptions into ours: an outage is Unavailable (retry), all others RegistryError."""
    try:
        yield
    except MlflowException as error:
        failure: type[SlipstreamError] = Unavailable if error.error_code in OUTAGE_CODES else RegistryError
        raise failure(f"MLflow registry: {what}: {error}") from error


class Registry:
    """One registered model."""

    def __init__(self, model: str, client: MlflowClient) -> None:
        self.model = model
        self._client = client

    def alias(self, name: str) -> str | None:
        """Return the version that an alias points at, or None if there is no such alias or model."""
        with translated(f"reading {self.model}@{name}"):
            try:
                return str(self._client.get_model_version_by_alias(self.model, name).version)
            except MlflowException as error:
                if error.error_code in ABSENT_CODES:
                    return None
                raise

    def champion(self) -> str | None:
        """Return the version that serves, according to the registry."""
        return self.alias(CHAMPION)

    def expect_champion(self, version: str | None) -> None:
        """Raise RegistryError if the champion is not the version that the gates compared with."""
        champion = self.champion()
        if champion != version:
            raise RegistryError(
                f"{self.model}@champion is {_said(champion)}, but the gates compared with {_said(version)}; somebody "
                "moved it meanwhile: start a new run, so that the evidence is about what serves now"
            )

    def set_alias(self, name: str, version: str | None) -> None:
        """Point an alias at a version, or remove it (None). Nothing is written if it already is so."""
        if self.alias(name) == version:
            return
        with translated(f"setting {self.model}@{name}"):
            if version is None:
                self._client.delete_registered_model_alias(self.model, name)
            else:
                self._client.set_registered_model_alias(self.model, name, version)
        log.info("registry: %s@%s is now %s", self.model, name, _said(version))

    def register(self, artifact: Artifact, cell: str, pipeline_run_id: str, verdicts: tuple[Verdict, ...]) -> str:
        """Return the version for an engine, the same one again for the same engine of the same pipeline run.

        Tags are set at creation, so that no version is ever visible without its digest.
        """
        if artifact.model_id is None:
            raise RegistryError(f"{cell}: the engine is not a logged model of MLflow, and cannot be registered")
        with translated(f"registering {cell} as a version of {self.model}"):
            version = self._registered(artifact, pipeline_run_id)
            if version is None:
                self.ensure_model()
                tags = {
                    KIND: "engine",
                    SHA256: artifact.sha256,
                    "slipstream.cell": cell,
                    PIPELINE_RUN: pipeline_run_id,
                    **verdict_tags(VALIDATE, verdicts),
                }
                source = f"models:/{artifact.model_id}"
                model_version = self._client.create_model_version(
                    self.model, source, tags=tags, model_id=artifact.model_id
                )
                version = str(model_version.version)
        # Signed last: the signature names the version, so that no version's tags pass for another's.
        signature = signing.sign(signing.VERSION_ARTIFACT, self._signed(version, artifact))
        self.tag(version, {ARTIFACT: artifact.model_dump_json(), ARTIFACT_SIGNATURE: signature})
        return version

    def artifact(self, version: str) -> Artifact:
        """Return the engine of a version. Raise RegistryError unless a signature proves that slipstream registered it.

        Anyone with access to the registry can set tags, and this one determines what is deployed.
        """
        tags = self.tags(version)
        text = tags.get(ARTIFACT)
        if text is None:
            raise RegistryError(
                f"{self.model} version {version} is not an engine that slipstream registered (no tag {ARTIFACT}); "
                "move the alias to one that is"
            )
        signature = tags.get(ARTIFACT_SIGNATURE, "")
        try:
            artifact = Artifact.model_validate_json(text)
        except ValidationError:
            artifact = None
        if artifact is None or not signing.verify(signing.VERSION_ARTIFACT, self._signed(version, artifact), signature):
            how = "changed after slipstream wrote it, or signed with another key" if signature else "not signed"
            raise RegistryError(
                f"{self.model} version {version}: tag {ARTIFACT} is {how}, so its engine is not deployed; release the "
                "model with a new run, or see `Signatures` in docs/security.md"
            )
        return artifact

    def sign(self, version: str) -> Artifact:
        """Sign a version's artifact as it is now, at a person's request: after a new key, or from before signatures."""
        text = self.tags(version).get(ARTIFACT)
        try:
            artifact = Artifact.model_validate_json(text or "")
        except ValidationError:
            raise RegistryError(f"{self.model} version {version}: tag {ARTIFACT} holds no engine to sign") from None
        self.tag(
            version,
            {ARTIFACT_SIGNATURE: signing.sign(signing.VERSION_ARTIFACT, self._signed(version, artifact))},
        )
        return artifact

    def _signed(self, version: str, artifact: Artifact) -> dict[str, object]:
        """Return what the signature covers, including the version, so that no other version's engine passes for this
        one's."""
        described = artifact.model_dump(mode="json", exclude_defaults=True)
        return {"model": self.model, "version": version, "artifact": described}

    def release(self, version: str) -> Release:
        """Return the release under which a version is deployed."""
        return Release(model=self.model, name=f"v{version}")

    def tags(self, version: str) -> dict[str, str]:
        """Return the tags of a version."""
        with translated(f"reading {self.model} version {version}"):
            return dict(self._client.get_model_version(self.model, version).tags)

    def tag(self, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with translated(f"tagging {self.model} version {version}"):
            for key, value in tags.items():
                self._client.set_model_version_tag(self.model, version, key, value)

    def describe(self, version: str, description: str) -> None:
        """Set the description of a version, as MLflow's pages show it."""
        with translated(f"describing {self.model} version {version}"):
            self._client.update_model_version(self.model, version, description)

    def description(self, version: str) -> str:
        """Return the description of a version."""
        with translated(f"reading {self.model} version {version}"):
            return str(self._client.get_model_version(self.model, version).description or "")

    def versions_of(self, sha256: str) -> list[str]:
        """Return versions that hold an engine with this digest, or with a digest that begins with it."""
        with translated(f"searching versions of {self.model}"):
            condition = f"name = '{self.model}' and tags.`{SHA256}` LIKE '{sha256}%'"
            return [str(v.version) for v in self._client.search_model_versions(condition)]

    def model_tags(self) -> dict[str, str]:
        """Return the tags of the registered model; empty if it does not exist yet."""
        with translated(f"reading the tags of {self.model}"):
            try:
                return dict(self._client.get_registered_model(self.model).tags)
            except MlflowException as error:
                if error.error_code in ABSENT_CODES:
                    return {}
                raise

    def tag_model(self, key: str, value: str) -> None:
        """Set a tag of the registered model."""
        with translated(f"tagging {self.model}"):
            self._client.set_registered_model_tag(self.model, key, value)

    def untag_model(self, key: str) -> None:
        """Remove a tag of the registered model."""
        with translated(f"removing a tag of {self.model}"):
            self._client.delete_registered_model_tag(self.model, key)

    def ensure_model(self) -> None:
        """Create the registered model if it does not exist yet."""
        with translated(f"creating {self.model}"):
            try:
                self._client.create_registered_model(self.model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def _registered(self, artifact: Artifact, pipeline_run_id: str) -> str | None:
        condition = f"name = '{self.model}' and tags.`{SHA256}` = '{artifact.sha256}'"
        versions = self._client.search_model_versions(condition)
        return next((str(v.version) for v in versions if v.tags.get(PIPELINE_RUN) == pipeline_run_id), None)


def verdict_tags(stage: str, verdicts: tuple[Verdict, ...]) -> dict[str, str]:
    """Return audit tags: each verdict of a stage with its reason, within MLflow's limit of 5,000 characters."""
    return {f"slipstream.{stage}.{v.gate}": f"{v.answer}: {v.reason}"[:4900] for v in verdicts}


def _said(version: str | None) -> str:
    return "not set" if version is None else f"version {version}"
