"""Successive halving: who goes on, by which lines, and that a pause costs a member nothing."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from commands import complaint, member
from compared import assert_identical, final
from conftest import TINY_PRETRAIN, Command
from hypothesis import given
from hypothesis import strategies as st

from ssl_bench.errors import UserError
from ssl_bench.runs import halving, sweep
from ssl_bench.runs.halving import Halving, Ladder, Rules

RULES = Rules("knn_top1", 3, (1 / 9, 1 / 3))
SWEEP = ["-m", *TINY_PRETRAIN, "epochs=4", "eval_every=9", "sweep=few"]
HALVED = [f"{halving.KEY}.metric=knn_top1", f"{halving.KEY}.rungs=[0.25,0.5]"]


def climbed(values: list[float | None], eta: int = 3, slots: int = 1, seed: int = 0) -> Ladder:
    """All members climb, several at once, which come in any order; each has one value for ever."""
    ladder, draws = Ladder(eta, 2, smaller=False), random.Random(seed)
    waiting, running = list(range(len(values))), []
    while True:
        while len(running) < slots:
            if waiting:
                ladder.send(str(waiting.pop(0)), 0)
            elif found := ladder.promotable() or ladder.promotable(closing=not running):
                ladder.send(found[0], found[1] + 1)
            else:
                break
            running = list(ladder.open())
        if not running:
            return ladder
        name = draws.choice(running)
        ladder.arrive(name, ladder.sent[name], values[int(name)])
        running = list(ladder.open())


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=20),
    st.integers(2, 4),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_the_best_one_in_eta_go_on(values: list[int], eta: int, slots: int, seed: int) -> None:
    """Once all have come, none of these is still paused; somebody reaches the end, the best too."""
    ladder = climbed(values, eta, slots, seed)
    assert len(ladder.came[0]) == len(values)
    for rung in (0, 1):
        count = max(1, len(ladder.came[rung]) // eta)
        assert all(ladder.sent[name] > rung for name in ladder.best(rung)[:count])
    assert max(values) == max(values[int(name)] for name in ladder.came[2])
    assert len(ladder.came[2]) <= len(ladder.came[1]) <= len(values)


def test_what_is_no_number_goes_nowhere() -> None:
    ladder = climbed([float("nan"), None, 1.0, None, None, None])
    assert ladder.came[2] == {"2": 1.0}
    assert [name for name, rung in ladder.sent.items() if rung > 0] == ["2"]
    assert not climbed([None, None, None]).came[1]


def test_less_may_be_better() -> None:
    ladder = Ladder(2, 1, smaller=True)
    for name, value in {"a": 2.0, "b": 1.0, "c": 1.0}.items():
        ladder.send(name, 0)
        ladder.arrive(name, 0, value)
    assert ladder.best(0) == ["b", "c", "a"]  # of equals the first that came
    assert ladder.promotable() == ("b", 0)


# -- of members ------------------------------------------------------------------------------------


def members(folder: Path) -> list[sweep.Member]:
    words = [[f"optimizer.base_lr={n}", "epochs=9"] for n in range(6)]
    return [member(folder / "sweep", None, *some) for some in words]


def run(one: sweep.Member, fails: bool = False) -> None:
    """As a process would: it logs up to its `until`, and leaves a state."""
    (one.directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    (one.directory / "checkpoints" / "step0000000001.pt").touch()
    (one.directory / "config.yaml").write_text(yaml.safe_dump(one.config))
    until, rate = one.config["until"] or one.config["epochs"], one.config["optimizer"]["base_lr"]
    lines = [{"step": n, "epoch": float(n), "knn_top1": rate + n} for n in range(1, until + 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines[: -1 if fails else None])
    (one.directory / "metrics.jsonl").write_text(text)
    if until == one.config["epochs"] and not fails:
        (one.directory / "summary.json").write_text(json.dumps({"knn_top1": rate + until}))


def follow(folder: Path, count: int = 99, fails: str = "") -> Iterator[tuple[str, int | None]]:
    """What a launcher with one place does, up to so many members: (which rate, its `until`)."""
    plan = Halving(folder / "sweep", RULES, members(folder))
    for _ in range(count):
        if not (one := plan.next(())):
            return
        rate = one.overrides[0].partition("=")[2]
        yield rate, one.config["until"]
        run(one, fails=rate == fails)
        plan.ended(one)


def test_one_after_the_other(tmp_path: Path) -> None:
    """Two of six go on, the best first; at the end one of the two, whatever a third of them is."""
    told = list(follow(tmp_path))
    assert told == [*((str(n), 1) for n in range(6)), ("5", 3), ("4", 3), ("5", None)]
    by_name = {one.overrides[0][-1]: one for one in sweep.members(tmp_path / "sweep")}
    states = {rate: sweep.states([one])[0] for rate, one in by_name.items()}
    assert states["5"].name == "finished"
    assert states["4"] == ("paused", "after epoch 3 of 9")
    assert states["0"] == ("paused", "after epoch 1 of 9")
    lines = (tmp_path / "sweep" / halving.FILE).read_text().splitlines()
    assert len(lines) == 1 + 2 * len(told)
    assert json.loads(lines[-1])["value"] == 14.0


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_what_is_next_follows_from_the_lines(tmp_path: Path, count: int) -> None:
    """Whoever reads them, after a kill of the launcher in a member or between two."""
    whole = list(follow(tmp_path / "whole"))
    begun = list(follow(tmp_path / "parts", count))
    file = tmp_path / "parts" / "sweep" / halving.FILE
    file.write_text(file.read_text() + '{"member": "torn')
    rest = list(follow(tmp_path / "parts"))
    assert begun + rest == whole
    assert file.read_text() == (tmp_path / "whole" / "sweep" / halving.FILE).read_text()
    interrupted = follow(tmp_path / "killed")  # before its member has ended
    assert [next(interrupted) for _ in range(count)] == whole[:count]
    assert list(follow(tmp_path / "killed")) == whole[count - 1 :]


def test_members_that_run_already_are_followed(tmp_path: Path) -> None:
    """Of a launcher that was killed: what came meanwhile, and what is still under way. Whom the
    rules haven't sent is left alone.
    """
    plan = Halving(tmp_path / "sweep", RULES, members(tmp_path))
    first = plan.next(())
    second = plan.next({first.name})
    run(first)
    known = {one.name: one for one in members(tmp_path)}
    under_way = known.pop(second.name)
    *_, stranger = known
    other = known.pop(stranger)
    later = Halving(tmp_path / "sweep", RULES, [*known.values()], [under_way, other])
    assert (under_way.config["until"], other.config.get("until")) == (1, None)
    third = later.next({under_way.name, other.name})
    assert third.overrides[0] == "optimizer.base_lr=2"
    run(under_way)
    later.ended(under_way)
    later.ended(other)
    lines = (tmp_path / "sweep" / halving.FILE).read_text().splitlines()[1:]
    events = [json.loads(line) for line in lines]
    came = [event["member"] for event in events if "came_to" in event]
    assert came == [first.name, under_way.name]
    assert len(events) == 5  # each of the three was sent once


def test_a_member_that_finished_unwatched_has_come(tmp_path: Path) -> None:
    """At the top: it is no member to start any more, and counts all the same."""
    launcher = follow(tmp_path)
    *_, (rate, until) = (next(launcher) for _ in range(9))
    assert (rate, until) == ("5", None)
    launcher.close()  # killed, while its job goes on
    known = {one.name: one for one in members(tmp_path)}
    (name,) = (name for name, one in known.items() if one.overrides[0].endswith("=5"))
    launched = known.pop(name)
    launched.config["until"] = None
    run(launched)
    plan = Halving(tmp_path / "sweep", RULES, [*known.values()])
    assert plan.next(()) is None
    assert f"1 to rung 3 (the end); the best: {name}" in plan.summary()


def test_a_member_that_failed_is_tried_again_by_the_next_command(tmp_path: Path) -> None:
    assert list(follow(tmp_path, fails="5"))[-4:] == [("5", 1), ("4", 3), ("3", 3), ("4", None)]
    assert list(follow(tmp_path)) == [("5", 1), ("5", 3), ("5", None)]


def test_a_metric_that_nothing_logs(tmp_path: Path) -> None:
    """Nobody came to a rung by it, so that the sweep goes on by another one."""
    wrong = RULES._replace(metric="max:probe")
    plan = Halving(tmp_path / "sweep", wrong, members(tmp_path))
    plan.ended(plan.next(()))  # it failed before it logged anything
    run(second := plan.next(()))
    with pytest.raises(UserError, match=r"halving.metric=probe: nothing measures it: .*knn_top1"):
        plan.ended(second)
    assert [*follow(tmp_path)] == [*follow(tmp_path / "by the right one at once")]


def test_other_rules(tmp_path: Path) -> None:
    list(follow(tmp_path, 1))
    with pytest.raises(UserError, match=r"halved by other rules .*eta=3.*another sweep="):
        Halving(tmp_path / "sweep", RULES._replace(eta=2), members(tmp_path))
    (tmp_path / "sweep" / halving.FILE).write_text("[]\n")
    with pytest.raises(UserError, match=r"halving.jsonl is damaged: put it back, or delete it"):
        Halving(tmp_path / "sweep", RULES, members(tmp_path))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metric": "lr"}, "halving.metric=lr: it isn't known whether more or less of it is"),
        ({"eta": 1}, "halving.eta=1: one in eta goes on: type 2 or more"),
        ({"rungs": [0.5, 0.2]}, r"halving.rungs=\[0.5,0.2\]: shares of the epochs, ascending"),
        ({"rungs": [0.5, 1.0]}, "between 0 and 1"),
    ],
)
def test_rules_that_make_no_sense(changed: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Rules.of({"metric": "knn_top1", "eta": 3, "rungs": None} | changed)


def test_the_rungs_are_epochs() -> None:
    rules = Rules.of({"metric": "max:mine", "eta": 3, "rungs": None})
    assert rules is not None
    assert rules.epochs({"epochs": 90}) == [10, 30, 90]
    with pytest.raises(UserError, match="epochs=3 has no room for rungs after 1, 1, 3 epochs"):
        rules.epochs({"epochs": 3})
    assert Rules.of({"metric": None, "eta": 3, "rungs": None}) is None


def test_two_commands_do_not_decide_for_each_other(tmp_path: Path) -> None:
    with (
        halving.alone(tmp_path),
        pytest.raises(UserError, match="another command halves this sweep"),
        halving.alone(tmp_path, halves=False),
    ):
        pass
    with (
        halving.alone(tmp_path, halves=False),
        halving.alone(tmp_path, halves=False),
        pytest.raises(UserError, match="another command runs members of this sweep"),
        halving.alone(tmp_path),
    ):
        pass


# -- through the command ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=lincls", "method="], "it pauses pretrainings, and stage=lincls is none"),
        (["until=2"], "until=2 beside hydra.launcher.halving.metric=knn_top1, which says it"),
        (["eval_every=0"], "nothing measures it with eval_every=0"),
        (["epochs=2"], "epochs=2 has no room for rungs after 1, 1, 2 epochs"),
    ],
)
def test_what_cannot_be_halved(ssl_bench: Command, words: list[str], said: str) -> None:
    changed = tuple(word[: word.index("=")] for word in words)
    kept = [word for word in SWEEP if not word.startswith(changed)]
    words = [word for word in words if not word.endswith("=")]
    assert said in complaint(ssl_bench(*kept, "seed=0,1", *HALVED, *words))


@pytest.mark.slow
def test_a_command_without_rules_starts_nothing_beside_one_that_halves(
    ssl_bench: Command, tmp_path: Path
) -> None:
    """It would start those that wait at a rung, a second time or against the rules."""
    folder = tmp_path / "runs" / "sweeps" / "few"
    with halving.alone(folder):
        assert "another command halves this sweep" in complaint(ssl_bench(*SWEEP, "seed=0,1"))
    assert not sweep.members(folder)


@pytest.mark.slow
def test_a_member_that_paused_is_one_that_never_did(ssl_bench: Command, tmp_path: Path) -> None:
    """The best of three, here; the paused ones go on without halving."""
    result = ssl_bench(*SWEEP, "seed=0,1,2", *HALVED, check=True)
    folder = tmp_path / "runs" / "sweeps" / "few"
    assert "halving: of 3 members came 3 to rung 1, 1 to rung 2, 1 to rung 3" in result.stderr
    states = [state.name for state in sweep.states(sweep.members(folder))]
    assert sorted(states) == ["finished", "paused", "paused"]
    chosen = sweep.members(folder)[states.index("finished")]
    seed = chosen.config["seed"]
    ssl_bench(*SWEEP[1:-1], f"seed={seed}", "dir=whole", check=True)
    (state, _), (whole, _) = final(chosen.directory), final(tmp_path / "whole")
    for one in (state, whole):
        del one["run"]
    assert_identical(state, whole)
    assert any(isinstance(value, torch.Tensor) for value in state["model"].values())
    lines = (folder / halving.FILE).read_text()
    again = ssl_bench(*SWEEP[:-1], "sweep=again", "seed=0,1,2", *HALVED, check=True)
    assert again.returncode == 0
    assert (tmp_path / "runs/sweeps/again" / halving.FILE).read_text() == lines
    ssl_bench(*SWEEP, "seed=0,1,2", check=True)
    assert {state.name for state in sweep.states(sweep.members(folder))} == {"finished"}
