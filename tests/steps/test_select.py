import json
from collections.abc import Callable

import mlflow
import pytest
from tests.steps.stages import FAIL, World, WorldMaker, failing, validated

from slipstream.contract import Verdict
from slipstream.contract.evidence import Row
from slipstream.errors import DataError, GateFailed
from slipstream.steps import select
from slipstream.steps.choice import Choice

OPEN = Verdict(gate="latency", answer="inconclusive", reason="12 queries are too few")


@pytest.fixture
def upstream(world: World) -> Callable[..., tuple]:
    """Outputs of a whole stage 1; a recipe given as None is missing."""

    def make(**cells: dict | None) -> tuple:
        given = {"baseline": {"p50_ms": 3.0}, "int8": {"p50_ms": 1.0}, "small": {"p50_ms": 2.0}} | cells
        found = [validated(recipe, **figures) for recipe, figures in given.items() if figures is not None]
        return (*found, *(world.built(recipe) for recipe in given))

    return make


def pick(rows: list[Row], prefer: str) -> str | None:
    """The best without a race: these engines are folders that cannot be loaded."""
    choice = Choice(prefer, 0.95, {r.cell: r for r in rows}, None)
    return choice.best(choice.entrants)


def test_the_best_passing_engine_becomes_the_challenger(world: World, upstream: Callable[..., tuple]) -> None:
    context = world.context("select", upstream())
    output = select.run(context)
    version = world.registry.alias("challenger")
    assert output.details["version"] == version
    assert {k: output.details[k] for k in ("winner", "champion", "already_champion", "missing")} == {
        "winner": "int8@server",
        "champion": None,
        "already_champion": False,
        "missing": [],
    }
    assert output.details["best_per_target"] == {"server": "int8@server"}
    rows = {r["cell"]: (r["status"], r["release"]) for r in output.details["rows"]}
    assert rows == {
        "baseline@server": ("reference", False),
        "int8@server": ("passed", True),
        "small@server": ("passed", False),
    }
    tags = world.registry.tags(version)
    assert tags["slipstream.sha256"] == world.engine("int8").sha256
    assert tags["slipstream.pipeline_run"] == "p-run-1"
    assert tags["slipstream.validate.accuracy"].startswith("pass: drop 0.1")
    assert world.registry.artifact(version) == world.engine("int8")
    assert world.registry.description(version).startswith("**int8@server**: top1 ")
    assert "by pipeline run `run-1`" in world.registry.description(version)


def test_a_repeated_step_registers_nothing_new(world: World, upstream: Callable[..., tuple]) -> None:
    first, second = (select.run(world.context("select", upstream())) for _ in range(2))
    assert first.details == second.details


def test_a_missing_cell_is_listed_and_never_passes(world: World, upstream: Callable[..., tuple]) -> None:
    output = select.run(world.context("select", upstream(int8=None)))
    assert output.details["missing"] == ["int8@server"]
    assert output.details["winner"] == "small@server"
    assert [r["status"] for r in output.details["rows"]] == ["reference", "missing", "passed"]


def test_chosen_recipes_bound_what_is_expected(world: World, upstream: Callable[..., tuple]) -> None:
    output = select.run(world.context("select", upstream(int8=None), recipes=["small"]))
    assert output.details["missing"] == []
    assert [r["cell"] for r in output.details["rows"]] == ["baseline@server", "small@server"]


def test_nothing_passes_and_every_engine_has_its_reason(world: World, upstream: Callable[..., tuple]) -> None:
    context = world.context("select", upstream(int8={"verdict": FAIL}, small={"verdict": OPEN}))
    message = failing(lambda: select.run(context), GateFailed)
    assert "int8@server: rejected: accuracy: drop 3.1 points" in message
    assert "small@server: inconclusive: latency: 12 queries" in message
    assert world.registry.alias("challenger") is None
    rows = mlflow.artifacts.load_dict(f"runs:/{context.run.run_id}/rows.json")
    assert [r["status"] for r in rows] == ["reference", "rejected", "inconclusive"]


