"""The networks in a file of weights: where in it the tensors of a backbone are.

One rule in place of a list of layouts. In the nested dictionaries of the file a set of tensors is
looked for whose names, less one common prefix, are the backbone's, in any of the spellings of
`names`. Classifiers, projections and queues may stand beside them; anything else there is another
network. Of several networks that fit, as a student and its teacher, `pretrained_prefix` or the
convention of the paper chooses.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.runs import names
from ssl_bench.runs.names import State

# First names of what stands beside a backbone and isn't part of its features.
BESIDE = re.compile(
    r"(?:\w+_)?(?:fc|heads?|classifiers?|linear|logits|last_linear|projections?|projectors?|proj|"
    r"predictors?|predictions?|prototypes?|queue|neck|pooler|n_averaged|(?:mask|masked)_\w+|"
    r"decoders?|logit_(?:scale|bias))"  # decoder_blocks: MAE (models_mae.py); logit_scale: CLIP
    r"(?:_\w+|\d+)?",
    re.IGNORECASE,
)
COUNTER = (
    "num_batches_tracked"  # of batch norm; older files have none, and no forward pass reads it
)
POSITIONS, CLASS_TOKEN = "pos_embed", "cls_token"  # in the common vocabulary


class Convention(NamedTuple):
    """Which of two networks of a method is meant, by the names in their prefixes."""

    whose: str
    chosen: str | None  # None: the one that has no name of `other`
    other: str | None  # None: all that have no name of `chosen`


PLAIN = "encoder"  # networks of no method are called so, too
CONVENTIONS = (
    Convention("the query encoder, as MoCo's authors do", "encoder_q", "encoder_k"),
    Convention("the teacher, as DINO's authors do", r"teacher\w*", r"student\w*"),
    Convention("the online network, as BYOL's authors do", r"online\w*", r"target\w*"),
    # I-JEPA (src/train.py), MSN (logistic_eval.py, linear_eval.py) and V-JEPA (checkpoint_key in
    # evals/) keep "encoder" beside "target_encoder", and their evaluations read the target's
    Convention("the target encoder, as I-JEPA's and MSN's authors do", "target_encoder", PLAIN),
    Convention("the base encoder, as MoCo v3's authors do", "base_encoder", "momentum_encoder"),
    Convention("the moving average", r"(?:\w+_)?ema(?:_\w+)?", None),
    Convention(
        "the trained network, not its moving copy",
        None,
        r"(?:momentum|target|key)(?:_\w+)?|\w+_(?:momentum|target|key)|encoder_k",
    ),
)


@dataclass
class Network:
    """Tensors of a file, one by one those of the backbone, and how they differ."""

    prefix: str  # what they have in common in the file, with the names of the dictionaries
    spelling: str  # whose names they have; "": the backbone's own
    tensors: State  # by the backbone's names
    beside: State  # the tensors below the prefix that are not the backbone's, less the prefix
    left_out: list[str]  # all other tensors of the dictionary that they are in
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    class_token: bool  # do the file and the backbone have one?
    wants_class_token: bool
    resized: str = ""  # the position embeddings that are to be interpolated; "": none
    others: list[str] = field(default_factory=list)  # prefixes of the same tensors

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.reshaped)

    @property
    def typed(self) -> str:
        """The prefix as one types it."""
        return self.prefix.rstrip(".") or "."

    @property
    def is_of_a_method(self) -> bool:
        """Is it one of a method's networks, whose `fc` is a projection?"""
        words = {word for one in CONVENTIONS for word in (one.chosen, one.other) if word}
        return any(self.has(word) for word in words - {PLAIN})

    @property
    def words(self) -> list[str]:
        return [word for prefix in (self.prefix, *self.others) for word in prefix.split(".")]

    def has(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, word) for word in self.words)


def search(
    content: Mapping, wanted: State, classifier: Iterable[str] = (), alone: bool = False
) -> list[Network]:
    """The networks of a file that a backbone fits, or else the one that is nearest to it.

    wanted: the backbone's tensors. classifier: how the names of its own classifier begin. alone:
    nothing may stand beside it. [] for a file in which no tensor has a name of the backbone's.
    """
    every: list[Network] = []
    fitting: list[Network] = []
    for table in spellings(content, wanted):
        if fitting and table.spelling != fitting[0].spelling:
            break
        every += table.networks(tuple(classifier), alone)
        fitting = [network for network in every if network.fits]
    if fitting:
        return _distinct(fitting)
    if not every:
        return []
    return [max(every, key=lambda one: (len(one.tensors) - len(one.reshaped), -len(one.prefix)))]


def choose(networks: Sequence[Network], typed: str | None) -> tuple[Network, str]:
    """(the network that is meant, why it is), of several that fit. UserError."""
    shown = ", ".join(network.typed for network in networks)
    if typed is not None:
        for network in networks:
            prefixes = {prefix.rstrip(".") or "." for prefix in (network.prefix, *network.others)}
            if typed in prefixes:
                return network, ""
        raise UserError(
            f"pretrained_prefix={typed}: no network of this backbone there; type {shown}"
        )
    if len(networks) == 1:
        return networks[0], ""
    for whose, chosen, other in CONVENTIONS:
        mine = [n for n in networks if (n.has(chosen) if chosen else not n.has(other or ""))]
        rest = [network for network in networks if network not in mine]
        if len(mine) == 1 and all(other is None or network.has(other) for network in rest):
            return mine[0], whose
    example = f"pretrained_prefix={networks[0].typed}"
    raise UserError(f"holds {len(networks)} networks that fit, {shown}: type {example}")


