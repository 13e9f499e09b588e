"""What the processor's instruction sets mean for the answers of INT8 engines."""

import platform

import pytest

from slipstream import hardware


@pytest.mark.parametrize(
    ("machine", "features", "sums"),
    [
        ("x86_64", "avx2", "saturating"),
        ("x86_64", "avx2 avx512f", "saturating"),
        ("x86_64", "avx2 avx_vnni", "exact"),
        ("x86_64", "avx2 avx512f avx512_vnni amx_int8", "exact"),
        ("aarch64", "asimd", "exact"),
    ],
)
def test_sums_of_int8_products_are_exact_with_vnni(
    monkeypatch: pytest.MonkeyPatch, machine: str, features: str, sums: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(hardware, "describe", lambda: {"cpu_features": features})
    assert hardware.int8_sums() == sums
