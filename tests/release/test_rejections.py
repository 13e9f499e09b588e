"""A rejection holds by digest, over versions and runs, until a person lifts it."""

import pytest
from tests.release.ready import BREACH, ERRORS, Ready, measure
from tests.steps.stages import PASS, failing, validated

from slipstream.errors import GateFailed, RegistryError
from slipstream.release import rejections
from slipstream.steps import select

OPEN = PASS.model_copy(update={"gate": "p99_ratio", "answer": "inconclusive", "reason": "too few for a p99"})


def refused_by_trial(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, lambda: BREACH)
    failing(ready.tried, GateFailed)


def refused_by_rollout(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, lambda: BREACH)
    failing(ready.rolled_out, GateFailed)


def released_and_rolled_back(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, lambda: ERRORS)
    ready.rolled_out()
    ready.rolled_back(reason="customers complain")


REFUSALS = [refused_by_trial, refused_by_rollout, released_and_rolled_back]
STAGES = {"refused_by_trial": "trial", "refused_by_rollout": "rollout", "released_and_rolled_back": "rollback"}


@pytest.mark.parametrize("refuse", REFUSALS, ids=STAGES.values())
def test_the_same_bytes_are_not_tried_again_by_the_next_run(
    ready: Ready, monkeypatch: pytest.MonkeyPatch, refuse: object
) -> None:
    assert callable(refuse)
    refuse(ready, monkeypatch)
    measure(monkeypatch, lambda: ERRORS)  # a second draw would pass
    before = ready.aliases()
    message = failing(lambda: ready.selected(run_key="run-2"), GateFailed)
    stage = STAGES[refuse.__name__]
    assert f"int8@server: rejected: rejection: version {ready.new} (sha256 " in message, message
    assert f"was rejected in the {stage} by " in message
    assert f"slipstream allow {ready.world.model} {ready.new} --reason" in message
    assert ready.aliases() == before
    assert f"was rejected in the {stage}" in failing(
        lambda: ready.tried(run_key="run-2"), (GateFailed, RegistryError)[0]
    )
    ready.settled()


def test_the_next_best_passing_engine_wins_instead(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    refused_by_trial(ready, monkeypatch)
    outputs = (
        validated("int8", p50_ms=1.0),
        validated("small", p50_ms=2.0),
        ready.outputs[1],
        ready.world.built("small"),
    )
    output = select.run(ready.world.context("select", outputs, "run-2"))
    assert output.details["winner"] == "small@server"
    statuses = {r["cell"]: r["status"] for r in output.details["rows"]}
    assert (statuses["int8@server"], statuses["small@server"]) == ("rejected", "passed")
    assert "is the best of 1 passing engines" in output.verdicts[0].reason


def test_what_is_inconclusive_is_not_rejected(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, lambda: OPEN)
    failing(ready.tried, GateFailed)
    failing(lambda: ready.rolled_out(run_key="run-2"), GateFailed)
    assert rejections.all_of(ready.world.registry) == []
    ready.reverted()
    measure(monkeypatch, lambda: ERRORS)
    failing(lambda: ready.rolled_out(run_key="run-2"), GateFailed)  # the same run does not draw twice
    ready.rolled_out(run_key="run-3")
    assert ready.world.registry.champion() == ready.new


def test_a_person_lifts_it_and_the_record_stays(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    refused_by_rollout(ready, monkeypatch)
    registry, sha256 = ready.world.registry, ready.world.engine("int8").sha256
    lifted = rejections.allow(registry, ready.new, "alice", "the neighbor was at fault")
    assert rejections.active(registry) == {}
    assert [r.lifted for r in rejections.all_of(registry)] == [lifted.lifted]
    assert "lifted by alice" in lifted.sentence() and "the neighbor was at fault" in lifted.sentence()
    measure(monkeypatch, lambda: ERRORS)
    version = ready.selected(run_key="run-2").details["version"]
    assert ready.aliases()[2] == version
    rejections.reject(registry, version, "rollout", "again", "run-2")
    [record] = rejections.all_of(registry)
    assert (record.sha256, record.reason, record.lifted) == (sha256, "again", None)
    assert [e.startswith(f"version {ready.new} ") for e in record.earlier] == [True]


def test_every_version_of_the_bytes_shows_it(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = ready.world.registry
    twin = registry.register(ready.world.engine("int8"), "int8@server", "run-of-twin", (PASS,))
    registry.describe(twin, "INT8, 3.1 times as fast")
    refused_by_trial(ready, monkeypatch)
    for _ in range(2):
        rejections.reject(registry, ready.new, "trial", "errors: 28 of 500 requests failed", "run-1")
        for version in (ready.new, twin):
            assert registry.tags(version)[rejections.MARK].startswith("yes: errors: 28 of 500")
        assert registry.description(twin).startswith(f"Rejected: version {ready.new} ")
        assert registry.description(twin).endswith("INT8, 3.1 times as fast")
    rejections.allow(registry, ready.world.engine("int8").sha256[:10], "alice", "mended")
    assert registry.tags(twin)[rejections.MARK] == "no, lifted"
    assert registry.description(twin).count("\n\n") == 1
    assert registry.description(twin).startswith("Allowed again: version ")


def test_a_record_fits_into_a_tag(ready: Ready) -> None:
    for number in range(6):
        rejections.reject(ready.world.registry, ready.new, "trial", f"{number}: " + "x" * 9000, "run-1")
        rejections.allow(ready.world.registry, ready.new, "alice", "y" * 9000)
    [text] = [v for k, v in ready.world.registry.model_tags().items() if k.startswith(rejections.PREFIX)]
    assert len(text) <= 5000


@pytest.mark.parametrize("what", ["3", "99", "deadbeef", "abc"])
def test_what_was_not_rejected_cannot_be_allowed(ready: Ready, what: str) -> None:
    failing(lambda: rejections.allow(ready.world.registry, what, "alice", "because"), RegistryError)
