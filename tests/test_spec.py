"""The spec: what is accepted, what is refused with which words, and that nothing is lost on the way through YAML."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream import spec as specs
from slipstream.errors import SpecError
from slipstream.plan.flow import with_choices
from slipstream.plugins import ENGINES, techniques_of
from slipstream.spec import fields

ROOT = Path(__file__).parent.parent
CASES = sorted((ROOT / "tests/specs").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def expected(path: Path) -> list[str]:
    """The lines `# expect: …` at the top of a case: what its errors say."""
    return re.findall(r"^# expect: (.*)$", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", [p for p in CASES if p.stem.startswith("good-")], ids=lambda p: p.stem)
def test_good(path: Path) -> None:
    assert specs.load(path).name == "tiny"


@pytest.mark.parametrize("path", [p for p in CASES if p.stem.startswith("bad-")], ids=lambda p: p.stem)
def test_bad_says_file_field_and_mend_once(path: Path) -> None:
    with pytest.raises(SpecError) as refused:
        specs.load(path)
    lines = [line for line in str(refused.value).splitlines() if line.startswith(str(path))]
    told = expected(path)
    assert told, "a bad case says what it expects"
    assert len(lines) == len(told), "one line for each problem"
    for line, fragment in zip(sorted(lines), sorted(told), strict=True):
        assert line.startswith(f"{path}: {fragment}")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_valid_and_named_like_their_file(path: Path) -> None:
    assert specs.load(path).name == path.stem


def test_the_tight_example_differs_only_where_it_says() -> None:
    loose, tight = (specs.load(ROOT / f"examples/{name}.yaml").model_dump() for name in ("fashion", "fashion-tight"))
    differing = {key for key in loose if loose[key] != tight[key]}
    assert differing <= {"name", "objective", "schedule"}
    assert tight["objective"] == loose["objective"] | {"max_drop": 0.06}


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        specs.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read"):
        specs.load(tmp_path / "binary.yaml")


def test_yaml_cannot_construct_objects() -> None:
    with pytest.raises(SpecError, match="not valid YAML"):
        specs.parse("name: !!python/object/apply:os.getcwd []", "x")


names = st.from_regex(re.compile(fields.NAME, re.ASCII), fullmatch=True)
uses = {
    "distill": st.just("distill")
    | st.fixed_dictionaries({"distill": st.fixed_dictionaries({"epochs": st.integers(1, 9)})}),
    "prune": st.just("prune") | st.fixed_dictionaries({"prune": st.fixed_dictionaries({"rounds": st.integers(1, 9)})}),
    "simplify": st.just("simplify"),
    "quantize": st.just("quantize") | st.just({"quantize": {"scheme": "int8", "samples": 99}}),
}
recipe = st.sets(st.sampled_from(techniques_of("torch"))).flatmap(
    lambda chosen: st.tuples(*(uses[t] for t in specs.TECHNIQUES if t in chosen)).map(list)
)
function = st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8}){0,2}:[a-z_]{1,8}", fullmatch=True)
value = st.integers(-10, 10) | st.booleans() | st.text("abc: '\"#%", max_size=8) | st.floats(-1, 1)
call = function | st.fixed_dictionaries(
    {"function": function, "params": st.dictionaries(st.text("abc", min_size=1), value)}
)
limit = st.floats(1, 9)
builds = [name for name, engine in ENGINES.items() if not engine.frameworks or "torch" in engine.frameworks]
engines = [name for name in builds if ENGINES[name].server is not None]  # a spec needs one that can be released
target = st.fixed_dictionaries({"engine": st.sampled_from(sorted(engines)), "threads": st.integers(1, 64)})
document = st.fixed_dictionaries(
    {
        "name": names,
        "model": st.fixed_dictionaries({"registry": st.just("models:/m@source"), "architecture": call}),
        "data": call | st.just({"train": "s3://b/train.npz", "test": "test.npz"}),
        "recipes": st.dictionaries(names.filter(lambda n: n != specs.BASELINE), recipe, min_size=1, max_size=4),
        "distill": st.fixed_dictionaries({"student": call, "temperature": st.floats(1, 100)}),
        "targets": st.dictionaries(names, target, min_size=1, max_size=3),
        "objective": st.fixed_dictionaries({"max_drop": st.floats(0.001, 100), "latency_p99_ms": st.none() | limit}),
        "seed": st.integers(0, 2**31 - 1),
    },
    optional={
        "schedule": st.sampled_from(["@weekly", "0 3 * * 1", "*/5 0-6 * * MON-FRI"]),
        "small_scale_test": st.floats(0.1, 25).map(lambda share: {"share": f"{share} %"}),
    },
)  # fmt: skip


@settings(deadline=None)  # a busy machine is not a failure
@given(document)
def test_dump_and_parse_give_the_same_spec(given_document: dict[str, object]) -> None:
    spec = specs.parse(json.dumps(given_document), "given")  # JSON is YAML
    assert specs.parse(specs.dump(spec), "dumped") == spec


@settings(deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda v: st.dictionaries(st.text(max_size=5), v)))
def test_whatever_is_given_the_only_error_is_a_spec_error(anything: object) -> None:
    with pytest.raises(SpecError, match=r"^given: "):
        specs.parse(json.dumps(anything), "given")


def test_the_committed_schema_is_current() -> None:
    committed = json.loads((ROOT / "docs/spec.schema.json").read_text())
    assert committed == specs.json_schema(), "run: slipstream schema > docs/spec.schema.json"


def test_the_schema_describes_every_field_and_allows_the_short_forms() -> None:
    schema = specs.json_schema()
    for name, section in {**schema["$defs"], "Spec": schema}.items():
        for name_, description in section["properties"].items():
            shared = schema["$defs"].get(description.get("$ref", "").rpartition("/")[2], {})
            assert (shared | description).get("description"), f"{name}.{name_}"
    architecture = schema["$defs"]["Model"]["properties"]["architecture"]["anyOf"]
    assert {"type": "string", "pattern": fields.FUNCTION_NAME} in architecture
    share = schema["$defs"]["SmallScaleTest"]["properties"]["share"]
    assert {option["type"] for option in share["anyOf"]} == {"number", "string"}


def test_a_recipe_has_its_own_scheme_and_is_built_where_that_runs() -> None:
    spec = specs.load(ROOT / "tests/specs/good-schemes.yaml")
    assert [spec.scheme_of(recipe) for recipe in spec.recipes] == ["int8", "int8-dynamic", None]
    assert [spec.runs("dynamic", target) for target in ("server", "portable")] == [False, True]
    assert spec.runs("int8", "server") and spec.runs("slim", "server")
    fewer = with_choices(spec, recipes=["int8"])
    assert list(fewer.recipes) == ["int8"]


def test_a_technique_has_the_settings_of_its_section_but_for_those_of_the_recipe() -> None:
    spec = specs.load(ROOT / "tests/specs/good-recipe-settings.yaml")
    half, most = spec.section("prune", "half"), spec.section("prune", "most")
    assert (half.sparsity, half.rounds) == ((0.2, 0.5), 3) and (most.sparsity, most.rounds) == ((0.3, 0.8), 5)
    assert half.epochs == most.epochs == 1
    tiny = spec.section("distill", "tiny")
    assert (tiny.student.function, tiny.epochs, tiny.temperature) == ("code.tiny:tiny", 9, 4)
    assert spec.section("distill", "half") is None and spec.section("simplify", "tiny") is None
    assert spec.functions["recipes.tiny.distill.student"].function == "code.tiny:tiny"
    assert tiny.student in spec.architectures and spec.techniques("tiny") == ("distill", "quantize")


def test_training_for_int8_is_left_out_of_a_recipe_with_another_scheme() -> None:
    trained = specs.Quantize(epochs=3)
    assert trained.over({"scheme": "int8-weights"}).epochs == 0 and trained.over({"samples": 99}).epochs == 3
    with pytest.raises(ValueError, match="quantization-aware training is for scheme int8"):
        trained.over({"scheme": "int8-weights", "epochs": 1})
