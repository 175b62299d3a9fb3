"""The loops that ours is measured against, each run as a process of its own.

    python benchmarks/contenders.py plain IMAGES --backbone resnet18 --batch 128 --workers 2
    --warmup 4 --steps 8

IMAGES is an image folder (IMAGES/CLASS/*.png). `plain` does what the authors' repository does
(github.com/facebookresearch/moco), on one device; `lightly` is the MoCo example of lightly's
documentation at the same queue, batch, backbone and optimizer. `--tuned`: as a good user of it
would run it, in bfloat16 autocast, channels_last, with a fused optimizer, without waiting for the
loss, on a GPU compiled. Prints a line of JSON: the seconds of `--steps` steps after `--warmup`
others, for each of the given numbers of workers.
"""

import argparse
import copy
import json
import random
import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

DIM, MOMENTUM, TEMPERATURE, BASE_LR = 128, 0.999, 0.2, 0.03
Step = Callable[[list[Tensor]], None]  # of two views
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Tuning:
    """What `--tuned` changes of a peer; without it, nothing."""

    def __init__(self, tuned: bool, device: torch.device) -> None:
        self.tuned, self.device = tuned, device

    def network(self, module: nn.Module) -> nn.Module:
        """In channels_last, and on a GPU compiled: on a CPU that takes longer than it brings."""
        if self.tuned:
            module.to(memory_format=torch.channels_last)
            if self.device.type == "cuda":
                module.compile()
        return module

    def sgd(self, params: Iterator[nn.Parameter] | list, lr: float) -> torch.optim.Optimizer:
        fused = True if self.tuned else None
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=1e-4, fused=fused)

    def images(self, views: list[Tensor]) -> list[Tensor]:
        layout = torch.channels_last if self.tuned else torch.preserve_format
        return [view.to(self.device, non_blocking=True, memory_format=layout) for view in views]

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.tuned)


class GaussianBlur:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def plain_transform(image_size: int) -> Callable[[Image.Image], Tensor]:
    """MoCo v2's augmentation, from torchvision's transforms of PIL images."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([GaussianBlur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class TwoCrops:
    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [self.transform(image), self.transform(image)]


class PlainMoCo(nn.Module):
    """Query encoder, key encoder, queue; without the shuffle of batch norm, which is for several
    devices.
    """

    def __init__(self, backbone: str, queue_size: int) -> None:
        super().__init__()
        self.query_encoder = getattr(torchvision.models, backbone)(num_classes=DIM)
        width = self.query_encoder.fc.in_features
        self.query_encoder.fc = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), self.query_encoder.fc
        )
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(DIM, queue_size), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, query_images: Tensor, key_images: Tensor) -> Tensor:
        query = F.normalize(self.query_encoder(query_images), dim=1)
        with torch.no_grad():
            for theirs, ours in zip(
                self.query_encoder.parameters(), self.key_encoder.parameters(), strict=True
            ):
                ours.mul_(MOMENTUM).add_(theirs.mul(1 - MOMENTUM))
            key = F.normalize(self.key_encoder(key_images), dim=1).to(self.queue.dtype)
        positive = torch.einsum("nc,nc->n", query, key).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", query, self.queue.clone())
        logits = torch.cat([positive, negative], dim=1)
        logits /= TEMPERATURE
        start = int(self.pointer)
        self.queue[:, start : start + len(key)] = key.T  # the batch divides the queue
        self.pointer[0] = (start + len(key)) % self.queue.shape[1]
        return logits


def plain(args: argparse.Namespace, device: torch.device, tuning: Tuning) -> tuple[Dataset, Step]:
    dataset = torchvision.datasets.ImageFolder(
        args.images, TwoCrops(plain_transform(args.image_size))
    )
    model = PlainMoCo(args.backbone, args.queue).to(device).train()
    tuning.network(model.query_encoder)
    tuning.network(model.key_encoder)
    optimizer = tuning.sgd(model.parameters(), BASE_LR * args.batch / 256)

    def step(views: list[Tensor]) -> None:
        target = torch.zeros(args.batch, dtype=torch.long, device=device)
        with tuning.autocast:
            loss = F.cross_entropy(model(*tuning.images(views)), target)
        if not tuning.tuned:
            loss.item()  # the authors' loop shows it, and two accuracies, which are left out here
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return dataset, step


def lightly(args: argparse.Namespace, device: torch.device, tuning: Tuning) -> tuple[Dataset, Step]:
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform

    resnet = getattr(torchvision.models, args.backbone)()
    width = resnet.fc.in_features
    encoder = nn.Sequential(*list(resnet.children())[:-1]).to(device)
    head = MoCoProjectionHead(width, width, DIM).to(device)
    key_encoder, key_head = copy.deepcopy(encoder), copy.deepcopy(head)
    deactivate_requires_grad(key_encoder)
    deactivate_requires_grad(key_head)
    tuning.network(encoder)
    tuning.network(key_encoder)
    criterion = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(args.queue, DIM)).to(device)
    trained = [*encoder.parameters(), *head.parameters()]
    optimizer = tuning.sgd(trained, BASE_LR * args.batch / 256)

    def step(views: list[Tensor]) -> None:
        update_momentum(encoder, key_encoder, m=MOMENTUM)
        update_momentum(head, key_head, m=MOMENTUM)
        query_images, key_images = tuning.images(views)
        with tuning.autocast:
            query = head(encoder(query_images).flatten(start_dim=1))
            with torch.no_grad():
                key = key_head(key_encoder(key_images).flatten(start_dim=1))
        loss = criterion(query.float(), key.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return LightlyDataset(args.images, transform=MoCoV2Transform(input_size=args.image_size)), step


def endless(dataset: Dataset, batch: int, workers: int, pin: bool) -> Iterator[list[Tensor]]:
    """Batches of two views, epoch after epoch."""
    loader = DataLoader(
        dataset,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
    )
    while True:
        for views, *_ in loader:
            yield views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender", choices=["plain", "lightly"])
    parser.add_argument("images")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tuned", action="store_true")
    args = parser.parse_args()

    # more workers than cores are tried too
    warnings.filterwarnings("ignore", "This DataLoader will create")
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # as the authors do
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    make = {"plain": plain, "lightly": lightly}[args.contender]
    dataset, step = make(args, device, Tuning(args.tuned, device))
    seconds = {}
    for workers in args.workers:
        batches = endless(dataset, args.batch, workers, pin=device.type == "cuda")
        for _ in range(args.warmup):
            step(next(batches))
        wait()
        began = time.perf_counter()
        for _ in range(args.steps):
            step(next(batches))
        wait()
        seconds[workers] = time.perf_counter() - began
        batches.close()
    print(json.dumps({"seconds": seconds, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