def test_a_limit_that_was_not_judged_holds_the_release_unless_a_person_waives_it(world_maker: WorldMaker) -> None:
    """A p99 limit of 20 ms was once measured as 51 on a busy machine, set aside, and the engine released."""
    word = {"gate": "latency", "by": "Ann Smith", "reason": "measured on the target itself"}
    for until, passes in (("2020-01-01", False), ("2999-01-01", True)):
        world = world_maker(guardrails={"waivers": [word | {"until": until}]})
        outputs = (validated("baseline"), validated("int8", verdict=OPEN), validated("small", verdict=FAIL))
        context = world.context("select", (*outputs, *(world.built(r) for r in ("baseline", "int8", "small"))))
        if not passes:
            assert "int8@server: inconclusive: latency: 12 queries" in failing(
                lambda c=context: select.run(c), GateFailed
            )
            continue
        output = select.run(context)
        [verdict] = next(r for r in output.details["rows"] if r["cell"] == "int8@server")["verdicts"]
        assert output.details["winner"] == "int8@server"
        assert verdict["reason"].startswith("waived by Ann Smith until 2999-01-01 (measured on the target itself); not")


def test_no_evidence_at_all_is_no_pass(world: World) -> None:
    message = failing(lambda: select.run(world.context("select", ())), GateFailed)
    assert message.count("missing") == 3


@pytest.mark.parametrize(
    ("prefer", "winner"),
    [("latency", "int8"), ("throughput", "int8"), ("size", "small"), ("accuracy", "small")],
)
def test_the_objective_says_which_is_best(world_maker: WorldMaker, prefer: str, winner: str) -> None:
    spec = world_maker(objective={"prefer": prefer}).spec
    rows = select.table(
        spec,
        world_maker()
        .context(
            "select",
            (
                validated("baseline", p50_ms=0.1, size=1, quality=99),
                validated("int8", p50_ms=1.0, size=900, quality=90),
                validated("small", p50_ms=2.0, size=500, quality=90.5),
            ),
        )
        .inputs,
    )
    assert pick(rows, prefer) == f"{winner}@server"


@pytest.mark.parametrize("prefer", ["latency", "throughput"])
def test_what_a_slower_moment_of_the_machine_adds_does_not_count(world_maker: WorldMaker, prefer: str) -> None:
    """Measured while everything took twice as long, the faster engine has the greater latency, not the smaller gain."""
    slow_moment = validated("int8", p50_ms=2.4, eager_ms=10.0)
    upstream = (validated("baseline", p50_ms=3.0), slow_moment, validated("small", p50_ms=2.0, eager_ms=5.0))
    world = world_maker()
    assert pick(select.table(world.spec, world.context("select", upstream).inputs), prefer) == "int8@server"


def test_the_engine_that_serves_already_is_not_registered_again(world: World, upstream: Callable[..., tuple]) -> None:
    champion = world.version("int8")
    world.registry.set_alias("champion", champion)
    output = select.run(world.context("select", upstream()))
    assert output.details["already_champion"] is True
    assert (output.details["version"], output.details["champion"]) == (champion, champion)
    assert world.registry.alias("challenger") is None


def test_evidence_without_its_engine_is_an_error(world: World) -> None:
    outputs = (validated("baseline"), validated("int8"), validated("small", verdict=FAIL))
    assert "int8@server" in failing(lambda: select.run(world.context("select", outputs)), DataError)


def test_the_table_is_json(world: World, upstream: Callable[..., tuple]) -> None:
    json.dumps(select.run(world.context("select", upstream())).details)


def test_an_engine_for_comparison_is_never_the_release_however_fast(world_maker: WorldMaker) -> None:
    targets = {"server": {"engine": "openvino"}, "torch": {"engine": "torch", "options": {"mode": "eager"}}}
    world = world_maker(targets=targets)
    fast = validated("small", target="torch", p50_ms=0.01)
    outputs = (validated("int8", p50_ms=3.0), fast, validated("small", verdict=FAIL), world.built("int8"))
    output = select.run(world.context("select", outputs))
    assert output.details["winner"] == "int8@server"
    assert output.details["best_per_target"]["torch"] == "small@torch"
    assert [r["cell"] for r in output.details["rows"] if r["cell"].endswith("@torch")] == [
        "baseline@torch",
        "small@torch",
    ], "what is quantized has no PyTorch engine, and is not missed"
    assert "is the best of 1 passing engines" in output.verdicts[0].reason
    assert "measured for comparison" in output.details["comparison_only"]["small@torch"]
    alone = (fast, validated("int8", verdict=FAIL), validated("small", verdict=FAIL))
    message = failing(lambda: select.run(world.context("select", alone, run_key="run-2")), GateFailed)
    assert "small@torch: passed: engine torch is measured for comparison; no model server runs it" in message
