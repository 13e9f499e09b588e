"""Processes that train one network together, with PyTorch's own launcher, gloo on processors and NCCL on GPUs.

Every process runs the same function. Process 0 leads: only it writes checkpoints and talks to MLflow. It shares with
the others what they need, so no common disk is required.
"""

import ctypes
import json
import logging
import os
import signal
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from slipstream import errors
from slipstream.errors import SlipstreamError, SpecError
from slipstream.frameworks.base import Group
from slipstream.frameworks.launched import Place

log = logging.getLogger(__name__)

T = TypeVar("T")

JOINING = timedelta(minutes=30)
"""Time limit for the other processes to start: on a cluster, images are pulled and nodes added meanwhile."""
WAITING = timedelta(hours=24)
"""Time limit for waiting in training. A dead process is noticed at once; this is for slow ones: a large teacher, or a
store that process 0 waits for."""
LAUNCHER_NOTICES_S = 5.0
"""Delay before a process that lost contact ends, so that the launcher sees first which one failed."""
PIECE = 64 * 2**20
"""Bytes of a file that are sent at once."""
ERROR = "slipstream/error"
LOCAL = {
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""On one machine nothing listens on an external address: gloo uses the loopback, and the store is a file. PyTorch's TCP
store would listen on all addresses, without a password. The last variable silences a warning of each process that no
parameter was unused."""


class TorchGroup(Group):
    """A group of processes joined by torch.distributed."""

    def __init__(self, store: distributed.Store, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._store = store
        backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAITING)

    def share(self, value: T) -> T:
        """See Group. Pickled: only processes of this group can be at the other end."""
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def add(self, value: float) -> float:
        """See Group."""
        total = torch.tensor([value], dtype=torch.float64)
        distributed.all_reduce(total)
        return float(total)

    def wrap(self, network: torch.nn.Module) -> torch.nn.Module:
        """See Group. Weights and buffers of process 0 are copied to the others first.

        Unused parameters are detected in each pass, since a network may skip some; a single process supports that too.
        """
        place = device()
        return DistributedDataParallel(
            network,
            device_ids=[place.index] if place.type == "cuda" else None,
            forward_sync_buffers=False,  # averaged at the end of an epoch instead, see average_buffers
            find_unused_parameters=True,
        )

    def average_buffers(self, network: torch.nn.Module) -> None:
        """See Group."""
        for buffer in network.buffers():
            if buffer.is_floating_point():
                distributed.all_reduce(buffer)
                buffer.div_(self.size)

    def broadcast_file(self, path: Path) -> None:
        """See Group."""
        has: list[bool] = [False] * self.size
        distributed.all_gather_object(has, path.exists())
        if not all(has):
            self._send(path, needed=not has[self.rank])

    def _send(self, path: Path, *, needed: bool) -> None:
        """Send a file or folder of process 0 to all; written aside, then renamed, if needed."""
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        names = self.share([f.relative_to(path).as_posix() for f in files])
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as aside:
            staged = Path(aside) / path.name
            for name in names:
                target = staged / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with (path / name if self.leads else target).open("rb" if self.leads else "wb") as file:
                    while piece := self.share(file.read(PIECE) if self.leads else b""):
                        if not self.leads:
                            file.write(piece)
            if needed:
                try:
                    staged.rename(path)
                except OSError:
                    if not path.exists():  # another process of this machine was first
                        raise

    def leave(self) -> None:
        """See Group."""
        distributed.destroy_process_group()

    @contextmanager
    def first_error_wins(self) -> Iterator[None]:
        """See Group. The first error wins: errors of processes that lost contact are consequences of it."""
        try:
            yield
        except Exception as error:
            raise self._first(error) from error

    def _first(self, error: Exception) -> SlipstreamError:
        if _lost_contact(error):
            log.warning("process %d of %d lost contact with another one", self.rank, self.size)
        elif not isinstance(error, SlipstreamError):
            log.error("process %d of %d failed\n%s", self.rank, self.size, traceback.format_exc())
        try:
            mine = json.dumps(self._described(error))
            recorded = bytes(self._store.compare_set(ERROR, "", mine)).decode()
        except (RuntimeError, ValueError) as gone:  # the store ended with the process that held it
            log.warning("the group's store does not answer: %s", gone)
            return _error(self._described(error))
        if recorded == mine and _lost_contact(error):
            time.sleep(LAUNCHER_NOTICES_S)
        return _error(json.loads(recorded))

    def _described(self, error: Exception) -> dict[str, str]:
        if isinstance(error, SlipstreamError):
            return {"kind": type(error).__name__, "said": str(error)}
        what = "lost contact with another process" if _lost_contact(error) else "failed"
        message = f"process {self.rank} of {self.size} {what}: {type(error).__name__}: {error}"
        return {"kind": SlipstreamError.__name__, "said": message}


def device() -> torch.device:
    """Return where this process trains: its own GPU, or the processors. Raise SpecError if a GPU would be shared."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here, there_are = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if here >= there_are:
        raise SpecError(
            f"training.workers: process {here} of this machine finds no GPU of its own, there are {there_are}; lower "
            "the number of workers, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on processors"
        )
    return torch.device("cuda", here)


def join(place: Place) -> TorchGroup:
    """Join the group that a launcher started this process for."""
    # Through the launcher's own variables if it set PyTorch's: they also say whether torchrun holds the store itself.
    url = "env://" if "RANK" in os.environ else f"tcp://{place.address}:{place.port}"
    store, rank, size = next(distributed.rendezvous(url, place.rank, place.size, timeout=JOINING))
    return TorchGroup(store, rank, size)


def launch(workers: int, function: Callable[..., T], *arguments: object) -> T:
    """Call `function(group, *arguments)` in that many processes on this machine; return process 0's result.

    If one fails, all end, and its error is raised here. A signal to this process ends them, and then this one.
    """
    with tempfile.TemporaryDirectory(prefix="slipstream-group-") as folder, _variables(workers):
        store = Path(folder) / "store"
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(folder) / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            max_restarts=0,  # Airflow retries, from the checkpoint
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(folder) / "logs")),
        )
        for name in ("torch.distributed", "torch.multiprocessing"):  # they log at length what is raised here
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            result: T = elastic_launch(config, _member)(str(store), os.getpid(), function, arguments)[0]
        except SignalException as ended:
            signal.signal(ended.sigval, signal.SIG_DFL)
            os.kill(os.getpid(), ended.sigval)
            raise
        except ChildFailedError as failed:
            raise _why(store, workers, failed) from None
    return result


