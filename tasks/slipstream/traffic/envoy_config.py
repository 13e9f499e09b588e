"""Envoy's configuration as plain values: the bootstrap, the clusters (CDS), the routes (RDS), and back again.

Everything dynamic is read from two files through `path_config_source` with `watched_directory`: Envoy reloads
when a file is renamed into the folder, so a file is written aside and renamed, and never seen half written.
Field names follow https://www.envoyproxy.io/docs/envoy/latest/api-v3/api.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slipstream.serving import client
from slipstream.traffic.base import Release, Routes

RELEASE_HEADER = client.RELEASE
ROUTE_CONFIG = "slipstream"
TYPE = "type.googleapis.com/"
REQUEST_TIMEOUT = "10s"
UPSTREAM_IDLE = "2s"
"""Shorter than the servers' keep-alive of 5 s: a connection that the server is about to close is never reused."""

Json = dict[str, Any]


def bootstrap(folder: Path, port: int, admin_port: int) -> Json:
    """Static part: admin interface, one listener, and where the dynamic part is read from."""
    return {
        "node": {"id": "slipstream", "cluster": "slipstream"},
        "admin": {"address": _address(admin_port)},
        "dynamic_resources": {"cds_config": _from_file(folder, "clusters.json")},
        "static_resources": {"listeners": [_listener(folder, port)]},
    }


def clusters_document(ports: Mapping[str, int]) -> Json:
    """CDS: one cluster for each release key, at its server's port."""
    return {"resources": [_cluster(key, ports[key]) for key in sorted(ports)]}


def routes_document(routes: Mapping[str, Routes]) -> Json:
    """RDS: one virtual host with a route for each model that has traffic."""
    host = {
        "name": "models",
        "domains": ["*"],
        "routes": [_route(model, routes[model]) for model in sorted(routes) if routes[model].weights],
    }
    resource = {
        "@type": TYPE + "envoy.config.route.v3.RouteConfiguration",
        "name": ROUTE_CONFIG,
        "virtual_hosts": [host],
    }
    return {"resources": [resource]}


def parse_routes(route_config: Json) -> dict[str, Routes]:
    """The traffic of each model in a RouteConfiguration, whether from our file or from Envoy's admin interface."""
    found = {}
    for host in route_config.get("virtual_hosts", []):
        for entry in host.get("routes", []):
            model = entry["match"]["path_separated_prefix"].removeprefix("/v2/models/")
            action = entry["route"]
            weights = {_name(model, c["name"]): int(c["weight"]) for c in action["weighted_clusters"]["clusters"]}
            mirrors = [_name(model, m["cluster"]) for m in action.get("request_mirror_policies", [])]
            found[model] = Routes(weights=weights, mirror=mirrors[0] if mirrors else None)
    return found


def loaded_routes(config_dump: Json) -> dict[str, Routes]:
    """The routes in the answer of `/config_dump?resource=dynamic_route_configs`."""
    found: dict[str, Routes] = {}
    for entry in config_dump.get("configs", []):
        config = entry.get("route_config", {})
        if config.get("name") == ROUTE_CONFIG:
            found |= parse_routes(config)
    return found


def loaded_clusters(config_dump: Json) -> dict[str, int]:
    """Release key → port, in the answer of `/config_dump?resource=dynamic_active_clusters`."""
    found = {}
    for entry in config_dump.get("configs", []):
        cluster = entry.get("cluster", {})
        for group in cluster.get("load_assignment", {}).get("endpoints", []):
            for endpoint in group.get("lb_endpoints", []):
                address = endpoint["endpoint"]["address"]["socket_address"]
                found[cluster["name"]] = int(address["port_value"])
    return found


def counters(stats: Iterable[Json], key: str) -> dict[str, int]:
    """Counters of a cluster, by their name below `cluster.KEY.`, from `/stats?format=json`."""
    prefix = f"cluster.{key}."
    return {s["name"].removeprefix(prefix): int(s["value"]) for s in stats if s.get("name", "").startswith(prefix)}


def _name(model: str, key: str) -> str:
    return key.removeprefix(f"{model}--")


def _address(port: int) -> Json:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _from_file(folder: Path, name: str) -> Json:
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": str(folder / name), "watched_directory": {"path": str(folder)}},
    }


def _listener(folder: Path, port: int) -> Json:
    manager = {
        "@type": TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "rds": {"route_config_name": ROUTE_CONFIG, "config_source": _from_file(folder, "routes.json")},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": TYPE + "envoy.extensions.filters.http.router.v3.Router"},
            }
        ],
        # The client's x-request-id must arrive unchanged at both servers, or answers could not be paired.
        "generate_request_id": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "request_id_extension": {
            "typed_config": {
                "@type": TYPE + "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig",
                "pack_trace_reason": False,
            }
        },
    }
    return {
        "name": "models",
        "address": _address(port),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _cluster(key: str, port: int) -> Json:
    return {
        "@type": TYPE + "envoy.config.cluster.v3.Cluster",
        "name": key,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": key,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}}]}],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "common_http_protocol_options": {"idle_timeout": UPSTREAM_IDLE},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
    }


def _route(model: str, routes: Routes) -> Json:
    """No retry policy: a retried error would hide from the guardrails."""
    action: Json = {
        "weighted_clusters": {
            "clusters": [_weighted(Release(model=model, name=n), w) for n, w in sorted(routes.weights.items()) if w]
        },
        "timeout": REQUEST_TIMEOUT,
    }
    if routes.mirror is not None:
        action["request_mirror_policies"] = [{"cluster": Release(model=model, name=routes.mirror).key}]
    # A separated prefix, so that the route of `net` does not catch requests for `net-large`.
    return {"name": model, "match": {"path_separated_prefix": f"/v2/models/{model}"}, "route": action}


def _weighted(release: Release, weight: int) -> Json:
    header = {"header": {"key": RELEASE_HEADER, "value": release.name}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
    return {"name": release.key, "weight": weight, "response_headers_to_add": [header]}
