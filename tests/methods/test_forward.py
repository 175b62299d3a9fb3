"""What a method makes of its parts: its loss against the paper's equation, written once more; its
slow copy, too.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_methods import TwoLayers, drawn, optimizer_of
from torch import Tensor, nn

from ssl_bench.methods.barlow_twins import BarlowTwins
from ssl_bench.methods.base import Method
from ssl_bench.methods.byol import BYOL
from ssl_bench.methods.dcl import DCL
from ssl_bench.methods.deepcluster_v2 import DeepClusterV2
from ssl_bench.methods.dino import DINO, DINOLoss
from ssl_bench.methods.lejepa import LeJEPA
from ssl_bench.methods.mmcr import MMCR
from ssl_bench.methods.moco import MoCo
from ssl_bench.methods.moco_v3 import MoCoV3
from ssl_bench.methods.nnbyol import NNBYOL
from ssl_bench.methods.nnclr import NNCLR
from ssl_bench.methods.ressl import ReSSL
from ssl_bench.methods.simclr import SimCLR
from ssl_bench.methods.simsiam import SimSiam
from ssl_bench.methods.swav import SwAV, swapped_prediction_loss
from ssl_bench.methods.tico import TiCo
from ssl_bench.methods.vibcreg import VIbCReg
from ssl_bench.methods.vicreg import VICReg
from ssl_bench.methods.wmse import WMSE
from ssl_bench.training.optim import freeze_

MAKE: dict[str, Callable[[nn.Module], Method]] = {
    "simclr": lambda network: SimCLR(network, 8, temperature=0.3),
    "byol": lambda network: BYOL(network, 8, 12, momentum=0.9),
    "simsiam": lambda network: SimSiam(network, 12, 8),
    "moco_v3": lambda network: MoCoV3(network, 8, 12, momentum=0.9, temperature=0.3),
    "barlow_twins": lambda network: BarlowTwins(network, 8, lambd=0.02),
    "vicreg": lambda network: VICReg(network, 8, sim_coeff=3.0, std_coeff=5.0, cov_coeff=7.0),
    "swav": lambda network: SwAV(network, 8, 12, num_prototypes=6, queue_length=8, queue_start=1),
    "dino": lambda network: DINO(
        network, 16, 12, 8, momentum=0.9, warmup_teacher_temperature_epochs=5
    ),
    "lejepa": lambda network: LeJEPA(network, 8, 12, lambd=0.1, num_directions=5),
    "nnclr": lambda network: NNCLR(network, 8, 12, 10, queue_size=9, temperature=0.3),
    "dcl": lambda network: DCL(network, 8, temperature=0.3, sigma=0.5),
    "ressl": lambda network: ReSSL(network, 8, 12, queue_size=9, momentum=1.0, bn_splits=1),
    "wmse": lambda network: WMSE(network, 3, 12, whitening_size=6, eps=0.1),
    "deepcluster_v2": lambda network: DeepClusterV2(
        network, 6, 8, 12, num_prototypes=(3, 2, 4), iterations=1
    ),
    "tico": lambda network: TiCo(network, 8, 12, momentum=0.9, beta=0.7, rho=3.0),
    "vibcreg": lambda network: VIbCReg(
        network, 8, 12, num_groups=4, sim_coeff=3.0, std_coeff=5.0, cov_coeff=7.0
    ),
    "mmcr": lambda network: MMCR(network, 2, 8, 12, momentum=0.9, lambd=0.3),
    "nnbyol": lambda network: NNBYOL(network, 8, 12, momentum=0.9, queue_size=9),
}
# (slow copy, what it follows)
SLOW = {
    "byol": [("target_backbone", "backbone"), ("target_projector", "projector")],
    "moco_v3": [("key_backbone", "backbone"), ("key_projector", "projector")],
    "dino": [("backbone", "student_backbone"), ("head", "student_head")],
    "tico": [("target_backbone", "backbone"), ("target_projector", "projector")],
    "nnbyol": [("target_backbone", "backbone"), ("target_projector", "projector")],
    "mmcr": [("slow_backbone", "backbone"), ("slow_projector", "projector")],
}


def make(name: str) -> Method:
    """In float64; a slow copy differs from what it follows, as in training."""
    torch.manual_seed(0)
    method = MAKE[name](TwoLayers()).double().train()
    with torch.no_grad():
        for slow, _ in SLOW.get(name, ()):
            for parameter in getattr(method, slow).parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    method.prepare(iter([(views(16, 16, seed=2), torch.arange(6))]))
    method.begin(0.0, 10)
    return method


def views(*sizes: int, seed: int = 1, num: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(num, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes
    ]


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def info_nce(query: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The i-th key is the i-th query's own."""
    similarities = (
        torch.stack([cosines(query, key.expand_as(query)) for key in keys], dim=1) / temperature
    )
    return -(similarities.diagonal() - similarities.exp().sum(1).log()).mean()