def _member(store: str, parent: int, function: Callable[..., T], arguments: tuple[object, ...]) -> T:
    """Run one of the processes that `launch` starts. Exit with the code of the error that ended the group."""
    _die_with(parent)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = TorchGroup(distributed.FileStore(store, size), rank, size)
    try:
        with group.first_error_wins():
            result = function(group, *arguments)
    except SlipstreamError as error:
        raise SystemExit(error.exit_code) from error
    group.leave()
    return result


def _die_with(parent: int) -> None:
    """If the launcher is killed, make the kernel end this process too: two attempts must not write one checkpoint."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        raise SystemExit(1)


def _why(store: Path, workers: int, failed: ChildFailedError) -> SlipstreamError:
    """Return the error that ended a group: as reported by its processes, or how the first one ended."""
    rank, failure = failed.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "; the kernel does that when memory runs out" if name == "SIGKILL" else ""
        return SlipstreamError(f"process {rank} of {workers} was ended by {name}{hint}")
    file_store = distributed.FileStore(str(store), workers) if store.exists() else None
    if file_store is not None and file_store.check([ERROR]):
        return _error(json.loads(file_store.get(ERROR)))
    return SlipstreamError(f"process {rank} of {workers} ended with exit code {failure.exitcode}; its log says why")


def _error(described: dict[str, str]) -> SlipstreamError:
    kind: type[SlipstreamError] = getattr(errors, described["kind"], SlipstreamError)
    return kind(described["said"])


def _lost_contact(error: Exception) -> bool:
    """Return whether the error only reports that another process is gone. Gloo raises a RuntimeError with its name."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextmanager
def _variables(workers: int) -> Iterator[None]:
    """Set the processes' environment: they share the processors, instead of each taking all of them."""
    threads = str(max(len(os.sched_getaffinity(0)) // workers, 1))
    settings = {name: os.environ.get(name, value) for name, value in {**LOCAL, "OMP_NUM_THREADS": threads}.items()}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
