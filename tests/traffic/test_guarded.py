import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.steps.stages import make_spec

from slipstream.data import Split
from slipstream.traffic.base import Observation, Release, Routes
from slipstream.traffic.fake import Behaviour, FakeController
from slipstream.traffic.guarded import Guard, Stage, windows
from slipstream.traffic.load import Record, Sent

CHAMPION, CHALLENGER = Release(model="net", name="v1"), Release(model="net", name="v2")
SPLIT = Split(np.zeros((8, 10), np.float32), np.zeros(8, np.int64))
QUIET = Observation(0, 0, 100.0)


def record(ms: float = 1.0, *, failed: bool = False, release: str | None = "v2", stalled: float = 0.0) -> Record:
    output = None if failed else np.zeros((1, 10), np.float32)
    return Record("r", 0, 0.0, 503 if failed else 200, release, output, ms, stalled)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    fake = FakeController(tmp_path)
    for release in (CHAMPION, CHALLENGER):
        fake.deploy(release, tmp_path)
    limits = {"max_error_rate": 1, "max_p99_ms": 250}
    spec = make_spec(tmp_path, "net", guardrails=limits, objective={"confidence": 0.95})
    yield Stage(spec, fake, SPLIT, CHAMPION, CHALLENGER, "run")
    fake.close()


@pytest.fixture
def patient(stage: Stage, tmp_path: Path) -> Stage:
    """For real loads: on a busy machine everybody's p99 is over 250 ms."""
    return replace(stage, spec=make_spec(tmp_path, "net", guardrails={"max_p99_ms": 20_000, "max_error_rate": 1}))


def guard(stage: Stage, planned: int = 125, *, shadow: bool = False) -> Guard:
    return Guard(stage, QUIET, planned, 500, shadow=shadow)


def test_the_first_odd_request_is_no_breach_but_certainty_is(stage: Stage) -> None:
    watch = guard(stage)
    assert watch([record(failed=True)]) is None
    reason = watch([*[record()] * 20, *[record(failed=True)] * 6])
    assert "requests failed" in str(reason)
    assert watch.breach is not None
    assert (watch.breach.gate, watch.breach.answer) == ("errors", "fail")


def test_a_request_that_nobody_answered_counts_and_the_champions_does_not(stage: Stage) -> None:
    assert guard(stage)([record(failed=True, release=None)] * 10) is not None
    assert guard(stage)([record(failed=True, release="v1")] * 10) is None


def test_a_failure_that_only_a_user_saw_counts_too(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, users = guard(stage), Observation(400, 20, 100.0)
    monkeypatch.setattr(stage.controller, "observe", lambda release: users)
    assert "20 of 400 requests failed" in str(watch([record()] * 20))
    assert (watch.count.errors, watch.count.requests) == (20, 400)


def test_one_hiccup_is_no_breach_of_the_cap_and_many_slow_answers_are(stage: Stage) -> None:
    assert guard(stage)([record(900)] * 5) is None
    assert "limit 250 ms" in str(guard(stage)([record(900)] * 20))


def test_the_senders_own_stalls_are_not_held_against_the_server(stage: Stage) -> None:
    assert guard(stage)([record(900, stalled=800)] * 20) is None


def test_memory_is_a_breach_at_once(stage: Stage) -> None:
    stage.controller.misbehave(CHALLENGER, Behaviour(memory_mib=5000))  # type: ignore[attr-defined]  # the fake has it
    watch = guard(stage)
    assert "5000 MiB, limit 4096 MiB" in str(watch([]))
    assert watch.breach is not None
    assert watch.breach.gate == "memory"


def test_a_failing_shadow_is_seen_though_no_client_is_told(patient: Stage) -> None:
    patient.controller.misbehave(CHALLENGER, Behaviour(error_rate=1.0))  # type: ignore[attr-defined]  # the fake has it
    begun = time.monotonic()
    phase = patient.phase("shadow", patient.weights(0, mirror=True), 3000, 200)
    assert phase.breach is not None
    assert phase.breach.gate == "errors"
    assert not any(r.failed for r in phase.records)
    assert time.monotonic() - begun < 10  # the whole load takes 15 s


def test_copies_that_fail_on_the_way_are_errors_of_the_shadow(stage: Stage) -> None:
    lost = replace(record(release="v1"), mirrored=record(failed=True, release=None))
    kept = replace(record(release="v1"), mirrored=record())
    assert guard(stage, shadow=True)([kept] * 20) is None
    assert "requests failed" in str(guard(stage, shadow=True)([*[kept] * 20, *[lost] * 6]))


def test_a_phase_leaves_its_routes_and_put_back_takes_them_away(patient: Stage) -> None:
    phase = patient.phase("canary", patient.weights(50), 60, 300)
    assert phase.breach is None
    assert {r.release for r in phase.records} == {"v1", "v2"}
    assert patient.controller.routes("net") == patient.weights(50)
    patient.put_back()
    assert patient.controller.routes("net") == patient.weights(0)


def test_traffic_that_somebody_else_moved_meanwhile_is_left_alone(patient: Stage, tmp_path: Path) -> None:
    elsewhere = Routes(weights={"v0": 100})
    patient.controller.deploy(Release(model="net", name="v0"), tmp_path)
    patient.controller.set_routes("net", elsewhere)
    patient.put_back()
    assert patient.controller.routes("net") == elsewhere


def test_the_timeline_has_few_points_and_no_percentile_from_too_few_requests() -> None:
    def points(n: int) -> list[dict]:
        records = [Record("r", 0, float(i), 200, "v1", np.zeros((1, 1), np.float32), float(i % 100)) for i in range(n)]
        return windows("25%", 25, Sent(records))

    [small] = points(100)
    assert (small["p50_ms"], small["p99_ms"], small["requests"]) == (49.5, None, 100)
    assert [p["requests"] for p in points(1200)] == [500, 500, 200]
    assert points(500)[0]["p99_ms"] == pytest.approx(98, abs=1)
    assert len(points(60_000)) == 10
    assert points(0) == []


def test_a_machine_that_carries_the_rate_keeps_it(patient: Stage) -> None:
    patient.controller.set_routes("net", patient.weights(0))
    patient.probe(300)
    assert (patient.slowdown, patient.notes) == (1, [])


def test_a_machine_that_cannot_carry_the_rate_gets_less(stage: Stage) -> None:
    stage.controller.misbehave(CHAMPION, Behaviour(latency_s=0.4))  # type: ignore[attr-defined]  # the fake has it
    stage.controller.set_routes("net", stage.weights(0))
    stage.probe(1600)
    assert stage.slowdown == 8
    assert "200/s" in stage.notes[0]


def test_the_cap_gives_way_to_the_champions_own_p99_and_only_under_noise(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.champion_phases += [[record(3, release="v1")] * 100, [record(300, release="v1")] * 100]
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.1, 0.1))
    assert stage.cap_ms() == 250
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.1, 0.1))
    assert stage.cap_ms() == 300 * stage.spec.guardrails.max_p99_ratio
    assert "instead of 250 ms" in stage.adapted()[-1]
    stage.champion_phases.pop()
    assert stage.cap_ms([record(200, release="v1")] * 50) == 200 * stage.spec.guardrails.max_p99_ratio
    assert stage.cap_ms([record(900)] * 50) == 250  # the challenger's own slowness never raises it
