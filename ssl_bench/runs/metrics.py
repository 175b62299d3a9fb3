"""`metrics.jsonl`, the truth about a run's metrics."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.runs import layout


class MetricsFile:
    """Append-only JSON lines, `{"step": int, name: float, ...}`.

    Each is one write(), so that a kill tears the last line at most. NaN and infinities are written
    as Python's json does (`NaN`, `Infinity`) and read back as the same floats.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._open()
        # without a torn last line, to which the next one would be glued
        self._file.truncate(_complete(self.path.read_bytes()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert "step" not in metrics
        row: dict[str, float] = {"step": step}
        row |= {name: x if isinstance(x, int) else float(x) for name, x in metrics.items()}
        self._file.write(json.dumps(row).encode() + b"\n")  # unbuffered

    def truncate(self, step: int) -> None:
        """Keep the lines up to and with `step`, for a restart from its checkpoint; atomically."""
        kept = [row for row in self.read(self.path) if row["step"] <= step]
        files.write(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file.close()
        self._open()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - held for the run

    @staticmethod
    def read(path: str | Path, skip: int = 0) -> list[dict[str, Any]]:
        """All complete lines but the first `skip`: a last one without its newline is ignored.

        UserError names any other broken line.
        """
        files.check(Path(path))
        data = Path(path).read_bytes()
        rows = []
        lines = data[: _complete(data)].splitlines()[skip:]
        for number, line in enumerate(lines, start=skip + 1):
            try:
                row = json.loads(line)
                assert isinstance(row["step"], int)
                assert all(isinstance(value, int | float) for value in row.values())
                assert 0 < row.get("epoch", 1) < math.inf
            except (ValueError, TypeError, KeyError, AssertionError):
                raise UserError(
                    f"{path}, line {number} is not a JSON object of numbers with a step, and an "
                    f"epoch above 0: {line[:60]!r}; delete it"
                ) from None
            rows.append(row)
        return rows


def summary(run: Path) -> dict[str, float] | None:
    """The result of the run in a directory; None: it is not finished. UserError: it is damaged."""
    path = run / layout.SUMMARY
    if not path.is_file():
        return None
    found = files.parse(path, json.loads)
    if not all(isinstance(value, int | float) for value in found.values()):
        raise files.damaged(path)
    return found


def per_epoch(run: Path) -> float | None:
    """The steps of an epoch of the run in a directory, as it has logged; None: it has not."""
    path = run / layout.METRICS
    lines = MetricsFile.read(path) if path.is_file() else []
    found = (line["step"] / line["epoch"] for line in reversed(lines) if line.get("epoch"))
    return next(found, None)


def _complete(data: bytes) -> int:
    """Length of the complete lines of `data`, in bytes."""
    return data.rfind(b"\n") + 1
