"""The real platform, for the tests of each profile."""

import os
import subprocess
import sys
from dataclasses import dataclass

from tests.conftest import ROOT

from slipstream.home import Home
from slipstream.platform import health, processes, supervisor
from slipstream.platform.addresses import Addresses
from slipstream.platform.health import ServiceStatus


@dataclass(frozen=True)
class Platform:
    """One that is up."""

    home: Home
    addresses: Addresses

    def pids(self) -> dict[str, int | None]:
        """Process of each program."""
        return {name: state.pid for name, state in supervisor.states(self.home).items()}

    def status(self) -> dict[str, ServiceStatus]:
        """What `slipstream status` shows."""
        return {s.name: s for s in health.status(self.home, self.addresses)}

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `slipstream` as a person would."""
        places = {"SLIPSTREAM_HOME": self.home.root, "SLIPSTREAM_ENVS": self.home.envs, "SLIPSTREAM_CODE": ROOT}
        return subprocess.run(
            [sys.executable, "-c", "from slipstream.cli import main; main()", *words],
            env=os.environ | {k: str(v) for k, v in places.items()},
            capture_output=True,
            text=True,
            check=False,
        )

    def mentioned(self) -> list[str]:
        """Command lines of processes that have to do with this home."""
        return [p.command for p in processes._all() if f"{self.home.root}/" in p.command]


def silent(_: list[ServiceStatus]) -> None:
    """Ignore progress."""
