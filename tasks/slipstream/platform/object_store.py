"""The embedded S3 endpoint: JuiceFS' gateway over a folder of this machine. For one machine, or for experiments.

A cluster uses its own S3 (AWS_ENDPOINT_URL). The gateway checks credentials and keeps objects' metadata and ETags; it
supports neither conditional puts nor versions of objects, and slipstream needs neither.
"""

import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.platform import programs, supervisor
from slipstream.platform.addresses import Secrets
from slipstream.platform.programs import Program

NAME = "object-store"
BUCKET = "slipstream"
REGION = "us-east-1"
"""The gateway's only region."""
VOLUME = "store"
HEALTH = "/minio/health/live"
READY_WITHIN_S = 30


def binary(home: Home) -> Path:
    """Return the gateway's program. Raise Unavailable if it is not installed."""
    path = home.envs / "airflow" / "bin" / "juicefs"
    if not path.exists():
        raise Unavailable(f"{path}: the S3 gateway is not installed; `make setup` does so (extra `server`)")
    return path


def environment(url: str, secrets: Secrets) -> dict[str, str]:
    """Return the variables that boto3, and so MLflow and every step, needs to reach the store."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": secrets.s3_access_key,
        "AWS_SECRET_ACCESS_KEY": secrets.s3_secret_key,
        "AWS_SESSION_TOKEN": "",  # one in the caller's shell belongs to other credentials
        "AWS_DEFAULT_REGION": REGION,
    }


def prepare(home: Home) -> None:
    """Create the volume at the first call. Raise Unavailable."""
    folder = home.root / NAME
    if (folder / "formatted").exists():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [
        *(str(binary(home)), "format", "--storage", "file", "--bucket", f"{folder}/data/"),
        *("--trash-days", "0", "--no-update", _metadata(folder), VOLUME),
    ]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, umask=0o077, timeout=60)
    if completed.returncode != 0:
        raise Unavailable(f"{folder}: the object store cannot be made: {completed.stderr[-2000:]}")
    (folder / "formatted").touch()


def program(home: Home, url: str, secrets: Secrets) -> Program:
    """Return the gateway. Its credentials are in its environment, which only this user can read."""
    folder = home.root / NAME
    command = (
        *(str(binary(home)), "gateway", "--multi-buckets", "--keep-etag", "--object-meta"),
        *("--no-usage-report", "--no-banner", "--log", str(folder / "gateway.log")),
        # The data are already on this machine's disk: a cache would be a second copy, outside of the home.
        *("--cache-dir", str(folder / "cache"), "--cache-size", "0", "--buffer-size", "64M"),
        *(_metadata(folder), urlsplit(url).netloc),
    )
    credentials = {"MINIO_ROOT_USER": secrets.s3_access_key, "MINIO_ROOT_PASSWORD": secrets.s3_secret_key}
    return Program(NAME, command, credentials, stop_wait_s=20)


def await_ready(home: Home, url: str) -> None:
    """Return when the gateway answers. Raise Unavailable."""
    deadline = time.monotonic() + READY_WITHIN_S
    while not healthy(url):
        if time.monotonic() > deadline or supervisor.state(home, NAME).state == "FATAL":
            raise Unavailable(f"the object store does not answer at {url}; see {programs.log_file(home, NAME)}")
        time.sleep(0.1)


def ensure_bucket(url: str, secrets: Secrets) -> None:
    """Create the platform's bucket unless it exists. Raise Unavailable."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=secrets.s3_access_key,
        aws_secret_access_key=secrets.s3_secret_key,
        config=Config(retries={"mode": "standard", "max_attempts": 5}),
    )
    try:
        if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
    except (BotoCoreError, ClientError) as error:
        raise Unavailable(f"the object store at {url} does not take the bucket {BUCKET}: {error}") from error


def healthy(url: str) -> bool:
    """Return whether the gateway answers."""
    try:
        return httpx.get(f"{url}{HEALTH}", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _metadata(folder: Path) -> str:
    return f"sqlite3://{folder}/metadata.db"
