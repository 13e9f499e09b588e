"""Makes an image's virtual environment: run by the Dockerfiles while they build, not part of the images.

`python environment.py requirements EXTRA...` prints what pip installs for an environment, so that this layer does not
depend on slipstream's own code; `python environment.py finish` drops from the environment it runs in what only its
makers need, and compiles the rest.
"""

import compileall
import re
import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path
from py_compile import PycInvalidationMode

TESTED = ("matplotlib", "mpl_toolkits", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "sympy")
"""Packages whose folders `tests` go. Nothing outside such a folder imports from one (checked for the pinned versions,
except for a generator of scipy's that is not part of its interface); other packages' tests are small."""

DROPPED = (
    "kubernetes/aio",
    "onnx/backend/test/data",
    "openvino/include",
    "pyarrow/include",
    "tensorflow/include",
    "tests",
    "torch/include",
    "torch/share/cmake",
    "torch/test",
)
"""Headers and build files, which need the compiler that the images do not have; test data; tf2onnx's tests, which lie
next to its package; and the asyncio half of Kubernetes' client, which nothing here imports (neither KServe nor Airflow,
which has a package of its own for it)."""

KEPT_PROGRAM = "torch_shm_manager"
"""The only program of torch/bin that PyTorch itself starts (for tensors shared by file descriptor); the others are
its test programs and protoc."""


def requirements(*extras: str) -> list[str]:
    """What pyproject.toml asks for: the core's dependencies and those of extras, also of the extras that they name."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = list(project["dependencies"])
    wanted = list(extras)
    while wanted:
        for requirement in project["optional-dependencies"][wanted.pop(0)]:
            if (own := re.fullmatch(r"slipstream\[([\w,-]+)\]", requirement)) is not None:
                wanted += own[1].split(",")
            else:
                found.append(requirement)
    return list(dict.fromkeys(found))


def unneeded(packages: Path) -> list[Path]:
    """Files and folders below site-packages that no step needs."""
    found = [packages / path for path in DROPPED]
    for name in TESTED:
        found += sorted(p for p in (packages / name).rglob("tests") if p.is_dir())
    found += [p for p in (packages / "torch" / "bin").glob("*") if p.name != KEPT_PROGRAM]
    return [p for p in found if p.exists()]


def size(path: Path) -> int:
    """Bytes below a path."""
    return sum(p.lstat().st_size for p in [path, *path.rglob("*")] if not p.is_dir())


def finish() -> None:
    """Drop, then compile; prints what that saved and cost."""
    packages = Path(sysconfig.get_path("purelib"))
    dropped = 0
    for path in unneeded(packages):
        if not path.exists():  # went with the folder above it
            continue
        dropped += size(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    full = size(packages)
    print(f"kept {full / 1e6:.0f} MB, dropped {dropped / 1e6:.0f} MB")
    compile_all(packages)
    print(f"bytecode: {(size(packages) - full) / 1e6:.0f} MB")


def compile_all(folder: Path) -> None:
    """Bytecode for every module, valid whatever time stamps the copy into the image leaves: a read-only root cannot
    make up for what is missing, and Airflow or torch take seconds longer without. Files that are no Python of this
    version (templates) stay as they are."""
    compileall.compile_dir(folder, quiet=2, workers=0, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)


if __name__ == "__main__":
    if sys.argv[1] == "requirements":
        print("\n".join(requirements(*sys.argv[2:])))
    else:
        finish()
