"""docs/tutorial.md, followed literally in an empty folder as far as the spec: its files, and its commands."""

import os
import re
import subprocess
from pathlib import Path

from slipstream import spec as specs
from slipstream.spec.sections import DataFiles

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
PLATFORM = ("slipstream up", "slipstream run", "slipstream report")
"""What needs the platform and many minutes; tests/e2e runs it."""


def test_the_tutorial_leads_to_a_valid_spec(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    lines = []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        if language == "python":
            name = block.splitlines()[0].removeprefix("# ")
            (tmp_path / "my-model" / name).write_text(block)
        else:
            lines += [line for line in block.splitlines() if not line.startswith(PLATFORM)]
    assert any(line.startswith("slipstream init") for line in lines)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")}
    done = subprocess.run(
        ["sh", "-e", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=kept | {"CHECKOUT": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "my-model.yaml: valid" in done.stdout
    spec = specs.load(tmp_path / "my-model/my-model.yaml")
    assert spec.model.file == "my-model.safetensors"
    assert isinstance(spec.data, DataFiles) and spec.data.train == "my-model-train.npz"
