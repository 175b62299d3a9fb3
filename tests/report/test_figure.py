"""The table's numbers and order; the picture answers to its data."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_bench.report import figure
from ssl_bench.runs import units

ROWS = {"raw pixels": [71.0, 73.0, 70.0], "random init": [60.0], "pretrained": [93.0, 95.0, 95.5]}


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_mean_std_is_the_sample_std(values):
    mean, std = units.mean_std(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    assert std == pytest.approx(np.std(values, ddof=1), abs=1e-6)


def test_one_value_has_no_std():
    mean, std = units.mean_std([0.5])
    assert mean == 0.5
    assert math.isnan(std)


def test_table():
    assert figure.table(ROWS, "top-1").splitlines() == [
        "|             |      top-1 (%) |",
        "|-------------|---------------:|",
        "| pretrained  | 94.5 ± 1.3 (3) |",
        "| raw pixels  | 71.3 ± 1.5 (3) |",
        "| random init |       60.0 (1) |",
    ]
    assert "| 2.500 ± 0.707 (2) |" in figure.table({"a": [2.0, 3.0]}, "loss", percent=False)


def curve(length=10, **columns):
    return [
        {"step": i, "epoch": i / 2, "loss": 5 - i / length} | {k: v[i] for k, v in columns.items()}
        for i in range(length)
    ]


def clusters(num_classes, per_class, dim=8):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), per_class)
    return (rng.normal(size=(num_classes, dim)) * 20)[labels] + rng.normal(
        size=(len(labels), dim)
    ), labels


@pytest.fixture(scope="module")
def inputs():
    features, labels = clusters(3, 20)
    views = (
        torch.arange(2, dtype=torch.uint8)[:, None, None, None, None]
        .mul(250)
        .expand(2, 4, 3, 16, 16)
    )
    curves = {
        "pretraining": curve(accuracy=np.linspace(0, 0.5, 10)),
        "raw pixels": [
            {"step": 1, "epoch": 1, "loss": 9.0, "accuracy": 1.0},
            {"step": 2, "epoch": 2, "val_top1": 71.0},
        ],
        "pretrained": [{"step": 2, "epoch": 2, "val_top1": 93.0, "accuracy": 1.0}],
    }
    return dict(title="T", curves=curves, views=views, features=features, labels=labels, rows=ROWS)


def panels(**inputs):
    """Title -> axes."""
    return {axes.get_title(loc="left"): axes for axes in figure.figure(**inputs).axes}


def panel(axes, start):
    return next(value for name, value in axes.items() if name.startswith(start))


def test_png_of_1600_by_1000(tmp_path, inputs):
    from PIL import Image

    figure.overview(tmp_path / "overview.png", **inputs)
    with Image.open(tmp_path / "overview.png") as image:
        assert image.size == (1600, 1000)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_no_pyplot_state(inputs):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure.figure(**inputs)
    assert dict(matplotlib.rcParams) == before


def test_panels_show_the_data(inputs):
    from matplotlib.colors import to_hex

    axes = panels(**inputs)
    assert len(axes) == 6
    (loss,) = axes["Pretraining"].lines
    np.testing.assert_allclose(loss.get_xydata(), [(i / 2, 5 - i / 10) for i in range(10)])
    (picked,) = axes["Positive picked"].lines
    assert picked.get_ydata()[-1] == 50
    top1 = {line.get_label(): line for line in axes["Classification"].lines}
    assert {name: line.get_xydata().tolist() for name, line in top1.items()} == {
        "raw pixels": [[2, 71]],
        "pretrained": [[2, 93]],
    }

    bars = panel(axes, "Linear")  # best first
    assert [label.get_text() for label in bars.get_yticklabels()] == [
        "pretrained",
        "raw pixels",
        "random init",
    ]
    np.testing.assert_allclose(
        [bar.get_width() for bar in bars.patches], [94.5, 71.333, 60], atol=1e-3
    )
    assert [to_hex(bars.patches[i].get_facecolor()) for i in (0, 1)] == [
        top1[name].get_color() for name in ("pretrained", "raw pixels")
    ]
    dots = [line.get_xdata() for line in bars.lines if line.get_marker() == "o"]
    assert [len(x) for x in dots] == [3, 3, 1]
    np.testing.assert_allclose(dots[0], [93, 95, 95.5])
    assert [text.get_text() for text in bars.texts] == [
        "94.5 ± 1.3 (3)",
        "71.3 ± 1.5 (3)",
        "60.0 (1)",
    ]

    features = panel(axes, "Features")
    assert [len(group.get_offsets()) for group in features.collections] == [20, 20, 20]
    assert [text.get_text() for text in features.get_legend().texts] == ["0", "1", "2"]


@pytest.mark.parametrize("shape", [(2, 8), (3, 8), (1, 1), (2, 7), (8, 2)])
def test_the_views_of_an_image_are_on_the_sheet_each_in_its_row(inputs, shape):
    """As many images as fill the sheet, at least so many as there are rows."""
    codes = torch.arange(shape[0] * shape[1], dtype=torch.uint8) + 1
    views = codes.view(*shape, 1, 1, 1).expand(*shape, 3, 16, 16)
    axes = panel(panels(**inputs | {"views": views}), "Images")
    sheet = axes.images[0].get_array()
    rows = [label.get_text() for label in axes.get_yticklabels()]
    shown = sum(bool((sheet == code).all(axis=-1).any()) for code in codes[: shape[1]].tolist())
    assert min(shape) <= shown <= shape[1]
    for v in range(shape[0]):
        for n in range(shown):
            ys = np.nonzero((sheet == int(codes[v * shape[1] + n])).all(axis=-1))[0]
            assert len(ys) == 16 * 16
            tick = np.abs(axes.get_yticks() - (ys.mean() + 0.5)).argmin()
            assert rows[tick] == (f"view {v}" if v else "image")


def test_panels_that_have_nothing_to_show_are_left_out(inputs):
    axes = panels(**inputs | {"views": None, "curves": {"byol": curve()}})
    assert len(axes) == 3
    assert not any(name.startswith(("Positive", "Images")) for name in axes)


def test_curves_of_many_points_get_a_running_mean_and_several_a_legend(inputs):
    axes = panels(**inputs | {"curves": {"a": curve(300), "b": curve(5)}})["Pretraining"]
    assert [len(line.get_xdata()) for line in axes.lines] == [300, 291, 5]
    assert [text.get_text() for text in axes.get_legend().texts] == ["a", "b"]


def test_map_separates_clusters_and_repeats():
    features, labels = clusters(3, 20)
    name, points = figure.project(features)
    assert name == "t-SNE"
    centres = np.stack([points[labels == k].mean(axis=0) for k in range(3)])
    assert (np.linalg.norm(points[:, None] - centres, axis=-1).argmin(axis=1) == labels).all()
    np.testing.assert_array_equal(points, figure.project(features)[1])


def test_a_large_map_is_a_pca():
    name, points = figure.project(clusters(3, 700)[0])
    assert name == "PCA"
    assert points.shape == (2100, 2)
