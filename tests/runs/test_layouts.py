"""Any backbone file in: every layout is loaded whole, with the features of the network that wrote
it; what is another network is refused.
"""

import argparse
import pathlib
import re
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from compared import features, images, same
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    DIM,
    LAYOUTS,
    LIGHTLY,
    State,
    below,
    fill,
    filled,
    head,
    numbered,
    small_resnet,
    small_vit,
    table,
    timm_names,
    without_counters,
)
from omegaconf import OmegaConf
from torch import Tensor, nn

from ssl_bench.backbones import resnet, vit
from ssl_bench.errors import UserError
from ssl_bench.runs import names, networks
from ssl_bench.runs.checkpoint import Checkpoint
from ssl_bench.runs.weights import Loaded, load_backbone

HUGGING_FACE = Path(__file__).parent / "hugging_face.npz"


def saved(content: object, folder: Path) -> str:
    torch.save(content, folder / "x.pth")
    return str(folder / "x.pth")


def refused(backbone: nn.Module, content: object, folder: Path, prefix: str | None = None) -> str:
    """The line that refuses a file; the backbone stays as it was."""
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_backbone(backbone, saved(content, folder), prefix)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    return str(caught.value)


# --- the table of layouts -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout(tmp_path: Path, name: str) -> None:
    """All tensors, and the features of the network that is meant, of each of several in a file."""
    layout = LAYOUTS[name]
    meant, other, ours = (
        filled(layout.backbone()),
        filled(layout.backbone(), "2"),
        layout.backbone(),
    )
    path = saved(layout.content(meant.state_dict(), other.state_dict()), tmp_path)
    loaded = load_backbone(ours, path)
    assert loaded.prefix.rstrip(".") == layout.prefix
    expected = meant.state_dict()
    if any("num_batches_tracked" in remark for remark in loaded.remarks):
        assert loaded.num_tensors == len(without_counters(expected))
        expected = without_counters(expected)
    else:
        assert loaded.num_tensors == len(expected)
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in expected.items())
    assert torch.equal(features(ours), features(meant))
    assert layout.chosen in " ".join(loaded.remarks)
    assert bool(layout.chosen) == any("pretrained_prefix=" in one for one in loaded.remarks)
    for typed in re.findall(r"pretrained_prefix=(\S+)", " ".join(loaded.remarks)):
        assert load_backbone(ours, path, typed).prefix == f"{typed}."
        assert torch.equal(features(ours), features(other))
        load_backbone(ours, path, layout.prefix)
        assert torch.equal(features(ours), features(meant))


