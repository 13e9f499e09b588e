"""Steps as containers of the Docker daemon on this machine, by Airflow's DockerOperator.

SLIPSTREAM_HOME and the user's code are mounted at their own paths, so that documents, cache and checkpoints are the
same as with processes. The container runs as the owner of SLIPSTREAM_HOME, with no capabilities and a read-only
root file system.
"""

import hashlib
import os
from functools import cached_property, partial
from typing import Any

from airflow.providers.docker.exceptions import DockerContainerFailedException
from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException
from docker.errors import APIError, DockerException, NotFound
from docker.types import DeviceRequest, Mount

from runtimes.base import Job, message, raise_for
from slipstream.contract import Json
from slipstream.platform import addresses
from slipstream.spec.fields import in_bytes

PASSED_ON = ("AWS_", "MLFLOW_", "SLIPSTREAM_")
"""Prefixes of this process's variables that are passed to a step."""
STOP_GRACE_S = 4
"""Seconds between SIGTERM and SIGKILL; Airflow's own grace is 5 s."""
HANGS_AFTER_S = 24 * 3600
"""Client timeout: a step may print nothing for a long time, and the client must not give up on its log earlier."""


def runtime() -> "Docker":
    """Return this runtime."""
    return Docker()


class _Container(DockerOperator):
    """DockerOperator with additions: a locked-down container and a bounded stop."""

    restrictions: dict[str, object] = {}  # noqa: RUF012 (set for each instance right after it is made)

    @cached_property
    def hook(self) -> Any:
        """The hook, its client bound to create containers with our restrictions."""
        hook = super().hook
        client = hook.api_client
        client.create_host_config = partial(client.create_host_config, **self.restrictions)
        return hook

    def on_kill(self) -> None:
        """Ask the step to end, then force it."""
        if self.container is not None:
            self.cli.stop(self.container["Id"], timeout=STOP_GRACE_S)


class Docker:
    """Implements `Runtime` (base.py)."""

    def __init__(self) -> None:
        self._operator: _Container | None = None

    def run(self, job: Job, context: Context) -> None:
        """See Runtime. A container left by a killed task is removed first; its step resumes in the new one."""
        operator = self._operator = _operator(job, context)
        try:
            _connect(operator)
            _remove_left_over(operator, job)
            operator.execute(context)
        except DockerContainerFailedException as error:
            state = operator.cli.inspect_container(operator.container["Id"])["State"]
            lines = error.logs or []
            raise_for(job, _exit_code(state), lines, out_of_memory=bool(state["OOMKilled"]))
            raise AirflowException(f"step {job.step}: {message(lines)}") from error
        except DockerException as error:
            raise AirflowException(f"Docker at {operator.docker_url}: {_hint(operator)}{error}") from error
        finally:
            _remove(operator)

    def stop(self) -> None:
        """See Runtime."""
        if self._operator is not None:
            self._operator.on_kill()


def _connect(operator: _Container) -> None:
    """Raise AirflowException, with the address, if the daemon does not answer."""
    try:
        operator.cli.ping()
    except AirflowException as error:
        raise AirflowException(
            f"Docker at {operator.docker_url}: no daemon answers; start it, or set docker.url in the settings"
        ) from error


def _remove_left_over(operator: _Container, job: Job) -> None:
    try:
        operator.cli.remove_container(operator.container_name, force=True)
        operator.log.info("removed the container of an earlier attempt at %s", job.name)
    except NotFound:
        return


def _hint(operator: _Container) -> str:
    if operator.container is None and not operator.cli.images(name=operator.image):
        return f"{operator.image} is not on this machine (`make images` builds it) and cannot be pulled: "
    return ""


def _operator(job: Job, context: Context) -> _Container:
    docker, resources, home = job.settings.docker, job.resources, job.home
    owner = home.root.stat()
    operator = _Container(
        task_id=job.step,
        image=job.image,
        command=job.arguments,
        container_name=_name(job, context),
        docker_url=docker.url,
        network_mode=docker.network,
        private_environment=_environment(job),
        user=f"{owner.st_uid}:{owner.st_gid}",
        mounts=[
            Mount(str(home.root), str(home.root), "bind"),
            Mount(str(home.code), str(home.code), "bind", read_only=True),
            *map(_mount, docker.mounts),
            Mount("/tmp", None, "tmpfs"),  # noqa: S108 (inside the container)
        ],
        cpus=resources.cpu or 1.0,
        mem_limit=None if resources.memory is None else str(in_bytes(resources.memory)),
        device_requests=_gpus(resources.gpu),
        labels={"slipstream.run": job.inputs.run_key, "slipstream.step": job.name},
        mount_tmp_dir=False,
        timeout=HANGS_AFTER_S,
        do_xcom_push=False,
    )
    operator.restrictions = {
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "init": True,
        # The release steps read the memory use of model servers, which run on this machine too.
        "pid_mode": "host",
    }
    if resources.cpu is not None:
        operator.restrictions["nano_cpus"] = round(resources.cpu * 1e9)
    if resources.memory is not None:  # no swap: a step that thrashes is worse than one that reports its lack of memory
        operator.restrictions["memswap_limit"] = str(in_bytes(resources.memory))
    return operator


def _name(job: Job, context: Context) -> str:
    """Return the container's name, the same for every attempt at a task, so that a leftover one is found.

    It differs between homes: runs started by a schedule or a promotion have the same name in all of them.
    """
    ti, home = context["ti"], hashlib.sha256(str(job.home.root).encode()).hexdigest()[:8]
    name = f"slipstream-{home}-{ti.dag_id}-{job.inputs.run_key}-{job.name}"
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "-" for c in name)


def _environment(job: Job) -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
    variables |= {"SLIPSTREAM_HOME": str(job.home.root), "SLIPSTREAM_CODE": str(job.home.code), "PYTHONUNBUFFERED": "1"}
    # Release steps tell this machine's supervisord what to start: a path on this machine.
    variables["SLIPSTREAM_ENVS"] = str(job.home.envs)
    if job.home.addresses_file().exists():
        addresses.reach_mlflow(job.home, variables)
    return variables | job.settings.environment


def _mount(text: str) -> Mount:
    source, target, *options = text.split(":")
    return Mount(target, source, "bind", read_only="ro" in options)


def _gpus(count: int | None) -> list[DeviceRequest] | None:
    return [DeviceRequest(count=count, capabilities=[["gpu"]])] if count else None


def _exit_code(state: Json) -> int:
    """Return the exit code in subprocess's form: minus the signal if a signal ended the container's process."""
    code = int(state["ExitCode"])
    return 128 - code if code > 128 else code


def _remove(operator: _Container) -> None:
    """Remove the container, whatever its outcome; its log is in the task's log."""
    if operator.container is None:
        return
    try:
        operator.cli.remove_container(operator.container["Id"], force=True)
    except (APIError, NotFound) as error:
        operator.log.warning("container %s is left behind: %s", operator.container_name, error)
