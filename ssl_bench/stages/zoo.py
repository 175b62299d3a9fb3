"""Stage zoo: the known weights, published and one's own; which of them a file holds."""

import textwrap
from pathlib import Path

from omegaconf import DictConfig

from ssl_bench import files, shell
from ssl_bench.config.fields import Place
from ssl_bench.errors import UserError, several
from ssl_bench.report import grouping, tables
from ssl_bench.runs import record, units
from ssl_bench.runs.published import WEIGHTS, place
from ssl_bench.runs.record import Ran
from ssl_bench.runs.run import Run
from ssl_bench.stages import single_process

READS = ("runs",)


@single_process
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
    head = ["pretrained=", "backbone=", "top-1", "recipe", "licence", "hash"]
    rows = []
    for name, weights in WEIGHTS.items():
        told = [name, weights.backbone, f"{weights.top1:.1f}", weights.recipe]
        rows.append([*told, weights.licence, weights.hash])
    text, left_out = tables.fitted(head, rows)
    print(text)
    if left_out:
        print(f"A wider terminal also shows: {', '.join(left_out)}")
    here = [name for name in WEIGHTS if place(name).is_file()]
    note = (
        "top-1: percent of ImageNet's val set, as the authors report it: of a linear classifier on "
        "frozen features, and for supervised weights of the network itself. To use one: "
        "stage=lincls, with the row's pretrained= and backbone="
    )
    print(textwrap.fill(note, tables.width()))
    print(
        textwrap.fill(
            f"Downloaded: {', '.join(here) or 'none'}", tables.width(), subsequent_indent="  "
        )
    )
    for ran in own:
        print(f"\n{shell.override('pretrained', ran.directory)}")
        sha256 = f"sha256 {files.digest(ran.weights)[:8]}"
        for text in (recipe(ran), *numbers(ran, runs), sha256):
            lines = textwrap.wrap(tables.plain(text), tables.width() - 4, subsequent_indent="  ")
            print(textwrap.indent("\n".join(lines), "  "))
    return {"published": len(WEIGHTS), "own": len(own)}


def identify(path: Path, own: list[Ran]) -> str:
    """A line that says which weights a file holds. UserError if they are unknown or damaged."""
    if not path.is_file():
        raise UserError(f"stage.verify={path}: no such file")
    if sums := files.check(path):
        return f"{path}: whole, as {sums} says"
    found = {algorithm: files.digest(path, algorithm) for algorithm in ("md5", "sha256")}
    md5, sha256 = found.values()
    for name, weights in WEIGHTS.items():
        algorithm, _, digits = weights.hash.partition(" ")
        if not digits:
            continue
        if found[algorithm].startswith(digits):
            return f"{path}: {name}, {weights.recipe}, backbone={weights.backbone}"
        if path.name in (Path(weights.url).name, place(name).name):
            raise UserError(
                f"{path}: its {algorithm} is {found[algorithm][:8]}..., not {digits}, which {name} "
                "has: a broken or another file"
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
    names += [several(config["epochs"], "epoch"), f"batch {config['batch_size']}"]
    names += [f"seed {config['seed']}"]
    return ", ".join(filter(None, names))


def numbers(ran: Ran, runs: list[Ran]) -> list[str]:
    """The top-1 (percent) of a run, or those of the evaluations of its weights, a text each."""
    if "val_top1" in ran.summary:
        return [
            f"{units.unit('val_top1').label}: {units.shown('val_top1', [ran.summary['val_top1']])}"
        ]
    rows = grouping.evaluations(record.measured(runs, ran.weights))
    return [f"{row['name']}: {tables.cell(row, 'val_top1')} ({row['n']})" for row in rows]
