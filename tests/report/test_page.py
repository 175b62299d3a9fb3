"""stage=report: its files say what the runs said, and report.html is looked at in a browser,
without a network.
"""

import copy
import csv
import json
import shutil
from itertools import pairwise, product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from browsing import LAPTOP, served, texts, violations
from commands import compose
from conftest import TINY, TINY_PRETRAIN
from made_runs import classified, make_run, pretrained
from PIL import Image

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.report import grouping, page, tables
from ssl_bench.runs import layout, record, units

pytestmark = pytest.mark.xdist_group("page")  # one worker makes the runs that they share


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits: two pretrainings, classified twice each, and two untrained networks."""
    folder = tmp_path_factory.mktemp("runs")
    evaluation = [
        *TINY,
        "stage=lincls",
        "epochs=2",
        "eval_every=1",
        "stage.labels_per_class=10",
        "batch_size=50",
    ]
    evaluation += ["optimizer.base_lr=1"]
    for seed in (0, 1):
        launch(compose(*TINY_PRETRAIN, f"seed={seed}", f"dir={folder}/pretrain/seed{seed}"))
        words = [f"seed={seed}", f"pretrained={folder}/pretrain/seed{seed}"]
        launch(compose(*evaluation, *words, f"dir={folder}/moco/seed{seed}"))
        launch(compose(*evaluation, f"seed={seed}", f"dir={folder}/random/seed{seed}"))
    return folder


@pytest.fixture(scope="module")
def reported(runs: Path) -> Path:
    assert launch(compose("stage=report", f"runs={runs}")) == {"runs": 6, "finished": 6}
    return runs


@pytest.fixture
def opened(browser, reported: Path):
    return show(browser, reported)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of rates and batches, two seeds each, in which the rate decides."""
    folder = tmp_path_factory.mktemp("swept")
    for lr, size, seed in product((1, 2, 3), (64, 128), (0, 1)):
        words = [f"optimizer.base_lr={lr}", f"batch_size={size}", f"seed={seed}", "epochs=2"]
        classified(folder / f"{lr}{size}{seed}", 50.0 + 4 * lr + size / 128 + seed / 10, *words)
    launch(compose("stage=report", f"runs={folder}"))
    return folder


