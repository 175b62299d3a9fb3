"""Known published weights: where they lie, and the hash that proves a file is the one."""

import hashlib
import os
import urllib.error
from pathlib import Path
from typing import NamedTuple

from ssl_bench.errors import UserError


class Weights(NamedTuple):
    path: str  # under BASE_URL
    md5: str  # the first eight hex digits, as published
    backbone: str
    note: str


BASE_URL = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/"
# https://github.com/facebookresearch/moco: model table of the README; ImageNet top-1 of a linear classifier
WEIGHTS = {
    "moco_v1_200ep": Weights("moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar", "b251726a", "resnet50", "60.6 top-1"),
    "moco_v2_200ep": Weights("moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar", "59fd9945", "resnet50", "67.7 top-1"),
    "moco_v2_800ep": Weights("moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", "a04e12f8", "resnet50", "71.1 top-1"),
}


def cache() -> Path:
    """Folder of everything that can be had again: packed images, downloaded weights."""
    return Path(os.environ.get("SSL_BENCH_CACHE", "~/.cache/ssl_bench")).expanduser()


def fetch(name: str) -> Path:
    """The verified local file of a zoo name; downloaded with a progress bar when it isn't there yet."""
    import torch.hub

    weights = WEIGHTS[name]
    path = cache() / "zoo" / Path(weights.path).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            torch.hub.download_url_to_file(BASE_URL + weights.path, str(partial))
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"pretrained={name}: no download ({error}). Fetch {BASE_URL}{weights.path} elsewhere and "
                f"put it at {path} (its md5 begins with {weights.md5})"
            ) from None
        verify(partial, weights.md5)
        partial.replace(path)
    verify(path, weights.md5)
    return path


def verify(path: Path, md5: str) -> None:
    """UserError unless the file's md5 begins so."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if not digest.startswith(md5):
        raise UserError(f"{path}: its md5 is {digest[:8]}..., not {md5}: a broken or another file; delete it and retry")
