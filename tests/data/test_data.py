import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pool_tasks
import pytest
import torch
import yaml
from patience import PATIENCE, count_lines, wait
from PIL import Image

from ssl_bench import console
from ssl_bench.data import pictures, store, synthetic
from ssl_bench.data.formats import base
from ssl_bench.data.formats.cifar import CIFAR
from ssl_bench.data.formats.digits import Digits
from ssl_bench.data.formats.dl21 import DL21
from ssl_bench.data.formats.folder import Folder, Images
from ssl_bench.data.formats.stl10 import STL10
from ssl_bench.data.formats.synthetic import Shapes, Synthetic
from ssl_bench.data.pool import receive, run_chunks, send, started
from ssl_bench.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def dl21_master(tmp_path_factory):
    root = tmp_path_factory.mktemp("dl21") / "data"
    synthetic.write_dl21(root, 30, 12, 9, 3, seed=5, image_size=16, num_request=7, workers=1)
    return root


@pytest.fixture
def dl21(dl21_master, tmp_path):
    """A copy to damage; its files are links."""
    root = tmp_path / "dl21"
    subprocess.run(["cp", "-rl", str(dl21_master), str(root)], check=True)
    return root


def fails(message, function, *args):
    with pytest.raises(UserError, match=message) as caught:
        function(*args)
    assert "\n" not in str(caught.value)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def truncate(path):
    data = path.read_bytes()
    path.unlink()  # it may be a link to the file of another test
    path.write_bytes(data[: len(data) // 2])


# --- dl21 and the store


def test_dl21_round_trip_through_the_store(dl21, cache):
    data = DL21(str(dl21), 16, cache=str(cache), workers=2)
    assert data.num_classes == 3
    for name, length in (("pretrain", 30), ("train", 12), ("val", 9)):
        opened = data.open(name)
        expected = [synthetic.render(5, name, i, 16, 3) for i in range(length)]
        np.testing.assert_array_equal(opened.images, np.stack([image for image, _ in expected]))
        assert isinstance(opened.images, np.memmap)
        assert opened.indices.tolist() == list(range(length))
        assert opened.labels.tolist() == (
            [-1] * 30 if name == "pretrain" else [label for _, label in expected]
        )
        assert data.split(name).where(3) == str(
            dl21 / {"pretrain": "unlabeled"}.get(name, name) / "3.png"
        )


@pytest.mark.parametrize("extra", ["request_00.csv,label_00.pt", ["request_00.csv", "label_00.pt"]])
def test_dl21_extra_labels_are_appended_to_train(dl21, cache, extra):
    opened = DL21(str(dl21), 16, extra, cache=str(cache), workers=1).open("train")
    chosen = [int(line) for line in (dl21 / "request_00.csv").read_text().split()]
    assert len(set(chosen)) == 7
    assert opened.labels.tolist() == [i % 3 for i in range(12)] + [i % 3 for i in chosen]
    np.testing.assert_array_equal(
        opened.images[12:], [synthetic.render(5, "pretrain", i, 16, 3)[0] for i in chosen]
    )


def test_dl21_mistakes(dl21, tmp_path):
    data = lambda **options: DL21(str(dl21), 16, **options)  # noqa: E731
    fails(
        "no folder .*nowhere/unlabeled; data.root= sets",
        DL21(str(tmp_path / "nowhere")).split,
        "pretrain",
    )
    fails("no split 'test'; choose from pretrain, train, val", data().split, "test")
    fails("names 1 files", lambda: data(extra_labels="request_00.csv"))
    fails("no file .*r.csv", data(extra_labels="r.csv,label_00.pt").split, "train")

    (dl21 / "request_01.csv").write_text("3\n4\n")
    fails(
        "has 2 indices and label_00.pt has 7 labels",
        data(extra_labels="request_01.csv,label_00.pt").split,
        "train",
    )
    (dl21 / "request_01.csv").write_text("3\n4\n5\n6\n7\n8\n99\n")
    fails(
        "asks for .*99.png, which is not there",
        data(extra_labels="request_01.csv,label_00.pt").split,
        "train",
    )
    (dl21 / "request_01.csv").write_text("index\n4\n")
    fails("line 1 of .* is 'index'", data(extra_labels="request_01.csv,label_00.pt").split, "train")

    labels = dl21 / "train_label_tensor.pt"
    for wrong, message in (
        (torch.arange(11), "has 11 labels for 12 images"),
        (torch.rand(12), "holds a tensor of torch.float32 of shape"),
        (torch.zeros(12, 1, dtype=torch.int64), r"of shape \(12, 1\)"),
        ([1, 2], "holds a list"),
        (torch.arange(12) - 1, "has the label -1; labels count from 0"),
        (torch.zeros(12, dtype=torch.int64), "has label 2 and the train labels end at 0"),
    ):
        labels.unlink()
        torch.save(wrong, labels)
        fails(message, data().split, "val" if "has label 2" in message else "train")
    labels.write_bytes(b"nonsense")
    fails("is not a tensor file", data().split, "train")
    labels.unlink()
    fails("no label file", data().split, "train")
    assert data().num_classes is None
    assert data().split("pretrain").length == 30

    (dl21 / "unlabeled" / "17.png").unlink()
    fails("17.png is missing, though the folder goes up to 29.png", data().split, "pretrain")


def test_a_pickle_is_not_executed(dl21, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (dl21 / "val_label_tensor.pt").unlink()
    torch.save(Evil(), dl21 / "val_label_tensor.pt")
    fails("is not a tensor file", DL21(str(dl21), 16).split, "val")
    assert not (tmp_path / "executed").exists()


def test_the_store_is_reused_and_made_anew_when_a_file_changes(dl21, cache):
    first = DL21(str(dl21), 16, cache=str(cache), workers=1).open("train")
    written = (first.directory / "images.npy").stat().st_mtime_ns
    again = DL21(str(dl21), 16, cache=str(cache), workers=1).open("train")
    assert again.directory == first.directory
    assert (first.directory / "images.npy").stat().st_mtime_ns == written
    before = DL21(str(dl21), 16).split("train")
    (dl21 / "train" / "3.png").unlink()
    save(dl21 / "train" / "3.png", np.zeros((16, 16, 3), np.uint8))
    after = DL21(str(dl21), 16, cache=str(cache), workers=1)
    assert after.split("train").fingerprint != before.fingerprint
    assert after.open("train").images[3].max() == 0
    assert DL21(str(dl21), 32).split("train").store_name != after.split("train").store_name


def test_what_is_not_decoded_keeps_its_fingerprint(tmp_path, monkeypatch):
    """Those of before the decoding had a number of its own: runs that began then go on."""
    (tmp_path / "test_batch.bin").write_bytes(bytes(2 * 3073))
    (tmp_path / "test_X.bin").write_bytes(bytes(2 * 27648))
    (tmp_path / "test_y.bin").write_bytes(bytes([1, 2]))

    def fingerprints():
        made = (
            Digits(),
            Synthetic(4, 4, 4, 2, 0, image_size=16),
            CIFAR(str(tmp_path), 10),
            STL10(str(tmp_path)),
        )
        return [data.split("val").fingerprint for data in made]

    assert fingerprints() == [
        "0184493c7a90100214059e38e4574d43394defbe26f558f8e4d67a96944f4a24",
        "1307afe5bd686cd21b00ff9c9776a8e7186c2ff0ab813125b3cd6a97887d24eb",
        "301b786f02bd2d4d889a70ff8eac2dbc24172f52101275e2e4471298fb5fcc1a",
        "fcc44e16f1591bd671bd1cec8c181ac387ab6ac5e6e8ae13eeb857a12e154cf9",
    ]
    save(tmp_path / "images" / "0.png", np.zeros((16, 16, 3), np.uint8))
    decoded = Folder(str(tmp_path / "images")).split("pretrain")
    monkeypatch.setattr(base, "VERSION", base.VERSION + 1)
    again = Folder(str(tmp_path / "images")).split("pretrain")
    assert (decoded.fingerprint != again.fingerprint, decoded.store_name != again.store_name) == (
        True,
        True,
    )
    assert fingerprints()[0].startswith("0184493c")


def test_labels_are_in_the_fingerprint_and_not_in_the_store(dl21):
    before = DL21(str(dl21), 16).split("train")
    (dl21 / "train_label_tensor.pt").unlink()
    torch.save(torch.zeros(12, dtype=torch.int64), dl21 / "train_label_tensor.pt")
    after = DL21(str(dl21), 16).split("train")
    assert (before.store_name == after.store_name, before.fingerprint == after.fingerprint) == (
        True,
        False,
    )


def test_a_bad_image_is_named_or_skipped(dl21, cache, caplog):
    for i in (4, 28):
        truncate(dl21 / "unlabeled" / f"{i}.png")
    data = DL21(str(dl21), 16, cache=str(cache), workers=2)
    fails(r"cannot decode .*unlabeled/4.png \(.*28.png .*data.on_error=skip", data.open, "pretrain")
    assert {path.parent.suffix for path in cache.glob("*/*")} == {".partial"}  # to go on with

    skipping = DL21(str(dl21), 16, cache=str(cache), workers=2, on_error="skip").open("pretrain")
    remain = [i for i in range(30) if i not in (4, 28)]
    assert skipping.indices.tolist() == remain
    np.testing.assert_array_equal(
        skipping.images, [synthetic.render(5, "pretrain", i, 16, 3)[0] for i in remain]
    )
    assert "2 of 30 images are left out" in caplog.text
    assert "28.png" in caplog.text
    assert (
        skipping.directory / "images.npy"
    ).stat().st_size == skipping.images.offset + 28 * 16 * 16 * 3
    # a store with gaps doesn't satisfy on_error=raise
    fails(r"cannot decode .*4.png", data.open, "pretrain")


def test_labels_follow_their_images_when_some_are_skipped(dl21, cache):
    truncate(dl21 / "train" / "0.png")
    opened = DL21(str(dl21), 16, cache=str(cache), workers=1, on_error="skip").open("train")
    assert opened.labels.tolist() == [i % 3 for i in range(1, 12)]


def test_rows_move_across_blocks(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (1500, 2, 2, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    keep = np.flatnonzero(np.arange(1500) % 7 != 3)
    store._keep_rows(tmp_path / "images.npy", keep)
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), images[keep])


def test_a_missing_file_is_not_a_bad_image(dl21, cache):
    data = DL21(str(dl21), 16, cache=str(cache), workers=1, on_error="skip")
    data.split("train")
    (dl21 / "train" / "3.png").unlink()
    fails("cannot read an image .*3.png", data.open, "train")


def test_a_damaged_store_and_a_full_disk_are_told(dl21, cache, monkeypatch):
    data = DL21(str(dl21), 16, cache=str(cache), workers=1)
    directory = data.open("val").directory
    os.truncate(directory / "images.npy", 500)
    assert data.open("val").images.shape == (9, 16, 16, 3)  # packed again
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    fails(r"needs 0\.\d MB and .* has 0\.\d MB free; set data.cache=", data.open, "train")
    (cache.parent / "file").write_text("")
    fails(
        "data.cache= sets the folder",
        DL21(str(dl21), 16, cache=str(cache.parent / "file")).open,
        "train",
    )


@pytest.mark.parametrize(
    ("name", "where", "decay"),
    [(name, where, False) for name in store.FILES for where in (0.0, 0.5, 1.0)]
    + [("images.npy", 0.5, True)],
)
def test_a_flipped_bit_of_a_store_is_named_and_packed_again(cache, caplog, name, where, decay):
    data = Synthetic(600, 1, 1, 3, 0, image_size=16, cache=str(cache), workers=2)
    good = data.open("pretrain")
    images = np.array(good.images)
    path = good.directory / name
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 4
    written = path.stat().st_mtime_ns
    path.write_bytes(content)
    if decay:  # as of a disk, which tells nobody
        os.utime(path, ns=(written, written))
        data.open("pretrain")
        assert "damaged" not in caplog.text  # verified a moment ago
        os.utime(good.directory / "verified", (0, 0))
    again = data.open("pretrain")
    assert f"the packed images in {good.directory} are damaged: " in caplog.text
    if (name, where) == ("images.npy", 1.0):
        assert "rows 512 to 599 of images.npy differ from their digest" in caplog.text
    np.testing.assert_array_equal(again.images, images)
    assert store.damage(good.directory) == ""


def test_a_slow_verification_says_how_far_it_is(cache, caplog, monkeypatch):
    caplog.set_level("INFO")
    directory = Synthetic(600, 30, 30, 2, 0, 16, cache=str(cache)).open("pretrain").directory
    monkeypatch.setattr(console, "LOG_SECONDS", -1)
    assert store.damage(directory) == ""
    assert [
        record.message.split(": ")[1].split("  ")[0]
        for record in caplog.records
        if "verifying" in record.message
    ] == ["1/3 blocks", "2/3 blocks", "3/3 blocks"]


def test_a_damaged_store_whose_images_are_gone_is_told(dl21, cache):
    data = DL21(str(dl21), 16, cache=str(cache), workers=1)
    directory = data.open("val").directory
    os.truncate(directory / "images.npy", 500)
    for path in (dl21 / "val").iterdir():
        path.unlink()
    fails("cannot read an image .*; did the data change meanwhile", data.open, "val")


def test_a_damaged_store_that_is_there_to_be_read_only_is_told(dl21, cache):
    """One line. Whole, it is used, though nobody can note that it was verified."""
    directory = DL21(str(dl21), 16, cache=str(cache), workers=1).open("val").directory
    os.utime(directory / "verified", (0, 0))
    code = "import sys; from ssl_bench.data.formats.dl21 import DL21\n"
    code += "print(len(DL21(sys.argv[1], 16, cache=sys.argv[2], workers=1).open('val').images))"
    mount = f"mount --bind {cache} {cache} && mount -o remount,ro,bind {cache}"
    inside = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if os.geteuid() != 0 or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("can't mount here")
    command = [*inside, sys.executable, "-c", code, str(dl21), str(cache)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout == "9\n", found.stderr
    content = bytearray((directory / "images.npy").read_bytes())
    content[-1] ^= 1
    (directory / "images.npy").write_bytes(content)
    found = subprocess.run(command, capture_output=True, text=True)
    said = found.stderr.splitlines()[-1]
    assert (
        f"UserError: the packed images in {directory} are damaged (rows 0 to 8 of images.npy differ"
        in said
    )
    assert said.endswith("and that folder can't be written: have it deleted, or set data.cache=")


def test_digests_hold_where_images_were_left_out(dl21, cache):
    truncate(dl21 / "train" / "0.png")
    opened = DL21(str(dl21), 16, cache=str(cache), workers=1, on_error="skip").open("train")
    assert store.damage(opened.directory) == ""


PACK = """
import sys
from ssl_bench.data.formats.synthetic import Shapes, Synthetic
data = Synthetic(int(sys.argv[2]), 1, 1, 3, 0, image_size=16, cache=sys.argv[1], workers=2)
store = data.open("pretrain")
print(len(store.images), store.images.sum(dtype="int64"))
"""


def wait_for_path(folder, pattern):
    wait(lambda: list(folder.glob(pattern)))
    return folder.glob(pattern)


def packer(cache, count):
    command = [sys.executable, "-c", PACK, str(cache), str(count)]

    # a shell starts what it sends to the background deaf to SIGINT, which children inherit
    def listen():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, preexec_fn=listen)


def test_processes_that_pack_together_pack_once(cache):
    both = [packer(cache, 3000) for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE) for process in both]
    assert outputs[0][0] == outputs[1][0] != ""
    assert sorted(path.suffix for path in cache.iterdir() if path.suffix != ".lock") == [""]


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive), signal.SIGKILL]
)
def test_a_packer_that_was_ended_is_gone_on_with(cache, tmp_path, caplog, how):
    """What it has left whole isn't packed again: not a damaged chunk, nor a torn line."""
    process = packer(cache, 20_000)
    (partial,) = wait_for_path(cache, "*.partial")
    wait(lambda: count_lines(partial / store.JOURNAL) >= 4)
    process.send_signal(how)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == [partial]
    whole = count_lines(partial / store.JOURNAL)
    first = json.loads((partial / store.JOURNAL).read_text().splitlines()[0])["start"]
    with open(partial / store.JOURNAL, "a") as journal:
        journal.write('{"start": 5')
    np.load(partial / "images.npy", mmap_mode="r+")[first] ^= 1

    def opened(folder, count=20_000):
        data = Synthetic(count, 1, 1, 3, 0, image_size=16, cache=str(folder), workers=2)
        return data.open("pretrain")

    caplog.set_level("INFO", "ssl_bench")
    opened(cache, 5)  # another store: nobody's beginnings are removed so early
    assert partial.exists()
    again = opened(cache)
    assert f"{(whole - 1) * store.BLOCK:,} of them are there already" in caplog.text
    assert np.array_equal(again.images, opened(tmp_path / "undisturbed").images)
    assert not partial.exists()
    assert store.JOURNAL not in {path.name for path in again.directory.iterdir()}


