"""Pictures of any size behind an index: what is packed, what is refused, what a kill leaves."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from photographs import jpeg, photographs, write
from PIL import Image

from ssl_bench.data import encoded, store
from ssl_bench.data.cutting import decode
from ssl_bench.data.encoded import Encoded
from ssl_bench.data.formats.folder import Folder
from ssl_bench.data.pictures import AS_STORED, Values
from ssl_bench.errors import UserError


def data_of(root: Path, **options) -> Folder:
    return Folder(str(root / "images"), cache=str(root / "cache"), workers=1, **options)


def packed(root: Path, **options) -> Encoded:
    return data_of(root, **options).open_encoded("pretrain", packed=True)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_the_files_own_bytes(tmp_path: Path) -> None:
    """Packed once; where they lie, without a copy; both are read alike."""
    paths = sorted(write(tmp_path / "images", count=2))
    store, index = packed(tmp_path), data_of(tmp_path).open_encoded("pretrain", packed=False)
    assert store.is_packed
    assert not index.is_packed
    assert sorted(path.name for path in index.directory.iterdir()) == [
        "entries.npy",
        "indices.npy",
        "meta.json",
    ]
    assert len(store) == len(index) == len(paths)
    for row, path in enumerate(paths):
        data = path.read_bytes()
        assert bytes(store.read(row)) == data == index.read(row)
        width, height = Image.open(path).size
        assert store.sizes[row].tolist() == index.sizes[row].tolist() == [height, width]
    assert store.nbytes == sum(path.stat().st_size for path in paths)
    stamps = {path: path.stat().st_mtime_ns for path in store.directory.iterdir()}
    again = packed(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in again.directory.iterdir()} == stamps


def odd_files(folder: Path) -> dict[str, str | None]:
    """Files of every kind that a collection holds; {name: why it can't be decoded, or None}."""
    folder.mkdir()
    china, rng = photographs()["china"], np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = jpeg(china)
    deep = rng.integers(0, 65536, (40, 30), dtype=np.uint16)
    files = {
        "cmyk.jpg": (jpeg(china.convert("CMYK")), None),
        "progressive.jpg": (jpeg(china, progressive=True), None),
        "grey.jpg": (jpeg(china.convert("L")), None),
        "turned.jpg": (jpeg(china, exif=exif), None),
        "deep.png": (png(deep), None),
        "transparent.png": (png(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)), None),
        "line.png": (png(rng.integers(0, 256, (1, 300, 3), dtype=np.uint8)), None),
        "wide.png": (png(rng.integers(0, 256, (20, 20_000, 3), dtype=np.uint8)), None),
        "really_a_png.jpg": (png(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)), None),
        "more_behind.jpg": (whole + b"abc" * 100, None),
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "truncated.png": (png(np.array(china))[:3000], "truncated|broken"),
        "empty.jpg": (b"", "no image of a known"),
        "text.jpg": (b"<html>404</html>", "no image of a known"),
        "header.jpg": (whole[:300], "(?i)truncated|broken"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "nowhere.jpg").symlink_to(folder / "gone.jpg")
    return {name: why for name, (_, why) in files.items()} | {"nowhere.jpg": "a link to nowhere"}


def test_odd_files_are_read_or_named(tmp_path: Path) -> None:
    known = odd_files(tmp_path / "images")
    with pytest.raises(UserError, match=r"cannot decode .*data\.on_error=skip") as raised:
        packed(tmp_path)
    assert "\n" not in str(raised.value)
    store = packed(tmp_path, on_error="skip")
    names = sorted(known)
    skipped = {names[index]: why for index, why in store.skipped.items()}
    assert skipped.keys() == {name for name, why in known.items() if why}
    for name, why in skipped.items():
        assert re.search(known[name], why), (name, why)
    assert [names[index] for index in store.indices] == [name for name in names if not known[name]]
    for row, index in enumerate(store.indices):
        pixels = decode(store.read(row), store.entries[row], AS_STORED, 8)
        assert pixels.shape[:2] == tuple(store.sizes[row])
        by_pil = data_of(tmp_path).split("pretrain").read(int(index))
        assert np.array_equal(pixels, by_pil), names[index]
    with pytest.raises(UserError, match=r"cannot decode .*data\.on_error=skip"):
        packed(tmp_path)  # what another command has skipped isn't passed over


