"""Engines on texts of varying length: without buckets and with them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.engines.candidates import network
from tests.engines.candidates import write as write_images
from tests.engines.text_networks import write
from tests.engines.texts import LENGTH, document, samples

from slipstream.data import tokens
from slipstream.engines.base import build_engine, load_engine, read_manifest
from slipstream.engines.lengths import Bucketed
from slipstream.errors import DataError, EngineError
from slipstream.frameworks.base import ONNX
from slipstream.onnx.agreement.reference import reference
from slipstream.spec import Target


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("text") / "candidate")


@pytest.fixture(params=["openvino", "onnxruntime"])
def target(request: pytest.FixtureRequest) -> Target:
    return Target(engine=request.param, threads=1)


class Recording:
    """Notes the batches that reach it."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self.shapes.append(batch.shape)
        return np.zeros((len(batch), 2), np.float32)


def bucketed(target: Target) -> Target:
    return target.model_copy(update={"lengths": (4, 8, 16)})


def test_an_engine_takes_any_length_in_any_batch(candidate: Path, target: Target, tmp_path: Path) -> None:
    manifest = build_engine(candidate, target, tmp_path / "engine")
    assert (manifest.input_shape, manifest.input_dtype) == ((-1,), "int64")
    runner = load_engine(tmp_path / "engine")
    for n, length in ((1, LENGTH), (3, 5), (1, 1), (8, LENGTH), (1, 7)):
        x = samples(n).inputs[:, :length]
        np.testing.assert_allclose(runner.run(x), reference(candidate / ONNX, x), rtol=1e-4, atol=1e-4)


def test_answers_in_buckets_are_those_of_the_whole_length(candidate: Path, target: Target, tmp_path: Path) -> None:
    build_engine(candidate, bucketed(target), tmp_path / "engine")
    runner = load_engine(tmp_path / "engine")
    x = samples(32).inputs
    expected = reference(candidate / ONNX, x)
    np.testing.assert_allclose(runner.run(x), expected, rtol=1e-4, atol=1e-4)
    alone = np.concatenate([runner.run(x[i : i + 1]) for i in range(len(x))])
    np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(runner.run(x[:, ::-1][:, ::-1]), expected, rtol=1e-4, atol=1e-4)


def test_the_engine_sees_only_the_lengths_of_the_buckets() -> None:
    recording = Recording()
    runner = Bucketed(recording, (4, 8, 16))
    for x in (np.ones((2, 3)), np.ones((1, 8)), np.ones((1, 9)), np.pad(np.ones((3, 2)), ((0, 0), (0, 30)))):
        runner.run(x.astype(np.int64))
    runner.run(np.zeros((1, 5), np.int64))
    assert recording.shapes == [(2, 4), (1, 8), (1, 16), (3, 4), (1, 4)]


def test_padding_within_a_text_is_not_cut() -> None:
    recording = Recording()
    Bucketed(recording, (2, 8)).run(np.array([[5, 0, 0, 5, 0, 0, 0, 0]], np.int64))
    assert recording.shapes == [(1, 8)]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (np.ones((1, 17), np.int64), "17 tokens, but the target's greatest length is 16"),
        (np.ones((1, 4), np.int32), "N×T int64"),
        (np.ones((1, 4, 1), np.int64), "N×T int64"),
        (np.ones((0, 4), np.int64), "N×T int64"),
    ],
)
def test_what_does_not_fit_into_a_bucket_is_refused(batch: npt.NDArray[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Bucketed(Recording(), (4, 8, 16)).run(batch)


def test_without_buckets_a_wrong_batch_is_refused(candidate: Path, target: Target, tmp_path: Path) -> None:
    build_engine(candidate, target, tmp_path / "engine")
    runner = load_engine(tmp_path / "engine")
    for batch in (np.ones((1, 4), np.int32), np.ones(4, np.int64), np.ones((1, 0), np.int64)):
        with pytest.raises(DataError, match="N×-1 int64"):
            runner.run(batch)


def test_lengths_are_refused_for_a_model_of_one_shape(target: Target, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", network())
    with pytest.raises(EngineError, match=r"N×1×16×16 float32.*`lengths`"):
        build_engine(images, bucketed(target), tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_the_tokenizer_is_one_of_the_engines_files_and_checked(candidate: Path, target: Target, tmp_path: Path) -> None:
    given = tokens.Tokenizer(document()).limited(8)
    build_engine(candidate, target, tmp_path / "engine", given)
    assert tokens.TOKENIZER in read_manifest(tmp_path / "engine").files
    load_engine(tmp_path / "engine")
    path = tmp_path / "engine" / tokens.TOKENIZER
    path.write_text(path.read_text().replace('"good":2', '"good":3'))
    with pytest.raises(EngineError, match=r"tokenizer\.json: missing, or not the file that was built"):
        load_engine(tmp_path / "engine")