LONG = "learning_rates_and_weight_decays_of_the_classifier/base_lr-0.1-batch_size-128-epochs-200"


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds whose values hardly move from the first epoch to the second, in a deep folder."""
    folder = tmp_path_factory.mktemp("still")
    values = {"knn_top1": 69.13, "probe_top1": 0.0, "loss": 6.9, "lr": 3e-5, "grad_norm": 2e7}
    values |= {key: -1.1 if "uniformity" in key else 20.3 for key in units.DIAGNOSTICS}
    for seed in (0, 1):
        lines = [
            {"step": 40 * epoch, "epoch": epoch, "images_seen": 9_000 * epoch}
            | {key: value * (1 + 1e-6 * epoch) for key, value in values.items()}
            for epoch in (1, 2)
        ]
        words = ["stage=pretrain", "epochs=2", f"seed={seed}"]
        make_run(folder / "sweeps" / LONG / LONG / f"seed{seed}", words, lines, values)
    launch(compose("stage=report", f"runs={folder}"))
    return folder


def visible(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].filter((one) => "
        "one.checkVisibility()).map((one) => one.textContent.trim())",
        selector,
    )


def show(browser, folder: Path, size: tuple[int, int] = LAPTOP, scheme: str = "light"):
    browser.get_log("browser"), browser.get_log("performance")  # of the page before
    browser.set_window_size(*size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get((folder / "report.html").as_uri())
    return browser


# -- the files -------------------------------------------------------------------------------------


def test_the_files_say_what_the_runs_said(reported: Path) -> None:
    rows = tables.load(reported / "results.json")
    values = {(row["stage"], row["name"]): row["values"] for row in rows}
    for name, folder in (("moco_v2", "moco"), ("random init", "random")):
        said = [
            json.loads((reported / folder / f"seed{i}" / "summary.json").read_text())
            for i in (0, 1)
        ]
        assert values["lincls", name]["val_top1"] == [one["val_top1"] for one in said]
    text = (reported / "results.md").read_text()
    shown = units.shown("val_top1", values["lincls", "moco_v2"]["val_top1"])
    assert f"| moco_v2     | {shown:>12} |" in text
    differing = text.partition("## What differs: Linear")[2].splitlines()
    heads, row = (
        next([cell.strip() for cell in line.split("|")] for line in differing if begin in line)
        for begin in ("| moco_v2 ", "| pretrained ")
    )
    said = dict(zip(heads, row, strict=True))
    assert (said["moco_v2"], said["random init"]) == ("moco_v2", "null")


def test_predictions_are_those_that_were_measured(runs: Path, opened) -> None:
    """The mean of the confusion matrix's diagonal, weighted by how many images a class has, is
    top-1.
    """
    measured = [
        json.loads((runs / "moco" / f"seed{i}" / "summary.json").read_text())["val_top1"]
        for i in (0, 1)
    ]
    place = texts(opened, "#classes thead th").index("moco_v2 (%)")
    shown = texts(opened, f"#classes tbody td.bar:nth-of-type({place})")
    counts = np.array(texts(opened, "#classes tbody td:nth-of-type(1)"), dtype=float)
    assert counts.sum() == 500
    means = np.array([float(cell.split(" ± ")[0]) for cell in shown])
    assert (means * counts).sum() / 500 == pytest.approx(np.mean(measured), abs=0.1)
    diagonal = opened.execute_script(
        "return [...document.querySelector('[aria-label=\"Confusion matrix of moco_v2\"]')"
        ".querySelectorAll('td.right')].map((cell) => cell.title)"
    )
    assert [float(title.split(": ")[1].split()[0]) for title in diagonal] == pytest.approx(
        means, abs=0.11
    )
    assert not texts(opened, ".note")  # nothing is left out


# -- the page --------------------------------------------------------------------------------------


def test_opens_from_disk_without_network_or_errors(reported: Path, opened) -> None:
    messages = [json.loads(line["message"])["message"] for line in opened.get_log("performance")]
    asked = [
        one["params"]["request"]["url"]
        for one in messages
        if one["method"] == "Network.requestWillBeSent"
    ]
    page_url = (reported / "report.html").as_uri()
    assert page_url in asked
    assert all(url == page_url or url.startswith("data:") for url in asked)
    assert opened.get_log("browser") == []
    assert (reported / "report.html").stat().st_size < 3e6
    wanted = [
        "leaderboard",
        "curves",
        "confusion",
        "classes",
        "wrong",
        "calibration",
        "neighbours",
        "map",
        "views",
        "differences",
        "runs",
    ]
    assert (
        opened.execute_script(
            "return [...document.querySelectorAll('section')].map((one) => one.id)"
        )
        == wanted
    )
    links = opened.execute_script(
        "return [...document.querySelectorAll('nav a')].map((a) => document.querySelector(a.hash) "
        "!== null)"
    )
    assert links == [True] * len(wanted)


def test_tables_sort_on_click(opened) -> None:
    def order(column: int) -> list[str]:
        head = opened.find_element("css selector", f"#runs thead th:nth-child({column})")
        head.find_element("css selector", "button").click()
        assert head.get_attribute("aria-sort") in ("ascending", "descending")
        assert (
            len(texts(opened, "#runs th[aria-sort=ascending], #runs th[aria-sort=descending]")) == 1
        )
        return texts(opened, f"#runs tbody tr > :nth-child({column})")

    names = order(1)
    assert names == sorted(names)
    assert order(1) == sorted(names, reverse=True)
    # numbers: the best first, and then the other way
    assert order(3) == ["0", "0", "0", "1", "1", "1"]
    assert order(3) == ["1", "1", "1", "0", "0", "0"]
    hours = order(7)
    assert sorted(hours, key=float) == hours
    # by keyboard, too
    opened.find_element("css selector", "#leaderboard thead th:nth-child(2) button").send_keys("\n")
    top1 = [
        float(cell.split()[0])
        for cell in texts(opened, "#leaderboard table:first-of-type tbody td:nth-child(2)")
    ]
    assert top1[0] >= top1[1]


def test_cells_sort_by_value_and_empty_ones_stay_last(browser, tmp_path: Path) -> None:
    """By the number, not the text, in which 9 is more than 10."""
    pretrained(tmp_path / "p", "data=synthetic")
    for top1, where in (
        (9.5, []),
        (70.0, [f"pretrained={tmp_path}/p"]),
        (10.0, ["backbone=pixels"]),
    ):
        classified(tmp_path / f"{top1}", top1, "data=synthetic", *where)
    launch(compose("stage=report", f"runs={tmp_path}"))
    show(browser, tmp_path)

    def column(number: int) -> list[str]:
        browser.find_element(
            "css selector", f"#leaderboard table thead th:nth-child({number}) button"
        ).click()
        return texts(browser, f"#leaderboard .scroll:first-of-type tbody td:nth-child({number})")

    assert column(2)[:3] == ["70.0", "10.0", "9.5"]
    assert column(2)[:3] == ["9.5", "10.0", "70.0"]
    heads = texts(browser, "#leaderboard .scroll:first-of-type thead th")
    hours = heads.index("pretraining hours") + 1
    assert [column(hours)[:3], column(hours)[:3]] == [["2.000", "", ""]] * 2


def test_charts_render_whole(opened) -> None:
    """Each has something drawn, and no text that is cut off; each picture is a picture."""
    opened.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    charts = opened.execute_script("""
        return [...document.querySelectorAll("figure svg")].map((svg) => {
          const box = svg.getBoundingClientRect();
          const inside = (one) => one.left >= box.left - 1 && one.right <= box.right + 1
            && one.top >= box.top - 1 && one.bottom <= box.bottom + 1;
          return {
            label: svg.ariaLabel, width: box.width, height: box.height,
            drawn: svg.querySelectorAll("circle, g > rect").length,
            cut: [...svg.querySelectorAll("text")]
              .filter((one) => !inside(one.getBoundingClientRect()))
              .map((one) => one.textContent),
          };
        })""")
    assert len(charts) >= 3
    for chart in charts:
        assert chart["width"] > 250, chart
        assert chart["height"] > 60, chart
        assert chart["drawn"] > 0, chart
        assert not chart["cut"], chart
        assert chart["label"]
    # curves are drawn when they come into sight, on canvases: some dots of each have a colour
    opened.execute_script("for (const one of document.querySelectorAll('figure.curve')) draw(one)")
    curves = opened.execute_script("""
        return [...document.querySelectorAll("figure.curve")].filter((one) => !one.hidden).map(
          (figure) => {
            const canvas = figure.querySelector("canvas");
            const inked = canvas && canvas.getContext("2d")
              .getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0);
            return [figure.querySelector(".plot").ariaLabel, canvas ? inked : "numbers"];
          })""")
    assert len(curves) > 8
    assert all(" against epoch: " in label and drawn for label, drawn in curves)
    assert sum(drawn is True for _, drawn in curves) > 5
    pictures = opened.execute_script(
        "return [...document.images].map((one) => one.naturalWidth * one.alt.length)"
    )
    assert len(pictures) > 2 * page.QUERIES * (page.NEIGHBOURS + 1)
    assert all(pictures)
    assert (
        opened.execute_script(
            "return [...document.querySelectorAll('[id]')].map((one) => one.id)"
            ".filter((id, place, all) => all.indexOf(id) !== place)"
        )
        == []
    )  # or a chart would be clipped by another's frame


def test_curves_are_the_metrics_with_a_band_over_the_seeds(reported: Path, opened) -> None:
    lines = [
        [json.loads(line) for line in (reported / "moco" / f"seed{i}" / "metrics.jsonl").open()]
        for i in (0, 1)
    ]
    drawn = opened.execute_script("""
        const board = data.boards.find((one) => one.id === "lincls");
        const panel = board.panels.find((one) => one.key === "val_top1");
        return linesOf(board, panel).find((one) => one.name === "moco_v2")""")
    assert drawn["band"]
    for place, (x, mean, low, high) in enumerate(drawn["rows"]):
        values = [[one for one in of_run if "val_top1" in one][place] for of_run in lines]
        assert x == values[0]["epoch"]
        tops = [one["val_top1"] for one in values]
        assert mean == pytest.approx(np.mean(tops), rel=1e-4)
        assert high - low == pytest.approx(2 * np.std(tops, ddof=1), abs=2e-2)
    *evaluated, pretraining = texts(opened, "#curves .legend button")
    assert sorted(evaluated) == ["moco_v2 n = 2", "random init n = 2"]
    assert pretraining == "moco_v2 n = 2"


def test_axes_and_smoothing(opened) -> None:
    """The axes are those of the log, linear between its lines; a smoothed line begins where the
    values do.
    """

    def line(**settings: object) -> list[list[float]]:
        return opened.execute_script(
            """
            for (const [name, value] of Object.entries(arguments[0])) {
              const one = controls.elements[name];
              if (one.type === "checkbox") one.checked = value; else one.value = value;
            }
            controls.dispatchEvent(new Event("input"));
            const board = data.boards.find((one) => one.id === "pretrain");
            return linesOf(board, board.panels.find((one) => one.key === "loss"))[0].rows""",
            settings,
        )

    by_epoch = line(x="epoch")
    for axis, scale in (("step", 10), ("images", 1280)):
        found = line(x=axis)
        assert [row[0] for row in found] == pytest.approx(
            [scale * row[0] for row in by_epoch], 1e-3
        )
        assert [row[1] for row in found] == [row[1] for row in by_epoch]
    hours = [row[0] for row in line(x="hours", logx=True, logy=True)]
    assert hours == sorted(hours)
    assert 0 < hours[-1] < 1
    smooth = line(x="epoch", logx=False, logy=False, smooth=0.9)
    values = np.array([row[1] for row in by_epoch])
    weights = np.tril(0.9 ** np.subtract.outer(range(len(values)), range(len(values))))
    expected = weights @ values / weights.sum(axis=1)
    assert [row[1] for row in smooth] == pytest.approx(expected.tolist())
    assert line(smooth=0) == by_epoch


def test_values_under_the_cursor_and_by_keyboard(opened) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    plot = opened.execute_script("""
        const figure = [...document.querySelectorAll("figure.curve")].find(
          (one) => one.board.id === "pretrain" && one.panel.key === "loss");
        figure.scrollIntoView({ block: "center" });
        draw(figure);
        return figure.querySelector(".plot")""")
    webdriver.ActionChains(opened).move_to_element(plot).perform()
    tip = opened.find_element("css selector", "#tip")
    assert tip.is_displayed()
    (name,) = texts(opened, "#tip tr td:first-child")
    assert name == "moco_v2"
    plot.send_keys(webdriver.Keys.END)
    last = opened.execute_script(
        "return shown.get(arguments[0].closest('figure')).lines[0].rows.at(-1)", plot
    )
    assert texts(opened, "#tip b")[0].endswith("epoch 2")
    assert float(texts(opened, "#tip td.num")[0]) == pytest.approx(last[1], rel=1e-3)


def test_filter_compare_and_clear(opened) -> None:
    """Words leave out rows and lines; ticked rows alone are drawn and compared."""

    box = opened.find_element("css selector", "#filter")
    box.send_keys("random lincls")
    assert visible(opened, "#leaderboard tbody th") == ["random init"]
    assert visible(opened, "#runs tbody th") == ["random init"] * 2
    assert visible(opened, "#curves .legend button") == ["random init n = 2"]
    assert texts(opened, "#found") == ["2 of 6 runs"]
    box.clear()
    box.send_keys(" ")
    assert len(visible(opened, "#runs tbody th")) == 6
    opened.find_element("css selector", "#leaderboard input[value='moco_v2']").click()
    assert set(visible(opened, "#curves .legend button")) == {"moco_v2 n = 2"}
    assert visible(opened, "#differences thead th") == ["key", "moco_v2"]
    assert len(visible(opened, "#runs tbody th")) == 6  # a choice hides no row
    opened.find_element("css selector", "#unpick").click()
    assert len(visible(opened, "#curves .legend button")) == 3
    assert opened.get_log("browser") == []


def test_tables_and_charts_can_be_downloaded(opened, tmp_path: Path) -> None:
    opened.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    opened.execute_script("""
        draw(document.querySelector("figure.curve"));
        document.querySelector("#leaderboard .tools button").click();
        for (const one of document.querySelectorAll("#leaderboard .dots .tools button, "
          + "figure.curve:first-of-type .tools button")) if (one.checkVisibility()) one.click()""")
    opened.set_script_timeout(10)
    wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(opened, 120)
    kinds = lambda: {path.suffix for path in tmp_path.iterdir()}  # noqa: E731
    wait.until(lambda _: kinds() >= {".csv", ".svg", ".png"} and ".crdownload" not in kinds())
    (table,) = tmp_path.glob("*.csv")
    rows = list(csv.reader(table.open(newline="")))
    assert rows[0][:3] == ["name", "val_top1 (%) mean", "val_top1 (%) std"]
    shown = texts(opened, "#leaderboard tbody tr:first-child td:nth-child(2)")[0]
    assert rows[1][0] == texts(opened, "#leaderboard tbody tr:first-child th")[0]
    assert " ± ".join(rows[1][1:3]) == shown
    for picture in tmp_path.glob("*.svg"):
        drawing = ElementTree.parse(picture).getroot()
        assert any("moco_v2" in (node.text or "") for node in drawing.iter())
    for picture in tmp_path.glob("*.png"):
        with Image.open(picture) as image:
            assert image.width > 300
            assert len(image.getcolors(maxcolors=1 << 24) or ()) > 3


def choose(browser, selector: str, value: str) -> None:
    browser.execute_script(
        "const one = document.querySelector(arguments[0]); one.value = arguments[1];"
        "one.dispatchEvent(new Event('change', { bubbles: true }))",
        selector,
        value,
    )


def test_rows_are_pooled_by_a_key(browser, swept: Path) -> None:
    """Tables, charts and choices follow, and go back."""
    show(browser, swept)
    names = visible(browser, "#leaderboard tbody th")
    assert len(names) == 6
    choose(browser, "#by", "optimizer.base_lr")
    rates = [f"base_lr={lr}" for lr in (3, 2, 1)]
    assert visible(browser, "#leaderboard tbody th") == rates
    assert visible(browser, "#curves .legend button") == [f"{rate} n = 4" for rate in rates]
    expected = units.shown("val_top1", [62.5, 62.6, 63.0, 63.1])
    assert visible(browser, "#leaderboard tbody td:nth-child(2)")[0] == expected
    assert expected in texts(browser, "#leaderboard svg")[0]
    assert "mean ± std over all runs" in visible(browser, "#pooled")[0]
    # a run's row ticks the row that it is in, and the configurations of that are compared
    row = browser.find_element("css selector", "#runs tbody tr")
    row.find_element("css selector", "input").click()
    ticked = row.get_attribute("data-name")
    mine = [name for name in names if name.split()[-1] == ticked.split()[-1]]
    assert len(visible(browser, "#curves .legend button")) == 1
    assert len(visible(browser, "#differences thead th")) == 1 + len(mine) == 3
    choose(browser, "#by", "")
    assert visible(browser, "#leaderboard tbody th") == names
    assert not visible(browser, "#pooled")
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1440, 900, 400])
def test_rows_of_runs_are_low_whatever_their_directory(browser, still: Path, width: int) -> None:
    show(browser, still, (width, 900))
    heights = browser.execute_script(
        "return [...document.querySelectorAll('#runs tbody tr')].map((one) => one.clientHeight)"
    )
    assert max(heights) < 45
    assert texts(browser, "#runs .place") == ["seed0", "seed1"]
    assert texts(browser, "#runs p code") == [str(still / "sweeps" / LONG / LONG)]
    table = browser.execute_script("return csvOf(document.querySelector('#runs table'))")
    assert [row[-1] for row in csv.reader(table.splitlines())][1:] == [
        str(still / "sweeps" / LONG / LONG / f"seed{seed}") for seed in (0, 1)
    ]


def test_curves_that_hardly_move_are_flat_and_their_ticks_differ(browser, still: Path) -> None:
    """Of a chart as of the file made of it; two points have marks in both."""
    show(browser, still)
    browser.execute_script(
        "for (const one of document.querySelectorAll('details')) one.open = true;"
        "for (const one of document.querySelectorAll('figure.curve')) draw(one)"
    )
    charts = browser.execute_script("""
        return [...shown].filter(([figure, { plot }]) => plot).map(([figure, chart]) => ({
          key: chart.panel.key,
          ticks: chart.plot.axes.map((axis) => axis._values.filter(Boolean)),
          ys: chart.lines[0].rows.map((row) => chart.plot.valToPos(row[1], "y")),
          height: chart.plot.bbox.height,
          marked: chart.plot.series[1].points.show(chart.plot, 1),
          file: picture(chart),
        }))""")
    assert len(charts) > len(units.DIAGNOSTICS)
    for chart in charts:
        for ticks in chart["ticks"]:
            assert len(ticks) >= 2, chart["key"]
            assert len(set(ticks)) == len(ticks), (chart["key"], ticks)
        assert np.ptp(chart["ys"]) < chart["height"] / 10, chart["key"]
        assert chart["marked"]
        assert chart["file"].count("<circle") == 2


def test_labels_of_an_axis(browser, still: Path) -> None:
    """As many digits as tell neighbours apart, and no more; a value has two more than the ticks."""
    show(browser, still)
    for ticks, labels in (
        ([69.13, 69.1301, 69.1302], ["69.1300", "69.1301", "69.1302"]),
        ([0, 0.25, 0.5], ["0", "0.25", "0.50"]),
        ([-2, -1, 0], ["-2", "-1", "0"]),
        ([0, 5e6, 1e7], ["0", "5M", "10M"]),
        ([1.2e9, 1.25e9, None], ["1.20B", "1.25B", ""]),
        ([0, 2e-5, 4e-5], ["0", "2e-5", "4e-5"]),
        ([1.5e-4, 2e-4], ["1.5e-4", "2.0e-4"]),
        ([10000, 20000], ["10,000", "20,000"]),
    ):
        assert browser.execute_script("return labelsOf(arguments[0])", ticks) == labels
    for value, ticks, label in (
        (69.13, [20, 40, 60], "69.1"),
        (69.13, [69.0, 69.5], "69.130"),
        (5, [4.5, 5], "5.000"),
        (1234.5, [0, 1000, 2000], "1,235"),
        (3e-5, [0, 2e-5], "3e-5"),
    ):
        said = browser.execute_script("return between(arguments[0], arguments[1])", value, ticks)
        assert said == label
    for value, label in ((12_800_000, "12,800,000"), (0.00012345, "1.23e-4"), (40.0, "40")):
        assert browser.execute_script("return number(arguments[0])", value) == label


def test_logarithmic_axes_have_labels_whatever_they_span(browser, still: Path) -> None:
    show(browser, still)
    for least, most, labels in (
        (69.1, 72.3, ["70", "71", "72"]),
        (3.0, 7.0, ["3", "4", "5", "6", "7"]),
        (0.9, 130, ["1", "2", "5", "10", "20", "50", "100"]),
        (5e-4, 3e3, ["0.001", "0.01", "0.1", "1", "10", "100", "1,000"]),
        (1e-20, 1, ["1e-20", "1e-17", "1e-14", "1e-11", "1e-8", "1e-5", "0.01"]),
    ):
        said = browser.execute_script(
            "return logLabels(logTicks(arguments[0], arguments[1]))", least, most
        )
        assert said == labels
    browser.execute_script("""
        for (const one of ["logx", "logy"]) controls.elements[one].checked = true;
        for (const one of document.querySelectorAll("figure.curve")) draw(one)""")
    every = browser.execute_script("""
        return [...shown.values()].filter(({ plot }) => plot)
          .flatMap(({ plot }) => plot.axes.map((axis) => axis._values))""")
    assert len(every) > 8
    for ticks in every:
        assert len(ticks) == len(set(ticks)) >= 2
    assert browser.get_log("browser") == []


def test_columns_come_in_order_and_say_what_they_are(browser, still: Path) -> None:
    """By the pointer, by the keyboard, and below the table; Escape hides a tip."""
    webdriver = pytest.importorskip("selenium.webdriver")
    show(browser, still)
    heads = [head.replace("\u2011", "-") for head in texts(browser, "#leaderboard th[scope=col]")]
    assert heads[:5] == ["name", "probe_top1 (%)", "n", "knn_top1 (%)", "loss"]
    assert heads[-len(units.DIAGNOSTICS) :] == [units.unit(key).label for key in units.DIAGNOSTICS]
    buttons = browser.find_elements("css selector", "#leaderboard thead button[aria-describedby]")
    assert len(buttons) == len(heads) - 1
    tip = browser.find_element("css selector", "#tip")
    browser.execute_script("arguments[0].focus()", buttons[-1])
    assert tip.text == units.about(units.DIAGNOSTICS[-1])
    browser.switch_to.active_element.send_keys(webdriver.Keys.ESCAPE)
    assert not tip.is_displayed()
    browser.execute_script("arguments[0].closest('.scroll').scrollLeft = 0", buttons[0])
    webdriver.ActionChains(browser).move_to_element(buttons[0]).perform()
    assert tip.text == units.about("probe_top1")
    browser.find_element("css selector", "#columns summary").click()
    assert len(visible(browser, "#columns dd")) == len(heads) - 1


def test_settings_against_results(browser, swept: Path) -> None:
    """A line for each row, the key that decides first, and a click that ticks."""
    show(browser, swept)
    browser.execute_script("document.getElementById('sweep').scrollIntoView()")
    wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(browser, 120)
    wait.until(lambda _: texts(browser, "#sweeps tbody th"))
    assert texts(browser, "#sweeps tbody th") == ["optimizer.base_lr", "batch_size"]
    assert float(texts(browser, "#sweeps tbody td.bar")[0]) > 95
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.execute_script(count, "#sweeps path.row") == 6
    assert browser.execute_script(count, "#sweeps circle.row") == 12
    (caption,) = texts(browser, "#sweeps .across figcaption small")
    assert caption == "the thick line is the best: 63.05 with base_lr 3, batch_size 128"
    # the best and the worst end at the ends of the last axis
    ends = browser.execute_script(
        "return [...document.querySelectorAll('#sweeps path.row')].map("
        "(one) => Number(one.getAttribute('d').split(',').at(-1)))"
    )
    assert ends == sorted(ends, reverse=True)
    browser.execute_script(
        "document.querySelector('#sweeps path.row').dispatchEvent("
        "new MouseEvent('click', { bubbles: true }))"
    )
    assert len(visible(browser, "#curves .legend button")) == 1
    box = browser.find_element("css selector", "#filter")
    browser.execute_script("document.getElementById('unpick').click()")
    box.send_keys("batch_size=64")
    browser.execute_script("document.getElementById('sweep').scrollIntoView()")
    wait.until(lambda _: browser.execute_script(count, "#sweeps path.row") == 3)
    # names are short where they are told apart so
    assert browser.execute_script("return shortOf(['a.lr', 'b.lr', 'method.name', 'c.size'])") == [
        *("a.lr", "b.lr", "method", "size")
    ]
    scale = browser.execute_script(
        "const one = scaleOf(Array.from({ length: 31 }, (_, i) => String(10 ** (i / 10))));"
        "return [one.at('1'), one.at('1000'), one.ticks.map(([, label]) => label)]"
    )
    assert scale == [pytest.approx(0.04), pytest.approx(0.96), ["1", "10", "100", "1,000"]]
    assert browser.get_log("browser") == []


def test_one_point_is_a_number(browser, tmp_path: Path) -> None:
    classified(tmp_path / "a", 40.0, "backbone=pixels")
    launch(compose("stage=report", f"runs={tmp_path}"))
    show(browser, tmp_path)
    browser.execute_script("document.querySelector('figure.curve').scrollIntoView()")
    browser.execute_script("draw(document.querySelector('figure.curve'))")
    assert texts(browser, "figure.curve:first-of-type .numbers td") == ["40"]
    assert browser.execute_script("return document.querySelectorAll('canvas').length") == 0


def test_three_hundred_runs_open_within_the_limits(browser, tmp_path: Path) -> None:
    config = pretrained(tmp_path / "run").config
    runs = []
    for number in range(300):
        own = copy.deepcopy(config)
        own["optimizer"]["base_lr"] = 0.01 + number
        keys = [*page.WHILE_IT_LEARNS, *units.DIAGNOSTICS, *page.TECHNICAL, "loss", "accuracy"]
        values = np.random.default_rng(number).random((300, len(keys))).tolist()
        lines = [
            {
                "step": step,
                "epoch": step / 10,
                "images_seen": step,
                **dict(zip(keys, row, strict=True)),
            }
            for step, row in enumerate(values, 1)
        ]
        runs.append(record.Ran(Path(f"run{number}"), own, lines, {"loss": 1.0, "knn_top1": 50.0}))
    html = page.render("many", runs, grouping.boards(runs), [], {}, [])
    (tmp_path / "report.html").write_text(html)
    assert len(html.encode()) < 10e6
    show(browser, tmp_path)
    opened_in = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
    print(f"{len(html.encode()):,} bytes, {browser.execute_script(opened_in):.0f} ms")
    assert len(texts(browser, "#leaderboard tbody tr")) == 300
    assert len(texts(browser, "#curves .legend button")) == 10
    (more,) = texts(browser, "#curves .rest")
    assert more.startswith("290 more")
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(browser, reported: Path, scheme: str) -> None:
    """WCAG 2.1, 1.4.3: a contrast of 4.5 between each text and what is behind it."""
    show(browser, reported, scheme=scheme)
    browser.execute_script(
        "for (const one of document.querySelectorAll('details')) one.open = true"
    )
    found = browser.execute_script("""
        const canvas = document.createElement("canvas");
        const context = canvas.getContext("2d", { willReadFrequently: true });
        const rgba = (colour) => {
          context.clearRect(0, 0, 1, 1);
          context.fillStyle = colour;
          context.fillRect(0, 0, 1, 1);
          return [...context.getImageData(0, 0, 1, 1).data];
        };
        const behind = (node) => {
          for (let one = node; one; one = one.parentElement) {
            const colour = rgba(getComputedStyle(one).backgroundColor);
            if (colour[3] > 250) return colour;
          }
        };
        const light = (colour) => colour.slice(0, 3).map((value) => value / 255)
          .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
          .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
        const low = [];
        for (const node of document.querySelectorAll("body *")) {
          const words = [...node.childNodes].filter((one) => one.nodeType === 3 && one.data.trim());
          if (!node.checkVisibility() || !words.length) continue;
          const style = getComputedStyle(node);
          if (node.tagName === "title") continue;
          const ink = rgba(node.tagName === "text" ? style.fill : style.color);
          const [text, ground] = [ink, behind(node)].map(light);
          const contrast = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
          if (contrast < 4.5) low.push([node.outerHTML.slice(0, 120), contrast]);
        }
        return { low, ground: light(behind(document.querySelector("main"))) };""")
    assert found["low"] == []
    assert (found["ground"] > 0.5) == (scheme == "light")


def test_a_button_changes_light_and_dark(opened) -> None:
    def ground() -> str:
        return opened.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = ground()
    button = opened.find_element("css selector", "#theme")
    button.click()
    after = ground()
    button.click()
    assert before == ground() != after


@pytest.mark.parametrize("size", [LAPTOP, (1024, 700), (600, 900), (400, 900)])
def test_nothing_is_wider_than_the_window(browser, reported: Path, size: tuple[int, int]) -> None:
    show(browser, reported, size)
    browser.execute_script("""
        by.append(make("option", {}, "pretrained.augmentation.".repeat(5)));
        by.closest("label").hidden = false""")
    wide, window = browser.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth]"
    )
    assert wide <= window
    # nor is what has no spaces squeezed to a letter a line
    (place,) = browser.execute_script(
        "return [document.querySelector('#runs .place code').getClientRects().length]"
    )
    assert place == 1


def test_a_name_pointed_at_is_seen_alone(opened) -> None:
    def dim() -> set[str]:
        return set(
            opened.execute_script(
                "return [...shown.values()].flatMap(({ plot }) => plot?.series ?? [])"
                ".filter((one) => one.alpha < 1).map((one) => one.label)"
            )
        )

    opened.execute_script("draw(document.querySelector('figure.curve'))")
    button = opened.find_element("css selector", "#curves .legend button")
    button.send_keys("\n")  # a click by keyboard: kept
    assert dim() == {"random init", "moco_v2"} - {button.get_attribute("data-series")}
    assert button.get_attribute("aria-pressed") == "true"
    button.send_keys("\n")
    opened.execute_script("document.activeElement.blur()")
    assert dim() == set()


def test_a_point_of_the_map_shows_its_picture(opened) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    circle = opened.find_element("css selector", ".map circle")
    webdriver.ActionChains(opened).move_to_element(circle).perform()
    tip = opened.find_element("css selector", "#tip")
    assert tip.is_displayed()
    assert tip.find_element("css selector", ".text").text == circle.get_attribute("data-name")
    picture = tip.find_element("css selector", ".thumb").value_of_css_property("background-image")
    assert picture.startswith('url("data:image/webp')
    assert len(opened.find_elements("css selector", ".map g.own")) == 1


def test_a_map_shows_all_pictures(opened) -> None:
    """Each in the place of its point, cut out of the sheet; in the files that are saved, too."""
    plot = opened.find_element("css selector", ".map")
    button = opened.find_elements("xpath", "//button[text()='pictures']")[0]
    press = lambda: opened.execute_script("arguments[0].click()", button)  # noqa: E731
    press()
    assert button.get_attribute("aria-pressed") == "true"
    columns, size = (int(plot.get_attribute(f"data-{name}")) for name in ("columns", "thumb"))
    found = opened.execute_script(
        """return [...document.querySelector('.map').querySelectorAll('.picture')].map((one) => [
          one.getAttribute('viewBox'), one.nextElementSibling.dataset.place,
          one.nextElementSibling.getAttribute('cx') - one.x.baseVal.value
            - one.width.baseVal.value / 2, one.checkVisibility()])"""
    )
    assert len(found) == len(plot.find_elements("css selector", "circle"))
    for box, place, beside, seen in found:
        row, column = divmod(int(place), columns)
        assert [int(one) for one in box.split()] == [column * size, row * size, size, size]
        assert abs(beside) < 0.02
        assert seen
    saved = opened.execute_script("return mapOf(document.querySelector('.map'))")
    assert saved.count("<use ") == len(found)
    assert 'href="data:image/webp' in saved
    ElementTree.fromstring(saved)
    press()
    assert not opened.execute_script("return document.querySelector('.picture').checkVisibility()")


def test_a_map_is_read_by_keyboard(opened) -> None:
    """Its points from left to right."""
    keys = pytest.importorskip("selenium.webdriver").Keys
    plot = opened.find_element("css selector", ".map")
    places = []
    for key in (keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.END):
        plot.send_keys(key)
        assert opened.find_element("css selector", "#tip").is_displayed()
        (own,) = opened.find_elements("css selector", ".map circle.own")
        assert texts(opened, "#tip .text") == [own.get_attribute("data-name")]
        places.append(float(own.get_attribute("cx")))
    every = opened.execute_script(
        "return [...arguments[0].querySelectorAll('circle')].map("
        "(one) => Number(one.getAttribute('cx')))",
        plot,
    )
    assert places == [*sorted(every)[:2], max(every)]
    opened.execute_script("document.activeElement.blur()")
    assert not opened.find_element("css selector", "#tip").is_displayed()


def test_a_map_is_zoomed(opened) -> None:
    """By its buttons, as by a double click: what is in the middle stays there."""
    opened.execute_script("document.querySelector('.map').scrollIntoView()")

    def box() -> list[float]:
        return [
            float(one)
            for one in opened.execute_script(
                "return document.querySelector('.map').getAttribute('viewBox')"
            ).split()
        ]

    def press(number: int) -> None:
        opened.execute_script(
            "document.querySelectorAll('.zoom button')[arguments[0]].click()", number
        )

    press(0)
    assert box() == [24, 24, 52, 52]
    press(1)
    assert box() == [-2, -2, 104, 104]
    for _ in range(9):
        press(0)
    assert box()[2] == pytest.approx(104 / 40)
    press(2)
    assert box() == [-2, -2, 104, 104]
    drawing = ElementTree.fromstring(
        opened.execute_script("return mapOf(document.querySelector('.map'))")
    )
    fills = {node.get("fill", "") for node in drawing.iter("{http://www.w3.org/2000/svg}g")}
    assert all(fill.startswith("rgb(") for fill in fills)


def test_errors_and_calibration_say_what_the_runs_said(reported: Path, opened) -> None:
    errors = [
        json.loads((reported / "moco" / f"seed{i}" / "summary.json").read_text())["val_ece"]
        for i in (0, 1)
    ]
    said = texts(opened, ".reliability[data-name='moco_v2'] small")[0]
    assert said.startswith(f"error {units.shown('val_ece', errors)} %; mean confidence ")
    bins = json.loads(
        opened.execute_script(
            "return document.querySelector(\".reliability[data-name='moco_v2']\").dataset.bins"
        )
    )
    assert sum(bins[0]) == 2 * 500
    assert opened.execute_script("return document.querySelector('.reliability svg').ariaLabel")
    tiles = texts(opened, "#wrong .gallery:first-of-type li")
    assert len(tiles) == page.WRONG
    sizes = opened.execute_script(
        "return [...document.querySelectorAll('.gallery img')].map("
        "(one) => [one.clientWidth, one.naturalWidth])"
    )
    assert set(map(tuple, sizes)) == {(96, 16)}
    true, taken = (
        texts(opened, f"#wrong .gallery:first-of-type li {one}") for one in ("b", ".taken")
    )
    assert all(one != other for one, other in zip(true, taken, strict=True))


def test_votes_of_neighbours_have_a_reliability_diagram(browser, tmp_path: Path) -> None:
    """Of the bins that the runs left; a broken file is named, an older run has none."""
    for seed, bins in enumerate(
        (
            {"images": [0] * 14 + [4], "confidence": [0] * 14 + [3.9], "right": [0] * 14 + [3]},
            {"images": [4] + [0] * 14, "confidence": [0.2] + [0] * 14, "right": [1] + [0] * 14},
            {"images": [1, 2]},
            None,
        )
    ):
        ran = classified(tmp_path / f"{seed}", 50.0, "stage=knn", f"seed={seed}")
        if bins is not None:
            (ran.directory / layout.RELIABILITY).write_text(json.dumps(bins))
    launch(compose("stage=report", f"runs={tmp_path}"))
    show(browser, tmp_path)
    (caption,) = texts(browser, ".reliability figcaption")
    assert caption.startswith("random init, votes of neighbourserror 21.2 ± 1.8 %; mean confidence")
    assert caption.endswith("51.2 %, accuracy 50.0 %; 2 runs")
    (note,) = texts(browser, ".note li")
    assert "no calibration of seed 2" in note
    assert browser.get_log("browser") == []


def test_everything_has_a_name_for_those_who_cannot_see_it(opened) -> None:
    assert opened.execute_script("return document.documentElement.lang") == "en"
    unnamed = """
        return [...document.querySelectorAll("button, a, img, svg, [role=group]")]
          .filter((one) => !(one.ariaLabel || one.alt || one.textContent.trim()
            || one.ariaLabelledByElements))
          .map((one) => one.outerHTML)"""
    assert opened.execute_script(unnamed) == []
    assert texts(opened, "th:not([scope])") == []
    levels = [
        int(tag[1])
        for tag in opened.execute_script(
            "return [...document.querySelectorAll('h1, h2, h3, h4')].map((one) => one.tagName)"
        )
    ]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("name", ["networks", "settings", "live"])
def test_axe_finds_nothing(browser, request: pytest.FixtureRequest, swept: Path, name: str) -> None:
    """WCAG 2 A and AA, and best practices, as far as a program sees them."""
    folder = request.getfixturevalue("reported") if name == "networks" else swept
    with served(folder) as port:
        for width in (1280, 400):
            show(browser, folder, (width, 900))
            if name == "live":
                browser.get(f"http://127.0.0.1:{port}/")
            browser.execute_script("""
                for (const one of document.querySelectorAll("details")) one.open = true;
                for (const one of document.querySelectorAll("figure.curve")) draw(one);
                for (const one of document.querySelectorAll("#sweeps > *"))
                  drawSweep(one, one.board);""")
            assert violations(browser) == [], width
            assert browser.get_log("browser") == []
    browser.get("about:blank")


# -- what isn't there ------------------------------------------------------------------------------


def test_a_run_without_its_images_keeps_its_place(browser, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "moco", tmp_path / "moco")
    for file in (tmp_path / "moco").glob("*/config.yaml"):
        text = file.read_text().replace(
            "_target_: ssl_bench.data.formats.digits.Digits",
            "_target_: ssl_bench.data.formats.folder.Folder",
        )
        file.write_text(
            text.replace("  name: digits\n", f"  name: folder\n  root: {tmp_path}/gone\n")
        )
        files.seal(file.parent, files.sums_of(file.parent, layout.own(file.parent)))
    launch(compose("stage=report", f"runs={tmp_path}"))
    show(browser, tmp_path)
    (note,) = texts(browser, ".note li")
    assert "no predictions, neighbours or map, because its images can't be read here: " in note
    assert f"{tmp_path}/gone" in note
    assert len(texts(browser, "#leaderboard tbody tr")) == 1
    assert browser.get_log("browser") == []


def test_a_list_of_runs_and_a_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results first, then the tables made of them; again, it changes nothing."""
    monkeypatch.chdir(tmp_path)
    pretrained(tmp_path / "a")
    pretrained(tmp_path / "b", "method=moco_v1")
    readme = tmp_path / "README.md"
    readme.write_text(
        "<!-- results: runs/report/results.json columns=loss -->\n<!-- end of results -->\n"
    )
    for _ in range(2):
        launch(compose("stage=report", "runs=[a,b]", "stage.readme=README.md"))
        assert readme.read_text().splitlines()[1:-1] == [
            "|         |  loss |",
            "|---------|------:|",
            "| moco_v1 | 3.000 |",
            "| moco_v2 | 3.000 |",
        ]
    for words, message in (
        ([], "runs= needs a value"),
        (["stage.readme=none.md"], r"stage\.readme=none\.md: can't be read"),
        (
            ["runs=a", "stage.out=README.md"],
            r"README\.md: can't be written \(File exists\); choose another stage\.out=",
        ),
    ):
        with pytest.raises(UserError, match=message):
            launch(compose("stage=report", *words))


