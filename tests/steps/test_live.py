"""Stages 2 and 3 with everything real: Envoy, supervisord, model servers, MLflow."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from tests.conftest import free_port
from tests.steps.stages import World, WorldMaker, failing
from tests.traffic.conftest import TOY_SERVER, await_envoy

from slipstream import digests
from slipstream.contract import StepOutput
from slipstream.engines.base import EngineManifest, engine_for
from slipstream.engines.openvino import IR
from slipstream.errors import GateFailed
from slipstream.home import Home, write_atomically
from slipstream.platform import addresses, supervisor
from slipstream.release.releases import drift
from slipstream.spec import Target
from slipstream.steps.rollback import rollback
from slipstream.steps.rollout import full_rollout
from slipstream.steps.trial import small_scale_test
from slipstream.traffic import envoy
from slipstream.traffic.base import Routes
from slipstream.traffic.envoy import EnvoyController

PATIENT = {"max_p99_ratio": 1000, "max_p99_ms": 20_000, "max_error_rate": 3}
"""A busy machine must not decide these tests."""


@pytest.fixture
def platform(home: Path) -> Iterator[tuple[Home, str]]:
    """A home with a running Envoy, and the addresses file that `slipstream up` would write."""
    made, port = Home.from_environment(), free_port()
    envoy.bootstrap(made, port)
    supervisor.start(made, envoy.program(made))
    url = f"http://127.0.0.1:{port}"
    try:
        await_envoy(made)
        found = addresses.Addresses(airflow="", mlflow="", envoy=url, triggers="")
        write_atomically(made.addresses_file(), found.model_dump_json())
        yield made, url
    finally:
        supervisor.shutdown(made)


def released_then_challenged(
    world: World, old: str = "old", new: str = "int8"
) -> tuple[tuple[StepOutput, ...], str, str]:
    """A champion, and the outputs of a run with a new challenger: outputs, version of champion and challenger."""
    champion = world.version(old)
    world.registry.set_alias("champion", champion)
    challenger = world.version(new)
    world.registry.set_alias("challenger", challenger)
    return (world.built("baseline"), world.built("int8"), world.selected(challenger, champion)), champion, challenger


def test_a_release_from_trial_to_rollback(world_maker: WorldMaker, platform: tuple[Home, str]) -> None:
    world, control = world_maker(guardrails=PATIENT), EnvoyController(*platform, server=TOY_SERVER)
    outputs, champion, challenger = released_then_challenged(world)
    trial = small_scale_test(world.context("trial", outputs), control)
    assert trial.details["figures"]["pairs"] == 700
    assert trial.details["figures"]["different"] == 0
    assert control.routes(world.model) == Routes(weights={f"v{champion}": 100})
    output = full_rollout(world.context("rollout", (*outputs, trial)), control)
    assert output.details["released"] == challenger
    assert control.routes(world.model) == Routes(weights={f"v{challenger}": 100})
    assert drift(world.model, control) == []
    rollback(world.model, control, world.tracking.client, "run-2")
    assert control.routes(world.model) == Routes(weights={f"v{champion}": 100})
    assert drift(world.model, control) == []


def test_a_server_killed_under_load_is_rolled_back(
    world_maker: WorldMaker, quiet: None, platform: tuple[Home, str]
) -> None:
    """Killed, and broken so that supervisord cannot bring it back: guardrail, traffic back, no alias moved."""
    world = world_maker(guardrails=PATIENT, rollout={"steps": [50, 100], "requests": 2000, "rate_per_s": 200})
    control = EnvoyController(*platform, server=TOY_SERVER)
    outputs, champion, challenger = released_then_challenged(world)
    name = f"server-{world.model}--v{challenger}"
    killed = []

    def kill(done: int, total: int, unit: str, **figures: float) -> None:
        if done >= 50 and not killed:
            engine = platform[0].releases / f"{world.model}--v{challenger}" / "engine"
            (engine / "behaviour.json").write_text(json.dumps({"broken": True}))
            pid = supervisor.state(platform[0], name).pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            killed.append(time.monotonic())

    context = world.context("rollout", (*outputs, world.tried()))
    context.run.progress = kill  # type: ignore[method-assign]  # the accident, at a known moment
    message = failing(lambda: full_rollout(context, control), GateFailed)
    assert "requests failed" in message
    assert killed
    [point] = world.recorded(context).details["timeline"][-1:]
    assert sum(p["requests"] for p in world.recorded(context).details["timeline"]) < 1500
    assert point["errors"] == 0  # the champion answered instead, which the guardrail did not overlook
    assert control.routes(world.model) == Routes(weights={f"v{champion}": 100})
    assert control.deployed(world.model) == {f"v{champion}"}
    assert (world.registry.champion(), world.registry.alias("previous")) == (champion, None)
    assert drift(world.model, control) == []
    url = f"{control.endpoint(world.model).url}/v2/models/{world.model}/infer"
    body = {"inputs": [{"name": "input", "shape": [1, 10], "datatype": "FP32", "data": [1.0] * 10}]}
    assert httpx.post(url, json=body).headers["x-slipstream-release"] == f"v{champion}"


def log_openvino(world: World, name: str, scale: float) -> None:
    """A real OpenVINO engine that multiplies its ten inputs by `scale`, logged under `name`."""
    target = Target(engine="openvino", threads=1)
    folder = world.folder / name / "engine"
    folder.mkdir(parents=True)
    given = ops.parameter([-1, 10], np.float32, name="input")
    result = ops.multiply(given, ops.constant(np.float32(scale)))
    model = ov.Model([result], [given], name)
    model.inputs[0].tensor.set_names({"input"})
    model.outputs[0].tensor.set_names({"output"})
    ov.save_model(model, folder / IR, compress_to_fp16=False)
    manifest = EngineManifest(
        engine="openvino",
        target=target,
        fingerprint=engine_for("openvino").fingerprint(target),
        candidate_sha256="0" * 64,
        input_shape=(10,),
        input_dtype="float32",
        output_shape=(10,),
        files={f.name: digests.file(f) for f in sorted(folder.iterdir())},
    )
    (folder / "engine.json").write_text(manifest.model_dump_json())
    world.log(name, folder)


KILLED_TRIAL = """
import sys, time
from slipstream.home import Home
from slipstream.traffic import envoy
from slipstream.traffic.base import Routes
control = envoy.controller(Home.from_environment())
control.set_routes(sys.argv[1], Routes(weights={sys.argv[2]: 80, sys.argv[3]: 20}, mirror=sys.argv[3]))
print("moved", flush=True)
time.sleep(60)
"""


def test_after_kill_9_the_next_attempt_puts_the_traffic_right(
    world_maker: WorldMaker, platform: tuple[Home, str]
) -> None:
    world, control = world_maker(guardrails=PATIENT), EnvoyController(*platform, server=TOY_SERVER)
    outputs, champion, challenger = released_then_challenged(world)
    small_scale_test(world.context("trial", outputs), control)
    command = [sys.executable, "-c", KILLED_TRIAL, world.model, f"v{champion}", f"v{challenger}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "moved\n"
    process.kill()
    process.wait()
    assert len(drift(world.model, control)) == 1
    small_scale_test(world.context("trial", outputs), control)
    assert drift(world.model, control) == []


def test_real_engines_behind_real_servers(world_maker: WorldMaker, platform: tuple[Home, str]) -> None:
    world, control = world_maker(guardrails=PATIENT), EnvoyController(*platform)
    for scale, name in enumerate(("real-old", "real-new"), start=1):
        log_openvino(world, name, scale)
    outputs, champion, challenger = released_then_challenged(world, "real-old", "real-new")
    trial = small_scale_test(world.context("trial", outputs), control)
    figures = trial.details["figures"]
    assert (figures["pairs"], figures["different"], figures["champion_quality"]) == (700, 0, 100)
    output = full_rollout(world.context("rollout", (*outputs, trial)), control)
    assert output.details["released"] == challenger
    batch = np.zeros((1, 10), np.float32)
    batch[0, 7] = 1
    body = {"inputs": [{"name": "input", "shape": [1, 10], "datatype": "FP32", "data": batch.ravel().tolist()}]}
    answer = httpx.post(f"{control.endpoint(world.model).url}/v2/models/{world.model}/infer", json=body)
    assert int(np.argmax(answer.json()["outputs"][0]["data"])) == 7
    assert control.observe(world.registry.release(challenger)).memory_mib > 10
    command = [
        str(platform[0].python("serve")),
        "-c",
        "from slipstream.cli import main; main()",
        "rollback",
        world.model,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == f"{world.model}: version {champion} serves again, instead of version {challenger}\n", (
        done.stderr
    )
    assert drift(world.model, control) == []