def byol(m: BYOL, x: Tensor, y: Tensor) -> Tensor:
    def one(online: Tensor, target: Tensor) -> Tensor:
        prediction = m.predictor(m.projector(m.backbone(online)))
        return (
            2 - 2 * cosines(prediction, m.target_projector(m.target_backbone(target)).detach())
        ).mean()

    return one(x, y) + one(y, x)


def simsiam(m: SimSiam, x: Tensor, y: Tensor) -> Tensor:
    def one(predicting: Tensor, predicted: Tensor) -> Tensor:
        prediction = m.predictor(m.projector(m.backbone(predicting)))
        return -cosines(prediction, m.projector(m.backbone(predicted)).detach()).mean()

    return one(x, y) / 2 + one(y, x) / 2


def moco_v3(m: MoCoV3, x: Tensor, y: Tensor) -> Tensor:
    def one(query: Tensor, key: Tensor) -> Tensor:
        keys = m.key_projector(m.key_backbone(key)).detach()
        return (
            2
            * m.temperature
            * info_nce(m.predictor(m.projector(m.backbone(query))), keys, m.temperature)
        )

    return one(x, y) + one(y, x)


def simclr(m: SimCLR, x: Tensor, y: Tensor) -> Tensor:
    z = m.projector(m.backbone(torch.cat([x, y])))
    total = z.new_zeros(())
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        similarities = cosines(z[i].expand(len(others), -1), z[others]) / 0.3
        total = total - similarities.log_softmax(0)[others.index((i + len(x)) % len(z))]
    return total / len(z)


def barlow_twins(m: BarlowTwins, x: Tensor, y: Tensor) -> Tensor:
    z = [m.projector(m.backbone(view)) for view in (x, y)]
    a, b = ((v - v.mean(0)) / (v.var(0, correction=0) + 1e-5).sqrt() for v in z)
    matrix = torch.einsum("ni,nj->ij", a, b) / len(a)
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    return ((matrix - identity) ** 2 * (identity + 0.02 * (1 - identity))).sum()


def vicreg(m: VICReg, x: Tensor, y: Tensor) -> Tensor:
    z = [m.expander(m.backbone(view)) for view in (x, y)]
    invariance = ((z[0] - z[1]) ** 2).mean()
    variance = sum((1 - (v.var(0) + 1e-4).sqrt()).clamp(min=0).mean() for v in z) / 2
    covariance = sum((v.T.cov().fill_diagonal_(0) ** 2).sum() / v.shape[1] for v in z)
    return 3 * invariance + 5 * variance + 7 * covariance


def dino(m: DINO, x: Tensor, y: Tensor, *small: Tensor) -> Tensor:
    """Batch norm sees all crops of a size in one pass."""
    parts = [
        m.student_backbone(torch.cat([x, y])),
        *([m.student_backbone(torch.cat(small))] if small else ()),
    ]
    student = m.student_head(torch.cat(parts)).split(len(x))
    teacher = m.head(m.backbone(torch.cat([x, y]))).detach().split(len(x))
    center, losses = torch.zeros(16, dtype=x.dtype), []
    for i, of_teacher in enumerate(teacher):
        target = ((of_teacher - center) / 0.04).softmax(1)
        losses += [
            -(target * (s / 0.1).log_softmax(1)).sum(1).mean()
            for j, s in enumerate(student)
            if i != j
        ]
    return sum(losses) / len(losses)


def swav(m: SwAV, x: Tensor, y: Tensor, *small: Tensor) -> Tensor:
    parts = [m.backbone(torch.cat([x, y])), *([m.backbone(torch.cat(small))] if small else ())]
    crops = m.projector(torch.cat(parts)).split(len(x))
    return swapped_prediction_loss(
        crops, m.prototypes.weight / m.prototypes.weight.norm(dim=1, keepdim=True).detach()
    )


