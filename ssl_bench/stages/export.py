"""Stage export: weights for other programs, with a model card."""

import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from pydantic import PositiveInt
from torch import nn

from ssl_bench import __version__, files
from ssl_bench.config.fields import Place
from ssl_bench.config.renamed import current
from ssl_bench.errors import UserError, several, writable
from ssl_bench.report import grouping, tables
from ssl_bench.report.tables import plain
from ssl_bench.runs import identity, layout, record, units, weights
from ssl_bench.runs.record import Ran
from ssl_bench.runs.run import Run
from ssl_bench.shell import override
from ssl_bench.stages import PRETRAINED, _labels, single_process
from ssl_bench.stages._pretrained import Pretrained, features_of, open_pretrained
from ssl_bench.stages._training import check_size

log = logging.getLogger(__name__)

RECIPE: tuple[str, ...] = ("method", "backbone", "data", "augmentation", "optimizer", "schedule")
RECIPE += ("epochs", "batch_size", "precision", "seed")
# keys that a recipe leaves out: they are about this machine or this program
PLACES = ("_target_", "root", "cache", "workers")
TOLERANCE = 1e-3  # for ONNX's outputs, relative to the largest: it sums in another order


READS = (*PRETRAINED, "runs", "backbone")
IDLE = {"pretrained=null": ("pretrained_prefix",)}
NEEDS_WEIGHTS = True  # see `build`


