"""Weights from and for other programs. Keys are matched exactly, and the log says what was loaded.

Read: a run directory, a checkpoint of ours, a folder or file of stage=export, a zoo name, and any
file in which `networks` finds the backbone.
Written: the official MoCo layout (facebookresearch/moco, main_moco.py), which `main_lincls.py` and
the detection converter read; by stage=export the backbone's own names, which for a ResNet are
torchvision's and timm's.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
import yaml
from torch import Tensor, nn

from ssl_bench import files
from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.methods.moco import MoCo
from ssl_bench.runs import checkpoint, layout, networks, published
from ssl_bench.runs.identity import TIMM
from ssl_bench.runs.names import State

# key in the metadata of a safetensors file: the digest of its tensors and its other metadata
DIGEST = "ssl_bench.xxh3_128"
# file in the directory of a run that learns from labels: the names of its classes
CLASSES = "classes.json"
UNKNOWN = "backbone="
PATCHES = "conv_proj.weight"  # of our ViT, the tensor whose shape has the size of the patches


class Loaded(NamedTuple):
    """What was loaded from a file."""

    source: Path
    prefix: str  # what the names of the backbone's tensors begin with in the file
    num_tensors: int
    left_out: list[str]  # the other tensors of the dictionary that they are in
    remarks: list[str]  # whose names they have, why this network, what was adapted
    classifier: nn.Linear | None  # the one that the file has on top of the backbone
    pool: State  # of a `probe.AttentivePool` between the two; empty: there is none


def load_backbone(backbone: nn.Module, source: str, prefix: str | None = None) -> Loaded:
    """Fill every tensor of `backbone` from the file that `pretrained=source` means. UserError.

    prefix: `pretrained_prefix`, which of the networks in the file; None: as its authors choose.
    """
    path, wanted = find(source), backbone.state_dict()
    content = read(path)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, where a dictionary of tensors was expected"
        )
    if not wanted:
        raise UserError(f"pretrained={source}: this backbone has no tensors: leave it out")
    ours = {"run", "step", "model"} <= content.keys() and isinstance(content["model"], Mapping)
    if ours and prefix is None:
        which = "ema" if "ema" in content else "model"
        model = {k: v for k, v in measured(content).items() if str(k).startswith("backbone.")}
        found = networks.search({which: model}, wanted, alone=True)
    else:
        keys = backbone.classifier_keys() if hasattr(backbone, "classifier_keys") else ()
        found = networks.search(content, wanted, keys)
    if not found:
        begins = ", ".join([str(key) for key in content][:3])
        raise UserError(
            f"{path}: none of its tensors has a name of this backbone's (it begins with {begins}): "
            f"choose the {_backbone_of(source, path, content)} it was trained with, or another file"
        )
    if not found[0].fits:
        told = _backbone_of(source, path, content)
        mend = f"Choose the {told} it was trained with"
        if told == UNKNOWN and (patch := _patch_size(found[0], wanted)):
            mend = f"It was trained with other patches: type backbone.patch_size={patch}"
        raise UserError(f"pretrained={source}: {_differences(found[0], wanted)}. {mend}")
    try:
        network, why = networks.choose(found, prefix)
    except UserError as error:
        raise UserError(f"pretrained={source}: {error}") from None
    tensors, remarks = dict(network.tensors), []
    for key, value in tensors.items():
        dense = value.layout is torch.strided and not (value.is_meta or value.is_complex())
        kinds = value.is_floating_point(), wanted[key].is_floating_point()
        counts = key.endswith(networks.COUNTER)  # a number of steps, also where it is a float
        if not dense or (kinds[0] != kinds[1] and not counts):
            kind = (
                "meta" if value.is_meta else f"{value.layout}, {value.dtype}".replace("torch.", "")
            )
            raise UserError(
                f"pretrained={source}: its tensor {key} is {kind}, where {wanted[key].dtype} is "
                "wanted: choose another file"
            )
    if broken := [key for key in tensors if not tensors[key].isfinite().all()]:
        raise UserError(
            f"pretrained={source}: {len(broken)} of its tensors are not finite ({broken[0]}, ...): "
            "choose another file"
        )
    if network.spelling:
        remarks.append(f"its names are those of {network.spelling}")
    if why:
        others = " or ".join(one.typed for one in found if one is not network)
        remarks.append(f"it is {why}; pretrained_prefix={others} is another")
    if (heads := _heads(backbone)) and not _check_heads(network, heads, source, path):
        remarks.append(f"the file doesn't give the number of attention heads; using {heads}")
    if key := network.resized:
        was, now = tensors[key].shape[1], wanted[key].shape[1]
        tensors[key] = networks.interpolated(tensors[key], wanted[key], network.class_token)
        remarks.append(f"its {was} position embeddings are interpolated to {now}")
    absent = {key: torch.zeros_like(wanted[key]) for key in wanted if key not in tensors}
    if absent:
        remarks.append(f"it has no {networks.COUNTER}: they begin at 0")
    backbone.load_state_dict(tensors | absent)
    state, left_out = {} if network.is_of_a_method else network.beside, network.left_out
    if ours and network.prefix in ("model.backbone.", "ema.backbone."):
        state = content[network.prefix.partition(".")[0]]
        left_out = [key for key in state if not key.startswith("backbone.")]
    if ours and network.prefix == "ema.backbone.":
        remarks.append(
            "the averaged weights are taken (ema); "
            "pretrained_prefix=model.backbone takes the others"
        )
    pool = {key.removeprefix("pool."): state[key] for key in state if key.startswith("pool.")}
    return Loaded(path, network.prefix, len(tensors), left_out, remarks, _classifier(state), pool)


def measured(content: Mapping) -> State:
    """The tensors in a checkpoint that evaluations look at: those of `ema`, where it has them."""
    return content["ema" if "ema" in content else "model"]


def _differences(network: networks.Network, wanted: State) -> str:
    """In words, how the tensors of a file differ from those of the backbone."""
    kinds = {
        "missing": network.missing,
        "unexpected": network.unexpected,
        "of another shape": [
            f"{key}: {_shape(network.tensors[key])} in the file and {_shape(wanted[key])} here"
            for key in network.reshaped
        ],
    }
    said = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in kinds.items()
        if keys
    ]
    where = f" of {network.typed}" if network.prefix else ""
    count = len(network.tensors) + len(network.unexpected)
    text = f"its {count} tensors{where} are not this backbone's {len(wanted)}: {'; '.join(said)}"
    if network.wants_class_token and not network.class_token:
        text += "; it has no class token, which this backbone has"
    if "cls_token" in network.unexpected:
        text += "; it has a class token, which this backbone hasn't"
    return text


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _patch_size(network: networks.Network, wanted: State) -> int | None:
    """That of a file whose tensors are those of our ViT but for the size of its patches."""
    if network.missing or network.unexpected or network.reshaped != [PATCHES]:
        return None
    theirs, ours = network.tensors[PATCHES].shape, wanted[PATCHES].shape
    alike = len(theirs) == 4 and theirs[:2] == ours[:2] and theirs[2] == theirs[3]
    return theirs[2] if alike else None


def _heads(backbone: nn.Module) -> int | None:
    """The number of attention heads of a transformer, which no tensor's shape tells."""
    numbers = (getattr(module, "num_heads", None) for module in backbone.modules())
    return next((number for number in numbers if isinstance(number, int)), None)


