"""Envoy's client side: one listener with the limits of an edge proxy.

They follow https://www.envoyproxy.io/docs/envoy/latest/configuration/best_practices/edge. The differences: a connection
has no maximum age (`max_connection_duration`), since HTTP/1.1 cannot end one without losing the request in transit; and
bodies are buffered completely, so that a body that is sent slowly does not occupy a server.
"""

from pathlib import Path

from slipstream.contract import Json
from slipstream.serving.client import MOST_BYTES

TYPE = "type.googleapis.com/"
ROUTE_CONFIG = "slipstream"
HEADERS_WITHIN, REQUEST_WITHIN = "5s", "15s"
"""For the headers, and for the whole request with its body."""
IDLE = "60s"
"""Time after which a connection without a request, or a stream without a byte, is closed."""
MOST_CONNECTIONS = 8000
"""From clients. Each takes a file descriptor; `program` (envoy.py) raises the limit for them."""
CONNECTION_BUFFER = 32 * 2**10
HEAP_BYTES = 2**30
"""Near this much memory Envoy resets the streams that hold most of it, then accepts no new ones."""


def from_file(folder: Path, name: str) -> Json:
    """Return a source of configuration: a file that is replaced by renaming."""
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": str(folder / name), "watched_directory": {"path": str(folder)}},
    }


def listener(folder: Path, port: int) -> Json:
    """Return the listener on 127.0.0.1, whose routes are in `folder`."""
    manager = {
        "@type": TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "rds": {"route_config_name": ROUTE_CONFIG, "config_source": from_file(folder, "routes.json")},
        "http_filters": [
            _filter("buffer", "buffer.v3.Buffer", max_request_bytes=MOST_BYTES),
            _filter("router", "router.v3.Router"),
        ],
        **_limits(),
        **_request_ids(),
    }
    return {
        "name": "models",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "per_connection_buffer_limit_bytes": CONNECTION_BUFFER,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def overload_manager() -> Json:
    """Return Envoy's overload limits, so that clients cannot use up its memory or its file descriptors."""
    connections = "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"
    heap = "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig"
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            {
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": {"@type": TYPE + connections, "max_active_downstream_connections": MOST_CONNECTIONS},
            },
            {
                "name": "envoy.resource_monitors.fixed_heap",
                "typed_config": {"@type": TYPE + heap, "max_heap_size_bytes": HEAP_BYTES},
            },
        ],
        # Streams below 1 MiB (2^20) are not tracked, and so never reset.
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": 20},
        "actions": [
            _heap_action("reset_high_memory_stream", scaled={"scaling_threshold": 0.7, "saturation_threshold": 0.9}),
            _heap_action("shrink_heap", threshold={"value": 0.9}),
            _heap_action("stop_accepting_requests", threshold={"value": 0.95}),
        ],
    }


def _heap_action(name: str, **trigger: Json) -> Json:
    monitor = "envoy.resource_monitors.fixed_heap"
    return {"name": f"envoy.overload_actions.{name}", "triggers": [{"name": monitor, **trigger}]}


def _filter(name: str, kind: str, **settings: object) -> Json:
    return {
        "name": f"envoy.filters.http.{name}",
        "typed_config": {"@type": f"{TYPE}envoy.extensions.filters.http.{kind}", **settings},
    }


def _limits() -> Json:
    return {
        "request_headers_timeout": HEADERS_WITHIN,
        "request_timeout": REQUEST_WITHIN,
        "stream_idle_timeout": IDLE,
        "common_http_protocol_options": {"idle_timeout": IDLE, "headers_with_underscores_action": "REJECT_REQUEST"},
        "http2_protocol_options": {
            "max_concurrent_streams": 100,
            "initial_stream_window_size": 64 * 2**10,
            "initial_connection_window_size": 2**20,
        },
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        # No client's address counts as internal (as loopback would), so `x-envoy-…` headers of clients, such as
        # timeouts and retries, are dropped.
        "use_remote_address": True,
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "255.255.255.255", "prefix_len": 32}]},
    }


def _request_ids() -> Json:
    """Keep request ids: the client's x-request-id must arrive unchanged at both servers to pair their answers."""
    return {
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
