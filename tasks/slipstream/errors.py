"""Every error that slipstream raises on purpose, and the exit code that each one means.

    SlipstreamError              exit 1   something went wrong; a retry may help
    ├── Unavailable              exit 1   a service did not answer (MLflow, Airflow, S3, a model server)
    ├── Superseded               exit 1   a newer test, rollout or rollback owns the traffic of the model
    ├── Undecided                exit 1   a gate could not be judged: an outage, or an overloaded machine
    ├── InputError               exit 2   an input is wrong; a retry will not help
    │   ├── SpecError                     the spec: file, field, fix
    │   │   └── CodeError                 a function that the spec names: file, line, exception
    │   ├── DataError                     a data set
    │   ├── ModelError                    a model, checkpoint or candidate
    │   ├── EngineError                   an engine that cannot be built or may not be loaded here
    │   └── RegistryError                 the registry has changed since the evidence was recorded
    └── GateFailed               exit 3   a gate failed or was inconclusive; a retry will not help

A message says what is wrong, where, and what to do. `cli.main` exits with the code; `dags/runtimes`
reads it and decides whether Airflow retries.
"""

import errno
from typing import ClassVar

EXIT_RETRY = 1
EXIT_INPUT = 2
EXIT_GATE = 3


class SlipstreamError(Exception):
    """Root of all errors raised on purpose."""

    exit_code: ClassVar[int] = EXIT_RETRY
    headline: ClassVar[str] = "Failed"


class Unavailable(SlipstreamError):
    """A service that the step needs did not answer; nothing was lost, and a retry may help."""

    headline = "Service unavailable"


class Superseded(SlipstreamError):
    """A newer move owns the traffic of the model; this one changed nothing more. A retry reads the newer decision."""

    headline = "Superseded"


class Undecided(SlipstreamError):
    """A gate could not be judged because of an outage or an overloaded machine; nothing was rejected, so retry."""

    headline = "Not decided"


class InputError(SlipstreamError):
    """An input is wrong, and stays wrong on a retry."""

    exit_code = EXIT_INPUT
    headline = "Bad input"


class SpecError(InputError):
    """The spec does not describe something that can be run."""

    headline = "Bad spec"


class CodeError(SpecError):
    """A function that the spec names cannot be imported, raised an exception, or ended the process."""

    headline = "Bad code"


class DataError(InputError):
    """A data set is missing, malformed, or not the one that earlier steps used."""

    headline = "Bad data"


class ModelError(InputError):
    """A model, checkpoint or candidate cannot be used."""

    headline = "Bad model"


class EngineError(InputError):
    """An engine cannot be built, or its fingerprint forbids loading it on this machine."""

    headline = "Bad engine"


class RegistryError(InputError):
    """The registry is not in the state that the evidence was taken in."""

    headline = "Registry changed"


class GateFailed(SlipstreamError):
    """A gate failed or was inconclusive; neither is a pass."""

    exit_code = EXIT_GATE
    headline = "Gate failed"


PERMANENT = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
}  # fmt: skip
"""The system's errors about a path itself, which are permanent; a full disk or a lost connection may be temporary."""


def of_system(error: OSError) -> SlipstreamError:
    """Return the operating system's refusal as an error with the path and an exit code."""
    what = error.strerror or type(error).__name__
    path = f"{error.filename}: " if error.filename is not None else ""
    kind = InputError if error.errno in PERMANENT and error.filename is not None else SlipstreamError
    return kind(f"{path}{what}")
