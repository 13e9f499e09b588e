"""Airflow on one machine: its settings, its four processes, its database. Nothing here imports Airflow.

Four programs instead of `airflow standalone`: each has its own log and restarts alone, and standalone leaves its
children behind when it is terminated.
"""

import json
import subprocess
from pathlib import Path

from slipstream.errors import Unavailable
from slipstream.home import INSTALL, Home, dags_folder, write_atomically
from slipstream.platform import postgresql, supervisor
from slipstream.platform.addresses import Addresses, Secrets, port_of
from slipstream.platform.airflow_api import AirflowApi
from slipstream.platform.programs import Program, base_environment

SCHEDULER = "airflow-scheduler"
API_SERVER = "airflow-api-server"
COMMANDS: dict[str, tuple[str, ...]] = {
    API_SERVER: ("api-server", "--workers", "1"),
    # Task logs are read from the disk; serving them too would take fixed ports.
    SCHEDULER: ("scheduler", "--skip-serve-logs"),
    "airflow-dag-processor": ("dag-processor",),
    "airflow-triggerer": ("triggerer", "--skip-serve-logs"),
}
POOLS = {
    "machine": (2, "This machine: training steps share it, a measuring step takes both slots and has it alone"),
    "release": (1, "Small-scale tests, rollouts and rollbacks: one at a time (registry protocol)"),
}
"""Slots and description of each pool."""


def settings(home: Home, addresses: Addresses, secrets: Secrets) -> dict[str, str]:
    """Return Airflow's configuration, as environment variables."""
    return {
        "AIRFLOW_HOME": str(home.root / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags_folder()),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",  # 32 would add 28 idle workers
        # An event that arrives while a DAG is paused is lost.
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__FERNET_KEY": secrets.airflow_fernet_key,
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{secrets.airflow_user}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(_passwords_file(home)),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{addresses.airflow}/execution/",
        "AIRFLOW__API__BASE_URL": addresses.airflow,
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port_of(addresses.airflow)),
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.airflow_jwt_secret,
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": _database(home, addresses),
        "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
        # Parsing takes a core for about 2 s, which disturbs every measurement: rarely on a timer, and on request when a
        # spec is published (platform/airflow_api.py).
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "30",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
        "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "2",
        # After a crash, tasks without a living process are retried within two minutes, instead of ten.
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "30",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "90",
        # Process titles would overwrite the environment by which orphans are found.
        "SPT_NOENV": "1",
    }


def programs(home: Home, environment: dict[str, str]) -> list[Program]:
    """Return the four processes. The scheduler gets longer to stop: it waits for running tasks."""
    airflow = str(home.envs / "airflow" / "bin" / "airflow")
    waits = {SCHEDULER: 30}
    return [
        Program(name, (airflow, *command), environment, stop_wait_s=waits.get(name, 15))
        for name, command in COMMANDS.items()
    ]


def prepare(home: Home, environment: dict[str, str], secrets: Secrets) -> None:
    """Write the password file; create or migrate the database once for each Airflow version. Raise Unavailable."""
    passwords = json.dumps({secrets.airflow_user: secrets.airflow_password})
    if not _passwords_file(home).exists() or _passwords_file(home).read_text() != passwords:
        write_atomically(_passwords_file(home), passwords, mode=0o600)
    stamp = home.root / "airflow" / "migrated-to"
    version = _installed_version(home)
    if stamp.exists() and stamp.read_text() == version:
        return
    for name in COMMANDS:  # an earlier version's processes must not start while their database changes
        supervisor.stop(home, name)
    completed = subprocess.run(
        [str(home.envs / "airflow" / "bin" / "airflow"), "db", "migrate"],
        env=base_environment(home) | environment,
        capture_output=True,
        text=True,
        check=False,
        umask=0o077,
    )
    if completed.returncode != 0:
        raise Unavailable(f"`airflow db migrate` failed in {home.root}:\n{completed.stderr[-3000:]}")
    write_atomically(stamp, version)


def ensure_pools(home: Home) -> None:
    """Create the pools that DAGs name. Raise Unavailable."""
    api = AirflowApi.of(home)
    for name, (slots, description) in POOLS.items():
        api.ensure_pool(name, slots, description)


def _database(home: Home, addresses: Addresses) -> str:
    if addresses.postgresql is None:
        return f"sqlite:///{home.root}/airflow/airflow.db"
    return postgresql.uri(addresses.postgresql, postgresql.AIRFLOW)


def _passwords_file(home: Home) -> Path:
    return home.root / "airflow" / "passwords.json"


def _installed_version(home: Home) -> str:
    """Return the version of Airflow in its environment, from the name of its metadata folder."""
    folders = sorted((home.envs / "airflow").glob("lib/python3*/site-packages/apache_airflow_core-*.dist-info"))
    if not folders:
        raise Unavailable(f"{home.envs / 'airflow'}: no Airflow in this environment; {INSTALL}")
    return folders[-1].name.removeprefix("apache_airflow_core-").removesuffix(".dist-info")