def test_the_documentation_has_this_table() -> None:
    """`python tests/layouts.py` prints it."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "load.md").read_text()
    assert (
        text.partition("<!-- layouts -->\n")[2].partition("<!-- end of layouts -->")[0] == table()
    )


# --- networks of other libraries ------------------------------------------------------------------


def hugging_face_resnet(backbone: nn.Module) -> State:
    found = {}
    for key, value in backbone.state_dict().items():
        key = re.sub(r"^conv1\.", "embedder.embedder.convolution.", key)
        key = re.sub(r"^bn1\.", "embedder.embedder.normalization.", key)
        key = re.sub(
            r"^layer(\d)\.(\d)",
            lambda of: f"encoder.stages.{int(of[1]) - 1}.layers.{of[2]}",
            key,
        )
        for kind, theirs in (("conv", "convolution"), ("bn", "normalization")):
            key = re.sub(rf"\.{kind}(\d)\.", lambda of: f".layer.{int(of[1]) - 1}.{theirs}.", key)  # noqa: B023
        key = key.replace("downsample.0", "shortcut.convolution")
        key = key.replace("downsample.1", "shortcut.normalization")
        found[key] = fill(key, value)
    return found


BLOCK = {
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
SINCE_5 = {".output.dense.": ".o_proj.", ".attention.": "."}  # the names of transformers 5


def hugging_face_vit(backbone: nn.Module, block: dict[str, str]) -> State:
    """block: timm's names in a block, and theirs."""
    found: State = {}
    for key, value in timm_names(backbone.state_dict()).items():
        key = re.sub(r"^(cls_token)$", r"embeddings.\1", key)
        key = key.replace("pos_embed", "embeddings.position_embeddings")
        key = key.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        key = re.sub(r"^norm\.", "layernorm.", key).replace("blocks.", "encoder.layer.")
        for ours, theirs in block.items():
            key = key.replace(ours, theirs)
        if ".attn.qkv." in key:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                name = key.replace(".attn.qkv.", f".attention.attention.{part}.")
                found[name] = fill(name, piece)
        else:
            found[key] = fill(key, value)
    return found


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit"])
def test_hugging_face(tmp_path: Path, name: str) -> None:
    """hugging_face.npz: what ResNetModel (pooler_output) and ViTModel (last_hidden_state of the
    class token) of transformers 5.24 make of `images()` with the tensors of `fill`, as they read
    them from a file of the names that they write.
    """
    backbone = vit.vit_tiny(32) if name == "vit" else getattr(resnet, name)(width=8)
    named = partial(hugging_face_vit, block=BLOCK) if name == "vit" else hugging_face_resnet
    state = named(backbone)
    with np.load(HUGGING_FACE) as known:
        expected = torch.from_numpy(known[name])
    for prefix in ("", "vit.", "resnet."):
        loaded = load_backbone(backbone, saved(below(prefix, state) | head("classifier"), tmp_path))
        assert loaded.num_tensors == len(backbone.state_dict())
        assert "its names are those of Hugging Face" in loaded.remarks
        torch.testing.assert_close(features(backbone), expected, rtol=1e-4, atol=1e-4)


def test_hugging_face_dinov2(tmp_path: Path) -> None:
    """A network with scaled layers: of timm."""
    make = pytest.importorskip("timm").create_model
    backbone = make("vit_tiny_patch16_224", img_size=32, init_values=1e-5, num_classes=0)
    own = {key: value for key, value in BLOCK.items() if "mlp" not in key and "norm" not in key}
    state = hugging_face_vit(backbone, own | {".ls1.gamma": ".layer_scale1.lambda1"})
    state = {k.replace(".ls2.gamma", ".layer_scale2.lambda1"): v for k, v in state.items()}
    state = {key: fill(key, value) for key, value in state.items()}
    state["embeddings.mask_token"] = torch.zeros(1, 192)
    load_backbone(backbone, saved(state, tmp_path))
    with np.load(HUGGING_FACE) as known:
        expected = torch.from_numpy(known["dinov2"])
    torch.testing.assert_close(features(backbone), expected, rtol=1e-4, atol=1e-4)


def test_the_names_of_transformers_5_in_memory(tmp_path: Path) -> None:
    """torch.save of a state dict writes these; save_pretrained the older ones."""
    ours, state = small_vit(), {}
    for key, value in hugging_face_vit(small_vit(), BLOCK).items():
        key = re.sub(r"encoder\.layer\.(\d+)", r"layers.\1", key)
        key = re.sub(r"attention\.attention\.(q|k|v)\w+\.", r"attention.\1_proj.", key)
        key = key.replace("attention.output.dense.", "attention.o_proj.")
        key = key.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        state[f"vit.{key}"] = value
    assert "vit.layers.0.attention.q_proj.weight" in state
    assert "vit.layers.11.mlp.fc2.bias" in state
    load_backbone(ours, saved(state, tmp_path))
    again = small_vit()
    load_backbone(again, saved(hugging_face_vit(small_vit(), BLOCK), tmp_path))
    assert same(ours, again)


