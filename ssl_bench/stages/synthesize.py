"""Stage synthesize: write the procedural images to disk, in the dl21 layout."""

from omegaconf import DictConfig
from pydantic import NonNegativeInt

from ssl_bench.config.fields import Place
from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import UserError
from ssl_bench.runs.run import Run
from ssl_bench.stages import single_process

READS = ("data",)


@single_process
def synthesize(
    cfg: DictConfig, run: Run, out: Place, num_request: NonNegativeInt = 0
) -> dict[str, float]:
    """Write the images to `out`, a new folder, and return how many there are of each kind.

    num_request: how many images of unlabeled/ have labels, in request_00.csv and label_00.pt.
    """
    data = cfg.data
    if data.name != "synthetic":
        raise UserError(f"stage=synthesize writes data=synthetic, not data={data.name}")
    counts = {key: data[key] for key in ("num_unlabeled", "num_train", "num_val")}
    look = {"num_classes": data.num_classes, "seed": data.seed, "image_size": data.image_size}
    write_dl21(out, **counts, **look, num_request=num_request, workers=data.workers)
    print(f"written: {sum(counts.values()):,} images; read them with data=dl21 data.root={out}")
    return counts
