"""Where steps run, and with how much: defaults, the file, the environment variable, and what a spec overrides."""

from pathlib import Path

import pytest

from slipstream import spec
from slipstream.errors import SpecError
from slipstream.home import Home
from slipstream.plan import settings
from slipstream.plan.settings import Settings
from slipstream.spec.fields import in_bytes

ROOT = Path(__file__).parents[2]
MORE = """
resources:
  default: {memory: 2Gi}
  distill: {gpu: 1, tolerations: [{key: gpu, operator: Exists}]}
"""


@pytest.fixture
def chosen() -> spec.Spec:
    return spec.parse((ROOT / "examples/fashion.yaml").read_text() + MORE, "fashion.yaml")


def write(home: Path, text: str) -> Home:
    (home / "settings.yaml").write_text(text)
    return Home.from_environment()


def test_without_a_file_steps_are_processes(home: Path) -> None:
    assert settings.load(Home.from_environment()) == Settings()
    assert Settings().runtime == "subprocess"


def test_the_file_is_read_and_the_variable_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = write(home, "runtime: docker\ndocker: {network: bridge}\n")
    assert settings.load(here).runtime == "docker"
    monkeypatch.setenv("SLIPSTREAM_RUNTIME", "subprocess")
    assert settings.load(here).runtime == "subprocess"
    assert settings.load(here).docker.network == "bridge"


def test_the_file_may_lie_elsewhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.yaml").write_text("kubernetes: {namespace: models}\n")
    monkeypatch.setenv("SLIPSTREAM_SETTINGS", str(tmp_path / "s.yaml"))
    assert settings.load(Home.from_environment()).kubernetes.namespace == "models"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dokcer: {}", "dokcer"),  # codespell:ignore dokcer
        ("kubernetes: {namespaces: x}", "kubernetes.namespaces"),
        ("resources: {default: {memory: lots}}", "resources.default.memory"),
        ("- a", "settings are a mapping"),
        ("{", "cannot be read"),
    ],
)
def test_a_mistake_is_named_with_file_and_field(home: Path, text: str, says: str) -> None:
    here = write(home, text)
    with pytest.raises(SpecError, match=says) as raised:
        settings.load(here)
    assert "settings.yaml" in str(raised.value)


def test_the_most_specific_resources_win(chosen: spec.Spec) -> None:
    found = Settings.model_validate({"resources": {"default": {"cpu": 1, "memory": "1Gi"}, "distill": {"cpu": 4}}})
    distill, build = found.resources_of("distill", chosen), found.resources_of("build", chosen)
    assert (distill.cpu, distill.memory, distill.gpu) == (4, "2Gi", 1)
    assert distill.tolerations is not None and distill.tolerations[0].key == "gpu"
    assert (build.cpu, build.memory, build.gpu) == (1, "2Gi", None)


def test_images_follow_the_environment_unless_the_step_names_one(chosen: spec.Spec) -> None:
    found = Settings.model_validate({"image": "r/{environment}:x", "resources": {"select": {"image": "mine:1"}}})
    assert found.image_of("distill", chosen) == "r/torch:x"
    assert found.image_of("trial", chosen) == "r/serve:x"
    assert found.image_of("select", chosen) == "mine:1"
    assert Settings().image_of("trial", chosen).startswith("slipstream-serve:")


def test_a_spec_cannot_name_an_unknown_step() -> None:
    text = (ROOT / "examples/fashion.yaml").read_text() + "\nresources: {distil: {cpu: 1}}\n"
    with pytest.raises(SpecError, match=r"resources\.distil: not a step"):
        spec.parse(text, "fashion.yaml")


def test_memory_is_counted_in_powers_of_1024() -> None:
    assert [in_bytes(m) for m in ("1Ki", "1.5Mi", "2Gi", "1Ti")] == [2**10, 3 * 2**19, 2**31, 2**40]
