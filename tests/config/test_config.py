"""Every choice composes and fits the signature of its constructor."""

import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import get_type_hints

import hydra
import pytest
from commands import CHOICES, CONF, NEEDED, compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ssl_bench.config import build, signatures, typed
from ssl_bench.config.fields import InEpochs
from ssl_bench.data.formats import digits
from ssl_bench.errors import UserError
from ssl_bench.training.optim import scaled_lr


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids="=".join)
def test_a_choice(group: str, choice: str) -> None:
    """It fits, it knows its name, and the signatures that are read are those that are imported."""
    cfg = compose(f"{group}={choice}", *NEEDED.get(choice, []))
    build.check(cfg)
    if group not in ("experiment", "launcher", "tracking"):
        assert cfg[group].name == choice
    for name, node in cfg.items():
        if name in build.SUPPLIED and node:
            assert_read_as_imported(name, node._target_)


@pytest.mark.parametrize(
    "words",
    [
        ["stage=lincls", "dir=/x y", "epochs=3", "data.image_size=16", "data=digits"],
        ["experiment=bench_synthetic", "method=simclr", "seed=${epochs}", "~optimizer.momentum"],
        ["augmentation.crop_scale=[0.2,1]", "++seed=3", "+stage.rows.x=['stage=knn', 'seed=1']"],
        *(["bach_size=3"], ["seed.x=1"], ["+seed=1"], ["seed=0,1"], ["epochs"], ["dir=it's"]),
        *(["method=moco_v9", "epochs=3"], ["data={a:1}"], ["data/more=x"]),
    ],
    ids=" ".join,
)
def test_what_the_tests_compose_is_what_hydra_composes(words: list[str]) -> None:
    """`commands.compose` remembers a part of it."""

    def whole() -> DictConfig:
        with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
            return hydra.compose("config", words)

    found = []
    for composed in (whole, lambda: compose(*words)):
        try:
            cfg = composed()
            found.append((OmegaConf.to_container(cfg), OmegaConf.is_struct(cfg)))
        except HydraException as error:
            found.append(f"{type(error)} {error}")
    assert found[0] == found[1]


@cache
def assert_read_as_imported(name: str, path: str) -> None:
    target, supplied = build.locate(path, name), build.SUPPLIED[name]
    hints = get_type_hints(
        target.__init__ if inspect.isclass(target) else target, include_extras=True
    )
    expected = {
        key: (repr(hints[key]), parameter.default is parameter.empty)
        for key, parameter in inspect.signature(target).parameters.items()
        if key not in supplied
    }
    read = signatures.parameters(path, supplied)
    assert {
        key: (repr(annotation), required) for key, (annotation, required) in read.items()
    } == expected


@pytest.mark.parametrize(
    ("method", "zero"), [("byol", True), ("moco_v3", True), ("moco_v2", False), ("swav", False)]
)
def test_networks_start_as_the_authors(method: str, zero: bool) -> None:
    assert compose(f"method={method}", "backbone=resnet50").backbone.zero_init_residual is zero
    if method != "moco_v3":
        build.check(compose(f"method={method}", "backbone=vit_tiny"))


def test_byols_colours_are_byols_alone() -> None:
    """The others' code has torchvision's."""
    methods = [path.stem for path in (CONF / "method").glob("*.yaml")]
    assert [name for name in methods if compose(f"method={name}").augmentation.jitter] == ["byol"]


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (
            ["method=moco_v3", "backbone=vit_small"],
            "with backbone=vit_small type method=moco_v3_vit",
        ),
        (["method=moco_v3_vit", "backbone=resnet50"], "with backbone=resnet50 type method=moco_v3"),
        (["method=moco_v3_vit", "backbone=timm"], "with backbone=timm type method=moco_v3"),
    ],
)
def test_moco_v3_has_two_recipes(words: list[str], instead: str) -> None:
    with pytest.raises(UserError, match=f"^method=moco_v3.* is a recipe for .*: {instead}$"):
        build.check(compose(*words))