def lejepa(m: LeJEPA, x: Tensor, y: Tensor, *small: Tensor) -> Tensor:
    """Batch norm of the projector sees all views in one pass. The integral goes from -3 to 3."""
    backbone = [m.backbone(torch.cat([x, y])), *([m.backbone(torch.cat(small))] if small else ())]
    views = m.projector(torch.cat(backbone)).split(len(x))
    center = (views[0] + views[1]) / 2
    invariance = sum(((view - center) ** 2).mean() for view in views) / len(views)
    t = torch.linspace(-3, 3, 33, dtype=x.dtype)
    normal = torch.exp(-(t**2) / 2)
    statistics = []
    for view in views:
        for direction in m.directions.T:
            transform = torch.exp(1j * torch.outer(view @ direction, t)).mean(0)
            distance = (transform - normal).abs() ** 2 * normal
            statistics.append(len(view) * torch.trapezoid(distance, t))
    return 0.9 * invariance + 0.1 * sum(statistics) / len(statistics)


def nnclr(m: NNCLR, x: Tensor, y: Tensor) -> Tensor:
    def one(sought: Tensor, predicted: Tensor) -> Tensor:
        similarities = torch.stack(
            [cosines(sought, key.expand_as(sought)) for key in m.queue.keys.T]
        )
        neighbours = m.queue.keys.T[similarities.argmax(0)]
        return info_nce(neighbours, m.predictor(predicted), 0.3)

    z = [m.projector(m.backbone(view)) for view in (x, y)]
    return one(z[0], z[1]) / 2 + one(z[1], z[0]) / 2


def dcl(m: DCL, x: Tensor, y: Tensor) -> Tensor:
    """The positive counts by its weight, and stands in no denominator."""
    z = m.projector(m.backbone(torch.cat([x, y])))
    num, total = len(x), z.new_zeros(())
    share = torch.stack([(cosines(z[:num], z[num:]) / 0.5).softmax(0)] * 2).flatten()
    for i in range(2 * num):
        own = (i + num) % (2 * num)
        similarities = cosines(z[i].expand(2 * num, -1), z) / 0.3
        others = [j for j in range(2 * num) if j not in (i, own)]
        positive = (2 - num * share[i]) * similarities[own]
        total = total - positive + similarities[others].exp().sum().log()
    return total / (2 * num)


def ressl(m: ReSSL, x: Tensor, y: Tensor) -> Tensor:
    """The key's distribution over the queue, sharper, is the query's target."""

    def similarities(z: Tensor) -> Tensor:
        return z / z.norm(dim=1, keepdim=True) @ m.queue.keys

    target = (similarities(m.key_head(m.key_backbone(y))).detach() / 0.04).softmax(1)
    return -(target * (similarities(m.head(m.backbone(x))) / 0.1).log_softmax(1)).sum(1).mean()


def wmse(m: WMSE, x: Tensor, y: Tensor) -> Tensor:
    """The head sees both views in one pass. The Cholesky factor whitens by its inverse."""
    white = []
    for z in m.head(torch.cat([m.backbone(x), m.backbone(y)])).split(len(x)):
        factor = torch.linalg.cholesky(0.9 * z.T.cov() + 0.1 * torch.eye(3, dtype=z.dtype))
        white.append((z - z.mean(0)) @ factor.inverse().T)
    return (2 - 2 * cosines(*white)).mean()


def deepcluster_v2(m: DeepClusterV2, x: Tensor, y: Tensor, *small: Tensor) -> Tensor:
    """Of an epoch before: what `make` has put into the memory. Every crop learns every set."""
    parts = [m.backbone(torch.cat([x, y])), *([m.backbone(torch.cat(small))] if small else ())]
    crops = m.projector(torch.cat(parts)).split(len(x))
    losses = []
    for number, centroids in enumerate((m.centroids0, m.centroids1, m.centroids2)):
        embeddings = m.memory[number % 2]
        mine = (embeddings @ centroids.T).argmax(1)
        for crop in crops:
            similarities = torch.stack(
                [cosines(crop, centroid.expand_as(crop)) for centroid in centroids], dim=1
            )
            chosen = (similarities / 0.1).log_softmax(1)[range(len(x)), mine]
            losses.append(-chosen.mean())
    return sum(losses) / len(losses)


def tico(m: TiCo, x: Tensor, y: Tensor) -> Tensor:
    """The covariance is zero before, and gets no gradient."""
    z1 = m.projector(m.backbone(x))
    z2 = m.target_projector(m.target_backbone(y)).detach()
    unit = z1 / z1.norm(dim=1, keepdim=True)
    covariance = 0.3 * sum(torch.outer(row, row) for row in unit.detach()) / len(unit)
    contrast = sum(row @ covariance @ row for row in unit) / len(unit)
    return 1 - cosines(z1, z2).mean() + 3 * contrast