def test_beginnings_that_nobody_went_on_with_are_removed(cache, monkeypatch):
    """After a week, or where their room is needed."""
    for name, age in (("old", 2 * store.LEFT), ("new", 0)):
        (cache / f"{name}.partial").mkdir(parents=True)
        (cache / f"{name}.partial" / store.JOURNAL).touch()
        then = time.time() - age
        os.utime(cache / f"{name}.partial" / store.JOURNAL, (then, then))

    def left():
        return {path.name for path in cache.glob("*.partial")}

    data = Synthetic(5, 1, 1, 3, 0, image_size=16, cache=str(cache), workers=1)
    data.open("pretrain")
    assert left() == {"new.partial"}
    monkeypatch.setattr(store, "free_bytes", lambda root: 0 if left() else 10**9)
    data.open("train")
    assert left() == set()


# --- the pool


def test_pool_yields_every_chunk_once():
    data = np.arange(2000)
    chunks = list(run_chunks(pool_tasks.Sum(data), 2000, workers=3))
    assert sorted(chunks) == [
        (a, min(a + 256, 2000), data[a : a + 256].sum()) for a in range(0, 2000, 256)
    ]


def test_pool_workers_stay_small(dl21):
    for data in (DL21(str(dl21), 16), Digits(16), Synthetic(300, 30, 30, 2, 0, 16)):
        task = pool_tasks.LoadedModules(data.split("pretrain").read)
        assert [result for *_, result in run_chunks(task, 30, workers=1)] == [[]]


