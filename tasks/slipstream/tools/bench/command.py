"""`slipstream bench`: measures each spec in the environment of its framework, then makes one page of all figures."""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from slipstream import spec as specs
from slipstream.errors import EXIT_INPUT, InputError, Unavailable
from slipstream.home import Home, write_atomically
from slipstream.platform import addresses
from slipstream.plugins import RETRAIN, VALIDATE
from slipstream.tools.bench import Bench, page


def measure(files: Sequence[Path], out: Path | None, run: str) -> str:
    """Return the page, which is also written to `out`; its figures are in a folder next to it: OUT without `.md`.

    Figures of other specs in that folder stay in the page. Raise InputError if no spec has a finished run, Unavailable
    if a measurement was aborted.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return _measure(files, Path(folder), run)
    text = _measure(files, out.with_suffix(""), run)
    write_atomically(out, text)
    return text


def _measure(files: Sequence[Path], folder: Path, run: str) -> str:
    home = Home.from_environment()
    environment = dict(os.environ)
    addresses.reach_mlflow(home, environment)
    folder.mkdir(parents=True, exist_ok=True)
    measured = [_measure_one(home, file, folder, run, environment) for file in files]
    if not any(measured):
        raise InputError(f"nothing to measure: no finished run of {', '.join(map(str, files))}")
    figure_files = sorted(folder.glob("*.json"))
    return page.render([Bench.model_validate_json(path.read_text()) for path in figure_files])


def _measure_one(home: Home, file: Path, folder: Path, run: str, environment: dict[str, str]) -> bool:
    """Return whether there was a run to measure; the process says why not."""
    spec = specs.load(file)
    environments = {spec.environment_of(VALIDATE, target) for target in spec.targets}
    special = environments - {spec.environment_of(RETRAIN, None)}  # an engine's own has the framework's too
    python = home.require_python(min(special or environments), f"bench of {spec.name}")
    out = folder / f"{spec.name}.json"
    command = [str(python), "-m", "slipstream.tools.bench.measure", str(file), "--run", run, "--out", str(out)]
    code = subprocess.run(command, env=environment, check=False).returncode
    if code not in (0, EXIT_INPUT):
        raise Unavailable(f"bench {spec.name}: the measurement ended with exit code {code}; what it said is above")
    return code == 0
