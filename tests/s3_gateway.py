"""A real S3 endpoint with real credential checks, for tests: the embedded platform's own gateway, on a free port."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from tests.conftest import ROOT, free_port

from slipstream.home import Home
from slipstream.platform import addresses, object_store


class Gateway:
    """Starts, is killed, comes back on the same port with the same data; and its bytes can be damaged."""

    def __init__(self, folder: Path) -> None:
        self._home = Home(folder, ROOT / ".envs", ROOT)
        self.secrets = addresses.ensure_secrets(self._home)
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        object_store.prepare(self._home)

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return object_store.environment(self.url, self.secrets)

    def start(self, *options: str) -> None:
        """Start, with further options of `juicefs gateway`, and return when it answers."""
        program = object_store.program(self._home, self.url, self.secrets)
        *command, metadata, address = program.command
        with (self._home.root / "out.log").open("ab") as log:
            self._process = subprocess.Popen(
                # It tries a block that it cannot read some 30 s long otherwise.
                [*command, "--io-retries=1", *options, metadata, address],
                env=os.environ | program.environment,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 20
        while not object_store.healthy(self.url):
            assert self._process.poll() is None and time.monotonic() < deadline, log.name
            time.sleep(0.02)

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=20)
            self._process = None

    @cached_property
    def client(self) -> Any:
        """A plain boto3 client: another program than ours."""
        return boto3.session.Session(
            self.secrets.s3_access_key, self.secrets.s3_secret_key, region_name=object_store.REGION
        ).client("s3", endpoint_url=self.url, config=Config(retries={"max_attempts": 5, "mode": "standard"}))

    def make_bucket(self, name: str) -> str:
        self.client.create_bucket(Bucket=name)
        return name

    def blocks(self) -> dict[Path, int]:
        """Files in which the stored bytes lie, and their sizes."""
        found = {}
        for path in (self._home.root / object_store.NAME / "data").rglob("chunks/*/*/[!.]*"):
            with suppress(FileNotFoundError):
                found[path] = path.stat().st_size
        return found

    @contextmanager
    def new_blocks(self) -> Iterator[list[Path]]:
        """Those that are written meanwhile; the largest comes last."""
        before, found = self.blocks(), list[Path]()
        yield found
        after = self.blocks()
        found += sorted(after.keys() - before.keys(), key=lambda path: after[path])
