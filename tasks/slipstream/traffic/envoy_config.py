"""Envoy's configuration as plain values: the bootstrap, the clusters (CDS), the routes (RDS), and back again.

Everything dynamic is read from two files through `path_config_source` with `watched_directory`: Envoy reloads when a
file is renamed into the folder, so a file is written aside and renamed, and never read half written. Field names follow
https://www.envoyproxy.io/docs/envoy/latest/api-v3/api.

Failover. Each release has a cluster `MODEL--NAME` of one server with active health checks and outlier detection, and
with each other release of its model an aggregate cluster `MODEL--NAME+FALLBACK`: FALLBACK answers while NAME's server
is ejected, and receives a request when NAME's server resets it or does not answer it in time. Inference changes no
state, so it can be repeated. The guardrails miss none of this: `observation` counts a request as the release's error
whenever its own server did not answer it.

A server is ejected after two missed health checks, at most 2 × (interval + timeout) = 1.9 s after it froze. Without a
healthy fallback Envoy continues to query it (its panic mode), so that a false alarm on an overloaded machine has no
effect.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from slipstream.contract import Json, Release
from slipstream.serving import client
from slipstream.traffic.base import Routes
from slipstream.traffic.envoy_listener import ROUTE_CONFIG, TYPE, from_file, listener, overload_manager

RELEASE_HEADER = client.RELEASE
REQUEST_TIMEOUT = "10s"
UPSTREAM_IDLE = "2s"
"""Shorter than the servers' keep-alive of 5 s: a connection that the server is about to close is never reused."""
HEALTH_INTERVAL, HEALTH_TIMEOUT = "0.25s", "0.7s"
UNHEALTHY_AFTER, HEALTHY_AFTER = 2, 2
MOST_CONNECTIONS = 256
"""To one server, which answers one request at a time; further requests wait in Envoy."""
MOST_WAITING = 1024
FALL_BACK_AFTER = "3s"
"""A request without an answer after this time is also sent to the fallback, and the first answer counts: the server may
just have frozen. It is long enough that requests that are only slow, on a busy machine, are rarely computed twice."""
ADMIN = "admin.sock"
"""Unix socket of the admin interface, in Envoy's working directory: an absolute path may be too long for one."""
AND = "+"
"""Separator between a release and its fallback, in the name of an aggregate cluster."""
METADATA = "slipstream"
EMPTY: Mapping[str, Sequence[str]] = MappingProxyType({})


def bootstrap(folder: Path, port: int) -> Json:
    """Return the static part: admin interface, one listener, and the sources of the dynamic part."""
    return {
        "node": {"id": "slipstream", "cluster": "slipstream"},
        # For the owner alone: anyone with access can stop Envoy.
        "admin": {"address": {"pipe": {"path": ADMIN, "mode": 0o600}}},
        "overload_manager": overload_manager(),
        "dynamic_resources": {"cds_config": from_file(folder, "clusters.json")},
        "static_resources": {"listeners": [listener(folder, port)]},
    }


def clusters_document(ports: Mapping[str, int]) -> Json:
    """Return CDS: a cluster for each release key, at its server's port, and one for each pair of a model's releases."""
    pairs = [(a, b) for a in ports for b in ports if a != b and _model(a) == _model(b) is not None]
    singles = [_cluster(key, ports[key]) for key in sorted(ports)]
    return {"resources": singles + [_aggregate(key, fallback) for key, fallback in sorted(pairs)]}


def routes_document(routes: Mapping[str, Routes], history: Mapping[str, Sequence[str]] = EMPTY) -> Json:
    """Return RDS: one virtual host with a route for each model that has traffic.

    `history`: model → releases that had all the traffic, oldest first (`settled`), which determines the fallbacks.
    """
    host = {
        "name": "models",
        "domains": ["*"],
        "routes": [_route(m, routes[m], history.get(m, ())) for m in sorted(routes) if routes[m].weights],
    }
    resource = {
        "@type": TYPE + "envoy.config.route.v3.RouteConfiguration",
        "name": ROUTE_CONFIG,
        "virtual_hosts": [host],
    }
    return {"resources": [resource]}


def settled(history: Sequence[str], weights: Mapping[str, int]) -> tuple[str, ...]:
    """Return the history after the traffic was set to `weights`: releases that had all of it, oldest first.

    Returning to a release that had all traffic before removes the later ones: a release that was rolled back, or failed
    in its rollout, is not a fallback.
    """
    names = [name for name, weight in weights.items() if weight]
    if len(names) != 1:
        return tuple(history)
    [name] = names
    return (*history[: history.index(name)], name) if name in history else (*history, name)


def fallback(name: str, history: Sequence[str]) -> str | None:
    """Return a release's fallback: the release that served before it, or that serves while it is under test."""
    before = history[: history.index(name)] if name in history else history
    return before[-1] if before else None


