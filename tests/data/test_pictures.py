"""What is shown of an image file, and what is said of it. tests/data/cases/: a ramp from black to
white
that failed once.
"""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_bench.data.formats.dl21 import DL21
from ssl_bench.data.formats.folder import Folder
from ssl_bench.data.pictures import AS_STORED, Values, decode
from ssl_bench.errors import UserError

CASES = Path(__file__).parent / "cases"
RAMP = np.round(np.arange(24) * 255 / 23).astype(int)  # the right values of each case


def shown(path, values=AS_STORED, size=24):
    kinds = []
    image = decode(str(path), size, values, kinds)
    return image.astype(int), {kind for kind in kinds if kind not in ("all", "wide")}


def png16(path, pixels, colour=0):
    """A PNG of 16 bits. pixels (H, W) or, for colour=2, (H, W, 3)."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


def tiff(path, pixels, more=()):
    """more: {tag: integer or ASCII bytes}, like 262 (photometric interpretation)."""
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    height, width = pixels.shape
    tags = {
        256: width,
        257: height,
        258: 8 * pixels.itemsize,
        259: 1,
        262: 1,
        273: 0,
        277: 1,
        278: height,
    }
    tags |= {279: pixels.nbytes, 339: kind} | dict(more)
    after = 8 + 2 + 12 * len(tags) + 4
    out, extra = b"II*\0" + struct.pack("<IH", 8, len(tags)), b""
    tags[273] = after  # the pixels; texts follow
    for tag, value in sorted(tags.items()):
        if isinstance(value, bytes):
            out += struct.pack("<HHII", tag, 2, len(value), after + pixels.nbytes + len(extra))
            extra += value
        else:
            out += struct.pack("<HHII", tag, 4, 1, value)
    path.write_bytes(
        out + struct.pack("<I", 0) + pixels.astype(pixels.dtype.newbyteorder("<")).tobytes() + extra
    )
    return path


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("grey16_12bit.png", Values(12), set()),
        ("grey16_12bit.png", Values(None, (0, 4095)), set()),
        ("grey16_8bit_range.png", Values(8), set()),
        ("float_one_nan.tif", Values(), {"not_finite"}),
        ("float_one_nan.tif", Values(None, (0, 1)), {"not_finite"}),
        ("float_nodata.tif", Values(), {"outliers"}),
        ("float_nodata.tif", Values(None, (0, 1)), set()),
        ("damaged_exif.png", Values(), {"exif"}),
    ],
)
def test_the_cases_show_their_ramp(name, values, said):
    image, kinds = shown(CASES / name, values)
    # each row is the ramp, but for the one pixel that holds no value, which is the lowest
    assert (np.abs(image - RAMP[None, :, None]).max(axis=2) > 1).sum() == (
        name in ("float_one_nan.tif", "float_nodata.tif")
    )
    assert np.all((np.abs(image - RAMP[None, :, None]).max(axis=2) <= 1) | (image.max(axis=2) == 0))
    assert kinds == said


def test_dim_pictures_are_told_when_they_are_most(tmp_path, caplog):
    root = tmp_path / "few"
    root.mkdir()
    ramp = np.tile(np.arange(24) * 4095 // 23, (24, 1))
    for i in range(7):
        png16(root / f"{i}.png", ramp if i > 2 else ramp * 16)
    for i in range(7, 20):  # those of 8 bits don't count
        Image.fromarray((ramp >> 4).astype(np.uint8)).save(root / f"{i}.png")
    for _ in range(2):  # packed, and read from the store
        caplog.clear()
        Folder(str(root), 24, cache=str(tmp_path / "cache"), workers=2).open("pretrain")
        (line,) = [
            record.getMessage() for record in caplog.records if "pictures" in record.getMessage()
        ]
        assert "4 of 7 pictures of 16 bits" in line
        assert line.endswith("few/3.png")
        assert "data.bit_depth=12" in line
    caplog.clear()
    data = Folder(
        str(root), 24, bit_depth=12, cache=str(tmp_path / "cache"), workers=2, on_error="skip"
    )
    data.open("pretrain")
    assert "3 of 20 images are left out" in caplog.text  # they have more than 12
    assert "has the value 65,520, and data.bit_depth=12 ends at 4,095" in caplog.text
    png16(root / "3.png", ramp * 16)
    caplog.clear()
    Folder(str(root), 24, cache=str(tmp_path / "cache"), workers=2).open("pretrain")
    assert not caplog.records[:-1] or "16 bits" not in caplog.text


def test_the_meaning_of_values_is_part_of_the_store(tmp_path):
    png16(tmp_path / "0.png", np.arange(16).reshape(4, 4))
    splits = [
        Folder(str(tmp_path), 4, **options).split("pretrain")
        for options in ({}, {"bit_depth": 12}, {"bit_depth": 10}, {"value_range": [0, 9]})
    ]
    assert (
        len({split.store_name for split in splits})
        == len({split.fingerprint for split in splits})
        == 4
    )


@pytest.mark.parametrize("make", [lambda **o: Folder("r", **o), lambda **o: DL21("r", **o)])
def test_values_that_say_nothing_are_refused(make):
    with pytest.raises(UserError, match=r"data.value_range=\[3,3\]: type what is black"):
        make(value_range=[3, 3])
    with pytest.raises(UserError, match=r"data.bit_depth=12 and data.value_range=\[0,9\] both say"):
        make(value_range=[0, 9], bit_depth=12)


finite = st.floats(-1e3, 1e3, width=32)  # so that float32 tells the ramp from one value


@settings(max_examples=60)
@given(
    finite,
    st.floats(1e-2, 1e4),
    st.lists(st.sampled_from([np.nan, np.inf, -np.inf, -9999e6, 1e38]), max_size=4),
)
def test_what_is_no_value_never_sets_the_range(tmp_path_factory, low, span, strange):
    path = tmp_path_factory.mktemp("f") / "x.tif"
    pixels = np.tile((low + span * np.arange(24) / 23).astype(np.float32), (24, 1))
    Image.fromarray(pixels).save(path)
    right, kinds = shown(path)
    assert not kinds - {"dim"}
    pixels[0, 5 : 5 + len(strange)] = strange
    Image.fromarray(pixels).save(path)
    image, _ = shown(path)
    assert np.array_equal(image[1:], right[1:])


def test_an_area_without_data_does_not_set_the_range(tmp_path):
    pixels = np.tile(np.arange(24, dtype=np.float32), (24, 1))
    pixels[:10] = -9999
    image, kinds = shown(tiff(tmp_path / "x.tif", pixels))
    assert np.array_equal(image[12, :, 0], np.arange(24) * 255 // 23)
    assert kinds == {"outliers"}
    pixels[:10] = 30  # no outlier by its distance: the file must say it
    image, kinds = shown(tiff(tmp_path / "x.tif", pixels, {42113: b"30.0000\0"}))
    assert np.array_equal(image[12, :, 0], np.arange(24) * 255 // 23)
    assert (image[:10] == 0).all()
    assert kinds == {"not_finite"}


def test_few_values_are_a_picture_as_it_is(tmp_path):
    for values in ([0.0, 1.0], [0.0, 0.9, 1.0], [-1.0, 0.0, 5.0]):
        pixels = np.resize(np.array(values, np.float32), (24, 24))
        image, kinds = shown(tiff(tmp_path / "x.tif", pixels))
        assert not kinds
        assert (image.min(), image.max()) == (0, 255)
    pixels[:] = 7
    assert shown(tiff(tmp_path / "x.tif", pixels))[0].max() == 0  # of one value: black
    pixels[:] = np.nan
    with pytest.raises(ValueError, match="no pixel has a finite value"):
        shown(tiff(tmp_path / "x.tif", pixels))


def test_integers_of_every_kind(tmp_path):
    ramp = np.tile(np.arange(24) * 65535 // 23, (24, 1))
    for path in (
        png16(tmp_path / "x.png", ramp),
        tiff(tmp_path / "x.tif", ramp.astype(np.uint16)),
        tiff(tmp_path / "signed.tif", (ramp - 32768).astype(np.int16)),
        tiff(tmp_path / "long.tif", (ramp * 1000).astype(np.int32)),
        tiff(tmp_path / "inverted.tif", (65535 - ramp).astype(np.uint16), {262: 0}),
    ):
        image, kinds = shown(path)
        assert np.abs(image[5, :, 0] - RAMP).max() <= 1, path.name
        assert not kinds
    pgm = tmp_path / "x.pgm"  # its head says what is white, whatever data.bit_depth= says
    pgm.write_bytes(b"P5 24 24 4095\n" + (ramp // 16).astype(">u2").tobytes())
    for values in (Values(), Values(12), Values(10)):
        assert np.abs(shown(pgm, values)[0][5, :, 0] - RAMP).max() <= 1


def test_colours_of_16_bits_keep_their_upper_half(tmp_path):
    ramp = np.tile(np.arange(24) * 65535 // 23, (24, 1))
    path = png16(tmp_path / "x.png", np.dstack([ramp] * 3), colour=2)
    assert np.abs(shown(path)[0][5, :, 0] - RAMP).max() <= 1
    with pytest.raises(ValueError, match="16 bits a colour"):
        shown(path, Values(12))
    assert shown(png16(path, np.dstack([ramp // 16] * 3), colour=2))[1] == {"wide_dim"}


def test_masks_of_8_bits_are_told(tmp_path, caplog):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 10).save(tmp_path / "mask.png")
    Folder(str(tmp_path), 8, cache=str(tmp_path / "cache"), workers=1).open("pretrain")
    assert re.search(
        r"1 of 1 pictures use less than a tenth .* label masks.*mask\.png$",
        caplog.text,
        re.MULTILINE,
    )


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.tif", "x.png"])
def test_more_frames_are_told(tmp_path, name):
    frames = [Image.fromarray(np.full((8, 8, 3), 255 - 40 * i, np.uint8)) for i in range(3)]
    frames[0].putpixel((0, 0), (0, 0, 0))
    frames[0].save(
        tmp_path / name,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if "w" in name else {}),
    )
    image, kinds = shown(tmp_path / name, size=8)
    assert kinds == {"frames"}
    assert (image[4:] == 255).all()


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif", "x.avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_upright(tmp_path, name, orientation):
    from PIL import ImageOps, features

    if name == "x.avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = Image.fromarray(
        np.kron(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16, np.ones((16, 16), np.uint8))
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.convert("RGB").save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as again:
        expected = np.asarray(ImageOps.exif_transpose(again).convert("RGB"))
    assert np.array_equal(shown(tmp_path / name, size=64)[0], expected)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
@pytest.mark.parametrize(
    "block",
    [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0"],
)
def test_damaged_exif_never_costs_a_picture(tmp_path, name, block):
    image = Image.fromarray(np.tile(np.arange(24, dtype=np.uint8) * 10, (24, 1))).convert("RGB")
    image.save(tmp_path / name, exif=block)
    assert np.abs(shown(tmp_path / name)[0][12, :, 0] - np.arange(24) * 10).max() < 20


def test_a_truncated_picture_with_exif_is_still_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name in ("x.png", "x.jpg", "x.webp"):
        Image.fromarray(noise).save(tmp_path / name, exif=exif)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2500])
        with pytest.raises(Exception, match=r"truncated|decode|decoder"):
            shown(tmp_path / name)
