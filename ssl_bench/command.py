"""`ssl-bench`, the one command: composes the configuration, checks it, hands it to its stage."""

import errno
import logging
import os
import re
import select
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssl_bench import __version__, doctor
from ssl_bench.config import build, manual, messages, typed
from ssl_bench.errors import Interrupted, UserError, told_if_full
from ssl_bench.launch import resolvers
from ssl_bench.launch.composing import Composer, without_hydra
from ssl_bench.launch.continuing import checked, with_choices
from ssl_bench.launch.expanded import with_members
from ssl_bench.launch.process import launch, leave_fast, set_up_logging

log = logging.getLogger(__name__)

# Options of Hydra that are followed by a value. Not --info, whose value may be left out: it stays
# where it is.
LONG = ("--cfg", "--package", "--config-path", "--config-name", "--config-dir")
VALUED = (*LONG, "-c", "-p", "-cp", "-cn", "-cd")
# KEY=~/PATH: shells leave the ~ as it is, and Hydra can't parse it
HOME = re.compile(r"^([\w.+]+)=(~[\w./~-]*)$")
# a comma here makes a list, not a sweep
LIST = re.compile(r"^(data\.extra_labels|runs|stage\.drop|stage\.again)=([^\[].*,.*)$")

# Hydra's own keys that would do nothing here, and what to type instead.
HYDRA_IN_VAIN = {
    "hydra.run": "the directory of a run is dir=",
    "hydra.output_subdir": "the directory of a run has its configuration, config.yaml",
    "hydra.sweep.subdir": "a member's directory is named by what was typed; leave it out",
    "hydra.job.chdir": "a run stays in the folder that it was started from; leave it out",
    "hydra.job": "set variables in the shell, or on Slurm by hydra.launcher.setup",
    "hydra.job_logging": "the console has verbosity=, and each run its log.txt",
    "hydra.hydra_logging": "the console has verbosity=, and each run its log.txt",
}
# and those that are for sweeps alone
HYDRA_SWEEPS = dict.fromkeys(("hydra.sweep", "hydra.sweeper"), "this is one run: add -m")


def register_launchers() -> None:
    """Register our launchers: Hydra can't list the folders of an editable install to find them."""
    plugins = Plugins.instance()  # it searches, and would load again what was imported before
    from hydra_plugins.ssl_bench_launchers import Local, Slurm, Workstation

    for launcher in (Local, Workstation, Slurm):
        plugins.register(launcher)


register_launchers()
resolvers.register()


@dataclass(frozen=True)
class Result:
    """What a command leaves: its directory (None: it leaves none), and what its stage returned."""

    directory: Path | None
    metrics: dict[str, float]

    def __fspath__(self) -> str:
        if self.directory is None:
            raise UserError("this command leaves no directory")
        return str(self.directory)

    def __str__(self) -> str:
        """As f"pretrained={run}" takes it."""
        return repr(self) if self.directory is None else str(self.directory)


