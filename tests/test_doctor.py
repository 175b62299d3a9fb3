"""`ssl-bench doctor` tells, and never fails."""

import sys

import pytest
from conftest import Command

from ssl_bench import doctor


def test_the_command_and_the_stage_say_the_same(ssl_bench: Command) -> None:
    said = [ssl_bench(word, check=True).stdout.splitlines() for word in ("doctor", "stage=doctor")]
    heads = [[line[:18].strip() for line in lines] for lines in said]
    assert heads[0] == heads[1]
    assert {*doctor.LOOKS, "ssl-bench", "extra timm"} <= {*heads[0]}
    assert "cpu: " in "".join(said[0])


def test_what_fails_is_a_line(monkeypatch: pytest.MonkeyPatch, ssl_bench: Command) -> None:
    def broken() -> None:
        raise OSError("libcudart.so: cannot open\nmore")

    monkeypatch.setitem(doctor.LOOKS, "torch", broken)
    said = ssl_bench("doctor", check=True).stdout
    assert "torch             fails: OSError: libcudart.so: cannot open\n" in said


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    said = dict(doctor.examine())
    assert said["torch"].startswith("fails: ModuleNotFoundError")
    assert said["Slurm"]


def test_an_extra_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    find = doctor.metadata.version

    def version(name: str) -> str:
        if name == "timm":
            return "1.0.2"
        if name == "onnx":
            raise doctor.metadata.PackageNotFoundError
        return find(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    said = dict(doctor.examine())
    assert said["extra timm"] == "missing: pip install 'timm>=1.0.12'"
    assert said["extra onnx"].startswith("missing: pip install 'onnx'")
