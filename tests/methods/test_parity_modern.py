"""What newer methods' own programs compute, in float64: parity_modern.npz, compared to 1e-9."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inputs import U
from torch import Tensor

from ssl_bench.augment.masks import (
    block_mask,
    block_size,
    random_cells,
    random_patches,
    targets_and_context,
)
from ssl_bench.backbones.vit import ViT, sincos, taken
from ssl_bench.methods import ijepa, mae, simmim
from ssl_bench.methods.base import rising
from ssl_bench.methods.byol import regression_loss
from ssl_bench.methods.dcl import dcl_loss, one_way
from ssl_bench.methods.deepcluster_v2 import assignment_loss, cluster
from ssl_bench.methods.dino import DINOLoss, crossed
from ssl_bench.methods.dinov2 import Rising, koleo, sinkhorn
from ssl_bench.methods.ibot import PatchLoss, patch_loss
from ssl_bench.methods.ijepa import prediction_loss
from ssl_bench.methods.layers import Queue
from ssl_bench.methods.lejepa import epps_pulley, lejepa_loss, sigreg
from ssl_bench.methods.mmcr import mmcr_loss
from ssl_bench.methods.msn import assigned, msn_loss, sharpened
from ssl_bench.methods.nnclr import nearest, nnclr_loss
from ssl_bench.methods.ressl import relation_loss
from ssl_bench.methods.tico import tico_loss
from ssl_bench.methods.vibcreg import correlation, vibcreg_loss
from ssl_bench.methods.wmse import w_mse_loss, whiten
from ssl_bench.training.optim import adamw, schedule_
from ssl_bench.training.schedule import Cosine

REFERENCE = np.load(Path(__file__).with_name("parity_modern.npz"))
# Arrays, by the beginning of their names, that nothing here computes, and why.
LEFT_OUT = {
    "aim/": "its authors published no training code, and our ViT has no causal attention",
    "all4one/": "one term of three, and the others aren't here: a transformer over neighbours",
    "vicregl/": "matches places of the image: a method isn't told where its views were cut, which "
    "for pictures cut by workers nobody keeps",
}
COMPARED: set[str] = set()
RAN: set[str] = set()  # the tests of this file


def close(actual: Tensor, name: str) -> None:
    """To 1e-9 of the largest element; counts, masks and indices exactly."""
    expected = torch.from_numpy(REFERENCE[name])
    COMPARED.add(name)
    actual = actual.detach().to(expected.dtype).reshape(expected.shape)
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), name
        return
    worst = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    assert worst <= 1e-9, f"{name}: off by {worst:.2e} of its largest element"


@pytest.fixture(autouse=True)
def _ran(request: pytest.FixtureRequest) -> None:
    RAN.add(request.node.originalname)


def leaf(name: str, *shape: int) -> Tensor:
    return U(name, *shape).requires_grad_()


@pytest.mark.parametrize(("case", "t_max", "points"), [("t3_n17", 3.0, 17), ("t5_n33", 5.0, 33)])
def test_epps_pulley(case: str, t_max: float, points: int) -> None:
    x = leaf("lejepa/univariate", 24, 6)
    statistic = epps_pulley(x, t_max, points)
    statistic.sum().backward()
    close(statistic, f"lejepa/epps_pulley/{case}/statistic")
    close(x.grad, f"lejepa/epps_pulley/{case}/grad_x")


def test_sigreg() -> None:
    z, directions = leaf("lejepa/z", 24, 16), F.normalize(U("lejepa/directions", 16, 8), dim=0)
    statistics = epps_pulley(z @ directions)
    close(statistics, "lejepa/slicing/statistics")
    # an option of theirs beside the mean, which no recipe has
    clipped = statistics.where(statistics >= statistics.quantile(0.5), 0)
    close(clipped.sum(), "lejepa/slicing/loss_sum_clipped_at_median")
    loss = sigreg(z, directions)
    loss.backward()
    close(loss, "lejepa/slicing/loss")
    close(z.grad, "lejepa/slicing/grad_z")


@pytest.mark.parametrize("lambd", [0.02, 0.05])
def test_lejepa(lambd: float) -> None:
    views = leaf("lejepa/minimal/proj", 4, 24, 16)
    directions = F.normalize(U("lejepa/minimal/directions", 16, 256), dim=0)
    loss = lejepa_loss(views, directions, lambd)
    loss.backward()
    close(loss, f"lejepa/minimal/lambda{lambd}/loss")
    close(views.grad, f"lejepa/minimal/lambda{lambd}/grad_proj")
    close(sigreg(views, directions), "lejepa/minimal/sigreg")
    close(lejepa_loss(views, directions, 0.0), "lejepa/minimal/invariance")


def test_lejepa_with_small_views() -> None:
    large, small = (
        leaf(f"lejepa/global_local/{name}", num, 12, 16)
        for name, num in (("global", 2), ("local", 4))
    )
    directions = F.normalize(U("lejepa/directions", 16, 8), dim=0)
    views = [*large, *small]
    loss = lejepa_loss(views, directions, 0.05, num_global=2)
    loss.backward()
    close(loss, "lejepa/global_local/loss")
    close(large.grad, "lejepa/global_local/grad_global")
    close(small.grad, "lejepa/global_local/grad_local")
    close(sigreg(torch.stack(views), directions), "lejepa/global_local/sigreg")
    close(lejepa_loss(views, directions, 0.0, num_global=2), "lejepa/global_local/invariance")


def test_nnclr() -> None:
    queue = Queue(16, 48).double()
    queue.keys.copy_(F.normalize(U("nnclr/queue", 48, 16), dim=1).T)
    for step in range(3):
        z1, z2 = (F.normalize(U(f"nnclr/{name}/{step}", 24, 16), dim=1) for name in ("z1", "z2"))
        found = torch.stack([nearest(z1, queue.keys), nearest(z2, queue.keys)])
        close(found, f"nnclr/neighbours{step}")
        neighbours1, neighbours2 = queue.keys.T[found]
        for temperature in (0.1, 0.2):
            p1, p2 = (leaf(f"nnclr/{name}/{step}", 24, 16) for name in ("p1", "p2"))
            loss = nnclr_loss(neighbours1, p2, temperature) / 2
            loss = loss + nnclr_loss(neighbours2, p1, temperature) / 2
            loss.backward()
            close(loss, f"nnclr/t{temperature}/loss{step}")
            if step == 2:
                close(p1.grad, f"nnclr/t{temperature}/grad_p1")
                close(p2.grad, f"nnclr/t{temperature}/grad_p2")
        queue.enqueue(z1)
    close(queue.keys.T, "nnclr/queue")
    close(queue.pointer, "nnclr/queue_ptr")


def test_ressl() -> None:
    queue = Queue(16, 48).double()
    queue.keys.copy_(F.normalize(U("ressl/queue", 16, 48), dim=0))
    for step in range(3):
        query = leaf(f"ressl/q/{step}", 24, 16)
        key = F.normalize(U(f"ressl/k/{step}", 24, 16), dim=1)
        loss = relation_loss(query, key, queue.keys.clone(), 0.1, 0.04)
        loss.backward()
        close(loss, f"ressl/loss{step}")
        if step == 2:
            close(query.grad, "ressl/grad_q")
        queue.enqueue(key)
    close(queue.keys, "ressl/queue")
    close(queue.pointer, "ressl/queue_ptr")


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("sigma", [None, 0.5])
def test_dcl(temperature: float, sigma: float | None) -> None:
    case = f"dcl/t{temperature}" if sigma is None else f"dclw/t{temperature}_sigma{sigma}"
    for detached in (False,) if sigma is None else (False, True):
        z1, z2 = leaf("dcl/z1", 24, 16), leaf("dcl/z2", 24, 16)
        loss = dcl_loss(z1, z2, temperature, sigma, detached)
        loss.backward()
        close(loss, f"{case}/loss")
        suffix = "_weights_detached" if detached else ""
        close(z1.grad, f"{case}/grad_z1{suffix}")
        close(z2.grad, f"{case}/grad_z2{suffix}")
        close(
            one_way(F.normalize(z1, dim=1), F.normalize(z2, dim=1), temperature, sigma),
            f"{case}/one_way",
        )


@pytest.mark.parametrize(
    ("case", "num_views", "eps", "normalized"),
    [("norm", 2, 0.0, True), ("mse", 2, 0.0, False), ("eps0.1_views3", 3, 0.1, True)],
)
def test_w_mse(case: str, num_views: int, eps: float, normalized: bool) -> None:
    close(whiten(U("wmse/whiten", 24, 6), eps), f"wmse/whitened/eps{eps:g}")
    views = [leaf(f"wmse/z{view}", 24, 6) for view in range(num_views)]
    orders = torch.stack([U(f"wmse/perm/{i}", 24).argsort() for i in range(2)])
    loss = w_mse_loss(views, orders, 12, eps, normalized)
    loss.backward()
    close(loss, f"wmse/{case}/loss")
    for number, view in enumerate(views):
        close(view.grad, f"wmse/{case}/grad_z{number}")


def weights(module: torch.nn.Module, prefix: str, rename: dict[str, str]) -> None:
    """Parameters by the recipe of README_modern.md, under the authors' names.

    rename: what stands there in the place of these parts of ours.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            for ours, theirs in rename.items():
                name = re.sub(ours, theirs, name)
            u = U(prefix + name, *parameter.shape)
            if parameter.ndim >= 2:
                value = u * (6 / parameter[0].numel()) ** 0.5
            else:
                value = 1 + 0.1 * u if name.endswith("weight") else 0.1 * u
            if parameter.requires_grad:
                parameter.copy_(value)


