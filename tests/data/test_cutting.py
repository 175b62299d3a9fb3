"""Views of pictures of any size: what is cut, and that it is what torchvision cuts."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import jpeg, photographs, write
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ssl_bench.augment.draws import keys
from ssl_bench.augment.views import EvalView, Views
from ssl_bench.augment.windows import Window
from ssl_bench.data import cutting
from ssl_bench.data.cutting import CutSource, Scale, cut, decode, eighths_for
from ssl_bench.data.encoded import ENTRY
from ssl_bench.data.formats.folder import Folder
from ssl_bench.data.pictures import AS_STORED
from ssl_bench.errors import UserError

NAMES = sorted(photographs())


def entry_of(data: bytes, turn: int = 1) -> np.void:
    """As the index has it."""
    width, height = Image.open(io.BytesIO(data)).size
    if turn >= 5:
        width, height = height, width
    entry = np.zeros(1, ENTRY)
    entry[0] = (0, len(data), 0, height, width, turn, True)
    return entry[0]


def torchvisions(image: Image.Image | torch.Tensor, window: Window, size: int, mode: str):
    kind = InterpolationMode(mode)
    box = (window.top, window.left, window.height, window.width)
    view = tv.resized_crop(image, *box, [size, size], kind, antialias=True)
    return tv.horizontal_flip(view) if window.mirrored else view


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", NAMES)
def test_crops_are_torchvisions(name: str, mode: str) -> None:
    """Of the decoded file: equal to its crops of tensors, and of pictures within a level or so."""
    data = jpeg(photographs()[name])
    image = Image.open(io.BytesIO(data)).convert("RGB")
    entry = entry_of(data)
    pixels = decode(data, entry, AS_STORED, 8)
    assert np.array_equal(pixels, np.array(image))
    views = Views(96, num_views=4, crop_scale=(0.08, 1.0), interpolation=mode, num_small_views=2)
    sizes = torch.tensor([[image.height, image.width]])
    for windows in views.windows(sizes, 0, 0, torch.tensor([7])):
        (window,) = windows.each()
        view = cut(pixels, window, windows.size, mode)
        expected = torchvisions(pixels_of(image), window, windows.size, mode)
        assert torch.equal(view, expected)
        expected = pixels_of(torchvisions(image, window, windows.size, mode))
        assert (view.int() - expected.int()).abs().float().mean() < 0.1  # of 255 levels
        assert (view.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("resize", [1.0, 256 / 224])
@pytest.mark.parametrize("name", NAMES)
def test_test_views_are_torchvisions(name: str, resize: float) -> None:
    """Resize and CenterCrop of pictures of PIL's, at their own shape."""
    for image in (photographs()[name], photographs()[name].transpose(Image.Transpose.ROTATE_90)):
        view = EvalView(96, resize)
        sizes = torch.tensor([[image.height, image.width]])
        (windows,) = view.windows(sizes, 0, 0, torch.zeros(1).long())
        (window,) = windows.each()
        pixels = np.array(image)
        ours = cut(pixels, window, windows.size, "bilinear")
        theirs = tv.center_crop(tv.resize(image, [round(96 * resize)]), [96, 96])
        difference = (ours.int() - pixels_of(theirs).int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.01


@settings(max_examples=50)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(8, 64), st.floats(1, 2))
def test_a_test_view_of_any_shape(height: int, width: int, size: int, resize: float) -> None:
    """As torchvision's corner, its rounding of the longer side, and at least all pixels there."""
    view = EvalView(size, resize)
    (windows,) = view.windows(torch.tensor([[height, width]]), 0, 0, torch.zeros(1).long())
    (window,) = windows.each()
    image = Image.new("RGB", (width, height))
    theirs = tv.resize(image, [round(size * resize)])
    assert window.resized == (theirs.height, theirs.width)
    pixels = np.array(image)
    assert cut(pixels, window, size, "bilinear").shape == (3, size, size)


def test_windows_are_the_crops_of_the_views() -> None:
    """Cutting first, and the views of packed squares, draw alike: crops, colours, blur."""
    size, views = 96, Views(32, num_small_views=2, small_size=16)
    shrunk = [photographs()[name].resize((size, size)) for name in NAMES]
    images = torch.stack([pixels_of(image) for image in shrunk])
    indices = torch.arange(len(images)) + 5
    sizes = torch.full((len(images), 2), size)
    batches = []
    for windows in views.windows(sizes, 3, 1, indices):
        kept = [
            cut(image.permute(1, 2, 0).numpy(), window, windows.size, "bilinear")
            for image, window in zip(images, windows.each(), strict=True)
        ]
        batches.append(torch.stack(kept))
    image_keys = keys(3, 1, indices)
    for one, other in zip(views(images, image_keys), views(batches, image_keys), strict=True):
        # crops are rounded to whole levels, which the contrast may stretch
        assert (one - other).abs().mean() < 0.015


