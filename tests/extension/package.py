"""The package that docs/extending.md builds, written and installed as the page says, outside this repository."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
INSTALLER = ROOT / ".envs/torch/bin/python"
"""Has pip and setuptools, whichever environment the tests run in."""


def files() -> dict[str, str]:
    """The page's code blocks that begin with a path, by that path."""
    blocks = re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return dict(blocks)


def write(folder: Path) -> Path:
    """The package's source in `folder`."""
    for name, text in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def install(source: Path, site: Path) -> Path:
    """Install a source folder into `site`, which then belongs on PYTHONPATH."""
    command = [str(INSTALLER), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(site), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return site


def environment(site: Path, **variables: str) -> dict[str, str]:
    """Variables under which a process finds the package, and the tests' shared code."""
    return os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"} | variables