def test_values_of_more_bits(tmp_path: Path) -> None:
    """data.bit_depth= holds for them as for packed squares."""
    (tmp_path / "images").mkdir()
    deep = np.linspace(0, 4095, 1200).astype(np.uint16).reshape(40, 30)
    (tmp_path / "images/deep.png").write_bytes(png(deep))
    store = packed(tmp_path, bit_depth=12)
    pixels = decode(store.read(0), store.entries[0], Values(bit_depth=12), 8)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert packed(tmp_path).directory != store.directory


def test_larger_pictures_are_written_smaller(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "images")
    whole = packed(tmp_path)
    with caplog.at_level("INFO"):
        store = packed(tmp_path, max_side=500)
    assert "a side of more than 500 pixels are made smaller, as JPEGs of quality 90" in caplog.text
    for row, (height, width) in enumerate(whole.sizes.tolist()):
        data = store.read(row)
        if max(height, width) <= 500:
            assert bytes(data) == bytes(whole.read(row))
            continue
        assert store.sizes[row].max() == 500
        assert abs(store.sizes[row].min() - 500 * min(height, width) / max(height, width)) <= 0.5
        pixels = decode(data, store.entries[row], AS_STORED, 8)
        size = (pixels.shape[1], pixels.shape[0])
        original = Image.fromarray(decode(whole.read(row), whole.entries[row], AS_STORED, 8))
        difference = np.array(original.resize(size, Image.Resampling.BICUBIC)) - pixels.astype(int)
        assert np.abs(difference).mean() < 5
    with pytest.raises(UserError, match=r"data\.image_size=96 makes squares"):
        data_of(tmp_path, max_side=500, image_size=96)


def test_damage_is_told_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "images")
    store = packed(tmp_path)
    row = next(row for row in range(len(store)) if "chelsea" in store.split.where(row))
    with open(store.directory / "images.bin", "r+b") as file:
        file.seek(int(store.entries["offset"][row]) + 100)
        file.write(b"\0\1\2")
    store = packed(tmp_path)
    store.read(row + 1)
    with pytest.raises(UserError, match=r"damaged \(.*chelsea.* differs from its digest\): delete"):
        store.read(row)


@pytest.mark.parametrize("name", ["entries.npy", "indices.npy", "meta.json", "images.bin"])
@pytest.mark.parametrize("how", ["changed", "empty", "gone"])
def test_a_damaged_index_is_never_used(tmp_path: Path, name: str, how: str) -> None:
    """Else a picture would have another's label, or another's window."""
    write(tmp_path / "images")
    path = packed(tmp_path).directory / name
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        data[-9] ^= 1
        path.write_bytes(data)
    if (name, how) == ("images.bin", "changed"):  # told when that image is read
        return
    with pytest.raises(UserError, match=r"is damaged \(.*\); delete that folder"):
        packed(tmp_path)


SLOW = """
import sys, time
from ssl_bench.data.formats.folder import Folder
from ssl_bench.data import encoded, store
add = encoded._Unfinished.add
def slowly(self, *args):
    add(self, *args)
    print("one", flush=True)
    time.sleep(0.3)
encoded._Unfinished.add = slowly
data = Folder(sys.argv[1] + "/images", cache=sys.argv[1] + "/cache", workers=1)
data.open_encoded("pretrain", packed=True)
"""


