from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.steps.stages import make_spec

from slipstream.contract import Release, Verdict
from slipstream.data.splits import Split
from slipstream.traffic import guarded
from slipstream.traffic.base import Observation, Routes
from slipstream.traffic.fake import Behaviour, FakeController
from slipstream.traffic.guard import Count, Guard, Tally, block_peaks
from slipstream.traffic.guarded import Stage, windows
from slipstream.traffic.load import Record, Sent

CHAMPION, CHALLENGER = Release(model="net", name="v1"), Release(model="net", name="v2")
SPLIT = Split(np.zeros((8, 10), np.float32), np.zeros(8, np.int64))


class Quiet:
    """Stands for a machine without other work."""

    def share(self) -> float:
        return 0.0


class Crowded:
    """Stands for a machine that others use."""

    def share(self) -> float:
        return 0.97


def records(n: int, release: str | None = "v2", status: int = 200, ms: float = 1.0, first: int = 0) -> list[Record]:
    output = np.zeros((1, 10), np.float32) if status == 200 else None
    return [Record(f"r-{first + i}", 0, 0.0, status, release, output, ms) for i in range(n)]


def both(n: int, *, failed: int = 0, champion_failed: int = 0, status: int = 500) -> list[Record]:
    """n requests to each release in turn, of which the first so many fail."""
    sides = (
        [*records(champion_failed, "v1", status), *records(n - champion_failed, "v1")],
        [*records(failed, "v2", status), *records(n - failed, "v2")],
    )
    mixed = [record for pair in zip(*sides, strict=True) for record in pair]
    return [replace(record, id=f"r-{i}") for i, record in enumerate(mixed)]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    fake = FakeController(tmp_path)
    for release in (CHAMPION, CHALLENGER):
        fake.deploy(release, tmp_path)
    limits = {"max_error_rate": 1, "max_p99_ms": 250, "max_p99_ratio": 2}
    spec = make_spec(tmp_path, "net", guardrails=limits, objective={"confidence": 0.95})
    yield Stage(spec, fake, SPLIT, CHAMPION, CHALLENGER, "run", meter=Quiet())  # type: ignore[arg-type]  # a stand-in
    fake.close()


@pytest.fixture
def patient(stage: Stage, tmp_path: Path) -> Stage:
    """For real loads: on a busy machine everybody's p99 is over 250 ms."""
    limits = {"max_p99_ms": 20_000, "max_error_rate": 1, "max_p99_ratio": 1000}
    return replace(stage, spec=make_spec(tmp_path, "net", guardrails=limits))