def vibcreg(m: VIbCReg, x: Tensor, y: Tensor) -> Tensor:
    """Whitened in four groups of two dimensions: five of Newton's steps for the inverse root."""

    def whitened(z: Tensor) -> Tensor:
        groups = []
        for group in z.split(2, dim=1):
            matrix = group.T.cov(correction=0) + 1e-5 * torch.eye(2, dtype=z.dtype)
            root = torch.eye(2, dtype=z.dtype)
            for _ in range(5):
                root = (3 * root - root @ root @ root @ (matrix / matrix.trace())) / 2
            groups.append((group - group.mean(0)) @ (root / matrix.trace().sqrt()))
        return torch.cat(groups, dim=1) * m.weight

    z = [whitened(m.projector(m.backbone(view))) for view in (x, y)]
    variance = sum((1 - (v.var(0) + 1e-4).sqrt()).clamp(min=0).mean() for v in z)
    off = [v.T.corrcoef() - torch.eye(8, dtype=v.dtype) for v in z]
    return 3 * ((z[0] - z[1]) ** 2).mean() + 5 * variance + 7 * sum((c**2).mean() for c in off)


def mmcr(m: MMCR, x: Tensor, y: Tensor) -> Tensor:
    """Networks see both views in one pass."""

    def directions(backbone: nn.Module, projector: nn.Module) -> Tensor:
        z = projector(backbone(torch.cat([x, y])))
        return torch.stack((z / z.norm(dim=1, keepdim=True)).split(len(x)))  # (2, N, D)

    z, slow = (
        directions(m.backbone, m.projector),
        directions(m.slow_backbone, m.slow_projector).detach(),
    )
    spread = torch.linalg.matrix_norm((z.mean(0) + slow.mean(0)) / 2, "nuc")
    return 0.3 * torch.linalg.matrix_norm(z.transpose(0, 1), "nuc").mean() - spread


def nnbyol(m: NNBYOL, x: Tensor, y: Tensor) -> Tensor:
    def one(online: Tensor, target: Tensor) -> Tensor:
        slow = m.target_projector(m.target_backbone(target))
        similarities = torch.stack([cosines(slow, key.expand_as(slow)) for key in m.queue.keys.T])
        prediction = m.predictor(m.projector(m.backbone(online)))
        return (2 - 2 * cosines(prediction, m.queue.keys.T[similarities.argmax(0)])).mean()

    return one(x, y) + one(y, x)


DEFINITIONS = [byol, simsiam, moco_v3, simclr, barlow_twins, vicreg, dino, swav]
DEFINITIONS += [lejepa, nnclr, dcl, ressl, wmse]
DEFINITIONS += [deepcluster_v2, tico, vibcreg, mmcr, nnbyol]


def gradients(method: Method, loss: Tensor) -> dict[str, Tensor]:
    method.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.__name__)
