"""Sizes and digests of folders."""

import gzip
from pathlib import Path

from slipstream import digests


def test_the_compressed_size_is_gzips_own_over_all_files(tmp_path: Path) -> None:
    zeros, text = bytes(3 * 2**20), b"weights"
    (tmp_path / "below").mkdir()
    (tmp_path / "zeros.bin").write_bytes(zeros)
    (tmp_path / "below/text").write_bytes(text)
    assert digests.folder_size(tmp_path) == len(zeros) + len(text)
    assert digests.folder_gzip_size(tmp_path) == len(gzip.compress(zeros, 6)) + len(gzip.compress(text, 6))
