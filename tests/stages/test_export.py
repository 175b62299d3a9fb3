"""Weights for other programs and back, the card beside them, what a folder of images is, and which
file is which.
"""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import CHOICES, compose
from compared import features, images, same, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from ssl_bench.backbones import resnet, vit
from ssl_bench.config import build
from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import UserError
from ssl_bench.files import digest
from ssl_bench.launch.process import launch
from ssl_bench.methods.probe import LinearProbe
from ssl_bench.runs import published, weights
from ssl_bench.runs.checkpoint import Checkpoint
from ssl_bench.runs.weights import load_backbone
from ssl_bench.stages import predict
from ssl_bench.stages._pretrained import open_pretrained
from ssl_bench.stages.export import write_onnx

SMALL = ["data.image_size=16", "backbone.width=8", "backbone.stem=small", "data.workers=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/: 30 unlabelled, 40 train, 24 val images of 4 classes; moco/, lincls/seed0 and 1, knn/,
    finetune/ of it.
    """
    place = tmp_path_factory.mktemp("place")
    write_dl21(place / "data", 30, 40, 24, num_classes=4, image_size=16, workers=1)
    data = ["data=dl21", f"data.root={place}/data", *SMALL]
    launch(compose(*data, "epochs=1", "batch_size=10", "method.queue_size=20", f"dir={place}/moco"))
    on = [*data, "epochs=2", "batch_size=20", f"pretrained={place}/moco"]
    for seed in (0, 1):
        normalised = ["stage.normalize=true", "optimizer.base_lr=1", f"seed={seed}"]
        launch(compose(*on, "stage=lincls", *normalised, f"dir={place}/lincls/seed{seed}"))
    launch(compose(*on, "stage=knn", f"dir={place}/knn"))
    launch(
        compose(
            *on,
            "stage=finetune",
            "stage.labels_per_class=5",
            "stage.test_resize=1.0",
            f"dir={place}/finetune",
        )
    )
    return place


@pytest.fixture(scope="module")
def exported(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(place / "moco", tmp_path_factory.mktemp("exported") / "out")


def export(source: Path, out: Path, *overrides: str) -> Path:
    launch(
        compose(
            "stage=export",
            f"pretrained={source}",
            f"stage.out={out}",
            "stage.onnx=false",
            *overrides,
        )
    )
    return out


# --- files ----------------------------------------------------------------------------------------


def test_what_was_written_is_read_with_equal_features(place: Path, tmp_path: Path) -> None:
    out = export(place / "moco", tmp_path / "out")
    original = resnet.resnet18(stem="small", width=8)
    loaded_from = load_backbone(original, str(place / "moco")).source
    for source in (out, out / "model.safetensors", out / "model.pth"):
        again = resnet.resnet18(stem="small", width=8)
        loaded = load_backbone(again, str(source))
        assert same(again, original)
        assert torch.equal(features(again), features(original))
        assert weights.look(loaded.source) == weights.look(loaded_from) != {}
        assert (loaded.remarks, loaded.left_out) == ([], [])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (out / "model.safetensors").stat().st_mode == (out / "model.pth").stat().st_mode
    assert (
        subprocess.run(
            ["sha256sum", "--check", "SHA256SUMS"], cwd=out, capture_output=True
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    "name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.exhaustive)]
)
def test_torchvision_and_timm_read_it(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    probe = LinearProbe(getattr(resnet, name)(), 7).eval()
    file = Checkpoint(tmp_path, "run").save(1, model=probe)
    out = export(file, tmp_path / "out", f"backbone={name}")
    networks = [getattr(models, name)(num_classes=7)]
    if importlib.util.find_spec("timm"):
        networks.append(__import__("timm").create_model(name, num_classes=7))
    for network in networks:
        network.load_state_dict(load_file(out / "model.safetensors"))
        network.load_state_dict(torch.load(out / "model.pth", weights_only=True))
        torch.testing.assert_close(features(network), probe.logits(images()))
    card = (out / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0] + "print(network.fc.out_features)"
    result = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True)
    assert result.stdout == "7\n", result.stderr


def test_a_vit_is_read_by_its_own_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    probe = LinearProbe(vit.vit_tiny(32), 5).eval()
    saved = Checkpoint(tmp_path, "run").save(1, model=probe)
    out = export(saved, tmp_path / "out", "backbone=vit_tiny", "backbone.image_size=32")
    again = vit.vit_tiny(32)
    assert load_backbone(again, str(out)).prefix == ""
    assert same(again, probe.backbone)
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code += "images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))\n"
    code += "torch.save(network.fc(network(images)), 'logits.pt')"
    result = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(
        torch.load(out / "logits.pt", weights_only=True), probe.logits(images())
    )


def test_standardised_features_are_folded_into_the_classifier(place: Path, tmp_path: Path) -> None:
    source = place / "lincls" / "seed0"
    probe = LinearProbe(resnet.resnet18(stem="small", width=8), 4, normalize=True)
    probe.load_state_dict(weights.read(weights.find(str(source)))["model"])
    network = resnet.resnet18(stem="small", width=8)
    network.fc = nn.Linear(network.dim, 4)
    network.load_state_dict(load_file(export(source, tmp_path / "out") / "model.safetensors"))
    torch.testing.assert_close(
        features(network), probe.eval().logits(images()), rtol=1e-4, atol=1e-5
    )


def test_a_projection_is_no_classifier(tmp_path: Path) -> None:
    method = tiny()
    file = Checkpoint(tmp_path, "run").save(1, model=method)
    assert load_backbone(tiny().backbone, str(file)).classifier is None
    for head in ("fc.0", "fc"):  # MoCo v2's, and MoCo v1's, which has the names of a classifier
        state = tiny().backbone.state_dict() | {
            f"{head}.weight": torch.zeros(8, 64),
            f"{head}.bias": torch.zeros(8),
        }
        both = {f"module.encoder_{one}.{key}": state[key] for one in "qk" for key in state}
        torch.save({"state_dict": both}, tmp_path / "x.pth.tar")
        assert load_backbone(tiny().backbone, str(tmp_path / "x.pth.tar")).classifier is None


def test_onnx_answers_as_torch_does(place: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = export(place / "finetune", tmp_path / "out", "stage.onnx=true")
    session = onnxruntime.InferenceSession(
        str(out / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    network = open_pretrained(compose("stage=export", f"pretrained={out}"))
    for count in (1, 5):
        batch = torch.randn(count, 3, 16, 16)
        (outputs,) = session.run(None, {"images": batch.numpy()})
        with torch.no_grad():
            expected = network.classifier(network.backbone(batch))
        torch.testing.assert_close(torch.from_numpy(outputs), expected, rtol=1e-3, atol=1e-4)


LARGE = ("resnet34", "resnet50", "resnet50x2", "vit_small", "vit_base")  # layers as the others have


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        *(
            pytest.param(f"backbone={name}", marks=[pytest.mark.exhaustive] * (name in LARGE))
            for group, name in CHOICES
            if group == "backbone" and name not in ("timm", "dinov2_small", "resnet101")
        ),
        "backbone=timm backbone.model=mobilenetv3_small_050",
        pytest.param(
            "backbone=timm backbone.model=vit_tiny_patch16_224 +backbone.options={img_size:32}",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_onnx_takes_any_number_of_images(network: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "timm" in network:
        pytest.importorskip("timm")
    small = ["data.image_size=32", *(["backbone.width=8"] if "resnet" in network else [])]
    backbone = build.construct(compose(*network.split(), *small).backbone).eval()
    write_onnx(backbone, 32, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 32)
        (outputs,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(outputs), backbone(images), rtol=1e-2, atol=1e-3
            )


def test_without_onnx_it_says_what_to_install(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )
    out = export(place / "moco", tmp_path / "out", "stage.onnx=true")
    assert (
        "no model.onnx, for want of onnx and onnxscript: pip install 'ssl_bench[onnx]'"
        in caplog.text
    )
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "model.pth",
        "model.safetensors",
    }


def test_what_onnx_cannot_express_costs_that_file_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnxscript")
    forward = models.ResNet.forward
    monkeypatch.setattr(
        models.ResNet, "forward", lambda self, x: forward(self, x if x.sum() > 0 else -x)
    )
    out = export(place / "moco", tmp_path / "out", "stage.onnx=true")
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "model.pth",
        "model.safetensors",
    }
    ours = [record for record in caplog.records if record.name.startswith("ssl_bench")]
    (said,) = [record.getMessage() for record in ours if record.levelname == "WARNING"]
    assert said.startswith(
        "no model.onnx, but all else: Could not guard on data-dependent expression"
    )
    assert "\n" not in said
    assert (
        "There is no `model.onnx`: its export failed (Could not guard"
        in (out / "README.md").read_text()
    )
    assert (
        subprocess.run(
            ["sha256sum", "--check", "SHA256SUMS"], cwd=out, capture_output=True
        ).returncode
        == 0
    )
    load_backbone(resnet.resnet18(stem="small", width=8), str(out))


def test_the_card_has_the_recipe_and_the_numbers(place: Path, tmp_path: Path) -> None:
    card = (export(place / "moco", tmp_path / "out", f"runs={place}") / "README.md").read_text()
    scores = [
        json.loads((place / "lincls" / f"seed{i}" / "summary.json").read_text())["val_top1"]
        for i in (0, 1)
    ]
    (row,) = [line for line in card.splitlines() if line.startswith("| Linear")]
    assert f" {np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f} |" in row
    assert row.split("|")[-2].strip() == "2"
    assert "| Fine-tuning, 5 labels a class " in card
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert (recipe["method"]["queue_size"], recipe["backbone"]["width"], recipe["epochs"]) == (
        20,
        8,
        1,
    )
    assert str(place) not in card  # nothing of this machine
    assert "mean (0.485, 0.456, 0.406)" in card


def test_an_export_is_repeated_and_nothing_else_is_overwritten(place: Path, tmp_path: Path) -> None:
    out = export(place / "moco", tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = (out / "model.safetensors").read_bytes()
    export(place / "finetune", out)
    assert (out / "model.safetensors").read_bytes() != before
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is there already, and is no export; name a new folder"):
        export(place / "moco", place / "data")


def test_weights_of_a_run_that_goes_on(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(place / "moco", tmp_path / "moco")
    export(run, tmp_path / "finished")
    assert "is not finished" not in caplog.text
    (run / "summary.json").unlink()
    export(run, tmp_path / "unfinished")
    # stopped between the last step and the result
    assert f"{run} is not finished: step 3 of 3" in caplog.text


def test_an_export_leaves_nothing_of_the_one_before(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, said = export(place / "moco", tmp_path / "out"), "held an export of other weights"
    (tmp_path / "mine").write_text("")
    (out / "model.onnx").write_bytes(b"of this network")
    with open(out / "SHA256SUMS", "a") as sums:
        sums.write(f"{'0' * 64}  model.onnx\n{'0' * 64}  ../mine\n")
    export(place / "moco", out)
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "model.pth",
        "model.safetensors",
    }
    assert (tmp_path / "mine").exists()
    assert said not in caplog.text
    export(place / "finetune", out)
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stage=export"], "stage=export needs weights: type pretrained=..."),
        (["stage=predict", "stage.images=."], "stage=predict needs weights: type pretrained=..."),
        (["stage=export", "pretrained={file}"],
         "doesn't say which of our networks it is of: type backbone="),
        (["stage=export", "pretrained={place}/moco", "runs={place}/moco"],
         "none of its 1 runs measured"),
        (["stage=export", "pretrained={place}/moco", "runs={place}/data"], "no run at or below it"),
        (["stage=export", "pretrained={file}", "stage.out={file}/a"],
         "can't be written (Not a directory); choose"),
        (["stage=predict", "pretrained={place}/moco", "stage.images=/no"],
         "stage.images=/no: no such folder"),
        (["stage=predict", "pretrained={place}/moco", "stage.images={place}/knn"],
         "stage.images= sets the folder"),
        (["stage=predict", "pretrained={place}/moco", "stage.images=.", "stage.features=false"],
         "has no classifier"),
        (["stage=zoo", "stage.verify=/nowhere"], "stage.verify=/nowhere: no such file"),
    ],
)  # fmt: skip
def test_mistakes(place: Path, tmp_path: Path, overrides: list[str], says: str) -> None:
    torch.save(tiny().backbone.state_dict(), tmp_path / "x.pth")
    words = [word.format(place=place, file=tmp_path / "x.pth") for word in overrides]
    words[1:1] = [f"stage.out={tmp_path}/out"] if "stage=export" in words else []
    words += [f"dir={tmp_path}/run"] if "stage=predict" in words else []
    with pytest.raises(UserError) as caught:
        launch(compose(*words))
    assert says in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth"}


@pytest.mark.parametrize("stage", ["predict stage.images=.", "export stage.out=out"])
@pytest.mark.parametrize("size", ["stage.image_size=20", "backbone.patch_size=15"])
def test_a_size_that_the_network_refuses(tmp_path: Path, stage: str, size: str) -> None:
    """As lincls and knn say it, typed or, of a file that says nothing, ImageNet's 224."""
    patch = 15 if "patch" in size else 16
    torch.save(vit.vit_tiny(2 * patch, patch).state_dict(), tmp_path / "x.pth")
    words = [*f"stage={stage}".split(), f"pretrained={tmp_path}/x.pth", "backbone=vit_tiny", size]
    with pytest.raises(UserError) as caught:
        launch(compose(*words, f"backbone.image_size={2 * patch}", f"dir={tmp_path}/run"))
    pixels = 20 if patch == 16 else 224
    assert f"stage.image_size={pixels} is no multiple of backbone.patch_size={patch}" in str(
        caught.value
    )
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth"}


def test_a_broken_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x10" + bytes(7) + b"something else!!")
    with pytest.raises(UserError, match="truncated, or not a safetensors file"):
        load_backbone(tiny().backbone, str(tmp_path / "x.safetensors"))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), header=st.booleans())
