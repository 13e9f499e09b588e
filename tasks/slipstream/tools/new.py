"""`slipstream new`: a new project: spec, network, data, Makefile, README, CI file."""

import re
from pathlib import Path
from string import Template

from slipstream.errors import InputError
from slipstream.spec.fields import NAME, PATTERNS

FILES = {
    "$name.yaml": """\
# What to optimize, how good it must stay, where it runs. `slipstream schema` lists all keys.
name: $name
model:
  registry: models:/$name@source                # moving this alias starts a run
  architecture: $package.network:network
  train: {function: $package.network:train, params: {epochs: 4}}
data: $package.dataset:data
objective: {metric: top1, max_drop: 1.0}        # points below the trained model, at most
recipes:
  int8: [quantize]
targets:
  server: {engine: openvino, threads: 2}
  portable: {engine: onnxruntime, threads: 2}
""",
    "$package/__init__.py": '"""Functions that $name.yaml names."""\n',
    "$package/network.py": '''\
"""The network and its training: put yours in place of these."""


def network():
    """The untrained network; weights are loaded into it, so that nothing is ever unpickled."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def train(training, epochs):
    """The trained network. `fit` resumes after a kill and records each epoch; a loop of your own may do so too."""
    model = network()
    training.fit(model, epochs=epochs, learning_rate=0.05)
    return model
''',
    "$package/dataset.py": '''\
"""The data set: two splits, prepared exactly as the network takes them."""

from pathlib import Path

import numpy as np

from slipstream import Data, DataError, Split

FOLDER = Path(__file__).parent.parent / "data"


def data():
    """Training and held-out test samples; gates are judged on the test split alone, so it must be real and unseen."""
    return Data(train=_split("train"), test=_split("test"))


def _split(name):
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        raise DataError(f"{path} is not there; write it with np.savez(path, inputs=..., labels=...)")
    with np.load(path) as arrays:
        return Split(arrays["inputs"], arrays["labels"])
''',
    "Makefile": """\
.PHONY: setup run report

setup: ## Install what the spec needs, into .envs
	slipstream setup $name.yaml

run: ## Start the platform, and run the spec
	slipstream up
	slipstream run $name.yaml --watch

report: ## Show the latest run
	slipstream report $name
""",
    "README.md": """\
# $name

A model that slipstream makes fast and puts into production.

1. Put your network into `$package/network.py`, and your data into `data/train.npz` and `data/test.npz`, or change
   `$package/dataset.py` to read them from where they are.
2. `slipstream validate $name.yaml` checks the spec; `make setup` installs what it needs.
3. `make run` trains, optimizes, tests and releases; `make report` shows what became of it.
""",
    ".gitignore": ".envs/\n.slipstream/\n__pycache__/\ndata/\n",
    ".github/workflows/validate.yml": """\
name: validate
on: [push, pull_request]
jobs:
  spec:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {python-version: "3.11"}
      - run: pip install slipstream    # or the wheel that you built
      - run: slipstream validate $name.yaml
""",
}
"""Text by path, both with `$name` of the spec and `$package` of its Python package."""


def new(folder: Path) -> list[Path]:
    """Write a project into a folder of its name; return its files. Raise InputError if one of them exists."""
    name = folder.resolve().name
    if not re.fullmatch(NAME, name):
        raise InputError(f"{name!r} cannot be the name of a project, and of its spec: it must be {PATTERNS[NAME]}")
    words = {"name": name, "package": re.sub(r"\W", "_", name)}
    filled = {path: Template(text).substitute(words) for path, text in FILES.items()}
    texts = {folder / Template(path).substitute(words): text for path, text in filled.items()}
    if there := [path for path in texts if path.exists()]:
        raise InputError(f"{', '.join(map(str, there))}: there already; name a new folder")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(texts)
