"""Where a step's runs are recorded."""

import pytest

from slipstream.errors import InputError
from slipstream.tracking import connected


def test_an_address_of_no_server_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:hidden@127.0.0.1/mlflow")
    with pytest.raises(InputError, match=r"^MLFLOW_TRACKING_URI: .*such as http://127.0.0.1:5000, not to postgresql:…"):
        connected()
    with pytest.raises(InputError) as raised:
        connected()
    assert "hidden" not in str(raised.value)
