"""A W&B workspace for runs of this program: panels for the names that `WandbTracker` logs.

It is defined with wandb-workspaces (the `dashboard` extra), the only way that W&B offers.
"""

import json
from typing import TYPE_CHECKING, Any

from ssl_bench.errors import UserError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

EVALUATIONS = ("lincls", "knn", "finetune")  # stages that measure on the val split


def workspace(project: str, entity: str | None) -> "Workspace":
    """The workspace: results, pretraining, classification, images, tables, differences.

    Runs of a group differ in seeds alone (see `identity`). Bars are the mean of a group and its
    standard deviation as W&B computes them: it doesn't average the runs of each pretraining first,
    as our tables do.
    entity: None is the account's default, which only W&B knows; it must be set when the workspace
    is saved. UserError without the extra.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError(
            "stage=dashboard needs wandb-workspaces: type pip install 'ssl_bench[dashboard]'"
        ) from None

    def line(title: str, y: str, x: str = "epoch", **options: Any) -> "wr.LinePlot":
        return wr.LinePlot(title=title, x=x, y=[y], title_x=x.replace("_", " "), **options)

    def bars(title: str, metric: str) -> "wr.BarPlot":
        spread = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return wr.BarPlot(title=title, metrics=[metric], groupby=wr.Metric("Group"), **spread)

    def browser(title: str, key: str) -> "wr.MediaBrowser":
        return wr.MediaBrowser(title=title, media_keys=[key], num_columns=2)

    def table(name: str) -> "wr.WeavePanelSummaryTable":
        return wr.WeavePanelSummaryTable(table_name=name)

    waiting = "share of time waiting for data"
    sections = {
        "Results": [bars(f"{name}: top-1 on val (%)", f"{name}/val_top1") for name in EVALUATIONS],
        "Pretraining": [
            line("loss", "pretrain/loss"),
            line("loss by images", "pretrain/loss", "images_seen"),
            line("positives picked (fraction)", "pretrain/accuracy", range_y=(0, 1)),
            line("gradient norm", "pretrain/grad_norm", log_y=True),
            line("learning rate", "pretrain/lr"),
            line("kNN on held-out training images (%)", "pretrain/knn_top1"),
            line("ridge classifier on these (%)", "pretrain/probe_top1"),
        ],
        "Health of the embeddings": [
            line("spread: 1 even, 0 collapsed", "pretrain/embedding_std", range_y=(0, None)),
            line("effective rank", "pretrain/effective_rank"),
            line("LiDAR: directions that tell images apart", "pretrain/lidar"),
            line("alignment of two views", "pretrain/alignment"),
            line("uniformity", "pretrain/uniformity"),
        ],
        "Classification": [
            line("lincls: top-1 on val (%)", "lincls/val_top1"),
            line("lincls: loss on val", "lincls/val_loss"),
            line("lincls: training loss", "lincls/loss"),
            line("finetune: top-1 on val (%)", "finetune/val_top1"),
            line("finetune: training loss", "finetune/loss"),
        ],
        "Speed": [
            line("images per second", "pretrain/images_per_second", "images_seen"),
            line(waiting, "pretrain/data_wait", "images_seen", range_y=(0, 1)),
            line("memory (GB)", "pretrain/memory_gb", "images_seen"),
        ],
        "Images": [
            browser("augmented views", "pretrain/views"),
            browser("attention of the class token", "pretrain/attention"),
            browser("principal components of patches", "pretrain/patches"),
            browser("what is painted where patches are masked", "pretrain/reconstruction"),
            browser("chosen to be labelled", "select/chosen"),
            browser("overview", "pipeline/overview"),
        ],
        "Tables": [table("lincls/tables/grid"), table("knn/tables/grid")],
        "Differences": [wr.RunComparer(diff_only="split")],
    }
    shown = ("Results", "Pretraining", "Classification")
    columns = [f"summary:{stage}/val_top1" for stage in EVALUATIONS]
    return ws.Workspace(
        name="ssl_bench",
        project=project,
        entity=entity or "",
        sections=[
            ws.Section(name=name, panels=panels, is_open=name in shown)
            for name, panels in sections.items()
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=30),
        runset_settings=ws.RunsetSettings(pinned_columns=[*columns, "summary:pretrain/best/loss"]),
    )


def to_json(made: "Workspace") -> str:
    """The public parts of a workspace as JSON, which `pydantic.TypeAdapter(Workspace)` reads."""
    from pydantic import TypeAdapter

    def public(node: Any) -> Any:
        if isinstance(node, dict):
            keys = (key for key in node if not key.startswith("_") and node[key] is not None)
            return {key: public(node[key]) for key in keys}
        return [public(item) for item in node] if isinstance(node, list) else node

    dump = TypeAdapter(type(made)).dump_python(made, mode="json")
    return json.dumps(public(dump), indent=1) + "\n"
