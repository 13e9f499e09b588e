"""Device strings that join several devices; a machine with two is made up, since the strings are only read."""

import pytest

from slipstream.engines.openvino_devices import absent, candidates, composed

HERE = ["CPU", "GPU.0", "GPU.1"]


@pytest.mark.parametrize(
    ("device", "used", "missing"),
    [
        ("CPU", ["CPU"], []),
        ("GPU", ["GPU"], []),
        ("GPU.2", ["GPU.2"], ["GPU.2"]),
        ("AUTO", HERE, []),
        ("AUTO:GPU,CPU", ["GPU", "CPU"], []),
        ("AUTO:-GPU", ["CPU"], []),
        ("AUTO:-GPU.1", ["CPU", "GPU.0"], []),
        ("AUTO:-CPU,-GPU", [], []),
        ("HETERO:GPU.1, CPU", ["GPU.1", "CPU"], []),
        ("HETERO:NPU,GPU.4,CPU", ["NPU", "GPU.4", "CPU"], ["NPU", "GPU.4"]),
        ("MULTI:CPU,GPU", ["CPU", "GPU"], []),
        ("MULTI:-GPU", ["-GPU"], ["-GPU"]),
        ("AUTO:", [""], [""]),
        ("BATCH:CPU", ["BATCH:CPU"], ["BATCH:CPU"]),
    ],
)
def test_what_a_string_names(device, used, missing):
    assert candidates(device, HERE) == used
    assert absent(device, HERE) == missing


def test_which_are_composed():
    assert [composed(d) for d in ("CPU", "AUTO", "MULTI:CPU", "AUTOMATIC")] == [None, "AUTO", "MULTI", None]
