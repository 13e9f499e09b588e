"""Format of log lines; libraries get loggers, and only a process's entry point calls this."""

import logging
import sys

NOISY = ("httpx", "mlflow", "nncf", "urllib3", "botocore", "alembic")
"""Libraries that log their actions at INFO."""


def configure(level: int = logging.INFO) -> None:
    """Log to stderr, with the time, from `level` up."""
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
