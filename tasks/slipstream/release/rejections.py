"""Rejections: engines that a test, a rollout or a person rejected, by digest, until a person lifts the rejection.

A rejection outlives versions and runs: it is a tag of the registered model, one for each digest, and every version of
these bytes shows it by a tag and in its description. Only conclusive results reject: a verdict `fail`, or a person's
rollback. Other bytes are another engine, even from the same recipe quantized again.
"""

import logging

from slipstream.contract import Document, Verdict
from slipstream.errors import GateFailed, RegistryError
from slipstream.release import records
from slipstream.release.moves import now_iso
from slipstream.release.records import Record
from slipstream.store.registry import Registry

log = logging.getLogger(__name__)

PREFIX = "slipstream.rejected."
DIGITS = 16
"""Digits of the digest in the tag's name; the whole digest is in its value."""
MARK = "slipstream.rejected"
"""Tag of a version whose engine is rejected."""
SHORT = 8
"""Minimum digits of a digest that a person may give."""
REASON_CHARACTERS, EARLIER = 900, 2
"""A record must fit into the 5,000 characters that older MLflow servers allow a tag."""


class Lift(Document):
    """Who allowed the engine again."""

    by: str
    at: str
    reason: str


class Rejection(Record):
    """Why an engine may not be retried. It is valid until it is lifted."""

    sha256: str
    version: str
    """Registry version that was rejected."""
    stage: str
    """`trial`, `rollout` or `rollback`."""
    reason: str
    by: str
    """Run key of the gate, or the person who rolled back."""
    at: str
    """ISO 8601, UTC."""
    lifted: Lift | None = None
    earlier: tuple[str, ...] = ()
    """Earlier records, newest first, as sentences."""

    def sentence(self) -> str:
        """Return the record as one sentence."""
        text = f"version {self.version} (sha256 {self.sha256[:12]}…) was rejected in the {self.stage} by {self.by} at "
        text += f"{self.at}: {self.reason}"
        return (
            text
            if self.lifted is None
            else f"{text}; lifted by {self.lifted.by} at {self.lifted.at}: " + (self.lifted.reason)
        )


def all_of(registry: Registry) -> list[Rejection]:
    """Return every rejection of a model, including lifted ones, newest first."""
    return sorted(records.read(registry, PREFIX, Rejection), key=lambda r: r.at, reverse=True)


def active(registry: Registry) -> dict[str, Rejection]:
    """Return rejections that have not been lifted, by digest."""
    return {r.sha256: r for r in all_of(registry) if r.lifted is None}


def reject(registry: Registry, version: str, stage: str, reason: str, by: str) -> None:
    """Record that the engine of a version is rejected, whatever happens next. A repetition changes nothing."""
    try:
        sha256 = registry.artifact(version).sha256
    except RegistryError as error:
        log.warning("the rejection of %s version %s is not recorded: %s", registry.model, version, error)
        return
    rejection = {r.sha256: r for r in all_of(registry)}.get(sha256)
    if rejection is None or rejection.lifted is not None:
        earlier = (rejection.sentence()[:REASON_CHARACTERS], *rejection.earlier)[:EARLIER] if rejection else ()
        rejection = Rejection(
            sha256=sha256,
            version=version,
            stage=stage,
            reason=reason[:REASON_CHARACTERS],
            by=by,
            at=now_iso(),
            earlier=earlier,
        )
        records.write(registry, PREFIX + sha256[:DIGITS], rejection)
        log.warning("%s: %s", registry.model, rejection.sentence())
    mark(registry, rejection)


def mark(registry: Registry, rejection: Rejection) -> None:
    """Show a rejection, or its lifting, at every version of these bytes."""
    line = ("Rejected: " if rejection.lifted is None else "Allowed again: ") + rejection.sentence()
    for version in registry.versions_of(rejection.sha256):
        registry.tag(version, {MARK: "no, lifted" if rejection.lifted else f"yes: {rejection.reason}"[:4900]})
        rest = [part for part in registry.description(version).split("\n\n") if not _is_ours(part)]
        registry.describe(version, "\n\n".join([line, *rest]))


def require_allowed(registry: Registry, version: str) -> None:
    """Raise GateFailed if the engine of a version is rejected."""
    if (rejection := active(registry).get(registry.artifact(version).sha256)) is not None:
        raise GateFailed(f"{registry.model} version {version} may not be released: {explain(registry, rejection)}")


def explain(registry: Registry, rejection: Rejection) -> str:
    """Return the record, and how a person lifts it."""
    command = f"slipstream allow {registry.model} {rejection.version} --reason WHY"
    return f"{rejection.sentence()}; a person may lift this: `{command}`"


def allow(registry: Registry, what: str, by: str, reason: str) -> Rejection:
    """Lift the rejection of a version or digest (8 digits or more). Raise RegistryError if there is none."""
    rejection = _find(registry, what)
    if rejection.lifted is None:
        rejection = rejection.model_copy(
            update={"lifted": Lift(by=by, at=now_iso(), reason=reason[:REASON_CHARACTERS])}
        )
        records.write(registry, PREFIX + rejection.sha256[:DIGITS], rejection)
        log.info("%s: %s", registry.model, rejection.sentence())
    mark(registry, rejection)
    return rejection


def reasons(verdicts: tuple[Verdict, ...]) -> str:
    """Return what failed, for the record."""
    return "; ".join(f"{v.gate}: {v.reason}" for v in verdicts if v.answer == "fail")


def _find(registry: Registry, what: str) -> Rejection:
    rejections = all_of(registry)
    if len(what) < SHORT and what.isdigit():
        sha256 = registry.artifact(what).sha256
        matches = [r for r in rejections if r.sha256 == sha256]
    else:
        matches = [r for r in rejections if len(what) >= SHORT and r.sha256.startswith(what.lower())]
    if len(matches) != 1:
        listed = ", ".join(f"{r.version} ({r.sha256[:12]})" for r in rejections if r.lifted is None) or "none"
        raise RegistryError(
            f"{registry.model}: {what} does not name one rejected engine; give a version, or {SHORT} or more digits of "
            f"a sha256; rejected now: {listed}"
        )
    return matches[0]


def _is_ours(part: str) -> bool:
    return part.startswith(("Rejected: version ", "Allowed again: version "))
