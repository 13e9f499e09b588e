"""The text of a spec: what PyYAML raises or expands becomes one short line, in milliseconds."""

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.odd_specs import GOOD, ODD, bomb, merge_bomb

from slipstream import spec as specs
from slipstream.errors import SpecError
from slipstream.spec import document

TEXTS = {name: (put, reason) for name, (put, reason) in ODD.items() if reason and "name" not in reason}


@pytest.mark.parametrize("odd", TEXTS)
def test_an_odd_file_is_one_short_error(tmp_path: Path, odd: str) -> None:
    put, reason = TEXTS[odd]
    put(tmp_path)
    [path] = tmp_path.iterdir()
    began = time.process_time()
    with pytest.raises(SpecError, match=reason) as refused:
        specs.load(path)
    assert time.process_time() - began < 2  # measured: at most 0.2 s
    assert all(len(line) < 700 + len(str(path)) for line in str(refused.value).splitlines())
    assert len(str(refused.value).splitlines()) <= 21


@pytest.mark.parametrize("field", ["name", "model", "data", "objective", "recipes", "targets", "schedule", "seed"])
@pytest.mark.parametrize("value", ["*a2", "[*a2]", "{x: *a1}", '"' + "y" * 100_000 + '"', "0x" + "f" * 50_000])
def test_a_large_value_in_a_known_field_makes_no_large_message(field: str, value: str) -> None:
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{field}:")]
    with pytest.raises(SpecError) as refused:
        specs.parse(bomb(2) + "\n".join([*lines, f"{field}: {value}"]), "x")
    assert len(str(refused.value)) < 4000


def test_merge_keys_and_anchors_work() -> None:
    text = "base: &base {a: 1, b: 2}\nover: {<<: *base, b: 3}\nlists: [*base, *base]\n"
    found = document.read(text, "x")
    assert found["over"] == {"a": 1, "b": 3}
    assert found["lists"] == [{"a": 1, "b": 2}] * 2


@pytest.mark.parametrize("text", [bomb(), merge_bomb(), "a: &a {b: *a}", "&a [*a]"])
def test_aliases_are_bounded(text: str) -> None:
    with pytest.raises(SpecError, match=r"values, aliases expanded|inside what it stands for"):
        document.read(text, "x")


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "sparse.yaml"
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(SpecError, match="larger than 256 KiB"):
        specs.load(path)


# PyYAML itself reads the line ends that only YAML 1.1 knows (U+0085, U+2028, U+2029) otherwise than it wrote them.
words = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), max_size=8)
tree = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda child: st.lists(child, max_size=4) | st.dictionaries(words, child, max_size=4),
    max_leaves=30,
)


@settings(deadline=None)
@given(tree)
def test_what_yaml_says_is_read_as_it_is(value: object) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert document.read(text, "x") == yaml.safe_load(text) == value


@settings(deadline=None)
@given(st.text(st.sampled_from("ab:[]{}&*!|>-?#%@,\"' \n\t0<"), max_size=60))
def test_whatever_is_given_the_only_error_is_a_spec_error(text: str) -> None:
    try:
        document.read(text, "x")
    except SpecError as error:
        assert "\n" not in str(error)


def test_values_in_errors_are_short() -> None:
    nested: list[object] = []
    for _ in range(10_000):
        nested = [nested] * 9
    for value in (nested, "x" * 10**6, 10**5000, {i: i for i in range(10**4)}, object()):
        assert len(document.shown(value)) < 1000
