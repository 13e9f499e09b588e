"""Publishing a spec, and reading what is published."""

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from slipstream import storage
from slipstream.errors import SpecError
from slipstream.home import Home
from slipstream.plan import catalog
from slipstream.spec import Spec
from slipstream.storage import s3

WHERE = ("folder", "s3")

TEXT = """\
# a comment that stays
name: tiny
model: {registry: models:/net@source, architecture: m:net}
data: m:data
recipes: {int8: [quantize]}
targets: {server: {engine: openvino}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture(params=WHERE)
def here(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with its specs in a folder, and one with them in S3."""
    if request.param == "s3":
        monkeypatch.setenv("SLIPSTREAM_SPECS", f"{request.getfixturevalue('bucket')}/specs")
    return Home.from_environment()


def put(here: Home, name: str, text: str) -> None:
    """Put a file among the specs by hand, and let it be seen."""
    storage.write_text(storage.join(here.specs, name), text)
    catalog._listings.clear()


def test_a_published_spec_keeps_its_text_and_takes_its_name(here: Home, file: Path) -> None:
    catalog.publish(here, file)
    assert storage.read_text(catalog.uri(here, "tiny")) == TEXT
    [(name, found)] = catalog.published(here)
    assert isinstance(found, Spec)
    assert name == found.name == catalog.read(here, "tiny").name == "tiny"


def test_an_invalid_spec_is_not_published(here: Home, file: Path) -> None:
    file.write_text(TEXT.replace("int8: [", "int8: [nonsense, "))
    with pytest.raises(SpecError):
        catalog.publish(here, file)
    assert list(catalog.published(here)) == []


def test_the_fingerprint_is_of_the_meaning(here: Home, file: Path) -> None:
    first = catalog.fingerprint(catalog.publish(here, file))
    file.write_text(TEXT.replace("# a comment that stays\n", "") + "seed: 0\n")
    assert catalog.fingerprint(catalog.publish(here, file)) == first
    file.write_text(TEXT + "seed: 1\n")
    assert catalog.fingerprint(catalog.publish(here, file)) != first
    assert catalog.read(here, "tiny").seed == 1  # what was just published is seen at once


def test_publishing_the_same_again_keeps_the_date(here: Home, file: Path) -> None:
    catalog.publish(here, file)
    first = catalog.published_at(here, "tiny")
    assert abs((datetime.now(UTC) - first).total_seconds()) < 60
    time.sleep(1.1)  # S3 counts seconds
    catalog.publish(here, file)
    catalog._listings.clear()
    assert catalog.published_at(here, "tiny") == first


def test_a_broken_file_hides_no_other(here: Home, file: Path) -> None:
    catalog.publish(here, file)
    put(here, "broken.yaml", "name: [")
    put(here, "copy.yaml", TEXT)
    put(here, "deeper/tiny.yaml", TEXT)
    put(here, "notes.txt", "not a spec")
    found = dict(catalog.published(here))
    assert list(found) == ["broken", "copy", "tiny"]
    assert isinstance(found["tiny"], Spec)
    assert isinstance(found["broken"], SpecError)
    assert catalog.uri(here, "broken") in str(found["broken"])
    assert "must be the file's name" in str(found["copy"])


def test_a_spec_that_is_not_published_is_named(here: Home) -> None:
    with pytest.raises(SpecError, match=r"other\.yaml: no such spec"):
        catalog.read(here, "other")


def test_an_alias_leads_to_the_specs_that_name_it(here: Home, file: Path) -> None:
    catalog.publish(here, file)
    assert [s.name for s in catalog.naming(here, "net", "source")] == ["tiny"]
    assert catalog.naming(here, "net", "champion") == []
    assert catalog.naming(here, "other", "source") == []


def test_parsing_asks_the_store_once(bucket: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_SPECS", f"{bucket}/specs")
    here = Home.from_environment()
    catalog.publish(here, file)
    assert len(list(catalog.published(here))) == 1
    for name in ("read", "listing"):
        monkeypatch.setattr(s3, name, None)
    assert [name for name, _ in catalog.published(here)] == ["tiny"]
    assert catalog.published_at(here, "tiny")