def test_pool_tells_what_went_wrong():
    fails(
        "ended with status -9 .*data.workers=1",
        lambda: list(run_chunks(pool_tasks.die_late, 600, workers=1)),
    )
    with pytest.raises(RuntimeError, match=r"KeyError: 'wrong'"):
        list(run_chunks(pool_tasks.fail, 600, workers=1))


def test_a_worker_killed_while_it_sends_is_told():
    """A result is larger than what a pipe holds: most that are killed have sent a part of one."""
    with started(np.zeros, 1) as processes:
        ((connection, process),) = processes.items()
        send(connection, (10**6,))
        assert connection.poll(60)
        process.kill()
        fails("ended with status -9 .*data.workers=1", lambda: receive(connection, process))


def test_a_worker_whose_parent_is_gone_ends_without_a_word():
    ours, theirs = multiprocessing.Pipe()
    command = [sys.executable, "-m", "ssl_bench.data.pool", str(theirs.fileno()), "0"]
    ours.close()
    ended = subprocess.run(
        command, pass_fds=(theirs.fileno(),), capture_output=True, text=True, timeout=PATIENCE
    )
    theirs.close()
    assert (ended.returncode, ended.stderr) == (0, "")


def test_pool_ends_its_workers_when_closed():
    chunks = run_chunks(pool_tasks.Sum(np.zeros(100_000)), 100_000, workers=2)
    next(chunks)
    children = lambda: [p for p in Path("/proc").glob("[0-9]*/stat") if is_worker(p)]  # noqa: E731
    assert len(children()) == 2
    chunks.close()
    assert not children()


