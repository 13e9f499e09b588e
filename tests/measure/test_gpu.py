"""What is told of GPUs where there may be none."""

from pathlib import Path

from slipstream import hardware
from slipstream.measure import gpu
from slipstream.measure.gpu import Usage


def test_nothing_is_seen_without_a_gpu() -> None:
    with gpu.watch(None) as usage:
        pass
    assert usage.metrics() == {}


def test_memory_counts_beyond_what_was_in_use_before() -> None:
    usage = Usage(before_mib=300.0, memory_mib=[310.0, 900.0, 450.0], utilization=[0.0, 80.0, 40.0])
    assert usage.metrics() == {"gpu_memory_mib": 600.0, "gpu_utilization": 40.0}
    assert Usage(before_mib=300.0, memory_mib=[200.0]).metrics() == {"gpu_memory_mib": 0.0}


def test_the_hardware_names_gpus_and_their_driver(tmp_path: Path) -> None:
    for number, model in enumerate(("NVIDIA L4", "NVIDIA H100 PCIe")):
        card = tmp_path / "gpus" / f"0000:0{number}:00.0"
        card.mkdir(parents=True)
        (card / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 42\nVideo BIOS: \t 95.04\n")
    assert hardware._gpus(tmp_path) == "NVIDIA L4, NVIDIA H100 PCIe"
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Mon Sep\nGCC version: 12\n"
    )
    assert hardware._gpus(tmp_path) == "NVIDIA L4, NVIDIA H100 PCIe (driver 580.95.05)"
    assert hardware._gpus(tmp_path / "none") == ""
