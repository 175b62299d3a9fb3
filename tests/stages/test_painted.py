"""Pictures of what a transformer has learnt: their numbers by hand, their files, and a report."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import compose
from PIL import Image
from small_methods import drawn, make, overrides

from ssl_bench.augment.draws import keys
from ssl_bench.backbones.vit import ViT
from ssl_bench.evaluate.tokens import brightness, principal_colours
from ssl_bench.launch.process import launch
from ssl_bench.methods.mae import MAE, patchify
from ssl_bench.report import sheet
from ssl_bench.runs import layout


def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_attention_is_that_of_the_class_token_in_the_last_block() -> None:
    torch.manual_seed(0)
    network = ViT(16, 4, 24, 3, depth=2, register_tokens=1).eval()
    seen = []
    last = network.encoder.layers[-1]
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(images())
    found = network.attention(images())
    assert found.shape == (3, 3, 16)
    weight, bias = last.self_attention.in_proj_weight, last.self_attention.in_proj_bias
    query, key, _ = (last.ln_1(seen[0]) @ weight.T + bias).chunk(3, dim=-1)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        scores = (key[..., part] @ query[:, 0, part, None])[..., 0] / 8**0.5
        torch.testing.assert_close(found[:, head], scores.softmax(dim=1)[:, 2:])
    shades = brightness(found[:, 0])
    assert torch.equal(shades.amin(1), torch.zeros(3))
    assert torch.equal(shades.argmax(1), found[:, 0].argmax(1))


def test_colours_are_principal_components() -> None:
    """In the order of their variance; a token's colour doesn't depend on a direction's sign."""
    patches = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0)).double()
    patches *= torch.tensor([1.0, 9.0, 0.1, 4.0, 2.0])
    patches[..., 1] += patches[..., 1].square() / 9  # a tail
    colours = principal_colours(patches)
    flat = patches.flatten(0, 1).numpy()
    _, _, axes = np.linalg.svd(flat - flat.mean(0))
    for channel in range(3):
        component = (flat - flat.mean(0)) @ axes[channel]
        component *= np.sign((component**3).sum())
        low, high = np.quantile(component, [0.02, 0.98])
        expected = ((component - low) / (high - low)).clip(0, 1)
        np.testing.assert_allclose(colours.flatten(0, 1)[:, channel], expected, atol=1e-4)
    assert torch.allclose(principal_colours(-patches).sum(), colours.sum(), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_what_is_seen_stays_and_what_is_hidden_is_painted(name: str) -> None:
    method = make(name).eval()
    indices = torch.arange(3)
    masked, painted = method.paint(images(), keys(0, 0, indices), indices)
    predicted, hidden = method.predict(images(), *drawn(method, 3))
    hidden = hidden.flatten(1).bool()
    real, without, there = (patchify(x, 4) for x in (images(), masked, painted))
    assert torch.equal(without[~hidden], real[~hidden])
    assert torch.equal(there[~hidden], real[~hidden])
    assert not without[hidden].any()
    if isinstance(method, MAE):  # which predicts patches of mean 0 and deviation 1
        patches = real[hidden]
        wanted = predicted[hidden] * (patches.var(1, keepdim=True) + 1e-6).sqrt()
        wanted += patches.mean(1, keepdim=True)
    else:
        wanted = patchify(predicted, 4)[hidden]
    torch.testing.assert_close(there[hidden], wanted)


def test_a_sheet_has_a_row_for_each_label_enlarged_by_whole_factors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {
        "image": rng.integers(0, 255, (3, 32, 32, 3), dtype=np.uint8),
        "patches": rng.integers(0, 255, (3, 8, 8), dtype=np.uint8),
    }
    sheet.write(tmp_path / "sheet.png", rows)
    made = np.asarray(Image.open(tmp_path / "sheet.png"))
    margin = made.shape[1] - 3 * (128 + sheet.GAP)
    assert made.shape[0] == sheet.GAP + 2 * (128 + sheet.GAP)
    for row, (pictures, factor) in enumerate(zip(rows.values(), (4, 16), strict=True)):
        for column, picture in enumerate(pictures):
            top, left = sheet.GAP + row * (128 + sheet.GAP), margin + column * (128 + sheet.GAP)
            tile = made[top : top + 128, left : left + 128]
            expected = picture.repeat(factor, 0).repeat(factor, 1)
            assert (tile == (expected if picture.ndim == 3 else expected[..., None])).all()
    assert (made[:, :margin] < 128).any()  # the labels


def test_a_run_leaves_them_and_a_report_shows_them(tmp_path: Path) -> None:
    words = overrides("mae", "epochs=1", "batch_size=648", "stage.online_images=0")
    launch(compose(*words, f"dir={tmp_path}/runs/mae"))
    for name in layout.LEARNT.values():
        assert np.asarray(Image.open(tmp_path / "runs/mae" / name)).std() > 20
    report = ["stage=report", f"runs={tmp_path}/runs", "stage.details=0", "device=cpu"]
    launch(compose(*report))
    page = (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    assert page.count('<img class="views"') == 4
    assert "What patches show" in page
