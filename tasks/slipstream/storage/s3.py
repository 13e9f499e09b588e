"""Objects in S3: the only module that calls boto3.

Credentials, region and endpoint come from boto3's own chain (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, profiles, roles). An
object appears at its key atomically: S3 shows a single put, or a completed multipart upload, in one step.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from slipstream import digests
from slipstream.errors import DataError
from slipstream.storage.base import Entry
from slipstream.storage.retries import Damaged, code_of, passes, persistently

log = logging.getLogger(__name__)

SHA256 = "slipstream-sha256"
"""Key of the object metadata that holds the digest of the uploaded content."""
PART_BYTES = 16 * 2**20
TRANSFER = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)


@dataclass(frozen=True)
class Location:
    """A bucket and a key in it."""

    bucket: str
    key: str

    @classmethod
    def of(cls, uri: str) -> "Location":
        """Parse a URI. Raise DataError if `uri` names no bucket."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise DataError(f"{uri}: names no bucket; write s3://BUCKET/KEY")
        return cls(bucket, key)


@dataclass(frozen=True)
class Stat:
    """The store's data on an object."""

    size_bytes: int
    etag: str
    sha256: str | None
    """Digest stored at the upload; None for uploads by other software."""
    md5: str | None
    """Digest in the ETag; None if that is not one (multipart, encrypted with a customer's key)."""

    def check(self, size_bytes: int, sha256: str, md5: str) -> None:
        """Raise Damaged if these are not the object's."""
        if size_bytes != self.size_bytes:
            raise Damaged(f"{size_bytes} of {self.size_bytes} bytes arrived; the object is truncated")
        if self.sha256 is not None and sha256 != self.sha256:
            raise Damaged(f"sha256 {sha256[:12]}… is not {self.sha256[:12]}… that was uploaded; the object is damaged")
        if self.sha256 is None and self.md5 is not None and md5 != self.md5:
            raise Damaged(f"md5 {md5[:12]}… is not {self.md5[:12]}… of its ETag; the object is damaged")


def stat(uri: str) -> Stat | None:
    """Return the store's data on an object, or None if there is none. Raise DataError, Unavailable."""
    where = Location.of(uri)

    def head() -> Stat | None:
        try:
            return _stat(client().head_object(Bucket=where.bucket, Key=where.key))
        except ClientError as error:
            if code_of(error) != "404":
                raise
            _require_bucket(uri, where.bucket)
            return None

    return persistently(uri, head)


def require(uri: str) -> Stat:
    """Return the store's data on an object. Raise DataError, also if there is none, and Unavailable."""
    stored = stat(uri)
    if stored is None:
        raise DataError(f"{uri}: there is no such object")
    return stored


def download(uri: str, path: Path, expected: Stat) -> None:
    """Write an object to `path`, checked against `expected`. Raise DataError, Unavailable."""
    where = Location.of(uri)

    def get() -> None:
        client().download_file(where.bucket, where.key, str(path), Config=TRANSFER)
        sha256, md5 = _digests(path)
        expected.check(path.stat().st_size, sha256, md5)

    persistently(uri, get)


def read(uri: str) -> tuple[bytes, Stat]:
    """Return an object's bytes, checked, and the store's data on it. For objects that fit in memory.

    Raise DataError, Unavailable.
    """
    where = Location.of(uri)

    def get() -> tuple[bytes, Stat]:
        try:
            response = client().get_object(Bucket=where.bucket, Key=where.key)
        except ClientError as error:
            if code_of(error) == "NoSuchBucket":
                raise DataError(f"{uri}: there is no such bucket") from error
            raise
        content: bytes = response["Body"].read()
        stored = _stat(response)
        stored.check(len(content), hashlib.sha256(content).hexdigest(), _md5(content))
        return content, stored

    return persistently(uri, get)


def write(uri: str, content: bytes) -> None:
    """Store bytes as an object, in one request. Raise DataError, Unavailable."""
    where = Location.of(uri)
    metadata = {SHA256: hashlib.sha256(content).hexdigest()}
    persistently(
        uri,
        lambda: client().put_object(Bucket=where.bucket, Key=where.key, Body=content, Metadata=metadata),
    )