class Mistake(SystemExit):
    """A user's mistake on its way through Hydra. Its status is 2, and `main` prints its line.

    It is no Exception: Hydra only warns of one in a callback, and prints one of a run.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(2)
        self.line = messages.message(error, sys.argv[1:])


_command_line: list[str] = []  # that was typed, while sys.argv may have it in other words
_results: list[Result] = []  # what `run` returned: Hydra keeps it to itself


@hydra.main(version_base="1.3", config_path="pkg://ssl_bench.conf", config_name="config")
def run(cfg: DictConfig) -> float | None:
    """One run.

    Our launchers run the members of a sweep themselves; other launchers call this.
    """
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    words = [] if is_sweep else _typed(HydraConfig.get().overrides.task)
    try:
        cfg = checked(cfg, _typed(HydraConfig.get().overrides.task), typed.quoted(words))
        refuse_in_vain(cfg, words)
        metrics = launch(cfg)
    except BrokenPipeError:
        _end_if_nobody_reads()  # here and not in `main` alone: Hydra would print the error
        raise
    except UserError as error:
        if is_sweep:
            raise  # Hydra says which member it was, and goes on with the others
        fail(error)
    directory = None if cfg.dir is None else Path(cfg.dir).expanduser()
    _results[:] = [Result(directory, metrics)]
    return metrics.get(cfg.metric)


def _typed(overrides: ListConfig) -> list[str]:
    """Overrides as they were typed: OmegaConf would resolve the ${...} in its own list."""
    return OmegaConf.to_container(overrides)


def refuse_in_vain(cfg: DictConfig, overrides: list[str]) -> None:
    """UserError for overrides of one run that would be ignored."""
    lines = typed.in_vain(OmegaConf.to_container(cfg), overrides)
    for word in overrides:
        if word.startswith("sweep="):
            lines.setdefault(word, f"{word} names a sweep, and this is one run: add -m")
    if lines:
        raise UserError("\n".join(lines.values()))


def hydra_in_vain(config: DictConfig, is_sweep: bool) -> str:
    """A line for each override of Hydra's own keys that would be ignored; "": there are none.

    config: the whole configuration.
    """
    vain, lines = HYDRA_IN_VAIN | ({} if is_sweep else HYDRA_SWEEPS), []
    for word in _typed(config.hydra.overrides.hydra):
        key = typed.key_of(word).replace("/", ".")
        if key.startswith("hydra.job.env_set") and not is_sweep:
            continue  # Hydra does that
        why = next((why for start, why in vain.items() if f"{key}.".startswith(f"{start}.")), "")
        lines += [f"{word} would be ignored: {why}"] if why else []
    return "\n".join(lines)


def fail(error: Exception) -> NoReturn:
    raise Mistake(error)


class Check(Callback):
    """Checks every member of a sweep before the first one starts."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        if ignored := hydra_in_vain(config, is_sweep=False):
            fail(UserError(ignored))
        if not config.hydra.launcher._target_.endswith("launchers.Local"):
            fail(
                UserError(
                    "hydra/launcher is for sweeps, and would be ignored here: "
                    "add -m, or choose a launcher="
                )
            )

    def on_multirun_start(
        self, config: DictConfig, config_name: str | None = None, **_: Any
    ) -> None:
        try:
            self._check_sweep(config, config_name)
        except Exception as error:
            if isinstance(error, UserError | HydraException | OmegaConfBaseException):
                fail(error)
            # Hydra would only warn, and start members that weren't checked
            traceback.print_exc()
            sys.exit(1)

    def _check_sweep(self, config: DictConfig, config_name: str | None) -> None:
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        if ignored := hydra_in_vain(config, is_sweep=True):
            raise UserError(ignored)
        for key in ("sweeper", "launcher"):
            if not OmegaConf.is_dict(chosen := config.hydra[key]):
                raise UserError(f"hydra.{key}={chosen} is none: choose one by hydra/{key}=NAME")
        Composer.install(GlobalHydra.instance().hydra.config_loader)
        task = _typed(config.hydra.overrides.task)
        # a search chooses its members while it runs: check what they have in common
        if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
            own = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
            if lines := typed.in_vain(OmegaConf.to_container(own), task):
                raise UserError("\n".join(lines.values()))
            return
        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        overrides = messages.parsed([*params, *task])
        for override in overrides:
            if override.is_interval_sweep():
                raise UserError(f"{override.input_line}: {messages.SEARCH}")
        for override in overrides:
            if messages.first_value(override) is None:
                word = override.input_line
                raise UserError(f"{word}: there is no such value, and so no member of the sweep")
        composed, quoted = [], typed.quoted([*params, *task])
        (members,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        if len(members) > 100:
            log.info("checking %s members before any starts", f"{len(members):,}")
        hydras = GlobalHydra.instance().hydra

        def composed_of(words: Sequence[str]) -> DictConfig:
            options: dict[str, Any] = {"with_log_configuration": False}
            return hydras.compose_config(config_name, [*words], RunMode.RUN, **options)

        lacking = []
        wrong: dict[str, list[str]] = {}  # members by what is wrong with them
        for member in members:
            try:
                cfg = composed_of(member)
                cfg = checked(without_hydra(cfg), member, quoted)
                composed.append((OmegaConf.to_container(cfg), list(member)))
            except (UserError, HydraException, OmegaConfBaseException) as error:
                wrong.setdefault(messages.message(error), []).append(" ".join(member))
                if messages.lacking(error, member):
                    lacking.append(member)
        problems = [
            f"{words[0] if len(words) == 1 else f'{len(words)} members, like {words[0]}'}: {line}"
            for line, words in wrong.items()
        ]
        if lacking and len(lacking) == sum(map(len, wrong.values())):
            known = [(one, _lacks(one, composed_of) if one in lacking else []) for one in members]
            if told := messages.by_choice(_command_line, known):
                problems = [told]
        if not problems:
            problems = typed.swept_in_vain(composed)
        if problems:
            raise UserError("\n".join(["nothing was started.", *problems]))


def _lacks(words: Sequence[str], compose: Callable[[Sequence[str]], object]) -> list[str]:
    """The keys among overrides of a member that its choices don't have."""
    found: list[str] = []
    while True:
        left = [word for word in words if typed.key_of(word) not in found]
        try:
            compose(left)
        except HydraException as error:
            if not (keys := messages.lacking(error, left)):
                return found
            found += keys
        else:
            return found


def main() -> None:
    """Console entry. A user's mistake is one line and exit code 2; a bug keeps its traceback."""
    leave_fast()
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    set_up_logging(quiet=rank != "0")  # one process speaks for all
    try:
        if "--version" in sys.argv[1:]:
            print(f"ssl-bench {__version__}")
        elif sys.argv[1:] == ["doctor"]:
            doctor.show()  # not as a stage alone, which needs a torch that can be imported
        else:
            execute(sys.argv[1:])
        sys.stdout.flush()  # a reader that has left is noticed here, and not after the last line
    except Mistake as mistake:
        print(f"ssl-bench: {mistake.line}", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno == errno.EPIPE:
            _end_if_nobody_reads()
        raise
    except Interrupted as stop:
        print(f"ssl-bench: {stop}; the same command continues", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)


def execute(words: Sequence[str]) -> Result | None:
    """Do what the words say, as they are typed after `ssl-bench`. Mistake.

    They become those of sys.argv, which Hydra reads. None: it was no single run.
    """
    see_own_modules()
    if not words:
        print(
            "ssl-bench, with nothing typed, is ssl-bench experiment=quickstart; "
            "all else: ssl-bench --help"
        )
        words = ["experiment=quickstart"]
    if mistaken := _no_option(words) or messages.no_name(words):
        fail(UserError(mistaken))
    parser = get_args_parser()
    # one line in place of argparse's page of usage
    parser.error = lambda message: fail(UserError(f"{message}; ssl-bench --help shows all"))
    try:
        if told := _page(parser.parse_args(_options_first(words))):
            print(told)
            return None
        words = with_members(with_choices(words))
    except UserError as error:
        fail(error)
    words = [HOME.sub(r'\1="\2"', LIST.sub(r"\1=[\2]", word)) for word in words]
    sys.argv[1:] = _command_line[:] = _options_first(words)
    typed_words = parser.parse_args()
    if typed_words.cfg and any(word.startswith("continue_from=") for word in typed_words.overrides):
        print(
            "ssl-bench: what isn't typed will be as the run to go on from has it", file=sys.stderr
        )
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra then lets exceptions through, for us to put in words
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _results.clear()
    try:
        with told_if_full():
            while True:
                try:
                    run()
                    break
                except HydraException as error:
                    if not (later := messages.by_member(error, sys.argv[1:])):
                        raise
                    sys.argv[1:] = later
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if wants_trace:
            raise
        fail(error)
    except Exception as error:
        own = [word for word in words if re.match(r"[+~]*hydra\b", word)]
        if own and not wants_trace and _is_hydras(error):
            why = (str(error).splitlines() or [type(error).__name__])[0]
            fail(UserError(f"{' '.join(own)}: Hydra can't use that: {why}"))
        raise
    return _results.pop() if _results else None


def _page(typed_words: Namespace) -> str:
    """What --help says of the choices and keys that stand beside it; "": it isn't asked."""
    if not typed_words.help:
        return ""
    folder = typed_words.config_dir
    return manual.page(typed_words.overrides, Path(folder) if folder else None)


def _is_hydras(error: Exception) -> bool:
    """Whether it is from Hydra, which none of our own code was called by."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    below = files[files.index(Path(hydra.main.__code__.co_filename)) :]
    return not any(file.is_relative_to(Path(__file__).parent) for file in below)


def see_own_modules() -> None:
    """The modules of the current folder can be imported; none of them replaces another."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _end_if_nobody_reads() -> None:
    """Exit if the reader of stdout, such as `head`, has seen enough and has closed it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # poll reports errors without being asked for them
    if poll.poll(0):
        # what is flushed at exit must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _no_option(words: Sequence[str]) -> str:
    """A line about the first word with dashes that is no option, and perhaps a key; "": none is."""
    known = {name for action in get_args_parser()._actions for name in action.option_strings}
    known.discard("--experimental-rerun")
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        name, mark, value = word.partition("=")
        if not word.startswith("-") or name in known:
            continue
        key = name.lstrip("-").replace("-", "_")
        if not mark:
            value = "true" if following.startswith("-") or "=" in following else following
        if key.partition(".")[0] in {*build.Root.model_fields, *build.SUPPLIED, *typed.ALWAYS}:
            return f"{word}: keys have no dashes: type {key}={value}"
        return (
            f"{word}: no such option, and keys have no dashes: KEY=VALUE; "
            "ssl-bench --help shows them"
        )
    return ""


def _options_first(words: Sequence[str]) -> list[str]:
    """The words with options before overrides, as argparse wants them.

    -m is left out beside --cfg: Hydra takes only one of the two.
    """
    options, overrides, rest = [], [], iter(words)
    for word in rest:
        if not word.startswith("-") or word in ("--info", "-i"):
            overrides.append(word)
        else:
            options += [word, *islice(rest, word in VALUED)]
    shows = any(re.match(r"(--cfg|-c)(=|$)", word) for word in options)
    return [word for word in options if not (shows and word in ("-m", "--multirun"))] + overrides
