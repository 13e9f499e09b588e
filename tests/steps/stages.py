"""What stages 2 and 3 need of the world: data, engines logged in a real MLflow, the outputs of earlier steps.

The engines are folders that are never loaded: the fake controller looks at none, the toy server at `behaviour.json`.
"""

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.models import infer_signature

from slipstream import spec as specs
from slipstream.contract import Artifact, Cell, StepInput, StepOutput, Verdict
from slipstream.contract.evidence import EngineEvidence, Interval, Latency, Noise
from slipstream.errors import SlipstreamError
from slipstream.home import Home
from slipstream.runner.context import Context
from slipstream.spec import Spec
from slipstream.store.registry import Registry
from slipstream.store.tracking import Tracking
from slipstream.traffic.fake import FakeController
from slipstream.traffic.guarded import Stage

PASS = Verdict(gate="accuracy", answer="pass", reason="drop 0.1 points, at most 0.4", n=1000)
FAIL = Verdict(gate="accuracy", answer="fail", reason="drop 3.1 points, at most 3.4", n=1000)


def make_spec(folder: Path, model: str, **changes: Any) -> Spec:
    """A spec whose loads take a second or two: 60 % confidence, at which a p99 needs some 650 requests."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 32), ("test", 200)):
        inputs = rng.normal(size=(n, 10)).astype(np.float32)
        np.savez(folder / f"{name}.npz", inputs=inputs, labels=inputs.argmax(axis=1).astype(np.int64))
    document: dict[str, Any] = {
        "name": "net",
        "model": {"registry": f"models:/{model}@source", "architecture": "examples.fashion:resnet"},
        "data": {name: str(folder / f"{name}.npz") for name in ("train", "test")},
        "objective": {"confidence": 0.6},
        "recipes": {"int8": ["quantize"], "small": ["prune"]},
        "targets": {"server": {"engine": "openvino"}},
        "small_scale_test": {"shadow": 700, "share": 20, "requests": 220, "rate_per_s": 200},
        "rollout": {"steps": [50, 100], "requests": 450, "rate_per_s": 200},
        "guardrails": {"max_p99_ratio": 50, "max_p99_ms": 20_000, "max_error_rate": 3},
    }
    for section, values in changes.items():
        document[section] = {**document[section], **values} if isinstance(values, dict) else values
    return specs.parse(json.dumps(document), "test")


def evidence(p50_ms: float = 1.0, size: int = 1000, quality: float = 90.0, eager_ms: float = 5.0) -> EngineEvidence:
    latency, eager = (
        Latency(scenario="SingleStream", n=1000, p50_ms=ms, p99_ms=2 * ms, rate_per_s=1000 / ms)
        for ms in (p50_ms, eager_ms)
    )
    ratio = eager_ms / p50_ms
    return EngineEvidence(
        metric="top1",
        samples=1000,
        baseline_quality=91.0,
        engine_quality=quality,
        drop_pp=Interval(estimate=91 - quality, low=0, high=1),
        worst_class="0",
        worst_class_drop_pp=1.0,
        latency=latency,
        eager=eager,
        speedup_eager=Interval(estimate=ratio, low=0.9 * ratio, high=1.1 * ratio),
        speedup_reference=Interval(estimate=0.8 * ratio, low=0.7 * ratio, high=0.9 * ratio),
        size_bytes=size,
        noise=Noise(clean_rounds=5, rounds=5, others_cores=0.0),
        hardware="made up",
    )


def validated(recipe: str, *, verdict: Verdict = PASS, target: str = "server", **figures: Any) -> StepOutput:
    found = {"evidence": evidence(**figures).model_dump(mode="json")}
    cell = Cell(recipe=recipe, target=target)
    return StepOutput(step="validate", cell=cell, identity="v", run_id="r", verdicts=(verdict,), details=found)


ENGINES: dict[str, Artifact] = {}
"""Logged engines; logging one takes a second, and none ever changes."""


@dataclass
class World:
    """One registered model in a real MLflow, and what the steps before stage 2 handed on."""

    folder: Path
    spec: Spec

    @property
    def model(self) -> str:
        return self.spec.model.name

    @property
    def tracking(self) -> Tracking:
        return Tracking(self.spec)

    @property
    def registry(self) -> Registry:
        return Registry(self.model, self.tracking.client)

    def engine(self, name: str, **behaviour: Any) -> Artifact:
        """An engine logged as an MLflow model, once for all tests; its content differs from that of every other."""
        key = json.dumps({"name": name, **behaviour}, sort_keys=True) if name not in ENGINES else name
        if key not in ENGINES:
            folder = self.folder / f"made-{uuid.uuid4().hex}" / "engine"
            folder.mkdir(parents=True)
            (folder / "behaviour.json").write_text(key)
            self.log(key, folder)
        return ENGINES[key]

    def log(self, key: str, folder: Path) -> None:
        """Log an engine folder as an MLflow model."""
        run = self.tracking.start("build", "build", None, uuid.uuid4().hex)
        sample = np.zeros((1, 10), np.float32)
        ENGINES[key] = run.log_model(folder, "engine", infer_signature(sample, sample))

    def built(self, recipe: str, **behaviour: Any) -> StepOutput:
        cell = Cell(recipe=recipe, target="server")
        artifact = self.engine(recipe, **behaviour)
        return StepOutput(step="build", cell=cell, identity="b", run_id="r", artifact=artifact)

    def version(self, name: str, **behaviour: Any) -> str:
        """A registered engine."""
        return self.registry.register(self.engine(name, **behaviour), f"{name}@server", f"run-of-{name}", (PASS,))

    def context(self, step: str, upstream: tuple[StepOutput, ...], run_key: str = "run-1", **params: Any) -> Context:
        """What run_step would give the step; the same MLflow run again for the same run key."""
        inputs = StepInput(run_key=run_key, pipeline_run_id=f"p-{run_key}", upstream=upstream, params=params)
        run = self.tracking.start(run_key, step, None, f"{step}-{run_key}")
        return Context(self.spec, inputs, step, f"{step}-{run_key}", self.tracking, run, Home.from_environment())

    def recorded(self, context: Context) -> StepOutput:
        """The output that a step left in MLflow."""
        return self.tracking.output(context.run.run_id)

    def selected(self, version: str, champion: str | None, already: bool = False) -> StepOutput:
        details = {"winner": "int8@server", "version": version, "champion": champion, "already_champion": already}
        return StepOutput(step="select", identity="s", run_id="r", verdicts=(PASS,), details=details)

    def tried(self, verdict: Verdict = PASS) -> StepOutput:
        return StepOutput(step="trial", identity="t", run_id="r", verdicts=(verdict,), details={})


WorldMaker = Callable[..., World]


@pytest.fixture
def world_maker(mlflow_server: str, home: Path, tmp_path: Path) -> WorldMaker:
    """Makes worlds with a registered model of their own; keyword arguments change the spec."""

    def make(**changes: Any) -> World:
        folder = tmp_path / uuid.uuid4().hex
        folder.mkdir()
        return World(folder, make_spec(folder, f"net-{uuid.uuid4().hex[:8]}", **changes))

    return make


@pytest.fixture
def world(world_maker: WorldMaker) -> World:
    return world_maker()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeController]:
    control = FakeController(tmp_path)
    yield control
    control.close()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine counts as quiet, whatever it is."""
    monkeypatch.setattr(Stage, "crowd", lambda stage, records: None)


def failing(run: Callable[[], object], error: type[SlipstreamError]) -> str:
    """The message with which `run` fails."""
    try:
        run()
    except error as caught:
        return str(caught)
    raise AssertionError(f"{error.__name__} was not raised")
