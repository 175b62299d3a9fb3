"""Nothing typed is ignored: a stage declares what it reads, reads what it declares, and the rest is
refused.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import hydra
import pytest
from commands import CHOICES, plain
from conftest import Command
from omegaconf import OmegaConf

import ssl_bench
from ssl_bench.command import refuse_in_vain
from ssl_bench.config import build, signatures, typed
from ssl_bench.errors import UserError
from ssl_bench.stages import PRETRAINED
from ssl_bench.stages.pipeline import SHARED, check_parts, evaluation

ROOT = Path(ssl_bench.__file__).parent
STAGES = [choice for group, choice in CHOICES if group == "stage"]
GROUPS = [group for group in build.SUPPLIED if group != "stage"]
KEYS = [key for key in [*build.Root.model_fields, *GROUPS] if key not in typed.ALWAYS]


def declared(stage: str) -> tuple[str, ...]:
    return typed.reads(f"ssl_bench.stages.{stage}.{stage}")


# --- what isn't declared is refused ---------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_each_key_is_read_or_refused(stage: str) -> None:
    config, reads = plain(f"stage={stage}") | {"pretrained": "RUN"}, declared(stage)
    taken = {
        *reads,
        *(
            {"zero_init_residual"} & {*(config.get("backbone") or {})}
            if "backbone" in reads
            else ()
        ),
    }
    for key in KEYS:
        said = typed.in_vain(config, [f"{key}=1", f"+{key}=1"])
        assert bool(said) != bool({key, f"{key}.name"} & taken), key
        assert all(f"stage={stage} doesn't read {key}; " in line for line in said.values())
        readers = [f"stage={name}" for name in STAGES if {key, f"{key}.name"} & {*declared(name)}]
        instead = f"it is for {', '.join(readers)}"
        if key == "dir" and "out" in config["stage"]:
            instead = "type stage.out=1"
        assert all(line.endswith(instead) for line in said.values() if readers)
    for group in GROUPS:
        assert bool(typed.in_vain(config, [f"{group}.some.key=1"])) == (group not in reads), group
    assert not typed.in_vain(config, [f"{key}=1" for key in reads if "." in key])
    assert not typed.in_vain(
        config, ["stage.any=1", "experiment=x", "launcher=slurm", "pretrained=null", "method=null"]
    )


def test_what_an_experiment_sets_is_not_typed() -> None:
    for group, choice in CHOICES:
        if group == "experiment":
            config = plain(f"experiment={choice}")
            assert not typed.in_vain(
                config, [f"experiment={choice}", "seed=1", "method.queue_size=16", "epochs=3"]
            )


@pytest.mark.parametrize(
    ("choices", "idle"),
    [
        (
            ["stage=pretrain", "method=random"],
            ["optimizer.base_lr=1", "schedule=cosine", "epochs=3", "batch_size=8"],
        ),
        (["stage=pipeline", "method=random"], ["optimizer=lars", "save_every=3"]),
        (["stage=pretrain", "stage.online_images=0"], ["eval_every=3"]),
        (["stage=pretrain", "eval_every=0"], ["stage.online_images=9"]),
        (["stage=pretrain", "backbone=vit_tiny"], ["zero_init_residual=true"]),
        (["stage=pretrain", "method=swav", "method.queue_length=0"], ["method.queue_start=3"]),
        (["stage=pretrain", "augmentation=moco_v2"], ["augmentation.small_size=32"]),
        (
            ["stage=select", "stage.strategy=random"],
            ["pretrained=x", "stage.dim=3", "augmentation.image_size=8"],
        ),
        (["stage=pretrain"], ["pretrained_prefix=teacher.backbone"]),
        (["stage=knn"], ["pretrained_prefix=teacher.backbone"]),
        (["stage=knn", "backbone=timm", "backbone.pretrained=true"], ["pretrained=x"]),
    ],
)
def test_what_another_key_makes_idle(choices: list[str], idle: list[str]) -> None:
    assert [*typed.in_vain(plain(*choices), idle)] == idle
    assert not typed.in_vain(
        plain(choices[0]), ["seed=3", *(["method.momentum=0.9"] if "pre" in choices[0] else [])]
    )


def test_what_is_switched_off_twice_is_off() -> None:
    """Neither makes a mistake of the other, nor of a method without judges."""
    off = ["eval_every=0", "stage.online_images=0"]
    assert not typed.in_vain(plain("stage=pretrain", *off), off)
    assert not typed.in_vain(plain("stage=pretrain", "method=supervised"), off)
    assert [*typed.in_vain(plain("stage=pretrain", "method=supervised"), ["eval_every=1"])] == [
        "eval_every=1"
    ]


def test_every_method_that_learns_nothing_is_named() -> None:
    for group, choice in CHOICES:
        if (
            group == "method"
            and not build.locate(plain(f"method={choice}")["method"]["_target_"], group).learns
        ):
            assert f"method.name={choice}" in signatures.constant(
                "ssl_bench.stages.pretrain.pretrain", "IDLE"
            )
            assert f"method.name={choice}" in signatures.constant(
                "ssl_bench.stages.pipeline.pipeline", "IDLE"
            )


def test_a_stage_of_ones_own_may_declare_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_open.py").write_text("import torch\n\n\ndef mine(cfg, run):\n    return {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not typed.in_vain(
        {"stage": {"name": "mine", "_target_": "mine_open.mine"}}, ["pretrained=x", "runs=y"]
    )


# --- sweeps and pipelines -------------------------------------------------------------------------


def test_members_of_a_sweep() -> None:
    """What all share is for one of them at least; what tells them apart is for each that has it."""

    def said(*members: list[str]) -> list[str]:
        return [
            line.partition(" ")[0]
            for line in typed.swept_in_vain([(plain(*m), m) for m in members])
        ]

    assert said(["stage=knn", "epochs=3"], ["stage=lincls", "epochs=3"]) == []
    assert said(["stage=knn", "epochs=3"], ["stage=predict", "epochs=3"]) == ["epochs=3"]
    assert said(["method=random", "epochs=3"], ["method=simclr", "epochs=3"]) == []
    assert said(["method=random", "epochs=3"], ["method=simclr", "epochs=4"]) == ["epochs=3"]
    assert said(["stage=knn", "runs=x", "seed=1"], ["stage=knn", "runs=x", "seed=2"]) == ["runs=x"]


@pytest.mark.parametrize(
    ("protocol", "row", "says"),
    [
        (
            ["runs=x"],
            [],
            "stage.rows, mine: runs=x would be ignored: stage=lincls doesn't read runs",
        ),
        (
            [],
            ["stage=knn", "optimizer.base_lr=3"],
            "stage.rows, mine: optimizer.base_lr=3 would be ignored: stage=knn",
        ),
        (["seed=3"], [], "stage.rows, mine: seed=3 would be ignored: stage.seeds says it"),
        (
            [],
            ["stage=knn", "dir=x"],
            "stage.rows, mine: dir=x would be ignored: the pipeline says it",
        ),
    ],
)
def test_rows_of_a_pipeline(protocol: list[str], row: list[str], says: str) -> None:
    with (
        hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"),
        pytest.raises(UserError) as error,
    ):
        evaluation(hydra.compose("config", ["stage=pipeline"]), "mine", protocol, row, 0)
    assert str(error.value).startswith(says)


def test_a_row_without_its_weights_is_told_before_a_pretraining(tmp_path: Path) -> None:
    """Those that the pipeline itself leaves need not be there."""
    words = ["stage=pipeline", "data=digits", f"dir={tmp_path}/run"]
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        check_parts(hydra.compose("config", words))
        cfg = hydra.compose("config", [*words, "+stage.rows.mine=['pretrained=nowhere.pth']"])
        with pytest.raises(UserError, match=r"^stage\.rows, mine: pretrained=nowhere\.pth: no"):
            check_parts(cfg)


def test_a_row_changes_single_keys_of_what_it_shares() -> None:
    """And not all of the group: its data would be the default's."""
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        cfg = hydra.compose(
            "config", ["stage=pipeline", "data=dl21", "data.root=/x", "backbone.width=8"]
        )
        changed = evaluation(
            cfg, "mine", ["data.extra_labels=[a.csv,a.pt]"], ["backbone.stem=small"], 0
        )
        other = evaluation(cfg, "mine", [], ["backbone=pixels"], 0)
        wrong = evaluation(cfg, "mine", [], ["data.extra_lables=[a.csv,a.pt]"], 0)
    assert changed.data == {**cfg.data, "extra_labels": ["a.csv", "a.pt"]}
    assert changed.backbone == {
        **OmegaConf.to_container(cfg.backbone, resolve=True),
        "stem": "small",
    }
    assert other.backbone.name == "pixels"
    with pytest.raises(
        UserError, match=r"data\.extra_lables: no such key; did you mean data\.extra_labels"
    ):
        build.check(wrong)