def is_worker(stat):
    with contextlib.suppress(OSError):
        parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        return (
            parent == os.getpid()
            and b"ssl_bench.data.pool" in stat.with_name("cmdline").read_bytes()
        )
    return False


# --- decoding


def decoded(tmp_path, image, name="x.png", size=8, **options):
    image.save(tmp_path / name, **options)
    return pictures.decode(str(tmp_path / name), size)


def test_decode_modes(tmp_path):
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = np.repeat(ramp[..., None], 3, axis=2)
    assert np.array_equal(decoded(tmp_path, Image.fromarray(ramp)), grey)
    assert np.array_equal(decoded(tmp_path, Image.fromarray(ramp.astype(np.uint16) * 257)), grey)
    assert np.array_equal(
        decoded(tmp_path, Image.fromarray(grey).convert("P", palette=Image.Palette.ADAPTIVE)), grey
    )
    float_image = decoded(tmp_path, Image.fromarray(ramp.astype(np.float32) / 1000), "x.tif")
    assert (float_image.min(), float_image.max()) == (0, 255)
    clear = np.dstack(
        [grey, np.where(np.arange(8) < 4, 0, 255).astype(np.uint8)[None].repeat(8, 0)]
    )
    on_white = decoded(tmp_path, Image.fromarray(clear))
    assert (on_white[:, :4] == 255).all()
    assert np.array_equal(on_white[:, 4:], grey[:, 4:])
    cmyk = decoded(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "x.jpg")
    assert cmyk[4, 4, 0] > 200 > 60 > cmyk[4, 4, 1]


