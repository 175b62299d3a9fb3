"""The peak of this process's memory, wherever it is asked for."""

from pathlib import Path

import pytest
import torch

from ssl_bench.runtime import memory


@pytest.mark.parametrize("status", ["Name:\tpython\nVmRSS:\t100 kB\n", None])
def test_peak_without_linux_to_tell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str | None
) -> None:
    known = memory.peak(torch.device("cpu"))
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    if status:
        memory.STATUS.write_text(status)
    assert memory.peak(torch.device("cpu")) == pytest.approx(known, rel=0.5)
