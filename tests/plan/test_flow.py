"""The plan: what a step builds on, and what must not go missing."""

import pytest

from slipstream import spec
from slipstream.contract import Cell, StepOutput
from slipstream.errors import InputError, SpecError
from slipstream.home import Home
from slipstream.plan import flow

SPEC = spec.parse(
    """
name: tiny
model: {registry: models:/tiny@source, architecture: m:net}
data: m:data
recipes: {all: [distill, prune, quantize], int8: [quantize], same: []}
distill: {student: m:student}
targets: {a: {engine: openvino}, b: {engine: onnxruntime}}
""",
    "test",
)


def out(step: str, cell: str | None = None) -> StepOutput:
    return StepOutput(step=step, cell=flow.cell_of(cell) if cell else None, identity="i", run_id="r")


EVERYTHING = [
    out("check"),
    out("retrain"),
    out("distill", "all"),
    out("prune", "all"),
    out("quantize", "all"),
    out("quantize", "int8"),
    *(out("build", cell) for cell in flow.cells(SPEC)),
]


def upstream(step: str, cell: str | None, outputs: list[StepOutput] = EVERYTHING) -> list[str]:
    found = flow.upstream(step, SPEC, flow.cell_of(cell) if cell else None, outputs)
    return [f"{o.step} {o.cell.key}" if o.cell else o.step for o in found]


def test_cells_are_every_recipe_on_every_target_and_the_baseline() -> None:
    assert flow.cells(SPEC) == [f"{r}@{t}" for t in "ab" for r in ("baseline", "all", "int8", "same")]
    assert flow.cell_of("int8@a") == Cell(recipe="int8", target="a")
    assert flow.cell_of("int8") == Cell(recipe="int8")


def test_a_task_is_found_again_by_its_id() -> None:
    every = [task for stage in flow.STAGES for task in flow.tasks(SPEC, stage)]
    assert [flow.task_of(task.id) for task in every] == every
    assert len({task.id for task in every}) == len(every)
    assert [(t.id, t.title) for t in every if t.cell and t.cell.recipe == "int8"] == [
        ("quantize.int8", "quantize int8"),
        ("build.int8.a", "build int8@a"),
        ("build.int8.b", "build int8@b"),
        ("validate.int8.a", "validate int8@a"),
        ("validate.int8.b", "validate int8@b"),
    ]


def test_a_task_follows_only_what_its_sources_do_not_follow_already() -> None:
    def parents(task_id: str) -> list[str]:
        return [t.id for t in flow.parents(flow.task_of(task_id), SPEC)]

    assert parents("retrain") == ["check"]
    assert parents("prune.all") == ["distill.all"]
    assert parents("build.same.a") == ["retrain"]
    assert parents("validate.int8.a") == ["build.int8.a", "build.baseline.a"]
    assert parents("validate.baseline.a") == ["build.baseline.a"]


def test_a_target_that_takes_no_quantized_model_has_no_cell_for_one() -> None:
    targets = {**SPEC.targets, "torch": spec.Target(engine="torch")}
    cells = flow.cells(SPEC.model_copy(update={"targets": targets}))
    assert [c for c in cells if c.endswith("@torch")] == [
        f"{r}@torch" for r in ("baseline", *SPEC.recipes) if "quantize" not in SPEC.techniques(r)
    ]


@pytest.mark.parametrize(
    ("step", "cell", "expected"),
    [
        ("check", None, []),
        ("retrain", None, ["check"]),
        ("distill", "all", ["check", "retrain"]),
        ("prune", "all", ["check", "distill all"]),
        ("quantize", "all", ["check", "prune all"]),
        ("quantize", "int8", ["check", "retrain"]),
        ("build", "all@a", ["check", "quantize all"]),
        ("build", "same@a", ["check", "retrain"]),
        ("build", "baseline@b", ["check", "retrain"]),
        ("validate", "int8@b", ["check", "retrain", "build int8@b", "build baseline@b"]),
        ("validate", "baseline@b", ["check", "retrain", "build baseline@b"]),
    ],
)
def test_a_step_is_given_exactly_what_it_uses(step: str, cell: str | None, expected: list[str]) -> None:
    assert upstream(step, cell) == expected
    assert upstream(step, cell, EVERYTHING[::-1]) == expected  # by key, never by position


def test_stages_are_given_all_that_there_is() -> None:
    assert len(upstream("select", None)) == len(EVERYTHING)
    assert upstream("report", None, []) == []


def test_a_failed_technique_is_never_replaced_by_the_model_before_it() -> None:
    left = [o for o in EVERYTHING if o.step != "prune"]
    with pytest.raises(InputError, match="quantize all: nothing to work on, since prune all left no output"):
        upstream("quantize", "all", left)


def test_choices_narrow_the_spec_and_nothing_else() -> None:
    chosen = flow.with_choices(SPEC, max_drop=0.25, recipes=["int8"])
    assert (chosen.objective.max_drop, list(chosen.recipes)) == (0.25, ["int8"])
    assert flow.with_choices(SPEC) == SPEC
    assert flow.with_choices(chosen, max_drop=SPEC.objective.max_drop).objective == SPEC.objective
    with pytest.raises(InputError, match="recipes nope: not in spec tiny; known: all, int8, same"):
        flow.with_choices(SPEC, recipes=["nope"])
    with pytest.raises(SpecError, match=r"objective\.max_drop"):
        flow.with_choices(SPEC, max_drop=-1)


def test_stopping_early_never_skips_the_report() -> None:
    assert flow.skipped_stages("none") == ()
    assert flow.skipped_stages("accuracy_validation") == ("small_scale_test", "full_rollout")
    assert flow.skipped_stages("small_scale_test") == ("full_rollout",)


def test_runs_of_two_specs_with_the_same_id_do_not_share_a_folder(home: object) -> None:
    here = Home.from_environment()
    assert flow.run_folder(here, "a", "source-v1") != flow.run_folder(here, "b", "source-v1")
