"""Objects and folders at a real S3 endpoint that checks credentials, also when it fails in the middle."""

import hashlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.s3_gateway import Gateway

from slipstream import digests, storage
from slipstream.errors import DataError, SlipstreamError, Unavailable
from slipstream.storage import remote, retries, s3

LARGE = 40 * 2**20
"""Bytes of a file that is uploaded in three parts."""
SLOW = "--upload-limit=80"
"""Mbit/s: a large file takes some 4 s."""

READS: dict[str, Callable[[str], object]] = {
    "fetch": storage.fetch,
    "fetch_folder": storage.fetch_folder,
    "read_text": storage.read_text,
}
ALL: dict[str, Callable[[str], object]] = READS | {
    "exists": storage.exists,
    "list_uris": storage.list_uris,
    "write_text": lambda uri: storage.write_text(uri, "text"),
    "upload": lambda uri: storage.upload(Path(__file__), uri),
    "delete": storage.delete,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "weights.bin"
    path.write_bytes(np.random.default_rng(0).bytes(LARGE))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "engine"
    (path / "data").mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    (path / "data/weights").write_bytes(bytes(range(256)))
    return path


@pytest.fixture
def restored(gateway: Gateway) -> Iterator[Gateway]:
    """The gateway, which runs again after the test."""
    yield gateway
    gateway.stop()
    gateway.start()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up after two seconds instead of a minute."""
    monkeypatch.setattr(retries, "PATIENCE_S", 2.0)


def parts_left(gateway: Gateway, bucket: str) -> int:
    return len(gateway.client.list_multipart_uploads(Bucket=bucket.removeprefix("s3://")).get("Uploads", []))


def nothing_fetched(home: Path) -> bool:
    return [p.name for p in (home / "cache").glob("[!.]*")] + [*(home / "cache").glob(".incoming/*")] == []


def test_texts_come_back(bucket: str) -> None:
    uri = storage.join(bucket, "runs", "fashion", "spec.yaml")
    assert not storage.exists(uri)
    storage.write_text(uri, "name: größer\n")
    assert storage.exists(uri)
    assert storage.read_text(uri) == "name: größer\n"
    storage.write_text(uri, "name: other\n")
    assert storage.read_text(uri) == "name: other\n"


def test_a_large_file_comes_back_and_is_fetched_once(
    bucket: str, large: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = storage.join(bucket, "weights.bin")
    assert storage.upload(large, uri) == digests.file(large)
    assert s3.require(uri).sha256 == digests.file(large)
    assert s3.require(uri).etag.endswith("-3")
    assert parts_left(gateway, bucket) == 0
    first = storage.fetch(uri)
    assert (first.name, digests.file(first)) == ("weights.bin", digests.file(large))
    monkeypatch.setattr(s3, "download", None)
    assert storage.fetch(uri) == first


def test_what_another_program_stored_is_fetched(bucket: str, gateway: Gateway) -> None:
    client, name = gateway.client, bucket.removeprefix("s3://")
    client.put_object(Bucket=name, Key="a.txt", Body=b"one")
    first = storage.fetch(f"{bucket}/a.txt")
    client.put_object(Bucket=name, Key="a.txt", Body=b"two")
    second = storage.fetch(f"{bucket}/a.txt")
    assert (first.read_text(), second.read_text()) == ("one", "two")


def test_a_folder_comes_back(bucket: str, folder: Path) -> None:
    uri = storage.join(bucket, "engines", "v1")
    assert storage.upload(folder, uri) == digests.folder(folder)
    assert storage.exists(uri)
    assert digests.folder(storage.fetch_folder(uri)) == digests.folder(folder)
    assert storage.list_uris(uri) == [f"{uri}/data/weights", f"{uri}/manifest.json"]


def test_a_replaced_folder_keeps_no_old_file(bucket: str, folder: Path) -> None:
    uri = storage.join(bucket, "engine")
    storage.upload(folder, uri)
    (folder / "data/weights").rename(folder / "data/other")
    storage.upload(folder, uri)
    assert digests.folder(storage.fetch_folder(uri)) == digests.folder(folder)
    assert storage.list_uris(uri) == [f"{uri}/data/other", f"{uri}/manifest.json"]


def test_a_folder_is_there_only_with_its_manifest(bucket: str, folder: Path) -> None:
    uri = storage.join(bucket, "engine")
    storage.upload(folder, uri)
    storage.delete(storage.join(uri, remote.MANIFEST))  # as if the upload had been killed just before its end
    assert not storage.exists(uri)
    with pytest.raises(DataError, match=rf"{uri}: .*not finished"):
        storage.fetch_folder(uri)
    storage.upload(folder, uri)
    assert storage.exists(uri)


def test_a_manifest_cannot_name_files_elsewhere(bucket: str, folder: Path, home: Path) -> None:
    uri = storage.join(bucket, "engine")
    storage.upload(folder, uri)
    at = storage.join(uri, remote.MANIFEST)
    storage.write_text(at, storage.read_text(at).replace("data/weights", "../../weights"))
    with pytest.raises(DataError, match="outside of the folder"):
        storage.fetch_folder(uri)
    assert nothing_fetched(home)


def test_a_listed_text_is_read_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.yaml", "a.yaml", ".hidden.yaml"):
        storage.write_text(storage.join(bucket, "specs", name), name)
    found = storage.entries(storage.join(bucket, "specs"))
    assert [storage.read_entry(e) for e in found] == ["a.yaml", "b.yaml"]
    with monkeypatch.context() as patch:
        patch.setattr(s3, "read", None)
        assert [storage.read_entry(e) for e in found] == ["a.yaml", "b.yaml"]
    storage.write_text(found[0].uri, "new")
    assert storage.entries(storage.join(bucket, "specs"))[0].version != found[0].version
    assert storage.read_entry(storage.entries(storage.join(bucket, "specs"))[0]) == "new"


def test_a_wrong_secret_is_said(bucket: str, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    for call in ALL.values():
        with pytest.raises(DataError, match=rf"{bucket}/x.*AWS_SECRET_ACCESS_KEY") as caught:
            call(f"{bucket}/x")
        assert "wrong-secret" not in str(caught.value)
    assert nothing_fetched(home)


def test_an_unknown_access_key_is_said(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(DataError, match=rf"{bucket}/x: .*AWS_ACCESS_KEY_ID"):
        storage.write_text(f"{bucket}/x", "text")


def test_no_credentials_are_said(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match=rf"{bucket}/x: no credentials; set AWS_ACCESS_KEY_ID"):
        storage.fetch(f"{bucket}/x")


def test_a_missing_bucket_is_said(bucket: str) -> None:
    for call in ALL.values():
        with pytest.raises(DataError, match=r"s3://no-such-bucket/x.*: there is no such bucket"):
            call("s3://no-such-bucket/x")


def test_a_missing_object_is_said(bucket: str, home: Path) -> None:
    for call in READS.values():
        with pytest.raises(DataError, match=rf"{bucket}/no/such.*: there is no such (object|folder)"):
            call(f"{bucket}/no/such")
    assert nothing_fetched(home)


@pytest.mark.parametrize("uri", ["gs://bucket/key", "http://host/key"])
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(DataError, match=r"not supported; give a local path or an s3:// URI"):
        storage.fetch(uri)


def test_a_uri_without_a_bucket_is_refused(bucket: str) -> None:
    with pytest.raises(DataError, match="names no bucket"):
        storage.read_text("s3:///key")


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "foreign"])
def test_changed_bytes_are_noticed(bucket: str, gateway: Gateway, home: Path, foreign: bool, tmp_path: Path) -> None:
    uri, content = f"{bucket}/x.bin", bytes(range(256)) * 1000
    (tmp_path / "x").write_bytes(content)
    with gateway.new_blocks() as blocks:
        if foreign:
            gateway.client.put_object(Bucket=bucket.removeprefix("s3://"), Key="x.bin", Body=content)
        else:
            storage.upload(tmp_path / "x", uri)
    blocks[-1].write_bytes(content[:-1] + b"!")
    with pytest.raises(DataError, match=rf"{uri}: {'md5' if foreign else 'sha256'} .*damaged"):
        storage.fetch(uri)
    assert nothing_fetched(home)


def test_a_truncated_object_is_noticed(
    bucket: str, gateway: Gateway, home: Path, hurried: None, tmp_path: Path
) -> None:
    uri = f"{bucket}/x.bin"
    (tmp_path / "x").write_bytes(bytes(range(256)) * 1000)
    with gateway.new_blocks() as blocks:
        storage.upload(tmp_path / "x", uri)
    blocks[-1].write_bytes(blocks[-1].read_bytes()[:1000])
    with pytest.raises(SlipstreamError, match=uri):
        storage.fetch(uri)
    assert nothing_fetched(home)


def test_a_damaged_folder_is_noticed(bucket: str, gateway: Gateway, home: Path, folder: Path) -> None:
    uri = f"{bucket}/engine"
    storage.upload(folder, uri)
    gateway.client.put_object(Bucket=bucket.removeprefix("s3://"), Key="engine/data/weights", Body=b"x" * 256)
    with pytest.raises(DataError, match=rf"{uri}/data/weights: .*damaged"):
        storage.fetch_folder(uri)
    assert nothing_fetched(home)


@pytest.mark.usefixtures("hurried")
def test_a_store_that_is_down_is_unavailable(bucket: str, restored: Gateway) -> None:
    restored.stop(signal.SIGKILL)
    began = time.monotonic()
    for call in (storage.fetch, storage.exists, ALL["write_text"], ALL["upload"]):
        with pytest.raises(Unavailable, match=rf"{bucket}/x"):
            call(f"{bucket}/x")
    assert time.monotonic() - began < 30


def upload_while(uri: str, large: Path, interrupt: Callable[[], None]) -> list[SlipstreamError]:
    """Upload; in the middle of it `interrupt`. Returns the error, if any."""
    errors = []

    def work() -> None:
        try:
            storage.upload(large, uri)
        except SlipstreamError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    interrupt()
    thread.join(timeout=60)
    assert not thread.is_alive()
    return errors


def until_half_there(gateway: Gateway, before: int) -> None:
    while sum(gateway.blocks().values()) - before < LARGE / 4:
        time.sleep(0.02)


@pytest.mark.parametrize("returns", [True, False], ids=["returns", "stays-away"])
def test_a_gateway_killed_during_an_upload(
    bucket: str, restored: Gateway, large: Path, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    uri = f"{bucket}/weights.bin"
    restored.stop()
    restored.start(SLOW)
    before = sum(restored.blocks().values())
    if not returns:
        monkeypatch.setattr(retries, "PATIENCE_S", 3.0)

    def interrupt() -> None:
        until_half_there(restored, before)
        assert not storage.exists(uri)
        restored.stop(signal.SIGKILL)
        if returns:
            time.sleep(2)
            restored.start()

    errors = upload_while(uri, large, interrupt)
    if returns:
        assert errors == []
        assert digests.file(storage.fetch(uri)) == digests.file(large)
        assert parts_left(restored, bucket) == 0
    else:
        assert isinstance(errors[0], Unavailable)
        assert uri in str(errors[0])
        restored.start()
        assert not storage.exists(uri)


def test_a_process_killed_during_an_upload_leaves_no_half_object(bucket: str, restored: Gateway, large: Path) -> None:
    restored.stop()
    restored.start(SLOW)
    before = sum(restored.blocks().values())
    code = "from pathlib import Path; from slipstream import storage; storage.upload(Path({!r}), {!r})"
    uri = f"{bucket}/weights.bin"
    process = subprocess.Popen([sys.executable, "-c", code.format(str(large), uri)])
    until_half_there(restored, before)
    process.kill()
    process.wait()
    assert not storage.exists(uri)


def test_the_digest_is_what_other_programs_compute(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("text")
    assert storage.upload(tmp_path / "x", f"{bucket}/x") == hashlib.sha256(b"text").hexdigest()
