"""Which of the store's errors are temporary, how long to wait for them, and messages for the others."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from boto3.exceptions import Boto3Error, RetriesExceededError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from s3transfer.exceptions import RetriesExceededError as TransferRetriesExceeded

from slipstream.errors import DataError, SlipstreamError, Unavailable

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Total time for retries of an operation. A gateway's restart takes seconds; a longer outage is left to the step's own
retry."""

T = TypeVar("T")


class Damaged(Exception):
    """What arrived is not what was stored. Retried once, since it may have happened in transit."""


PASSING = (
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    RetriesExceededError,
    TransferRetriesExceeded,
)
CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)
CODES = {
    "NoSuchBucket": "there is no such bucket",
    "NoSuchKey": "there is no such object",
    "404": "there is no such object",
    "InvalidAccessKeyId": "the store does not know the access key; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "the credentials do not allow this; check them and the bucket's policy",
    "403": "the store refuses the credentials; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
    "ExpiredToken": "the credentials have expired",
    "InvalidBucketName": "this is not a name that a bucket can have",
}
"""Messages for the S3 API's error codes. A HEAD has no body, only the HTTP status."""
BUSY = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable"}


def persistently(uri: str, operation: Callable[[], T]) -> T:
    """Run `operation` until it succeeds, its error is permanent, or PATIENCE_S have passed.

    Raise DataError for what a retry does not fix, Unavailable otherwise; both name `uri`.
    """
    deadline = time.monotonic() + PATIENCE_S
    delay, damaged = 0.25, 0
    while True:
        try:
            return operation()
        except Damaged as error:
            damaged += 1
            if damaged > 1:
                raise DataError(f"{uri}: {error}") from error
            reason: Exception = error
        except (Boto3Error, BotoCoreError, ClientError, TransferRetriesExceeded, ValueError) as error:
            if not passes(error):
                raise lasting(uri, error) from error
            reason = error
        if time.monotonic() + delay > deadline:
            raise Unavailable(f"{uri}: the store does not answer as it should: {reason}") from reason
        log.warning("%s: %s; trying again", uri, reason)
        time.sleep(delay * random.uniform(0.5, 1))  # noqa: S311 (spreads retries, guards nothing)
        delay = min(2 * delay, 8.0)


def passes(error: Exception) -> bool:
    """Return whether an error may be gone at the next try."""
    if isinstance(error, ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status >= 500 or status == 429 or code_of(error) in BUSY
    return isinstance(error, PASSING)


def lasting(uri: str, error: Exception) -> SlipstreamError:
    """Return the error with a readable message."""
    if isinstance(error, CREDENTIALS):
        return DataError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile")
    if isinstance(error, ClientError):
        code = code_of(error)
        return DataError(f"{uri}: {CODES.get(code, error)} ({code})")
    return DataError(f"{uri}: {error}")


def code_of(error: ClientError) -> str:
    """Return the S3 API's code of an error."""
    return str(error.response.get("Error", {}).get("Code", ""))
