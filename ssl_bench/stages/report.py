"""Stage report: the results of runs as a page, a text and a file."""

import json
import logging
from pathlib import Path

import torch
from omegaconf import DictConfig
from pydantic import NonNegativeInt

from ssl_bench import files
from ssl_bench.augment.views import EvalView
from ssl_bench.config import build
from ssl_bench.config.fields import Place
from ssl_bench.data.formats.base import Dataset, SplitName
from ssl_bench.data.source import Source
from ssl_bench.errors import UserError, unknown, writable
from ssl_bench.evaluate import calibration
from ssl_bench.evaluate.passes import extract
from ssl_bench.methods.probe import restored
from ssl_bench.report import grouping, page, tables
from ssl_bench.report.grouping import Board, Group
from ssl_bench.report.tables import markdown
from ssl_bench.runs import checkpoint, layout, record, weights
from ssl_bench.runs.record import Ran
from ssl_bench.runs.run import Run
from ssl_bench.stages import single_process
from ssl_bench.stages._pretrained import as_measured, features_of, view_of
from ssl_bench.stages._training import check_size, on_device, open_source

log = logging.getLogger(__name__)

# what results.json keeps of environment.json
KEPT: tuple[str, ...] = ("started", "platform", "python", "packages", "git_commit", "git_dirty")
KEPT += ("cpu_threads", "gpus")
TOLERANCE = 0.05  # points by which the top-1 of new predictions may differ from the run's


DATA = ("data.name", "data.root", "data.cache", "data.workers")
READS = ("runs", "metric", *DATA, "source", "batch_size", "device")


@single_process
def report(
    cfg: DictConfig,
    run: Run,
    out: Place | None = None,
    details: NonNegativeInt = 3,
    readme: Place | None = None,
) -> dict[str, float]:
    """Write report.html, results.md and results.json of the runs at or below `cfg.runs`.

    details: how many of the best groups of runs are loaded, for predictions, neighbours and a map.
    readme: a Markdown file whose tables are made anew. Returns how many runs there are and how many
    are finished. UserError if there is nothing to report.
    """
    paths = files.places(cfg.runs)
    if not paths and readme is None:
        raise UserError(
            "runs= needs a value: a run, a sweep, a folder of them, or a list: "
            "runs=DIR or runs=[DIR,DIR]"
        )
    folder = Path(out or (paths[0] if len(paths) == 1 else "runs/report"))
    counts = write(cfg, run, paths, folder, details) if paths else {}
    if readme is not None:
        fill(Path(readme))
    return counts


def write(
    cfg: DictConfig, run: Run, paths: list[Path], folder: Path, details: int
) -> dict[str, float]:
    """Write the three files. Returns what `report` does."""
    runs = record.find(paths)
    boards = grouping.boards(runs, cfg.metric)
    if cfg.metric and all(board.metric != cfg.metric for board in boards):
        known = sorted({metric for ran in runs if not ran.holds_runs for metric in ran.values})
        raise UserError(f"metric={unknown('metric of these runs', cfg.metric, known)}")
    with writable("stage.out", folder):
        folder.mkdir(parents=True, exist_ok=True)
        candidates = choose(boards)
        shown = [examine(cfg, run, group) for group in candidates[:details]]
        shown += [votes(group) for group in voting(boards)[:details]]
        title = " and ".join(map(str, paths)) if len(paths) < 4 else f"{len(paths)} folders of runs"
        notes = remarks(runs, len(candidates), details)
        html = page.render(title, runs, boards, shown, all_pictures(boards), notes)
        files.write(folder / "report.html", html)
        files.write(folder / "results.md", write_markdown(title, boards, runs))
        rows = []
        for board in (board for board in boards if board.has_results):
            for group, row in zip(board.groups, board.rows, strict=True):
                if row["n"]:
                    evidence = [record.evidence(ran) for ran in group.finished]
                    rows.append(row | {"runs": evidence})
        newest = max((ran.environment for ran in runs), key=lambda one: one.get("started") or "")
        kept = {key: newest[key] for key in KEPT if key in newest}
        tables.save(folder / "results.json", rows, runs=[str(path) for path in paths], **kept)
    print("\n\n".join(leaderboards(boards, fits=True)))
    print(f"\nwritten: {folder}/report.html, results.md, results.json")
    return {"runs": len(runs), "finished": sum(ran.summary is not None for ran in runs)}


