"""Data sets that a spec names by file: beside the user's code, or in S3."""

from pathlib import Path

import numpy as np
import pytest

from slipstream import data, storage
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
    """The user's code, with a data set beside it."""
    code = tmp_path / "code"
    (code / "data").mkdir(parents=True)
    write(code / "data/train.npz", 40)
    write(code / "data/test.npz", 20)
    monkeypatch.setenv("SLIPSTREAM_CODE", str(code))
    return code / "data"


def test_paths_are_relative_to_the_code(files: Path) -> None:
    loaded = data.load(parse(SPEC.format(train="data/train.npz", test=files / "test.npz"), "test"))
    assert (len(loaded.train), len(loaded.test)) == (40, 20)


def test_a_data_set_in_s3_is_the_same_data_set(files: Path, bucket: str) -> None:
    for name in ("train.npz", "test.npz"):
        storage.upload(files / name, f"{bucket}/sets/{name}")
    there = data.load(parse(SPEC.format(train=f"{bucket}/sets/train.npz", test=f"{bucket}/sets/test.npz"), "test"))
    here = data.load(parse(SPEC.format(train="data/train.npz", test="data/test.npz"), "test"))
    assert there.digests() == here.digests()
    assert there.calibration(16, seed=3).tolist() == here.calibration(16, seed=3).tolist()


def test_what_is_no_data_set_is_named_by_its_uri(files: Path, bucket: str) -> None:
    storage.write_text(f"{bucket}/train.npz", "not an archive")
    with pytest.raises(DataError, match=rf"{bucket}/train\.npz: not an \.npz file"):
        data.load(parse(SPEC.format(train=f"{bucket}/train.npz", test="data/test.npz"), "test"))
    with pytest.raises(DataError, match=rf"{bucket}/none\.npz: there is no such object"):
        data.load(parse(SPEC.format(train=f"{bucket}/none.npz", test="data/test.npz"), "test"))