def test_a_flipped_bit_is_found_or_harmless(
    exported: Path, place: float, bit: int, header: bool
) -> None:
    """Of the tensors, and of what the file says of itself, by the digest in it; SHA256SUMS needn't
    be there.
    """
    whole = (exported / "model.safetensors").read_bytes()
    flipped, length = bytearray(whole), 8 + int.from_bytes(whole[:8], "little")
    flipped[int(place * (length if header else len(whole)))] ^= 1 << bit
    path = exported.parent / "x.safetensors"
    path.write_bytes(flipped)
    before = weights.read(exported / "model.safetensors")
    said = ""
    try:
        found, says = weights.read(path), weights.recipe(path)
        assert found.keys() == before.keys()
        assert all(torch.equal(found[key], before[key]) for key in before)
        # it is as if it had none
        assert says in (None, weights.recipe(exported / "model.safetensors"))
    except UserError as error:
        said = str(error)
    assert not said or str(path) in said


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_what_isnt_as_the_list_says_is_refused(exported: Path, tmp_path: Path, name: str) -> None:
    out = shutil.copytree(exported, tmp_path / "out")
    other = tiny(1).backbone.state_dict()
    torch.save(other, out / name) if name.endswith("pth") else save_file(other, out / name)
    with pytest.raises(
        UserError, match=rf"{name}: its sha256 is \w+\.\.\., not \w+\.\.\. as .*/SHA256SUMS says"
    ):
        load_backbone(tiny().backbone, str(out / name))


