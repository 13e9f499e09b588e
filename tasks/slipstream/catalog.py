"""The published specs: the YAML files under `specs/` of the home. Each is a DAG, and each alias it names a trigger."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from slipstream.contract import digest
from slipstream.errors import SpecError
from slipstream.home import Home, write_atomically
from slipstream.spec import Spec, load


def dag_id(name: str) -> str:
    """The DAG of a spec."""
    return f"optimize-{name}"


def fingerprint(spec: Spec) -> str:
    """Short digest of what a spec says; comments and key order do not count. The DAG's description carries it."""
    return digest(spec.model_dump(mode="json"))[:12]


def publish(home: Home, path: Path) -> Spec:
    """Validate a spec file and put it, comments included, where Airflow finds it. Raises SpecError."""
    spec = load(path)
    published, text = home.specs / f"{spec.name}.yaml", path.read_text(encoding="utf-8")
    if not published.exists() or published.read_text(encoding="utf-8") != text:
        write_atomically(published, text)
    return spec


def read(path: Path) -> Spec:
    """A published spec. Raises SpecError, also when the file's name is not the spec's."""
    spec = load(path)
    if path.stem != spec.name:
        raise SpecError(f"{path}: name: {spec.name!r} must be the file's name; publish it with `slipstream run`")
    return spec


def published(home: Home) -> Iterator[tuple[str, Spec | SpecError]]:
    """Names of all published specs, in order, each with the spec or with what is wrong with it."""
    for path in sorted(home.specs.glob("*.yaml")):
        try:
            yield path.stem, read(path)
        except SpecError as error:
            yield path.stem, error


def published_at(home: Home, name: str) -> datetime:
    """When a spec was published. Its schedule counts from here: publishing must not start a run by itself."""
    return datetime.fromtimestamp((home.specs / f"{name}.yaml").stat().st_mtime, UTC)


def naming(home: Home, model: str, alias: str) -> list[Spec]:
    """Published specs that start when `alias` of the registered `model` moves."""
    found = [spec for _, spec in published(home) if isinstance(spec, Spec)]
    return [spec for spec in found if (spec.model.name, spec.model.alias) == (model, alias)]
