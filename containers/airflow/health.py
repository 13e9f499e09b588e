"""Health of the container: Airflow's API server must reach its database, all else must be able to write its logs.

Standard library only, and nothing of it that is slow to import: it runs every 30 s.
"""

import http.client
import json
import os
import sys
from pathlib import Path


def main() -> int:
    """0 when healthy."""
    if b"api-server" not in Path("/proc/1/cmdline").read_bytes():
        return 0 if os.access(f"{os.environ['AIRFLOW_HOME']}/logs", os.W_OK) else 1
    port = int(os.environ.get("AIRFLOW__API__PORT", "8080"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/api/v2/monitor/health")
        health = json.loads(connection.getresponse().read())
        return 0 if health["metadatabase"]["status"] == "healthy" else 1
    except (OSError, ValueError, KeyError) as error:
        print(f"port {port}: {error!r}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
