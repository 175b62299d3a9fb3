"""A step on a GPU that isn't there: what runs, on which device, without values. Needs no GPU;
kernels are not tested.

An operation that mixes devices fails, one that would wait for the GPU (`.item()`, indexing by a
mask) has no value to give and fails too, and copies between CPU and GPU are listed.
"""

from typing import Any

import pytest
import torch
from commands import compose
from small_methods import LEARNING, VITS, TwoLayers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_bench.augment.draws import keys
from ssl_bench.backbones.pixels import Pixels
from ssl_bench.config import build
from ssl_bench.methods.layers import Queue
from ssl_bench.methods.probe import LinearGrid
from ssl_bench.training.optim import LARS, clip_, freeze_, schedule_

BATCH, PIXELS = 8, 32


class Copies(TorchDispatchMode):
    """Notes every operation whose tensors are of several devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.found.append(
                f"{func} {[(str(tensor.device), *tensor.shape) for tensor in tensors]}"
            )
        return result


def put_on_gpu(module: nn.Module) -> None:
    """Parameters and buffers, as `module.to` does. What is not registered stays behind, as with
    `module.to`.
    """
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                if id(value) not in moved:
                    there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    if isinstance(value, nn.Parameter):
                        there = nn.Parameter(there, requires_grad=value.requires_grad)
                    moved[id(value)] = there, value
                table[name] = moved[id(value)][0]


def step(name: str) -> list[str]:
    """Two steps of a method with its own augmentation and optimizer; the copies between devices in
    the second.
    """
    overrides = ["stage=pretrain", "data=digits", f"method={name}", f"batch_size={BATCH}"]
    overrides += ["backbone=vit_tiny", "backbone.depth=1"] if name in VITS else []
    overrides += [f"data.image_size={PIXELS}"]
    if name == "ijepa":
        overrides += ["method.min_keep=0", "backbone.patch_size=4"]
    if name == "wmse":
        overrides += ["method.dim=2", "method.whitening_size=4"]
    if name == "deepcluster_v2":
        overrides += ["method.num_prototypes=[4,3]"]
    if name == "vibcreg":
        overrides += ["method.dim=8", "method.num_groups=4"]
    cfg = compose(*overrides)
    whole = name in ("supervised", *VITS)  # one ResNet: that's enough of them
    backbone = build.construct(cfg.backbone) if whole else TwoLayers()
    known = {"num_classes": 10, "batch_size": BATCH, "num_images": BATCH}
    known |= {"teacher_network": TwoLayers()}
    given = {key: value for key, value in known.items() if build.takes(cfg.method, key)}
    model = build.construct(cfg.method, backbone=backbone, **given).train()
    views = build.construct(cfg.augmentation)
    model.prepare(iter([([torch.rand(BATCH, 3, 8, 8)] * 2, torch.arange(BATCH))]))
    model.begin(0, 2)
    real = model.draw(keys(0, 0, torch.arange(BATCH)), torch.arange(BATCH))
    with FakeTensorMode():
        put_on_gpu(model)
        if name == "distill":  # not registered, and moved by its `_apply`
            put_on_gpu(model.teacher)
        put_on_gpu(views)
        optimizer = build.construct(cfg.optimizer, params=model.param_groups(), batch_size=BATCH)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        images = torch.empty(BATCH, PIXELS, PIXELS, 3, dtype=torch.uint8, device="cuda").permute(
            0, 3, 1, 2
        )
        labels = indices = torch.arange(BATCH, device="cuda")
        for number in range(2):
            with Copies() as copies:
                schedule_(optimizer, 0.5, number, 2)
                # these draw the sizes of blocks on the host, and wait, once an epoch
                if name not in ("ijepa", "deepcluster_v2"):
                    model.begin(number, 2)
                image_keys = keys(0, 0, indices)
                if name in ("ijepa", "ibot", "dinov2"):  # these draw on the host, on purpose
                    drawn = [torch.empty(v.shape, dtype=v.dtype, device="cuda") for v in real]
                else:
                    drawn = model.draw(image_keys, indices)
                output = model(views(images, image_keys), labels, *drawn)
                for value in output.values():
                    assert value.is_cuda
                for parameter in model.parameters():  # autograd's own threads need a real GPU
                    parameter.grad = (
                        torch.empty_like(parameter) if parameter.requires_grad else None
                    )
                clip_(optimizer)
                freeze_(optimizer, 0.0)
                if isinstance(optimizer, LARS):  # torch's fused ones have no fake kernels
                    optimizer.step()
                model.update(number / 2)
    return copies.found


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("name", LEARNING)
def test_a_step_stays_on_the_gpu(name: str) -> None:
    assert step(name) == []


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_step_of_many_classifiers_stays_on_the_gpu() -> None:
    grid = LinearGrid(Pixels(1), 10, cells=3, kept=0.8, normalize=True).train()
    with FakeTensorMode():
        put_on_gpu(grid)
        features, labels = (
            torch.empty(BATCH, 3, device="cuda"),
            torch.zeros(BATCH, 2, dtype=torch.int64, device="cuda"),
        )
        with Copies() as copies:
            output = grid([features], labels)
    assert copies.found == []
    assert all(value.is_cuda for value in output.values())


@pytest.mark.parametrize("mistake", ["waits", "mixes", "copies"])
def test_what_would_be_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue = Queue.enqueue

    def mistaken(self: Queue, queued: Tensor) -> None:
        if mistake == "waits":
            self.pointer.item()
        elif mistake == "mixes":
            self.keys[:, : len(queued)] = self.keys[:, : len(queued)] + torch.zeros(len(queued))
        else:
            self.pointer.copy_(torch.zeros(1, dtype=torch.long))
        enqueue(self, queued)

    monkeypatch.setattr(Queue, "enqueue", mistaken)
    if mistake == "copies":
        assert len(step("moco_v2")) == 1
    else:
        with pytest.raises(Exception, match=r"local_scalar|cuda:0(,| and) cpu"):
            step("moco_v2")
