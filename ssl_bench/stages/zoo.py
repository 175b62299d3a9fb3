"""Stage zoo: the known weights, published and one's own; which of them a file holds."""

from pathlib import Path

from omegaconf import DictConfig

from ssl_bench import files
from ssl_bench.config.fields import Place
from ssl_bench.errors import UserError
from ssl_bench.report import grouping, tables
from ssl_bench.runs import record, units
from ssl_bench.runs.published import WEIGHTS, place
from ssl_bench.runs.record import Ran
from ssl_bench.runs.run import Run

READS = ("runs",)


def zoo(cfg: DictConfig, run: Run, verify: Place | None = None) -> dict[str, float]:
    """Show the published weights, and the finished runs at or below `cfg.runs` with their numbers.

    verify: a file; say in place of that which of these weights it holds. UserError if it holds none
    of them, and isn't in SHA256SUMS beside it. Returns how many there are of each kind.
    """
    if not run.is_main:
        return {}
    runs = record.find(files.places(cfg.runs))
    own = [ran for ran in runs if ran.summary is not None and ran.weights]
    if verify is not None:
        print(identify(Path(verify), own))
        return {"verified": 1}
    rows = []
    for name, weights in WEIGHTS.items():
        there = "yes" if place(name).is_file() else "no"
        rows.append([name, weights.backbone, weights.note, f"md5 {weights.md5}", there])
    print(tables.markdown(["pretrained=", "backbone", "ImageNet", "hash", "downloaded"], rows))
    if own:
        rows = []
        for ran in own:
            sha256 = f"sha256 {files.digest(ran.weights)[:8]}"
            rows.append([str(ran.directory), recipe(ran), numbers(ran, runs), sha256])
        print("\n" + tables.markdown(["pretrained=", "recipe", "top-1 (%)", "hash"], rows))
    return {"published": len(WEIGHTS), "own": len(own)}


zoo.single_process = True


def identify(path: Path, own: list[Ran]) -> str:
    """A line that says which weights a file holds. UserError if they are unknown or damaged."""
    if not path.is_file():
        raise UserError(f"stage.verify={path}: no such file")
    if sums := files.check(path):
        return f"{path}: whole, as {sums} says"
    sha256, md5 = files.digest(path), files.digest(path, "md5")
    for name, weights in WEIGHTS.items():
        if md5.startswith(weights.md5):
            return f"{path}: {name}, {weights.backbone}, {weights.note}"
        if path.name == Path(weights.path).name:
            raise UserError(
                f"{path}: its md5 is {md5[:8]}..., not {weights.md5}, which {name} has: "
                "a broken or another file"
            )
    for ran in own:
        if files.digest(ran.weights) == sha256:
            return f"{path}: {ran.weights}, {recipe(ran)}"
    raise UserError(
        f"{path}: none of the known weights (md5 {md5[:8]}..., sha256 {sha256[:8]}...); "
        "runs=DIR compares it with your own, too"
    )


def recipe(ran: Ran) -> str:
    """How a run was made, in a few words."""
    config = ran.config
    names = [(config.get("method") or {}).get("name") or ran.stage, ran.identity.labels]
    names += [config[group]["name"] for group in ("backbone", "data") if group in config]
    names += [f"{config['epochs']} epochs", f"batch {config['batch_size']}"]
    names += [f"seed {config['seed']}"]
    return ", ".join(filter(None, names))


def numbers(ran: Ran, runs: list[Ran]) -> str:
    """The top-1 of a run, or those of the evaluations of its weights."""
    if "val_top1" in ran.summary:
        return units.shown("val_top1", [ran.summary["val_top1"]])
    rows = grouping.evaluations(record.measured(runs, ran.weights))
    return "; ".join(f"{row['name']}: {tables.cell(row, 'val_top1')} ({row['n']})" for row in rows)
