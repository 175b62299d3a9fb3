"""What newer methods' own programs compute, in float64: parity_modern.npz, compared to 1e-9."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inputs import U
from torch import Tensor

from ssl_bench.methods.dcl import dcl_loss, one_way
from ssl_bench.methods.layers import Queue
from ssl_bench.methods.lejepa import epps_pulley, lejepa_loss, sigreg
from ssl_bench.methods.nnclr import nearest, nnclr_loss
from ssl_bench.methods.wmse import w_mse_loss, whiten

REFERENCE = np.load(Path(__file__).with_name("parity_modern.npz"))


def close(actual: Tensor, name: str) -> None:
    """To 1e-9 of the largest element; counts, masks and indices exactly."""
    expected = torch.from_numpy(REFERENCE[name])
    actual = actual.detach().to(expected.dtype).reshape(expected.shape)
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), name
        return
    worst = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    assert worst <= 1e-9, f"{name}: off by {worst:.2e} of its largest element"


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
    close(epps_pulley(z @ directions), "lejepa/slicing/statistics")
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