def test_the_loss_is_that_of_the_paper(definition: Callable[..., Tensor]) -> None:
    """Its value, and its gradient for every parameter: of each view, through the predictor, none to
    a target.
    """
    method = make(definition.__name__)
    batch = views(16, 16, 8, 8) if method.takes_small_views else views(16, 16)
    expected = definition(method, *batch)
    wanted = gradients(method, expected)
    loss = method(batch, None, *drawn(method, 6))["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    found = gradients(method, loss)
    assert (
        found.keys()
        == wanted.keys()
        == {name for name, p in method.named_parameters() if p.requires_grad}
    )
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", SLOW)
def test_the_slow_copy_follows_all_of_what_it_copies(name: str) -> None:
    """By a momentum that rises from 0.9 to 1 along half a cosine, MMCR's doesn't; buffers are its
    own; no optimizer has it.
    """
    for progress, momentum in ((0.5, 0.95), (2 / 3, 0.975), (1.0, 1.0)):
        momentum = 0.9 if name == "mmcr" else momentum
        method = make(name)
        method(views(16, 16))
        expected = {}
        for slow, fast in SLOW[name]:
            pairs = zip(
                getattr(method, slow).named_parameters(),
                getattr(method, fast).parameters(),
                strict=True,
            )
            expected |= {
                f"{slow}.{key}": momentum * ours + (1 - momentum) * theirs
                for (key, ours), theirs in pairs
            }
        method.update(progress)
        after = dict(method.named_parameters())
        for key, value in expected.items():
            torch.testing.assert_close(after[key], value, rtol=1e-9, atol=1e-12)
        given = {id(parameter) for group in method.param_groups() for parameter in group["params"]}
        assert not {key for key in expected if after[key].requires_grad or id(after[key]) in given}
        assert len(given) == len(after) - len(expected)


@pytest.mark.parametrize("splits", [2, 4])
def test_batch_norm_sees_the_keys_mixed_anew(splits: int) -> None:
    """Or it would tell which keys came with a query (MoCo, section 3.3)."""
    method, orders = MoCo(TwoLayers(), 8, 16, bn_splits=splits).train(), []
    method.key_backbone.register_forward_pre_hook(
        lambda _, given: orders.append(given[0][:, 0, 0, 0].tolist())
    )
    batch = torch.arange(16.0)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    for step in range(3):
        torch.manual_seed(step)
        method([batch, batch])
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    size = 16 // splits
    of_queries = [set(range(at, at + size)) for at in range(0, 16, size)]
    assert not [
        order
        for order in orders
        for at in range(0, 16, size)
        if set(order[at : at + size]) in of_queries
    ]


def test_the_teachers_temperature() -> None:
    """numpy.linspace over the warm-up's epochs in the authors' main_dino.py, then constant."""
    criterion = DINOLoss(4, 0.04, 0.07, warmup_epochs=4)
    found = []
    for epoch in range(6):
        criterion.begin(epoch)
        found.append(round(criterion.temperature.item(), 6))
    assert found == [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]


@pytest.mark.parametrize(("name", "layer"), [("swav", "prototypes"), ("dino", "student_head.last")])
def test_the_last_layer_waits_for_an_epoch(name: str, layer: str) -> None:
    method = make(name)
    optimizer, weight = (
        optimizer_of(method, 256, "optimizer=sgd"),
        method.get_submodule(layer).weight,
    )
    for epoch, moves in ((0.0, False), (0.9, False), (1.0, True)):
        method.begin(epoch, 10)
        before = weight.detach().clone()
        gradients(method, method(views(16, 16))["loss"])
        freeze_(optimizer, epoch)
        optimizer.step()
        assert torch.equal(weight, before) is not moves


def test_swavs_queue_joins_when_it_is_full_and_keeps_the_newest() -> None:
    """Prototypes have norm 1 whenever codes are made."""
    method = make("swav")
    with torch.no_grad():
        method.prototypes.weight.mul_(3)
    stored: list[Tensor] = []  # of each batch, the newest first
    for step in range(4):
        method.begin(1.0, 10)
        prototypes = method.prototypes.weight.detach()
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(6).double())
        batch = views(16, 16, seed=step, num=3)
        # 8 places, 3 images a batch
        queue = torch.cat(stored, dim=1)[:, :8] if len(stored) >= 3 else None
        with torch.no_grad():
            crops = method.projector(method.backbone(torch.cat(batch))).split(3)
        expected = swapped_prediction_loss(crops, prototypes, queue=queue)
        torch.testing.assert_close(method(batch)["loss"].detach(), expected, rtol=1e-9, atol=1e-12)
        stored.insert(0, torch.stack([F.normalize(crop, dim=1) for crop in crops]))
        torch.testing.assert_close(
            method.queue, torch.cat([*stored, torch.zeros(2, 8, 8)], dim=1)[:, :8].double()
        )


@pytest.mark.parametrize("name", ["nnclr", "nnbyol"])
def test_neighbours_are_sought_among_the_newest(name: str) -> None:
    """Nine places, six images a batch: the first view of each, where nnbyol has its slow copy's."""
    method, newest = make(name), []
    for step in range(2):
        batch = views(16, 16, seed=step)
        before = method.queue.keys.clone()
        with torch.no_grad():
            if name == "nnclr":
                z = method.projector(method.backbone(batch[0]))
            else:
                z = method.target_projector(method.target_backbone(batch[0]))
        newest.append(F.normalize(z, dim=1))
        method(batch)
        assert torch.equal(method.queue.keys, before)  # until the backward pass is over
        method.update(1.0)
    expected = torch.cat([newest[1][3:], newest[0][3:], newest[1][:3]])
    torch.testing.assert_close(method.queue.keys.T, expected)


def test_ticos_covariance_is_that_of_all_batches() -> None:
    method, expected = make("tico"), torch.zeros(8, 8).double()
    for step in range(3):
        batch = views(16, 16, seed=step)
        with torch.no_grad():
            z = F.normalize(method.projector(method.backbone(batch[0])), dim=1)
        expected = 0.7 * expected + 0.3 * z.T @ z / 6
        method(batch)
        method.update(1.0)
        torch.testing.assert_close(method.covariance, expected)