def test_runs_without_checkpoints(tmp_path: Path) -> None:
    pretrained(tmp_path / "a", "seed=0")
    pretrained(tmp_path / "b", "seed=1", loss=None)
    launch(compose("stage=report", f"runs={tmp_path}"))
    html = (tmp_path / "report.html").read_text()
    assert (
        "There is no confusion matrix, nearest neighbours or feature map, "
        "because no finished run here has a checkpoint." in html
    )
    assert "1 of 2 runs are not finished" in html
    assert "## Not finished" in (tmp_path / "results.md").read_text()


def test_other_images_than_the_run_saw_are_noticed(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "moco" / "seed0", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(
        json.dumps(summary | {"val_top1": summary["val_top1"] + 1})
    )
    files.seal(tmp_path / "run", files.sums_of(tmp_path / "run", layout.own(tmp_path / "run")))
    launch(compose("stage=report", f"runs={tmp_path}/run"))
    assert "are these the same images?" in (tmp_path / "run" / "report.html").read_text()


def test_names_are_text_and_never_markup(browser, tmp_path: Path) -> None:
    name = "<img src=x onerror='window.hurt=1'>"
    pretrained(tmp_path / "run", "method.name=HERE")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("HERE", json.dumps(name)))
    (tmp_path / "run").rename(tmp_path / name)
    launch(compose("stage=report", f"runs={tmp_path}"))
    show(browser, tmp_path)
    assert browser.execute_script("return [window.hurt, document.images.length]") == [None, 0]
    assert texts(browser, "#runs tbody th") == [name]