def _check_heads(network: networks.Network, heads: int, source: str, path: Path) -> bool:
    """UserError if a transformer had another number of attention heads; False: it isn't known.

    It is known of our own runs and exports, and of the ViT-S of MoCo v3, in the authors' vits.py.
    """
    width = next((t.shape[-1] for t in network.tensors.values() if t.ndim == 3), 0)
    node = (recipe(path) or {}).get("backbone") or {}
    told = node.get("num_heads") or (node.get("options") or {}).get("num_heads")
    if not told and str(node.get("name")).startswith("vit_"):
        told = width // 64
    if network.has("base_encoder|momentum_encoder") and network.class_token and width == 384:
        told = 12
    if told and told != heads:
        raise UserError(
            f"pretrained={source}: it was trained with {told} attention heads, and this backbone "
            f"has {heads}: type backbone.num_heads={told}, or for backbone=timm "
            f"backbone.options={{num_heads:{told}}}"
        )
    return bool(told)


def unfilled(node: Mapping) -> dict:
    """The node of a backbone that a file will fill, without the weights that timm would fetch."""
    plain = {key: node[key] for key in node}
    return plain | {"pretrained": None} if "pretrained" in plain else plain


@contextmanager
def on_paper() -> Iterator[None]:
    """Networks made within it have shapes and no values, and what they say isn't logged."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            yield
    finally:
        logging.disable(before)


def fitting(content: object) -> str:
    """What to type for the first of our usual networks that a file fits; "": it fits none."""
    if not isinstance(content, Mapping):
        return ""
    for words, (_, state, keys) in _usual().items():
        found = networks.search(content, state, keys)
        if found and found[0].fits:
            return f"backbone={words}"
    return ""


def node_for(source: str, path: Path) -> dict[str, Any]:
    """The node of a backbone for the weights in a file that doesn't say which it is of. UserError.

    It is that of the zoo, or the first of our usual networks that the file fits.
    """
    known = published.WEIGHTS.get(source) or published.of(path)
    typed = f"backbone={known.backbone}" if known else fitting(read(path))
    words = typed.removeprefix("backbone=").split(" backbone.")
    # dinov2_small, and what fits nothing, isn't among the usual ones
    node, more = _usual().get(words[0], ({},))[0], (word.split("=") for word in words[1:])
    if not node:
        raise UserError(
            f"pretrained={source}: doesn't say which of our networks it is of: type a run or an "
            "export of stage=export, or timm:NAME"
        )
    options = {key: int(value) if value.isdecimal() else value for key, value in more}
    size = {"image_size": 28 * options["patch_size"]} if "patch_size" in options else {}
    return {"name": words[0], **node, **size, **options}


@cache
def _usual() -> dict[str, tuple[dict[str, Any], State, tuple[str, ...]]]:
    """{what to type: (its node, its tensors without values, how its classifier's begin)}."""
    depths, vits = (18, 34, 50, 101), ("tiny", "small", "base")
    kinds: dict[str, dict] = {f"resnet{depth}": {} for depth in depths}
    kinds |= {f"resnet{depth} backbone.stem=small": {"stem": "small"} for depth in depths}
    kinds |= {"resnet50x2": {"width": 128}, **{f"vit_{kind}": {"image_size": 224} for kind in vits}}
    for patch in (8, 14):
        size = {"image_size": 28 * patch, "patch_size": patch}
        kinds |= {f"vit_{kind} backbone.patch_size={patch}": size for kind in vits}
    found = {}
    for words, arguments in kinds.items():
        name = words.partition(" ")[0].removesuffix("x2")
        module = "vit" if name.startswith("vit") else "resnet"
        node = {"_target_": f"ssl_bench.backbones.{module}.{name}", **arguments}
        with torch.device("meta"):
            network = build.construct(node)
        keys = network.classifier_keys() if hasattr(network, "classifier_keys") else ()
        found[words] = node, network.state_dict(), keys
    return found


def _backbone_of(source: str, path: Path, content: object) -> str:
    """What to type for the backbone in the file, as far as it is known."""
    if known := published.WEIGHTS.get(source) or published.of(path):
        return f"backbone={known.backbone}"
    if not (node := (recipe(path) or {}).get("backbone")):
        return fitting(content) or UNKNOWN
    telling = ("stem", "width", "model", "image_size", "patch_size", "dim", "num_heads")
    words = [f"backbone.{key}={node[key]}" for key in telling if node.get(key) is not None]
    return " ".join([f"backbone={node.get('name')}", *words])


def find(source: str) -> Path:
    """The file that `pretrained=source` means. UserError."""
    return published.located(source) or published.fetch(source)


def with_teacher(method: Mapping) -> dict[str, dict]:
    """{"method": its node with the file and the digest of its teacher}; {}: it has none, or timm's.

    UserError for a teacher that isn't there, or isn't the one of `teacher_sha256`.
    """
    if (teacher := method.get("teacher")) is None or teacher.startswith(TIMM):
        return {}
    try:
        file = find(teacher)
    except UserError as error:
        said = str(error).replace("pretrained=", "method.teacher=", 1)
        raise UserError(f"{said}; timm:NAME is one of timm's") from None
    now, known = files.digest(file), method.get("teacher_sha256")
    if known not in (None, now):
        raise UserError(
            f"method.teacher={teacher} is another network than that of "
            f"method.teacher_sha256={known[:16]}...: put the file back, or leave the digest out"
        )
    return {"method": {**method, "teacher": str(file), "teacher_sha256": now}}


def read(path: Path) -> object:
    """The content of a file of weights; no code in it is run.

    UserError for a file that can't be read, or isn't what was written.
    """
    try:
        files.check(path)
        return _safetensors(path)[0] if path.suffix == ".safetensors" else checkpoint.read(path)
    except UserError as error:
        run = layout.run_of(path)
        older = [file for file in layout.complete(run) if file.name < path.name] if run else []
        if not older:
            raise
        step = f"step {layout.step_of(older[0]):,}"
        hint = f"the state before it, of {step}, is pretrained={older[0]}"
        raise UserError(f"{error}; {hint}") from None


def _safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """(tensors, metadata) of a file, compared with the digest that stage=export wrote into it."""
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
    """The metadata of a file, read once: the whole file is compared with its digest.

    state: `files.state` of the file, so that another file at its path is read again.
    """
    return _safetensors(path)[1]


def digest(state: State, text: str = "") -> str:
    """xxh3_128 of tensors with their names, types and shapes, and of a text."""
    whole = xxhash.xxh3_128(text.encode())
    for key, value in sorted(state.items()):
        whole.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        whole.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return whole.hexdigest()


def recipe(path: Path) -> dict | None:
    """The configuration of the run that made a file; None: not known.

    It is in the run's directory, or in the file itself if stage=export wrote it. An exported state
    dict holds tensors alone; there it is in the safetensors file of the same list of digests.
    """
    beside = path.with_suffix(".safetensors")
    listed = files.listed(path.parent) if path.suffix == ".pth" else {}
    if {path.name, beside.name} <= listed.keys() and beside.is_file():
        files.check(path)
        return recipe(beside)
    if path.suffix == ".safetensors":
        files.check(path)
        text = _metadata(path, files.state(path)).get("ssl_bench")
        return build.read_back(path, text, json.loads) if text else None
    run = layout.run_of(path)
    if not (run and (run / layout.CONFIG).is_file()):
        return None
    files.check(run / layout.CONFIG)
    return build.read_back(run / layout.CONFIG, (run / layout.CONFIG).read_bytes(), yaml.safe_load)


def look(path: Path) -> dict[str, list[float]]:
    """{"mean": ..., "std": ...} that images had when the network in a file was trained.

    A key is left out where it isn't known. UserError for impossible values.
    """
    if (theirs := published.of(path)) and theirs.std:
        return {"std": list(theirs.std)}
    node, known = (recipe(path) or {}).get("augmentation"), {}
    for key in ("mean", "std"):
        value = node.get(key) if isinstance(node, dict) else None
        if value is None:
            continue
        three = isinstance(value, list) and len(value) == 3
        numbers = three and all(isinstance(x, int | float) for x in value)
        if not numbers or (key == "std" and min(value) <= 0):
            raise UserError(
                f"{path}: its configuration has augmentation.{key}={value}, which can't be: mend it"
            )
        known[key] = value
    return known


def class_names(path: Path) -> list[str]:
    """The names of the outputs of the classifier in a file; [] where the classes have no names."""
    run = layout.run_of(path)
    if run and (run / CLASSES).is_file():
        known = files.parse(run / CLASSES, json.loads)
    else:
        known = recipe(path) or {}
    names = known.get("classes", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(
            f"{path}: the names of its classes are {str(names)[:40]}, no list of texts: mend it"
        )
    return names


def _classifier(state: Mapping) -> nn.Linear | None:
    """The linear classifier, weight (classes, dim), among the tensors of a file, or None.

    It is one of stage=lincls, finetune or export, or torchvision's. If features are standardised
    before it (stage.normalize=true), that is folded into its weights.
    """
    if not {"fc.weight", "fc.bias"} <= state.keys():
        return None
    weight, bias = state["fc.weight"].double(), state["fc.bias"].double()
    if "norm.running_var" in state:
        weight = weight * (state["norm.running_var"].double() + nn.BatchNorm1d(1).eps).rsqrt()
        bias = bias - weight @ state["norm.running_mean"].double()
    classifier = nn.Linear(weight.shape[1], weight.shape[0])
    classifier.load_state_dict({"weight": weight, "bias": bias})
    return classifier


def official_moco_state_dict(method: MoCo) -> State:
    """The `state_dict` of the authors' checkpoints.

    Its keys are module.encoder_q.*, module.encoder_k.* and module.queue*.
    """
    state = {f"module.{theirs}": value for theirs, value in _official_names(method)}
    return state | {"module.queue": method.queue.keys, "module.queue_ptr": method.queue.pointer}


def load_official_moco(method: MoCo, state_dict: State) -> None:
    """Fill a whole MoCo, both encoders and the queue, from the authors' `state_dict`.

    UserError unless every tensor fits.
    """
    wanted = official_moco_state_dict(method)
    wrong = sorted(wanted.keys() ^ state_dict.keys())
    shared = wanted.keys() & state_dict.keys()
    wrong += [key for key in shared if wanted[key].shape != state_dict[key].shape]
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
    """(the authors' name, tensor) of all but the queue."""
    modules = {
        "encoder_q.": method.backbone,
        "encoder_q.fc.": method.head,
        "encoder_k.": method.key_backbone,
        "encoder_k.fc.": method.key_head,
    }
    return [
        (prefix + key, value)
        for prefix, module in modules.items()
        for key, value in module.state_dict().items()
    ]