# --- predict --------------------------------------------------------------------------------------


def look(run: Path) -> tuple[list[dict[str, str]], np.ndarray]:
    with open(run / "images.csv", newline="") as file:
        return list(csv.DictReader(file)), np.load(run / "features.npy")


@pytest.mark.parametrize("exported", [False, True])
def test_labels_are_those_that_the_run_measured(
    place: Path, tmp_path: Path, exported: bool
) -> None:
    source = place / "finetune"
    if exported:  # then the file alone is enough
        source = shutil.copy(
            export(source, tmp_path / "out") / "model.safetensors", tmp_path / "x.safetensors"
        )
    command = ["stage=predict", f"pretrained={source}", "data.workers=1", "batch_size=7"]
    launch(compose(*command, f"stage.images={place}/data", f"dir={tmp_path}/run"))
    rows, array = look(tmp_path / "run")
    assert len(rows) == len(array) == 94
    assert [row["image"] for row in rows] == sorted(row["image"] for row in rows)
    labels = torch.load(place / "data" / "val_label_tensor.pt", weights_only=True)
    val = {row["image"]: row for row in rows if row["image"].startswith("val/")}
    right = [int(val[f"val/{i}.png"]["label"]) == label for i, label in enumerate(labels.tolist())]
    summary = json.loads((place / "finetune" / "summary.json").read_text())
    assert 100 * np.mean(right) == pytest.approx(summary["val_top1"])
    weights = open_pretrained(compose("stage=predict", f"pretrained={source}", "stage.images=x"))
    logits = weights.classifier(torch.from_numpy(array))
    assert logits.argmax(dim=1).tolist() == [int(row["label"]) for row in rows]
    shown = [float(row["probability"]) for row in rows]
    assert logits.softmax(dim=1).amax(dim=1).tolist() == pytest.approx(shown, abs=1e-4)


