"""The embedded MLflow server, behind MLflow's own log-in (its app `basic-auth`).

Every process on this machine can reach the port, and anyone who may write to MLflow can delete results and move aliases
(docs/security.md). The platform logs in as the administrator that MLflow creates at its first start.
"""

from slipstream.home import Home, write_atomically
from slipstream.platform import object_store, postgresql
from slipstream.platform.addresses import Addresses, Secrets, port_of
from slipstream.platform.programs import Program

NAME = "mlflow"
USERS = "mlflow_users"
"""Database of the users: a file in the home, or a PostgreSQL database."""
LOGIN_CACHED_S = 3600
"""How long a correct password is not hashed again. Without this each request hashes it: 1,000 ms instead of 6 (quickest
of 18, on two busy cores; 4.3 without a log-in). MLflow drops an entry when the password changes."""


def program(home: Home, addresses: Addresses, secrets: Secrets, environment: dict[str, str]) -> Program:
    """Return the server under supervisord; its passwords are in its environment, which only this user can read."""
    folder = home.root / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    backend, artifacts = f"sqlite:///{folder}/mlflow.db", str(folder / "artifacts")
    if addresses.postgresql is not None:
        backend = postgresql.uri(addresses.postgresql, postgresql.MLFLOW)
        environment = environment | postgresql.environment(home)
    if addresses.s3 is not None:
        artifacts = f"s3://{object_store.BUCKET}/mlflow"
    command = (
        *(str(home.envs / "airflow" / "bin" / "mlflow"), "server", "--app-name", "basic-auth"),
        *("--host", "127.0.0.1", "--port", str(port_of(addresses.mlflow)), "--workers", "1"),
        *("--backend-store-uri", backend, "--artifacts-destination", artifacts),
    )
    return Program(NAME, command, environment | _login(home, addresses, secrets) | _settings(secrets))


def _settings(secrets: Secrets) -> dict[str, str]:
    return {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 420 MB instead of 1.2 GB
        # Webhooks go to a receiver on this machine, without TLS; their secrets must survive a restart.
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": secrets.mlflow_webhook_key,
    }


def _login(home: Home, addresses: Addresses, secrets: Secrets) -> dict[str, str]:
    """Write the log-in's configuration, and return its variables.

    Users that the administrator adds can only read until they are granted more.
    """
    users = f"sqlite:///{home.root / 'mlflow' / 'users.db'}"
    if addresses.postgresql is not None:
        users = postgresql.uri(addresses.postgresql, USERS)
    path = home.root / "mlflow" / "login.ini"
    text = (
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = {users.replace('%', '%%')}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        f"auth_cache_ttl_seconds = {LOGIN_CACHED_S}\n"
    )
    write_atomically(path, text, mode=0o600)
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(path),
        "MLFLOW_AUTH_ADMIN_USERNAME": secrets.mlflow_user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": secrets.mlflow_password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.mlflow_session_key,
    }
