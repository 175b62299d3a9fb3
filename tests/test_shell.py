"""Names of people's folders and files in lines that shells read."""

import os
import shlex
import subprocess
from pathlib import Path
from unittest.mock import patch

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hydra_plugins.ssl_bench_launchers import Slurm
from ssl_bench.config import typed
from ssl_bench.errors import UserError
from ssl_bench.launch.slurm import _checked
from ssl_bench.runs import sweep
from ssl_bench.shell import VARIABLE, override, quoted

NASTY = [
    "r9 with space",
    "-rf",
    "$HOME",
    "`id`",
    "$(id)",
    "a\nb",
    "it's",
    'a"b',
    "a;b",
    "a\\",
    "~",
    "#a",
    "*",
    "${HOME}",
]
texts = st.text(st.sampled_from("ab-~ '\"\\$`;&|<>(){}[]*?!#=,:\n\té"), min_size=1, max_size=12)
words = st.sampled_from(NASTY) | texts
names = words.filter(
    lambda text: not VARIABLE.search(text)
)  # in what a launcher copies and starts, $NAME is a variable
folders = words.filter(lambda text: not set("\\\n") & set(text))  # these are refused


def test_a_word_of_a_shell() -> None:
    given = [*NASTY, "", "$", "$1", "a$"]
    lines = "\n".join(f"printf '%s\\0' {quoted(word)}" for word in given)
    said = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True).stdout
    assert said.split("\0")[:-1] == given


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("$SOME/x y", "a b/x y"),
        ("x ${SOME}y;", "x a by;"),
        ("${NONE:-/tmp}/x", "/tmp/x"),
        ("$(id)`id`$1$$", "$(id)`id`$1$$"),
        ('it\'s "$SOME" \\$', 'it\'s "a b" \\$'),
        ("image.sif", "image.sif"),
        ("", ""),
    ],
)
def test_variables_are_all_that_is_not_literal(word: str, said: str) -> None:
    line = f"printf '%s\\0' {quoted(word, variables=True)}"
    env = os.environ | {"SOME": "a b"}
    assert (
        subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True).stdout
        == said + "\0"
    )


@settings(max_examples=300)
# that is OmegaConf's mark of what isn't there, in quotes, too
@given(texts.filter(lambda text: text != "???"))
@example("\\${a}")
@example("a b/seed0")
def test_an_override_that_is_advised_means_what_it_says(value: str) -> None:
    (word,) = shlex.split(override("runs", value))
    parsed = OverridesParser.create().parse_override(word)
    assert OmegaConf.create({parsed.key_or_group: parsed.value()}).runs == value


@settings(max_examples=300)
@given(texts.filter(lambda text: "${" not in text))  # which stays an interpolation
@example("a\\\n")
def test_a_text_that_looks_like_something_else_is_quoted_as_it_is(value: str) -> None:
    parsed = OverridesParser.create().parse_override(f"runs={typed.quote(value)}")
    assert parsed.value() == value


