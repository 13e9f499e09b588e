"""Signatures on what slipstream stores in MLflow and trusts when it reads it back (docs/security.md).

HMAC-SHA256 with a key that only the platform has: SLIPSTREAM_SIGNING_KEY, else the file `signing.key` in
SLIPSTREAM_HOME, which is created at first use. A signature is bound to its purpose, so that one made for a step's
output cannot pass for one on a version. Anyone who can write to MLflow but lacks the key can delete results, but not
forge them.
"""

import hashlib
import hmac
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from slipstream.contract import StepOutput, canonical
from slipstream.errors import DataError, InputError
from slipstream.home import Home

VARIABLE = "SLIPSTREAM_SIGNING_KEY"
"""One key, or several separated by commas: the first signs, all verify, so that a key can be replaced."""
FILE = "signing.key"
SHORTEST = 32
"""Minimum characters of a key; 32 hexadecimal digits are 128 bits."""

STEP_OUTPUT = "step-output"
VERSION_ARTIFACT = "version-artifact"
MODEL_RECORD = "model-record"


def sign(purpose: str, document: object) -> str:
    """Return the signature of a JSON document for a purpose, in hexadecimal. Raise InputError for an unusable key."""
    return _signature(_keys()[0], purpose, document)


def verify(purpose: str, document: object, signature: str) -> bool:
    """Return whether `signature` was made by `sign` for this document and purpose; compared in constant time."""
    encoded = signature.encode()  # compare_digest rejects text beyond ASCII
    return any(hmac.compare_digest(_signature(key, purpose, document).encode(), encoded) for key in _keys())


def signed_output(output: StepOutput) -> StepOutput:
    """Return the output with its signature, which covers every other field."""
    return output.model_copy(update={"signature": sign(STEP_OUTPUT, output.signed_part())})


def require_signed(output: StepOutput, where: str) -> StepOutput:
    """Return the output, if this platform signed it. Raise DataError otherwise."""
    if verify(STEP_OUTPUT, output.signed_part(), output.signature):
        return output
    how = "has no signature" if not output.signature else "has a signature of another key, or was changed"
    raise DataError(
        f"{where}: the output of step {output.step} {how}; run that step again, and give every step the same "
        f"{VARIABLE} or SLIPSTREAM_HOME"
    )


def key_file(home: Home) -> Path:
    """Return the path of a home's own key."""
    return home.root / FILE


def _signature(key: bytes, purpose: str, document: object) -> str:
    return hmac.new(key, f"{purpose}\0{canonical(document)}".encode(), hashlib.sha256).hexdigest()


def _keys() -> list[bytes]:
    text, source = os.environ.get(VARIABLE), VARIABLE
    if text is None:
        path = key_file(Home.from_environment())
        text, source = _read_or_make(path), str(path)
    keys = [key.strip() for key in text.split(",")]
    if any(len(key) < SHORTEST for key in keys):
        raise InputError(
            f"{source}: a signing key has at least {SHORTEST} characters; make one with `openssl rand -hex 32`"
        )
    return [key.encode() for key in keys]


def _read_or_make(path: Path) -> str:
    """Return the key in a file. A missing one is created completely and then linked into place: processes share one
    key."""
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".signing-") as aside:  # has mode 0600
                aside.write(secrets.token_hex(32))
                aside.flush()
                os.fsync(aside.fileno())
                with suppress(FileExistsError):  # another process was faster
                    os.link(aside.name, path)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: the signing key cannot be read or made ({error}); set {VARIABLE} instead") from None