VIT_NAMES = {
    r"^class_token$": "cls_token",
    r"^conv_proj\.": "patch_embed.proj.",
    r"encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"^encoder\.ln\.": "norm.",
    r"\.ln_([12])\.": r".norm\1.",
    r"self_attention\.in_proj_": "attn.qkv.",
    r"self_attention\.out_proj\.": "attn.proj.",
    r"\.mlp\.0\.": ".mlp.fc1.",
    r"\.mlp\.3\.": ".mlp.fc2.",
}


def test_mae_patches() -> None:
    images = U("mae/patchify/images", 2, 3, 16, 16)
    close(mae.patchify(images, 8), "mae/patchify")
    close(mae.unpatchify(U("mae/unpatchify/tokens", 2, 4, 192), 8), "mae/unpatchify")
    assert torch.equal(mae.unpatchify(mae.patchify(images, 4), 4), images)
    table = sincos(4, 16, columns_first=True)
    close(torch.cat([torch.zeros(1, 16), table]), "mae/pos_embed")


def noise() -> Tensor:
    return (U("mae/noise", 2, 16) + 1) / 2


def test_mae_masks() -> None:
    x = U("mae/masking/x", 2, 16, 8)
    for ratio in (0.75, 0.6):
        kept, hidden, restore = mae.mask(x, noise(), ratio)
        close(kept, f"mae/masking/r{ratio}/x_masked")
        close(hidden, f"mae/masking/r{ratio}/mask")
        close(restore, "mae/masking/ids_restore")
    ratios = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
    counts = [
        [random_patches(torch.rand(1, num), ratio)[0].shape[1] for ratio in ratios]
        for num in (10, 16, 49, 64, 100, 196, 256)
    ]
    close(torch.tensor(counts), "mae/len_keep")


