"""Image files as 8-bit RGB, and notes on what a person may not expect of them.

Pictures become upright (EXIF orientation) and, where an image_size is given, image_size x
image_size: the centre square, resized with PIL's antialiased bilinear filter. Transparency is laid
on white; of several frames or pages the first is shown. Colours are taken as stored: colour
profiles aren't applied. Of 16-bit colours PIL gives the upper 8 bits.

Values of more than 8 bits, which PIL keeps for grey pictures only:

- 16-bit integers: black is 0, white is the highest value that the file states (as a 12-bit TIFF
  does) or that `bit_depth` gives, else 65,535;
- 32-bit integers, signed integers and floats have no agreed range: each picture is stretched from
  its lowest to its highest value. A value that stands alone, so far outside that the others would
  share less than a tenth of the range, doesn't count. Pixels that are not finite, or the "no data"
  of a GeoTIFF, are shown as the lowest value;
- `value_range` (low, high) sets black and white for all of these.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import BinaryIO, NamedTuple

import numpy as np

log = logging.getLogger(__name__)

TENTH = 255 // 10  # levels: a picture that spans no more of the 255 shows nothing
SAMPLE = 65_536  # pixels from which percentiles are taken
LONERS = 16  # values at each end that may stand alone
GDAL_NODATA = 42113  # TIFF tag: a text with the value of pixels that nobody measured
PHOTOMETRIC = 262  # TIFF tag: 0 means that 0 is white
BITS_PER_SAMPLE = 258  # TIFF tag
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Image.Transpose

Noticed = dict[str, tuple[int, int]]  # kind of note -> number of pictures, index of the first

KINDS = {
    "dim": (
        "{count} of {total} pictures use less than a tenth of the range from black to white: "
        "label masks, or values of fewer bits? Rewrite such; the first is {first}"
    ),
    "wide_dim": (
        "{count} of {total} pictures of 16 bits use less than a tenth of their range: "
        "say how many bits their values have (data.bit_depth=12), "
        "or what is black and white (data.value_range=[low,high]); the first is {first}"
    ),
    "outliers": (
        "{count} pictures hold values far outside of all others, "
        "which don't set their range (data.value_range=[low,high] does, for all pictures alike); "
        "the first is {first}"
    ),
    "not_finite": (
        "{count} pictures have pixels without a value, shown as their lowest; the first is {first}"
    ),
    "exif": (
        "{count} pictures have EXIF data that can't be read, and are shown as stored; "
        "the first is {first}"
    ),
    "frames": (
        "{count} files hold several frames or pages, of which one is shown; the first is {first}"
    ),
}
SHARES = {"dim": "all", "wide_dim": "wide"}  # told only if more than half of these pictures are

# formats that PIL only names, hands to another program, or takes for films
NO_PICTURES = {"BUFR", "GRIB", "HDF5", "WMF", "EPS", "MPEG", "IPTC"}
CODECS = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}  # a build of PIL may lack these


@functools.cache
def extensions() -> frozenset[str]:
    """The file name extensions that this PIL reads, in lower case."""
    from PIL import Image, features

    known = Image.registered_extensions()  # fills Image.OPEN, too
    missing = {kind for kind, codec in CODECS.items() if not features.check(codec)}
    readable = Image.OPEN.keys() - NO_PICTURES - missing
    return frozenset(extension for extension, kind in known.items() if kind in readable)


class Values(NamedTuple):
    """How values of more than 8 bits are read; see the module's docstring."""

    bit_depth: int | None = None
    value_range: tuple[float, float] | None = None


AS_STORED = Values()


def note(noticed: Noticed, kinds: Iterable[str], index: int) -> None:
    """Add the notes on picture `index` to `noticed`."""
    for kind in kinds:
        count, first = noticed.get(kind, (0, index))
        noticed[kind] = count + 1, min(first, index)


def merge(noticed: Noticed, more: Noticed) -> None:
    for kind, (count, first) in more.items():
        before, earlier = noticed.get(kind, (0, first))
        noticed[kind] = before + count, min(earlier, first)


def tell(noticed: Noticed, name: str, where: Callable[[int], str], told: set[str]) -> None:
    """Log a line for each kind that isn't in `told` yet, and add it there. name: the split's."""
    for kind in [kind for kind in KINDS if kind in noticed and kind not in told]:
        count, first = noticed[kind]
        total, _ = noticed[SHARES.get(kind, kind)]
        if kind not in SHARES or 2 * count > total:
            text = KINDS[kind].format(count=f"{count:,}", total=f"{total:,}", first=where(first))
            log.warning("'%s': %s", name, text)
            told.add(kind)


def decode(
    file: str | BinaryIO,
    image_size: int | None,
    values: Values = AS_STORED,
    kinds: list[str] | None = None,
) -> np.ndarray:
    """The image file as uint8 (image_size, image_size, 3), or (H, W, 3), whole, for None.

    Notes on it are appended to `kinds`. Raises what PIL raises for a damaged file, and ValueError
    where the pixels contradict `values`.
    """
    kinds = [] if kinds is None else kinds
    quieten()
    with _opened(file) as image:
        if image_size is not None:
            # a large JPEG is decoded at a fraction of its size
            image.draft(None, (2 * image_size, 2 * image_size))
            pixels = squared(image, image_size, values, kinds)
        else:
            pixels = np.array(whole(image, values, kinds))
        note_range(pixels, kinds)
        if image.format != "MPO":  # a phone's: the other frames are the same picture, or its depth
            with suppress(Exception):  # the next frame may be damaged
                if getattr(image, "is_animated", False):
                    kinds.append("frames")
    return pixels