def test_a_metric_that_no_run_has(tmp_path: Path) -> None:
    pretrained(tmp_path / "a")
    with pytest.raises(
        UserError, match=r"metric=los: no such metric of these runs; did you mean loss\?"
    ):
        launch(compose("stage=report", f"runs={tmp_path}", "metric=los"))
    assert not (tmp_path / "report.html").exists()


# -- pieces ----------------------------------------------------------------------------------------


def detail(num_classes: int, per_class: int, wrong: float = 0.3) -> page.Detail:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), per_class)
    predicted = np.where(rng.random(len(labels)) < wrong, (labels + 1) % num_classes, labels)
    features = np.eye(num_classes, dtype=np.float32)[labels] + rng.normal(
        0, 0.01, (len(labels), num_classes)
    )
    image = lambda place: np.full((8, 8, 3), place % 256, dtype=np.uint8)  # noqa: E731
    ran = record.Ran(Path("run"), {"seed": 0, "stage": {"name": "lincls"}})
    group = grouping.Group("ours", [ran])
    return page.Detail(
        group, "val", labels, (), features.astype(np.float32), {ran: predicted}, image, "same"
    )


def test_a_confusion_matrix_of_many_classes_is_a_picture_with_its_largest_errors() -> None:
    few, many = page._confusion(detail(3, 50)), page._confusion(detail(800, 5))
    assert np.allclose(np.sum(few["shares"], axis=1), 1)
    assert few["picture"] is None
    assert many["shares"] is None
    assert many["picture"].startswith("data:image/webp")
    assert len(many["pairs"]) == page.PAIRS
    assert all(int(pair["predicted"]) == (int(pair["true"]) + 1) % 800 for pair in many["pairs"])


