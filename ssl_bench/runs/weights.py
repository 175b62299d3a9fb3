"""Weights from and for other programs. Keys are matched exactly, and what was loaded is said.

Read: a run directory, a checkpoint of ours, an official MoCo `.pth.tar`, a torchvision state dict,
a folder or file of stage=export, a zoo name.
Written: the official MoCo layout (facebookresearch/moco, main_moco.py), which `main_lincls.py` and
the detection converter read; and by stage=export the backbone's own names, which for a ResNet are
torchvision's and timm's.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
import yaml
from torch import Tensor, nn

from ssl_bench import files
from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.methods.moco import MoCo
from ssl_bench.runs import checkpoint, layout, published

State = dict[str, Tensor]
# in the metadata of a safetensors file: of its tensors, and what else it says
DIGEST = "ssl_bench.xxh3_128"
# in the directory of a run that learns from labels: the names of its classes
CLASSES = "classes.json"


class Loaded(NamedTuple):
    source: Path
    layout: str  # how the file names things
    num_tensors: int
    left_out: list[str]  # tensors of the file that are not the backbone's


def load_backbone(backbone: nn.Module, source: str) -> Loaded:
    """Fill `backbone` from `source`, every tensor of it or an error. Returns what was read."""
    path, wanted = find(source), backbone.state_dict()
    state, layout, prefix = _backbone_state(read(path), path, wanted)
    found = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    # fc: a classifier or projection of the authors', of torchvision, of stage=export
    if layout != "ssl_bench":
        beside = (
            "fc.",
            *(backbone.classifier_keys() if hasattr(backbone, "classifier_keys") else ()),
        )
        found = {
            key: value
            for key, value in found.items()
            if key in wanted or not key.startswith(beside)
        }
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    reshaped = [key for key in wanted if key in found and wanted[key].shape != found[key].shape]
    if missing or unexpected or reshaped:
        differences = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for keys, what in (
                (missing, "missing"),
                (unexpected, "unexpected"),
                (reshaped, "of another shape"),
            )
            if keys
        ]
        raise UserError(
            f"pretrained={source}: its {len(found)} tensors are not this backbone's {len(wanted)}: "
            f"{'; '.join(differences)}. Choose the {_backbone_of(source, path)} it was trained with"
        )
    broken = [key for key in wanted if not found[key].isfinite().all()]
    if broken:
        raise UserError(
            f"pretrained={source}: {len(broken)} of its tensors are not finite ({broken[0]}, ...): "
            "choose another file"
        )
    backbone.load_state_dict(found)
    return Loaded(
        path, layout, len(found), [key for key in state if key.removeprefix(prefix) not in found]
    )


def _backbone_of(source: str, path: Path) -> str:
    """What to type for the backbone of the file, as far as it is known."""
    if source in published.WEIGHTS:
        return f"backbone={published.WEIGHTS[source].backbone}"
    if not (node := (recipe(path) or {}).get("backbone")):
        return "backbone="
    telling = ("stem", "width", "model", "image_size", "patch_size")
    words = [f"backbone.{key}={node[key]}" for key in telling if key in node]
    return " ".join([f"backbone={node.get('name')}", *words])


def find(source: str) -> Path:
    """The file that `pretrained=source` means."""
    path = Path(source)
    if file := layout.weights_of(path):
        return file
    if path.is_dir():
        raise UserError(
            f"pretrained={source}: no checkpoint in this directory; give a run directory or a file"
        )
    if source in published.WEIGHTS:
        return published.fetch(source)
    raise UserError(
        f"pretrained={source}: no such file or run directory, nor one of the known weights: "
        f"{', '.join(published.WEIGHTS)}"
    )


def read(path: Path) -> object:
    """What is in the file; no code in it is run. UserError where it can't be read, or isn't what
    was written.
    """
    try:
        files.check(path)
        return _safetensors(path)[0] if path.suffix == ".safetensors" else checkpoint.read(path)
    except UserError as error:
        run = layout.run_of(path)
        older = [file for file in layout.complete(run) if file.name < path.name] if run else []
        hint = (
            f"; the state before it, of step {layout.step_of(older[0]):,}, is pretrained={older[0]}"
            if older
            else ""
        )
        raise UserError(f"{error}{hint}") from None


def _safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """(tensors, metadata) of the file, compared with the digest that stage=export wrote into it."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: truncated, or not a safetensors file ({error})") from None
    if DIGEST in metadata and metadata[DIGEST] != digest(state, metadata.get("ssl_bench", "")):
        raise UserError(
            f"{path}: damaged: its tensors aren't those that were written; export or copy it again"
        )
    return state, metadata


@cache
def _metadata(path: Path, state: tuple[int, ...]) -> dict[str, str]:
    """Asked for several times by one command; all of the file is read to compare it."""
    return _safetensors(path)[1]


def digest(state: State, text: str = "") -> str:
    """xxh3_128 of tensors, as they are on the CPU, with their names, and of a text: changed by a
    flipped bit of any.
    """
    whole = xxhash.xxh3_128(text.encode())
    for key, value in sorted(state.items()):
        whole.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        whole.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return whole.hexdigest()


