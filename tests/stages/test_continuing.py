"""continue_from=RUN: a training that goes on from the whole state of another one."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from commands import compose, interrupted
from compared import assert_identical, final
from conftest import TINY_PRETRAIN, Command
from omegaconf import OmegaConf

from ssl_bench.errors import UserError
from ssl_bench.launch.continuing import checked, continued, with_choices
from ssl_bench.launch.process import launch
from ssl_bench.runs import identity, record

SHORT = [*TINY_PRETRAIN, "schedule=constant", "eval_every=0"]


def run(*words: str) -> dict[str, float]:
    """What the command does with these words, in this process."""
    return launch(continued(compose(*words), words))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `short`, two epochs, and `long`, four, at a constant rate."""
    home = tmp_path_factory.mktemp("runs")
    for name, epochs in (("short", 2), ("long", 4)):
        run(*SHORT, f"epochs={epochs}", f"dir={home}/{name}")
    return home


def on(runs: Path, name: str, *words: str) -> dict[str, float]:
    source = (
        () if any("continue_from" in word for word in words) else (f"continue_from={runs}/short",)
    )
    always = ("stage=pretrain", "tracking=local", "log_every=1", "save_every=4", "eval_every=0")
    return run(*always, *source, f"dir={runs}/{name}", *words)


def test_extended_is_as_if_it_had_never_ended(runs: Path) -> None:
    on(runs, "extended", "epochs=4")
    extended, whole = final(runs / "extended"), final(runs / "long")
    extended[0].pop("run"), whole[0].pop("run")
    assert_identical(extended[0], whole[0])
    assert [line["step"] for line in extended[1]] == [20, *range(21, 41)]  # none is done twice
    assert extended[1][1:] == whole[1][20:]


@pytest.mark.slow
def test_a_longer_training_names_the_one_that_it_could_extend(
    ssl_bench: Command, tmp_path: Path
) -> None:
    """In the place that commands give them; of other settings or seeds nothing is said."""
    words = [*TINY_PRETRAIN, "eval_every=0", "schedule=constant"]
    ssl_bench(*words, "epochs=1", check=True)
    assert "extends it" not in ssl_bench(*words, "epochs=2", "ema=0.9", check=True).stderr
    said = ssl_bench(*words, "epochs=2", check=True).stderr
    (told,) = re.findall(r"(\S+) differs in epochs alone: continue_from=(\S+) extends it", said)
    assert told[0] == told[1]
    config = yaml.safe_load((tmp_path / told[0] / "config.yaml").read_text())
    assert (config["epochs"], config["seed"], config["ema"]) == (1, 0, None)


