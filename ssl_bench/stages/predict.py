"""Stage predict: labels and features of a folder of images."""

import csv
import os
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from pydantic import PositiveInt

from ssl_bench.config.fields import BitDepth, Place, Resize, ValueRange
from ssl_bench.console import Bar
from ssl_bench.data.formats.folder import Images
from ssl_bench.data.store import Split
from ssl_bench.errors import UserError, several
from ssl_bench.evaluate.features import new_array
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed
from ssl_bench.runtime.precision import autocast
from ssl_bench.stages import IMAGES, PRETRAINED, RUN, single_process
from ssl_bench.stages._pretrained import Pretrained, check_directory, log_result, open_pretrained
from ssl_bench.stages._training import check_size, on_device, open_source

BLOCK = 4096  # images between two saves


class Position:
    """Where the written rows of images.csv end, as the state of a checkpoint."""

    bytes = 0

    def state_dict(self) -> dict[str, int]:
        return {"bytes": self.bytes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.bytes = state["bytes"]


READS = (*RUN, *IMAGES, "data.on_error", "data.cache", "data.workers", "backbone", *PRETRAINED)
IDLE = {"pretrained=null": ("pretrained_prefix",)}
NEEDS_WEIGHTS = True  # see `build`


@single_process
def predict(
    cfg: DictConfig,
    run: Run,
    images: Place,
    features: bool = True,
    image_size: PositiveInt | None = None,
    test_resize: Resize | None = None,
    bit_depth: BitDepth | None = None,
    value_range: ValueRange | None = None,
) -> dict[str, float]:
    """Write images.csv and features.npy, float32 (rows, dim), of all images below a folder.

    A row of images.csv is the path below the folder and, if `cfg.pretrained` has a classifier, the
    likeliest label, its probability and, if the classes have names, its name. Images are shown as
    the run of the weights showed test images, unless image_size (pixels) or test_resize say
    otherwise; values of more than 8 bits mean what they meant there, unless bit_depth or
    value_range do. Returns the number of images.
    """
    check_directory(cfg)
    if distributed.world_size() > 1:
        raise UserError(
            "stage=predict writes one row after the other: start it without torchrun or srun"
        )
    root = Path(images)
    if not root.is_dir():
        raise UserError(f"stage.images={images}: no such folder")
    pretrained = open_pretrained(cfg)
    if pretrained.classifier is None and not features:
        raise UserError(
            f"stage.features=false: {pretrained.path} has no classifier, "
            "so that nothing is left to write; name a run of stage=lincls or stage=finetune"
        )
    packed, view = pretrained.view(image_size, test_resize)
    name = pretrained.network.get("name")
    check_size("stage.image_size", view.image_size, pretrained.backbone, name)
    data = open_images(cfg, pretrained, packed)
    split = data.split("pretrain")
    source = open_source(cfg, run, data, "pretrain", view, once=True)
    backbone, view = on_device(pretrained.backbone, run), view.to(run.device)
    classifier, names = pretrained.classifier, pretrained.classes
    if classifier is not None:
        classifier.to(run.device)

    total, position = source.num_images, Position()
    done = saved = run.restore(position=position)
    source.rows = source.rows[done:]
    path, array = run.directory / "features.npy", None
    if features and done:
        array = np.load(path, mmap_mode="r+")
    elif features:
        array = new_array(path, np.float32, (total, backbone.dim))
    header = ["image"]
    header += ["label", "probability"] if classifier is not None else []
    header += ["name"] if names else []
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with (
        open(run.directory / "images.csv", "r+" if done else "w", **text) as file,
        Bar(total, "predictions", begun=done) as progress,
        torch.inference_mode(),
    ):
        file.seek(position.bytes)
        file.truncate()  # without the rows after the last save
        table = csv.writer(file)
        if done == 0:
            table.writerow(header)
        for batch, _, indices in source.epoch_pass():
            with autocast(cfg.precision, run.device):
                seen = backbone(view(batch))
            seen = seen.float()
            columns = [[os.path.relpath(split.where(index), root) for index in indices.tolist()]]
            if classifier is not None:
                best = classifier(seen).softmax(dim=1).max(dim=1)
                columns.append(best.indices.tolist())
                columns.append([f"{value:.4f}" for value in best.values.tolist()])
            if names:
                columns.append([names[label] for label in columns[1]])
            table.writerows(zip(*columns, strict=True))
            if array is not None:
                array[done : done + len(seen)] = seen.cpu().numpy()
            done += len(seen)
            progress.add(len(seen))
            stop = run.stopping(done)
            if stop or done - saved >= BLOCK or done == total:
                position.bytes = file.tell()  # which flushes the rows to the file
                run.save(done, position=position)
                saved = done
            if stop and done < total:
                run.interrupt(done)
    log_result(run, {"images": total})
    written = "images.csv, features.npy" if features else "images.csv"
    print(f"{several(total, 'image')} in {run.directory}: {written}")
    return {"images": total}


def open_images(cfg: DictConfig, pretrained: Pretrained, image_size: int | None) -> Images:
    """The images of the folder, to be packed at `image_size` pixels; None: as they are."""
    root = Path(cfg.stage.images)
    keys, known = ("bit_depth", "value_range"), pretrained.config.get("data", {})
    given = {key: cfg.stage[key] for key in keys if cfg.stage[key] is not None}
    values = given or {key: known[key] for key in keys if known.get(key) is not None}
    kept = {"on_error": cfg.data.on_error, "cache": cfg.data.cache, "workers": cfg.data.workers}
    if image_size is None:
        kept |= {"max_side": pretrained.max_side, "draft": known.get("draft") is True}
    return Images(str(root), image_size, **values, **kept)


def find_split(cfg: DictConfig, name: str) -> Split:
    """The images that the stage looks at: not those of `data`."""
    pretrained = open_pretrained(cfg)
    packed, _ = pretrained.view(cfg.stage.image_size, cfg.stage.test_resize)
    return open_images(cfg, pretrained, packed).split(name)


predict.split = find_split