def test_every_constant_of_moco_v3_with_a_vit() -> None:
    """facebookresearch/moco-v3: CONFIG.md (ViT-Small), main_moco.py, moco/builder.py."""
    for words, name in (([], "vit_small"), (["backbone=vit_tiny"], "vit_tiny")):
        cfg = compose("method=moco_v3_vit", "epochs=300", "batch_size=4096", *words)
        build.check(cfg)
        backbone, optimizer, method = cfg.backbone, cfg.optimizer, cfg.method
        assert (backbone.name, backbone.positions, backbone.frozen_patches) == (
            name,
            "sincos",
            True,
        )
        assert (
            optimizer.weight_decay,
            optimizer.exclude_from_decay,
            cfg.schedule.warmup_epochs,
        ) == (0.1, False, 40)
        assert (method.temperature, method.momentum, method.dim, method.hidden_dim) == (
            0.2,
            0.99,
            256,
            4096,
        )
        assert (method.projector_layers, method.predictor_norm, cfg.augmentation.crop_scale[0]) == (
            3,
            True,
            0.08,
        )


def test_dino_decays_no_biases() -> None:
    cfg = compose("method=dino", "backbone.width=8", "method.out_dim=8")
    method = build.construct(cfg.method, backbone=build.construct(cfg.backbone))
    optimizer = build.construct(cfg.optimizer, params=method.param_groups(), batch_size=256)
    decays = {
        (group["weight_decay"], p.ndim > 1)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert decays == {(1e-4, True), (0.0, False)}


@pytest.mark.parametrize(
    ("method", "batch_size", "published"),
    [
        ("moco_v1", 256, 0.03),  # facebookresearch/moco, main_moco.py --lr, --batch-size
        ("moco_v2", 256, 0.03),
        ("moco_v3", 4096, 4.8),  # facebookresearch/moco-v3, CONFIG.md (--lr=.3), main_moco.py 190
        ("moco_v3_vit", 1024, 6e-4),  # CONFIG.md (ViT-Small, --lr=1.5e-4)
        ("moco_v3_vit", 4096, 2.4e-3),
        ("simclr", 4096, 4.8),  # arXiv:2002.05709, section 2.2; google-research/simclr, README
        # deepmind-research, byol/configs/byol.py (1000 epochs), utils/schedules.py 34
        ("byol", 4096, 3.2),
        ("swav", 256, 0.6),  # facebookresearch/swav, scripts/swav_200ep_bs256_pretrain.sh
        ("swav", 4096, 4.8),  # scripts/swav_{100,200,400,800}ep_pretrain.sh
        ("simsiam", 512, 0.1),  # facebookresearch/simsiam, main_simsiam.py 51, 56, 157
        ("barlow_twins", 2048, 1.6),  # facebookresearch/barlowtwins, main.py 31, 33, 158
        ("vicreg", 2048, 1.6),  # facebookresearch/vicreg, README 80, main_vicreg.py 170
        # facebookresearch/dino, README 207 (8 GPUs of 64 images), main_dino.py 239
        ("dino", 512, 0.06),
        ("lejepa", 1024, 5e-4),  # rbalestr-lab/lejepa, README, "Training Configuration"
        # facebookresearch/vissl 4df08bbd, nnclr_1node_resnet_imagenette_160.yaml
        ("nnclr", 4096, 4.8),
        ("dcl", 256, 1.2),  # lightly-ai/lightly, benchmarks/imagenet/resnet50/dcl.py
        ("ressl", 256, 0.05),  # KyleZheng1997/ReSSL, ressl.py (--lr), README
        ("wmse", 512, 3e-3),  # htdt/self-supervised, README, train.py 44
        # facebookresearch/swav, scripts/deepclusterv2_800ep_pretrain.sh
        ("deepcluster_v2", 4096, 4.8),
        ("tico", 256, 0.2),  # lightly-ai/lightly, benchmarks/imagenet/resnet50/tico.py 124
        # vturrisi/solo-learn, scripts/pretrain/imagenet-100/vibcreg.yaml
        ("vibcreg", 256, 0.3),
        ("mmcr", 2048, 4.8),  # ThomasYerxa/mmcr, pretrain_imagenet.py 10, imagenet/train.py
        ("nnbyol", 256, 0.2),  # BYOL's
        # facebookresearch/msn, configs/pretrain/msn_vits16.yaml, on 16 GPUs (README)
        ("msn", 1024, 1e-3),
        ("mae", 4096, 2.4e-3),  # facebookresearch/mae, PRETRAIN.md (--blr 1.5e-4)
        ("simmim", 2048, 4e-4),  # microsoft/SimMIM, configs/vit_base__800ep, main_simmim.py 218
        ("ijepa", 2048, 1e-3),  # facebookresearch/ijepa, configs/in1k_vith14_ep300.yaml
        ("ibot", 1024, 2e-3),  # bytedance/ibot, main_ibot.py (--lr 0.0005), README
        ("dinov2", 1024, 4e-3),  # facebookresearch/dinov2, ssl_default_config.yaml
        ("supervised", 8192, 3.2),  # arXiv:1706.02677, section 5.1
    ],
)
def test_rates_are_the_published_ones(method: str, batch_size: int, published: float) -> None:
    node = compose(f"method={method}", f"batch_size={batch_size}").optimizer
    assert scaled_lr(node.base_lr, batch_size, node.scaling) == pytest.approx(published)
    if method == "barlow_twins":
        # main.py 35
        assert scaled_lr(node.base_lr_biases, batch_size, node.scaling) == pytest.approx(0.0384)


def test_a_mistake_is_found_before_torch_is_imported() -> None:
    script = (
        "import sys, ssl_bench.command as command; sys.argv[1:] = ['method.temperature=-1', "
        "'batch_size=many']\n"
        "try: command.main()\n"
        "finally: print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (2, "False"), result.stderr
    assert "method.temperature=-1" in result.stderr
    assert "batch_size=many" in result.stderr


def test_no_stage_that_trains_is_imported_to_be_checked_or_described() -> None:
    script = (
        "import sys; from ssl_bench.config import manual\n"
        "for stage in ('pretrain', 'pipeline', 'lincls', 'knn', 'finetune'):\n"
        "    assert manual.page([f'stage={stage}'], None)\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr


def times_in_epochs(cfg: DictConfig) -> dict[str, tuple[float, InEpochs]]:
    """{key: (value, mark)} of a composed configuration."""
    found = {}
    for group in ("method", "schedule", "optimizer", "stage"):
        node = cfg.get(group) or {}
        parameters = signatures.parameters(node["_target_"], build.SUPPLIED[group]) if node else {}
        for name, (annotation, _) in parameters.items():
            marks = [
                part
                for part in getattr(annotation, "__metadata__", ())
                if isinstance(part, InEpochs)
            ]
            assert bool(marks) == (
                ("epochs" in name or name in ("queue_start", "copies")) and name != "per_epoch"
            ), name
            found |= {f"{group}.{name}": (float(node[name]), mark) for mark in marks}
    return found


@pytest.mark.parametrize(
    "words",
    [*([f"method={choice}"] for group, choice in CHOICES if group == "method"), ["stage=finetune"]]
    + [[f"schedule={choice}"] for group, choice in CHOICES if group == "schedule"]
    + [["stage=lincls", "stage.features=cached"], ["method=swav", "method.queue_length=64"]],
    ids=" ".join,
)
def test_every_time_in_epochs_lies_within_them(words: list[str]) -> None:
    """All that a recipe says is within its own epochs; a key typed in vain isn't asked."""
    needed = [more for word in words for more in NEEDED.get(word.partition("=")[2], [])]
    cfg = compose(*words, *needed)
    build.check(cfg)
    times = {
        key: mark for key, (_, mark) in times_in_epochs(cfg).items() if typed.is_read(cfg, key)
    }
    for key in times_in_epochs(cfg):
        OmegaConf.update(cfg, key, 0)
    for key, mark in times.items():
        for value, epochs in ((7, 7), (8, 7), (6, 7)):
            changed = OmegaConf.merge(
                cfg, OmegaConf.from_dotlist([f"{key}={value}", f"epochs={epochs}"])
            )
            if value < epochs or (value == epochs and mark.or_at_the_end):
                build.check(changed)
                continue
            with pytest.raises(
                UserError, match=rf"^{key}={value} isn't reached within epochs={epochs}: type"
            ) as error:
                build.check(changed)
            advice = re.findall(r"[\w.]+=\d+", str(error.value).partition(": ")[2])
            assert len(advice) == 2
            for word in advice:  # each by itself is enough
                build.check(OmegaConf.merge(changed, OmegaConf.from_dotlist([word])))


def test_a_stage_without_training_has_no_times() -> None:
    build.check(compose("stage=knn", "schedule=cosine_warmup"))
    build.check(compose("method=swav", "epochs=2", "method.queue_length=0"))
    build.check(compose("method=random", "schedule=cosine_warmup", "epochs=2"))


def test_precedence() -> None:
    assert compose("method=moco_v1").augmentation.name == "moco_v1"  # a method brings its recipe
    # unless asked otherwise
    assert compose("method=moco_v1", "augmentation=moco_v2").augmentation.name == "moco_v2"
    assert compose("method=moco_v1").schedule.name == "step"
    lincls = compose("stage=lincls")  # a stage is stronger than a method
    assert (lincls.augmentation.name, lincls.optimizer.base_lr, lincls.epochs) == (
        "lincls",
        30.0,
        100,
    )
    assert compose("stage=lincls", "optimizer.base_lr=1", "epochs=3").epochs == 3


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["data=digits"], 1024),
        (["data=cifar10", "data.root=/x"], 32768),
        (["data=stl10", "data.root=/x"], 65536),
        (["data=synthetic", "data.num_unlabeled=4096"], 4096),
        (["data=synthetic", "data.num_unlabeled=4095"], 2048),
        (["data=folder", "data.root=/x"], 65536),
        (["data=own", "data._target_=not_here.Mine"], 65536),
        (["data=digits", "method.queue_size=77"], 77),
    ],
)
def test_a_queue_is_no_larger_than_a_data_set_that_is_known(words: list[str], size: int) -> None:
    assert compose("method=moco_v2", *words).method.queue_size == size