def recipe(path: Path) -> dict | None:
    """The configuration of the run that made the file: from the run's directory, or from a file of
    stage=export.

    The state dict of an export holds tensors alone; the file beside it, of the same list of
    digests, has the rest.
    """
    beside = path.with_suffix(".safetensors")
    if (
        path.suffix == ".pth"
        and {path.name, beside.name} <= files.listed(path.parent).keys()
        and beside.is_file()
    ):
        files.check(path)
        return recipe(beside)
    if path.suffix == ".safetensors":
        files.check(path)
        text = _metadata(path, files.state(path)).get("ssl_bench")
        return build.read_back(path, text, json.loads) if text else None
    run = layout.run_of(path)
    if not (run and (run / "config.yaml").is_file()):
        return None
    files.check(run / "config.yaml")
    return build.read_back(run / "config.yaml", (run / "config.yaml").read_bytes(), yaml.safe_load)


def look(path: Path) -> dict[str, list[float]]:
    """The mean and std that images had when the file's network was trained, as far as that is
    known.
    """
    node, said = (recipe(path) or {}).get("augmentation"), {}
    for key in ("mean", "std"):
        value = node.get(key) if isinstance(node, dict) else None
        if value is not None:
            numbers = (
                isinstance(value, list)
                and len(value) == 3
                and all(isinstance(x, int | float) for x in value)
            )
            if not numbers or (key == "std" and min(value) <= 0):
                raise UserError(
                    f"{path}: its configuration has augmentation.{key}={value}, which can't be: "
                    "mend it"
                )
            said[key] = value
    return said


def class_names(path: Path) -> list[str]:
    """Of the outputs of the classifier in the file, in their order; nothing where the classes have
    no names.
    """
    run = layout.run_of(path)
    known = (
        files.parse(run / CLASSES, json.loads)
        if run and (run / CLASSES).is_file()
        else recipe(path) or {}
    )
    names = known.get("classes", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(
            f"{path}: the names of its classes are {str(names)[:40]}, no list of texts: mend it"
        )
    return names


def load_classifier(source: str) -> nn.Linear | None:
    """The linear classifier (classes, dim) in a file of stage=lincls, finetune or export, or in a
    torchvision file.

    Where its features are standardised first (stage.normalize=true), that is folded into its
    weights.
    """
    content = read(find(source))
    state = (
        content.get("model", content.get("state_dict", content))
        if isinstance(content, Mapping)
        else {}
    )
    if not {"fc.weight", "fc.bias"} <= state.keys():
        return None
    weight, bias = state["fc.weight"].double(), state["fc.bias"].double()
    if "norm.running_var" in state:
        weight = weight * (state["norm.running_var"].double() + nn.BatchNorm1d(1).eps).rsqrt()
        bias = bias - weight @ state["norm.running_mean"].double()
    classifier = nn.Linear(weight.shape[1], weight.shape[0])
    classifier.load_state_dict({"weight": weight, "bias": bias})
    return classifier


def _backbone_state(content: object, path: Path, wanted: State) -> tuple[State, str, str]:
    """(tensors, layout, prefix of the backbone's keys). wanted: the backbone's own."""
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, where a dictionary of tensors was expected"
        )
    ours = "model" in content and "step" in content
    state = content["model"] if ours else content.get("state_dict", content)
    keys = [str(key) for key in (state if isinstance(state, Mapping) else content)]
    plain = isinstance(state, Mapping) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    )
    if plain:
        if ours:
            return state, "ssl_bench", "backbone."
        if any(key.startswith("module.encoder_q.") for key in keys):
            return state, "official MoCo", "module.encoder_q."
        if "conv1.weight" in keys:
            return state, "torchvision", ""
        if wanted and wanted.keys() <= state.keys():
            return state, "plain", ""
    raise UserError(
        f"{path}: unknown layout (first keys: {', '.join(keys[:3])}); expected a checkpoint of "
        "ssl_bench, an official MoCo file (module.encoder_q.*) or a torchvision state dict "
        "(conv1.weight, ...)"
    )


def official_moco_state_dict(method: MoCo) -> State:
    """The `state_dict` entry of the authors' checkpoints: module.encoder_q.*, module.encoder_k.*,
    module.queue*.
    """
    state = {f"module.{theirs}": value for theirs, value in _official_names(method)}
    return state | {"module.queue": method.queue.keys, "module.queue_ptr": method.queue.pointer}


def load_official_moco(method: MoCo, state_dict: State) -> None:
    """Fill a whole MoCo, both encoders and the queue, from the authors' `state_dict`; ValueError
    unless all fits.
    """
    wanted = official_moco_state_dict(method)
    wrong = sorted(wanted.keys() ^ state_dict.keys())
    wrong += [
        key
        for key in wanted.keys() & state_dict.keys()
        if wanted[key].shape != state_dict[key].shape
    ]
    if wrong:
        raise UserError(
            f"not this method's official state: {len(wrong)} tensors are missing, unexpected or of "
            f"another shape ({', '.join(wrong[:5])}): check backbone, method.mlp, method.dim and "
            "method.queue_size"
        )
    with torch.no_grad():
        for key, value in wanted.items():  # these are the method's own tensors, not copies
            value.copy_(state_dict[key])


def _official_names(method: MoCo) -> list[tuple[str, Tensor]]:
    pairs = {
        "encoder_q.": method.backbone,
        "encoder_q.fc.": method.head,
        "encoder_k.": method.key_backbone,
        "encoder_k.fc.": method.key_head,
    }
    return [
        (prefix + key, value)
        for prefix, module in pairs.items()
        for key, value in module.state_dict().items()
    ]
