"""stage=board: a training appears and grows while its page is open; who may see it."""

import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from browsing import served, texts
from commands import compose
from conftest import TINY_PRETRAIN
from made_runs import pretrained
from patience import PATIENCE

from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.report import board
from ssl_bench.runs import record

pytestmark = pytest.mark.xdist_group("page")  # the worker that has the browser

TOKEN = "a-secret-of-some-length"


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


# -- while runs go on ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_appears_and_grows_while_the_page_is_open(browser, tmp_path: Path) -> None:
    """Both are processes of their own. A choice and a sorting outlive what is new; Ctrl-C ends the
    board, and the page says so.
    """
    ui = pytest.importorskip("selenium.webdriver.support.ui")
    (tmp_path / "runs").mkdir()
    start = [sys.executable, "-m", "ssl_bench"]
    command = [*start, "stage=board", f"runs={tmp_path}/runs", "stage.port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # as a shell's background process has it
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]
    serving = subprocess.Popen([*ignoring, *command], **pipes)
    training = None
    try:
        address = serving.stdout.readline().strip()
        browser.get_log("browser")
        browser.get(address)
        wait = ui.WebDriverWait(browser, 90, poll_frequency=0.2)
        assert "There is no run in" in texts(browser, "#notes .note")[0]
        words = [*TINY_PRETRAIN, "epochs=40", "eval_every=1", f"dir={tmp_path}/runs/tiny"]
        training = subprocess.Popen([*start, *words], **pipes)

        def reached() -> list[float]:
            cells = texts(browser, "#runs td:nth-of-type(4)")
            return [float(cell.split()[0]) for cell in cells if cell]

        wait.until(lambda _: texts(browser, "#runs td:nth-of-type(3)") == ["running"] and reached())
        browser.find_element("css selector", "#runs thead th:nth-child(3) button").click()
        browser.find_element("css selector", "#runs tbody input").click()
        longest = (
            "return Math.max(0, ...data.boards[0].groups[0].curves.grids.map((one) => one.length))"
        )
        (early,), points = reached(), browser.execute_script(longest)
        wait.until(lambda _: reached()[0] > early and browser.execute_script(longest) > points)
        assert browser.execute_script("return document.querySelectorAll('canvas').length") > 0
        assert browser.find_element("css selector", "#runs tbody input").is_selected()
        heads = browser.find_elements("css selector", "#runs th[aria-sort=ascending]")
        assert [head.text.split()[0] for head in heads] == ["seed"]
        training.terminate()
        wait.until(lambda _: texts(browser, "#runs td:nth-of-type(3)") == ["stopped"])
        assert browser.get_log("browser") == []
        serving.send_signal(signal.SIGINT)
        said, errors = serving.communicate(timeout=PATIENCE)
        assert (serving.returncode, errors) == (0, ""), said
        wait.until(lambda _: "doesn't answer" in texts(browser, "#pulse")[0])
    finally:
        for process in filter(None, (serving, training)):
            process.kill()
            process.communicate()
        browser.get("about:blank")


def test_only_what_has_changed_is_sent(tmp_path: Path) -> None:
    for seed in (0, 1):
        pretrained(tmp_path / f"a{seed}", "epochs=9", f"seed={seed}", loss=None)
    pretrained(tmp_path / "b", "method.temperature=0.5")
    watch = board.Watch([tmp_path], None)
    watch._look()
    assert watch.news(watch.version) == {"version": 1}
    everything = watch.news(-1)
    assert set(everything["sections"]) == {"summary", "notes", "leaderboard", "differences", "runs"}
    line = {
        "step": 120,
        "epoch": 3,
        "loss": 2.0,
        "images_seen": 3 * 360_000,
        "images_per_second": 9,
    }
    with (tmp_path / "a0" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + '{"step": 160, "epo')  # the last is being written
    watch._due = 0
    news = watch.news(1)
    (groups,) = [one["groups"] for one in news["boards"]]
    (grown,) = [group for group in groups if "curves" in group]
    assert grown["n"] == 2
    assert max(map(max, grown["curves"]["grids"])) == 3
    assert set(news["sections"]) == {"runs"}
    assert "3 of 9" in news["sections"]["runs"]


def test_lines_are_read_once_until_a_restart_takes_some_back(tmp_path: Path) -> None:
    path = pretrained(tmp_path / "run", loss=None).directory / "metrics.jsonl"
    read = record.Reader()
    before = read(tmp_path / "run")
    assert read(tmp_path / "run") is before
    with path.open("a") as file:
        file.write('{"step": 120, "epoch": 3, "loss": 2.0}\n')
    grown = read(tmp_path / "run")
    assert grown.lines == [*before.lines, {"step": 120, "epoch": 3, "loss": 2.0}]
    assert grown.config is before.config  # its YAML wasn't read again
    path.unlink()
    path.write_text('{"step": 40, "epoch": 1, "loss": 7.0}\n')
    assert read(tmp_path / "run").lines == [{"step": 40, "epoch": 1, "loss": 7.0}]
    path.write_text("no JSON\n")
    assert read(tmp_path / "run") is None
    assert "metrics.jsonl, line 1 is not a JSON object" in read.broken[0]


def test_a_broken_run_is_named_and_hides_no_other(tmp_path: Path) -> None:
    pretrained(tmp_path / "good")
    (pretrained(tmp_path / "bad").directory / "config.yaml").write_text("{")
    html = board.Watch([tmp_path], None).html()
    assert f"{tmp_path}/bad/config.yaml" in html
    assert f'title="{tmp_path}/good"' in html


# -- who may ask for what --------------------------------------------------------------------------


def test_another_host_name_and_another_method_are_refused(tmp_path: Path) -> None:
    pretrained(tmp_path / "run")
    with served(tmp_path) as port:
        status, page = ask(port)
        assert status == 200
        assert "moco_v2" in page
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert ask(port, "/news?since=1", Host=host) == (200, '{"version":1}')
        for host in (f"evil.example:{port}", "localhost", "", f"127.0.0.1.evil.example:{port}"):
            assert ask(port, Host=host)[0] == 403
            assert ask(port, "/news?since=0", Host=host)[0] == 403
        assert ask(port, method="HEAD") == (200, "")
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(port, method=method)[0] == 501
        for path in ("/run/config.yaml", "/../run/config.yaml", "//etc/passwd"):
            assert ask(port, path)[0] == 404
        assert ask(port, "/news?since=x")[0] == 200


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    pretrained(tmp_path / "run")
    with served(tmp_path, TOKEN) as port:
        assert ask(port)[0] == ask(port, f"/?token={TOKEN[:-1]}")[0] == 403
        assert ask(port, f"/news?since=0&token={TOKEN}", Host="cluster:80")[0] == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "runs= needs a value"),
        (["runs=nowhere"], "runs=nowhere: no such folder"),
        (["runs=.", "stage.host=0.0.0.0"], "lets others read your runs: give them a secret"),
        (["runs=.", "stage.token=short"], r"stage\.token= needs 16 characters"),
        (["runs=.", "stage.host=203.0.113.1", f"stage.token={TOKEN}"], "can't be served"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(compose("stage=board", *words))
