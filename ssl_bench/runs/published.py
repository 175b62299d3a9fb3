"""Known published weights: where they lie, whose they are, and the hash that proves a file."""

import difflib
import http.client
import logging
import urllib.request
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from ssl_bench import files
from ssl_bench.console import Bar
from ssl_bench.data.store import cache_folder
from ssl_bench.errors import UserError
from ssl_bench.runs import identity, layout

log = logging.getLogger(__name__)


class Weights(NamedTuple):
    """A file, as its authors' page lists it."""

    url: str
    hash: str  # the algorithm and the first hex digits, as published; "": none is
    backbone: str  # what to type after backbone=
    method: str
    epochs: int | None  # None: their page doesn't say
    top1: float  # on ImageNet (percent), of a linear classifier; of a supervised network its own
    licence: str
    std: tuple[float, float, float] | None = None  # that images had; None: ImageNet's usual

    @property
    def recipe(self) -> str:
        return self.method + (f", {self.epochs} ep" if self.epochs else "")


TIMEOUT = 30  # seconds without a byte
BY_NC, APACHE, MIT, BSD = "CC BY-NC 4.0", "Apache 2.0", "MIT", "BSD-3"
META = "https://dl.fbaipublicfiles.com/"
MOCO, MOCO_V3, DINO = META + "moco/moco_checkpoints/", META + "moco-v3/", META + "dino/"
SWAV, SIMSIAM = META + "deepcluster/", META + "simsiam/models/"
TORCHVISION = "https://download.pytorch.org/models/"
# src/multicropdataset.py and eval_linear.py of facebookresearch/swav
SWAV_STD = (0.228, 0.224, 0.225)
VIT_S, VIT_B = "vit_small", "vit_base"


def _moco(name: str, md5: str, epochs: int, top1: float) -> Weights:
    """The model table of facebookresearch/moco, README.md."""
    url, version = f"{MOCO}{name}/{name}_pretrain.pth.tar", name[5:7]
    return Weights(url, f"md5 {md5}", "resnet50", f"MoCo {version}", epochs, top1, BY_NC)


def _moco_v3(place: str, backbone: str, epochs: int, top1: float) -> Weights:
    """The tables of facebookresearch/moco-v3, CONFIG.md."""
    return Weights(f"{MOCO_V3}{place}", "", backbone, "MoCo v3", epochs, top1, BY_NC)


def _dino(name: str, backbone: str, top1: float) -> Weights:
    """The table of facebookresearch/dino, README.md."""
    return Weights(f"{DINO}{name}/{name}.pth", "", backbone, "DINO", None, top1, APACHE)


def _swav(name: str, epochs: int, top1: float, backbone: str = "resnet50") -> Weights:
    """The tables of facebookresearch/swav, README.md; 2 x 224 and 6 x 96 pixels, batch 4,096."""
    url = f"{SWAV}swav_{name}_pretrain.pth.tar"
    return Weights(url, "", backbone, "SwAV", epochs, top1, BY_NC, SWAV_STD)


def _torchvision(file: str, top1: float) -> Weights:
    """torchvision/models/resnet.py; the names of the files carry their sha256."""
    backbone, _, sha256 = file.partition("-")
    url = f"{TORCHVISION}{file}.pth"
    return Weights(url, f"sha256 {sha256}", backbone, "supervised", None, top1, BSD)


WEIGHTS = {
    "moco_v1_200ep": _moco("moco_v1_200ep", "b251726a", 200, 60.6),
    "moco_v2_200ep": _moco("moco_v2_200ep", "59fd9945", 200, 67.7),
    "moco_v2_800ep": _moco("moco_v2_800ep", "a04e12f8", 800, 71.1),
    "moco_v3_100ep": _moco_v3("r-50-100ep/r-50-100ep.pth.tar", "resnet50", 100, 68.9),
    "moco_v3_300ep": _moco_v3("r-50-300ep/r-50-300ep.pth.tar", "resnet50", 300, 72.8),
    "moco_v3_1000ep": _moco_v3("r-50-1000ep/r-50-1000ep.pth.tar", "resnet50", 1000, 74.6),
    # README.md: "Our ViT-Small is with heads=12"
    "moco_v3_vit_s": _moco_v3(
        "vit-s-300ep/vit-s-300ep.pth.tar", f"{VIT_S} backbone.num_heads=12", 300, 73.2
    ),
    "moco_v3_vit_b": _moco_v3("vit-b-300ep/vit-b-300ep.pth.tar", VIT_B, 300, 76.7),
    "dino_vit_s16": _dino("dino_deitsmall16_pretrain", VIT_S, 77.0),
    "dino_vit_s8": _dino("dino_deitsmall8_pretrain", f"{VIT_S} backbone.patch_size=8", 79.7),
    "dino_vit_b16": _dino("dino_vitbase16_pretrain", VIT_B, 78.2),
    "dino_vit_b8": _dino("dino_vitbase8_pretrain", f"{VIT_B} backbone.patch_size=8", 80.1),
    "dino_r50": _dino("dino_resnet50_pretrain", "resnet50", 75.3),
    # facebookresearch/dinov2, README.md: ViT-S/14 distilled, without registers
    "dinov2_vit_s14": Weights(
        META + "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        *("", "dinov2_small", "DINOv2, distilled", None, 81.1, APACHE),
    ),
    "swav_100ep": _swav("100ep", 100, 72.1),
    "swav_200ep": _swav("200ep", 200, 73.9),
    "swav_400ep": _swav("400ep", 400, 74.6),
    "swav_800ep": _swav("800ep", 800, 75.3),
    "swav_200ep_bs256": _swav("200ep_bs256", 200, 72.7),
    "swav_400ep_bs256": _swav("400ep_bs256", 400, 74.3),
    "swav_400ep_2x224": _swav("400ep_2x224", 400, 70.1),
    "swav_r50x2_400ep": _swav("RN50w2_400ep", 400, 77.3, "resnet50x2"),
    # facebookresearch/barlowtwins, README.md
    "barlow_twins": Weights(
        META + "barlowtwins/ljng/resnet50.pth",
        *("", "resnet50", "Barlow Twins", 1000, 73.5, MIT),
    ),
    # facebookresearch/vicreg, README.md
    "vicreg_r50": Weights(META + "vicreg/resnet50.pth", "", "resnet50", "VICReg", None, 73.2, MIT),
    "vicreg_r50x2": Weights(
        META + "vicreg/resnet50x2.pth", "", "resnet50x2", "VICReg", None, 75.5, MIT
    ),
    # facebookresearch/simsiam, README.md
    "simsiam_bs512": Weights(
        SIMSIAM + "100ep/pretrain/checkpoint_0099.pth.tar",
        *("", "resnet50", "SimSiam", 100, 68.1, BY_NC),
    ),
    "simsiam_bs256": Weights(
        SIMSIAM + "100ep-256bs/pretrain/checkpoint_0099.pth.tar",
        *("", "resnet50", "SimSiam", 100, 68.3, BY_NC),
    ),
    "imagenet_r18": _torchvision("resnet18-f37072fd", 69.758),
    "imagenet_r34": _torchvision("resnet34-b627a593", 73.314),
    "imagenet_r50": _torchvision("resnet50-0676ba61", 76.13),
    "imagenet_r50_v2": _torchvision("resnet50-11ad3fa6", 80.858),
    "imagenet_r101": _torchvision("resnet101-63fe2227", 77.374),
    "imagenet_r101_v2": _torchvision("resnet101-cd907fc2", 81.886),
}