@pytest.mark.slow
def test_extended_through_a_kill(ssl_bench: Command, runs: Path, tmp_path: Path) -> None:
    command = ["stage=pretrain", f"continue_from={runs}/short", "epochs=4", "log_every=1"]
    command += ["save_every=4", "eval_every=0", "dir=killed"]
    interrupted(command, tmp_path, Path("killed"), 7, signal.SIGKILL)
    assert not (tmp_path / "killed" / "summary.json").exists()
    result = ssl_bench(*command, check=True)
    assert "going on from" not in result.stderr
    killed, whole = final(tmp_path / "killed"), final(runs / "long")
    killed[0].pop("run"), whole[0].pop("run")
    assert_identical(killed[0], whole[0])
    assert killed[1][1:] == whole[1][20:]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_extended_on_two_processes(ssl_bench: Command, runs: Path, tmp_path: Path) -> None:
    """Batch norm saw eight parts on one process, and sees four on each of two.

    The sums of two processes are rounded otherwise, by 1e-7; a training doubles such a difference
    in each of its first steps, on any machine.
    """
    command = ["stage=pretrain", f"continue_from={runs}/short", "epochs=4", "log_every=1"]
    ssl_bench(*command, "eval_every=0", "devices=2", "dir=two", check=True)
    two, whole = final(tmp_path / "two")[1][1:], final(runs / "long")[1][20:]
    losses = [[line["loss"] for line in lines] for lines in (two, whole)]
    assert losses[0][:4] == pytest.approx(losses[1][:4], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_what_was_not_typed_is_as_it_was(runs: Path) -> None:
    words = (
        "stage=pretrain",
        f"continue_from={runs}/short",
        "epochs=4",
        "optimizer.base_lr=0.5",
        "augmentation=simclr",
    )
    made = continued(compose(*words), words)
    before = identity.config(runs / "short")
    assert made.backbone.width == 8
    assert made.batch_size == before["batch_size"] == 128
    assert made.method.queue_size == 1024
    assert made.optimizer.base_lr == 0.5
    assert made.optimizer.momentum == before["optimizer"]["momentum"]
    assert made.augmentation.name == "simclr"
    assert made.augmentation.image_size == before["augmentation"]["image_size"] == 16
    assert list(made.augmentation.mean) == before["augmentation"]["mean"]
    assert made.schedule.name == "constant"
    assert made.pretrained == f"{runs}/short/checkpoints/step0000000020.pt"


def test_a_typed_rate_holds(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A state dict of an optimizer has its settings, too: those of the run before don't win."""
    caplog.set_level("INFO", "ssl_bench")
    assert on(runs, "rate", "epochs=3", "optimizer.base_lr=0.5")["lr"] == 0.5 * 128 / 256
    said = "learning rate: was 0.015 at epoch 2, goes on at 0.25 there, ends at 0.25 at epoch 3"
    assert said in caplog.text


def test_cosine_stretched_and_anew(runs: Path) -> None:
    lines = {}
    for start in (0, 2):
        on(runs, f"from{start}", "epochs=4", "schedule=cosine", f"schedule.start_epoch={start}")
        lines[start] = final(runs / f"from{start}")[1]
    peak = 0.03 * 128 / 256
    assert lines[0][1]["lr"] == pytest.approx(peak / 2)  # at epoch 2 of 4
    assert lines[2][1]["lr"] == pytest.approx(peak)
    assert lines[0][11]["lr"] == pytest.approx(peak * 0.146447, rel=1e-4)
    assert lines[2][11]["lr"] == pytest.approx(peak / 2)


def test_a_branch_from_an_earlier_step_with_another_batch(runs: Path) -> None:
    file = runs / "short" / "checkpoints" / "step0000000016.pt"
    on(runs, "branch", f"continue_from={file}", "epochs=2", "batch_size=64", "augmentation=simclr")
    lines = final(runs / "branch")[1]
    assert [lines[0]["step"], lines[-1]["step"]] == [32, 40]  # of 20 in an epoch
    assert lines[0]["epoch"] == 1.6


def test_another_optimizer_begins_anew(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ssl_bench")
    on(runs, "adamw", "epochs=3", "optimizer=adamw")
    assert "another optimizer than that of" in caplog.text
    state = torch.load(runs / "adamw/checkpoints/step0000000030.pt", weights_only=True)
    assert {int(one["step"]) for one in state["optimizer"]["state"].values()} == {10}


def test_an_average_of_the_weights_goes_on_or_begins(runs: Path) -> None:
    on(runs, "averaged", "epochs=3", "ema=0.9")
    on(runs, "further", f"continue_from={runs}/averaged", "epochs=4")
    counts = [final(runs / name)[0]["ema"]["n_averaged"].item() for name in ("averaged", "further")]
    assert counts == [10, 20]


def test_a_key_of_the_method_that_the_run_had(runs: Path) -> None:
    """It is none of the default method's, against which the command alone would be composed."""
    home = runs / "swav"
    run(
        *(word for word in SHORT if "queue_size" not in word),
        *("method=swav", "method.queue_start=1", "method.queue_length=128", "epochs=2"),
        *("augmentation.small_size=8", f"dir={home}"),
    )
    typed = [f"continue_from={home}", "epochs=3", "method.queue_start=2", "stage=pretrain"]
    words = with_choices(typed)
    assert "method=swav" in words
    made = continued(compose(*words), words)
    assert (made.method.queue_start, made.method.queue_length) == (2, 128)
    again = [*typed, "method=swav"]  # to choose what it had leaves it as it was
    assert continued(compose(*again), again).method.queue_length == 128
    other = with_choices([*typed[:2], "stage=pretrain", "method=simclr"])
    assert not [word for word in other if word.startswith(("optimizer=", "augmentation="))]


def test_a_branch_keeps_the_size_of_its_images(runs: Path) -> None:
    """Which needn't be the size at which they are packed."""
    shutil.copytree(runs / "short", runs / "sized")
    (runs / "sized" / "SHA256SUMS").unlink()
    config = identity.config(runs / "sized")
    config["augmentation"] |= {"image_size": 24, "mean": [0.1, 0.2, 0.3]}
    (runs / "sized" / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["stage=pretrain", f"continue_from={runs}/sized", "epochs=4", "augmentation=simclr"]
    look = continued(compose(*words), words).augmentation
    assert (look.name, look.image_size, list(look.mean)) == ("simclr", 24, [0.1, 0.2, 0.3])
    words.append("augmentation.image_size=20")
    assert continued(compose(*words), words).augmentation.image_size == 20


@pytest.mark.parametrize(
    "group", ["stage", "method", "backbone", "data", "augmentation", "optimizer"]
)
def test_a_configuration_from_elsewhere_names_no_code(runs: Path, group: str) -> None:
    home = runs / f"planted-{group}"
    shutil.copytree(runs / "short", home)
    (home / "SHA256SUMS").unlink()
    config = identity.config(home)
    config[group]["_target_"] = "os.system"
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["stage=pretrain", f"continue_from={home}", "epochs=4"]
    if group == "stage":  # it is the command's own
        assert continued(compose(*words), words).stage._target_.startswith("ssl_bench.stages.")
        return
    with pytest.raises(UserError, match=rf"{group}\._target_=os.system is not ours"):
        continued(compose(*words), words)


def test_a_configuration_from_elsewhere_reads_no_environment(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = runs / "curious"
    shutil.copytree(runs / "short", home)
    (home / "SHA256SUMS").unlink()
    config = identity.config(home)
    monkeypatch.setenv("SECRET", "xyzzy")
    config["precision"] = config["stage"]["online_images"] = "${oc.env:SECRET}"
    config["augmentation"]["mean"] = config["method"]["dim"] = "${oc.env:SECRET}"
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    for more in ([], ["augmentation=simclr"]):
        words = ["stage=pretrain", f"continue_from={home}", "epochs=4", *more]
        made = OmegaConf.to_container(continued(compose(*words), words), resolve=True)
        assert "xyzzy" not in str(made)
        assert made["precision"] == "${oc.env:SECRET}"


def test_how_often_it_saves_is_as_it_was(runs: Path) -> None:
    words = ("stage=pretrain", f"continue_from={runs}/short", "epochs=4", "log_every=7")
    made = continued(compose(*words), words)
    assert (made.save_every, made.eval_every, made.log_every) == (4, 0, 7)


def test_a_run_whose_metrics_are_gone(runs: Path) -> None:
    shutil.copytree(runs / "short", runs / "bare")
    for name in ("metrics.jsonl", "SHA256SUMS"):
        (runs / "bare" / name).unlink()
    assert on(runs, "from_bare", f"continue_from={runs}/bare", "epochs=3")["epoch"] == 3


def test_a_damaged_state_names_the_one_before(runs: Path) -> None:
    shutil.copytree(runs / "short", runs / "damaged")
    (runs / "damaged" / "SHA256SUMS").unlink()
    os.truncate(runs / "damaged/checkpoints/step0000000020.pt", 1000)
    with pytest.raises(UserError) as caught:
        on(runs, "from_damaged", f"continue_from={runs}/damaged", "epochs=3")
    advised = re.search(r"continue_from=\S+$", str(caught.value))
    assert on(runs, "from_damaged", advised[0], "epochs=3")["epoch"] == 3


def test_its_lineage(runs: Path) -> None:
    on(runs, "line", "epochs=3")
    found = {ran.directory.name: ran for ran in record.find([runs])}
    ran = found["line"]
    assert ran.pretraining is found["short"]
    assert ran.identity.experiment["continue_from"] is True
    assert ran.identity.experiment["pretrained.epochs"] == 2
    assert ran.identity.title == "moco_v2-resnet18-digits-continued"
    assert not ran.identity.alike(found["long"].identity)
    seconds = sum(128 / line["images_per_second"] for line in ran.lines[1:])
    assert ran.values["hours"] == pytest.approx(seconds / 3600)  # without the run before
    origin = json.loads((runs / "line" / "origin.json").read_text())
    assert origin["run"]["config"]["epochs"] == 2


def test_the_same_command_is_finished(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = on(runs, "twice", "epochs=3")
    caplog.set_level("INFO", "ssl_bench")
    assert on(runs, "twice", "epochs=3") == result
    assert "is finished already" in caplog.text
    assert "too late for" not in caplog.text
    on(runs, "twice", "epochs=3", "save_best=loss", "keep=backbone")
    assert "), too late for save_best=loss keep=backbone; to run it again" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["epochs=2"], "has done 2 epochs, and epochs=2 is the total: type more, like epochs=4"),
        (["pretrained={}/short"], "pretrained= beside continue_from="),
        (["experiment=quickstart"], "experiment= beside continue_from="),
        (["continue_from={}"], "no run with a checkpoint"),
        (["epochs=4", "method.queue_size=512"], "its state isn't this method's: 1 tensors"),
        (["epochs=12", "method=simclr"], "or type pretrained= to begin with its backbone alone"),
        (["stage=lincls"], "a run of stage=pretrain; stage=lincls goes on from its own kind alone"),
        (["epochs=4", "schedule.start_epoch=4"], "schedule.start_epoch=4 isn't reached"),
        (["epochs=4", "schedule.start_epoch=2", "schedule.warmup_epochs=2"], "isn't reached from"),
        (["epochs=4", "continue_from=null", "schedule.start_epoch=1"], "add continue_from=RUN"),
    ],
)
def test_mistakes(runs: Path, words: list[str], said: str) -> None:
    typed = ["stage=pretrain", f"continue_from={runs}/short", f"dir={runs}/wrong"]
    typed += [word.replace("{}", str(runs)) for word in words]

    def command() -> None:
        launch(checked(compose(*typed), typed, {}))

    with pytest.raises(UserError) as caught:
        command()
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (runs / "wrong").exists()


def test_another_method_is_told_before_its_settings(runs: Path) -> None:
    home = f"continue_from={runs}/short"
    for words, said in (
        (
            ["method=simclr"],
            [f"{home}: a run of method=moco_v2; method=simclr goes on", "schedule.w"],
        ),
        (["method=moco_v1", "method.dim=x"], ["method.dim=x: "]),
    ):
        typed = ["stage=pretrain", home, "epochs=4", *words]
        with pytest.raises(UserError) as caught:
            checked(compose(*typed), typed, {})
        lines = str(caught.value).splitlines()
        assert len(lines) == len(said)
        assert all(map(str.startswith, lines, said)), lines