@dataclass
class Table:
    """A dictionary of tensors in a file, and the backbone's names in the same spelling."""

    path: str
    spelling: str
    tensors: State  # by their names in this spelling
    wanted: dict[str, tuple[str, Tensor]]  # {name: (the backbone's own, its tensor)}

    def networks(self, classifier: tuple[str, ...], alone: bool) -> Iterator[Network]:
        prefixes: dict[str, int] = {}
        for key in self.tensors:
            for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
                if key[start:] in self.wanted:
                    prefixes[key[:start]] = prefixes.get(key[:start], 0) + 1
        needed = {name for name in self.wanted if alone or not name.endswith(COUNTER)}
        whole = [p for p in prefixes if all(p + name in self.tensors for name in needed)]
        for prefix in prefixes:
            inner = tuple(other for other in whole if other != prefix and other.startswith(prefix))
            network = self._network(prefix, inner, needed, classifier)
            if alone:
                network.unexpected = list(network.beside)
            yield network

    def _network(
        self, prefix: str, inner: tuple[str, ...], needed: set[str], classifier: tuple[str, ...]
    ) -> Network:
        """inner: the prefixes of other networks below this one."""
        below = [key for key in self.tensors if key.startswith(prefix)]
        found = {key.removeprefix(prefix): key for key in below}
        here = [name for name in self.wanted if name in found]
        firsts = {_numberless(name) for name in self.wanted}
        unexpected = [
            name
            for name, key in found.items()
            if name not in self.wanted
            and not (inner and key.startswith(inner))
            and not name.startswith(classifier or ("\0",))
            and (_numberless(name) in firsts or not BESIDE.fullmatch(name.partition(".")[0]))
        ]
        reshaped, resized = [], ""
        for name in here:
            own, tensor = self.wanted[name]
            if tensor.shape == self.tensors[found[name]].shape:
                continue
            theirs = self.tensors[found[name]]
            if name.endswith(COUNTER) and theirs.numel() == 1:
                continue  # of shape (1,): it counts the same
            if name == POSITIONS and sides(theirs, tensor, CLASS_TOKEN in here):
                resized = own
            else:
                reshaped.append(own)
        return Network(
            self.path + prefix,
            self.spelling,
            {self.wanted[name][0]: self.tensors[found[name]] for name in here},
            {name: self.tensors[key] for name, key in found.items() if name not in self.wanted},
            [key for key in self.tensors if key not in {found[name] for name in here}],
            [self.wanted[name][0] for name in self.wanted if name in needed and name not in found],
            unexpected,
            reshaped,
            CLASS_TOKEN in here,
            CLASS_TOKEN in self.wanted,
            resized,
        )


def spellings(content: Mapping, wanted: State) -> Iterator[Table]:
    """Every dictionary of tensors of a file, in every spelling; the backbone's own comes first."""
    tables = [(path, names.without_wrappers(state)) for path, state in walk(content)]
    own = {name: (name, tensor) for name, tensor in wanted.items()}
    common = {name: (key, wanted[key]) for name, key in names.vocabulary(wanted).items()}
    for path, state in tables:
        yield Table(path, "", state, own)
    for spelling in names.SPELLINGS:
        for path, state in tables:
            yield Table(path, spelling.whose, names.respelt(state, spelling), common)
    for path, state in tables:
        respelt = names.respelt(state, names.SPELLINGS[-1])
        yield Table(path, names.NUMBERED, names.unnumbered(respelt, common), common)


def walk(
    content: Mapping, path: str = "", seen: tuple[int, ...] = ()
) -> Iterator[tuple[str, State]]:
    """(path, tensors) of each of the nested dictionaries that holds tensors, from outside in."""
    pairs = [(key, value) for key, value in content.items() if isinstance(key, str)]
    if state := {key: value for key, value in pairs if isinstance(value, Tensor)}:
        yield path, state
    for key, value in pairs:
        if isinstance(value, Mapping) and id(value) not in seen:
            yield from walk(value, f"{path}{key}.", (*seen, id(content)))


def sides(theirs: Tensor, ours: Tensor, class_token: bool) -> tuple[int, int] | None:
    """The sides of the square grids of two position embeddings (1, tokens, dim); None: no such."""
    if theirs.ndim != 3 or ours.ndim != 3 or theirs.shape[::2] != ours.shape[::2]:
        return None
    one, other = (round((each.shape[1] - class_token) ** 0.5) for each in (theirs, ours))
    square = one**2 == theirs.shape[1] - class_token and other**2 == ours.shape[1] - class_token
    return (one, other) if square else None


def interpolated(positions: Tensor, wanted: Tensor, class_token: bool) -> Tensor:
    """Position embeddings (1, tokens, dim) for the grid of `wanted`, the class token's unchanged.

    Bicubic and antialiased, as timm does when it loads weights (resample_abs_pos_embed).
    """
    grids = sides(positions, wanted, class_token)
    assert grids
    first, grid = positions[:, :class_token].float(), positions[:, class_token:].float()
    grid = grid.mT.unflatten(2, (grids[0], grids[0]))
    grid = F.interpolate(grid, size=(grids[1], grids[1]), mode="bicubic", antialias=True)
    return torch.cat([first, grid.flatten(2).mT], dim=1)


@cache  # each name of a file is asked about once a prefix and once a network that it may fit
def _numberless(name: str) -> str:
    """The first name without its number, by which a fifth layer is one of the backbone's."""
    return re.sub(r"\d+", "#", name.partition(".")[0])


def _distinct(networks: list[Network]) -> list[Network]:
    """One of those that have the same tensors, as modules that are registered twice."""
    kept: list[Network] = []
    for network in networks:
        for known in kept:
            one, other = known.tensors, network.tensors
            if one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one):
                known.others.append(network.prefix)
                break
        else:
            kept.append(network)
    return kept
