"""Stage doctor: what this machine can do, and what is missing for what."""

from omegaconf import DictConfig

from ssl_bench.doctor import show
from ssl_bench.runs.run import Run
from ssl_bench.stages import single_process

READS = ()


@single_process
def doctor(cfg: DictConfig, run: Run) -> dict[str, float]:
    """Print it, a line for each thing. Nothing is changed, and nothing fails."""
    show()
    return {}