@pytest.mark.parametrize("norm_pix", [False, True])
def test_mae_loss(norm_pix: bool) -> None:
    case = "mae/loss_norm_pix" if norm_pix else "mae/loss"
    prediction = leaf("mae/pred", 2, 16, 192)
    hidden = mae.mask(prediction, noise(), 0.75)[1]
    loss = mae.reconstruction_loss(U("mae/images", 2, 3, 32, 32), prediction, hidden, 8, norm_pix)
    loss.backward()
    close(loss, f"{case}/loss")
    close(prediction.grad[..., :24], f"{case}/grad_pred_24")


@pytest.mark.parametrize("norm_pix", [False, True])
def test_mae(norm_pix: bool) -> None:
    """The whole method: encoder, decoder, gradients."""
    network = ViT(32, 8, 32, 4, depth=2, positions="sincos_columns")
    method = mae.MAE(network, 0.75, 16, 1, 4, norm_pix).double()
    method.decoder_positions[1:] = sincos(4, 16, columns_first=True)  # not rounded to float32
    network.encoder.pos_embedding.data[0, 1:] = sincos(4, 32, columns_first=True)
    theirs = {r"^backbone\.": "", **VIT_NAMES}
    weights(method, "mae/", theirs)
    images = U("mae/images", 2, 3, 32, 32)
    kept, hidden, ranks = random_patches(noise(), 0.75)
    latent = network.tokens(images, keep=kept)
    close(latent, "mae/forward/latent")
    close(method.decode(latent, ranks)[..., :24], "mae/forward/pred_24")
    close(hidden, "mae/forward/mask")
    loss = method([images], None, noise())["loss"]
    close(loss, "mae/forward/loss_norm_pix" if norm_pix else "mae/forward/loss")
    if norm_pix:
        loss.backward()
        compared = set()
        for name, parameter in method.named_parameters():
            for ours, theirs_name in theirs.items():
                name = re.sub(ours, theirs_name, name)
            if f"mae/forward/grad/{name}" in REFERENCE.files:
                close(parameter.grad, f"mae/forward/grad/{name}")
                compared.add(f"mae/forward/grad/{name}")
        assert compared == {
            name for name in REFERENCE.files if name.startswith("mae/forward/grad/")
        }


