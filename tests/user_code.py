"""A folder of the user's code for a test: modules that the test wrote, and the examples."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take functions from `folder`; call it when its modules are written. Those of earlier tests are forgotten."""
    for name in ("examples", "tests"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    for file in folder.glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    monkeypatch.setenv("SLIPSTREAM_CODE", str(folder))
    monkeypatch.syspath_prepend(folder)
