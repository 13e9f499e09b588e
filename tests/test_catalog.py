"""Publishing a spec, and reading what is published."""

from pathlib import Path

import pytest

from slipstream import catalog
from slipstream.errors import SpecError
from slipstream.home import Home
from slipstream.spec import Spec

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


def test_a_published_spec_keeps_its_text_and_takes_its_name(home: Path, file: Path) -> None:
    catalog.publish(Home.from_environment(), file)
    assert (home / "specs/tiny.yaml").read_text() == TEXT
    [(name, found)] = catalog.published(Home.from_environment())
    assert isinstance(found, Spec)
    assert name == found.name == "tiny"


def test_an_invalid_spec_is_not_published(home: Path, file: Path) -> None:
    file.write_text(TEXT.replace("int8: [", "int8: [nonsense, "))
    with pytest.raises(SpecError):
        catalog.publish(Home.from_environment(), file)
    assert not (home / "specs").exists()


def test_the_fingerprint_is_of_the_meaning(home: Path, file: Path) -> None:
    first = catalog.fingerprint(catalog.publish(Home.from_environment(), file))
    file.write_text(TEXT.replace("# a comment that stays\n", "") + "seed: 0\n")
    assert catalog.fingerprint(catalog.publish(Home.from_environment(), file)) == first
    file.write_text(TEXT + "seed: 1\n")
    assert catalog.fingerprint(catalog.publish(Home.from_environment(), file)) != first


def test_a_broken_file_hides_no_other(home: Path, file: Path) -> None:
    here = Home.from_environment()
    catalog.publish(here, file)
    (home / "specs/broken.yaml").write_text("name: [")
    (home / "specs/copy.yaml").write_text(TEXT)
    found = dict(catalog.published(here))
    assert isinstance(found["tiny"], Spec)
    assert isinstance(found["broken"], SpecError)
    assert "must be the file's name" in str(found["copy"])


def test_an_alias_leads_to_the_specs_that_name_it(home: Path, file: Path) -> None:
    here = Home.from_environment()
    catalog.publish(here, file)
    assert [s.name for s in catalog.naming(here, "net", "source")] == ["tiny"]
    assert catalog.naming(here, "net", "champion") == []
    assert catalog.naming(here, "other", "source") == []