def located(source: str) -> Path | None:
    """The file that `pretrained=source` means; None: it names one of WEIGHTS. UserError."""
    path = Path(source)
    if file := layout.weights_of(path):
        return file
    if path.is_dir():
        raise UserError(
            f"pretrained={source}: no checkpoint in this directory; give a run directory or a file"
        )
    if source in WEIGHTS:
        return None
    close = difflib.get_close_matches(source, WEIGHTS, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UserError(
        f"pretrained={source}: no such file or run directory, nor one of the weights that "
        f"ssl-bench stage=zoo lists{hint}"
    )


def missing(source: str, made: Set[Path]) -> str:
    """Why no weights are at `pretrained=source`; "": there are, or there will be.

    made: the real paths of run directories whose weights are there once they are needed.
    """
    place = Path(identity.real(source))
    if not made.isdisjoint([place, *place.parents]):
        return ""
    try:
        located(source)
    except UserError as error:
        return str(error)
    return ""


def fetch(name: str) -> Path:
    """The local file of a zoo name, verified; downloaded if it isn't there yet."""
    weights, path = WEIGHTS[name], place(name)
    if not path.exists():
        _download(name, path)
    if weights.hash:
        verify(path, weights.hash, "delete it and try again")
    else:
        _remember(name, path)
    return path


def place(name: str) -> Path:
    """Where the file of a zoo name lies, or will."""
    suffixes = ".pth.tar" if WEIGHTS[name].url.endswith(".tar") else ".pth"
    return cache_folder("zoo") / f"{name}{suffixes}"


def of(path: Path) -> Weights | None:
    """The weights whose local file this is; None for any other file."""
    if path.parent != cache_folder("zoo"):
        return None
    return next((WEIGHTS[name] for name in WEIGHTS if place(name) == path), None)


def _remember(name: str, path: Path) -> None:
    """Compare a file that has no published hash with what it was when it was used first."""
    from filelock import FileLock

    sums = path.with_name(files.SUMS)
    with FileLock(f"{sums}.lock"):
        known = files.listed(path.parent)
        if path.name not in known:
            known[path.name] = files.digest(path)
            files.seal(path.parent, known)
            log.info(
                "%s: its authors publish no hash; its sha256, %s..., is in %s now, and every later "
                "use is compared with it",
                *(path, known[path.name][:8], sums),
            )
    files.check(path)


def _download(name: str, path: Path) -> None:
    from filelock import FileLock

    weights = WEIGHTS[name]
    partial = path.with_name(path.name + ".partial")
    advice = f"fetch {weights.url} elsewhere and put it at {path}"
    if weights.hash:
        algorithm, _, digits = weights.hash.partition(" ")
        advice += f" (its {algorithm} begins with {digits})"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # ranks, and members of a sweep, ask at the same time
        if path.exists():
            return
        try:
            with (
                urllib.request.urlopen(weights.url, timeout=TIMEOUT) as reply,
                open(partial, "wb") as file,
            ):
                length = reply.length
                with Bar(length and length / 1e6, path.name, unit="MB") as progress:
                    while block := reply.read(1 << 20):
                        file.write(block)
                        progress.add(len(block) / 1e6)
            if weights.hash:
                verify(partial, weights.hash, advice)
            elif length is None or partial.stat().st_size != length:
                raise UserError(
                    f"pretrained={name}: {partial.stat().st_size} bytes came of {length}; {advice}"
                )
            partial.replace(path)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"pretrained={name}: no download ({error}); {advice}") from None
        finally:
            partial.unlink(missing_ok=True)


def verify(path: Path, known: str, advice: str) -> None:
    """UserError, with `advice`, unless the hash of the file begins as `known` says."""
    algorithm, _, digits = known.partition(" ")
    if not (found := files.digest(path, algorithm)).startswith(digits):
        raise UserError(
            f"{path}: its {algorithm} is {found[:8]}..., not {digits}: "
            f"a broken or another file; {advice}"
        )
