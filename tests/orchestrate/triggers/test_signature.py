"""Deliveries are believed only when MLflow, and lately, signed them."""

import pytest
from mlflow.webhooks.delivery import _generate_hmac_signature

from slipstream.orchestrate.triggers.signature import MAX_AGE_S, SignatureError, read_headers, verify

NOW = 1_790_000_000
BODY = b'{"entity": "model_version_alias", "name": "\xc3\xa4"}'


def judge(**changed: str) -> str | None:
    stamp = changed.get("timestamp", str(NOW))
    signed = _generate_hmac_signature("secret", "id-1", stamp, BODY.decode())
    given = {"secret": "secret", "delivery_id": "id-1", "timestamp": stamp, "header": signed, "body": BODY.decode()}
    given |= changed
    try:
        headers = read_headers(given["delivery_id"], given["timestamp"], given["header"], NOW)
        verify(given["secret"], headers, given["body"].encode())
    except SignatureError as error:
        return str(error)
    return None


def test_what_mlflow_signed_is_genuine() -> None:
    assert judge() is None
    assert judge(timestamp=str(NOW - MAX_AGE_S)) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"secret": "another"}, "does not match"),
        ({"delivery_id": "id-2"}, "does not match"),
        ({"body": "{}"}, "does not match"),
        ({"header": "v1,AAAA"}, "does not match"),
        ({"header": "v1,not base64!"}, "cannot be read"),
        ({"header": ""}, "missing"),
        ({"header": "v2,AAAA"}, "v1"),
        ({"header": "v1,ä"}, "cannot be read"),
        ({"timestamp": "yesterday"}, "cannot be read"),
        ({"timestamp": "1" * 4000}, "cannot be read"),
        ({"timestamp": f" {NOW}"}, "cannot be read"),
        ({"timestamp": "१७९०००००००"}, "cannot be read"),
        ({"timestamp": str(NOW - MAX_AGE_S - 1)}, "not from the last"),
        ({"timestamp": str(NOW + MAX_AGE_S + 1)}, "not from the last"),
    ],
)
def test_everything_else_is_refused_with_a_reason(changed: dict[str, str], reason: str) -> None:
    assert reason in (judge(**changed) or "accepted")
