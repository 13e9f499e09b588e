"""The benchmark's page, from figures made up here."""

from slipstream.contract.evidence import Interval, Latency, Noise
from slipstream.tools.bench import Bench, Subject, page


def subject(name: str, p50_ms: float, status: str, **figures: object) -> Subject:
    latency = Latency(scenario="SingleStream", n=800, p50_ms=p50_ms, p99_ms=2 * p50_ms, rate_per_s=1e3 / p50_ms)
    return Subject.model_validate({"name": name, "latency": latency, "quality": 91.5, "status": status, **figures})


def bench(*subjects: Subject, crowded: bool = False, clean: int = 8) -> Bench:
    return Bench(
        spec="hats",
        run="run-1",
        date="2026-01-02",
        framework="torch",
        metric="map",
        confidence=0.95,
        engines={"server": "openvino", "edge": "litert", "torch": "torch"},
        machine={},
        hardware="A CPU, 2 cores",
        versions={"openvino": "1.2.3"},
        noise=Noise(clean_rounds=clean, rounds=8, others_cores=0.1),
        crowded=crowded,
        subjects=(subject("torch eager FP32", 2.0, ""), *subjects),
    )


FULL = {
    "drop_pp": Interval(estimate=0.4, low=0.1, high=0.7),
    "size_bytes": 94_000,
    "peak_memory_mib": 31.4,
    "speedup_eager": Interval(estimate=14.7, low=14.5, high=16.0),
    "speedup_reference": Interval(estimate=1.47, low=1.4, high=1.61),
}


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]


def test_the_overview_names_the_fastest_recipe_that_passed_or_says_that_none_did() -> None:
    text = page.render(
        [
            bench(
                subject("baseline@server", 0.4, "reference"),
                subject("int8@server", 0.2, "passed", **FULL),
                subject("pruned@server", 0.3, "passed"),
                subject("tiny@server", 0.1, "rejected"),
                subject("baseline@edge", 0.5, "reference"),
                subject("int8@edge", 0.4, "inconclusive"),
                subject("baseline@torch", 0.6, "reference"),
            )
        ]
    )
    overview = rows(text.split("## ")[0])
    assert overview[1] == [
        "hats", "mAP", "openvino (server)", "int8", "91.50", "+0.40 (+0.70)", "0.200", "14.70 (14.50 to 16.00)",
        "1.47 (1.40 to 1.61)", "94 kB", "31", "passed",
    ]  # fmt: skip
    assert overview[2][2:4] == ["litert (edge)", "baseline (no recipe passed)"]
    assert overview[3][2:4] == ["torch (torch)", "baseline"]  # none was tried
    names = [row[0] for row in rows(text.split("## ")[1])][1:]
    assert names[:2] == ["torch eager FP32", "baseline@server"] and names[-2] == "int8@edge" and len(names) == 8


def test_it_says_how_quiet_the_machine_was() -> None:
    only = subject("baseline@server", 0.4, "reference")
    assert "8 of 8 judged rounds were quiet. Machine: A CPU, 2 cores" in page.render([bench(only)])
    assert "3 of 8 judged rounds were quiet; in the others" in page.render([bench(only, clean=3)])
    assert "not MLPerf results" in page.render([bench(only)])
    assert "so no ratios are given" in page.render([bench(only, clean=3, crowded=True)])


def test_models_come_by_name() -> None:
    caps = bench(subject("baseline@server", 0.4, "reference")).model_copy(update={"spec": "caps"})
    text = page.render([bench(), caps])
    assert text.index("## caps") < text.index("## hats")
