"""`slipstream init` as a person calls it, from the core environment."""

import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from slipstream import spec as specs
from slipstream.spec.sections import DataFiles

ROOT = Path(__file__).parents[3]
SLIPSTREAM = Path(sys.executable).parent / "slipstream"
ONNX = """
import sys, onnx
from tests.engines.candidates import network
onnx.save(network(), sys.argv[1])
"""
KERAS = """
import sys
from slipstream.frameworks.keras_runtime import keras
layers = [keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(3)]
keras.Sequential(layers).save(sys.argv[1])
"""


def init(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call it in `folder`, which is also where the user's code lies."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "SLIPSTREAM_HOME": str(folder / "home"),
        "SLIPSTREAM_ENVS": str(ROOT / ".envs"),
        "SLIPSTREAM_CODE": str(folder),
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [str(SLIPSTREAM), "init", *arguments], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


def make(environment: str, program: str, path: Path) -> Path:
    """A model file, written by a program in an environment."""
    python = ROOT / ".envs" / environment / "bin" / "python"
    done = subprocess.run(
        [str(python), "-c", program, str(path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("torch", ONNX, tmp_path_factory.mktemp("onnx") / "Small Net.onnx")


def test_an_onnx_file_becomes_a_spec_that_validates(onnx_file: Path, tmp_path: Path) -> None:
    done = init(tmp_path, str(onnx_file), "--out", "specs/my-net.yaml")
    assert done.returncode == 0, done.stderr
    spec = specs.load(tmp_path / "specs/my-net.yaml")
    assert (spec.name, spec.model.registry, spec.model.framework) == ("my-net", "models:/small-net@source", "onnx")
    assert spec.model.file == str(onnx_file)
    assert spec.recipes == {"int8": ("simplify", "quantize")}
    assert {t.engine for t in spec.targets.values()} == {"openvino", "onnxruntime"}
    assert spec.data.function == "specs.my_net_data:data"
    assert "1×16×16 float32 → 5; 2,533 weights" in done.stdout
    text = (tmp_path / "specs/my-net.yaml").read_text()
    for unknown in ("data: specs.my_net_data:data reads two files", "metric: top1 is a guess", "max_drop: "):
        assert f"#   {unknown}" in text, "said in the spec"
        assert f"  {unknown}" in done.stdout, "and on the terminal"
    function = (tmp_path / "specs/my_net_data.py").read_text()
    assert "(N, 1, 16, 16) float32" in function
    compile(function, "my_net_data.py", "exec")


def test_files_that_are_there_are_kept_without_force(onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "net_data.py").write_text("mine = True\n")
    (tmp_path / "net.yaml").write_text("old\n")
    done = init(tmp_path, str(onnx_file), "--out", "net.yaml")
    assert done.returncode == 2
    assert "net.yaml, net_data.py: there already" in done.stderr and "--force" in done.stderr
    assert (tmp_path / "net.yaml").read_text() == "old\n"
    forced = init(tmp_path, str(onnx_file), "--out", "net.yaml", "--data", "net_data:mine", "--force")
    assert forced.returncode == 0, forced.stderr
    assert specs.load(tmp_path / "net.yaml").data.function == "net_data:mine"
    assert (tmp_path / "net_data.py").read_text() == "mine = True\n", "a function of one's own is not written over"


def test_a_keras_file_gets_the_engines_of_keras(tmp_path: Path) -> None:
    make("tensorflow", KERAS, tmp_path / "net.keras")
    done = init(tmp_path, "net.keras", "--out", "net.yaml")
    assert done.returncode == 0, done.stderr
    spec = specs.load(tmp_path / "net.yaml")
    assert (spec.model.framework, spec.model.file) == ("keras", "net.keras")
    assert "litert" in {t.engine for t in spec.targets.values()}
    assert "8×8×1 float32 → 3; 475 weights" in done.stdout


def test_a_function_and_its_data(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from slipstream.data.splits import Data, Split\n"
        "def network():\n"
        "    from torch import nn\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))\n"
        "def data():\n"
        "    split = Split(np.ones((4, 3, 4), np.float32), np.arange(4) % 3)\n"
        "    return Data(split, split)\n"
    )
    done = init(tmp_path, "mine:network", "--out", "net.yaml", "--data", "mine:data")
    assert done.returncode == 0, done.stderr
    spec = specs.load(tmp_path / "net.yaml")
    assert spec.model.architecture is not None and spec.model.architecture.function == "mine:network"
    assert set(spec.recipes) == {"int8", "pruned-int8"}
    assert "3×4 float32 → 3; 67 weights" in done.stdout and "2 Linear" in done.stdout
    assert "say `file: weights.safetensors` under model" in done.stdout


PYTORCH = """
import sys, pathlib, numpy as np, torch, safetensors.torch
from torch import nn
folder = pathlib.Path(sys.argv[1])
model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))
torch.save(model.state_dict(), folder / "my net.pt")
safetensors.torch.save_file(model.state_dict(), folder / "net.safetensors")
for name, n in (("train", 40), ("test", 20)):
    np.savez(folder / f"mine-{name}.npz", inputs=np.ones((n, 3, 4), np.float32), labels=np.arange(n) % 3)
"""
NETWORK = """
def network():
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))
def other():
    from torch import nn
    return nn.Linear(12, 3)
"""


@pytest.fixture
def pytorch_folder(tmp_path: Path) -> Path:
    """Weights in both forms, both splits, and the function that builds the network."""
    make("torch", PYTORCH, tmp_path)
    (tmp_path / "mine.py").write_text(NETWORK)
    return tmp_path


def test_weights_and_files_of_data_become_a_spec_without_any_code(pytorch_folder: Path) -> None:
    done = init(
        pytorch_folder,
        *("net.safetensors", "--architecture", "mine:network", "--out", "net.yaml"),
        *("--data", "mine-train.npz,mine-test.npz"),
    )
    assert done.returncode == 0, done.stderr
    spec = specs.load(pytorch_folder / "net.yaml")
    assert (spec.model.file, spec.model.registry) == ("net.safetensors", "models:/net@source")
    assert spec.model.architecture is not None and spec.model.architecture.function == "mine:network"
    assert isinstance(spec.data, DataFiles)
    assert spec.data.splits == {"train": "mine-train.npz", "test": "mine-test.npz"}
    assert "3×4 float32 → 3; 67 weights" in done.stdout
    assert not (pytorch_folder / "net_data.py").exists() and "data: " not in done.stdout


def test_files_beside_the_spec_are_used_where_they_are(pytorch_folder: Path) -> None:
    done = init(pytorch_folder, "net.safetensors", "--architecture", "mine:network", "--out", "mine.yaml")
    assert done.returncode == 0, done.stderr
    spec = specs.load(pytorch_folder / "mine.yaml")
    assert isinstance(spec.data, DataFiles) and spec.data.test == "mine-test.npz"


def test_what_init_says_of_a_pickled_file_leads_to_a_spec_when_it_is_followed_literally(pytorch_folder: Path) -> None:
    refused = init(pytorch_folder, "my net.pt", "--out", "net.yaml")
    assert refused.returncode == 2
    _, python, _, command, *_ = refused.stderr.splitlines()
    model = "from mine import network; model = network(); model.load_state_dict(torch.load('my net.pt'))"
    done = subprocess.run(
        [str(ROOT / ".envs/torch/bin/python"), "-c", f"import torch, safetensors.torch; {model}\n{python.strip()}"],
        cwd=pytorch_folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    slipstream, verb, *arguments = shlex.split(command.replace("module:function", "mine:network"))
    assert (slipstream, verb) == ("slipstream", "init")
    made = init(pytorch_folder, *arguments)
    assert made.returncode == 0, made.stderr
    [out] = [a for a in arguments if a.endswith(".yaml")]
    assert specs.load(pytorch_folder / out).model.file == "my net.safetensors"


def test_weights_need_a_function_that_they_fit(pytorch_folder: Path) -> None:
    alone = init(pytorch_folder, "net.safetensors", "--out", "net.yaml")
    assert alone.returncode == 2
    assert "slipstream init net.safetensors --architecture module:function --out net.yaml" in alone.stderr
    misfit = init(pytorch_folder, "net.safetensors", "--architecture", "mine:other", "--out", "net.yaml")
    assert misfit.returncode == 2
    assert "the weights do not fit mine:other: 2 missing (bias, weight)" in misfit.stderr
    unknown = init(pytorch_folder, "mine:network", "--out", "net.yaml", "--data", "mine-train.npz,none.npz")
    assert unknown.returncode == 2 and "no such file: none.npz" in unknown.stderr
    assert not (pytorch_folder / "net.yaml").exists()


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (self.path,))


def test_a_torchscript_file_is_read_by_its_list_of_files_alone(tmp_path: Path) -> None:
    import pickle

    with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps(Bomb(tmp_path / "exploded")))
        archive.writestr("net/code/__torch__/models/resnet.py", "class ResNet(Module):\n  pass\n")
        archive.writestr("net/constants/0", b"\0" * 16)
    (tmp_path / "mine.py").write_text("from torch import nn\ndef network():\n    return nn.Linear(4, 3)\n")
    refused = init(tmp_path, "net.pt", "--out", "net.yaml")
    assert refused.returncode == 2
    assert "a TorchScript file (1 constants; code of models.resnet)" in refused.stderr
    assert "torch.onnx.export" in refused.stderr and "--architecture" in refused.stderr
    done = init(tmp_path, "net.pt", "--out", "net.yaml", "--architecture", "mine:network")
    assert done.returncode == 0, done.stderr
    assert specs.load(tmp_path / "net.yaml").model.registry == "models:/net@source"
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nothing.onnx", "no such file or folder"),
        ("models:/net", "models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("broken.onnx", "not a valid ONNX model"),
        ("notes.txt", "an unknown kind"),
        ("folder", "neither a SavedModel"),
    ],
)
def test_what_is_no_model_is_refused_and_nothing_is_written(model: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    (tmp_path / "notes.txt").write_text("hello")
    done = init(tmp_path, model, "--out", "net.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "net.yaml").exists()
