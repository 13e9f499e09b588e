"""The ingress of the stand-in for KServe: a real Envoy that splits by host, and knows each tag's own host."""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tests.conftest import ROOT, free_port

from slipstream.errors import Unavailable
from slipstream.traffic import envoy_config
from slipstream.traffic.envoy_admin import Admin

Json = dict[str, Any]


class Ingress:
    """An Envoy of its own on 127.0.0.1, until `close()`. Services are those of kserve_stand_in.py."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written = 0
        self._port, self._admin = free_port(), Admin(folder)
        self._process = self._start()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self._port}"

    def close(self) -> None:
        """Stop answering."""
        end(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        dynamic = self._folder / "dynamic"
        dynamic.mkdir(parents=True)
        (dynamic / "clusters.json").write_text(json.dumps(envoy_config.clusters_document({})))
        (dynamic / "routes.json").write_text(json.dumps(envoy_config.routes_document({})))
        bootstrap = self._folder / "bootstrap.yaml"
        bootstrap.write_text(yaml.safe_dump(envoy_config.bootstrap(dynamic, self._port)))
        [binary] = (ROOT / ".envs/serve").glob("lib/python3*/site-packages/envoy/_bin/envoy")
        command = [str(binary), "-c", str(bootstrap), "--concurrency", "1", "--disable-hot-restart"]
        with (self._folder / "envoy.log").open("wb") as log:
            process = subprocess.Popen([*command, "--log-level", "warning"], stdout=log, stderr=log, cwd=self._folder)
        self._await(self._admin.ready, "Envoy is up")
        return process

    def route(self, services: Sequence[Any]) -> None:
        """Clusters first, so that no route names one that Envoy does not have; returns when both are loaded."""
        ports = {r.name: r.port for s in services for r in s.revisions.values() if r.process is not None}
        self._rename("clusters.json", envoy_config.clusters_document(ports))
        self._await(lambda: ports.keys() <= self._loaded_clusters(), "clusters are loaded")
        self._written += 1
        hosts = [h for s in services for h in _virtual_hosts(s)]
        marker = {"name": f"marker-{self._written}", "domains": ["marker.invalid"], "routes": []}
        document = envoy_config.routes_document({})
        document["resources"][0]["virtual_hosts"] = [*hosts, marker]
        self._rename("routes.json", document)
        self._await(lambda: marker["name"] in self._admin.text("/config_dump?resource=dynamic_route_configs"), "routes")

    def _loaded_clusters(self) -> set[str]:
        dump = self._admin.json("/config_dump", resource="dynamic_active_clusters")
        return set(envoy_config.loaded_clusters(dump))

    def _rename(self, name: str, document: Json) -> None:
        aside = self._folder / "dynamic" / f".{name}"
        aside.write_text(json.dumps(document))
        aside.replace(self._folder / "dynamic" / name)

    def _await(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                if done():
                    return
            except Unavailable:
                pass
            time.sleep(0.01)
        raise AssertionError(f"stand-in: not in time: {what}; {(self._folder / 'envoy.log').read_text()[-500:]}")


def _virtual_hosts(service: Any) -> list[Json]:
    """The model's own host with the split, and one for each tag."""
    if not service.traffic:
        return []
    weights: dict[str, int] = {}
    for target in service.traffic:
        weights[target["revisionName"]] = weights.get(target["revisionName"], 0) + target["percent"]
    split = {"clusters": [{"name": r, "weight": w} for r, w in weights.items() if w]}
    found = [_virtual_host(service.host, {"weighted_clusters": split})]
    for target in service.traffic:
        found.append(_virtual_host(target["url"].removeprefix("http://"), {"cluster": target["revisionName"]}))
    return found


def _virtual_host(host: str, action: Json) -> Json:
    route = {"match": {"prefix": "/"}, "route": {**action, "timeout": "10s"}}
    return {"name": host, "domains": [host, f"{host}:*"], "routes": [route]}


def end(process: subprocess.Popen[bytes] | None) -> None:
    """Stop a process, and wait for it."""
    if process is not None and process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
