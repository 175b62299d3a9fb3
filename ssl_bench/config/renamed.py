"""Where constructors used to lie.

Configurations of earlier runs, sweeps and exports still name them by those places.
"""

BEFORE = {
    "ssl_bench.backbones.Pixels": "ssl_bench.backbones.pixels.Pixels",
    "ssl_bench.backbones.resnet101": "ssl_bench.backbones.resnet.resnet101",
    "ssl_bench.backbones.resnet18": "ssl_bench.backbones.resnet.resnet18",
    "ssl_bench.backbones.resnet34": "ssl_bench.backbones.resnet.resnet34",
    "ssl_bench.backbones.resnet50": "ssl_bench.backbones.resnet.resnet50",
    "ssl_bench.backbones.timm": "ssl_bench.backbones.timm.timm",
    "ssl_bench.backbones.vit_small": "ssl_bench.backbones.vit.vit_small",
    "ssl_bench.backbones.vit_tiny": "ssl_bench.backbones.vit.vit_tiny",
    "ssl_bench.data.formats.CIFAR": "ssl_bench.data.formats.cifar.CIFAR",
    "ssl_bench.data.formats.DL21": "ssl_bench.data.formats.dl21.DL21",
    "ssl_bench.data.formats.Digits": "ssl_bench.data.formats.digits.Digits",
    "ssl_bench.data.formats.Folder": "ssl_bench.data.formats.folder.Folder",
    "ssl_bench.data.formats.STL10": "ssl_bench.data.formats.stl10.STL10",
    "ssl_bench.data.formats.Synthetic": "ssl_bench.data.formats.synthetic.Synthetic",
    "ssl_bench.optim.adamw": "ssl_bench.training.optim.adamw",
    "ssl_bench.optim.lars": "ssl_bench.training.optim.lars",
    "ssl_bench.optim.sgd": "ssl_bench.training.optim.sgd",
    "ssl_bench.schedule.Constant": "ssl_bench.training.schedule.Constant",
    "ssl_bench.schedule.Cosine": "ssl_bench.training.schedule.Cosine",
    "ssl_bench.schedule.Step": "ssl_bench.training.schedule.Step",
    "ssl_bench.tracking.NoTracker": "ssl_bench.runs.tracking.NoTracker",
    "ssl_bench.tracking.WandbTracker": "ssl_bench.runs.tracking.WandbTracker",
}


def current(path: str) -> str:
    """The dotted path by which a constructor is called now."""
    return BEFORE.get(path, path)
