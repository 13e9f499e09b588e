"""MLflow's webhook signature: who may start runs.

MLflow signs with HMAC-SHA256 over `delivery id.timestamp.body` and sends `v1,<base64>`, the scheme of
https://www.standardwebhooks.com (mlflow/webhooks/delivery.py).
"""

import base64
import binascii
import hashlib
import hmac

MAX_AGE_S = 300
"""Older deliveries are refused, so that a recorded one cannot be played again later."""


def sign(secret: str, delivery_id: str, timestamp: str, body: bytes) -> bytes:
    """HMAC-SHA256 of a delivery."""
    return hmac.digest(secret.encode(), f"{delivery_id}.{timestamp}.".encode() + body, hashlib.sha256)


def verify(secret: str, body: bytes, *, delivery_id: str, timestamp: str, header: str, now_s: float) -> str | None:
    """None for a genuine, recent delivery, otherwise what is wrong with it."""
    version, _, encoded = header.partition(",")
    if version != "v1":
        return "the signature is missing or not of version v1"
    try:
        given, sent_s = base64.b64decode(encoded, validate=True), int(timestamp)
    except (binascii.Error, ValueError):
        return "the signature or the timestamp cannot be read"
    if not hmac.compare_digest(given, sign(secret, delivery_id, timestamp, body)):
        return "the signature does not match"
    if abs(now_s - sent_s) > MAX_AGE_S:
        return f"the delivery is not from the last {MAX_AGE_S} s"
    return None