def parse_routes(route_config: Json) -> dict[str, Routes]:
    """Return the traffic of each model in a RouteConfiguration, from our file or from Envoy's admin interface."""
    routes = {}
    for host in route_config.get("virtual_hosts", []):
        for entry in host.get("routes", []):
            model = entry["match"]["path_separated_prefix"].removeprefix("/v2/models/")
            action = entry["route"]
            weights = {
                _name(model, c["name"].partition(AND)[0]): int(c["weight"])
                for c in action["weighted_clusters"]["clusters"]
            }
            mirrors = [_name(model, m["cluster"]) for m in action.get("request_mirror_policies", [])]
            routes[model] = Routes(weights=weights, mirror=mirrors[0] if mirrors else None)
    return routes


def parse_history(route_config: Json) -> dict[str, tuple[str, ...]]:
    """Return the history that `routes_document` wrote, by model."""
    history = {}
    for host in route_config.get("virtual_hosts", []):
        for entry in host.get("routes", []):
            metadata = entry.get("metadata", {}).get("filter_metadata", {}).get(METADATA, {})
            model = entry["match"]["path_separated_prefix"].removeprefix("/v2/models/")
            history[model] = tuple(metadata.get("history", ()))
    return history


def loaded_routes(config_dump: Json) -> dict[str, Routes]:
    """Return the routes in the answer of `/config_dump?resource=dynamic_route_configs`."""
    routes: dict[str, Routes] = {}
    for entry in config_dump.get("configs", []):
        config = entry.get("route_config", {})
        if config.get("name") == ROUTE_CONFIG:
            routes |= parse_routes(config)
    return routes


def loaded_actions(config_dump: Json) -> Json:
    """Return `route_actions` of what is loaded, in the answer of `/config_dump?resource=dynamic_route_configs`."""
    for entry in config_dump.get("configs", []):
        config = entry.get("route_config", {})
        if config.get("name") == ROUTE_CONFIG:
            return route_actions(config)
    return {}


def route_actions(route_config: Json) -> Json:
    """Return the actions of the routes, by model: clusters with their weights, fallbacks included, and the mirror."""
    routes = [entry for host in route_config.get("virtual_hosts", []) for entry in host.get("routes", [])]
    return {
        r["name"]: (
            {c["name"]: int(c["weight"]) for c in r["route"]["weighted_clusters"]["clusters"]},
            [m["cluster"] for m in r["route"].get("request_mirror_policies", [])],
        )
        for r in routes
    }


def loaded_clusters(config_dump: Json) -> dict[str, int]:
    """Return ports by release key, in the answer of `/config_dump?resource=dynamic_active_clusters`."""
    ports = {}
    for entry in config_dump.get("configs", []):
        cluster = entry.get("cluster", {})
        for group in cluster.get("load_assignment", {}).get("endpoints", []):
            for endpoint in group.get("lb_endpoints", []):
                address = endpoint["endpoint"]["address"]["socket_address"]
                ports[cluster["name"]] = int(address["port_value"])
    return ports


def observation(document: Json, key: str) -> tuple[int, int, int]:
    """Return requests that were sent to a release, by their share or as copies; those that its own server failed; and
    those of them that it answered with 500: it received them in time, but could not compute the answer.

    `document` is the answer of `/stats?format=json`, filtered by `observed(key)`. Failed are all that its server did
    not answer, or answered with 5xx, even if the fallback then answered, or answered at once because the server was
    ejected; but not those that Envoy refused because too many were waiting.
    """
    counters = {s["name"]: int(s["value"]) for s in document["stats"] if "name" in s}
    completed = refused = answered = computed = 0
    for name, value in counters.items():
        completed += value * name.endswith(".upstream_rq_completed")
        refused += value * name.endswith(".upstream_rq_pending_overflow")
        answered += value * name.endswith(".rq_success")
        computed += value * name.endswith(".upstream_rq_500")
    return completed, max(completed - answered - refused, 0), computed


def observed(key: str) -> str:
    """Return the filter for `/stats` that finds the counters of a release."""
    name = re.escape(key)
    counters = r"upstream_rq_completed|upstream_rq_500|upstream_rq_pending_overflow|endpoint\..*\.rq_success"
    own = rf"cluster\.{name}\.({counters})"
    return rf"^({own}|cluster\.{name}{re.escape(AND)}[^.]*\.upstream_rq_(completed|500))$"


def ejected(clusters: Json) -> set[str]:
    """Return keys of the releases whose server is not healthy, in the answer of `/clusters?format=json`."""
    keys = set()
    for cluster in clusters.get("cluster_statuses", []):
        for host in cluster.get("host_statuses", []):
            health = host.get("health_status", {})
            if health.get("failed_active_health_check") or health.get("failed_outlier_check"):
                keys.add(cluster["name"])
    return keys


