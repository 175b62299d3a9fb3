"""Whose names the tensors of a file have: the same network is spelt differently by each library.

A spelling is a list of substitutions that lead to one vocabulary: torchvision's for ResNets, timm's
for vision transformers. Read from what each program writes: torchvision, timm, facebookresearch's
dinov2, transformers' ViT, DINOv2 and ResNet, open-mmlab's mmpretrain, kuangliu's pytorch-cifar.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Rule = tuple[str, str | Callable[[re.Match], str]]

# What torch.compile, FSDP and checkpointed activations write between the names of modules.
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# "#0", "#1", "#2" at the end of a name: the pieces of a tensor, to be put together in this order.
PIECE = re.compile(r"#(\d)$")
BLOCK = r"(\bblocks\.\d+)\."


class Spelling(NamedTuple):
    """How a library names a network."""

    whose: str
    rules: tuple[Rule, ...]


def _stage(found: re.Match) -> str:
    return f"layer{int(found[1]) + 1}.{found[2]}."


def _layer(kind: str) -> Callable[[re.Match], str]:
    return lambda found: f"{found[1]}.{kind}{int(found[2]) + 1}."


def _piece(names: str) -> Callable[[re.Match], str]:
    return lambda found: f"{found[1]}.attn.qkv.{found[3]}#{names.split().index(found[2])}"


TORCHVISION = Spelling(
    "torchvision",
    (
        (r"\bclass_token$", "cls_token"),
        (r"\bregister_tokens$", "reg_token"),
        (r"\bencoder\.pos_embedding$", "pos_embed"),
        (r"\bconv_proj\.", "patch_embed.proj."),
        (r"\bencoder\.ln\.", "norm."),
        (r"\bencoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (BLOCK + r"ln_([12])\.", r"\1.norm\2."),
        (BLOCK + r"self_attention\.in_proj_(weight|bias)$", r"\1.attn.qkv.\2"),
        (BLOCK + r"self_attention\.out_proj\.", r"\1.attn.proj."),
        (BLOCK + r"mlp\.(?:0|linear_1)\.", r"\1.mlp.fc1."),
        (BLOCK + r"mlp\.(?:3|linear_2)\.", r"\1.mlp.fc2."),
    ),
)
SPELLINGS = (
    Spelling("timm", ()),
    TORCHVISION,
    # the blocks in chunks, each with its number in the whole network
    Spelling(
        "DINOv2",
        ((r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1."), (r"\bregister_tokens$", "reg_token")),
    ),
    Spelling(
        "Hugging Face",
        (
            (r"\bembeddings\.(cls|mask)_token$", r"\1_token"),
            (r"\bembeddings\.position_embeddings$", "pos_embed"),
            (r"\bembeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"\bencoder\.layer\.(\d+)\.", r"blocks.\1."),
            (r"\blayers\.(\d+)\.(?=attention\.|layernorm_|mlp\.)", r"blocks.\1."),
            (
                BLOCK + r"attention\.attention\.(query|key|value)\.(weight|bias)$",
                _piece("query key value"),
            ),
            (BLOCK + r"attention\.([qkv])_proj\.(weight|bias)$", _piece("q k v")),
            (BLOCK + r"attention\.(?:output\.dense|o_proj)\.", r"\1.attn.proj."),
            (BLOCK + r"layernorm_before\.", r"\1.norm1."),
            (BLOCK + r"layernorm_after\.", r"\1.norm2."),
            (BLOCK + r"intermediate\.dense\.", r"\1.mlp.fc1."),
            (BLOCK + r"output\.dense\.", r"\1.mlp.fc2."),
            (BLOCK + r"layer_scale([12])\.lambda1$", r"\1.ls\2.gamma"),
            (r"\blayernorm\.", "norm."),
            (r"\bembedder\.embedder\.convolution\.", "conv1."),
            (r"\bembedder\.embedder\.normalization\.", "bn1."),
            (r"\bencoder\.stages\.(\d+)\.layers\.(\d+)\.", _stage),
            (r"(\blayer\d+\.\d+)\.shortcut\.convolution\.", r"\1.downsample.0."),
            (r"(\blayer\d+\.\d+)\.shortcut\.normalization\.", r"\1.downsample.1."),
            (r"(\blayer\d+\.\d+)\.layer\.(\d+)\.convolution\.", _layer("conv")),
            (r"(\blayer\d+\.\d+)\.layer\.(\d+)\.normalization\.", _layer("bn")),
        ),
    ),
    Spelling(
        "mmpretrain",
        (
            (r"\bpatch_embed\.projection\.", "patch_embed.proj."),
            (r"\blayers\.(\d+)\.(?=ln[12]\.|attn\.|ffn\.)", r"blocks.\1."),
            (BLOCK + r"ln([12])\.", r"\1.norm\2."),
            (BLOCK + r"ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
            (BLOCK + r"ffn\.layers\.1\.", r"\1.mlp.fc2."),
            (r"\bln1\.", "norm."),
        ),
    ),
    Spelling("pytorch-cifar", ((r"(\blayer\d+\.\d+)\.shortcut\.", r"\1.downsample."),)),
)
NUMBERED = "numbered nn.Sequential"


def respelt(state: State, spelling: Spelling) -> State:
    """The tensors under the names of the common vocabulary; {} if two of them got the same one."""
    found: State = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        name = _substituted(key, spelling.rules)
        if piece := PIECE.search(name):
            pieces.setdefault(name[: piece.start()], {})[int(piece[1])] = value
        elif name in found:
            return {}
        else:
            found[name] = value
    for name, parts in pieces.items():
        if name in found or sorted(parts) != [0, 1, 2]:
            return {}
        found[name] = torch.cat([parts[index] for index in range(3)])
    return found


def vocabulary(names: Iterable[str]) -> dict[str, str]:
    """{name in the common vocabulary: the backbone's own} for the names of a backbone's tensors."""
    return {_substituted(name, TORCHVISION.rules): name for name in names}


def without_wrappers(state: State) -> State:
    clean = {WRAPPERS.sub("", key): value for key, value in state.items()}
    return clean if len(clean) == len(state) else state


def unnumbered(state: State, wanted: Iterable[str]) -> State:
    """The tensors of an nn.Sequential of a network's children under the names of these children.

    wanted: the network's names, child after child. A child is found by its position among those
    that have tensors, so only an nn.Sequential of as many is meant; {} if there is none. Whether
    it is the same network is for its other names and its shapes to say.
    """
    children = [child for child, _ in groupby(name.partition(".")[0] for name in wanted)]
    rows: dict[str, set[int]] = {}  # {prefix: the numbers that follow it}
    for key in state:
        for found_at in re.finditer(r"(?:^|(?<=\.))\d+(?=\.)", key):
            rows.setdefault(key[: found_at.start()], set()).add(int(found_at[0]))
    chosen = {prefix: sorted(rows[prefix]) for prefix in rows if len(rows[prefix]) == len(children)}
    found: State = {}
    for key, value in state.items():
        for prefix, numbers in chosen.items():
            number, _, rest = key.removeprefix(prefix).partition(".")
            if key.startswith(prefix) and number.isdecimal() and rest:
                found[f"{prefix}{children[numbers.index(int(number))]}.{rest}"] = value
                break
        else:
            found[key] = value
    return found if chosen else {}


@cache  # a file is compared with many networks
def _substituted(name: str, rules: tuple[Rule, ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