def remarks(runs: list[Ran], candidates: int, details: int) -> list[str]:
    """The notes at the top of the page: what it leaves out."""
    notes = []
    if unfinished := sum(ran.summary is None for ran in runs):
        count = f"{unfinished} of {len(runs)} runs"
        notes.append(f"{count} are not finished; tables contain only finished runs.")
    if said := grouping.left_out(runs):
        log.warning(said)
        notes.append(said)
    what = "confusion matrix, nearest neighbours or feature map"
    if not candidates:
        notes.append(f"There is no {what}, because no finished run here has a checkpoint.")
    elif not details:
        notes.append(f"There is no {what}, because of stage.details=0.")
    elif candidates > details:
        notes.append(
            "Confusion matrices, nearest neighbours and feature maps are shown for the best "
            f"{details} of {candidates} rows; stage.details={candidates} shows them for all."
        )
    return notes


def fill(path: Path) -> None:
    """Make the marked tables of a Markdown file anew; see `tables.fill`."""
    try:
        before = path.read_text(encoding="utf-8")
        after = tables.fill(before, path.parent)
    except OSError as error:
        raise UserError(f"stage.readme={path}: can't be read ({error.strerror})") from None
    except UserError as error:
        raise UserError(f"stage.readme={path}: {error}") from None
    if after != before:
        files.write(path, after)
    print(f"{path}: {'filled' if after != before else 'is up to date'}")


def leaderboards(boards: list[Board], fits: bool = False) -> list[str]:
    """A heading and a table of Markdown for each board that has results.

    fits: the last columns are left out that the terminal has no room for, and named below.
    """
    parts = []
    for board in (board for board in boards if board.has_results):
        columns, left_out = tables.columns(board.rows), []
        text = tables.table(board.rows, columns)
        if fits:
            text, left_out = tables.fitted(*tables.cells(board.rows, columns), right=len(columns))
        parts += [f"## {board.title}", text]
        if left_out:
            parts.append(tables.wrapped(f"results.md also has {', '.join(left_out)}"))
    return parts


def write_markdown(title: str, boards: list[Board], runs: list[Ran]) -> str:
    """The text of results.md: leaderboards, differing settings, runs that aren't finished."""
    parts = [
        f"# {title}",
        "Mean ± sample standard deviation (n - 1) over n seeds. If several pretrainings were "
        "evaluated more than once, the evaluations of each pretraining are averaged first.",
        *filter(None, [grouping.left_out(runs)]),
    ]
    parts += leaderboards(boards)
    for board in boards:
        if differing := board.differing:
            parts.append(f"## What differs: {board.title}")
            header = ["", *(group.name for group in board.groups)]
            parts.append(markdown(header, [[key, *words] for key, words in differing.items()]))
    if unfinished := [ran for ran in runs if ran.summary is None]:
        rows = []
        for ran in unfinished:
            rows.append([str(ran.directory), ran.state.name, " ".join(ran.state.note.split())])
        parts += ["## Not finished", markdown(["run", "state", ""], rows)]
    return "\n\n".join(parts) + "\n"


def all_pictures(boards: list[Board]) -> dict[str, page.Pictures]:
    """What runs left of augmented views, and of what they have learnt."""
    files_of = {"views": layout.VIEWS, **layout.LEARNT}
    return {kind: pictures_in(boards, file) for kind, file in files_of.items()}


def pictures_in(boards: list[Board], file: str) -> page.Pictures:
    """The pictures of that name, each with the groups of runs that left it."""
    pictures: page.Pictures = {}
    for group in (group for board in boards for group in board.groups):
        paths = (ran.directory / file for ran in group.runs)
        if path := next((path for path in paths if path.exists()), None):
            pictures.setdefault(files.digest(path), (path, []))[1].append(group.name)
    return pictures


# -- what needs the network and the images ---------------------------------------------------------


def choose(boards: list[Board]) -> list[Group]:
    """The groups with checkpoints of the first board that has any, best first.

    Evaluations come before pretrainings: their classifiers predict.
    """

    def has_checkpoint(group: Group) -> bool:
        return any(checkpoint.complete(ran.directory) for ran in group.finished)

    found = (list(filter(has_checkpoint, board.groups)) for board in boards)
    return next(filter(None, found), [])