def test_neighbours_are_named_where_classes_have_names(opened) -> None:
    one = detail(3, 9)
    one.classes = ["ant", "bee", "cat"]
    for row in page._neighbours(one)["rows"]:
        assert {tile["class"] for tile in row} in ({"ant"}, {"bee"}, {"cat"})
    assert {tile["class"] for tile in page._neighbours(detail(3, 9))["rows"][0]} == {"0"}
    rows = texts(opened, "#neighbours figure:first-of-type .tiles > div:first-child small")
    assert rows[0] == "0"
    assert len(rows) == page.NEIGHBOURS + 1
    one.labels = np.full(27, -1)
    assert {tile["class"] for tile in page._neighbours(one)["rows"][0]} == {""}


def test_neighbours_are_of_the_same_class_where_features_tell_it() -> None:
    found = page._neighbours(detail(20, 30))
    assert len(found["rows"]) == page.QUERIES
    for row in found["rows"]:
        assert [tile["kind"] for tile in row] == ["query"] + ["same"] * page.NEIGHBOURS


def test_the_surest_errors_come_first() -> None:
    """Those that more runs make before all others; images are enlarged by whole factors."""
    one = detail(3, 4, wrong=0)
    (first,) = one.predictions
    second = record.Ran(Path("other"), first.config)
    said = one.predictions[first]
    one.predictions = {first: said.copy(), second: said.copy()}
    sure = {ran: np.full(12, 0.5, dtype=np.float32) for ran in one.predictions}
    one.confidences = sure
    for ran, place, answer, confidence in (
        (first, 0, 1, 0.7),
        (second, 0, 1, 0.5),
        (first, 5, 2, 0.9),
        (second, 9, 0, 0.95),
    ):
        one.predictions[ran][place], sure[ran][place] = answer, confidence
    found = page._wrong(one)
    tiles = [
        (tile["true"], tile["predicted"], tile["sure"], tile["times"]) for tile in found["tiles"]
    ]
    assert tiles == [("0", "1", "60", 2), ("2", "0", "95", 1), ("1", "2", "90", 1)]
    assert found["count"] == 3
    assert {tile["width"] for tile in found["tiles"]} == {96}  # 12 times 8 pixels
    one.image = lambda _: np.zeros((300, 200, 3), dtype=np.uint8)
    assert {tile["width"] for tile in page._wrong(one)["tiles"]} == {64}
    one.predictions = {first: said}
    assert page._wrong(one) is None


def test_unlabelled_images_have_neighbours_and_a_map() -> None:
    one = detail(4, 10)
    one.labels = np.full(40, -1)
    assert [len(row) for row in page._neighbours(one)["rows"]] == [
        page.NEIGHBOURS + 1
    ] * page.QUERIES
    sheets: dict[str, str] = {}
    (classes,) = page._map(one, sheets)["classes"]
    assert (classes["name"], len(classes["points"])) == ("unlabelled", 40)