def _opened(file: str | BinaryIO):
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file)
    except UnidentifiedImageError:  # its text has an address of memory, or the path once more
        raise ValueError("no image of a known format") from None


@functools.cache
def quieten() -> None:
    """Pass over PIL's warnings, about a hundred megapixels or odd tags.

    For good: `warnings.catch_warnings` isn't for threads, of which one may end another's silence.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def note_range(pixels: np.ndarray, kinds: list[str]) -> None:
    """Append to the notes `kinds` of a picture what its pixels tell."""
    kinds.append("all")
    if int(pixels.max()) - int(pixels.min()) <= TENTH:
        kinds.append("wide_dim" if "wide" in kinds else "dim")


def squared(
    image, image_size: int, values: Values = AS_STORED, kinds: list[str] | None = None
) -> np.ndarray:
    """A picture of PIL's, of a file or in memory, as uint8 (image_size, image_size, 3).

    For the rest see `decode`.
    """
    return centre_square(whole(image, values, [] if kinds is None else kinds), image_size)


def whole(image, values: Values, kinds: list[str]):
    """A picture of PIL's as an upright one of 8-bit RGB. For the rest see `decode`."""
    wide_colour = _is_wide_colour(image)
    if image.format == "PPM" and image.tile and image.tile[0][0] != "raw":
        values = AS_STORED  # PIL scales from the range that the file states to 65,535
    image.load()
    return _to_rgb(_upright(image, kinds), image, values, wide_colour, kinds)


def _is_wide_colour(file) -> bool:
    tiles = getattr(file, "tile", ())  # a picture that was made in memory has none
    return not file.mode.startswith("I") and any(";16" in str(tile[3]) for tile in tiles)


def _upright(image, kinds: list[str]):
    turned = orientation(image, kinds)
    return image.transpose(UPRIGHT[turned]) if turned in UPRIGHT else image


def orientation(image, kinds: list[str]) -> int:
    """EXIF's number for how a picture of PIL's is to be turned; 1: not at all."""
    try:
        turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises many types for a block that isn't EXIF
        kinds.append("exif")
        return 1
    return turned if turned in UPRIGHT else 1


def _to_rgb(image, file, values: Values, wide_colour: bool, kinds: list[str]):
    """image: the picture of `file`, upright. wide_colour: it has 16 bits a colour."""
    from PIL import Image

    if wide_colour:
        kinds.append("wide")
        if values != AS_STORED:
            raise ValueError(
                "a picture of 16 bits a colour, of which PIL gives the upper 8, "
                "so that data.bit_depth= and data.value_range= can't hold: rewrite it with 8 bits"
            )
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and file.format in ("PNG", "PPM")):
        kinds.append("wide")
        return Image.fromarray(_from_16_bits(np.asarray(image), file, values)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_stretched(np.asarray(image), file, values, kinds)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(pixels: np.ndarray, file, values: Values) -> np.ndarray:
    tags = getattr(file, "tag_v2", {})
    if values.value_range is not None:
        levels = _between(pixels, *values.value_range)
    else:
        depth = values.bit_depth or min(tags.get(BITS_PER_SAMPLE, (16,))[0], 16)
        white = 2**depth - 1
        highest = int(pixels.max())
        if highest > white:
            raise ValueError(
                f"it has the value {highest:,}, and data.bit_depth={depth} ends at {white:,}"
            )
        levels = ((pixels.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    return 255 - levels if tags.get(PHOTOMETRIC) == 0 else levels


def _stretched(pixels: np.ndarray, file, values: Values, kinds: list[str]) -> np.ndarray:
    pixels = pixels.astype(np.float64)
    known = np.isfinite(pixels)
    no_data = str(getattr(file, "tag_v2", {}).get(GDAL_NODATA, "nan")).strip("\0 ")
    with suppress(ValueError):  # the tag's text may be no number
        known &= pixels != float(no_data)
    if not known.all():
        kinds.append("not_finite")
        if not known.any():
            raise ValueError("no pixel has a finite value")
    whole = pixels[known]
    low, high = values.value_range or _own_range(whole)
    if values.value_range is None and (low, high) != (whole.min(), whole.max()):
        kinds.append("outliers")
    return _between(np.where(known, pixels, low), low, high)


def _between(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    return (np.clip((pixels - low) * (255 / max(high - low, 1e-12)), 0, 255)).astype(np.uint8)


def _own_range(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest of the values (n,), without those that stand alone far outside.

    In each turn the value at either end is dropped if its distance to the rest is more than 9 times
    what 98 % of the rest span.
    """
    some = values[:: -(-len(values) // SAMPLE)]
    for _ in range(LONERS):
        before = len(values)
        for end, sign in ((values.min(), 1), (values.max(), -1)):
            rest = values[values != end]
            if len(rest) == 0:
                break
            few = some[some != end]
            span = float(np.subtract(*np.percentile(few, (99, 1)))) if len(few) else 0.0
            span = span or float(rest.max() - rest.min())
            gap = sign * ((rest.min() if sign > 0 else rest.max()) - end)
            if span and gap > 9 * span:  # the rest would share less than a tenth of the range
                values, some = rest, few
        if len(values) == before:
            break
    return float(values.min()), float(values.max())


def centre_square(image, size: int) -> np.ndarray:
    from PIL import Image

    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.array(image)  # writable, as torch wants it