def upload(path: Path, uri: str) -> str:
    """Store a file as an object, in parts if it is large; return its sha256. Raise DataError, Unavailable.

    Nothing is visible at `uri` before everything is uploaded. Parts of a failed attempt are removed.
    """
    where, sha256, size = Location.of(uri), digests.file(path), path.stat().st_size
    begun: list[str] = []

    def put() -> None:
        with path.open("rb") as stream, _noting(where, begun):
            _transfer(stream, where, sha256)
        begun[-1:] = []  # the last one was completed
        stored = _stat(client().head_object(Bucket=where.bucket, Key=where.key))
        if stored.size_bytes != size or stored.sha256 not in (None, sha256):
            raise Damaged("another object lies there right after the upload; somebody else writes to the same key")

    try:
        persistently(uri, put)
    finally:
        _abort(where, begun)
    return sha256


def delete(uri: str) -> None:
    """Remove an object, if it exists. Raise DataError, Unavailable."""
    where = Location.of(uri)
    persistently(uri, lambda: client().delete_object(Bucket=where.bucket, Key=where.key))


def listing(prefix: str) -> list[Entry]:
    """Return objects whose URI starts with `prefix`, in order. Raise DataError, Unavailable."""
    where = Location.of(prefix)

    def pages() -> list[Entry]:
        paginator = client().get_paginator("list_objects_v2")
        return [
            Entry(
                f"s3://{where.bucket}/{item['Key']}",
                item["ETag"].strip('"'),
                item["LastModified"].timestamp(),
                item["Size"],
            )
            for page in paginator.paginate(Bucket=where.bucket, Prefix=where.key)
            for item in page.get("Contents", [])
        ]

    return sorted(persistently(prefix, pages), key=lambda entry: entry.uri)


def client() -> Any:
    """Return boto3's client for the current credentials and endpoint of the environment."""
    settings = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    return _client(os.getpid(), tuple(sorted(settings.items())))


@lru_cache(maxsize=4)
def _client(_process: int, _settings: tuple[tuple[str, str], ...]) -> Any:
    # One for each process, since connections do not survive a fork. A separate session: boto3's default one would keep
    # the credentials that it saw first.
    config = Config(connect_timeout=5, read_timeout=60, retries={"mode": "standard", "max_attempts": 3})
    return boto3.session.Session().client("s3", config=config)


def endpoint() -> str:
    """Return the base URL of the store, which helps to distinguish objects."""
    return str(client().meta.endpoint_url)


def _transfer(stream: BinaryIO, where: Location, sha256: str) -> None:
    # upload_file would hide the store's error code in its own message; upload_fileobj passes it on.
    client().upload_fileobj(stream, where.bucket, where.key, ExtraArgs={"Metadata": {SHA256: sha256}}, Config=TRANSFER)


def _require_bucket(uri: str, bucket: str) -> None:
    try:
        client().head_bucket(Bucket=bucket)
    except ClientError as error:
        if code_of(error) in ("404", "NoSuchBucket"):
            raise DataError(f"{uri}: there is no such bucket") from error
        if passes(error):
            raise
        # Permission to read an object need not include permission to read its bucket.
        log.debug("%s: cannot tell whether the bucket is there: %s", uri, error)


def _stat(response: Any) -> Stat:
    etag = str(response["ETag"]).strip('"')
    encrypted = response.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in response
    md5 = etag if re.fullmatch(r"[0-9a-f]{32}", etag) and not encrypted else None
    metadata = {k.lower(): v for k, v in response.get("Metadata", {}).items()}
    return Stat(int(response["ContentLength"]), etag, metadata.get(SHA256), md5)


def _digests(path: Path) -> tuple[str, str]:
    """Return sha256 and md5 of a file, read once."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            sha256.update(block)
            md5.update(block)
    return sha256.hexdigest(), md5.hexdigest()


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@contextmanager
def _noting(where: Location, begun: list[str]) -> Iterator[None]:
    """Record the ids of the multipart uploads that are started for an object."""

    def note(parsed: dict[str, Any], **_: object) -> None:
        if parsed.get("Key") == where.key and "UploadId" in parsed:
            begun.append(parsed["UploadId"])

    events = client().meta.events
    events.register("after-call.s3.CreateMultipartUpload", note)
    try:
        yield
    finally:
        events.unregister("after-call.s3.CreateMultipartUpload", note)


def _abort(where: Location, uploads: list[str]) -> None:
    """Remove the parts of failed uploads. s3transfer does so itself, but not while the store is away."""
    for upload_id in uploads:
        try:
            client().abort_multipart_upload(Bucket=where.bucket, Key=where.key, UploadId=upload_id)
        except (BotoCoreError, ClientError) as error:
            if not isinstance(error, ClientError) or code_of(error) != "NoSuchUpload":
                log.warning("s3://%s/%s: parts of a failed upload are left: %s", where.bucket, where.key, error)