@pytest.mark.parametrize("tokens", ["learned", "sincos"])
def test_a_vit_of_timm_is_ours(tmp_path: Path, tokens: str) -> None:
    """DINO's and MoCo v3's authors have timm's network and names."""
    make = pytest.importorskip("timm").create_model
    theirs = filled(make("vit_tiny_patch16_224", img_size=32, num_classes=7))
    ours = vit.vit_tiny(32, positions=tokens)
    loaded = load_backbone(ours, saved(theirs.state_dict(), tmp_path))
    assert loaded.left_out == ["head.weight", "head.bias"]
    theirs.reset_classifier(0)
    torch.testing.assert_close(features(ours), features(theirs), rtol=1e-4, atol=1e-4)
    back = make("vit_tiny_patch16_224", img_size=32, num_classes=0)  # and ours is timm's
    load_backbone(back, saved(ours.state_dict(), tmp_path))
    assert torch.equal(features(back), features(theirs))


def test_a_numbered_file_in_any_order(tmp_path: Path) -> None:
    """safetensors sorts the names; 10 comes before 2 there."""
    from safetensors.torch import save_file

    network, ours = filled(small_resnet()), small_resnet()
    numbers = {child: number * 2 for child, number in LIGHTLY.items()}
    state = below("net.", numbered(network.state_dict(), numbers))
    assert {key.split(".")[1] for key in state} == {"0", "2", "8", "10", "12", "14"}
    save_file(state, tmp_path / "x.safetensors")
    assert load_backbone(ours, str(tmp_path / "x.safetensors")).prefix == "net."
    assert same(ours, network)


def test_wrappers_in_the_midst(tmp_path: Path) -> None:
    """torch.compile of a part, activations that are computed again, FSDP."""
    network, ours = filled(small_resnet()), small_resnet()
    state = {
        key.replace("layer2.", "layer2._orig_mod.").replace(
            "layer3.0.", "layer3.0._checkpoint_wrapped_module."
        ): value
        for key, value in network.state_dict().items()
    }
    load_backbone(ours, saved(below("_fsdp_wrapped_module.", state), tmp_path))
    assert same(ours, network)


# --- what is another network is refused -----------------------------------------------------------


def state_of(network: nn.Module) -> State:
    return network.state_dict()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("layer3.2.conv1.weight", "1 unexpected (layer3.2.conv1.weight)"),
        ("layer5.0.conv1.weight", "1 unexpected (layer5.0.conv1.weight)"),
        ("layer1.0.se.fc.weight", "1 unexpected (layer1.0.se.fc.weight)"),
        ("bn0.weight", "1 unexpected (bn0.weight)"),
        ("attention_pool.query", "1 unexpected (attention_pool.query)"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_a_deeper_network(tmp_path: Path, extra: str, says: str, prefix: str) -> None:
    state = below(prefix, state_of(small_resnet()) | head("fc") | {extra: torch.zeros(1)})
    assert says in refused(small_resnet(), {"state_dict": state}, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: s | {"register_tokens": torch.zeros(1, 4, DIM)},
            "1 unexpected (register_tokens",
        ),
        (lambda s: s | {"dist_token": torch.zeros(1, 1, DIM)} | head("head_dist"), "(dist_token)"),
        (lambda s: s | {"blocks.12.norm1.weight": torch.zeros(DIM)}, "(blocks.12.norm1.weight)"),
        (lambda s: {k: v for k, v in s.items() if k != "cls_token"}, "1 missing (class_token)"),
        (
            lambda s: (
                {k: v for k, v in s.items() if k != "cls_token"}
                | {"pos_embed": s["pos_embed"][:, 1:]}
            ),
            "it has no class token, which this backbone has",
        ),
        (
            lambda s: s | {"pos_embed": torch.zeros(1, 7, DIM)},
            "1 of another shape (encoder.pos_emb",
        ),
        (
            lambda s: s | {"patch_embed.proj.weight": torch.zeros(DIM, 3, 8, 8)},
            "(conv_proj.weight: 24x3x8x8 in the file and 24x3x16x16 here). It was trained with "
            "other patches: type backbone.patch_size=8",
        ),
    ],
    ids=["registers", "distilled", "deeper", "no token", "positions alone", "no square", "patches"],
)
def test_another_vit(tmp_path: Path, change: Callable[[State], State], says: str) -> None:
    state = timm_names(state_of(small_vit()))
    assert says in refused(small_vit(), {"teacher": below("backbone.", change(state))}, tmp_path)


