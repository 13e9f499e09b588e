"""Simulate stages 2 and 3 with the product's own loops, and print how often each kind of challenger is released.

    $ .envs/serve/bin/python scripts/simulate.py             # the table in docs/gates.md: an hour on two cores
    $ .envs/serve/bin/python scripts/simulate.py --sims 20 identical

Only sending is replaced: latencies and errors come from seeded streams instead of servers. The streams resemble what a
slipstream server shows: log-latencies with an autocorrelation of 0.7, bursts of eight slow requests on average, a p99
of 19 ms. Each engine has a stream of its own; what hits both at once makes every test here easier.
"""

import argparse
import itertools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import lfilter

from slipstream import spec as specs
from slipstream.contract import Release, combine
from slipstream.data.splits import Split
from slipstream.spec import Spec
from slipstream.traffic import guarded, small_scale, stepwise
from slipstream.traffic.base import Endpoint, Observation, Routes
from slipstream.traffic.guarded import Stage
from slipstream.traffic.load import Load, Record, Sent, Watch

Floats = np.ndarray[Any, np.dtype[np.float64]]
LOOK_S = 1.0
"""Simulated time between two looks of the guard. The product looks four times as often, at the same evidence."""
SAMPLES = 10_000


@dataclass(frozen=True)
class Engine:
    """How a simulated release answers."""

    stream: str = "bursts"
    """`iid`, `light` (autocorrelated) or `bursts`."""
    scale: float = 1.0
    """Every latency times this."""
    slow: tuple[float, float] = (0.0, 400.0)
    """Share of its answers that take as many milliseconds, and how many."""
    errors: float = 0.0
    """Share of its answers that are a status 500."""
    wrong: float = 0.0
    """Share of its answers that are wrong."""

    def latencies(self, n: int, rng: np.random.Generator) -> Floats:
        """(n,) milliseconds."""
        if self.stream == "iid":
            ms = np.exp(np.log(7) + 0.43 * rng.normal(size=n))
        else:
            walk = lfilter([np.sqrt(1 - 0.7**2)], [1, -0.7], rng.normal(size=n + 50))[50:]
            ms = np.exp(np.log(7) + 0.43 * walk) if self.stream == "light" else np.exp(np.log(5.5) + 0.35 * walk)
        if self.stream == "bursts":
            for begin in np.flatnonzero(rng.random(n) < 0.015 / 8):
                ms[begin : begin + rng.geometric(1 / 8)] *= 4
        return np.where(rng.random(n) < self.slow[0], self.slow[1], self.scale * ms)


@dataclass
class Simulation:
    """A controller without servers (traffic/base.py), and what stands for sending."""

    champion: Engine
    challenger: Engine
    rng: np.random.Generator
    unanswered: float = 0.0
    """Share of all requests that no server answers: the network's fault."""
    weights: Routes = field(default_factory=lambda: Routes(weights={"v1": 100}))
    sent: int = 0

    def set_routes(self, model: str, routes: Routes) -> None:
        """See the protocol."""
        self.weights = routes

    def routes(self, model: str) -> Routes:
        """See the protocol."""
        return self.weights

    def observe(self, release: Release) -> Observation:
        """See the protocol: nothing that the sender does not see."""
        return Observation(0, 0, 100.0)

    def endpoint(self, model: str) -> Endpoint:
        """See the protocol."""
        return Endpoint("http://simulated")

    def mirror(self, model: str) -> Endpoint | None:
        """See the protocol: the sender mirrors."""
        return Endpoint("http://simulated") if self.weights.mirror else None

    def answers(self, release: Release) -> None:
        """See the protocol: no logs."""

    def send(self, load: Load, watch: Watch, progress: Callable[[int, int], None]) -> Sent:
        """Stands for traffic.load.send."""
        records = list(self._records(load))
        self.sent += len(records)
        step = max(1, round(load.rate_per_s * LOOK_S))
        for end in range(step, len(records) + step, step):
            if (reason := watch(records[:end])) is not None:
                self.sent -= len(records) - min(end, len(records))
                return Sent(records[:end], reason)
        return Sent(records)

    def _records(self, load: Load) -> Iterator[Record]:
        n, names = load.requests, sorted(self.weights.weights)
        chosen = self.rng.choice(names, n, p=[self.weights.weights[name] / 100 for name in names])
        ms = {"v1": self.champion.latencies(n, self.rng), "v2": self.challenger.latencies(n, self.rng)}
        lost, samples = self.rng.random(n) < self.unanswered, load.samples()
        for i, at in enumerate(load.times_s()):
            answer = partial(self._answer, f"{load.phase}-{i}", int(samples[i]), float(at))
            mirrored = answer(self.weights.mirror, ms[self.weights.mirror][i]) if self.weights.mirror else None
            if lost[i]:
                yield Record(f"{load.phase}-{i}", int(samples[i]), float(at), 0, None, None, 12_000.0)
            else:
                yield answer(str(chosen[i]), ms[chosen[i]][i], mirrored)

    def _answer(  # noqa: PLR0917 (of a request: its name, sample, time; of the answer: its release, how late)
        self, name: str, sample: int, at: float, release: str, ms: float, mirrored: Record | None = None
    ) -> Record:
        engine = self.champion if release == "v1" else self.challenger
        status = 500 if self.rng.random() < engine.errors else 200
        output = np.array([[1.0, 0.0]], np.float32)
        if engine.wrong and self.rng.random() < engine.wrong:
            output = output[:, ::-1]
        return Record(
            name, sample, at, status, release, output if status == 200 else None, ms, server_ms=ms, mirrored=mirrored
        )