def test_the_command(ssl_bench: Command, tmp_path: Path) -> None:
    """Before any data is looked at: there is none."""
    for words, line in {
        "stage=synthesize pretrained=RUN stage.out=x": (
            "pretrained=RUN would be ignored: stage=synthesize"
        ),
        "method=random pretrained=RUN data=dl21 data.root=none": (
            "pretrained=RUN would be ignored: stage=pretrain with method=random"
        ),
        "+runs=x data=dl21 data.root=none": (
            "+runs=x would be ignored: stage=pretrain doesn't read runs; it is for"
        ),
        "-m stage=knn data=dl21 data.root=none seed=1,2 stage.k=[1] epochs=7": (
            "epochs=7 would be ignored: stage=knn"
        ),
        "-m stage=lincls data=dl21 data.root=none method=glob(moco_v1)": (
            "method=moco_v1 would be ignored: stage="
        ),
        "sweep=x data=dl21 data.root=none": "sweep=x names a sweep, and this is one run: add -m",
    }.items():
        result = ssl_bench(*words.split())
        assert result.returncode == 2
        assert line in result.stderr
        assert "Traceback" not in result.stderr
    assert not [*tmp_path.iterdir()]


def test_a_sweep_is_refused_once() -> None:
    """Not first as ignored, and then as for -m, which this stage refuses, too."""
    with pytest.raises(UserError) as caught:
        refuse_in_vain(OmegaConf.create(plain("stage=board", "runs=x")), ["sweep=x"])
    assert str(caught.value).startswith("sweep=x would be ignored: stage=board doesn't read sweep")
    assert "-m" not in str(caught.value)