def test_a_class_token_that_a_backbone_lacks(tmp_path: Path) -> None:
    make = pytest.importorskip("timm").create_model
    options = {"img_size": 32, "num_classes": 0, "class_token": False, "global_pool": "avg"}
    backbone = make("vit_tiny_patch16_224", fc_norm=False, **options)
    said = refused(backbone, timm_names(state_of(small_vit())), tmp_path)
    assert said.partition(". Choose")[0].endswith(
        "it has a class token, which this backbone hasn't"
    )


def test_a_numbered_file_of_another_network(tmp_path: Path) -> None:
    state = numbered(state_of(small_resnet()), LIGHTLY)
    refused(small_resnet(), state | head("9"), tmp_path)  # a child more
    swapped = {"conv1": 1, "bn1": 0, **{f"layer{i}": i + 3 for i in range(1, 5)}}
    refused(small_resnet(), numbered(state_of(small_resnet()), swapped), tmp_path)
    exchanged = LIGHTLY | {"layer2": 6, "layer3": 5}
    refused(small_resnet(), numbered(state_of(small_resnet()), exchanged), tmp_path)


WORDS = st.sampled_from(["state_dict", "model", "module", "net", "_orig_mod", "0", "conv1", "fc"])
HEADS = ["fc.weight", "head.bias", "projection_head.0.weight", "prototypes.weight", "queue_ptr"]
OTHERS = [
    "layer4.2.bn1.bias",
    "layer5.0.conv1.weight",
    "ln_pre.weight",
    "register_tokens",
    "bn2.bias",
]


@given(
    outer=st.lists(WORDS, max_size=3),
    inner=st.lists(WORDS, max_size=3),
    heads=st.sets(st.sampled_from(HEADS)),
    other=st.none() | st.sampled_from(OTHERS),
    dropped=st.none() | st.sampled_from([*without_counters(small_resnet().state_dict())]),
)
@settings(max_examples=20)
def test_any_prefix(
    outer: list[str], inner: list[str], heads: set[str], other: str | None, dropped: str | None
) -> None:
    """Whatever dictionaries and modules it lies in, a network is found; another one isn't."""
    state, prefix = state_of(small_resnet()), "".join(f"{word}." for word in inner)
    beside = {key: torch.zeros(1) for key in [*heads, *([other] if other else [])]}
    content: dict = {"epoch": 3, **below(prefix, state | beside)}
    content.pop(f"{prefix}{dropped}", None)
    for word in reversed(outer):
        content = {word: content, "optimizer": {"state": {0: torch.zeros(1)}}, "lr": 0.1}
    (found,) = networks.search(content, state)
    assert found.fits == (not other and not dropped)
    if found.fits:
        expected = "".join(f"{word}." for word in outer) + prefix.replace("_orig_mod.", "")
        assert found.prefix == expected
        assert all(found.tensors[key] is value for key, value in state.items())
        assert found.beside.keys() == heads
    else:
        assert (found.unexpected == [other]) == bool(other)
        assert (found.missing == [dropped]) == bool(dropped)