def test_decoding_at_a_part_of_the_size() -> None:
    """Only where each view has twice the pixels that it needs; the pixels are nearly the same."""

    def window(height: int, width: int, size: int) -> Window:
        return Window(0, 0, height, width, (size, size), (0, 0), False)

    assert eighths_for([window(447, 900, 224)]) == 8
    assert eighths_for([window(896, 900, 224)]) == 4
    assert eighths_for([window(1792, 1792, 224)]) == 2
    assert eighths_for([window(4000, 4000, 224)]) == 1
    assert eighths_for([window(4000, 4000, 224), window(300, 300, 96)]) == 8


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("size", [(640, 424), (449, 451), (509, 385)], ids=str)
def test_the_pixels_of_a_part(size: tuple[int, int], turn: int) -> None:
    """Nearly those of the whole, also where the decoder rounds sides up and pictures are turned."""
    data = jpeg(photographs()["china"].resize(size))
    entry = entry_of(data, turn)
    looks = [Views(32, num_views=20, crop_scale=(0.3, 1.0)), EvalView(32), EvalView(64, 1.0)]
    sizes = torch.tensor([[int(entry["height"]), int(entry["width"])]])
    whole = decode(data, entry, AS_STORED, 8)
    for look in looks:
        differences = []
        for windows in look.windows(sizes, 0, 0, torch.tensor([0])):
            (one,) = windows.each()
            eighths = eighths_for([one])
            assert eighths in (2, 4)
            small = decode(data, entry, AS_STORED, eighths)
            assert small.shape[0] < whole.shape[0]
            scale = Scale.of(small, entry, eighths)
            part = cut(small, one, windows.size, "bilinear", scale)
            all_of_it = cut(whole, one, windows.size, "bilinear")
            differences.append((part.int() - all_of_it.int()).abs().float().mean())
        assert torch.stack(differences).mean() < 1.4  # of 255 levels


@pytest.mark.parametrize("turn", range(1, 9))
def test_turned_pictures(turn: int, tmp_path: Path) -> None:
    """As PIL turns them; at a part of the size, too."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = turn
    data = jpeg(photographs()["china"], exif=exif)
    (tmp_path / "a.jpg").write_bytes(data)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    store = Folder(str(tmp_path), cache=str(tmp_path / "cache")).open_encoded("pretrain", True)
    (entry,) = store.entries
    assert (entry["height"], entry["width"]) == upright.shape[:2]
    assert np.array_equal(decode(store.read(0), entry, AS_STORED, 8), upright)
    half = decode(store.read(0), entry, AS_STORED, 4)
    assert half.shape[:2] == tuple(-(-side // 2) for side in upright.shape[:2])
    again = np.array(Image.fromarray(upright).resize(half.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(half.astype(int) - again).mean() < 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    write(root / "images", count=5)
    return root


def source(root: Path, look, workers: int = 2, packed: bool = True, **options) -> CutSource:
    data = Folder(str(root / "images"), cache=str(root / "cache"), workers=2)
    store = data.open_encoded("pretrain", packed)
    options = {"batch_size": 10, "seed": 1} | options
    return CutSource(store, look, *options.values(), workers=workers)


def test_the_same_pixels_whoever_cuts_them(folder: Path) -> None:
    """On any number of threads and processes, from files or packed, begun anywhere."""
    look = Views(48, num_small_views=1, small_size=24)
    whole = list(source(folder, look).stream(0, 7))
    assert [[view.shape for view in views] for _, views, _, _ in whole] == [
        [(10, 3, 48, 48), (10, 3, 48, 48), (10, 3, 24, 24)]
    ] * 7
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in whole[0][1])
    others = [
        list(source(folder, look, workers=5).stream(0, 7)),
        list(source(folder, look, packed=False).stream(0, 7)),
        [*source(folder, look).stream(0, 4), *source(folder, look).stream(4, 7)],
    ]
    ranks = []
    for rank in range(2):
        mine = source(folder, look)
        mine.rank, mine.world_size = rank, 2
        ranks.append(list(mine.stream(0, 7)))
    for step, views, _, indices in whole:
        for other in others:
            assert torch.equal(indices, other[step][3])
            assert all(map(torch.equal, views, other[step][1]))
        assert torch.equal(indices, torch.cat([one[step][3] for one in ranks]))
        for number, view in enumerate(views):
            assert torch.equal(view, torch.cat([one[step][1][number] for one in ranks]))
    epochs = [next(source(folder, look).epoch_pass(epoch))[1:] for epoch in (0, 1)]
    assert torch.equal(epochs[0][1], epochs[1][1])  # the same images, other crops
    first, second = (next(source(folder, look).epoch_pass(epoch))[0][0] for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_another_look_at_the_same_images(folder: Path) -> None:
    mine = source(folder, Views(48))
    (views,), _, indices = next(mine.shown_as(EvalView(32)).epoch_pass())
    assert views.shape == (10, 3, 32, 32)
    assert torch.equal(indices, torch.arange(10))
    assert len(next(mine.epoch_pass())[0]) == 2


def test_a_file_that_changes_after_it_was_indexed(folder: Path, tmp_path: Path) -> None:
    root = tmp_path
    (first, *_) = write(root / "images")
    mine = source(root, EvalView(32), packed=False, batch_size=2)
    first.write_bytes(jpeg(photographs()["coffee"], quality=50))
    with pytest.raises(UserError, match=f"{first.name} has changed since it was indexed"):
        list(mine.epoch_pass())
    first.unlink()
    with pytest.raises(UserError, match=r"cannot read an image .*did the data change meanwhile"):
        list(mine.epoch_pass())


def test_nothing_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs: signals are heard, and there is an end."""
    from threading import Event

    gone, heard = Event(), []
    mine = source(folder, EvalView(32))
    monkeypatch.setattr(cutting, "PATIENCE", 1.5)
    monkeypatch.setattr(mine.store, "read", lambda row: gone.wait(20) and b"")
    mine.waiting = heard.append
    try:
        monkeypatch.setattr(cutting, "lone_threads", Released(gone))
        with pytest.raises(UserError, match=r"no batch was decoded for \d s, one with .*images"):
            next(mine.epoch_pass())
    finally:
        gone.set()
    assert heard


class Released:
    """Threads that are let go when the source ends."""

    def __init__(self, gone) -> None:
        self.gone = gone

    def __call__(self, count: int, name: str):
        from ssl_bench.runtime.threads import lone_threads

        pool = lone_threads(count, name)
        shutdown = pool.shutdown

        def end(**options) -> None:
            self.gone.set()
            shutdown(**options)

        pool.shutdown = end
        return pool