# --- what is declared is read ---------------------------------------------------------------------


@cache
def module(name: str) -> dict[str, ast.AST]:
    """{name: definition} of a module of ours."""
    body = ast.parse(
        (ROOT / f"{name.removeprefix('ssl_bench.').replace('.', '/')}.py").read_text()
    ).body
    found: dict[str, ast.AST] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssl_bench"):
            found |= {alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def texts(expression: ast.AST, home: str) -> Iterator[str]:
    """The strings in it, and in the constant that it names."""
    if isinstance(expression, ast.Name) and isinstance(module(home).get(expression.id), ast.Tuple):
        expression = module(home)[expression.id]
    yield from (
        n.value
        for n in ast.walk(expression)
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )


def of_cfg(node: ast.AST, function: ast.FunctionDef, home: str) -> list[str] | None:
    """["data.root"] of `cfg.data.root`, `cfg["data"]`, `cfg.get("data")`, `cfg[key] for key in
    (...)`.
    """
    if (
        isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.In)
        and isinstance(node.left, ast.Constant)
    ):
        base, key = node.comparators[0], node.left
        return (
            of_cfg(ast.Subscript(base, key), function, home)
            if isinstance(base, ast.Attribute)
            else None
        )
    if isinstance(node, ast.Name):
        return [""] if node.id == "cfg" else None
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
    ):
        base, key = node.func.value, node.args[0]
    elif isinstance(node, ast.Subscript):
        base, key = node.value, node.slice
    elif isinstance(node, ast.Attribute):
        base, key = node.value, ast.Constant(node.attr)
    else:
        return None
    if (parents := of_cfg(base, function, home)) is None:
        return None
    if isinstance(key, ast.Constant):
        names = [key.value]
    else:
        loops = [n for n in ast.walk(function) if isinstance(n, ast.For | ast.comprehension)]
        names = [
            t
            for loop in loops
            if ast.unparse(key) in ast.unparse(loop.target)
            for t in texts(loop.iter, home)
        ]
    return [f"{parent}.{name}".lstrip(".") for parent in parents for name in names if name != "get"]