def test_of_several_the_user_chooses(tmp_path: Path) -> None:
    one, two, ours = filled(small_resnet()), filled(small_resnet(), "2"), small_resnet()
    content = {"left": below("net.", state_of(one)), "right": {"a": state_of(two)}}
    assert refused(small_resnet(), content, tmp_path).endswith(
        "holds 2 networks that fit, left.net, right.a: type pretrained_prefix=left.net"
    )
    for prefix, network in (("left.net", one), ("right.a", two)):
        assert load_backbone(ours, saved(content, tmp_path), prefix).prefix == f"{prefix}."
        assert same(ours, network)
    for prefix in ("left", "a", "net", "left.net."):
        said = refused(small_resnet(), content, tmp_path, prefix)
        assert said.endswith(
            f"pretrained_prefix={prefix}: no network of this backbone there; type left.net, right.a"
        )
    root = state_of(one) | {"copy": state_of(two)}
    assert "networks that fit, ., copy: type pretrained_prefix=." in refused(
        small_resnet(), root, tmp_path
    )
    load_backbone(ours, saved(root, tmp_path), ".")
    assert same(ours, one)


def test_the_same_network_twice_is_one(tmp_path: Path) -> None:
    network, ours = filled(small_resnet()), small_resnet()
    content = {"a": state_of(network), "b": {k: v.clone() for k, v in state_of(network).items()}}
    assert load_backbone(ours, saved(content, tmp_path)).prefix == "a."
    assert load_backbone(ours, saved(content, tmp_path), "b").num_tensors == len(state_of(ours))


def test_our_own_checkpoints_are_read_by_one_name(tmp_path: Path) -> None:
    """And any other network of theirs by its prefix."""
    one, two, ours = filled(small_resnet()), filled(small_resnet(), "2"), small_resnet()
    model = below("backbone.", state_of(one)) | below("key_backbone.", state_of(two))
    content = {"run": "x", "step": 3, "model": model}
    loaded = load_backbone(ours, saved(content, tmp_path))
    assert (loaded.prefix, loaded.remarks) == ("model.backbone.", [])
    assert same(ours, one)
    load_backbone(ours, saved(content, tmp_path), "model.key_backbone")
    assert same(ours, two)


def test_moco_v3_has_a_vit_of_twelve_heads(tmp_path: Path) -> None:
    """Shapes don't tell: with six, all tensors would fit and the features be wrong."""
    network = vit.vit_small(16, num_heads=12)
    state = below("module.base_encoder.", timm_names(state_of(network)))
    path = saved({"state_dict": state}, tmp_path)
    with pytest.raises(
        UserError, match=r"12 attention heads, and this backbone has 6: type backbone\.num"
    ):
        load_backbone(vit.vit_small(16), path)
    ours = vit.vit_small(16, num_heads=12)
    load_backbone(ours, path)
    assert same(ours, network)
    loaded = load_backbone(ours, saved({"model": timm_names(state_of(network))}, tmp_path))
    assert "the file doesn't give the number of attention heads; using 12" in loaded.remarks


# --- position embeddings of another size ----------------------------------------------------------


