"""Stage zoo: known weights, published and one's own, and whether a file is one of them."""

from pathlib import Path

from omegaconf import DictConfig

from ssl_bench import finished, report
from ssl_bench.errors import UserError
from ssl_bench.finished import Result
from ssl_bench.run import Run
from ssl_bench.zoo import SUMS, WEIGHTS, digest, place


def zoo(cfg: DictConfig, run: Run, verify: str | None = None) -> dict[str, float]:
    """Show the published weights, and the finished runs at or below `cfg.runs` with what was measured of them.

    verify: a file, in place of that: which weights it holds; UserError where they are none of these, nor as SHA256SUMS
    beside it says. Returns how many there are of each kind.
    """
    if not run.is_main:
        return {}
    runs = finished.find(cfg.runs)
    own = [result for result in runs if result.weights]
    if verify is not None:
        print(identify(Path(verify).expanduser(), own))
        return {"verified": 1}
    published = [
        [name, weights.backbone, weights.note, f"md5 {weights.md5}", "yes" if place(name).is_file() else "no"]
        for name, weights in WEIGHTS.items()
    ]
    print(report.markdown(["pretrained=", "backbone", "ImageNet", "hash", "downloaded"], published))
    if own:
        rows = [
            [str(result.directory), recipe(result), numbers(result, runs), f"sha256 {digest(result.weights)[:8]}"]
            for result in own
        ]
        print("\n" + report.markdown(["pretrained=", "recipe", "top-1 (%)", "hash"], rows))
    return {"published": len(WEIGHTS), "own": len(own)}


zoo.single_process = True


def identify(path: Path, own: list[Result]) -> str:
    if not path.is_file():
        raise UserError(f"stage.verify={path}: no such file")
    sums = path.with_name(SUMS)
    listed = dict(line.split(maxsplit=1)[::-1] for line in sums.read_text().splitlines()) if sums.is_file() else {}
    sha256, md5 = digest(path), digest(path, "md5")
    if path.name in listed:
        if listed[path.name] != sha256:
            raise UserError(
                f"{path}: its sha256 is {sha256[:8]}..., not {listed[path.name][:8]}... as {sums} says: a broken or "
                "another file; export or copy it again"
            )
        return f"{path}: whole, as {sums} says"
    for name, weights in WEIGHTS.items():
        if md5.startswith(weights.md5):
            return f"{path}: {name}, {weights.backbone}, {weights.note}"
        if path.name == Path(weights.path).name:
            raise UserError(
                f"{path}: its md5 is {md5[:8]}..., not {weights.md5}, which {name} has: a broken or another file"
            )
    for result in own:
        if digest(result.weights) == sha256:
            return f"{path}: {result.weights}, {recipe(result)}"
    raise UserError(
        f"{path}: none of the known weights (md5 {md5[:8]}..., sha256 {sha256[:8]}...); runs=DIR compares it with your "
        "own, too"
    )


def recipe(result: Result) -> str:
    config = result.config
    what = (config.get("method") or {}).get("name") or result.stage + few(result)
    names = [what, *(config[group]["name"] for group in ("backbone", "data") if group in config)]
    return ", ".join([*names, f"{config['epochs']} epochs", f"batch {config['batch_size']}", f"seed {config['seed']}"])


def numbers(result: Result, runs: list[Result]) -> str:
    """Its own, or those of what measured it."""
    if "val_top1" in result.summary:
        return f"{result.summary['val_top1']:.1f}"
    groups = finished.groups(finished.measuring(runs, result.weights))
    names = [members[0].stage + few(members[0]) for members in groups]
    values = [f"{finished.mean_std(members, 'val_top1')} ({len(members)})" for members in groups]
    return "; ".join(map(": ".join, zip(names, values, strict=True)))


def few(result: Result) -> str:
    labels = finished.labels(result)
    return "" if labels == "all" else f" with {labels}"