@single_process
def export(
    cfg: DictConfig, run: Run, out: Place, image_size: PositiveInt | None = None, onnx: bool = True
) -> dict[str, float]:
    """Write the folder `out` with the backbone and, if there is one, its classifier (fc.*).

    Its files are model.safetensors, model.pth (a state dict), model.onnx, SHA256SUMS, and README.md
    with the recipe and the numbers of those `cfg.runs` that measured these weights. An earlier
    export in the folder is replaced as a whole. A network that ONNX can't express has no
    model.onnx, with a warning. Returns the number of tensors. UserError for a folder that holds
    something else or can't be written, and for runs of which none measured these weights.
    """
    if not run.is_main:
        return {}
    folder = Path(out)
    is_export = (folder / files.SUMS).is_file()
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_export and not is_empty:
        raise UserError(f"stage.out={out}: is there already, and is no export; name a new folder")
    with writable("stage.out", out):
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        for place in (parent, folder):
            if place.exists():
                # tried now, and not after the weights are loaded
                tempfile.TemporaryFile(dir=place).close()
    given = record.find(files.places(cfg.runs))
    pretrained = open_pretrained(cfg)
    measured = record.measured(given, pretrained.path)
    if given and not measured:
        raise UserError(
            f"runs={cfg.runs}: none of its {len(given)} runs measured {pretrained.path}; "
            "name runs that did"
        )
    if given:
        counts = len(measured), len(given)
        log.info("numbers of %d of %d runs: those that measured these weights", *counts)
    if said := grouping.left_out(measured):
        log.warning(said)
    tokens = features_of(pretrained.config, pretrained.path)
    if tokens == "attentive":
        raise UserError(
            f"pretrained={cfg.pretrained}: its classifier attends to patches, which no other "
            "program's layout has: name the pretraining that it measured; stage=predict applies it"
        )
    size = pretrained.view(image_size, None)[1].image_size
    check_size("stage.image_size", size, pretrained.backbone, pretrained.network.get("name"))
    state = dict(pretrained.backbone.state_dict())
    if pretrained.classifier is not None:
        state |= {f"fc.{key}": value for key, value in pretrained.classifier.state_dict().items()}
        own = record.of(pretrained.path)
        measured += [own] if own and "val_top1" in own.summary else []

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_weights(state, pretrained, partial)
        failure = try_onnx(pretrained, size, partial / "model.onnx") if onnx else ""
        text = card(folder.name, pretrained, measured, image_size, failure)
        (partial / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
        names = sorted(file.name for file in partial.iterdir())
        files.seal(partial, files.sums_of(partial, names))
        replace(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"written to {folder}: {', '.join(names)}; "
        f"ssl-bench reads it with {override('pretrained', folder)}"
    )
    return {"tensors": len(state)}


def replace(folder: Path, partial: Path) -> None:
    """Put the export in `partial` in place of the one in `folder`, of which no file is left."""
    before, now = files.listed(folder), files.listed(partial)
    if before and before.get("model.pth") != now["model.pth"]:
        log.warning("%s held an export of other weights, which this one replaces", folder)
    folder.mkdir(exist_ok=True)
    for name in now:
        os.replace(partial / name, folder / name)
    for name in before.keys() - now.keys():
        if Path(name).name == name:  # a list from elsewhere may name files outside of the folder
            (folder / name).unlink(missing_ok=True)
    # last: with the former list a repeated command knows what to delete
    os.replace(partial / files.SUMS, folder / files.SUMS)


def write_weights(state: weights.State, pretrained: Pretrained, folder: Path) -> None:
    from safetensors.torch import save

    state = {key: value.contiguous() for key, value in state.items()}
    metadata = {"format": "pt"}
    if config := pretrained.config:  # so that stage=predict needs no other file
        kept = recipe(config) | {
            "backbone": pretrained.network,
            "stage": config.get("stage"),
            "classes": pretrained.classes,
            "labels": _labels.seen_by(str(pretrained.path)).said(),
        }
        metadata["ssl_bench"] = json.dumps(kept)
    metadata[weights.DIGEST] = weights.digest(state, metadata.get("ssl_bench", ""))
    # not save_file, whose files only their owner can read
    (folder / "model.safetensors").write_bytes(save(state, metadata))
    torch.save(state, folder / "model.pth")


def try_onnx(pretrained: Pretrained, image_size: int, path: Path) -> str:
    """Write model.onnx, and return why there is none: ONNX or its exporter can't express it."""
    network = nn.Sequential(pretrained.backbone, pretrained.classifier or nn.Identity()).eval()
    try:
        write_onnx(network, image_size, path)
    except OSError:  # a full disk
        raise
    # torch's exporter, onnxscript and onnxruntime raise errors of many classes
    except Exception as error:
        path.unlink(missing_ok=True)
        while error.__cause__:  # the exporter wraps the cause in pages of advice
            error = error.__cause__
        lines = filter(None, map(str.strip, str(error).splitlines()))
        reason = next(lines, type(error).__name__)
        log.warning("no model.onnx, but all else: %s", reason)
        return reason
    return ""


def write_onnx(network: nn.Module, image_size: int, path: Path) -> None:
    """Write a network: normalised images (batch, 3, image_size, image_size) -> features or logits.

    Without onnx and onnxscript nothing is written, with a warning. With onnxruntime, its outputs
    are compared with torch's: RuntimeError if they differ.
    """
    needed = ("onnx", "onnxscript")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        names = " and ".join(missing)
        log.warning("no model.onnx, for want of %s: pip install 'ssl_bench[onnx]'", names)
        return
    images = torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            network,
            (images,),
            path,
            input_names=["images"],
            output_names=["outputs"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,  # one file
            dynamo=True,
            verbose=False,
        )
    if importlib.util.find_spec("onnxruntime") is None:
        log.warning("model.onnx is not checked, for want of onnxruntime: pip install onnxruntime")
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = network(images[:2])
    (outputs,) = session.run(None, {"images": images[:2].numpy()})
    error = ((torch.from_numpy(outputs) - expected).abs().max() / expected.abs().max()).item()
    if not error < TOLERANCE:
        raise RuntimeError(
            f"onnxruntime's outputs differ from torch's by {error:.2g} of the largest"
        )
    log.info("model.onnx: onnxruntime's outputs differ from torch's by %.1g of the largest", error)


# -- the model card --------------------------------------------------------------------------------


def card(
    name: str,
    pretrained: Pretrained,
    measured: list[Ran],
    image_size: int | None,
    no_onnx: str = "",
) -> str:
    """The text of README.md. no_onnx: why the export of model.onnx failed; "": it didn't."""
    config, classifier = pretrained.config, pretrained.classifier
    packed, view = pretrained.view(image_size, None)
    buffers = view.normalize.buffers()
    mean, std = (tuple(round(x, 4) for x in values.flatten().tolist()) for values in buffers)
    resized = round(view.image_size * view.resize)
    if packed is None:
        shrunk = f"the shorter side resized to {resized} pixels"
    else:
        shrunk = f"the centre square at {packed} pixels, resized to {resized}"
    numbers, spread = "None were given (`runs=` of `stage=export`).", ""
    if rows := grouping.evaluations(measured):
        numbers = tables.table(rows, ["val_top1", "val_top5", "n"])
        spread = "On the val split: mean ± standard deviation over n seeds."
    classes = ""
    if pretrained.classes:
        names = ", ".join(map(str, pretrained.classes))
        classes = plain(f"Classes, in the order of the logits: {names}.")
    parts = [
        f"# {name}",
        plain(about(pretrained)),
        "## Numbers",
        numbers,
        spread,
        "## Input",
        f"RGB, uint8: {shrunk} (bilinear, "
        f"antialiased, rounded to uint8), the centre {view.image_size} x {view.image_size} cut "
        f"out, divided by 255; mean {mean}, std {std}. Output: {pretrained.backbone.dim} features"
        + (f", then {classifier.out_features} logits." if classifier else "."),
        classes,
        "## Use",
        fenced("python", usage(pretrained)),
        "A ResNet's names are torchvision's and timm's alike. `model.pth` holds the same tensors "
        "for `torch.load(..., weights_only=True)`; `model.onnx`, where it is there, takes `images` "
        f"(batch, 3, {view.image_size}, {view.image_size}). `sha256sum --check {files.SUMS}` "
        "proves the files.",
        f"There is no `model.onnx`: its export failed ({no_onnx})." if no_onnx else "",
        "## Recipe",
    ]
    if config:
        parts.append(fenced("yaml", yaml.safe_dump(recipe(config), sort_keys=False).rstrip("\n")))
    else:
        parts.append(plain(f"Not known: the weights are those of {pretrained.path.name}."))
    return "\n\n".join(filter(None, parts)) + "\n"


def fenced(language: str, code: str) -> str:
    """A block of code in Markdown, between fences that don't occur in the code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def recipe(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that another person needs."""

    def portable(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {key: value for key, value in node.items() if key not in PLACES}

    return {key: portable(config[key]) for key in RECIPE if config.get(key) is not None}


def about(pretrained: Pretrained) -> str:
    """A sentence or two on what the weights are and where they come from."""
    config = pretrained.config
    network = pretrained.network.get("name", "network")
    if not config:
        return f"A {network}, exported by ssl_bench {__version__} from {pretrained.path.name}."
    nodes = (config.get(group) or {} for group in ("method", "stage", "data"))
    method, stage, data = (node.get("name") for node in nodes)
    epochs, batch_size = several(config["epochs"], "epoch"), config.get("batch_size")
    text = f"A {network}: {method or stage} on {data}, {epochs}, batch {batch_size}"
    text += f", exported by ssl_bench {__version__} from `{pretrained.path.name}`"
    if (folder := layout.run_of(pretrained.path)) is None:
        return text + "."
    text += f" of `{folder.parent.name}/{folder.name}`."
    if source := config.get("pretrained"):
        below = identity.with_origin(config, folder).below
        text += f" It stands on the weights of {below.title if below else Path(source).name}."
    if (run := record.of(pretrained.path)) is None:
        return text + " The run had not finished."
    metric = config.get("metric")
    if metric not in run.summary:
        return text
    return text + f" It ended with {metric} {units.spoken(metric, run.summary[metric])}."


def usage(pretrained: Pretrained) -> str:
    """Python that loads model.safetensors, with torchvision if it has this network."""
    items = pretrained.network.items()
    own = {key: value for key, value in items if key not in ("name", "_target_")}
    module, _, name = current(pretrained.network["_target_"]).rpartition(".")
    classes = pretrained.classifier and pretrained.classifier.out_features
    resnet, output = name.startswith("resnet"), "logits" if classes else "features"
    lines = ["import torch", "from safetensors.torch import load_file"]
    if resnet and (own.get("stem", "imagenet"), own.get("width", 64)) == ("imagenet", 64):
        lines += [f"from torchvision.models import {name}", ""]
        if classes:
            lines += [f"network = {name}(num_classes={classes})"]
        else:
            lines += [f"network = {name}()", "network.fc = torch.nn.Identity()"]
    else:
        arguments = ", ".join(f"{key}={value!r}" for key, value in own.items())
        lines += [f"from {module} import {name}", "", f"network = {name}({arguments})"]
        if tokens := features_of(pretrained.config, pretrained.path):
            lines.insert(2, "from ssl_bench.evaluate.readout import read_out_")
            lines += [f'read_out_(network, "{tokens}")']
        lines += [f"network.fc = torch.nn.Linear(network.dim, {classes})"] if classes else []
    call = "network.fc(network(images))" if classes and not resnet else "network(images)"
    lines += ['network.load_state_dict(load_file("model.safetensors"))']
    lines += [f"network.eval()  # {call}: {output}"]
    return "\n".join(lines)