def test_simmim() -> None:
    network = ViT(16, 8, 8, 2, depth=1)
    decoder = simmim.SimMIM(network, 8).double().decoder
    weights(decoder, "simmim/decoder.", {})
    reconstruction = decoder(U("simmim/features", 2, 8, 2, 2))
    close(reconstruction, "simmim/reconstruction")
    hidden = U("simmim/mask", 2, 4, 4) > -0.2
    close(hidden, "simmim/mask")
    loss = simmim.reconstruction_loss(U("simmim/images", 2, 3, 16, 16), reconstruction, hidden, 4)
    loss.backward()
    close(loss, "simmim/loss")
    close(decoder[0].weight.grad, "simmim/grad_decoder.0.weight")
    close(decoder[0].bias.grad, "simmim/grad_decoder.0.bias")


def test_simmim_masks() -> None:
    permutation = U("simmim/permutation", 16).argsort()
    rank = permutation.argsort().double()[None]  # a noise that has this order
    close(random_cells(rank, 0.6, 2).view(8, 8), "simmim/generated_mask")
    counts = [
        [
            int(random_cells(torch.rand(1, (size // patch) ** 2), ratio, 1).sum())
            for ratio in (0.1, 0.25, 0.4, 0.5, 0.6, 0.75)
        ]
        for size, patch in ((192, 32), (192, 16), (32, 8))
    ]
    close(torch.tensor(counts), "simmim/mask_count")


def test_block_masks() -> None:
    stream = ((U("dinov2/mask_numbers", 4096) + 1) / 2).tolist()
    used = 0

    def numbers() -> Iterator[float]:
        nonlocal used
        while True:
            used += 1
            yield stream[used - 1]

    numbers_ = numbers()
    drawn = [block_mask(numbers_, 8, target, 4, 32) for target in (0, 6, 12, 20, 28, 32)]
    close(torch.from_numpy(np.stack(drawn)), "dinov2/block_masks")
    close(torch.tensor(used), "dinov2/block_masks_numbers_used")


def test_dinov2_classes() -> None:
    large, small = leaf("dinov2/student_global", 24, 16), leaf("dinov2/student_local", 48, 16)
    teacher = U("dinov2/teacher", 24, 16)

    def exchanged(targets: Tensor) -> Tensor:
        return torch.cat(targets.chunk(2)[::-1])

    def compare(targets: Tensor, case: str) -> None:
        pairs = crossed(torch.cat([large, small]), targets, 0.1)  # 0-1, 0-small, 1-0, 1-small
        local = (pairs[1:5].sum() + pairs[6:].sum()) / 10
        of_large = (pairs[0] + pairs[5]) / 10
        close(local, f"dinov2/dino/{case}_local_loss")
        close(of_large, f"dinov2/dino/{case}_global_loss")
        torch.testing.assert_close(pairs.mean(), local + of_large)

    targets = sinkhorn(teacher, 0.05)
    close(exchanged(targets), "dinov2/dino/sinkhorn")
    compare(targets, "sinkhorn")
    crossed(torch.cat([large, small]), targets, 0.1).mean().backward()
    close(large.grad, "dinov2/dino/sinkhorn/grad_student_global")
    close(small.grad, "dinov2/dino/sinkhorn/grad_student_local")

    centring = Rising((1, 16), 0.05, 0.05, 1, 0.9).double()
    centring.begin(1.0)  # the temperature in float64
    centring(teacher)
    centring.move()
    found = centring(U("dinov2/teacher_second", 24, 16))
    centring.move()
    close(exchanged(found), "dinov2/dino/centering_call1")
    close(centring.center, "dinov2/dino/center")
    found = centring(teacher)
    close(exchanged(found), "dinov2/dino/centering_call2")
    compare(found, "centering")


@pytest.mark.parametrize("case", ["sinkhorn", "centering"])
@pytest.mark.parametrize("hidden_alone", [False, True])
def test_dinov2_patches(case: str, hidden_alone: bool) -> None:
    hidden = U("dinov2/masks", 4, 16) > 0.2
    hidden[1] = False
    close(hidden, "dinov2/ibot/masks")
    flat = hidden.flatten()
    teacher = U("dinov2/patch_teacher", 64, 16)
    if case == "sinkhorn":
        targets = sinkhorn(teacher[flat], 0.05)
    else:
        centring = Rising((1, 16), 0.05, 0.05, 1, 0.9).double()
        centring.begin(1.0)  # the temperature in float64
        centring(U("dinov2/patch_teacher_first", 64, 16)[flat])
        centring.move()
        close(centring.center, "dinov2/ibot/center")
        targets = centring(teacher[flat])
    everywhere = torch.zeros(64, 16, dtype=torch.float64)
    everywhere[flat] = targets
    close(everywhere, f"dinov2/ibot/{case}")
    student = leaf("dinov2/patch_student", 64, 16)
    if hidden_alone:
        loss = patch_loss(student[flat], targets, hidden, 0.1)
    else:
        loss = patch_loss(student, everywhere, hidden, 0.1)
    loss.backward()
    close(loss, f"dinov2/ibot/{case}_loss")
    close(student.grad, f"dinov2/ibot/{case}/grad_student")


def test_koleo() -> None:
    x = leaf("dinov2/koleo", 24, 16)
    loss = koleo(x)
    loss.backward()
    close(loss, "dinov2/koleo/loss")
    close(x.grad, "dinov2/koleo/grad_x")
    rows = x.detach()[:12]
    close(koleo(torch.cat([rows, rows[:1] + 1e-6])), "dinov2/koleo/loss_near_duplicate")


def ibot_masks() -> Tensor:
    hidden = U("ibot/masks", 2, 4, 4, 4) > 0.2
    hidden[0, 0] = False
    close(hidden, "ibot/masks")
    return hidden.flatten(0, 1).flatten(1)  # (crop and image, patch)


def test_ibot() -> None:
    classes = DINOLoss(16, 0.04, 0.07, 2).double()
    patches = PatchLoss(12, 0.04, 0.06, 2).double()
    for epoch, case in ((0, "epoch0"), (3, "epoch3_second_call")):
        classes.begin(epoch)
        patches.begin(epoch)
        of_class, local, of_patch = (
            leaf("ibot/student_cls", 8, 16),
            leaf("ibot/student_local_cls", 8, 16),
            leaf("ibot/student_patch", 8, 16, 12),
        )
        class_loss = classes(torch.cat([of_class, local]), U("ibot/teacher_cls", 8, 16))
        teacher = U("ibot/teacher_patch", 8, 16, 12)
        hidden = ibot_masks()
        found = patches(of_patch.flatten(0, 1), teacher, hidden)
        (class_loss + found).backward()
        classes.move()
        patches.move()
        close(class_loss, f"ibot/{case}/cls")
        close(found, f"ibot/{case}/patch")
        close(class_loss + found, f"ibot/{case}/loss")
        close(of_class.grad, f"ibot/{case}/grad_student_cls")
        close(local.grad, f"ibot/{case}/grad_student_local_cls")
        close(of_patch.grad, f"ibot/{case}/grad_student_patch")
        if epoch == 0:
            close(classes.center, "ibot/center")
            close(patches.center, "ibot/center2")


def test_ibot_without_small_crops() -> None:
    classes = DINOLoss(16, 0.04, 0.07, 2).double()
    patches = PatchLoss(12, 0.04, 0.06, 2, start_epoch=3).double()
    schedules: list[list[Tensor]] = [[], []]
    for epoch in range(8):
        for criterion, schedule in zip((classes, patches), schedules, strict=True):
            criterion.begin(epoch)
            schedule.append(criterion.temperature.clone())
    # the arrays have float64 where our buffer holds float32
    for schedule, name in zip(schedules, ("teacher_temp", "teacher_temp2"), strict=True):
        close(torch.stack(schedule), f"ibot/no_local/{name}_schedule")
    classes.begin(4)
    patches.begin(4)
    hidden = ibot_masks()
    of_patch = U("ibot/student_patch", 8, 16, 12).flatten(0, 1)
    where = hidden.flatten().nonzero().squeeze(1)
    loss = 0.5 * classes(U("ibot/student_cls", 8, 16), U("ibot/teacher_cls", 8, 16))
    loss = loss + 2 * patches(of_patch[where], U("ibot/teacher_patch", 8, 16, 12), hidden, where)
    close(loss, "ibot/no_local/loss")


def test_ijepa_blocks() -> None:
    for side, case in ((14, "14x14"), (16, "16x16")):
        sizes = [
            (
                *block_size(v / 20, side, (0.15, 0.2), (0.75, 1.5)),
                *block_size(v / 20, side, (0.85, 1.0), (1.0, 1.0)),
            )
            for v in range(20)
        ]
        close(torch.tensor(sizes), f"ijepa/block_size/{case}")


@pytest.mark.parametrize(
    ("case", "num_images", "scale", "min_keep"),
    [("collate", 3, (0.15, 0.2), 4), ("collate_retries", 6, (0.3, 0.45), 12)],
)
def test_ijepa_masks(case: str, num_images: int, scale: tuple, min_keep: int) -> None:
    chosen = (U(f"ijepa/{case}/rand", 2) + 1) / 2
    stream = ((U(f"ijepa/{case}/randint", 4096) + 1) / 2).tolist()
    used = 0

    def numbers() -> Iterator[float]:
        nonlocal used
        while True:
            used += 1
            yield stream[used - 1]

    numbers_ = numbers()
    target = block_size(chosen[0].item(), 8, scale, (0.75, 1.5))
    context = block_size(chosen[1].item(), 8, (0.85, 1.0), (1.0, 1.0))
    drawn = [
        targets_and_context(numbers_, 8, target, context, 4, min_keep) for _ in range(num_images)
    ]
    close(torch.tensor(used), f"ijepa/{case}/randint_calls")
    shortest = min(len(found) for _, found in drawn)
    contexts = np.stack([found[:shortest] for _, found in drawn])[None]
    close(torch.from_numpy(contexts), f"ijepa/{case}/context")
    targets = np.stack([np.stack(found) for found, _ in drawn], axis=1)
    close(torch.from_numpy(targets), f"ijepa/{case}/targets")


def test_ijepa() -> None:
    options = {"depth": 2, "positions": "sincos_columns", "class_token": False}
    method = ijepa.IJEPA(ViT(32, 8, 32, 4, **options), 16, 1, 4, min_keep=0).double()
    method.predictor.positions.copy_(sincos(4, 16, columns_first=True))
    encoder, target = method.student_backbone, method.backbone
    close(sincos(4, 16, columns_first=True), "ijepa/pos_embed")
    for network, prefix in ((encoder, "ijepa/encoder/"), (target, "ijepa/target/")):
        network.encoder.pos_embedding.data[0] = sincos(4, 32, columns_first=True)
        for parameter in network.parameters():  # the recipe's are those with a gradient
            parameter.requires_grad_(parameter is not network.encoder.pos_embedding)
        weights(network, prefix, VIT_NAMES)
    weights(method.predictor, "ijepa/predictor/", VIT_NAMES)
    target.requires_grad_(False)
    images = U("ijepa/images", 3, 3, 32, 32)
    contexts = [U(f"ijepa/context{e}", 3, 16).argsort(1)[:, :7] for e in range(2)]
    blocks = torch.stack([U(f"ijepa/block{b}", 3, 16).argsort(1)[:, :4] for b in range(3)], dim=1)
    wanted = F.layer_norm(target.tokens(images), (32,))
    wanted = torch.cat([taken(wanted, block) for block in blocks.unbind(1)])
    close(wanted, "ijepa/forward/target")
    predictions = [
        method.predictor(encoder.tokens(images, keep=context), context, blocks)
        for context in contexts
    ]
    close(predictions[0], "ijepa/forward/contexts1/prediction")
    loss = method([images], None, contexts[0], blocks)["loss"]
    close(loss, "ijepa/forward/contexts1/loss")
    loss.backward()
    compared = set()
    for module, name in ((encoder, "encoder"), (method.predictor, "predictor")):
        for key, parameter in module.named_parameters():
            for ours, theirs in VIT_NAMES.items():
                key = re.sub(ours, theirs, key)
            for suffix, part in (("", parameter.grad), ("_16", parameter.grad)):
                if (path := f"ijepa/forward/grad/{name}.{key}{suffix}") in REFERENCE.files:
                    close(part[:, :16] if suffix else part, path)
                    compared.add(path)
    assert compared == {name for name in REFERENCE.files if name.startswith("ijepa/forward/grad/")}
    both = torch.stack(
        [p.unflatten(0, (3, 3)) for p in predictions], dim=1
    )  # block, context, image
    close(both, "ijepa/forward/contexts2/prediction")
    targets = wanted.unflatten(0, (3, 3))[:, None].expand_as(both)
    close(prediction_loss(both, targets), "ijepa/forward/contexts2/loss")


def test_smooth_l1() -> None:
    z = leaf("ijepa/z", 6, 4, 16)
    loss = prediction_loss(2 * z, F.layer_norm(3 * U("ijepa/h", 6, 4, 16), (16,)))
    loss.backward()
    close(loss, "ijepa/smooth_l1/loss")
    close(z.grad, "ijepa/smooth_l1/grad_z")


def memory() -> Tensor:
    return F.normalize(U("deepcluster/memory", 2, 60, 8), dim=2)  # (crop, slot, D)


def clustered(iterations: int) -> tuple[Tensor, list[Tensor]]:
    """Assignments (set, image) and centroids of three sets, of crops 0, 1, 0."""
    image, slots = U("deepcluster/index", 60).argsort(), memory()
    assignments, centroids = torch.empty(3, 60, dtype=torch.long), []
    for number, size in enumerate((7, 7, 5)):
        first = U(f"deepcluster/perm/{number}", 60).argsort()[:size]
        embeddings = slots[number % 2]
        found, made = cluster(embeddings, embeddings[first], iterations)
        assignments[number, image] = found
        centroids.append(made)
    return assignments, centroids


@pytest.mark.parametrize("iterations", [0, 1, 10])
@pytest.mark.parametrize("block", [None, 7 * 9])
def test_clusters(iterations: int, block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine embeddings at a time are clustered as all at once."""
    if block:
        monkeypatch.setattr("ssl_bench.methods.deepcluster_v2.BLOCK", block)
    assignments, centroids = clustered(iterations)
    close(assignments, f"deepcluster/iters{iterations}/assignments")
    if iterations == 10:
        for number, made in enumerate(centroids):
            close(made, f"deepcluster/iters10/centroids{number}")


def test_an_empty_cluster_stays() -> None:
    slots, first = memory()[0], U("deepcluster/perm/0", 60).argsort()[:7]
    slots[first[1]] = slots[first[0]] / 2
    found, made = cluster(slots, slots[first], 2)
    assignments = torch.empty(1, 60, dtype=torch.long)
    assignments[0, U("deepcluster/index", 60).argsort()] = found
    close(assignments, "deepcluster/empty/assignments")
    close(made, "deepcluster/empty/centroids0")


def test_deepcluster() -> None:
    assignments, centroids = clustered(10)
    batch = U("deepcluster/batch", 60).argsort()[:10]
    embeddings = leaf("deepcluster/embeddings", 40, 8)
    loss = assignment_loss(embeddings.chunk(4), centroids, assignments.T[batch], 0.1)
    loss.backward()
    close(loss, "deepcluster/loss")
    close(embeddings.grad, "deepcluster/grad_embeddings")


def test_tico() -> None:
    covariance = torch.zeros(16, 16, dtype=torch.float64)
    for step in range(3):
        z1, z2 = (leaf(f"tico/{name}/{step}", 24, 16) for name in ("z1", "z2"))
        loss, covariance = tico_loss(z1, z2, covariance, 0.9, 8.0)
        loss.backward()
        close(loss, f"tico/loss{step}")
    close(z1.grad, "tico/grad_z1")
    close(z2.grad, "tico/grad_z2")
    close(covariance, "tico/C")


def test_vibcreg() -> None:
    z1, z2 = leaf("vibcreg/z1", 24, 16), leaf("vibcreg/z2", 24, 16)
    loss = vibcreg_loss(z1, z2, 25.0, 25.0, 200.0)
    loss.backward()
    close(loss, "vibcreg/loss")
    close(z1.grad, "vibcreg/grad_z1")
    close(z2.grad, "vibcreg/grad_z2")
    close(correlation(z1) + correlation(z2), "vibcreg/covariance")


@pytest.mark.parametrize("lambd", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [False, True])
def test_mmcr(lambd: float, momentum: bool) -> None:
    case = f"mmcr/momentum_lambda{lambd}" if momentum else f"mmcr/lambda{lambd}"
    z = leaf("mmcr/z", 36, 16)
    slow = U("mmcr/z_momentum", 36, 16).view(12, 3, 16) if momentum else None
    loss = mmcr_loss(z.view(12, 3, 16), lambd, slow)
    loss.backward()
    close(loss, f"{case}/loss")
    close(z.grad, f"{case}/grad_z")


def test_nnbyol() -> None:
    queue = F.normalize(U("nnbyol/queue", 48, 16), dim=1)
    p1, p2 = leaf("nnbyol/p1", 24, 16), leaf("nnbyol/p2", 24, 16)
    keys = (U(f"nnbyol/{name}", 24, 16) for name in ("k1", "k2"))
    neighbour1, neighbour2 = (queue[nearest(key, queue.T)] for key in keys)
    loss = regression_loss(p1, neighbour2) + regression_loss(p2, neighbour1)
    loss.backward()
    close(loss, "nnbyol/loss")
    close(p1.grad, "nnbyol/grad_p1")
    close(p2.grad, "nnbyol/grad_p2")


@pytest.mark.parametrize("case", ["plain", "sinkhorn", "smoothed_labels"])
def test_msn(case: str) -> None:
    anchors, prototypes = leaf("msn/anchors", 36, 16), leaf("msn/prototypes", 10, 16)
    targets = U("msn/targets", 12, 16)
    smoothing = 0.1 if case == "smoothed_labels" else 0.0
    options = (0.1, 0.25, case == "sinkhorn")
    loss, me_max, spread = msn_loss(anchors, targets, prototypes, *options, smoothing)
    close(loss, f"msn/{case}/loss")
    close(me_max, f"msn/{case}/me_max")
    close(spread, f"msn/{case}/entropy")
    if case != "smoothed_labels":
        (loss + 2.5 * me_max + 0.5 * spread).backward()
        close(anchors.grad, f"msn/{case}/grad_anchors")
        close(prototypes.grad, f"msn/{case}/grad_prototypes")
        wanted = sharpened(assigned(targets, prototypes.detach(), 0.1), 0.25, case == "sinkhorn")
        close(wanted, f"msn/{case}/targets")


def weight_decay(epoch: float, epochs: int) -> float:
    """DINOv2's and I-JEPA's, from 0.04 to 0.4, as the loop sets it."""
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    optimizer = adamw([weight], 1, weight_decay=0.04, final_weight_decay=0.4)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    schedule_(optimizer, 1.0, epoch, epochs)
    return optimizer.param_groups[0]["weight_decay"]


def test_schedules_of_dinov2() -> None:
    """40 steps, and two past the end. Their warm-up arrives a step earlier than ours, and has its
    last value twice.
    """
    steps = [min(step, 40) for step in range(42)]

    def rising_then(epoch: float, warmup: float) -> float:
        """When ours is as theirs is at `epoch`."""
        last = warmup - 1 / 4
        return epoch * warmup / last if epoch <= last else epoch

    cosine = Cosine(2, final=1e-6 / 0.004)
    rates = [0.004 * cosine(rising_then(step / 4, 2), 10) for step in steps]
    close(torch.tensor(rates, dtype=torch.float64), "dinov2/schedule/lr")
    frozen = [rate * (step >= 4) for step, rate in enumerate(rates)]  # by `frozen_epochs`
    close(torch.tensor(frozen, dtype=torch.float64), "dinov2/schedule/last_layer_lr")
    decays = [weight_decay(step / 4, 10) for step in steps]
    close(torch.tensor(decays, dtype=torch.float64), "dinov2/schedule/wd")
    momenta = [rising(0.992, step / 40) for step in steps]
    close(torch.tensor(momenta, dtype=torch.float64), "dinov2/schedule/momentum")
    center = Rising((1, 1), 0.04, 0.07, 3, 0.9).double()
    temperatures = []
    for step in steps:
        center.begin(rising_then(step / 4, 3))
        temperatures.append(center.temperature.clone())
    close(torch.stack(temperatures), "dinov2/schedule/teacher_temp")


def test_schedules_of_ijepa(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 steps of 50: theirs are made for a quarter more epochs, and count from 1. Their warm-up
    begins at a fifth of the rate, ours at 0.
    """
    cosine = Cosine(2, final=1e-3)
    rates = [1e-3 * cosine(step / 4, 12.5) for step in range(1, 41)]
    rates[:7] = [2e-4 + 8e-4 * rate / 1e-3 for rate in rates[:7]]
    close(torch.tensor(rates, dtype=torch.float64), "ijepa/schedule/lr")
    decays = [weight_decay(step, 50) for step in range(1, 41)]
    close(torch.tensor(decays, dtype=torch.float64), "ijepa/schedule/wd")
    momenta: list[float] = []
    monkeypatch.setattr(ijepa, "ema_", lambda ours, theirs, momentum: momenta.append(momentum))
    method = SimpleNamespace(momentum=0.996, backbone=None, student_backbone=None)
    for step in range(40):
        ijepa.IJEPA.update(method, step / 50)
    close(torch.tensor(momenta, dtype=torch.float64), "ijepa/schedule/momentum")


def test_no_array_is_forgotten(request: pytest.FixtureRequest) -> None:
    """Each was compared by a test above, or stands with its reason in LEFT_OUT."""
    names = {name for name in globals() if name.startswith("test_")}
    asked = {item.originalname for item in request.session.items if item.path == request.path}
    if names - asked:
        pytest.skip("some tests of this file weren't asked for")
    assert names == RAN  # on one worker
    left_out = {name for name in REFERENCE.files if name.startswith(tuple(LEFT_OUT))}
    assert COMPARED | left_out == set(REFERENCE.files)
    assert not COMPARED & left_out
    for beginning in LEFT_OUT:
        assert any(name.startswith(beginning) for name in left_out), beginning