@pytest.mark.parametrize(("was", "now"), [(64, 32), (32, 64), (224, 96)])
def test_positions_are_interpolated(tmp_path: Path, was: int, now: int) -> None:
    theirs, ours = filled(small_vit(was)), small_vit(now)
    loaded = load_backbone(ours, saved(timm_names(state_of(theirs)), tmp_path))
    sizes = [(size // 16) ** 2 + 1 for size in (was, now)]
    assert f"its {sizes[0]} position embeddings are interpolated to {sizes[1]}" in loaded.remarks
    before, after = (one.encoder.pos_embedding for one in (theirs, ours))
    assert torch.equal(before[:, 0], after[:, 0])
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    torch.testing.assert_close(after, resample(before, [now // 16] * 2, num_prefix_tokens=1))
    rest = state_of(theirs) | {"encoder.pos_embedding": after}
    assert all(torch.equal(value, rest[key]) for key, value in state_of(ours).items())


def test_positions_without_a_class_token() -> None:
    one = torch.rand(1, 16, 8)
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    ours = networks.interpolated(one, torch.empty(1, 4, 8), class_token=False)
    torch.testing.assert_close(ours, resample(one, [2, 2], num_prefix_tokens=0))


# --- settings beside the tensors ------------------------------------------------------------------


class Stranger:
    """A class of another program."""

    made = 0

    def __init__(self) -> None:
        Stranger.made += 1
        self.history = [1, 2]

    def __setstate__(self, state: dict) -> None:
        Stranger.made += 1


def pretending(monkeypatch: pytest.MonkeyPatch, module: str, name: str, base: type) -> type:
    """A class of that name and module, as a package has it that isn't installed here."""
    made = type(name, (base,), {"__module__": module})
    for end in (at for at, char in enumerate(f"{module}.") if char == "."):
        monkeypatch.setitem(sys.modules, module[:end], types.ModuleType(module[:end]))
    setattr(sys.modules[module], name, made)
    return made


def test_settings_of_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of their classes is made, whether it is here or not."""
    module = "mmengine.logging.history_buffer"
    history = pretending(monkeypatch, module, "HistoryBuffer", Stranger)()
    settings = pretending(monkeypatch, "lightning_fabric.utilities.data", "AttributeDict", dict)(
        lr=0.1
    )
    Stranger.made = 0
    beside = {
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(out=pathlib.Path("/x"))),
        "conf": OmegaConf.create({"lr": 0.1, "names": ["a", "b"], "none": None, "on": True}),
        "best": np.float64(0.3),
        "random": ("MT19937", np.arange(5)),
        "losses": defaultdict(list, {"loss": [0.1]}),
        "message_hub": {"history": history},
        "hyper_parameters": settings,
    }
    network, ours = filled(small_resnet()), small_resnet()
    path = saved({"model": state_of(network), **beside}, tmp_path)
    for name in [key for key in sys.modules if key.startswith(("mmengine", "lightning_fabric"))]:
        monkeypatch.delitem(sys.modules, name)
    load_backbone(ours, path)
    assert same(ours, network)
    assert Stranger.made == 0


class Runs:
    """What a file must not do."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __reduce__(self) -> tuple:
        return self.function, ("ran",)


@pytest.mark.parametrize("function", [print, eval, getattr, pathlib.os.system, Stranger])
def test_anything_else_is_refused(
    tmp_path: Path, function: Callable, capfd: pytest.CaptureFixture
) -> None:
    content = {"model": state_of(small_resnet()), "args": Runs(function)}
    said = refused(small_resnet(), content, tmp_path)
    assert "which would have to be run to be read: save tensors and plain data alone" in said
    assert not re.search("truncated|whole model", said)
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize("wrap", [lambda whole: whole, lambda whole: {"model": whole}])
def test_a_whole_model_is_told_from_a_truncated_file(
    tmp_path: Path, wrap: Callable[[nn.Module], object]
) -> None:
    said = refused(small_resnet(), wrap(torchvision.models.resnet18()), tmp_path)
    assert (
        "holds a whole model (torchvision.models.resnet.ResNet), which would have to be run to be "
        "read: save model.state_dict() instead" in said
    )


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_model_is_a_whole_one(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "model.pth"))
    with pytest.raises(UserError, match=r"holds a whole model \(TorchScript\), .*state_dict"):
        load_backbone(small_resnet(), str(tmp_path / "model.pth"))


# --- the classifier on top ------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod.", "encoder."])
def test_a_classifier_is_found_below_the_same_prefix(tmp_path: Path, prefix: str) -> None:
    state = below(prefix, state_of(small_resnet()) | head("fc"))
    loaded: Loaded = load_backbone(small_resnet(), saved({"state_dict": state}, tmp_path))
    assert loaded.classifier is not None
    assert loaded.classifier.weight.shape == (8, 64)


# --- the parts ------------------------------------------------------------------------------------


def test_a_tensor_in_pieces_is_put_together() -> None:
    parts: dict[str, Tensor] = {
        f"encoder.layer.0.attention.attention.{name}.bias": torch.full((2,), float(number))
        for number, name in enumerate(("query", "key", "value"))
    }
    (spelling,) = (one for one in names.SPELLINGS if one.whose == "Hugging Face")
    found = names.respelt(dict(reversed(parts.items())), spelling)
    assert list(found) == ["blocks.0.attn.qkv.bias"]
    assert found["blocks.0.attn.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]
    del parts["encoder.layer.0.attention.attention.key.bias"]
    assert names.respelt(parts, spelling) == {}


def test_images_of_the_reference() -> None:
    """hugging_face.npz is of these."""
    assert images().shape == (2, 3, 32, 32)


# --- what to type instead -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (resnet.resnet34, "resnet34"),
        (lambda: resnet.resnet18(stem="small"), "resnet18 backbone.stem=small"),
        (lambda: vit.vit_small(32), "vit_small"),
        (lambda: vit.vit_tiny(32, 8), "vit_tiny backbone.patch_size=8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_network_that_a_file_fits_is_told(tmp_path: Path, make: Callable, words: str) -> None:
    content = {"student": {"module": {}}, "teacher": below("backbone.", state_of(make()))}
    said = refused(small_resnet(), content, tmp_path)
    assert f"hoose the backbone={words} it was trained with" in said


def test_our_own_vits_say_how_many_heads_they_have(tmp_path: Path) -> None:
    """Of a run, which keeps its configuration."""
    checkpoint = Checkpoint(tmp_path, "run")
    checkpoint.save(1, model=nn.ModuleDict({"backbone": vit.vit_tiny(32, num_heads=6)}))
    node = {"name": "vit_tiny", "_target_": "x", "num_heads": 6, "image_size": 32}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"backbone": node}))
    with pytest.raises(UserError, match="trained with 6 attention heads, and this backbone has 3"):
        load_backbone(vit.vit_tiny(32), str(tmp_path))
    assert load_backbone(vit.vit_tiny(32, num_heads=6), str(tmp_path)).remarks == []
    del node["num_heads"]  # as in runs from before there was a choice
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"backbone": node}))
    assert load_backbone(vit.vit_tiny(32), str(tmp_path)).remarks == []
    with pytest.raises(UserError, match="trained with 3 attention heads, and this backbone has 6"):
        load_backbone(vit.vit_tiny(32, num_heads=6), str(tmp_path))