# A Slurm of shell scripts: srun tells what it was given, runs what copies files, and asks to be
# requeued.
PROGRAMS = {
    "sbatch": 'cp "$1" "$SPIED/script"; echo Submitted batch job 7',
    "srun": 'printf "%s\\0" "$@" > "$SPIED/srun"\n'
    "while [[ $1 == --* ]]; do shift; done\n"
    '[ "$1" = bash ] && exec "$@"\n'
    ': > "$SSL_BENCH_REQUEUE"',
    "squeue": "echo RUNNING",
    "scontrol": 'echo "$@" >> "$SPIED/scontrol"',
    "sleep": ":",
}


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a batch script there."""
    folder = tmp_path_factory.mktemp("bin")
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SPIED": str(folder / "spied"),
        "SOME": "a b",
    }
    return {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), **job}


@pytest.fixture(scope="module")
def choice() -> dict:
    """launcher=slurm as it is composed."""
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        node = hydra.compose("config", ["launcher=slurm"], return_hydra_config=True).hydra.launcher
    return {
        key: value for key, value in OmegaConf.to_container(node).items() if key != "_target_"
    } | {"wait": False}


def submit(choice: dict, work: Path, **keys: object) -> None:
    """A sweep of one member in work/sweep, by way of submitit."""
    own = {"submitit_folder": f"{work}/sweep/.submitit/%j", "name": "sweep"} | keys
    options = OmegaConf.create(own.pop("additional_parameters", {}))
    launcher = Slurm(**choice | {"additional_parameters": options} | own)
    launcher.config = OmegaConf.create({"hydra": {"sweeper": {"_target_": "BasicSweeper"}}})
    launcher._submit(
        [sweep.Member(work / "sweep" / "member.json", [], {"batch_size": 8}, str(work), "")], []
    )


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@settings(max_examples=30)
@given(
    folder=folders,
    data=names,
    node=names,
    word=words,
    python=st.none() | names,
    script=st.booleans(),
)
@example("r9 with space", "a b", "-n b", "$SOME/x", None, False)
@example("$(touch x)", "$(touch x)", "`touch x`", "$(touch x)", "$(touch x)", True)
def test_a_batch_script_means_the_names_that_it_is_given(
    env: dict[str, str],
    choice: dict,
    tmp_path_factory: pytest.TempPathFactory,
    folder: str,
    data: str,
    node: str,
    word: str,
    python: str | None,
    script: bool,
) -> None:
    """For each beginning of the folder's name there is something of the user's beside it, and
    stays.
    """
    root, spied = tmp_path_factory.mktemp("root"), Path(env["SPIED"])
    work = root / "work" / folder
    work.mkdir(parents=True)
    (root / "images").mkdir()
    (root / "images" / data).write_text("images\n")
    for end in range(1, len(folder)):
        if not (other := Path(f"{work.parent}/{folder[:end]}")).exists():
            other.write_text("mine\n") if end % 2 else other.mkdir()
    spied.mkdir(exist_ok=True)
    with patch.dict(os.environ, env):
        keys = {
            "name": folder,
            "container": ["run", word],
            "env_script": "source env.sh" if script else None,
        }
        keys |= {
            "stage_in": [f"{root}/images/{data}"],
            "stage_dir": f"{root}/node/{node}",
            "python": python,
        }
        submit(choice, work, **keys)
    before = below(root)
    for options in (["-n"], []):
        command = ["bash", *options, f"{spied}/script"]
        result = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")

    copy = root / "node" / node / data
    assert copy.read_text() == "images\n"
    assert below(root) == before | {copy, copy.parent, copy.parent.parent}  # the note, too, is gone
    assert (spied / "scontrol").read_text() == "requeue 7\n"
    (spied / "scontrol").unlink()
    given = (spied / "srun").read_text().split("\0")[:-1]
    program = python and python.replace("~", env["HOME"]) if python == "~" else python or "python"
    lines = [*_checked(["source env.sh"], "env_script"), f'exec {quoted(program)} "$0" "$@"']
    inside = ["/bin/bash", "-c", "\n".join(lines)] if script else [program]
    seen = VARIABLE.sub(lambda name: env.get(name[0].strip("${}"), ""), word)
    task = ["-u", "-m", "submitit.core._submit", f"{work}/sweep/.submitit/%j"]
    assert given[given.index("run") :] == ["run", seen, *inside, *task]


@pytest.mark.parametrize("name", ["50%", "a\\b", "a\nb"])
def test_a_folder_that_slurm_cannot_name(
    env: dict[str, str], choice: dict, tmp_path: Path, name: str
) -> None:
    with patch.dict(os.environ, env), pytest.raises(UserError, match="is in the sweep's folder"):
        submit(choice, tmp_path / name)


@pytest.mark.parametrize("where", ["partition", "additional_parameters"])
def test_an_option_of_two_lines(
    env: dict[str, str], choice: dict, tmp_path: Path, where: str
) -> None:
    """The second would be a command of the batch script."""
    text = "gpu\ntouch x"
    with patch.dict(os.environ, env), pytest.raises(UserError, match="has a line break"):
        submit(
            choice,
            tmp_path,
            **{where: {"comment": text} if where == "additional_parameters" else text},
        )