def scan(name: str, home: str, seen: set[tuple[str, str]]) -> set[str]:
    """The keys of `cfg` that a function reads, and those that it passes `cfg` or `run` to."""
    function = module(home).get(name)
    if isinstance(function, ast.ImportFrom):
        return scan(name, function.module, seen)
    if not isinstance(function, ast.FunctionDef) or (home, name) in seen:
        return set()
    seen.add((home, name))
    read, inner = set(), set()
    for node in ast.walk(function):
        if (keys := of_cfg(node, function, home)) and node not in inner:
            read |= set(keys)
            inner |= set(ast.walk(node)) - {node}  # of cfg.data.root not cfg.data
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "run.device":
            read.add("device")
        if isinstance(node, ast.Call):
            given = {
                ast.unparse(value)
                for value in [*node.args, *(keyword.value for keyword in node.keywords)]
            }
            if isinstance(node.func, ast.Name) and given & {"cfg", "run"}:
                read |= scan(node.func.id, home, seen)
            if ast.unparse(node.func) == "run.every":
                read.add(f"{node.args[0].value}_every")
                if node.args[0].value == "save":
                    read.add("keep")  # by the run, which saves
    return read - {""}


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_declared_is_what_is_read(stage: str) -> None:
    home = f"ssl_bench.stages.{stage}"
    read = {
        key
        for key in scan(stage, home, set())
        if key.partition(".")[0] not in ("stage", "zero_init_residual")
    }
    read = {key for key in read if not (key.partition(".")[0] in read and "." in key)}
    function = build.locate(f"{home}.{stage}", "stage")
    leaves_a_run = plain(f"stage={stage}")["dir"] is not None
    if leaves_a_run:  # these are read by launch, run, tracking, sweep and results
        read |= {"dir", "sweep", "metric", "tracking", "device", "seed"}
    if leaves_a_run and not getattr(function, "single_process", False):
        read.add("devices")
    if plain(f"stage={stage}").get("method") is None:
        read -= {"method"}  # then it is asked for in vain
    if stage == "average":
        read -= {"seed"}  # a mean draws nothing
    if stage == "choose":
        read -= {"batch_size"}  # each run's own
    if stage == "pretrain":
        read |= {"patience", "save_best", "until"}  # by the run, which the loop asks
    if stage == "report":
        read -= {"seed"}  # passed on to a source, which is read in order
    ours = set(declared(stage))
    if stage == "pipeline":
        # it is one, from scratch, and then others
        assert {*ours, *PRETRAINED, "continue_from", "until"} == set(declared("pretrain"))
        assert set(SHARED) <= ours | {"zero_init_residual"}
        return
    wholes, parts = ({key for key in ours if ("." in key) is dotted} for dotted in (False, True))
    assert wholes == {key.partition(".")[0] for key in read} - {
        key.partition(".")[0] for key in parts
    }
    looked_at = {"augmentation.num_small_views", "augmentation.small_size"}  # by check_sizes
    assert {key for key in read if key.partition(".")[0] not in wholes} - looked_at <= parts
    assert parts <= read | {f"{group}.name" for group in GROUPS}