def _name(model: str, key: str) -> str:
    return key.removeprefix(f"{model}--")


def _model(key: str) -> str | None:
    """Return the model of a release's key; None for a cluster of another name, as in the stand-in for KServe."""
    return key.rpartition("--")[0] or None


def _cluster(key: str, port: int) -> Json:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    server = {
        "endpoint": {"address": address},
        "metadata": {"filter_metadata": {METADATA: {"release": _name(_model(key) or "", key)}}},
    }
    return {
        "@type": TYPE + "envoy.config.cluster.v3.Cluster",
        "name": key,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": key, "endpoints": [{"lb_endpoints": [server]}]},
        "circuit_breakers": _limits(),
        "health_checks": [_health_check()],
        "outlier_detection": _outliers(),
        "track_cluster_stats": {"per_endpoint_stats": True},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "common_http_protocol_options": {"idle_timeout": UPSTREAM_IDLE},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
    }


def _aggregate(key: str, fallback: str) -> Json:
    aggregate = {
        "@type": TYPE + "envoy.extensions.clusters.aggregate.v3.ClusterConfig",
        "clusters": [key, fallback],
    }
    return {
        "@type": TYPE + "envoy.config.cluster.v3.Cluster",
        "name": f"{key}{AND}{_name(_model(fallback) or '', fallback)}",
        "connect_timeout": "1s",
        "lb_policy": "CLUSTER_PROVIDED",
        "circuit_breakers": _limits(),
        "cluster_type": {"name": "envoy.clusters.aggregate", "typed_config": aggregate},
    }


def _limits() -> Json:
    """Return circuit breakers. Envoy's own allow three retries at a time, so a dead server under load would fail
    most."""
    limits = {"max_pending_requests": MOST_WAITING, "max_requests": MOST_WAITING, "max_retries": MOST_WAITING}
    return {"thresholds": [{"priority": "DEFAULT", "max_connections": MOST_CONNECTIONS, **limits}]}


def _health_check() -> Json:
    return {
        "interval": HEALTH_INTERVAL,
        "no_traffic_interval": "1s",
        "timeout": HEALTH_TIMEOUT,
        "unhealthy_threshold": UNHEALTHY_AFTER,
        "healthy_threshold": HEALTHY_AFTER,
        "http_health_check": {"path": "/v2/health/ready"},
    }


def _outliers() -> Json:
    """Return outlier detection: a server that answers health checks but no request, or only with 5xx, is ejected
    briefly."""
    return {
        "consecutive_5xx": 5,
        "consecutive_gateway_failure": 5,
        "enforcing_consecutive_gateway_failure": 100,
        "enforcing_success_rate": 0,
        "interval": "1s",
        "base_ejection_time": "5s",
        "max_ejection_time": "30s",
        "max_ejection_percent": 100,
    }


def _route(model: str, routes: Routes, history: Sequence[str]) -> Json:
    action: Json = {
        "weighted_clusters": {
            "clusters": [_weighted(model, n, w, fallback(n, history)) for n, w in sorted(routes.weights.items()) if w]
        },
        "timeout": REQUEST_TIMEOUT,
        "retry_policy": _retries(),
        "hedge_policy": {"hedge_on_per_try_timeout": True},
    }
    if routes.mirror is not None:
        action["request_mirror_policies"] = [{"cluster": Release(model=model, name=routes.mirror).key}]
    return {
        "name": model,
        # A separated prefix, so that the route of `net` does not catch requests for `net-large`.
        "match": {"path_separated_prefix": f"/v2/models/{model}"},
        "route": action,
        "metadata": {"filter_metadata": {METADATA: {"history": list(history)}}},
    }


def _retries() -> Json:
    """Return retries: a request without an answer is sent to the fallback. Statuses are answers, and never retried."""
    priority = "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"
    return {
        "retry_on": "connect-failure,refused-stream,reset",
        "num_retries": 1,
        "per_try_timeout": FALL_BACK_AFTER,
        "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.1s"},
        "retry_priority": {
            "name": "envoy.retry_priorities.previous_priorities",
            "typed_config": {"@type": TYPE + priority, "update_frequency": 1},
        },
    }


def _weighted(model: str, name: str, weight: int, fallback: str | None) -> Json:
    key = Release(model=model, name=name).key
    # The release whose server was queried last: the fallback's, if that answered.
    header = {"key": RELEASE_HEADER, "value": f'%UPSTREAM_METADATA(["{METADATA}", "release"])%'}
    return {
        "name": key if fallback is None else f"{key}{AND}{fallback}",
        "weight": weight,
        "response_headers_to_add": [{"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
    }
