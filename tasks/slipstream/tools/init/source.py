"""What MODEL on the command line names: a registered model, a framework's file, or a function.

Nothing is unpickled: of PyTorch's archives only the list of files is read.
"""

import re
import shlex
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from slipstream.errors import ModelError
from slipstream.spec.fields import FUNCTION_NAME

REGISTERED = re.compile(r"^models:/(?P<name>[A-Za-z0-9_.-]+)(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>\d+))$")
KERAS = (".keras", ".h5", ".hdf5")
WEIGHTS = ".safetensors"
NPZ = ".npz"
TORCH = (".pt", ".pth", ".ts", ".torchscript", ".bin")
SAVED_MODEL = "saved_model.pb"
NAMED = 8
"""Maximum number of a TorchScript file's classes that an error lists."""


@dataclass(frozen=True)
class Source:
    """A model, and how to inspect it."""

    kind: str
    """`registered`, `onnx`, `keras`, `function`, `weights` for PyTorch's as safetensors, or `pickled` for its own."""
    location: str
    """URI, path, or module:function."""

    @property
    def name(self) -> str:
        """Its name in a spec."""
        if registered := REGISTERED.fullmatch(self.location):
            label = registered["name"]
        elif self.kind == "function":
            label = self.location.partition(":")[2]
        else:
            label = Path(self.location).resolve().stem
        return name_of(label)


def name_of(text: str) -> str:
    """Return a name that a spec accepts: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "model"


def source_of(model: str) -> Source:
    """Return what MODEL names. Raise ModelError, saying what to do, if a spec cannot start from it."""
    if model.startswith("models:"):
        if not REGISTERED.fullmatch(model):
            raise ModelError(f"{model}: write a registered model as models:/NAME@ALIAS or models:/NAME/VERSION")
        return Source("registered", model)
    path = Path(model)
    if not path.exists() and re.fullmatch(FUNCTION_NAME, model):
        return Source("function", model)
    if not path.exists():
        raise ModelError(
            f"{model}: no such file or folder; name an ONNX file, a SavedModel's folder, a .keras or .h5 file, a "
            f"{WEIGHTS} file, models:/NAME@ALIAS, or the function that builds the network as module:function"
        )
    kind = _kind_of(path)
    if kind == "weights" and path.is_dir():
        [path] = path.glob(f"*{WEIGHTS}")
    return Source(kind, str(path))


def _kind_of(path: Path) -> str:
    """Return the kind of a file or folder. Raise ModelError."""
    if path.is_dir():
        return _kind_of_folder(path)
    kinds = {".onnx": "onnx", WEIGHTS: "weights"} | dict.fromkeys(KERAS, "keras") | dict.fromkeys(TORCH, "pickled")
    if path.suffix in kinds:
        return kinds[path.suffix]
    if zipfile.is_zipfile(path):
        return "pickled"
    raise ModelError(
        f"{path}: an unknown kind of file; ONNX is .onnx, Keras {', '.join(KERAS)} or a SavedModel's folder, and "
        f"PyTorch's weights are {WEIGHTS}"
    )


def _kind_of_folder(path: Path) -> str:
    if (path / SAVED_MODEL).is_file():
        return "keras"
    for kind, suffix in (("onnx", ".onnx"), ("weights", WEIGHTS)):
        if len(list(path.glob(f"*{suffix}"))) == 1:
            return kind
    raise ModelError(f"{path}: neither a SavedModel ({SAVED_MODEL}) nor a folder with one .onnx or {WEIGHTS} file")


def about_pickled(path: Path) -> str:
    """Return what a PyTorch file is, from its list of files alone, and what to do with it."""
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    inside = [PurePosixPath(n).parts[1:] for n in names]
    constants = sum(parts[:1] == ("constants",) for parts in inside)
    scripts = [parts for parts in inside if parts[:1] == ("code",) and parts[-1].endswith(".py")]
    code = sorted({".".join(parts[2:]).removesuffix(".py") for parts in scripts})
    if not code:
        what = "a pickled checkpoint of PyTorch"
    else:
        modules = ", ".join(code[:NAMED]) + (", …" if len(code) > NAMED else "")
        what = f"a TorchScript file ({constants} constants; code of {modules})"
    weights = path.with_suffix(WEIGHTS)
    return (
        f"{path}: {what}. It holds a pickle, which runs code when it is loaded, so only its list of files was read. "
        "If you trust it, load it yourself and save its weights in Python:\n"
        f"  safetensors.torch.save_file(model.state_dict(), '{weights}')\n"
        "then name them with the function that builds the network:\n"
        f"  {about_weights(weights)}\n"
        "or export it (torch.onnx.export), and name the ONNX file instead"
    )


def about_weights(path: Path) -> str:
    """Return the command that makes a spec from weights."""
    return f"slipstream init {shlex.quote(str(path))} --architecture module:function --out {name_of(path.stem)}.yaml"