def look(stage: Stage, found: list[Record], share: int = 50) -> Verdict | None:
    """The breach, if any, after a fourth look at these records, which looks at latencies too."""
    guard = Guard(stage, stage.weights(share))
    for end in (len(found) // 4, len(found) // 2, 3 * len(found) // 4, len(found)):
        guard(found[:end])
    return guard.breach


def answer(stage: Stage, found: list[Record], share: int = 50) -> tuple[str, str] | None:
    breach = look(stage, found, share)
    return None if breach is None else (breach.gate, breach.answer)


def test_a_few_odd_requests_are_no_breach_but_certainty_is(stage: Stage) -> None:
    assert answer(stage, both(100, failed=3)) is None
    stage.seen.tally.rows.clear()
    assert answer(stage, both(100, failed=15)) == ("errors", "fail")


def test_a_malformed_request_fails_on_both_and_ends_nothing(stage: Stage) -> None:
    """Hostile requests: 15 % of what both get is a status 500, from either release."""
    assert answer(stage, both(200, failed=30, champion_failed=30)) is None
    assert stage.errors().answer != "fail"


@pytest.mark.parametrize("champion_failed", [0, 57])
def test_three_hostile_requests_to_the_challenger_end_no_canary(stage: Stage, champion_failed: int) -> None:
    """The splitter deals a client's malformed requests as it deals all others; and even if the challenger got all."""
    mixed = [*records(1900 - champion_failed, "v1"), *records(champion_failed, "v1", 500)]
    mixed += [*records(97, "v2"), *records(3, "v2", 500)]
    order = np.random.default_rng(0).permutation(2000)
    found = [replace(mixed[j], id=f"r-{i}") for i, j in enumerate(order)]
    assert answer(stage, found, 5) is None


def test_a_request_without_an_answer_is_nobodys(stage: Stage) -> None:
    lost = records(20, None, 0, first=4000)
    assert answer(stage, [*both(1000), *lost]) is None
    stage.seen.requests, stage.seen.unanswered = 2020, 20
    assert stage.outage() is None
    stage.seen.unanswered = 40
    assert "an outage: 40 of 2,020" in str(stage.outage())
    assert stage.errors().answer == "inconclusive"


def test_a_challenger_that_swallows_requests_is_noticed(stage: Stage) -> None:
    swallowed = [r for pair in zip(records(300, "v1"), records(300, None, 0), strict=True) for r in pair]
    breach = look(stage, [replace(r, id=f"r-{i}") for i, r in enumerate(swallowed)])
    assert breach is not None
    assert (breach.gate, breach.answer) == ("errors", "fail")
    assert "300 of 600 requests got no answer" in breach.reason


def test_the_champions_failures_are_not_the_challengers(stage: Stage) -> None:
    assert answer(stage, both(100, champion_failed=15)) is None
    down = Tally()
    down.add(Count(40, 50, 40), Count(30, 50, 30))
    assert (down.rows, down.outage) == ([], 100)


def test_a_crowd_is_no_failure_but_a_wrong_computation_is(stage: Stage) -> None:
    """503 and 504 may be the machine's; a status 500 is the model server's own."""
    stage.meter = Crowded()  # type: ignore[assignment]  # a stand-in
    breach = look(stage, both(100, failed=30, status=504))
    assert breach is not None
    assert (breach.gate, breach.answer) == ("errors", "inconclusive")
    assert "97 % of the time" in breach.reason
    stage.seen.tally.rows.clear()
    assert answer(stage, both(100, failed=30, status=500)) == ("errors", "fail")
    stage.meter = Quiet()  # type: ignore[assignment]  # a stand-in
    stage.seen.tally.rows.clear()
    assert answer(stage, both(100, failed=30, status=504)) == ("errors", "fail")


def test_refusals_of_overloaded_servers_reject_nothing(stage: Stage) -> None:
    """Both refuse: nothing to see. The challenger alone: undecided, and tested again when there is less to do."""
    refused = [replace(r, refused=r.status == 429) for r in both(200, failed=40, champion_failed=40, status=429)]
    assert answer(stage, refused) is None
    stage.seen.tally.rows.clear()
    alone = [replace(r, refused=r.status == 429) for r in both(200, failed=40, status=429)]
    assert answer(stage, alone) == ("errors", "inconclusive")
    assert "refused 10 % of the requests" in str(stage.crowd(alone))


def test_a_failure_that_only_a_user_saw_counts_too(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"v1": Observation(400, 0, 100.0), "v2": Observation(400, 20, 100.0)}
    guard = Guard(stage, stage.weights(50))
    monkeypatch.setattr(stage.controller, "observe", lambda release: counted[release.name])
    assert "20 of 400 requests failed" in str(guard(both(20)))


def test_the_cap_holds_for_the_challengers_own_answers(stage: Stage) -> None:
    slow = [*records(950, "v1"), *records(50, "v2", ms=300)]
    order = np.random.default_rng(0).permutation(1000)
    assert answer(stage, [replace(slow[j], id=f"r-{i}") for i, j in enumerate(order)], 5) in (
        ("p99_cap", "fail"),
        ("p99_ratio", "fail"),
    )
    assert answer(stage, [*records(300, "v2"), *records(5, "v2", ms=900, first=300)], 100) is None


def test_a_cap_that_the_champion_breaks_too_cannot_be_judged(stage: Stage) -> None:
    slow = [replace(r, latency_ms=300.0) for r in both(300)]
    breach = look(stage, slow)
    assert breach is not None
    assert (breach.gate, breach.answer) == ("p99_cap", "inconclusive")
    assert "the champion takes longer than 250 ms in 100.0 % too" in breach.reason


def test_the_senders_own_stalls_are_not_held_against_the_server(stage: Stage) -> None:
    found = [replace(r, latency_ms=900.0, stalled_ms=800.0) for r in both(200)]
    assert answer(stage, found) is None
    assert "the sender itself was stalled in 100 %" in str(stage.crowd(found))


def test_three_times_the_champions_latency_stops_a_step(stage: Stage) -> None:
    rng = np.random.default_rng(0)
    ms = rng.lognormal(1.5, 0.4, 2000)
    found = [replace(r, latency_ms=float(ms[i] * (3 if r.release == "v2" else 1))) for i, r in enumerate(both(500))]
    assert answer(stage, found) == ("p99_ratio", "fail")
    same = [replace(r, latency_ms=float(ms[i])) for i, r in enumerate(both(500))]
    assert answer(replace(stage), same) is None


def test_blocks_need_all_their_answers() -> None:
    found = both(60)
    assert [row[1::2] for row in block_peaks(found, "v1", "v2")] == [[25, 25], [25, 25]]
    assert len(block_peaks(found[1:], "v1", "v2")) == 1
    assert block_peaks(records(200, "v2"), "v1", "v2") == []


def test_memory_is_a_breach_at_once(stage: Stage) -> None:
    stage.controller.misbehave(CHALLENGER, Behaviour(memory_mib=5000))  # type: ignore[attr-defined]  # the fake has it
    assert "5000 MiB" in look(stage, []).reason  # type: ignore[union-attr]  # it is a breach


def test_memory_is_compared_with_the_champions(stage: Stage) -> None:
    stage.controller.misbehave(CHAMPION, Behaviour(memory_mib=400))  # type: ignore[attr-defined]  # the fake has it
    stage.controller.misbehave(CHALLENGER, Behaviour(memory_mib=790))  # type: ignore[attr-defined]  # the fake has it
    assert answer(stage, both(10)) is None
    stage.controller.misbehave(CHALLENGER, Behaviour(memory_mib=900))  # type: ignore[attr-defined]  # the fake has it
    assert answer(stage, both(10)) == ("memory", "fail")


def test_a_failing_shadow_is_seen_though_no_client_is_told(patient: Stage) -> None:
    patient.controller.misbehave(CHALLENGER, Behaviour(error_rate=1.0))  # type: ignore[attr-defined]  # the fake has it
    phase = patient.phase("shadow", patient.weights(0, mirror=CHALLENGER), 3000, 200)
    assert phase.breach is not None
    assert phase.breach.gate == "errors"
    assert not any(r.failed for r in phase.records)
    assert len(phase.records) < 2500


def test_copies_that_fail_on_the_way_are_errors_of_the_shadow(stage: Stage) -> None:
    kept = [replace(r, mirrored=replace(r, release="v2")) for r in records(100, "v1")]
    lost = [replace(r, mirrored=records(1, None, 0)[0]) for r in records(30, "v1", first=100)]
    guard = Guard(stage, stage.weights(0, mirror=CHALLENGER))
    assert guard(kept) is None
    assert "requests failed" in str(guard([*kept, *lost]))


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
        found = [Record("r-0", 0, float(i), 200, "v1", np.zeros((1, 1), np.float32), float(i % 100)) for i in range(n)]
        return windows("25%", 25, Sent(found))

    [small] = points(100)
    assert (small["p50_ms"], small["p99_ms"], small["requests"]) == (49.5, None, 100)
    assert [p["requests"] for p in points(1200)] == [500, 500, 200]
    assert points(500)[0]["p99_ms"] == pytest.approx(98, abs=1)
    assert len(points(60_000)) == 10
    assert points(0) == []


def test_a_machine_that_carries_the_rate_keeps_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a quiet machine answers, whatever this one does."""
    monkeypatch.setattr(guarded, "send", lambda *given: Sent(records(200, "v1", ms=3)))
    stage.probe(300)
    assert (stage.slowdown, stage.notes) == (1, [])


def test_a_machine_that_cannot_carry_the_rate_gets_less(stage: Stage) -> None:
    stage.controller.misbehave(CHAMPION, Behaviour(latency_s=0.4))  # type: ignore[attr-defined]  # the fake has it
    stage.controller.set_routes("net", stage.weights(0))
    stage.probe(1600)
    assert stage.slowdown == 8
    assert "200/s" in stage.notes[0]


def test_a_retest_happens_once_and_never_after_a_certain_failure(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "probe", lambda stage, rate_per_s: None)
    certain = Verdict(gate="errors", answer="fail", reason="30 of 100 requests failed")
    open_one = certain.model_copy(update={"answer": "inconclusive"})
    assert not stage.retest(certain, 100)
    stage.seen.crowds.append("it was crowded")
    assert stage.retest(open_one, 100)
    assert (stage.seen.crowds, stage.notes) == ([], ["tested again, since 30 of 100 requests failed"])
    assert not stage.retest(open_one, 100)


def test_windows_are_as_large_as_an_outage_needs() -> None:
    tally = Tally()
    for n in range(0, 60, 6):
        tally.add(Count(0, n), Count(0, n // 2))
    tally.add(Count(0, 55), Count(1, 28), last=True)
    assert [(a.requests, b.requests) for a, b in tally.rows] == [(24, 12), (24, 12), (7, 4)]
