"""Checkpoints: a crash while writing loses nothing, and what can't be trusted isn't used."""

import io
import logging
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_bench.errors import UserError
from ssl_bench.runs.checkpoint import Checkpoint, complete, read

Trained = tuple[nn.Module, torch.optim.Optimizer]


def trained(steps: int) -> Trained:
    """A model and its optimizer after so many steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(16, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save(directory: Path, *steps: int, identity: str = "this run") -> Checkpoint:
    checkpoint = Checkpoint(directory, identity)
    for step in steps:
        model, optimizer = trained(step)
        checkpoint.save(step, model=model, optimizer=optimizer)
    return checkpoint


def restored(checkpoint: Checkpoint) -> int:
    """The step restored; asserts that the state is that step's, bit for bit."""
    model, optimizer = trained(0)
    step = checkpoint.restore(model=model, optimizer=optimizer)
    same_model, same_optimizer = trained(step)
    ours, theirs = model.state_dict(), same_model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    momenta = [
        [slot["momentum_buffer"] for slot in o.state_dict()["state"].values()]
        for o in (optimizer, same_optimizer)
    ]
    assert all(torch.equal(*pair) for pair in zip(*momenta, strict=True))
    return step


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1, 2, 10)
    assert [path.name for path in complete(tmp_path)] == ["step0000000010.pt", "step0000000002.pt"]
    assert restored(checkpoint) == 10


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half of a file stays, to fill the disk further; torch's words don't say what it is."""
    checkpoint = Checkpoint(tmp_path, "run")
    checkpoint.save(1)

    def save(content: object, file: io.BufferedWriter) -> None:
        file.write(b"some of it")
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 1087360 vs 1087256"
        )

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"No space left on device.*step0000000002"):
        checkpoint.save(2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step0000000001.pt"]


def test_nothing_saved_is_step_zero(tmp_path: Path) -> None:
    assert restored(Checkpoint(tmp_path, "this run")) == 0


def crash_in_save(content: object, file) -> None:
    file.write(b"half of it")
    raise KeyboardInterrupt


def crash_in_replace(self: Path, target: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name", "crash"),
    [(torch, "save", crash_in_save), (Path, "replace", crash_in_replace)],
)
def test_a_crash_while_writing_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, crash: object
) -> None:
    checkpoint = save(tmp_path, 1, 2)
    monkeypatch.setattr(owner, name, crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 3)
    monkeypatch.undo()
    # what a killed process leaves
    assert (tmp_path / "checkpoints" / "step0000000003.partial").exists()
    assert restored(checkpoint) == 2
    save(tmp_path, 3)
    assert restored(checkpoint) == 3
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "step0000000002.pt",
        "step0000000003.pt",
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, bytes]:
    """Of steps 1 and 2; and what the file of the second holds."""
    checkpoint = save(tmp_path_factory.mktemp("two"), 1, 2)
    return checkpoint, complete(checkpoint.directory)[0].read_bytes()


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_one_is_named_and_the_one_before_used(
    two: tuple[Checkpoint, bytes], caplog: pytest.LogCaptureFixture, share: float
) -> None:
    checkpoint, whole = two
    newest = complete(checkpoint.directory)[0]
    newest.write_bytes(whole[: int(share * len(whole))])
    caplog.clear()
    assert restored(checkpoint) == 1
    (warning,) = warnings_of(caplog)
    assert str(newest) in warning
    assert "the one before" in warning
    assert "\n" not in warning


def equal(one: object, other: object) -> bool:
    """The same tensors and values under the same names."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and list(one) == list(other)
            and all(equal(one[k], other[k]) for k in one)
        )
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        )
    return one == other


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), directory=st.booleans())
def test_a_flipped_bit_is_found_or_harmless(
    two: tuple[Checkpoint, bytes], place: float, bit: int, directory: bool
) -> None:
    """Wherever it is: in a tensor, a record's name or length, the directory at the file's end."""
    checkpoint, whole = two
    newest = complete(checkpoint.directory)[0]
    newest.write_bytes(whole)
    expected = read(newest)
    flipped = bytearray(whole)
    start = whole.index(b"PK\x01\x02") if directory else 0
    flipped[start + int(place * (len(whole) - start))] ^= 1 << bit
    newest.write_bytes(flipped)
    said = ""
    try:
        assert equal(read(newest), expected)
    except UserError as error:
        said = str(error)
    assert not said or (str(newest) in said and "\n" not in said)


def test_no_record_is_taken_for_a_folder(two: tuple[Checkpoint, bytes]) -> None:
    """In a zip file's directory a bit says so; torch then reads nothing, and leaves the memory as
    it was.
    """
    checkpoint, whole = two
    newest = complete(checkpoint.directory)[0]
    for header in [match.start() for match in re.finditer(rb"PK\x01\x02", whole)]:
        flipped = bytearray(whole)
        flipped[header + 38] ^= 0x10
        newest.write_bytes(flipped)
        with pytest.raises(UserError, match="damaged"):
            read(newest)


def test_a_damaged_one_is_named_and_the_one_before_used(
    two: tuple[Checkpoint, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, whole = two
    newest = complete(checkpoint.directory)[0]
    flipped = bytearray(whole)
    flipped[whole.index(b"/data/1") + 100] ^= 4
    newest.write_bytes(flipped)
    caplog.clear()
    assert restored(checkpoint) == 1
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"{newest}: damaged or truncated: data/")
    assert warning.endswith("; trying the one before")


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    """torch can be told to leave them out, and old files have none."""
    state = {"weight": torch.rand(3)}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "quick.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert equal(read(tmp_path / "old.pth"), state)
    assert equal(read(tmp_path / "quick.pth"), state)


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def raw_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [raw_pickle, torch.save])
def test_code_in_a_pickle_is_not_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, write: object
) -> None:
    checkpoint = save(tmp_path, 1)
    newest = tmp_path / "checkpoints" / "step0000000002.pt"
    write(
        {"run": "this run", "step": 2, "model": Payload(tmp_path / "executed"), "optimizer": {}},
        newest,
    )
    assert restored(checkpoint) == 1
    assert not (tmp_path / "executed").exists()
    assert str(newest) in warnings_of(caplog)[0]
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()  # so it would have been seen


def test_the_checkpoint_of_another_run_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = save(tmp_path, 1)
    save(tmp_path, 2, identity="another run")
    assert restored(checkpoint) == 1
    assert "another run" in warnings_of(caplog)[0]


def test_a_renamed_checkpoint_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = save(tmp_path, 1, 2)
    complete(tmp_path)[0].rename(tmp_path / "checkpoints" / "step0000000009.pt")
    assert restored(checkpoint) == 1
    assert "holds step 2" in warnings_of(caplog)[0]


def test_none_usable_is_an_error(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1, 2)
    first, second = complete(tmp_path)
    first.write_text("not a checkpoint")
    torch.save([1, 2], second)
    with pytest.raises(
        UserError, match="none of its 2 checkpoints can be used; delete this folder"
    ) as caught:
        restored(checkpoint)
    assert str(tmp_path / "checkpoints") in str(caught.value)
    assert "\n" not in str(caught.value)
