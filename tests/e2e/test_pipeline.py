"""A user's first hour: start the platform, release a model, run again, be refused, roll back, stop. All of it real."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from slipstream.home import Home
from slipstream.platform import addresses

ROOT = Path(__file__).parent.parent.parent
TINY = Path(__file__).parent / "tiny.yaml"

pytestmark = pytest.mark.timeout(900)


class User:
    """Types commands at a terminal, in a home of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = Home(folder / "home", ROOT / ".envs", ROOT)
        self.environment = os.environ | {
            "SLIPSTREAM_HOME": str(self.home.root),
            "SLIPSTREAM_ENVS": str(self.home.envs),
            "SLIPSTREAM_CODE": str(ROOT),
        }

    def types(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `slipstream …` to its end."""
        command = [str(ROOT / ".venv/bin/slipstream"), *words]
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=800
        )
        print(f"$ slipstream {' '.join(words)}\n{done.stdout}{done.stderr}")
        return done

    def writes(self, name: str, **changes: Any) -> str:
        """A spec like tiny.yaml, with some keys changed."""
        document = yaml.safe_load(TINY.read_text()) | {"name": name} | changes
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document))
        return str(path)

    def champion(self) -> str | None:
        """Version that holds the alias, asked of MLflow itself."""
        query = {"name": "tiny-resnet", "alias": "champion"}
        url = f"{addresses.load(self.home).mlflow}/api/2.0/mlflow/registered-models/alias"
        login = addresses.load_secrets(self.home)
        answer = httpx.get(url, params=query, auth=(login.mlflow_user, login.mlflow_password))
        return str(answer.json()["model_version"]["version"]) if answer.is_success else None

    def report(self, spec: str) -> dict[str, Any]:
        return dict(json.loads(self.types("report", spec, "--json").stdout))


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """A user with a running platform; nothing is left running."""
    someone = User(tmp_path_factory.mktemp("user"))
    try:
        assert someone.types("up").returncode == 0
        yield someone
    finally:
        someone.types("down")


def test_a_model_goes_from_trained_to_released(user: User) -> None:
    done = user.types("run", str(TINY), "--watch")
    assert done.returncode == 0
    assert user.champion() is not None
    release = httpx.get(f"{addresses.load(user.home).envoy}/v2/models/tiny-resnet/ready")
    assert release.status_code == 200


def test_the_release_answers_with_a_label(user: User) -> None:
    image = np.zeros((1, 1, 28, 28), np.float32)
    body = {"inputs": [{"name": "input", "shape": [1, 1, 28, 28], "datatype": "FP32", "data": image.ravel().tolist()}]}
    answer = httpx.post(f"{addresses.load(user.home).envoy}/v2/models/tiny-resnet/infer", json=body)
    assert answer.status_code == 200
    assert len(answer.json()["outputs"][0]["data"]) == 10
    assert answer.headers["x-slipstream-release"] == f"v{user.champion()}"


def test_a_second_run_reuses_what_did_not_change(user: User) -> None:
    before = user.champion()
    done = user.types("run", str(TINY), "--watch")
    assert done.returncode == 0
    lines = (done.stdout + done.stderr).splitlines()
    for step in ("retrain", "quantize", "build"):
        assert any(step in line and "reused" in line for line in lines), step
    assert user.champion() == before


def test_too_tight_a_limit_rejects_every_engine(user: User) -> None:
    before = user.champion()
    objective = {"max_drop": 20, "latency_p99_ms": 0.001}
    done = user.types("run", user.writes("tight", objective=objective), "--watch")
    assert done.returncode == 3
    assert "p99" in done.stdout + done.stderr
    assert user.champion() == before


def test_the_impossible_is_refused_before_anything_is_trained(user: User) -> None:
    wanted = user.writes("gpu", targets={"gpu": {"engine": "openvino", "device": "GPU"}})
    done = user.types("run", wanted, "--watch")
    assert done.returncode == 2
    assert "targets.gpu" in done.stdout + done.stderr
    assert not list((user.home.root / "runs" / "gpu").glob("*/retrain.*"))


def test_a_drop_that_the_test_split_cannot_prove_is_refused_before_anything_is_trained(user: User) -> None:
    done = user.types("run", user.writes("unprovable", objective={"max_drop": 0.0001}), "--watch")
    assert done.returncode == 2
    assert "1,000 test samples can never prove a drop of at most objective.max_drop" in done.stdout + done.stderr