def test_decode_is_upright(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.paste((255, 0, 0), (0, 0, 8, 4))  # red on top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = decoded(tmp_path, image, "x.jpg", exif=exif, quality=95)
    assert turned[:, 6, 0].min() > 150
    assert turned[:, 1, 0].max() < 100


@pytest.mark.parametrize(("width", "height"), [(400, 100), (100, 400), (40, 10), (401, 99)])
def test_decode_takes_the_centre_square(tmp_path, width, height):
    image = Image.new("RGB", (width, height))
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste((200, 200, 200), (left, top, left + side, top + side))
    for name in ("x.png", "x.jpg"):
        square = decoded(tmp_path, image, name, size=20)
        assert square.shape == (20, 20, 3)
        assert abs(square[2:-2, 2:-2].astype(int) - 200).max() <= 6


def test_decode_is_antialiased(tmp_path):
    checks = (np.indices((800, 800)).sum(0) % 2 * 255).astype(np.uint8)
    assert abs(decoded(tmp_path, Image.fromarray(checks)).astype(int) - 127).max() <= 3


# --- folder


def test_folder_labelled(tmp_path, cache):
    for i, name in enumerate(
        ["train/b/1.PNG", "train/b/deep/2.jpg", "train/a/1.png", "val/b/x.bmp", "val/a/y.webp"]
    ):
        save(tmp_path / "f" / name, np.full((10, 20, 3), 50 * i, np.uint8))
    (tmp_path / "f" / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "f" / "train" / "a" / "._1.png").write_text("no image")
    data = Folder(str(tmp_path / "f"), 8, cache=str(cache), workers=1)
    assert data.num_classes == 2
    assert data.class_names == ["a", "b"]
    train = data.open("train")
    assert train.labels.tolist() == [0, 1, 1]
    assert [int(image.mean().round(-1)) for image in train.images] == [100, 0, 50]
    assert data.split("train").where(2) == str(tmp_path / "f" / "train/b/deep/2.jpg")
    assert data.open("val").labels.tolist() == [0, 1]
    pretrain = data.open("pretrain")
    assert pretrain.labels.tolist() == [-1, -1, -1]
    assert pretrain.directory == train.directory  # the same pixels, packed once

    save(tmp_path / "f/val/c/1.png", np.zeros((8, 8, 3), np.uint8))
    fails("val/ has the class 'c', which train/ lacks", Folder(str(tmp_path / "f")).split, "val")
    save(tmp_path / "f/train/loose.png", np.zeros((8, 8, 3), np.uint8))
    fails("images outside the class folders", Folder(str(tmp_path / "f")).split, "train")
    (tmp_path / "f/train/loose.png").unlink()
    (tmp_path / "f/train/empty").mkdir()
    fails("no images in .*train/empty", Folder(str(tmp_path / "f")).split, "train")


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train/a", "val"),
        ("train", "val"),
        ("Train", "Val"),
        ("TRAIN/a", "valid"),
        ("images/train", "images/val"),
        ("train2017", "val2017"),
        ("train_images/a", "test-set/b"),
        ("cat/training", "dog/Test"),
        ("a/train", "b/c/validation/d"),
    ],
)
def test_folder_with_test_images_that_would_be_trained_on(tmp_path, train, held_out):
    for name in (f"{train}/1.png", f"{train}/2.png", f"{held_out}/3.png"):
        save(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    fails(
        "whose 1 images would be trained on: type data.root=.*, or sort both",
        Folder(str(tmp_path), 8).split,
        "pretrain",
    )
    assert Images(str(tmp_path), 8).split("pretrain").length == 3
    part = train.split("/")[
        : 1 + ("images" in train.split("/")[0] or train.startswith(("cat", "a/")))
    ]
    # as the message says
    assert Folder(str(tmp_path.joinpath(*part)), 8).split("pretrain").length == 2


def test_folder_names_that_are_no_splits(tmp_path, caplog):
    for name in ("bullet_train/1.png", "test_tube/2.png", "trainer/3.png", "validated by me/4.png"):
        save(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    assert Folder(str(tmp_path), 8).split("pretrain").length == 4
    assert not caplog.records
    save(tmp_path / "x/test/1.png", np.zeros((8, 8, 3), np.uint8))
    # no training folder beside it: said
    assert Folder(str(tmp_path), 8).split("pretrain").length == 5
    assert "1 images are in folders like x/test/ and are trained on, too" in caplog.text


def test_folder_labelled_in_upper_case_with_a_class_called_test(tmp_path):
    for name in ("Train/test/1.png", "Train/train/2.png", "VAL/test/3.png", "VAL/train/4.png"):
        save(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    data = Folder(str(tmp_path), 8)
    assert data.class_names == ["test", "train"]
    assert data.split("train").labels.tolist() == data.split("val").labels.tolist() == [0, 1]
    assert data.split("pretrain").length == 2


SERVICE = [
    "@eaDir",
    "__MACOSX",
    ".ipynb_checkpoints",
    "lost+found",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
]


def test_service_folders_are_no_classes_and_hold_no_images(tmp_path, caplog):
    caplog.set_level("INFO")
    for part in ("train", "val"):
        for name in ["a", "b", *SERVICE]:
            save(tmp_path / part / name / "1.png", np.zeros((8, 8, 3), np.uint8))
        for name in ("a/._1.png", "a/Thumbs.db", "a/@eaDir/1.png", ".DS_Store"):
            (tmp_path / part / name).parent.mkdir(exist_ok=True)
            (tmp_path / part / name).write_bytes(b"?")
    data = Folder(str(tmp_path), 8)
    assert data.class_names == ["a", "b"]
    assert data.split("train").labels.tolist() == [0, 1]
    (line,) = [
        record.getMessage() for record in caplog.records if "skipped in" in record.getMessage()
    ]
    assert "11 hidden or service files (" in line


def test_what_pillow_reads_is_read_and_the_rest_is_counted(tmp_path, caplog):
    from PIL import features

    caplog.set_level("INFO")
    names = ["x.PGM", "x.jfif", "x.jp2", "x.tga", *(["x.avif"] if features.check("avif") else [])]
    for name in names:
        Image.fromarray(np.zeros((8, 8), np.uint8)).convert("L" if "PGM" in name else "RGB").save(
            tmp_path / name
        )
    for name in ("a.heic", "b.heic", "notes.txt", "README", "data.h5", "film.mpg", "page.eps"):
        (tmp_path / name).write_bytes(b"?")
    os.mkfifo(tmp_path / "pipe.png")
    split = Folder(str(tmp_path), 8).split("pretrain")
    assert [Path(split.where(i)).name for i in range(split.length)] == sorted(names)
    assert split.read(0).shape == (8, 8, 3)
    for said in (
        f"skipped in {tmp_path}: 2 .heic files (a.heic, ...), 1 .eps file (page.eps), ",
        "1 .txt file (notes.txt)",
        "1 file without an extension (README)",
        "1 .h5 file (",
        "1 special file (pipe.png)",
    ):
        assert said in caplog.text


def test_folder_unlabelled(tmp_path, cache):
    root = tmp_path / "f"
    for name in ("train/a/1.png", "z.jpg", "deep/er/é.png"):
        save(root / name, np.zeros((8, 8, 3), np.uint8))
    (root / "deep" / "circle").symlink_to(root)
    data = Folder(str(root), 8, cache=str(cache), workers=1)
    assert data.num_classes is None
    split = data.split("pretrain")
    assert [split.where(i) for i in range(split.length)] == [
        str(root / n) for n in ("deep/er/é.png", "train/a/1.png", "z.jpg")
    ]
    assert data.open("pretrain").labels.tolist() == [-1] * 3
    fails("has no labels, so no split 'train', only 'pretrain'", data.split, "train")
    (root / "gone.png").symlink_to("nowhere")
    fails(
        "cannot decode .*gone.png .a link to nowhere",
        Folder(str(root), 8, cache=str(cache)).open,
        "pretrain",
    )
    assert len(Folder(str(root), 8, cache=str(cache), on_error="skip").open("pretrain").images) == 3
    (tmp_path / "empty").mkdir()
    fails(
        "no images under .*empty; data.root= sets .*known extensions",
        Folder(str(tmp_path / "empty")).split,
        "pretrain",
    )
    fails("no folder .*typo; data.root= sets", Folder(str(tmp_path / "typo")).split, "pretrain")


# --- binary formats


def test_stl10(tmp_path, cache):
    rng = np.random.default_rng(0)
    root = tmp_path / "stl10_binary"
    root.mkdir()
    images = {}
    for part, count in (("unlabeled", 4), ("train", 3), ("test", 2)):
        images[part] = rng.integers(0, 256, (count, 96, 96, 3), np.uint8)
        # image, channel, column, row
        images[part].transpose(0, 3, 2, 1).tofile(root / f"{part}_X.bin")
    np.array([1, 10, 2], np.uint8).tofile(root / "train_y.bin")
    np.array([1, 11], np.uint8).tofile(root / "test_y.bin")
    data = STL10(str(tmp_path), cache=str(cache), workers=1)
    np.testing.assert_array_equal(data.open("pretrain").images, images["unlabeled"])
    np.testing.assert_array_equal(data.open("train").images, images["train"])
    assert data.open("train").labels.tolist() == [0, 9, 1]
    fails("test_y.bin has labels outside its 10 classes", data.split, "val")
    np.array([1], np.uint8).tofile(root / "test_y.bin")
    fails("has 1 labels for 2 images", data.split, "val")
    os.truncate(root / "test_X.bin", 100)
    fails("has 100 bytes, not a multiple of 27648", data.split, "val")
    (root / "test_X.bin").unlink()
    fails("no test_X.bin in .*stl10_binary.tar.gz", data.split, "val")
    assert STL10(str(root)).split("pretrain").length == 4
    assert data.class_names == []
    (root / "class_names.txt").write_text("\n".join(NAMES) + "\n")
    assert data.class_names == STL10(str(root)).class_names == NAMES


NAMES = [f"class{number}" for number in range(10)]


@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar(tmp_path, cache, num_classes):
    rng = np.random.default_rng(0)
    folder, train, test, head = {
        10: (
            "cifar-10-batches-bin",
            [f"data_batch_{i}.bin" for i in range(1, 6)],
            "test_batch.bin",
            1,
        ),
        100: ("cifar-100-binary", ["train.bin"], "test.bin", 2),
    }[num_classes]
    (tmp_path / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[num_classes]).mkdir()
    data = CIFAR(str(tmp_path), num_classes, cache=str(cache), workers=1)
    fails(
        f"python version, a pickle.*unpack cifar-{num_classes}-binary.tar.gz", data.split, "train"
    )
    (tmp_path / folder).mkdir()
    rows = []
    for name in [*train, test]:
        rows.append(rng.integers(0, 256, (4, head + 3072), np.uint8))
        rows[-1][:, head - 1] %= num_classes
        rows[-1].tofile(tmp_path / folder / name)
    for name, expected in (("train", np.concatenate(rows[:-1])), ("val", rows[-1])):
        opened = data.open(name)
        assert opened.labels.tolist() == expected[:, head - 1].tolist()
        np.testing.assert_array_equal(
            opened.images, expected[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        )
    assert data.open("pretrain").labels.max() == -1
    assert data.open("pretrain").directory == data.open("train").directory
    assert data.split("train").where(3).endswith(f"image 3 of {tmp_path / folder / train[0]}")
    assert data.class_names == []
    file = {10: "batches.meta.txt", 100: "fine_label_names.txt"}[num_classes]
    names = NAMES * (num_classes // 10)
    (tmp_path / folder / file).write_text("\n".join(names) + "\n\n")
    assert data.class_names == names


# --- digits and synthetic


def test_digits(cache):
    from sklearn.datasets import load_digits

    data = Digits(32, cache=str(cache), workers=1)
    train, val = data.open("train"), data.open("val")
    assert (len(train.images), len(val.images)) == (1297, 500)
    # none is in both
    assert np.array_equal(np.concatenate([train.labels, val.labels]), load_digits().target)
    pixels = np.concatenate([data._list(name).read.images for name in ("train", "val")])
    assert np.array_equal(pixels, np.round(load_digits().images * (255 / 16)))
    assert train.images.shape[1:] == (32, 32, 3)
    assert np.bincount(val.labels).min() > 40
    small = Image.fromarray(train.images[7]).convert("L").resize((8, 8), Image.Resampling.BOX)
    assert np.corrcoef(np.asarray(small).ravel(), load_digits().images[7].ravel())[0, 1] > 0.97
    assert data.open("pretrain").labels.max() == -1


def test_synthetic_is_a_function_of_its_arguments(cache):
    image, label = synthetic.render(3, "train", 11, 48, 10)
    assert image.shape == (48, 48, 3)
    assert (image.dtype, label) == (np.uint8, 1)
    assert np.array_equal(synthetic.render(3, "train", 11, 48, 10)[0], image)
    for other in ((4, "train", 11), (3, "val", 11), (3, "train", 21)):
        assert np.abs(synthetic.render(*other, 48, 10)[0].astype(int) - image).mean() > 5
    data = Synthetic(20, 10, 5, 10, 3, image_size=48, cache=str(cache), workers=1)
    assert np.array_equal(data.open("train").images[7], synthetic.render(3, "train", 7, 48, 10)[0])
    assert data.open("val").labels.tolist() == [0, 1, 2, 3, 4]
    assert data.class_names[:3] == ["circle", "square", "triangle"]
    assert Synthetic(20, 10, 5, 10, 4, 48).split("val").store_name != data.split("val").store_name


def test_plain_shapes_are_light_on_dark(cache):
    data = Shapes(20, 1300, 500, 10, 0, 32, cache=str(cache), workers=1)
    images, labels = data.open("train").images, data.open("train").labels
    assert np.bincount(labels).tolist() == 10 * [130]
    for index in (0, 11, 1299):
        image, label = synthetic.render(0, "train", index, 32, 10, plain=True)
        assert np.array_equal(images[index], image)
        assert labels[index] == label
    grey = images.astype(int).mean(-1)
    light = (grey > 128).mean((1, 2))
    assert light.min() > 0.02
    assert light.max() < 0.6
    assert (np.minimum(abs(grey - 25), abs(grey - 230)) < 30).mean() > 0.8  # two colours, and edges
    with_textures = Synthetic(20, 1300, 500, 10, 0, 32)
    assert data.split("val").store_name != with_textures.split("val").store_name


def test_shapes_fill_their_radius_and_differ():
    x, y = synthetic._grid(64)
    masks = {name: shape(1.3 * x, 1.3 * y) < 0 for name, shape in synthetic.SHAPES.items()}
    for name, mask in masks.items():
        assert 0.1 < mask.mean() < 0.5, name
        assert not np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).any(), name
    names = list(masks)
    for i, first in enumerate(names):
        for second in names[:i]:
            overlap = (masks[first] & masks[second]).sum() / (masks[first] | masks[second]).sum()
            assert overlap < 0.96, (first, second)


@pytest.mark.slow
def test_raw_pixels_hardly_tell_the_shape():
    from sklearn.linear_model import LogisticRegression

    def pixels(split, count):
        images, labels = zip(
            *(synthetic.render(0, split, i, 32, 10) for i in range(count)), strict=True
        )
        return np.stack(images).reshape(count, -1) / 255 - 0.5, np.array(labels)

    classifier = LogisticRegression(C=1e-3, max_iter=300).fit(*pixels("train", 4000))
    assert classifier.score(*pixels("val", 1000)) < 0.25


def test_write_dl21_refuses_a_used_folder(dl21_master, tmp_path):
    assert sorted(path.name for path in dl21_master.iterdir()) == sorted(
        [
            "unlabeled",
            "train",
            "val",
            "train_label_tensor.pt",
            "val_label_tensor.pt",
            "request_00.csv",
            "label_00.pt",
        ]
    )
    fails("is not empty; name a new folder", synthetic.write_dl21, dl21_master, 1, 1, 1, 2)
    fails(
        "num_classes=99 is not possible; choose 1 to 20",
        synthetic.write_dl21,
        tmp_path / "x",
        1,
        1,
        1,
        99,
    )


# --- everything


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_binds_to_its_signature(path):
    import inspect

    node = yaml.safe_load(path.read_text())
    assert node.pop("name") == path.stem
    if path.stem == "own":
        return  # tests/data/test_own.py: its constructor is the user's
    module, name = node.pop("_target_").rsplit(".", 1)
    target = getattr(importlib.import_module(module), name)
    inspect.signature(target).bind(**node, on_error="raise", cache=None, workers=None)
    for key, parameter in inspect.signature(target).parameters.items():
        assert key in node or key in ("on_error", "cache", "workers"), (
            f"{key} is not in {path.name}"
        )
        if key in node and parameter.default is not parameter.empty:
            assert node[key] == parameter.default


def test_readers_are_picklable(dl21):
    for data in (DL21(str(dl21), 16), Digits(), Synthetic(3, 3, 3, 2, 0, 16)):
        read = data.split("train").read
        assert np.array_equal(pickle.loads(pickle.dumps(read))(2), read(2))


def test_importing_costs_no_more_than_torch():
    code = (
        "import sys, torch, pydantic; import ssl_bench.data.formats.folder, ssl_bench.data.source;"
        "lazy = ('torchvision', 'sklearn', 'PIL', 'matplotlib', 'wandb', 'scipy');"
        "print([m for m in lazy if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
