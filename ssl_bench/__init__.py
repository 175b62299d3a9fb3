"""Self-supervised pretraining of image backbones, and numbers you can trust.

run = ssl_bench.train(["stage=pretrain", "method=simclr"])  # as `ssl-bench stage=pretrain ...`
backbone, transform = ssl_bench.load(run)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_bench.api import Transform, load, train
    from ssl_bench.command import Result
    from ssl_bench.errors import UserError

__version__ = "0.1.0"
__all__ = ["Result", "Transform", "UserError", "__version__", "load", "train"]

_HOMES = {"Result": "command", "Transform": "api", "UserError": "errors"}
_HOMES |= {"load": "api", "train": "api"}


def __getattr__(name: str) -> Any:
    """Imported when first used: `import ssl_bench` alone takes no time."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return globals()[name]
