"""The Kubeflow SDK lives in an environment of its own."""

import sys
from pathlib import Path

if sys.prefix != str(Path(__file__).parents[3] / ".envs/kubeflow"):
    collect_ignore_glob = ["test_*.py"]
