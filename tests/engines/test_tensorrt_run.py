"""What the runner does with CUDA and TensorRT, on the stand-in of both; on a GPU test_tensorrt.py runs the contract."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT for RTX: the extra tensorrt-rtx")

from tests.engines.candidates import network, write
from tests.engines.cuda_stand_in import Cuda, Engine
from tests.engines.images import SHAPE, samples

from slipstream.engines import tensorrt_run
from slipstream.engines.tensorrt_api import trt
from slipstream.engines.tensorrt_options import TensorRTOptions
from slipstream.engines.tensorrt_run import TensorRTRunner, chunks, usual_shapes
from slipstream.errors import DataError
from slipstream.frameworks.base import ONNX
from slipstream.onnx.agreement.reference import reference
from slipstream.spec import Target


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fp32") / "candidate", network())


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()
    monkeypatch.setattr(tensorrt_run, "cuda", found)
    return found


@pytest.fixture
def make(cuda: Cuda, candidate: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner for batches of `least` to `most`."""

    def made(least: int = 1, most: int = 8, cache: Path | None = None, **options: Any) -> TensorRTRunner:
        engine = Engine(cuda, candidate, least, most, trt, capturable=options.pop("capturable", True))
        monkeypatch.setattr(tensorrt_run, "_deserialize", lambda plan: engine)
        target = Target(engine="tensorrt", device="GPU", batch=(least, least, most))
        return TensorRTRunner(b"plan", target, TensorRTOptions(**options), 0, cache)

    return made


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_answers_are_those_of_the_network_at_every_batch_size_in_any_order(
    make: Any, cuda: Cuda, candidate: Path, cuda_graph: bool
) -> None:
    runner, x = make(cuda_graph=cuda_graph), samples(20)
    expected = reference(candidate / ONNX, x)
    for start, n in ((0, 1), (3, 8), (1, 1), (5, 3), (0, 20), (7, 8), (2, 1)):
        got = runner.run(x[start : start + n])
        np.testing.assert_allclose(got, expected[start : start + n], rtol=1e-4, atol=1e-4)
    # Batches of 1 and of 8 (alone, and two of the 20's three parts) are graphs; 3 and the 20's last 4 are none.
    assert cuda.launched == (7 if cuda_graph else 0)


def test_answers_are_not_overwritten_by_later_calls(make: Any) -> None:
    runner = make()
    for n in (1, 3):
        first = runner.run(samples(n))
        kept = first.copy()
        runner.run(-samples(n))
        np.testing.assert_array_equal(first, kept)


def test_a_batch_below_the_profile_is_filled_up_and_cut_off_again(make: Any, candidate: Path) -> None:
    x = samples(9)
    np.testing.assert_allclose(make(least=4).run(x), reference(candidate / ONNX, x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_captured_runs_without_a_graph(make: Any, cuda: Cuda, candidate: Path) -> None:
    runner, x = make(capturable=False), samples(1)
    np.testing.assert_allclose(runner.run(x), reference(candidate / ONNX, x), rtol=1e-4, atol=1e-4)
    assert cuda.launched == 0


def test_compiled_kernels_are_kept_for_the_next_load(make: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "gpu.runtime-cache"
    make(cache=cache).run(samples(1))
    assert cache.read_bytes() == b"kernel;"
    make(cache=cache).run(samples(8))
    assert cache.read_bytes() == b"kernel;kernel;"


def test_everything_is_given_back(make: Any, cuda: Cuda) -> None:
    runner = make()
    runner.run(samples(1))
    assert len(cuda.memory) == 4
    del runner
    gc.collect()
    assert not cuda.memory
    assert cuda.freed == ["executable", "graph", "device", "pinned", "device", "pinned", "stream"]


def test_wrong_batches_are_refused(make: Any) -> None:
    runner = make()
    for batch in (samples(1)[0], samples(1)[:, :, :8], samples(1).astype(np.float64), samples(1)[:0]):
        with pytest.raises(DataError, match="N×1×16×16 float32"):
            runner.run(batch)


def test_chunks() -> None:
    assert list(chunks(20, 1, 8)) == [(0, 8, 8), (8, 8, 8), (16, 4, 4)]
    assert list(chunks(9, 4, 8)) == [(0, 8, 8), (8, 1, 4)]
    assert list(chunks(8, 8, 8)) == [(0, 8, 8)]


def test_usual_shapes() -> None:
    images = Target(engine="tensorrt", batch=(1, 4, 16))
    assert usual_shapes(images, SHAPE) == [(1, *SHAPE), (4, *SHAPE), (16, *SHAPE)]
    text = Target(engine="tensorrt", batch=(1, 1, 8), lengths=(16, 32))
    assert usual_shapes(text, (-1,)) == [(1, 16), (1, 32), (8, 16), (8, 32)]