def test_the_images_of_a_data_set_are_as_many_as_it_says() -> None:
    assert digits.Digits().split("pretrain").length == digits.IMAGES


def test_every_constant_of_the_papers() -> None:
    """MoCo's main_moco.py and the papers; lincls: main_lincls.py."""
    large = ["data=dl21", "data.root=/x"]
    v1, v2 = compose("method=moco_v1", *large), compose("method=moco_v2", *large)
    for cfg in (v1, v2):
        assert (cfg.method.dim, cfg.method.queue_size, cfg.method.momentum) == (128, 65536, 0.999)
        assert (cfg.epochs, cfg.batch_size) == (200, 256)
        assert (cfg.optimizer.base_lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (
            0.03,
            0.9,
            1e-4,
        )
        assert list(cfg.augmentation.crop_scale) == [0.2, 1.0]
        assert cfg.augmentation.grayscale_p == 0.2
    assert (v1.method.temperature, v1.method.mlp, v2.method.temperature, v2.method.mlp) == (
        0.07,
        False,
        0.2,
        True,
    )
    assert [v1.augmentation[key] for key in ("hue", "jitter_p", "blur_p")] == [0.4, 1.0, 0.0]
    assert [v2.augmentation[key] for key in ("hue", "jitter_p", "blur_p")] == [0.1, 0.8, 0.5]
    schedule = build.construct(v1.schedule)
    assert [round(schedule(epoch, 200), 6) for epoch in (119, 120, 159, 160)] == [1, 0.1, 0.1, 0.01]
    lincls = compose("stage=lincls")
    assert (lincls.optimizer.weight_decay, lincls.epochs, lincls.batch_size) == (0.0, 100, 256)
    schedule = build.construct(lincls.schedule)
    assert [round(schedule(epoch, 100), 6) for epoch in (59, 60, 79, 80)] == [1, 0.1, 0.1, 0.01]


def test_a_target_whose_module_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its signature can be read; what it needs isn't there."""
    (tmp_path / "mine_broken.py").write_text(
        "import no_such_package\n\n\ndef make(size: int = 1):\n    return size\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"_target_=mine_broken\.make: can't be imported .*no_such_package'\)$"
    ):
        build.construct({"_target_": "mine_broken.make"})


def test_a_target_whose_module_is_no_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_typo.py").write_text("rate = 1\ndef make(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"_target_=mine_typo\.make: .*, in line 2 of .*/mine_typo\.py$"
    ):
        build.check(compose("stage=pretrain", "method._target_=mine_typo.make"))
