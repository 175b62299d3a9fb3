"""Stage board: the page of runs, served while they go on."""

import signal
from contextlib import suppress
from typing import Annotated

from omegaconf import DictConfig
from pydantic import Field

from ssl_bench import files
from ssl_bench.errors import Interrupted, UserError, interrupted_by
from ssl_bench.report import board as served
from ssl_bench.runs.run import Run
from ssl_bench.stages import single_process

READS = ("runs", "metric")


@single_process
def board(
    cfg: DictConfig,
    run: Run,
    host: str = "127.0.0.1",
    port: Annotated[int, Field(ge=0, le=65535)] = 8123,
    token: str | None = None,
) -> dict[str, float]:
    """Serve the runs at or below `cfg.runs` until Ctrl-C. Runs may come later; folders may not.

    UserError for an interface that others reach, unless the address must have a `token`.
    """
    if not (paths := files.places(cfg.runs)):
        raise UserError("runs= needs a value: a folder in which runs are, or will be: runs=runs")
    if missing := [path for path in paths if not path.is_dir()]:
        raise UserError(f"runs={missing[0]}: no such folder")
    if host not in served.LOOPBACK and not token:
        raise UserError(
            f"stage.host={host} lets others read your runs: give them a secret, "
            "stage.token=..., or leave stage.host out and use ssh -L"
        )
    if token is not None and len(token) < served.SECRET:
        raise UserError(f"stage.token= needs {served.SECRET} characters or more")
    with (
        served.server(paths, cfg.metric, host, port, token) as server,
        suppress(Interrupted),
        # a shell has its background processes ignore Ctrl-C, and Python leaves that so
        interrupted_by(signal.SIGINT, signal.SIGTERM),
    ):
        print(f"{served.address(server, token)}\nCtrl-C ends it.", flush=True)
        server.serve_forever()
    return {}