@pytest.mark.parametrize("kind", ["sparse", "meta", "int8", "complex64"])
def test_tensors_of_another_kind_are_refused(tmp_path: Path, kind: str) -> None:
    network = resnet.resnet18(stem="small", width=8)
    change = {
        "sparse": lambda x: x.to_sparse(),
        "meta": lambda x: x.to("meta"),
        "int8": lambda x: x.to(torch.int8),
        "complex64": lambda x: x.to(torch.complex64),
    }[kind]
    state = network.state_dict() | {"conv1.weight": change(network.conv1.weight.detach())}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"its tensor conv1.weight is .*, where torch.float32 is"):
        load_backbone(network, str(tmp_path / "weights.pt"))


@pytest.mark.parametrize("change", [lambda x: x.view(1), lambda x: x.float(), lambda x: x.int()])
def test_a_counter_counts_the_same_in_any_form(
    tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    meant = filled(small_resnet()).state_dict()
    written = {k: change(v) if k.endswith(networks.COUNTER) else v for k, v in meant.items()}
    ours = small_resnet()
    load_backbone(ours, saved(written, tmp_path))
    assert all(torch.equal(value, meant[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("of_zip", [True, False])
def test_a_newer_pickle_protocol_is_said(tmp_path: Path, of_zip: bool) -> None:
    torch.save(
        small_resnet().state_dict(),
        tmp_path / "x.pth",
        pickle_protocol=4,
        _use_new_zipfile_serialization=of_zip,
    )
    with pytest.raises(UserError, match=r"x\.pth: written with pickle protocol 4 or .* again by"):
        load_backbone(small_resnet(), str(tmp_path / "x.pth"))
