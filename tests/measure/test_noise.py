"""The noise guard tells other processes' work from this one's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream.measure import noise

SPIN = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def write(proc: Path, busy: list[int], own_pid: int, own: list[int]) -> None:
    """A /proc with one `cpu` line and one process; figures in ticks."""
    (proc / str(own_pid)).mkdir(parents=True, exist_ok=True)
    (proc / "stat").write_text("cpu  " + " ".join(map(str, busy)) + "\ncpu0 0 0\n")
    fields = ["S", "1", *["0"] * 9, *map(str, own)]
    (proc / str(own_pid) / "stat").write_text(f"{own_pid} (py (x) y) " + " ".join(fields) + "\n")


def test_others_are_all_busy_time_but_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "TICKS_PER_S", 100)
    monkeypatch.setattr(noise.os, "getpid", lambda: 4711)
    write(tmp_path, [1000, 0, 100, 9999, 50, 0, 0, 0, 0, 0], 4711, [300, 20, 5, 5])
    with noise.watch(tmp_path) as usage:
        time.sleep(0.2)
        # +100 user, +40 system, +10 steal; idle and iowait do not count; own +90
        write(tmp_path, [1100, 0, 140, 19999, 5000, 0, 0, 10, 0, 0], 4711, [380, 30, 5, 5])
    assert usage.others_cores == pytest.approx(0.6 / 0.2, rel=0.1)
    assert not usage.clean(0.15)


def test_descendants_count_as_own(tmp_path: Path) -> None:
    for pid, parent, ticks in ((10, 1, 1), (11, 10, 2), (12, 11, 4), (13, 1, 8)):
        (tmp_path / str(pid)).mkdir()
        fields = ["S", str(parent), *["0"] * 9, str(ticks), "0", "0", "0"]
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (x) " + " ".join(fields))
    assert noise._own_ticks(tmp_path, 10) == 7


@pytest.mark.parametrize("content", [None, "", "intr 1 2 3\n"])
def test_without_proc_nothing_is_claimed(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "stat").write_text(content)
    with noise.watch(tmp_path) as usage:
        pass
    assert usage.others_cores is None
    assert not usage.clean(100)


needs_proc = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc on this system")


@needs_proc
def test_ones_own_work_is_ones_own() -> None:
    before = noise._own_ticks(Path("/proc"), os.getpid())
    spin(0.5)
    used = noise._own_ticks(Path("/proc"), os.getpid()) - before
    assert used >= 0.4 * noise.TICKS_PER_S


@needs_proc
def test_a_busy_neighbour_is_seen(neighbour: int) -> None:  # codespell:ignore neighbour
    before = noise._own_ticks(Path("/proc"), os.getpid())
    with noise.watch() as usage:
        time.sleep(1)
    assert noise._own_ticks(Path("/proc"), os.getpid()) - before < 0.2 * noise.TICKS_PER_S
    assert usage.others_cores is not None
    assert usage.others_cores > 0.15
    assert not usage.clean(0.15)


@pytest.fixture
def neighbour() -> Iterator[int]:  # codespell:ignore neighbour
    """A real process that spins and is no descendant of this one: its parent, a launcher, has ended."""
    launcher = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {SPIN!r}], stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL, start_new_session=True)\n"
        "print(p.pid)"
    )
    done = subprocess.run([sys.executable, "-c", launcher], capture_output=True, text=True, check=True, timeout=20)
    pid = int(done.stdout)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