def test_classes_keep_their_names(place: Path, tmp_path: Path) -> None:
    for number, (split, name) in enumerate(
        [("train", "dog"), ("train", "cat"), ("val", "dog"), ("val", "cat")]
    ):
        folder = tmp_path / "pets" / split / name
        folder.mkdir(parents=True)
        for i in range(4):
            shutil.copy(place / "data" / "train" / f"{4 * number + i}.png", folder)
    command = [
        "data=folder",
        f"data.root={tmp_path}/pets",
        *SMALL,
        f"pretrained={place}/moco",
        "batch_size=4",
    ]
    launch(compose(*command, "stage=finetune", "epochs=1", f"dir={tmp_path}/pets_run"))
    out = export(tmp_path / "pets_run", tmp_path / "out")
    again = export(out, tmp_path / "again")
    assert "Classes, in the order of the logits: cat, dog." in (again / "README.md").read_text()
    for source in (tmp_path / "pets_run", again / "model.safetensors"):
        run = tmp_path / f"of {source.name}"
        launch(
            compose(
                "stage=predict",
                f"pretrained={source}",
                f"stage.images={tmp_path}/pets/val",
                f"dir={run}",
            )
        )
        rows, _ = look(run)
        assert list(rows[0]) == ["image", "label", "probability", "name"]
        assert [row["name"] for row in rows] == [("cat", "dog")[int(row["label"])] for row in rows]


