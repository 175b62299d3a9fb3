"""Trees of image files: what is listed, what is passed over, what is refused."""

import functools
import hashlib
import logging
import os
import re
import stat
from array import array
from collections.abc import Iterator
from itertools import accumulate, chain, islice
from pathlib import Path

from ssl_bench.data import pictures
from ssl_bench.data.formats.base import Digests
from ssl_bench.data.formats.paths import Paths
from ssl_bench.errors import UserError, several

log = logging.getLogger(__name__)

# What file servers, file managers and notebooks leave in folders; whatever begins with a dot is
# passed over, too.
SERVICE = {"@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"}
SERVICE |= {"lost+found", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}
SERVICE |= {"__macosx", "__pycache__"}
TRAIN = {"train", "training"}
HELD_OUT = {"val", "valid", "validation", "test", "testing", "eval", "dev", "holdout"}
SAYS_NOTHING = {"", "set", "data", "image", "images", "img", "imgs", "split"}


def is_service(name: str) -> bool:
    return name.startswith(".") or name.casefold() in SERVICE


def subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        folders = [entry for entry in entries if not is_service(entry.name) and entry.is_dir()]
    return sorted(entry.name for entry in folders)


def holds_more(root: Path, count: int) -> bool:
    """Has a folder more than so many files, at any depth and behind links, as `list_tree` sees it?

    Counted no further, and none is read. A folder that two links name counts once.
    """
    found, seen = 0, set()
    for folder, folders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        found += len(names)
        if found > count:
            return True
    return False


class Passed:
    """The files that a listing leaves out: the number and the first of each kind.

    A kind is an extension, or words with `file` among them.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str) -> None:
        count, first = self.kinds.get(kind, (0, name))
        self.kinds[kind] = count + 1, min(first, name)

    def merge(self, other: "Passed") -> None:
        for kind, (more, name) in other.kinds.items():
            count, first = self.kinds.get(kind, (0, name))
            self.kinds[kind] = count + more, min(first, name)

    def tell(self, root: Path) -> None:
        """Log what was left out, if anything, in one line."""
        if self.kinds:
            log.info("skipped in %s: %s", root, self.told())

    def told(self) -> str:
        """Each kind with its number and an example, the most first."""
        kinds = sorted(self.kinds.items(), key=lambda item: (-item[1][0], item[0]))
        shown = []
        for kind, (count, first) in kinds[:12]:
            before, file, after = (f"{kind} file" if kind[0] == "." else kind).rpartition("file")
            example = first if count == 1 else f"{first}, ..."
            shown.append(f"{several(count, before + file)}{after} ({example})")
        more = f", and {len(kinds) - 12} kinds more" if len(kinds) > 12 else ""
        return ", ".join(shown) + more


class _Guard:
    """Looks for folders named after splits in a tree whose images are all trained on."""

    def __init__(self, root: Path, depth: int):
        """depth: where to begin; folders above are classes."""
        self.root, self.depth = root, depth
        self.train = self.held_out = ""  # the first folder of each kind
        self.count = 0  # images in held-out folders

    def see(self, folder: str, count: int) -> None:
        """folder: with a slash at its end, relative to the root; it holds `count` images."""
        parts = folder.split("/")[:-1]
        for depth in range(self.depth, len(parts)):
            means = _split_of(parts[depth])
            if means in TRAIN:
                self.train = self.train or "/".join(parts[: depth + 1])
            elif means in HELD_OUT:
                self.held_out = self.held_out or "/".join(parts[: depth + 1])
                self.count += count
                return

    def check(self) -> None:
        if self.held_out and self.train:
            raise UserError(
                f"{self.root} has {self.train}/ and {self.held_out}/, "
                f"whose {self.count:,} images would be trained on: type "
                f"data.root={self.root / self.train}, or sort both into train/<class>/ and "
                "val/<class>/"
            )
        if self.held_out:
            log.warning(
                "%s images are in folders like %s/ and are trained on, too",
                f"{self.count:,}",
                self.held_out,
            )


@functools.cache
def _split_of(folder: str) -> str:
    """The one word of a folder's name that says something, or "".

    Both train2017 and train_images give "train".
    """
    words = re.split(r"[\W\d_]+", folder.casefold())
    words = [word for word in words if word not in SAYS_NOTHING]
    return words[0].removesuffix("set") if len(words) == 1 else ""


def list_tree(
    root: Path, key: str = "data.root", guarded: int | None = None
) -> tuple[Paths, Digests, dict[str, int]]:
    """The image files under root in sorted order, their digests, and the images of each subfolder.

    The last are {folder of the first level, "" for root itself: number of images}. guarded: from
    this depth on, UserError for folders with the names of a training and a held-out split.
    """
    text, ends = bytearray(), array("q", [0])
    counts: dict[str, int] = {}
    files, content = hashlib.sha256(), hashlib.sha256()
    passed = Passed()
    guard = None if guarded is None else _Guard(root, guarded)
    nbytes = 0
    for folder, found in _walk(root, "", frozenset(), passed):
        names = [os.fsencode(folder + name) for name, _, _ in found]
        after = accumulate(map(len, names), initial=len(text))
        ends.extend(islice(after, 1, None))  # the initial value is there already
        text += b"".join(names)
        nbytes += sum(size for _, size, _ in found)
        # one update a folder: a million small ones take seconds
        sizes = [f"\0{size}".encode() for _, size, _ in found]
        times = [f"\0{mtime}\n".encode() for _, _, mtime in found]
        files.update(b"".join(chain.from_iterable(zip(names, sizes, times, strict=True))))
        content.update(b"".join(b"%b%b\n" % pair for pair in zip(names, sizes, strict=True)))
        first = folder.split("/", 1)[0]
        counts[first] = counts.get(first, 0) + len(found)
        if guard is not None:
            guard.see(folder, len(found))
    if guard is not None:
        guard.check()
    passed.tell(root)
    if not text:
        known = " ".join(sorted(pictures.extensions()))
        there = f", but {passed.told()}" if passed.kinds else ""
        raise UserError(
            f"no images under {root}{there}; {key}= sets the folder; known extensions are {known}"
        )
    digests = Digests(files.hexdigest(), content.hexdigest(), nbytes)
    return Paths(root, bytes(text), ends), digests, counts


def _walk(
    root: Path, below: str, above: frozenset, passed: Passed
) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """Yield (folder, [(name, size, mtime in ns), ...]) of images, all in sorted order.

    A folder is relative to root, with a slash at its end, "" for root; it comes in parts where it
    has folders between its files. below: the folder to list. above: the identities of the folders
    on the way to it, so that links are followed, but not in circles.
    """
    folder = os.path.join(root, below)
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_service(entry.name):  # may not even be read
                passed.add("hidden or service file", below + entry.name)
            else:
                found[entry.name] = entry
    known = pictures.extensions()
    files: list[tuple[str, int, int]] = []
    for name in sorted(found):
        entry = found[name]
        extension = os.path.splitext(name)[1].lower()
        if entry.is_dir():
            if files:
                yield below, files
            files = []
            yield from _walk(root, f"{below}{name}/", above | {identity}, passed)
        elif extension not in known:
            passed.add(extension or "file without an extension", below + name)
        else:
            try:
                status = entry.stat()
            except OSError:  # a link to nowhere: reported with the images that can't be decoded
                status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                files.append((name, status.st_size, status.st_mtime_ns))
            else:  # reading a pipe would never end
                passed.add("special file", below + name)
    if files:
        yield below, files
