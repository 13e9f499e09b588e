"""Relations between the facts of a build and those of the machine that loads it."""

from pathlib import Path

import pytest

from slipstream.engines.base import EngineManifest, engine_for
from slipstream.engines.compatibility import Relation, differences, release
from slipstream.spec import Target


@pytest.mark.parametrize(
    ("relation", "built", "here", "loads"),
    [
        (Relation.EQUAL, "CPU", "CPU", True),
        (Relation.EQUAL, "CPU", "GPU", False),
        (Relation.NOT_OLDER, "2025.4.1", "2026.4.1", True),
        (Relation.NOT_OLDER, "2026.4.1", "2026.4.0", False),
        (Relation.SAME_MAJOR, "1.24.4", "1.32.0", True),
        (Relation.SAME_MAJOR, "1.9.0", "1.10.0", True),
        (Relation.SAME_MAJOR, "1.32.0", "2.0.0", False),
        (Relation.SAME_MAJOR, "1.32.0", "1.31.1", False),
        (Relation.SAME_MAJOR, "1.0.0", "1.0", True),
        (Relation.SAME_MAJOR, "2.0", "2.0.0", True),
        (Relation.SAME_MAJOR, "unknown", "1.31.1", False),
        (Relation.INCLUDES, "avx2", "avx2 avx512f", True),
        (Relation.INCLUDES, "avx2 avx512f", "avx2", False),
        (Relation.ANY, "avx2", "asimd", True),
    ],
)
def test_a_relation_decides(relation: Relation, built: str, here: str, loads: bool) -> None:
    assert (differences({"fact": relation}, {"fact": built}, {"fact": here}) == ()) == loads


def test_facts_without_a_relation_must_be_equal_and_each_difference_is_named() -> None:
    built = {"device": "NPU", "driver": "1", "precision": "f32"}
    found = differences({}, built, {"device": "CPU", "precision": "f32", "new": "fact"})
    assert found == ("device: built with 'NPU', here 'CPU'", "driver: built with '1', here None")


def test_a_fact_that_is_absent_here_satisfies_only_any() -> None:
    for relation in Relation:
        assert (differences({"fact": relation}, {"fact": "1"}, {}) == ()) == (relation is Relation.ANY)


def test_the_release_of_a_version_is_compared_by_number() -> None:
    assert release("2.13.0+cpu") == (2, 13)
    assert release("0.0") == (0,)
    assert release("nightly") == ()


ENGINES_HERE = ("onnxruntime", "openvino", "torch")
QUANTIZED = {"openvino": "int8_sums"}
"""Facts that matter for a quantized engine alone, and so have a row in words."""


def rows(name: str) -> list[str]:
    """The engine's rows of the table in docs/engines.md, by what its code says."""
    engine = engine_for(name)
    target = Target(engine=name, options={"mode": "compile"} if name == "torch" else {})
    facts = engine.fingerprint(target)
    manifest = EngineManifest(
        engine=name,
        target=target,
        fingerprint=facts,
        candidate_sha256="",
        input_shape=(1,),
        input_dtype="float32",
        output_shape=(1,),
        files={},
    )
    relations = engine.relations(manifest)
    return [
        f"| `{name}` | `{fact}` | {relations.get(fact, Relation.EQUAL).value} |"
        for fact in facts
        if fact not in ("device", "precision", QUANTIZED.get(name))
    ]


@pytest.mark.parametrize("name", ENGINES_HERE)
def test_the_documented_relations_are_those_of_the_engine(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    assert [line for line in page.splitlines() if line in rows(name)] == rows(name)
