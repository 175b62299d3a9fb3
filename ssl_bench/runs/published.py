"""Known published weights: where they lie, and the hash that proves a file to be the right one."""

import http.client
import shutil
import urllib.request
from pathlib import Path
from typing import NamedTuple

from ssl_bench.data.store import cache_folder
from ssl_bench.errors import UserError
from ssl_bench.files import digest


class Weights(NamedTuple):
    path: str  # under BASE_URL
    md5: str  # the first eight hex digits, as published
    backbone: str
    note: str


TIMEOUT = 30  # seconds without a byte
BASE_URL = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/"
# The model table of https://github.com/facebookresearch/moco, README.md; the note is the ImageNet
# top-1 of a linear classifier.
WEIGHTS = {
    "moco_v1_200ep": Weights(
        "moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar", "b251726a", "resnet50", "60.6 top-1"
    ),
    "moco_v2_200ep": Weights(
        "moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar", "59fd9945", "resnet50", "67.7 top-1"
    ),
    "moco_v2_800ep": Weights(
        "moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", "a04e12f8", "resnet50", "71.1 top-1"
    ),
}


def fetch(name: str) -> Path:
    """The local file of a zoo name, verified; downloaded if it isn't there yet."""
    weights, path = WEIGHTS[name], place(name)
    if not path.exists():
        _download(name, path)
    verify(path, weights.md5, "delete it and try again")
    return path


def place(name: str) -> Path:
    """Where the file of a zoo name lies, or will."""
    return cache_folder("zoo") / Path(WEIGHTS[name].path).name


def _download(name: str, path: Path) -> None:
    from filelock import FileLock
    from tqdm import tqdm

    url, md5 = BASE_URL + WEIGHTS[name].path, WEIGHTS[name].md5
    partial = path.with_name(path.name + ".partial")
    advice = f"fetch {url} elsewhere and put it at {path} (its md5 begins with {md5})"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # ranks, and members of a sweep, ask at the same time
        if path.exists():
            return
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as reply, open(partial, "wb") as file:
                options = {"total": reply.length, "desc": path.name, "disable": None}
                with tqdm.wrapattr(reply, "read", **options) as source:
                    shutil.copyfileobj(source, file)
            verify(partial, md5, advice)
            partial.replace(path)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"pretrained={name}: no download ({error}); {advice}") from None
        finally:
            partial.unlink(missing_ok=True)


def verify(path: Path, md5: str, advice: str) -> None:
    """UserError, with `advice`, unless the md5 of the file begins with `md5`."""
    if not (found := digest(path, "md5")).startswith(md5):
        raise UserError(
            f"{path}: its md5 is {found[:8]}..., not {md5}: a broken or another file; {advice}"
        )
