"""Held-out labels choose among classifiers only where the backbone hasn't learnt from them."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from cached_lincls import state
from commands import CHOICES, NEEDED, compose
from compared import tiny

from ssl_bench.config import build
from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.methods.base import Method
from ssl_bench.stages import _labels
from ssl_bench.stages._labels import learns_labels, seen_by

SMALL = [
    "data.image_size=16",
    "data.workers=1",
    "backbone.width=8",
    "backbone.stem=small",
    "batch_size=8",
]
SELF = [
    "stage=pretrain",
    "method=simsiam",
    "method.dim=8",
    "method.predictor_dim=8",
    "augmentation.flip_p=0",
]
CACHED = ["stage=lincls", "stage.features=cached", "epochs=1"]
ONE_CELL = ["stage.lrs=[0.3]", "stage.weight_decays=[0]"]
ONE_KNN = ["stage=knn", "stage.k=[3]", "stage.temperatures=[0.07]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ and other/, 16 unlabelled, 24 train, 8 val images of two classes; runs of
    self-supervision and, at some depth, of labels: simsiam, supervised, tuned, probed (lincls of
    tuned), tuned_again (of probed), exported.
    """
    place = tmp_path_factory.mktemp("labels")
    for seed, name in enumerate(("data", "other")):
        write_dl21(
            place / name,
            16,
            24,
            8,
            num_classes=2,
            image_size=16,
            num_request=4,
            workers=1,
            seed=seed,
        )
    on = [*SMALL, "data=dl21", f"data.root={place}/data"]
    launch(compose(*on, *SELF, "epochs=1", "stage.online_images=16", f"dir={place}/simsiam"))
    launch(
        compose(*on, "stage=pretrain", "method=supervised", "epochs=1", f"dir={place}/supervised")
    )
    chain = {
        "tuned": ("finetune", "simsiam"),
        "probed": ("lincls", "tuned"),
        "tuned_again": ("finetune", "probed"),
    }
    for name, (stage, before) in chain.items():
        few = ["stage.labels_per_class=6"] if name == "tuned" else []
        launch(
            compose(
                *on,
                f"stage={stage}",
                *few,
                "epochs=1",
                f"pretrained={place}/{before}",
                f"dir={place}/{name}",
            )
        )
    for name in ("supervised", "simsiam"):
        out = [f"stage.out={place}/exported_{name}", "stage.onnx=false"]
        launch(compose("stage=export", f"pretrained={place}/{name}", *out))
    return place


def on(place: Path, weights: str, *more: str, data: str = "data") -> list[str]:
    return [
        *SMALL,
        "data=dl21",
        f"data.root={place}/{data}",
        f"pretrained={place}/{weights}",
        *more,
    ]


LEARNT = [
    "supervised",
    "tuned",
    "probed",
    "tuned_again",
    "exported_supervised",
    "exported_supervised/model.pth",
]


@pytest.mark.parametrize("weights", LEARNT)
@pytest.mark.parametrize("command", [CACHED, ["stage=knn"]], ids=["cached", "knn"])
def test_what_chooses_by_labels_that_were_learnt_is_refused(
    place: Path, tmp_path: Path, weights: str, command: list[str]
) -> None:
    cache = [f"data.cache={tmp_path}/cache", f"dir={tmp_path}/run"]
    with pytest.raises(UserError) as caught:
        launch(compose(*on(place, weights, *command, *cache)))
    assert "has learnt from the labels of data=dl21, so that stage" in str(caught.value)
    assert (
        "stage.k=[20]" if command == ["stage=knn"] else "type stage.features=official, or"
    ) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())  # before an image is read


@pytest.mark.parametrize("weights", ["supervised", "tuned_again"])
def test_as_advised_it_runs(place: Path, tmp_path: Path, weights: str) -> None:
    """And says nothing of labels that were held out, since none were."""
    for name, command in {
        "official": ["stage=lincls", "epochs=1"],
        "cell": [*CACHED, *ONE_CELL],
        "knn": ONE_KNN,
    }.items():
        result = launch(compose(*on(place, weights, *command, f"dir={tmp_path}/{name}")))
        assert "val_top1" in result
        assert "holdout_top1" not in result
        assert not (tmp_path / name / "grid.csv").exists()


def test_one_cell_learns_from_all_images(place: Path, tmp_path: Path) -> None:
    states = []
    for lrs in ("0.3", "0.3,3"):
        cells = [f"stage.lrs=[{lrs}]", "stage.weight_decays=[0]"]
        launch(compose(*on(place, "simsiam", *CACHED, *cells, f"dir={tmp_path}/{len(lrs)}")))
        states.append(state(tmp_path / str(len(lrs))))
    # as one product or as one of two: sums that some processors round otherwise
    torch.testing.assert_close(states[0]["weights.0"], states[1]["weights.0"])
    assert torch.equal(states[0]["fc.weight"], states[0]["weights.0"])


