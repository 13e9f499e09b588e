"""MLflow's webhook signature: who may start runs.

MLflow signs with HMAC-SHA256 over `delivery id.timestamp.body` and sends `v1,<base64>`, the scheme of
https://www.standardwebhooks.com (mlflow/webhooks/delivery.py).
"""

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass

MAX_AGE_S = 300
"""Older deliveries are refused, so that a recorded one cannot be replayed later."""


TIMESTAMP = re.compile("[0-9]{1,12}")
"""Seconds since the epoch, in ASCII digits."""


class SignatureError(ValueError):
    """The delivery is not genuine, or not recent. The message says why."""


def sign(secret: str, delivery_id: str, timestamp: str, body: bytes) -> bytes:
    """Return the HMAC-SHA256 of a delivery."""
    return hmac.digest(secret.encode(), f"{delivery_id}.{timestamp}.".encode() + body, hashlib.sha256)


@dataclass(frozen=True)
class Headers:
    """A delivery's headers, which are checked before its body is read."""

    delivery_id: str
    timestamp: str
    digest: bytes


def read_headers(delivery_id: str, timestamp: str, signature: str, now_s: float) -> Headers:
    """Raise SignatureError unless the headers are those of a recent delivery; its signature is not checked yet."""
    version, _, encoded = signature.partition(",")
    if version != "v1":
        raise SignatureError("the signature is missing or not of version v1")
    try:
        digest = base64.b64decode(encoded, validate=True)
    except ValueError as error:  # binascii.Error is one; non-ASCII characters are another
        raise SignatureError("the signature cannot be read") from error
    if not TIMESTAMP.fullmatch(timestamp):
        raise SignatureError("the timestamp cannot be read")
    if abs(now_s - int(timestamp)) > MAX_AGE_S:
        raise SignatureError(f"the delivery is not from the last {MAX_AGE_S} s")
    return Headers(delivery_id, timestamp, digest)


def verify(secret: str, headers: Headers, body: bytes) -> None:
    """Raise SignatureError unless a holder of the secret signed the body under these headers."""
    if not hmac.compare_digest(headers.digest, sign(secret, headers.delivery_id, headers.timestamp, body)):
        raise SignatureError("the signature does not match")
