"""The published specs: the YAML files in `specs` of the home. Each is a DAG, and each alias it names a trigger.

The folder may contain anything: an error in one file is a SpecError in its place and affects no other spec.
"""

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from slipstream import storage
from slipstream.contract import digest
from slipstream.errors import DataError, SpecError
from slipstream.home import Home
from slipstream.spec import Spec, load_text, parse
from slipstream.spec.document import MAX_BYTES
from slipstream.spec.fields import NAME, PATTERNS
from slipstream.storage import Entry

LISTED_FOR_S = 3.0
"""How long a listing of an s3:// prefix is reused. Parsing DAGs requests it several times in a row."""

_listings: dict[str, tuple[float, dict[str, Entry]]] = {}
"""By prefix: when it was listed (monotonic seconds), and the specs in it by name."""


def dag_id(name: str) -> str:
    """Return the DAG id of a spec. For an invalid file name, return an id that Airflow accepts and no spec has."""
    if re.fullmatch(NAME, name) or not name:
        return f"optimize-{name}"
    legible = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:40]
    return f"optimize-{legible}_{digest(ascii(name))[:8]}"


def fingerprint(spec: Spec) -> str:
    """Return a short digest of a spec's content, without comments and key order; it is in the DAG's description."""
    return digest(spec.model_dump(mode="json"))[:12]


def uri(home: Home, name: str) -> str:
    """Return where a spec is published."""
    return storage.join(home.specs, f"{name}.yaml")


def publish(home: Home, path: Path) -> Spec:
    """Validate a spec file and store it, with its comments, where Airflow finds it. Raise SpecError, Unavailable."""
    text = load_text(path)
    spec = parse(text, str(path))
    to = uri(home, spec.name)
    # An existing identical file stays untouched: the spec's schedule counts from its date.
    if not storage.exists(to) or storage.read_text(to) != text:
        storage.write_text(to, text)
        _listings.pop(home.specs, None)
    return spec


def read(home: Home, name: str) -> Spec:
    """Return a published spec. Raise SpecError, also if the file's name differs from the spec's, and Unavailable."""
    entry = _listed(home).get(name)
    if entry is None:
        raise SpecError(f"{uri(home, name)}: no such spec; publish it with `slipstream run`")
    return _read(entry)


def published(home: Home) -> Iterator[tuple[str, Spec | SpecError]]:
    """Yield the names of all published specs, in order, each with the spec or its error."""
    for name, entry in _listed(home).items():
        try:
            yield name, _read(entry)
        except SpecError as error:
            yield name, error


def published_at(home: Home, name: str) -> datetime:
    """Return when a spec was published. Its schedule counts from then: publishing must not start a run."""
    return datetime.fromtimestamp(_listed(home)[name].modified, UTC)


def naming(home: Home, model: str, alias: str) -> list[Spec]:
    """Return the published specs that start when `alias` of the registered `model` moves."""
    valid = [spec for _, spec in published(home) if isinstance(spec, Spec)]
    return [spec for spec in valid if (spec.model.name, spec.model.alias) == (model, alias)]


def _read(entry: Entry) -> Spec:
    if not re.fullmatch(NAME, _name(entry)):
        raise SpecError(f"{entry.uri!r}: the file's name must be that of its spec, {PATTERNS[NAME]}; rename it")
    if entry.size_bytes > MAX_BYTES:
        raise SpecError(f"{entry.uri}: larger than {MAX_BYTES // 1024} KiB, which no spec is")
    try:
        spec = parse(storage.read_entry(entry), entry.uri)
    except DataError as error:
        raise SpecError(str(error)) from error
    if _name(entry) != spec.name:
        raise SpecError(f"{entry.uri}: name: {spec.name!r} must be the file's name; publish it with `slipstream run`")
    return spec


def _listed(home: Home) -> dict[str, Entry]:
    """Return the specs' files by name, in order."""
    at, listing = _listings.get(home.specs, (-LISTED_FOR_S, {}))
    if time.monotonic() - at >= LISTED_FOR_S:
        depth = uri(home, "any").count("/")
        files = [e for e in storage.entries(home.specs) if e.uri.endswith(".yaml") and e.uri.count("/") == depth]
        listing = {_name(entry): entry for entry in files}
        if storage.is_remote(home.specs):
            _listings[home.specs] = (time.monotonic(), listing)
    return listing


def _name(entry: Entry) -> str:
    return PurePosixPath(entry.uri).stem