CASES: dict[str, tuple[str, Engine, Engine, float]] = {
    "identical, bursts": ("both", Engine(), Engine(), 0),
    "identical, light tail": ("both", Engine("light"), Engine("light"), 0),
    "identical, independent requests": ("both", Engine("iid"), Engine("iid"), 0),
    "2x as slow (the limit), bursts": ("both", Engine(), Engine(scale=2), 0),
    "2x as slow (the limit), light tail": ("both", Engine("light"), Engine("light", 2), 0),
    "3x as slow, light tail": ("both", Engine("light"), Engine("light", 3), 0),
    "4x as slow, bursts": ("both", Engine(), Engine(scale=4), 0),
    "5 % of its answers 400 ms": ("both", Engine(), Engine(slow=(0.05, 400)), 0),
    "identical, 0.2 % of all requests unanswered": ("both", Engine(), Engine(), 0.002),
    "identical, 0.1 % errors on both": ("both", Engine(errors=0.001), Engine(errors=0.001), 0),
    "identical, 0.3 % errors on both": ("both", Engine(errors=0.003), Engine(errors=0.003), 0),
    "0.5 % errors (the limit), champion none": ("both", Engine(), Engine(errors=0.005), 0),
    "1 % errors, champion none": ("both", Engine(), Engine(errors=0.01), 0),
    "2 % errors, champion none": ("both", Engine(), Engine(errors=0.02), 0),
    "5 % errors, champion none": ("both", Engine(), Engine(errors=0.05), 0),
    "3 % wrong answers more (the limit)": ("stage 2", Engine(), Engine(wrong=0.03), 0),
}
"""By name: stages in which it is run, champion, challenger, share of unanswered requests."""


def spec_in(folder: Path) -> Spec:
    """A spec with every default."""
    document = {
        "name": "net",
        "model": {"registry": "models:/net@source", "architecture": "net:net"},
        "data": {"train": "train.npz", "test": "test.npz"},
        "recipes": {"int8": ["quantize"]},
        "targets": {"server": {"engine": "openvino"}},
    }
    return specs.parse(json.dumps(document), str(folder))


class _Quiet:
    """Stands for a machine without other work."""

    def share(self) -> float:
        """No time was lost."""
        return 0.0


@contextmanager
def simulated(simulation: Simulation) -> Iterator[None]:
    """Send nothing while the block runs."""
    real, meter = guarded.send, guarded.pressure.Meter
    guarded.send, guarded.pressure.Meter = simulation.send, _Quiet  # type: ignore[assignment,misc]  # the replacement
    try:
        yield
    finally:
        guarded.send, guarded.pressure.Meter = real, meter  # type: ignore[misc]  # back again


def run(stage_name: str, case: str, seed: int) -> tuple[str, int, tuple[str, ...]]:
    """Answer, requests sent, and the gates that did not pass, of one simulated stage."""
    _, champion, challenger, unanswered = CASES[case]
    simulation = Simulation(champion, challenger, np.random.default_rng(seed), unanswered)
    inputs = np.zeros((SAMPLES, 2), np.float32)
    with tempfile.TemporaryDirectory() as folder, simulated(simulation):
        stage = Stage(
            spec=spec_in(Path(folder)),
            controller=simulation,  # type: ignore[arg-type]  # it deploys nothing
            split=Split(inputs, np.zeros(SAMPLES, np.int64)),
            champion=Release(model="net", name="v1"),
            challenger=Release(model="net", name="v2"),
            run_key=f"{case}-{seed}",
        )
        verdicts = small_scale.measure(stage)[0] if stage_name == "stage 2" else stepwise.measure(stage)
    return combine(verdicts), simulation.sent, tuple(v.gate for v in verdicts if not v.passed)


def main() -> None:
    """Print one row for each stage and case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sims", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("cases", nargs="*", help="only cases whose name begins so")
    arguments = parser.parse_args()
    wanted = [c for c in CASES if not arguments.cases or any(c.startswith(p) for p in arguments.cases)]
    print("| stage | challenger | sims | pass | fail | inconclusive | requests, median | not passed |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    logging.disable()
    with ProcessPoolExecutor(arguments.processes) as pool:
        for name, case in itertools.product(("stage 2", "stage 3"), wanted):
            if CASES[case][0] not in ("both", name):
                continue
            done = list(pool.map(partial(run, name, case), range(arguments.sims)))
            answers = Counter(answer for answer, _, _ in done)
            gates = Counter(gate for _, _, open_ones in done for gate in open_ones)
            rates = [f"{100 * answers[a] / len(done):.0f} %" for a in ("pass", "fail", "inconclusive")]
            by = ", ".join(f"{gate} {count}" for gate, count in gates.most_common(3))
            sent = f"{np.median([s for _, s, _ in done]):,.0f}"
            print(f"| {name} | {case} | {len(done)} | {' | '.join(rates)} | {sent} | {by} |", flush=True)


if __name__ == "__main__":
    main()
