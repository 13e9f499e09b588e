"""Files by URI: local paths, and s3:// through boto3."""

import hashlib
from pathlib import Path
from urllib.parse import urlparse

from slipstream.errors import DataError, Unavailable
from slipstream.home import Home


def fetch(uri: str) -> Path:
    """A local path with the content of `uri`; an object in S3 is copied into the cache, keyed by its ETag.

    Credentials come from boto3's own chain (environment, profile, role), the endpoint from AWS_ENDPOINT_URL.
    Raises DataError when it is not there or not readable, Unavailable when the store does not answer.
    """
    if not uri.startswith("s3://"):
        path = Path(uri)
        path = path if path.is_absolute() else Home.from_environment().code / path
        if not path.is_file():
            raise DataError(f"{uri}: no such file")
        return path
    return _fetch_s3(uri)


def _fetch_s3(uri: str) -> Path:
    import boto3
    from botocore.exceptions import ClientError, ConnectionError, NoCredentialsError

    parts = urlparse(uri)
    bucket, key = parts.netloc, parts.path.lstrip("/")
    client = boto3.client("s3")
    try:
        head = client.head_object(Bucket=bucket, Key=key)
        name = hashlib.sha256(f"{uri}\0{head['ETag']}".encode()).hexdigest()
        path = Home.from_environment().cache / "s3" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".part")
            client.download_file(bucket, key, str(aside))
            if aside.stat().st_size != head["ContentLength"]:
                raise Unavailable(f"{uri}: {aside.stat().st_size} of {head['ContentLength']} bytes arrived")
            aside.replace(path)
        return path
    except NoCredentialsError as error:
        raise DataError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except ConnectionError as error:
        raise Unavailable(f"{uri}: the store does not answer: {error}") from error
    except ClientError as error:
        raise DataError(f"{uri}: {error.response.get('Error', {}).get('Code')}: {error}") from error