def examine(cfg: DictConfig, run: Run, group: Group) -> page.Detail:
    """The features of the val split (or the pretrain split) and the predictions of a classifier.

    What can't be had becomes a note.
    """
    detail = page.Detail(group)
    try:
        data = open_data(cfg, group.finished[0])
        detail.split = labelled_split(data)
        source = open_source(cfg, run, data, detail.split, shown_to(group.finished[0]))
    except (ValueError, OSError) as error:
        what = "no predictions, neighbours or map"
        _leave_out(detail, f"{what}, because its images can't be read here: {error}")
        return detail
    split = data.split(detail.split)
    detail.labels, detail.classes = source.labels[source.rows], data.class_names
    detail.image = lambda place: split.small(int(source.indices[source.rows[place]]))
    # with the number, since images that can't be decoded may have been skipped
    detail.images_id = f"{split.facts()} {len(detail.labels)}"
    for ran in group.finished:
        try:
            look(cfg, run, detail, ran, source)
        except (ValueError, OSError) as error:
            _leave_out(detail, f"seed {ran.seed}, {ran.directory}, can't be shown: {error}")
    return detail


def _leave_out(detail: page.Detail, note: str) -> None:
    detail.notes.append(note)
    log.warning("%s: %s", detail.group.name, note)


def voting(boards: list[Board]) -> list[Group]:
    """The groups of runs that classify by neighbours and left how reliable that is, best first."""

    def left(group: Group) -> bool:
        return any((ran.directory / layout.RELIABILITY).exists() for ran in group.finished)

    return [group for board in boards for group in board.groups if left(group)]


def votes(group: Group) -> page.Detail:
    """How reliable votes of neighbours are, as the runs have measured it."""
    detail = page.Detail(group)
    for ran in group.finished:
        path = ran.directory / layout.RELIABILITY
        if not path.exists():  # an older run
            continue
        try:
            bins = calibration.loaded(files.parse(path, json.loads))
        except ValueError as error:
            _leave_out(detail, f"no calibration of seed {ran.seed}: {path}: {error}")
        else:
            detail.calibration[ran] = bins.numpy(), calibration.expected_error(bins)
    return detail


def look(cfg: DictConfig, run: Run, detail: page.Detail, ran: Ran, source: Source) -> None:
    """Add to `detail` what the newest checkpoint of a run says of the images."""
    paths = checkpoint.complete(ran.directory)
    if not paths:
        raise UserError("it has no checkpoint")
    place = ran.directory / layout.CONFIG
    node = build.found(ran.config, "backbone", cfg, place)
    backbone = build.construct(weights.unfilled(node))
    view = shown_to(ran)
    check_size("augmentation.image_size", view.image_size, backbone, node.get("name", ""))
    loaded = weights.load_backbone(backbone, str(paths[0]))
    state = weights.measured(checkpoint.read(paths[0]))
    network = as_measured(backbone, features_of(ran.config, place), loaded.pool)
    on_device(network, run).eval()
    passed = source.shown_as(view).epoch_pass()
    features, labels = extract(network, passed, view.to(run.device))
    if detail.features is None:
        detail.features = features.numpy()
    if "fc.weight" not in state or detail.split != "val":
        return
    probe = restored(backbone, state)
    with torch.no_grad():
        probabilities = probe.fc(probe.norm(features)).softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    top1 = 100 * (predicted == labels).double().mean().item()
    log.info("%s, seed %s: top-1 %.2f on %s", detail.group.name, ran.seed, top1, detail.split)
    if abs(top1 - ran.summary.get("val_top1", top1)) > TOLERANCE:
        detail.notes.append(
            f"seed {ran.seed} has a top-1 of {top1:.2f} on the images found here, but had "
            f"{ran.summary['val_top1']:.2f} when it ran: are these the same images?"
        )
    detail.predictions[ran], detail.confidences[ran] = predicted.numpy(), confidence.numpy()
    bins = calibration.binned(probabilities, labels)
    detail.calibration[ran] = bins.numpy(), calibration.expected_error(bins)


def shown_to(ran: Ran) -> EvalView:
    """How a run shows test images."""
    resize = ran.config["stage"].get("test_resize", 1.0)
    return view_of(ran.config, ran.directory / layout.CONFIG, resize=resize)


def open_data(cfg: DictConfig, ran: Ran) -> Dataset:
    """The data of a run, in `cfg.data.root` if that names a folder for the same data set.

    This command says where packed images are kept: the configuration of a run from elsewhere must
    not have a folder written or cleared here.
    """
    node = build.found(ran.config, "data", cfg, ran.directory / layout.CONFIG)
    if node.get("name") == cfg.data.name and "root" in cfg.data:
        node["root"] = cfg.data.root
    return build.construct(node | {"cache": cfg.data.cache, "workers": cfg.data.workers})


def labelled_split(data: Dataset) -> SplitName:
    """ "val", or "pretrain" for data without labels. UserError for data that isn't there."""
    try:
        if data.split("val").labels is not None:
            return "val"
    except UserError:
        data.split("pretrain")  # raises, if the error is about more than labels
    return "pretrain"
