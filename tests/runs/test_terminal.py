"""What a terminal shows of a training, in a pseudo-terminal.

`PYTHONPATH=tests python tests/runs/test_terminal.py` records it for the documentation.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pyte
import pytest
from conftest import TINY_PRETRAIN

DOCS = Path(__file__).parents[2] / "docs" / "recordings"
# the settings of conf/experiment/speedrun.yaml: it learns in a minute
RECORDED = ["stage=pretrain", "method=simclr", "method.dim=64", "data=digits", "data.image_size=12"]
RECORDED += ["backbone.stem=small", "backbone.width=16", "batch_size=64", "epochs=8"]
RECORDED += ["augmentation=digits", "augmentation.crop_scale=[0.65,1]", "augmentation.rotate=15"]
RECORDED += ["augmentation.shear=20", "optimizer=sgd", "optimizer.base_lr=0.24"]
RECORDED += ["schedule.warmup_epochs=1", "eval_every=2", "log_every=5"]
RECORDED += ["dir=runs/digits", "data.cache=cache", "device=cpu"]


def shown(columns: int, folder: Path, *words: str) -> tuple[list[list[str]], list[str], int]:
    """The screens on the way, all lines at the end, and the exit status of `ssl-bench words`."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ.pop("COLUMNS", None)
        os.environ |= {"TERM": "xterm-256color", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        os.execv(sys.executable, [sys.executable, "-m", "ssl_bench", *words])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    screen = pyte.HistoryScreen(columns, 40, history=1000, ratio=1)
    stream, screens = pyte.ByteStream(screen), []
    while True:
        try:
            stream.feed(os.read(terminal, 1 << 16))
        except OSError:  # it has ended
            break
        screens.append([line.rstrip() for line in screen.display])
    _, status = os.waitpid(process, 0)
    above = ["".join(row[x].data for x in range(columns)) for row in screen.history.top]
    end = [line.rstrip() for line in [*above, *screen.display]]
    return screens, "\n".join(end).rstrip().splitlines(), os.waitstatus_to_exitcode(status)


@pytest.mark.slow
def test_a_training(tmp_path: Path) -> None:
    screens, end, status = shown(80, tmp_path, *TINY_PRETRAIN, "dir=run", "eval_every=2")
    assert status == 0, end
    text = "\n".join(end)
    (panel,) = re.findall(r"╭─ pretrain ─.*?╰─+╯", text, re.S)
    assert "moco_v2" in panel
    assert "1,297 images, 10 steps an epoch" in panel
    heads = [line.split() for line in end if line.split()[:2] == ["step", "epoch"]]
    rows = [line.split() for line in end if re.match(r" +\d+ +\d ", line)]
    assert heads == [  # once, with the columns of the first evaluation to come
        ["step", "epoch", "loss", "accuracy", "knn_top1", "probe_top1", "lr", "images/s"]
    ]
    assert [row[:2] for row in rows] == [["10", "1"], ["20", "2"]]  # an epoch each
    assert end[-1].endswith("finished: run")
    live = "\n".join(line for screen in screens for line in screen)
    assert re.search(r"pretrain +[━╸╺ ]+ \d+/20 steps +\S+/s +0:00:\d\d left", live)
    assert re.search(r"^loss [\d.]+[↓↑]? ", live, re.M)
    assert "━" not in text  # no bar is left behind


if __name__ == "__main__":
    DOCS.mkdir(parents=True, exist_ok=True)
    for width in (80, 160):
        with tempfile.TemporaryDirectory() as work:
            found, last, _ = shown(width, Path(work), *RECORDED)
        middle = [line for line in found[2 * len(found) // 3] if line]
        lines = [*middle, "", "... and when it has ended:", "", *last]
        (DOCS / f"pretrain-{width}.txt").write_text("\n".join(lines) + "\n")
    with tempfile.TemporaryDirectory() as work, open(DOCS / "pretrain-log.txt", "w") as file:
        words = [sys.executable, "-m", "ssl_bench", *RECORDED, "log_every=20"]
        subprocess.run(words, cwd=work, stderr=file, check=True)
