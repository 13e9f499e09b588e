"""Terminal output of `slipstream up`, `down`, `status` and `logs`."""

import json
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.platform import addresses, health, lifecycle, object_store, programs
from slipstream.platform.addresses import Profile
from slipstream.platform.health import ServiceStatus

WAITING_EVERY_S = 20


def up(home: Home, *, new_ports: bool, profile: Profile | None = None) -> None:
    """Start the platform; progress on stderr, addresses and log-in on stdout."""
    with _Progress() as progress:
        endpoints = lifecycle.up(home, progress.show, new_ports=new_ports, profile=profile)
    login = addresses.load_secrets(home)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"Airflow  {endpoints.airflow}  user {login.airflow_user}, password {login.airflow_password}")
    console.print(f"MLflow   {endpoints.mlflow}  user {login.mlflow_user}, password {login.mlflow_password}")
    console.print(f"Models   {endpoints.envoy}  Open Inference Protocol V2")
    if endpoints.s3:
        console.print(
            f"Storage  {endpoints.s3}  bucket {object_store.BUCKET}, credentials in {home.root / 'secrets.json'}"
        )


def environment(home: Home) -> None:
    """Print the variables for access to MLflow and the store, as shell code. Raise Unavailable."""
    endpoints = addresses.load(home)
    login = addresses.load_secrets(home)
    variables = addresses.mlflow_variables(endpoints, login)
    if endpoints.s3:
        variables |= object_store.environment(endpoints.s3, login)
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")


def down(home: Home) -> None:
    """Stop the platform and say so on stderr."""
    leftovers = lifecycle.down(home)
    more = f"; {len(leftovers)} left-over processes ended" if leftovers else ""
    Console(stderr=True).print(f"nothing of {home.root} runs any more{more}", highlight=False, soft_wrap=True)


def status(home: Home, *, as_json: bool) -> bool:
    """Print every service; return whether all are healthy. Raise Unavailable if nothing was ever started here."""
    services = health.status(home, addresses.load(home))
    console = Console(soft_wrap=True)
    if as_json:
        document = {"home": str(home.root), "services": [s.model_dump() for s in services]}
        console.print_json(json.dumps(document))
    else:
        console.print(_table(services))
        for note in dict.fromkeys(s.note for s in services if s.note):
            names = ", ".join(s.name for s in services if s.note == note)
            console.print(f"{names}: {note}", style="red", highlight=False, markup=False)
    return all(s.healthy for s in services)


def logs(home: Home, service: str | None, lines: int, follow: bool) -> None:
    """Become `tail` on one service's log, or on all. Raise InputError for an unknown service."""
    services = sorted(p.stem for p in (home.root / "logs").glob("*.log"))
    if service is not None and service not in services:
        raise InputError(f"no log of {service!r} under {home.root / 'logs'}; known: {', '.join(services) or 'none'}")
    if not services:
        raise InputError(f"no logs under {home.root}; start the platform with `slipstream up`")
    files = [str(programs.log_file(home, name)) for name in ([service] if service else services)]
    # -F finds the new file after a rotation.
    os.execvp("tail", ["tail", "-n", str(lines), *(["-F"] if follow else []), *files])  # noqa: S606 (no shell needed)


def _table(services: Sequence[ServiceStatus]) -> Table:
    table = Table("service", "state", "healthy", "pid", "MiB", "address", box=None, header_style="bold")
    for column in ("pid", "MiB"):
        next(c for c in table.columns if c.header == column).justify = "right"
    for s in services:
        mark = "[green]yes[/]" if s.healthy else "[red]no[/]"
        pid, memory = (str(s.pid), f"{s.memory_mib:.0f}") if s.pid else ("", "")
        table.add_row(s.name, s.state.lower(), mark, pid, memory, s.address or "")
    return table


class _Progress(AbstractContextManager["_Progress"]):
    """A live table on a terminal; otherwise a line whenever a service becomes healthy, or none has for a while."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, transient=True) if self._console.is_terminal else None
        self._since = time.monotonic()
        self._healthy: set[str] = set()
        self._said_s = self._since

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
            self._live.update("preparing …")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, services: list[ServiceStatus]) -> None:
        """Draw the table, or print what is new."""
        if self._live:
            self._live.update(_table(services), refresh=True)
        for s in services:
            if s.healthy and s.name not in self._healthy:
                self._healthy.add(s.name)
                self._say(f"{s.name} is up")
        missing = [f"{s.name} ({s.note or s.state.lower()})" for s in services if not s.healthy]
        if missing and time.monotonic() - self._said_s > WAITING_EVERY_S:
            self._say(f"waiting for {', '.join(missing)}")

    def _say(self, what: str) -> None:
        self._said_s = time.monotonic()
        self._console.print(f"{self._said_s - self._since:5.1f} s  {what}", highlight=False, soft_wrap=True)
