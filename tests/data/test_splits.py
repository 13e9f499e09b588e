"""Data sets that a spec names by file, next to the user's code or in S3."""

from pathlib import Path

import numpy as np
import pytest

from slipstream import storage
from slipstream.data import splits
from slipstream.errors import DataError
from slipstream.spec import parse

SPEC = """\
name: tiny
model: {{registry: models:/net@source, architecture: m:net}}
data: {{train: {train}, test: {test}}}
recipes: {{int8: [quantize]}}
targets: {{server: {{engine: openvino}}}}
"""


def write(path: Path, samples: int) -> Path:
    images = np.random.default_rng(samples).random((samples, 3, 4, 4), dtype=np.float32)
    np.savez(path, inputs=images, labels=np.arange(samples, dtype=np.int64))
    return path


@pytest.fixture
def files(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's code, with a data set next to it."""
    code = tmp_path / "code"
    (code / "data").mkdir(parents=True)
    write(code / "data/train.npz", 40)
    write(code / "data/test.npz", 20)
    monkeypatch.setenv("SLIPSTREAM_CODE", str(code))
    return code / "data"


def test_paths_are_relative_to_the_code(files: Path) -> None:
    loaded = splits.load(parse(SPEC.format(train="data/train.npz", test=files / "test.npz"), "test"))
    assert (len(loaded.train), len(loaded.test)) == (40, 20)


def test_a_data_set_in_s3_is_the_same_data_set(files: Path, bucket: str) -> None:
    for name in ("train.npz", "test.npz"):
        storage.upload(files / name, f"{bucket}/sets/{name}")
    there = splits.load(parse(SPEC.format(train=f"{bucket}/sets/train.npz", test=f"{bucket}/sets/test.npz"), "test"))
    here = splits.load(parse(SPEC.format(train="data/train.npz", test="data/test.npz"), "test"))
    assert there.digests() == here.digests()
    assert there.calibration(16, seed=3).tolist() == here.calibration(16, seed=3).tolist()


def test_what_is_no_data_set_is_named_by_its_uri(files: Path, bucket: str) -> None:
    storage.write_text(f"{bucket}/train.npz", "not an archive")
    with pytest.raises(DataError, match=rf"{bucket}/train\.npz: not an \.npz file"):
        splits.load(parse(SPEC.format(train=f"{bucket}/train.npz", test="data/test.npz"), "test"))
    with pytest.raises(DataError, match=rf"{bucket}/none\.npz: there is no such object"):
        splits.load(parse(SPEC.format(train=f"{bucket}/none.npz", test="data/test.npz"), "test"))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8", "bool", ">f4"])
def test_inputs_that_engines_do_not_take_are_refused_with_the_mend(files: Path, dtype: str) -> None:
    np.savez(files / "test.npz", inputs=np.zeros((20, 3, 4, 4), dtype), labels=np.arange(20))
    said = rf"^data: inputs of split test are {dtype}, .*float32, int64, int32, uint8.*inputs\.astype\('float32'\)$"
    with pytest.raises(DataError, match=said):
        splits.load(parse(SPEC.format(train="data/train.npz", test="data/test.npz"), "test"))


@pytest.mark.parametrize("dtype", splits.INPUT_DTYPES)
def test_inputs_that_engines_take_are_loaded(files: Path, dtype: str) -> None:
    np.savez(files / "test.npz", inputs=np.zeros((20, 3, 4, 4), dtype), labels=np.arange(20))
    loaded = splits.load(parse(SPEC.format(train="data/train.npz", test="data/test.npz"), "test"))
    assert loaded.test.inputs.dtype == dtype


def test_a_text_is_the_same_however_far_it_is_padded() -> None:
    train = np.array([[5, 7, 0], [5, 0, 7], [7, 5, 0], [0, 0, 0]], np.int64)
    test = np.array([[5, 7, 0, 0, 0], [0, 0, 0, 0, 0]], np.int64)
    labels = np.arange(4)
    texts = splits.Data(splits.Split(train, labels), splits.Split(test, labels[:2]))
    assert texts.calibration(2, seed=0).tolist() == [1, 2]
    assert len(set(texts.train.sample_digests())) == 4
    numbers = splits.Split(train.astype(np.int32), labels)
    padded = splits.Split(test.astype(np.int32), labels[:2])  # int32 are no token ids, and so have no padding
    assert splits.Data(numbers, padded).calibration(4, seed=0).tolist() == [0, 1, 2, 3]
