"""Several processes train as one does: same losses, same checkpoints; and they end together, whatever ends them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.frameworks import group_work
from tests.frameworks.group_work import Trained
from torch import distributed

from slipstream.errors import DataError, ModelError, SlipstreamError, SpecError
from slipstream.frameworks.base import ALONE, Group
from slipstream.frameworks.torch import FRAMEWORK
from slipstream.frameworks.torch_distributed import TorchGroup

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("home")


def assert_equal(a: Trained, b: Trained, tolerance: float = 0.0) -> None:
    assert a[0].keys() == b[0].keys()
    for name, value in a[0].items():
        np.testing.assert_allclose(value, b[0][name], rtol=0, atol=tolerance, err_msg=name)


class TestTwoAndOne:
    """One session of two processes, and the same trainings in one."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("trainings")

    @pytest.fixture(scope="class")
    def two(self, folder: Path) -> Iterator[dict[str, Trained]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLIPSTREAM_CODE", str(Path(__file__).parents[2]))
            group_work.stop(ALONE, folder, "idle", "begun-by-one")
            yield FRAMEWORK.launch(2, group_work.session, folder)

    @pytest.mark.parametrize("name", ["idle", "soft"])
    def test_weights_losses_and_rates_are_those_of_one_process(
        self, two: dict[str, Trained], name: str, tmp_path: Path
    ) -> None:
        """Without batch norm and dropout nothing differs but the order of sums: 1e-5 is a hundred times as much."""
        one = group_work.train(ALONE, tmp_path, "idle", name)
        assert_equal(one, two[name], 1e-5)
        assert one[1].keys() == two[name][1].keys() == {0, 1, 2}
        for epoch, figures in one[1].items():
            assert two[name][1][epoch] == pytest.approx(figures, rel=1e-5)

    def test_a_loop_of_ones_own_shares_the_work_by_the_group(self, two: dict[str, Trained], tmp_path: Path) -> None:
        one = group_work.own_loop(ALONE, tmp_path)
        assert_equal(one, two["own"], 1e-5)
        assert two["own"][1][1]["train_loss"] == pytest.approx(one[1][1]["train_loss"], rel=1e-5)

    def test_with_batch_norm_and_dropout_the_curve_is_close(self, two: dict[str, Trained], tmp_path: Path) -> None:
        """Each half of a batch is normalized by itself, and dropout draws other numbers."""
        one = group_work.train(ALONE, tmp_path, "squares", "squares")
        losses = [(one[1][epoch]["train_loss"], two["squares"][1][epoch]["train_loss"]) for epoch in range(3)]
        assert losses[0] == pytest.approx((losses[0][0],) * 2, rel=0.05)
        assert all(abs(a - b) < 0.05 for a, b in losses)
        for name in ("1.running_mean", "1.running_var"):
            np.testing.assert_allclose(one[0][name], two["squares"][0][name], rtol=0.1, atol=0.05)

    def test_same_seed_and_number_of_processes_make_the_same_weights(self, two: dict[str, Trained]) -> None:
        assert_equal(two["squares"], two["squares-again"])

    def test_two_go_on_from_the_checkpoint_of_one(self, two: dict[str, Trained]) -> None:
        assert two["begun-by-one"][1].keys() == {1, 2}
        assert_equal(two["begun-by-one"], two["idle"], 1e-5)

    def test_what_process_0_has_comes_to_all(self, two: dict[str, Trained], folder: Path) -> None:
        first, second = (
            {p.relative_to(folder / rank).as_posix(): p.read_bytes() for p in (folder / rank).rglob("*") if p.is_file()}
            for rank in "01"
        )
        assert {*second} == {"file.bin", "tree/one", "tree/deep/empty", "answer"}
        assert {*first} == {*second, "own.pt"}  # only process 0 writes checkpoints
        assert all(first[name] == second[name] for name in ("file.bin", "tree/one", "tree/deep/empty"))
        assert json.loads(first["answer"]) == [0, [0, 1], 3.0, 0]
        assert json.loads(second["answer"]) == [0, [2, 3, 4], 3.0, 0]

    def test_one_goes_on_from_the_checkpoint_of_two(self, two: dict[str, Trained], folder: Path) -> None:
        found = group_work.train(ALONE, folder, "idle", "begun-by-two")
        assert found[1].keys() == {1, 2}
        assert_equal(found, two["idle"], 1e-5)


def test_the_error_of_the_process_that_failed_first_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^the second half of the data is bad$"):
        FRAMEWORK.launch(2, group_work.failing, tmp_path)


class TestBlaming:
    """A group of one real process."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> distributed.FileStore:
        return distributed.FileStore(str(tmp_path / "store"), 1)

    @pytest.fixture
    def group(self, store: distributed.FileStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchGroup]:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        group = TorchGroup(store, 0, 1)
        yield group
        group.leave()

    def test_somebody_elses_bug_says_where_it_happened(self, group: TorchGroup) -> None:
        said = "^process 0 of 1 failed: ZeroDivisionError: somebody's bug$"
        with pytest.raises(SlipstreamError, match=said) as caught, group.first_error_wins():
            raise ZeroDivisionError("somebody's bug")
        assert type(caught.value) is SlipstreamError and caught.value.exit_code == 1

    def test_what_follows_from_an_earlier_error_is_that_error(
        self, group: TorchGroup, store: distributed.FileStore
    ) -> None:
        store.set("slipstream/error", json.dumps({"kind": "DataError", "said": "no such split"}))
        with pytest.raises(DataError, match="no such split"), group.first_error_wins():
            raise RuntimeError("[gloo/pair.cc] connection closed by peer")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_launcher_ends_all(tmp_path: Path, number: signal.Signals) -> None:
    with waiting(tmp_path) as process:
        members = [int(path.name) for path in until_there_are(tmp_path, 2)]
        os.kill(process.pid, number)
        assert process.wait(timeout=30) == -number
        deadline = time.monotonic() + 10
        while any(is_running(pid) for pid in members):
            assert time.monotonic() < deadline, "the processes outlive their launcher"
            time.sleep(0.05)


def test_a_batch_too_small_for_all_is_refused(tmp_path: Path) -> None:
    """Needs no second process: it is refused before the group is used."""
    with pytest.raises(SpecError, match="a batch of 33 is too small for 20 processes"):
        group_work.train(Group(0, 20), tmp_path, "idle", "small")


@contextmanager
def waiting(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has launched two that wait for one another for ever."""
    program = (
        "from pathlib import Path\nfrom slipstream.frameworks.torch import FRAMEWORK\n"
        "from tests.frameworks.group_work import wait\nif __name__ == '__main__':\n"
        f"    FRAMEWORK.launch(2, wait, Path({str(folder)!r}))\n"
    )
    path = folder / "program.py"
    path.write_text(program)
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, str(path)], env=os.environ | {"PYTHONPATH": str(root)})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until_there_are(folder: Path, count: int, seconds: float = 60) -> list[Path]:
    deadline = time.monotonic() + seconds
    while len(found := [p for p in folder.iterdir() if p.name.isdigit()]) < count:
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.05)
    return found


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
