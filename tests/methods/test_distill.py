"""A frozen teacher: the losses by hand, who has its weights, and what a run is called."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import compose
from small_methods import RUN, make, resnet, teacher, views_of
from torch import Tensor

from ssl_bench import files
from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.methods.distill import Distill, cosine_loss, gram_loss
from ssl_bench.runs import layout, record
from ssl_bench.runs.identity import Identity
from ssl_bench.stages._teacher import load_teacher

SMALL_VIT = ["backbone=vit_tiny", "backbone.patch_size=4", "backbone.depth=1"]
# a student of another family than the teacher
STUDENT = [*(word for word in RUN if not word.startswith("backbone.")), *SMALL_VIT, "epochs=1"]
STUDENT += ["method=distill", "method.hidden_dim=32", "optimizer.base_lr=1e-3", "eval_every=0"]


def features(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_losses_by_hand() -> None:
    student, wanted = features(6, 3, seed=0).requires_grad_(), features(6, 3, seed=1)
    s, t = student.detach().numpy(), wanted.numpy()
    cosines = (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
    assert cosine_loss(student, wanted).item() == pytest.approx(1 - cosines.mean(), abs=1e-12)
    other = features(6, 5, seed=2)  # of another width
    rows = []
    for x in (s, other.numpy()):
        products = x @ x.T
        rows.append(products / np.linalg.norm(products, axis=1, keepdims=True))
    expected = ((rows[0] - rows[1]) ** 2).sum() / 6**2
    assert gram_loss(student, other).item() == pytest.approx(expected, abs=1e-12)
    assert gram_loss(student, student @ torch.linalg.qr(features(3, 3, seed=3))[0]) < 1e-24


@pytest.mark.parametrize("loss", ["cosine", "gram"])
def test_the_teacher_stays_as_it_was_and_out_of_the_state(loss: str) -> None:
    """In eval mode, without a gradient, at the device of the student."""
    torch.manual_seed(0)
    network = resnet()
    method = Distill(resnet(), network, "x", loss=loss, hidden_dim=16).train().double()
    assert not network.training
    assert next(network.parameters()).dtype == torch.float64
    before = {key: value.clone() for key, value in network.state_dict().items()}
    method([view.double() for view in views_of("distill", 8)])["loss"].backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert method.backbone.conv1.weight.grad.any()
    trained = {id(p) for group in method.param_groups() for p in group["params"]}
    assert not trained & {id(p) for p in network.parameters()}
    shapes = [tuple(value.shape) for value in method.state_dict().values()]
    assert len(shapes) == len(method.backbone.state_dict()) + len(method.projector.state_dict()) + 1
    assert method.state_dict()["teacher_digest"].shape == (32,)


def test_a_state_of_another_teacher_is_refused() -> None:
    method = make("distill")
    state = {key: value.clone() for key, value in method.state_dict().items()}
    method.load_state_dict(state)
    state["teacher_digest"] += 1
    with pytest.raises(UserError, match="learnt from another teacher"):
        method.load_state_dict(state)


def test_a_run_is_known_by_the_content_of_its_teacher(tmp_path: Path) -> None:
    result = launch(compose(*STUDENT, f"method.teacher={teacher()}", f"dir={tmp_path}/run"))
    assert 0 < result["loss"] < 2
    (ran,) = record.find([tmp_path])
    file = layout.complete(teacher())[0]
    digest = files.digest(file)
    assert ran.config["method"]["teacher_sha256"] == digest
    assert ran.identity.own["method.teacher"] == f"sha256 {digest[:16]}"
    assert ran.name == "distill"
    # the same by another spelling of its place, and done already
    again = [*STUDENT, f"method.teacher={file}", f"dir={tmp_path}/run"]
    assert launch(compose(*again)) == result
    moved = {**ran.config, "method": {**ran.config["method"], "teacher": "/elsewhere"}}
    assert Identity(moved).key == Identity(ran.config).key
    other = {**ran.config, "method": {**ran.config["method"], "teacher_sha256": "0" * 64}}
    assert Identity(other).key != Identity(ran.config).key
    changed = torch.load(file, weights_only=True)
    changed["model"]["backbone.bn1.bias"] += 1
    shutil.copytree(teacher(), tmp_path / "other")
    torch.save(changed, layout.complete(tmp_path / "other")[0])
    (tmp_path / "other" / files.SUMS).unlink()
    with pytest.raises(UserError, match=r"holds a run with another .*method\.teacher was sha256"):
        launch(compose(*STUDENT, f"method.teacher={tmp_path}/other", f"dir={tmp_path}/run"))
    with pytest.raises(UserError, match=r"is another network than that of"):
        launch(compose(*again, "method.teacher_sha256=00ff"))


def test_teachers_that_are_not_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of torchvision's names says by its tensors which network it is of; timm has names."""
    from torchvision.models import resnet18

    whole = resnet18()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    cfg = compose("method=distill", f"method.teacher={tmp_path}/weights.pth")
    network = load_teacher(cfg)
    assert (type(network).__name__, network.dim) == ("ResNet", 512)
    assert torch.equal(network.conv1.weight, whole.conv1.weight)
    torch.save({"w": torch.zeros(3)}, tmp_path / "strange.pth")
    with pytest.raises(UserError, match=r"method\.teacher=.*strange\.pth: doesn't say which of"):
        load_teacher(compose("method=distill", f"method.teacher={tmp_path}/strange.pth"))
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(  # the network, without the download
        "ssl_bench.backbones.timm._fetched",
        lambda model, options: timm.create_model(model, num_classes=0, **options),
    )
    named = compose("method=distill", "method.teacher=timm:resnet10t")
    build.check(named)
    assert load_teacher(named).dim == 512
    assert Identity({"method": {"teacher": "timm:resnet10t"}}).own["method.teacher"] == (
        "timm:resnet10t"
    )
    with pytest.raises(UserError, match=r"^method\.teacher=nowhere: no such file .* timm:NAME"):
        launch(compose(*STUDENT, "method.teacher=nowhere", f"dir={tmp_path}/run"))