def test_a_killed_packing_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From what it had written; half a chunk and a torn line are written again."""
    write(tmp_path / "images", count=110)  # three chunks
    words = [sys.executable, "-c", SLOW, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "one\n"
        assert process.stdout.readline() == "one\n"
        process.send_signal(signal.SIGKILL)
    (unfinished,) = (tmp_path / "cache").glob("*.unfinished")
    with open(unfinished / "images.bin", "ab") as file:
        file.write(b"half a chunk")
    with open(unfinished / "chunks.jsonl", "a") as file:
        file.write('{"rows": [1, 2')
    with caplog.at_level("INFO"):
        store = packed(tmp_path)
    assert "512 of them are there already" in caplog.text
    assert not list((tmp_path / "cache").glob("*.unfinished"))
    assert store.directory.joinpath("images.bin").stat().st_size == store.nbytes
    for row in range(len(store)):
        assert bytes(store.read(row)) == store.split.file(row)
    assert not (store.directory / "chunks.jsonl").exists()


def test_what_a_crash_has_spoilt_is_packed_again(tmp_path: Path) -> None:
    """The bytes of a chunk aren't those that its line says: the disk had not written them."""
    write(tmp_path / "images", count=110)
    words = [sys.executable, "-c", SLOW, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    (unfinished,) = (tmp_path / "cache").glob("*.unfinished")
    lines = (unfinished / "chunks.jsonl").read_text().splitlines()
    with open(unfinished / "images.bin", "r+b") as file:
        file.seek(json.loads(lines[0])["end"] + 1000)
        file.write(b"\0" * 1000)
    store = packed(tmp_path)
    for row in range(len(store)):
        assert bytes(store.read(row)) == store.split.file(row)


AT_THE_END = """
import os, signal, sys
from ssl_bench.data.formats.folder import Folder
from ssl_bench.data import encoded
encoded._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
data = Folder(sys.argv[1] + "/images", cache=sys.argv[1] + "/cache", workers=1, on_error="skip")
data.open_encoded("pretrain", packed=True)
"""


def test_killed_at_the_very_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While all is written to the disk, which takes minutes of a large set: nothing is lost."""
    write(tmp_path / "images")
    (tmp_path / "images/bad.jpg").write_bytes(b"no picture")
    words = [sys.executable, "-c", AT_THE_END, str(tmp_path)]
    assert subprocess.run(words, capture_output=True).returncode == -signal.SIGKILL
    with caplog.at_level("INFO"):
        store = packed(tmp_path, on_error="skip")
    assert "8 of them are there already" in caplog.text
    assert len(store) == 7
    assert sorted(path.name for path in store.directory.iterdir()) == [
        "entries.npy",
        "images.bin",
        "indices.npy",
        "meta.json",
    ]
    for row, index in enumerate(store.indices):
        assert bytes(store.read(row)) == store.split.file(int(index))


def test_old_leftovers_are_removed(tmp_path: Path) -> None:
    write(tmp_path / "images")
    cache = tmp_path / "cache"
    for name, age in (("old", encoded.STALE + 60), ("new", 60)):
        (cache / f"{name}.unfinished").mkdir(parents=True)
        os.utime(cache / f"{name}.unfinished", (time.time() - age,) * 2)
    packed(tmp_path)
    assert [path.name for path in cache.glob("*.unfinished")] == ["new.unfinished"]


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "images")
    for module in (encoded, store):
        monkeypatch.setattr(module, "free_bytes", lambda root: 1000)
    assert not data_of(tmp_path).has_room("pretrain")
    # of those that are made smaller nobody knows the sizes
    assert data_of(tmp_path, max_side=100).has_room("pretrain")
    with pytest.raises(UserError, match=r"needs 0\.\d MB and .*data\.cache=.*source=streamed"):
        packed(tmp_path)
    split = data_of(tmp_path).split("pretrain")
    unfinished = encoded._unfinished(encoded.place(split, True, tmp_path / "cache"))
    unfinished.mkdir(parents=True)
    (unfinished / "images.bin").write_bytes(b"x" * (split.nbytes - 500))  # what a kill has left
    assert data_of(tmp_path).has_room("pretrain")
