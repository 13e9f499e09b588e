"""check: inputs that used to be accepted, or found only after training. Each is refused with what is wrong."""

import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.steps.training import document, spec_of

from slipstream.contract import StepInput
from slipstream.errors import CodeError, DataError, InputError, ModelError, SpecError
from slipstream.home import Home
from slipstream.runner.context import Context
from slipstream.steps import check

pytestmark = pytest.mark.usefixtures("home")
torch.set_num_threads(1)


def checked(written: dict[str, Any]) -> None:
    """What the step does before anything is built, without a registry. Raise what it would."""
    spec, home = spec_of(written), Home.from_environment()
    context = Context(spec, StepInput(run_key="r"), "check", "odd", cast(Any, None), cast(Any, None), home)
    problems = list(check._functions(spec))
    if problems or (problems := list(check._networks_and_data(spec, context, {}))):
        raise check._joined(problems)


LOADER = """
import sys
import numpy as np
from slipstream.data.splits import Data, Split

NAMES = ("a", "b", "c")

def split(n, seed, classes=3):
    inputs = np.random.default_rng(seed).random((n, 1, 4, 4), np.float32)
    return Split(inputs, np.arange(n) % classes)

def data(train=100, test=400, classes=3):
    return Data(split(train, 1, classes), split(test, 2, classes), classes=NAMES[:classes])

def repeated():
    few = split(10, 2)
    return Data(split(100, 1), Split(np.tile(few.inputs, (150, 1, 1, 1)), np.tile(few.labels, 150)))

def few_repeated():
    test = split(400, 2)
    test.inputs[1] = test.inputs[0]
    return Data(split(100, 1), test)

def same():
    return Data(split(400, 1), split(400, 1))

def shared(n):
    train, test = split(400, 1), split(400, 2)
    return Data(train, Split(np.concatenate([train.inputs[:n], test.inputs[n:]]), test.labels))

def shuffled():
    return Data(split(100, 1), split(400, np.random.default_rng().integers(10**9)))

def by_hash():
    train = split(100, 1)
    order = list({f"sample {i}": i for i in range(100)}.values())
    order = [int(name[7:]) for name in set(f"sample {i}" for i in range(100))]
    return Data(train.take(np.array(order)), split(400, 2))

def numbers():
    return Data(split(100, 1), split(400, 2), classes=(0, 1, 2))

def one_based():
    train, test = split(100, 1), split(400, 2)
    return Data(Split(train.inputs, train.labels + 1), Split(test.inputs, test.labels + 1))

def negative():
    train, test = split(100, 1), split(400, 2)
    return Data(Split(train.inputs, train.labels - 1), test)

def labels_2d():
    train, test = split(100, 1), split(400, 2)
    return Data(train, Split(test.inputs, np.eye(3)[test.labels]))

def lists():
    train = split(100, 1)
    return Data(train, Split(list(train.inputs), list(train.labels)))

def named():
    train = split(100, 1)
    return Data(Split({"x": train.inputs}, train.labels), train)

def with_torch():
    import torch
    return data()

def exits(code):
    sys.exit(code)

def network(outputs=3):
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.Linear(16, outputs))

def two_heads():
    from torch import nn

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(16, 3)
        def forward(self, images):
            return self.dense(images.flatten(1)), images

    return Heads()

def leaves():
    sys.exit(0)

def score(outputs, labels):
    return (outputs.argmax(1) == labels).astype(float)

def percent(outputs, labels):
    return 100 * (outputs.argmax(1) >= 0)

def metric_with_torch(outputs, labels):
    import torch
    return score(outputs, labels)
"""


