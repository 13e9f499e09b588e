"""The cache: least recently used entries go, none that is in use; several processes, and killed ones."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slipstream import digests
from slipstream.errors import InputError
from slipstream.storage import cache

KEYS = [f"{n:x}" * 64 for n in range(8)]
SIZE = 1000

OBTAIN = """\
import sys, time
from pathlib import Path
from slipstream.storage import cache

def make(path):
    with open(sys.argv[2], "a") as calls:
        calls.write("made\\n")
    path.write_bytes(b"x" * 500)
    time.sleep(float(sys.argv[3]))
    path.write_bytes(b"x" * 1000)

path = cache.obtain(sys.argv[1], "file", make)
print(len(path.read_bytes()), flush=True)
sys.stdin.read()
"""


def write(path: Path) -> None:
    path.write_bytes(b"x" * SIZE)


def never(path: Path) -> None:
    raise AssertionError(f"{path} is made again")


def use(key: str, make: Callable[[Path], None] = write) -> None:
    """Obtain an entry and let it go."""
    with cache.borrowed(key, "file", make) as path:
        assert path.stat().st_size == SIZE
    os.utime(path.parent, (time.time(), time.time()))


def process(key: str, calls: Path, seconds: float = 0) -> subprocess.Popen[str]:
    """One that obtains an entry and keeps it until its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", OBTAIN, key, str(calls), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def entries(home: Path) -> list[str]:
    return sorted(p.name for p in (home / "cache").iterdir() if not p.name.startswith("."))


@pytest.fixture(autouse=True)
def limit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.LIMIT_VARIABLE, str(3 * SIZE / 1e9))


def test_the_least_recently_used_goes(home: Path) -> None:
    for key in KEYS[:3]:
        use(key)
    use(KEYS[0], never)
    use(KEYS[3])
    assert entries(home) == sorted([KEYS[0], KEYS[2], KEYS[3]])
    assert len(list((home / "cache/.locks").glob("*.use"))) == 3


def test_what_is_in_use_stays(home: Path, tmp_path: Path) -> None:
    user = process(KEYS[0], tmp_path / "calls")
    assert user.stdout is not None
    assert user.stdout.readline() == f"{SIZE}\n"
    for key in KEYS[1:5]:
        use(key)
    assert KEYS[0] in entries(home)
    user.communicate()
    use(KEYS[5])
    assert entries(home) == sorted(KEYS[3:6])


def test_what_was_just_fetched_stays_even_beyond_the_limit(home: Path) -> None:
    def write_much(path: Path) -> None:
        path.mkdir()
        (path / "a").write_bytes(b"x" * 9 * SIZE)

    use(KEYS[0])
    assert (cache.obtain(KEYS[1], "folder", write_much) / "a").stat().st_size == 9 * SIZE
    assert entries(home) == [KEYS[1]]


def test_two_processes_make_one_entry_once(home: Path, tmp_path: Path) -> None:
    both = [process(KEYS[0], tmp_path / "calls", seconds=0.5) for _ in range(2)]
    assert [p.communicate()[0] for p in both] == [f"{SIZE}\n"] * 2
    assert (tmp_path / "calls").read_text() == "made\n"


def test_a_killed_process_leaves_nothing_half(home: Path, tmp_path: Path) -> None:
    slow = process(KEYS[0], tmp_path / "calls", seconds=60)
    while not list((home / "cache").glob(f".incoming/{KEYS[0]}/file")):
        time.sleep(0.02)
    slow.send_signal(signal.SIGKILL)
    slow.communicate()
    assert entries(home) == []
    use(KEYS[1])  # another entry's arrival clears it away
    assert not list((home / "cache/.incoming").iterdir())
    use(KEYS[0])


def test_what_cannot_be_made_is_not_there(home: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.obtain(KEYS[0], "file", fail)
    assert entries(home) == []
    use(KEYS[0])


def test_the_same_bytes_under_two_names_are_stored_once(home: Path) -> None:
    first = cache.obtain(KEYS[0], "a.npz", write)
    second = cache.obtain(KEYS[0], "b.npz", never)
    assert second.name == "b.npz"
    assert second.resolve() == first.resolve()
    assert digests.file(first) == digests.file(second)


def test_a_cache_removed_by_hand_is_filled_again(home: Path) -> None:
    path = cache.obtain(KEYS[0], "file", write)
    subprocess.run(["rm", "-r", str(home / "cache")], check=True)
    assert cache.obtain(KEYS[0], "file", write) == path
    assert path.exists()


@pytest.mark.parametrize("given", ["much", "-1", "nan", ""])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(cache.LIMIT_VARIABLE, given)
    with pytest.raises(InputError, match="SLIPSTREAM_CACHE_GB"):
        cache.limit_bytes()


def test_a_damaged_entry_is_noticed_once_per_process_and_made_again(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = b"x" * SIZE
    key = hashlib.sha256(content).hexdigest()
    checks: list[Path] = []

    def is_intact(path: Path) -> bool:
        checks.append(path)
        return digests.file(path) == key

    path = cache.obtain(key, "file", write, is_intact)
    assert checks == []  # just made, and verified by what made it
    forget(path)
    assert cache.obtain(key, "file", write, is_intact) == cache.obtain(key, "file", write, is_intact) == path
    assert len(checks) == 1
    path.write_bytes(b"y" + content[1:])
    forget(path)
    assert cache.obtain(key, "file", write, is_intact).read_bytes() == content
    assert f"cache: {path} is damaged; it is fetched again" in caplog.text
    assert cache.obtain(key, "other", write, is_intact).read_bytes() == content  # a link to the first
    path.write_bytes(b"y" + content[1:])
    linked = path.with_name("other")
    linked.unlink()
    forget(linked)
    assert cache.obtain(key, "other", write, is_intact).read_bytes() == content


def test_processes_that_find_the_same_damage_make_it_again_once(home: Path) -> None:
    content = b"x" * SIZE
    key = hashlib.sha256(content).hexdigest()
    folder = home / "cache" / key
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"damaged")
    calls: list[int] = []

    def make(path: Path) -> None:
        calls.append(1)
        write(path)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: cache.obtain(key, "file", make, lambda p: digests.file(p) == key), range(8)))
    assert {p.read_bytes() for p in made} == {content}
    assert len(calls) == 1


def test_threads_of_a_process_close_each_lock_once(home: Path) -> None:
    """What is closed twice may by then be another file's descriptor."""
    key, root = "0" * 64, home / "cache"
    (root / cache._LOCKS).mkdir(parents=True)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(200):
            cache._lock(root, key, "use").unlink(missing_ok=True)  # as if another process had removed the entry
            list(pool.map(lambda _: cache._hold(root, key), range(8)))


def forget(path: Path) -> None:
    """As a new process would see it."""
    cache._verified.discard(path)