@pytest.mark.parametrize("weights", ["simsiam", "exported_simsiam"])
@pytest.mark.parametrize("command", [CACHED, ["stage=knn"]], ids=["cached", "knn"])
def test_self_supervision_leaves_labels_to_choose_by(
    place: Path, tmp_path: Path, weights: str, command: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ssl_bench")
    assert "holdout_top1" in launch(compose(*on(place, weights, *command, f"dir={tmp_path}/run")))
    assert "nothing is known" not in caplog.text


def test_labels_of_other_images_are_others(place: Path, tmp_path: Path) -> None:
    assert "holdout_top1" in launch(
        compose(*on(place, "supervised", "stage=knn", f"dir={tmp_path}/run", data="other"))
    )


def test_the_same_images_by_other_words(place: Path, tmp_path: Path) -> None:
    """A copy, another size, more labels than those that were learnt from."""
    shutil.copytree(place / "data", tmp_path / "copy")
    for words in (
        [f"data.root={tmp_path}/copy"],
        ["data.image_size=20"],
        ["data.extra_labels=[request_00.csv,label_00.pt]"],
        ["stage.labels_per_class=6"],
    ):
        with pytest.raises(UserError, match="has learnt from the labels of data=dl21"):
            launch(compose(*on(place, "supervised", "stage=knn", *words, f"dir={tmp_path}/run")))


def test_where_nothing_is_known_it_is_said(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ssl_bench")
    torch.save(tiny().backbone.state_dict(), tmp_path / "x.pth")
    source = [f"pretrained={tmp_path}/x.pth"]
    for name, command in {"knn": ["stage=knn"], "cached": CACHED}.items():
        launch(compose(*on(place, "x", *command, *source, f"dir={tmp_path}/{name}")))
        assert "doesn't say which labels it was trained on" in caplog.text
        caplog.clear()
    launch(compose(*on(place, "x", "stage=finetune", "epochs=1", *source, f"dir={tmp_path}/tuned")))
    with pytest.raises(UserError, match="has learnt from the labels"):  # that much is
        launch(
            compose(
                *on(
                    place, "x", "stage=knn", f"pretrained={tmp_path}/tuned", f"dir={tmp_path}/again"
                )
            )
        )
    launch(compose(*on(place, "x", *source, "stage=lincls", "epochs=1", f"dir={tmp_path}/probed")))
    assert seen_by(str(tmp_path / "probed")) == _labels.Labels(known=False)
    assert seen_by(None) == _labels.Labels()


@pytest.mark.parametrize(
    "text",
    ["[1]", '{"seen": 3, "known": true}', '{"seen": [1], "known": true}', '{"known": true}', "{"],
)
def test_a_damaged_file(place: Path, tmp_path: Path, text: str) -> None:
    run = shutil.copytree(place / "simsiam", tmp_path / "simsiam")
    (run / _labels.FILE).write_text(text)
    with pytest.raises(UserError, match="SHA256SUMS"):  # a finished run is sealed
        seen_by(str(run))
    (run / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"in our words|is damaged"):
        seen_by(str(run))


def test_no_judges_where_all_labels_are_learnt(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ssl_bench")
    common = [*SMALL, "data=dl21", f"data.root={place}/data", "epochs=1", "eval_every=1"]
    result = launch(
        compose(*common, "stage=pretrain", "method=supervised", f"dir={tmp_path}/supervised")
    )
    assert not {"knn_top1", "probe_top1"} & result.keys()
    assert (
        "method=supervised learns from all labels of the train split: none are left to judge by"
        in caplog.text
    )
    assert "knn_top1" in json.loads((place / "simsiam" / "summary.json").read_text())


def test_a_pipeline_is_refused_before_it_pretrains(place: Path, tmp_path: Path) -> None:
    words = [
        *SMALL,
        "data=dl21",
        f"data.root={place}/data",
        "epochs=1",
        f"dir={tmp_path}/run",
        "stage=pipeline",
    ]
    for protocol in (["stage.features=cached"], ["stage.features=cached", *ONE_CELL]):
        command = [
            *words,
            "method=supervised",
            f"stage.protocol={json.dumps([*protocol, 'epochs=1', 'batch_size=8'])}",
        ]
        if ONE_CELL[0] in protocol:
            assert "pretrained top-1" in run_pipeline(command)
        else:
            with pytest.raises(UserError, match="has learnt from the labels of data=dl21"):
                run_pipeline(command)
            assert not (tmp_path / "run").exists()


def run_pipeline(command: list[str]) -> dict[str, float]:
    import hydra

    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        return launch(hydra.compose("config", command))


def test_every_method_is_known_to_learn_from_labels_or_not() -> None:
    """By what it computes: without labels it can't."""
    for choice in [choice for group, choice in CHOICES if group == "method"]:
        node = compose(f"method={choice}", *NEEDED.get(choice, [])).method
        method: type[Method] = build.locate(node._target_, "method")
        assert learns_labels(node) == (choice == "supervised") == (method.split == "train")


@pytest.mark.parametrize("command", [[*CACHED, *ONE_CELL], ONE_KNN], ids=["cached", "knn"])
def test_a_share_that_nothing_is_held_out_for(
    place: Path, tmp_path: Path, command: list[str]
) -> None:
    with pytest.raises(
        UserError, match=r"stage.holdout=0.3 would be ignored: one cell leaves nothing to choose"
    ):
        launch(compose(*on(place, "simsiam", *command, "stage.holdout=0.3", f"dir={tmp_path}/run")))