def call(function: str, **params: Any) -> dict[str, Any]:
    return {"function": f"odd_inputs:{function}", "params": params}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A spec on these functions that is accepted as it is."""
    (tmp_path / "odd_inputs.py").write_text(LOADER)
    monkeypatch.setenv("SLIPSTREAM_CODE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_inputs", raising=False)
    monkeypatch.setattr(check, "rehearse", lambda *_: [])  # an export of seconds, of which these cases ask nothing
    made = document("odd-inputs") | {"distill": None, "recipes": {"int8": ["quantize"]}, "quantize": {"samples": 64}}
    made["model"] |= {"architecture": call("network"), "train": "odd_inputs:network"}
    return made | {"data": call("data"), "objective": {"max_drop": 1.0}}


CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "10 samples 150 times": (
        {"data": call("repeated")},
        DataError,
        "split test has 1,500 samples, but only 10 distinct ones",
    ),
    "train is test": (
        {"data": call("same")},
        DataError,
        "400 of the 400 distinct samples of split test are in split train",
    ),
    "half is shared": ({"data": call("shared", n=200)}, DataError, "200 of the 400 distinct samples"),
    "5 of 400 are shared": ({"data": call("shared", n=5)}, DataError, "5 of the 400 distinct samples"),
    "more calibration samples than there are": (
        {"quantize": {"samples": 4000}},
        DataError,
        "calibration wants quantize.samples, 4000, but split train has only 100 distinct",
    ),
    "one training sample": ({"data": call("data", train=1)}, DataError, "split train has only 1 distinct"),
    "5 test samples": (
        {"data": call("data", test=5)},
        DataError,
        "5 test samples can never prove a drop of at most objective.max_drop, 1 points, .* it takes at least 268;",
    ),
    "another order at each call": (
        {"data": call("shuffled")},
        DataError,
        "the loader gave another split test in a second",
    ),
    "the order of a set": ({"data": call("by_hash")}, DataError, "the loader gave another split train in a second"),
    "class names that are numbers": (
        {"data": call("numbers")},
        DataError,
        r"classes must be names, as text, not \(0, 1, 2",
    ),
    "labels from 1": ({"data": call("one_based")}, ModelError, "labels run from 1 to 3; they seem to count from 1"),
    "labels from -1": ({"data": call("negative")}, DataError, "split train: labels must count from 0 for top1"),
    "one-hot labels": (
        {"data": call("labels_2d")},
        DataError,
        r"split test: labels must be \(N,\) integers for top1, not \(N, 3\) float64",
    ),
    "lists": ({"data": call("lists")}, DataError, "inputs of split test are a list, not a NumPy array"),
    "inputs by name": ({"data": call("named")}, DataError, "inputs of split train are a dict, not a NumPy array"),
    "top5 of 3": (
        {"objective": {"metric": "top5"}},
        SpecError,
        "objective.metric: .* has 3 outputs, so that top5 is always right",
    ),
    "top1 of 1": (
        {"data": call("data", classes=1), "model": call("network", outputs=1)},
        SpecError,
        "objective.metric: .* has 1 outputs, so that top1 is always right; give one score for each class",
    ),
    "f1 of 1": (
        {"data": call("data", classes=1), "model": call("network", outputs=1), "objective": {"metric": "f1"}},
        SpecError,
        "so that f1 is always right",
    ),
    "a metric in percent": (
        {"objective": {"metric": "odd_inputs:percent"}},
        SpecError,
        "must return scores from 0 to 1, but they run from 100 to 100",
    ),
    "two heads": ({"model": call("two_heads")}, ModelError, "answers a tuple, but must answer one tensor"),
    "a network function that exits": ({"model": call("leaves")}, CodeError, r"odd_inputs.py:\d+: sys.exit\(0\)"),
    "a loader that exits with 0": ({"data": call("exits", code=0)}, CodeError, r"odd_inputs.py:\d+: sys.exit\(0\)"),
    "a loader that exits with 3": ({"data": call("exits", code=3)}, CodeError, r"odd_inputs.py:\d+: sys.exit\(3\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(written: dict[str, Any], case: str) -> None:
    changes, error, said = CASES[case]
    for section, value in changes.items():
        written[section] = written["model"] | {"architecture": value} if section == "model" else value
    with pytest.raises(InputError, match=said) as refused:
        checked(written)
    assert type(refused.value) is error, refused.value
    assert refused.value.exit_code == 2


SERVING = {
    "a loader that needs torch": (
        {"data": call("with_torch")},
        r"data: .*odd_inputs.py:\d+: ModuleNotFoundError: .*torch",
    ),
    "a metric that needs torch": (
        {"objective": {"metric": "odd_inputs:metric_with_torch"}},
        r"objective.metric: .*odd_inputs.py:\d+: ModuleNotFoundError: .*torch",
    ),
}


@pytest.mark.parametrize("case", SERVING)
def test_what_stages_2_and_3_cannot_load_is_found_before_training(written: dict[str, Any], case: str) -> None:
    changes, said = SERVING[case]
    with pytest.raises(CodeError, match=said + r".*\(in the environment serve, which stages 2 and 3 run in"):
        checked(written | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"data": call("shared", n=4)}, {"data": call("few_repeated")}, {"objective": {"metric": "odd_inputs:score"}}],
    ids=["as it is", "1 % shared", "one repeated", "a metric of one's own"],
)
def test_what_is_sound_or_tolerated_is_accepted(written: dict[str, Any], changes: dict[str, Any]) -> None:
    checked(written | changes)


def test_calibration_samples_are_distinct() -> None:
    from slipstream.data.splits import Data, Split

    inputs = np.repeat(np.arange(40, dtype=np.float32), 3).reshape(-1, 1)
    test = Split(np.arange(30, 50, dtype=np.float32).reshape(-1, 1), np.zeros(20, np.int64))
    drawn = Data(Split(inputs, np.zeros(120, np.int64)), test).calibration(25, seed=0)
    assert len(set(inputs[drawn].ravel())) == 25
    assert inputs[drawn].max() < 30
