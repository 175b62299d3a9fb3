"""A W&B workspace for runs of this program, defined in code: panels of the names that
`WandbTracker` logs.

wandb-workspaces (the `dashboard` extra) is W&B's own and only way to define one.
"""

import json
from typing import TYPE_CHECKING, Any

from ssl_bench.errors import UserError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

EVALUATIONS = ("lincls", "knn", "finetune")  # stages that measure on the val split


def workspace(project: str, entity: str | None) -> "Workspace":
    """Sections: results, pretraining, its health and speed, classification, images, tables,
    differences.

    UserError without the extra.
    A group is what a run is but for its seeds (see `identity`): bars are the mean of its runs and
    their deviation, as W&B makes them. It doesn't average the runs of each pretraining first, as
    our tables do.
    entity: None is the account's default, which only W&B knows; it must be there when the workspace
    is saved.
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
        spread = {
            "groupby": wr.Metric("Group"),
            "groupby_aggfunc": "mean",
            "groupby_rangefunc": "stddev",
        }
        return wr.BarPlot(title=title, metrics=[metric], **spread)

    sections = {
        "Results": [
            bars(f"{stage}: top-1 on val (%)", f"{stage}/val_top1") for stage in EVALUATIONS
        ],
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
            line(
                "share of time waiting for data",
                "pretrain/data_wait",
                "images_seen",
                range_y=(0, 1),
            ),
            line("memory (GB)", "pretrain/memory_gb", "images_seen"),
        ],
        "Images": [
            wr.MediaBrowser(title=title, media_keys=[key], num_columns=2)
            for title, key in (
                ("augmented views", "pretrain/views"),
                ("chosen to be labelled", "select/chosen"),
                ("overview", "pipeline/overview"),
            )
        ],
        "Tables": [
            wr.WeavePanelSummaryTable(table_name=f"{stage}/tables/grid")
            for stage in ("lincls", "knn")
        ],
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
    """What `pydantic.TypeAdapter(Workspace).validate_json` reads back: its dump, without the parts
    that are private.
    """
    from pydantic import TypeAdapter

    def public(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                key: public(value)
                for key, value in node.items()
                if not key.startswith("_") and value is not None
            }
        return [public(item) for item in node] if isinstance(node, list) else node

    return (
        json.dumps(public(TypeAdapter(type(made)).dump_python(made, mode="json")), indent=1) + "\n"
    )
