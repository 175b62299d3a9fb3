"""Networks of timm: how wide their features are, which sizes they take, and whose tensors are in
their files.
"""

from pathlib import Path

import pytest
import torch
from commands import compose
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer

from ssl_bench.backbones.timm import timm as any_model
from ssl_bench.backbones.vit import vit_tiny
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.runs import weights
from ssl_bench.stages._pretrained import load_pretrained

timm = pytest.importorskip("timm")

# The smallest of many families: with heads of their own, several classifiers, or none. At a size
# that each takes.
FAMILIES = {
    "mobilenetv3_small_050": 32,
    "mobilenetv4_conv_small": 32,
    "vgg11": 32,
    "efficientnet_b0": 32,
    "test_convnext": 32,
    "test_vit": 160,
    "vit_tiny_patch16_224": 224,
    "vit_relpos_small_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "deit_tiny_distilled_patch16_224": 224,
    "regnetx_002": 32,
    "densenet121": 32,
    "resnetv2_50": 32,
    "mixer_s32_224": 224,
    "levit_128s": 224,
    "cait_xxs24_224": 224,
    "beit_base_patch16_224": 224,
    "resnet10t": 32,
    "ghostnet_050": 32,
    "hgnetv2_b0": 32,
    "efficientvit_b0": 32,
    "repvit_m0_9": 64,
    "mambaout_femto": 32,
    "caformer_s18": 64,
    "crossvit_tiny_240": 240,
    "volo_d1_224": 224,
    "eva02_tiny_patch14_224": 224,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name: str) -> None:
    """`dim` is what it gives, and its complete state dict fills it. On the meta device, where
    nothing is computed.
    """
    with torch.device("meta"):
        backbone, whole = any_model(name), timm.create_model(name, num_classes=7)
    with torch.no_grad():
        assert backbone.eval()(torch.empty(2, 3, *[FAMILIES[name]] * 2, device="meta")).shape == (
            2,
            backbone.dim,
        )
    assert backbone.refuses(FAMILIES[name]) is None
    assert backbone.refuses(1) or backbone.eval()(torch.empty(1, 3, 1, 1, device="meta")).shape == (
        1,
        backbone.dim,
    )
    theirs, ours = whole.state_dict(), backbone.state_dict()
    assert theirs.keys() - ours.keys() == set(backbone.classifier_keys())
    assert ours.keys() <= theirs.keys()


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "test_vit", "levit_128s", "test_convnext", "regnetx_002"]
)
def test_a_complete_file_is_loaded(tmp_path: Path, name: str) -> None:
    whole = timm.create_model(name, num_classes=7)
    save_file(whole.state_dict(), tmp_path / "x.safetensors")
    backbone = any_model(name)
    loaded = weights.load_backbone(backbone, str(tmp_path / "x.safetensors"))
    ours, theirs = backbone.state_dict(), whole.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert loaded.num_tensors == len(ours)
    assert set(loaded.left_out) == theirs.keys() - ours.keys()
    assert loaded.left_out
    save_file(theirs | {"stem.more": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected \(stem.more\)"):
        weights.load_backbone(backbone, str(tmp_path / "more.safetensors"))


def test_a_complete_vit_of_torchvision_is_loaded(tmp_path: Path) -> None:
    whole = VisionTransformer(32, 16, 12, 3, 192, 768, num_classes=7)
    torch.save(whole.state_dict(), tmp_path / "vit.pth")
    backbone = vit_tiny(32)
    loaded = weights.load_backbone(backbone, str(tmp_path / "vit.pth"))
    assert loaded.left_out == ["heads.head.weight", "heads.head.bias"]
    whole.heads, images = nn.Identity(), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(backbone.eval()(images), whole.eval()(images))


SIZES = ["data.image_size=32", "batch_size=8", "epochs=1"]
TEST_VIT = ["backbone=timm", "backbone.model=test_vit"]  # of 160 pixels, and with dynamic_img_size
MISTAKES = {
    "a ViT": (
        ["backbone=timm", "backbone.model=vit_tiny_patch16_224"],
        "augmentation.image_size=32 fails in vit_tiny_patch16_224 (Input height (32) doesn't match "
        "model (224)): add backbone.options={dynamic_img_size:true}, "
        "or type augmentation.image_size=224",
    ),
    "a Swin": (
        ["backbone=timm", "backbone.model=swin_tiny_patch4_window7_224"],
        "augmentation.image_size=32 fails in swin_tiny_patch4_window7_224 (Input height (32) "
        "doesn't match",
    ),
    "patches": (
        [*TEST_VIT, "augmentation.image_size=24"],
        "augmentation.image_size=24 fails in test_vit (Input height (24) should be divisible by "
        "patch size (16)): type augmentation.image_size=160",
    ),
    "multi-crop": (
        [*TEST_VIT, "method=dino", "augmentation.num_small_views=2", "augmentation.small_size=20"],
        "augmentation.small_size=20 fails in test_vit (Input height (20) should",
    ),
    "convolutions": (
        ["backbone=timm", "backbone.model=vgg11", "augmentation.image_size=16"],
        "augmentation.image_size=16 fails in vgg11 (Given input size",
    ),
    "options": (
        [*TEST_VIT, "backbone.options={depths:3,flat:true}"],
        "backbone.options={depths:3,flat:true}: not for timm's test_vit (",
    ),
    "classes": (
        [*TEST_VIT, "backbone.options={num_classes:3}"],
        "backbone.options has num_classes=3: leave it out",
    ),
}


@pytest.mark.parametrize(("overrides", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_size_that_a_network_refuses(tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        launch(compose(*SIZES, *overrides, f"data.cache={tmp_path}/cache", f"dir={tmp_path}/run"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()  # said before an image was read


def test_as_advised_it_takes_any_size() -> None:
    vit = any_model("vit_tiny_patch16_224", {"dynamic_img_size": True})
    assert vit.refuses(32) is None
    assert vit.eval()(torch.rand(1, 3, 32, 32)).shape == (1, vit.dim)


def test_a_look_at_the_sizes_changes_no_draw() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        backbone = any_model("test_vit")
    backbone.refuses(160)
    backbone.refuses(32)
    backbone.classifier_keys()
    assert torch.equal(torch.rand(1), expected)


# --- timm's own weights ---------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where huggingface_hub keeps what it fetched; without a network."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(hub: Path, name: str, network: nn.Module) -> None:
    folder = hub / f"models--timm--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(network.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")


@pytest.mark.parametrize("model", ["test_vit", "test_vit.r160_in1k"])
def test_its_own_weights(hub: Path, model: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = timm.create_model("test_vit")
    put(hub, "test_vit.r160_in1k", whole)
    with caplog.at_level("INFO"):
        backbone = any_model(model, pretrained=True)
    ours = backbone.state_dict()
    assert all(torch.equal(ours[key], whole.state_dict()[key]) for key in ours)
    assert "timm's weights test_vit.r160_in1k: trained with mean (0.5, 0.5, 0.5)" in caplog.text


def test_its_own_weights_without_a_network(hub: Path) -> None:
    with pytest.raises(UserError) as caught:
        any_model("test_vit", pretrained=True)
    said = str(caught.value)
    assert said.startswith(
        "backbone.pretrained=true: timm's weights of test_vit can't be fetched ("
    )
    assert said.endswith("(HF_HOME says where they are kept), or type pretrained=FILE")
    assert "\n" not in said


def test_a_model_of_which_timm_has_no_weights() -> None:
    known = timm.list_models("resnet*")
    name = next(name for name in known if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(UserError, match=f"timm has no weights of {name}; leave it out, or choose"):
        any_model(name, pretrained=True)
    with pytest.raises(UserError, match=r"backbone.model=resnet18.nope: timm has no such model"):
        any_model("resnet18.nope", pretrained=True)


def test_a_file_takes_the_place_of_its_own_weights(tmp_path: Path, hub: Path) -> None:
    """Where a run that began with them is evaluated, nothing is fetched."""
    backbone = any_model("test_vit")
    save_file(backbone.state_dict(), tmp_path / "x.safetensors")
    node = {"_target_": "ssl_bench.backbones.timm.timm", "model": "test_vit", "pretrained": True}
    cfg = compose(
        *(*SIZES, "stage=export", "backbone=timm", f"pretrained={tmp_path}/x.safetensors"),
        *("backbone.model=test_vit", "backbone.pretrained=true"),
    )
    assert cfg.backbone.pretrained is True
    loaded = load_pretrained(cfg).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in backbone.state_dict().items())
    assert weights.unfilled(node)["pretrained"] is None
