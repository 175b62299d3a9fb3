"""Files that are whole or not there, in UTF-8."""

import os
import subprocess
import sys
from pathlib import Path

WRITE = """
import json, sys
from pathlib import Path
from ssl_bench import files
from ssl_bench.config import signatures
path = Path(sys.argv[1])
files.write(path, '{"mean": "90 \\u00b1 1", "of": "\\u2026"}')
assert files.parse(path, json.loads)["of"] == "\\u2026"
assert list(signatures.parameters("mine.make", ())) == ["size"]
"""


def test_in_a_locale_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "# \u03b1\ndef make(size: int = 1):\n    return size\n", encoding="utf-8"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", WRITE, str(tmp_path / "results.json")]
    subprocess.run(command, env=os.environ | ascii_only | {"PYTHONPATH": path}, check=True)
    assert "90 \u00b1 1" in (tmp_path / "results.json").read_text(encoding="utf-8")