def test_rows_belong_to_their_images(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "a, b"
    folder.mkdir(parents=True)
    for name in ("2.png", "10.png", "\udcff.png"):  # the last is no text in UTF-8
        shutil.copy(place / "data" / "train" / "7.png", folder / name)
    Image.new("RGB", (40, 30)).save(tmp_path / "photos" / "black.jpg")
    launch(
        compose(
            "stage=predict",
            f"pretrained={place}/moco",
            f"stage.images={tmp_path}/photos",
            f"dir={tmp_path}/run",
        )
    )
    with open(tmp_path / "run" / "images.csv", newline="", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows == [["image"], ["a, b/10.png"], ["a, b/2.png"], ["a, b/\udcff.png"], ["black.jpg"]]
    array = np.load(tmp_path / "run" / "features.npy")
    assert np.allclose(array[0], array[2], atol=1e-5)
    assert not np.allclose(array[0], array[3], atol=1e-2)


def test_values_of_more_than_8_bits_mean_what_the_command_says_or_else_the_run(
    place: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    ramp = np.arange(576, dtype=np.int32).reshape(24, 24) % 256
    Image.fromarray(ramp.astype(np.uint8)).save(photos / "8.png")
    Image.fromarray(np.round(ramp * 4095 / 255).astype(np.uint16)).save(photos / "12.png")
    own = [
        "data=dl21",
        f"data.root={place}/data",
        *SMALL,
        "data.bit_depth=12",
        "epochs=1",
        "batch_size=10",
    ]
    launch(compose(*own, "method.queue_size=20", f"dir={tmp_path}/of_12_bits"))
    plain, of_12_bits = f"pretrained={place}/moco", f"pretrained={tmp_path}/of_12_bits"
    for number, (source, *said, right) in enumerate(
        [
            (plain, "stage.bit_depth=12", True),
            (plain, "stage.value_range=[0,4095]", True),
            (plain, False),
            (of_12_bits, True),
            (of_12_bits, "stage.value_range=[0,65535]", False),
        ]
    ):
        run = tmp_path / str(number)
        launch(compose("stage=predict", source, *said, f"stage.images={photos}", f"dir={run}"))
        rows, (twelve, eight) = look(run)
        assert [row["image"] for row in rows] == ["12.png", "8.png"]
        apart = np.linalg.norm(twelve - eight) / np.linalg.norm(eight)
        assert apart < 0.05 if right else apart > 0.2, (source, said, apart)


def test_a_repeated_command_goes_on_after_the_last_row(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "BLOCK", 20)
    command = [
        "stage=predict",
        f"pretrained={place}/finetune",
        f"stage.images={place}/data",
        "batch_size=10",
    ]
    launch(compose(*command, f"dir={tmp_path}/whole"))
    add, seen = predict.Bar.add, []

    def counting(self: predict.Bar, count: int = 1) -> None:
        if self.title == "predictions":
            seen.append(count)
        add(self, count)

    def failing(self: predict.Bar, count: int = 1) -> None:
        counting(self, count)
        if len(seen) == 6:  # 60 rows are written, 40 of them saved
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict.Bar, "add", failing)
        with pytest.raises(KeyboardInterrupt):
            launch(compose(*command, f"dir={tmp_path}/stopped"))
        seen.clear()
        with pytest.raises(
            UserError, match="holds a run with another configuration: batch_size was 10, is 5"
        ):
            launch(compose(*command, "batch_size=5", f"dir={tmp_path}/stopped"))
        patch.setattr(predict.Bar, "add", counting)
        launch(compose(*command, f"dir={tmp_path}/stopped"))
    assert sum(seen) == 54
    for name in ("images.csv", "features.npy"):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_a_folder_that_changed_meanwhile(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "BLOCK", 5)
    photos = shutil.copytree(place / "data" / "val", tmp_path / "photos")
    command = [
        "stage=predict",
        f"pretrained={place}/moco",
        f"stage.images={photos}",
        f"dir={tmp_path}/run",
    ]
    for _ in range(2):  # the second time it is finished
        launch(compose(*command, "batch_size=5"))
    (photos / "3.png").unlink()
    for finished in (True, False):
        assert (tmp_path / "run" / "summary.json").exists() is finished
        with pytest.raises(
            UserError,
            match="a run of other images: its split 'pretrain' had 24, the 23 now are not the same",
        ):
            launch(compose(*command, "batch_size=5"))
        (tmp_path / "run" / "summary.json").unlink(missing_ok=True)


# --- zoo ------------------------------------------------------------------------------------------


def test_runs_are_listed_with_what_measured_them(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    counts = launch(compose("stage=zoo", f"runs={place}"))
    assert counts == {"published": len(published.WEIGHTS), "own": 4}
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 120
    assert re.search(r"^\| moco_v2_800ep +\| resnet50 +\| 71.1 +\| MoCo v2, 800 ep ", shown, re.M)
    blocks = [
        re.sub(r"\n +", " ", block)
        for block in re.split(r"\n(?=pretrained=)", shown)
        if f"pretrained={place}/moco\n" in block
    ]
    (block,) = blocks
    parts = (
        "moco_v2, resnet18, dl21, 1 epoch, batch 10, seed 0",
        f"sha256 {digest(weights.find(str(place / 'moco')))[:8]}",
        "Linear classification of frozen features: ",
        " (2)",
        "classifier: ",
        "Fine-tuning, 5 labels a class: ",
    )
    assert all(part in block for part in parts)


def test_a_file_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shutil.copy(weights.find(str(place / "moco")), tmp_path / "copy.pt")
    with pytest.raises(
        UserError, match=r"none of the known weights .* runs=DIR compares it with your own"
    ):
        launch(compose("stage=zoo", f"stage.verify={file}"))
    launch(compose("stage=zoo", f"stage.verify={file}", f"runs={place}"))
    assert f"{file}: {place}/moco/checkpoints/step" in capsys.readouterr().out

    out = export(place / "moco", tmp_path / "out")
    launch(compose("stage=zoo", f"stage.verify={out}/model.pth"))
    assert f"{out}/model.pth: whole, as {out}/SHA256SUMS says" in capsys.readouterr().out
    with open(out / "model.pth", "ab") as broken:
        broken.write(b"\0")
    with pytest.raises(
        UserError,
        match=r"model.pth: its sha256 is .*\.\.\., not .*\.\.\. as .*SHA256SUMS says: a broken",
    ):
        launch(compose("stage=zoo", f"stage.verify={out}/model.pth"))

    monkeypatch.setitem(
        published.WEIGHTS,
        "mine",
        published.Weights(
            "https://x/copy.pt",
            f"md5 {digest(file, 'md5')[:8]}",
            *("resnet18", "MoCo v2", 200, 67.7, "MIT"),
        ),
    )
    launch(compose("stage=zoo", f"stage.verify={file}"))
    assert f"{file}: mine, MoCo v2, 200 ep, backbone=resnet18" in capsys.readouterr().out
    file.write_bytes(b"another")
    with pytest.raises(UserError, match=r"not .*, which mine has: a broken or another file"):
        launch(compose("stage=zoo", f"stage.verify={file}"))
