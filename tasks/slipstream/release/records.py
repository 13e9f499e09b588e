"""Signed records in tags of the registered model: which move owns the traffic, and which engines are rejected."""

import json
import logging
from typing import TypeVar

from pydantic import ValidationError

from slipstream.contract import Document
from slipstream.store import signing
from slipstream.store.registry import Registry

log = logging.getLogger(__name__)


class Record(Document):
    """Base of what is stored in a tag."""

    signature: str = ""
    """Covers the model, the tag's name and every other field."""


R = TypeVar("R", bound=Record)


def write(registry: Registry, tag: str, record: Record) -> None:
    """Sign a record and store it."""
    signature = signing.sign(signing.MODEL_RECORD, _signed(registry, tag, record))
    registry.tag_model(tag, record.model_copy(update={"signature": signature}).model_dump_json())


def read(registry: Registry, prefix: str, kind: type[R]) -> list[R]:
    """Return records of tags with this prefix that this platform signed; others are skipped with a warning."""
    records = []
    for tag, text in registry.model_tags().items():
        if not tag.startswith(prefix):
            continue
        try:
            record = kind.model_validate_json(text)
        except ValidationError:
            record = None
        if record is None or not signing.verify(signing.MODEL_RECORD, _signed(registry, tag, record), record.signature):
            log.warning("%s: tag %s is not signed by this platform, and is not used", registry.model, tag)
        else:
            records.append(record)
    return records


def _signed(registry: Registry, tag: str, record: Record) -> dict[str, object]:
    part = json.loads(record.model_dump_json(exclude_defaults=True, exclude={"signature"}))
    return {"model": registry.model, "tag": tag, "record": part}
