"""Weights travel to the authors' programs and back, and from every kind of source."""

import copy
import hashlib
import importlib.util
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import safetensors.torch
import torch
from commands import compose
from compared import features, moco, same, tiny
from conftest import TINY, Command
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from ssl_bench.backbones import resnet
from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.methods.moco import MoCo
from ssl_bench.runs import published, weights
from ssl_bench.runs.checkpoint import Checkpoint
from ssl_bench.runs.weights import load_backbone, load_official_moco, official_moco_state_dict


def write_official(method: MoCo, path: Path) -> Path:
    torch.save(
        {"epoch": 200, "arch": "resnet18", "state_dict": official_moco_state_dict(method)}, path
    )
    return path


# --- the authors' layout --------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("arch", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_main_lincls_reads_what_we_write(tmp_path: Path, arch: str, mlp: bool) -> None:
    """Its rule: module.encoder_q without its fc goes into torchvision's network, and exactly fc is
    missing.
    """
    method = moco(arch, mlp=mlp)
    torch.save(
        {"arch": arch, "state_dict": official_moco_state_dict(method)}, tmp_path / "moco.pth.tar"
    )
    theirs = getattr(models, arch)()
    theirs.fc.requires_grad_(False).weight.zero_()
    content = torch.load(tmp_path / "moco.pth.tar", weights_only=True)
    encoder = {
        key.removeprefix("module.encoder_q."): value
        for key, value in content["state_dict"].items()
        if key.startswith("module.encoder_q") and not key.startswith("module.encoder_q.fc")
    }
    outcome = theirs.load_state_dict(encoder, strict=False)
    assert set(outcome.missing_keys) == {"fc.weight", "fc.bias"}
    assert outcome.unexpected_keys == []
    theirs.fc = nn.Identity()
    assert features(theirs).isfinite().all()
    assert torch.equal(features(theirs), features(method.backbone))

    back = moco(arch, seed=1, mlp=mlp)
    load_official_moco(back, content["state_dict"])
    assert same(back, method)
    fresh = getattr(resnet, arch)()
    load_backbone(fresh, str(tmp_path / "moco.pth.tar"))
    assert torch.equal(features(fresh), features(method.backbone))


@pytest.mark.parametrize(
    ("mlp", "head"), [(False, ["fc"]), (True, ["fc.0", "fc.2"])], ids=["v1", "v2"]
)
def test_keys_are_the_authors(mlp: bool, head: list[str]) -> None:
    network = [key for key in models.resnet18().state_dict() if not key.startswith("fc.")]
    encoder = [*network, *(f"{layer}.{name}" for layer in head for name in ("weight", "bias"))]
    expected = {f"module.encoder_{which}.{key}" for which in "qk" for key in encoder}
    state = official_moco_state_dict(moco(mlp=mlp, width=8))
    assert state.keys() == expected | {"module.queue", "module.queue_ptr"}
    assert state["module.queue"].shape == (8, 16)
    assert state["module.queue_ptr"].shape == (1,)


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"mlp": False}, ["module.encoder_k.fc.0.bias", "method.mlp"]),
        ({"queue_size": 32}, ["module.queue", "method.queue_size"]),
        ({"arch": "resnet34"}, ["module.encoder_k.layer1.2.bn1.bias", "backbone"]),
    ],
    ids=str,
)
def test_another_methods_state_is_refused(other: dict, names: list[str]) -> None:
    method, before = moco(width=8), moco(width=8)
    with pytest.raises(UserError) as caught:
        load_official_moco(method, official_moco_state_dict(moco(seed=1, width=8, **other)))
    assert all(name in str(caught.value) for name in names), caught.value
    assert same(method, before)


# --- every source of `pretrained=` ----------------------------------------------------------------


def test_a_run_directory_and_its_file(tmp_path: Path) -> None:
    method, older = tiny(), tiny(seed=1)
    Checkpoint(tmp_path, "run").save(2, model=older)
    file = Checkpoint(tmp_path, "run").save(3, model=method)
    for source in (tmp_path, file):
        backbone = tiny(seed=2).backbone
        loaded = load_backbone(backbone, str(source))
        assert (loaded.source, loaded.prefix) == (file, "model.backbone.")
        assert same(backbone, method.backbone)
        assert loaded.num_tensors == len(method.backbone.state_dict())
        assert loaded.num_tensors + len(loaded.left_out) == len(method.state_dict())
    load_backbone(backbone, str(tmp_path / "checkpoints" / "step0000000002.pt"))
    assert same(backbone, older.backbone)


def test_an_official_file_gives_the_query_encoder(tmp_path: Path) -> None:
    method, backbone = tiny(), tiny(seed=1).backbone
    loaded = load_backbone(backbone, str(write_official(method, tmp_path / "x.pth.tar")))
    assert loaded.prefix == "state_dict.module.encoder_q."
    assert same(backbone, method.backbone)
    assert not same(backbone, method.key_backbone)
    assert {"module.encoder_q.fc.0.weight", "module.queue", "module.encoder_k.conv1.weight"} <= set(
        loaded.left_out
    )
    assert loaded.num_tensors + len(loaded.left_out) == len(official_moco_state_dict(method))


@pytest.mark.parametrize("classifier", [True, False])
def test_a_torchvision_file(tmp_path: Path, classifier: bool) -> None:
    network = models.resnet18()
    state = {
        key: value
        for key, value in network.state_dict().items()
        if classifier or not key.startswith("fc.")
    }
    torch.save(state, tmp_path / "resnet18.pth")
    backbone = resnet.resnet18()
    loaded = load_backbone(backbone, str(tmp_path / "resnet18.pth"))
    assert (loaded.prefix, loaded.remarks) == ("", [])
    assert loaded.left_out == (["fc.weight", "fc.bias"] if classifier else [])
    network.fc = nn.Identity()
    assert torch.equal(features(backbone), features(network))


BACKBONE = tiny().backbone
KEYS = list(BACKBONE.state_dict())


@given(
    dropped=st.sets(st.sampled_from(KEYS), max_size=3),
    added=st.sets(st.sampled_from(["layer5.conv.weight", "queue"]), max_size=2),
    reshaped=st.sets(st.sampled_from([key for key in KEYS if key.endswith("weight")]), max_size=3),
)
@example(dropped=set(), added=set(), reshaped=set())
@example(dropped=set(KEYS[:1]), added=set(), reshaped=set())
@example(dropped=set(), added={"queue"}, reshaped=set())
@example(dropped=set(), added=set(), reshaped=set(KEYS[:1]))
@settings(max_examples=10)
def test_all_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, dropped: set[str], added: set[str], reshaped: set[str]
) -> None:
    """Whatever does not fit exactly is refused with its keys, and the backbone stays as it was."""
    reshaped = reshaped - dropped
    state = {
        f"backbone.{key}": value + 1
        for key, value in BACKBONE.state_dict().items()
        if key not in dropped
    }
    state |= {f"backbone.{key}": torch.zeros(1) for key in added}
    state |= {f"backbone.{key}": state[f"backbone.{key}"][None] for key in reshaped}
    path = tmp_path_factory.mktemp("weights") / "x.pt"
    torch.save({"run": "x", "step": 1, "model": state}, path)
    backbone = copy.deepcopy(BACKBONE)
    if not dropped | added | reshaped:
        assert load_backbone(backbone, str(path)).num_tensors == len(KEYS)
        return
    with pytest.raises(UserError) as caught:
        load_backbone(backbone, str(path))
    for keys, what in ((dropped, "missing"), (added, "unexpected"), (reshaped, "of another shape")):
        assert not keys or f"{len(keys)} {what} (" in str(caught.value)
        assert all(key in str(caught.value) for key in keys)
    assert same(backbone, BACKBONE)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in BACKBONE.state_dict().items()}
    state["conv1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"1 of its tensors are not finite \(conv1.weight"):
        load_backbone(copy.deepcopy(BACKBONE), str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "has a name of this backbone's (it begins with epoch)"),
        ({1: torch.zeros(2)}, "has a name of this backbone's (it begins with 1)"),
        ({}, "has a name of this backbone's"),
        ({"state_dict": 3}, "has a name of this backbone's (it begins with state_dict)"),
        ({"model": 3, "step": 2, "run": "x"}, "has a name of this backbone's"),
        ({"model": {1: torch.zeros(2)}, "step": 2, "run": "x"}, "has a name of this backbone's"),
        (
            {"state_dict": {"encoder.conv1.weight": torch.zeros(2)}},
            "its 1 tensors of state_dict.encoder are not this backbone's 120: 99 missing (bn1.",
        ),
    ],
    ids=str,
)
def test_other_files_are_refused(tmp_path: Path, content: object, says: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError) as caught:
        load_backbone(tiny().backbone, str(tmp_path / "x.pt"))
    assert says in str(caught.value)
    assert str(tmp_path / "x.pt") in str(caught.value)


# --- the zoo --------------------------------------------------------------------------------------


class Server:
    """A web server on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.cut = folder, Counter(), False
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests[self.path] += 1
                super().do_GET()

            def copyfile(self, source, target) -> None:
                target.write(source.read()[: -100 if server.cut else None])

            def log_message(self, *args) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.http.server_port}/"


@pytest.fixture(params=["md5", "sha256"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """Serves `zoo/tiny.pth.tar`, known by the name `tiny`."""
    folder = tmp_path / "www"
    (folder / "zoo").mkdir(parents=True)
    file = write_official(tiny(), folder / "zoo" / "tiny.pth.tar")
    server = Server(folder)
    digits = hashlib.new(request.param, file.read_bytes()).hexdigest()[:8]
    monkeypatch.setenv("SSL_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    know(monkeypatch, server.url, f"{request.param} {digits}")
    thread = Thread(target=server.http.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def know(monkeypatch: pytest.MonkeyPatch, url: str, known_hash: str) -> None:
    """The zoo has one file."""
    told = ("resnet18", "MoCo v2", 200, 67.7, "MIT")
    one = published.Weights(f"{url}zoo/tiny.pth.tar", known_hash, *told)
    monkeypatch.setattr(published, "WEIGHTS", {"tiny": one})


def cached(tmp_path: Path) -> list[str]:
    """What is left in the cache, but for locks."""
    return sorted(
        path.name
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


def test_a_zoo_name_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        backbone = tiny(seed=1).backbone
        loaded = load_backbone(backbone, "tiny")
        assert same(backbone, tiny().backbone)
        assert loaded.source == tmp_path / "cache" / "zoo" / "tiny.pth.tar"
        assert cached(tmp_path) == ["tiny.pth.tar"]
    assert server.requests == {"/zoo/tiny.pth.tar": 1}


def test_without_a_published_hash_the_first_file_is_the_measure(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    know(monkeypatch, server.url, "")
    with caplog.at_level("INFO"):
        for _ in range(2):
            file = weights.find("tiny")
    told = [text for text in caplog.messages if "its authors publish no hash" in text]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(told) == 1
    assert f"its sha256, {sha256[:8]}..., is in {file.parent}/SHA256SUMS now" in told[0]
    assert cached(tmp_path) == ["SHA256SUMS", "tiny.pth.tar"]
    file.unlink()
    write_official(tiny(seed=1), server.folder / "zoo" / "tiny.pth.tar")
    with pytest.raises(UserError, match=f"not {sha256[:8]}... as .*SHA256SUMS says"):
        weights.find("tiny")


def test_half_a_file_without_a_published_hash_is_not_taken(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, server.url, "")
    server.cut = True
    with pytest.raises(UserError, match=r"tiny: (no download|\d+ bytes came of \d+)"):
        weights.find("tiny")
    assert cached(tmp_path) == []


def refused(tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        weights.find("tiny")
    message, known = str(caught.value), published.WEIGHTS["tiny"]
    algorithm, _, digits = known.hash.partition(" ")
    assert str(tmp_path / "cache" / "zoo" / "tiny.pth.tar") in message  # where to put it
    assert f"fetch {known.url} elsewhere" in message
    assert f"(its {algorithm} begins with {digits})" in message
    assert "\n" not in message
    assert cached(tmp_path) == []
    return message


def test_another_file_is_not_cached(server: Server, tmp_path: Path) -> None:
    write_official(tiny(seed=1), server.folder / "zoo" / "tiny.pth.tar")
    assert f"not {published.WEIGHTS['tiny'].hash.split()[1]}" in refused(tmp_path)


def test_a_broken_download_is_not_cached(server: Server, tmp_path: Path) -> None:
    server.cut = True
    refused(tmp_path)
    server.cut = False
    assert weights.find("tiny").is_file()


def test_a_file_that_is_gone(server: Server, tmp_path: Path) -> None:
    (server.folder / "zoo" / "tiny.pth.tar").unlink()
    assert "404" in refused(tmp_path)


def test_no_network(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        know(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}/", "md5 b251726a")
        assert "refused" in refused(tmp_path)


def test_a_silent_network_does_not_hang(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        know(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/", "md5 b251726a")
        monkeypatch.setattr(published, "TIMEOUT", 0.2)
        assert "timed out" in refused(tmp_path)


def test_a_file_put_there_by_hand(server: Server, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "zoo" / "tiny.pth.tar"
    place.parent.mkdir(parents=True)
    write_official(tiny(), place)
    place.write_bytes((server.folder / "zoo" / "tiny.pth.tar").read_bytes())
    assert weights.find("tiny") == place
    place.write_bytes(b"something else")
    with pytest.raises(UserError, match="delete it and try again"):
        weights.find("tiny")
    assert not server.requests


def test_the_wrong_backbone_for_a_zoo_name(server: Server) -> None:
    with pytest.raises(UserError, match="Choose the backbone=resnet18 it was trained with"):
        load_backbone(resnet.resnet34(), "tiny")


@pytest.mark.parametrize("name", published.WEIGHTS)
def test_an_entry_of_the_zoo(name: str) -> None:
    """What it says to type makes a network; of torchvision's, it is what torchvision says."""
    known = published.WEIGHTS[name]
    assert known.url.startswith("https://")
    assert re.fullmatch(r"|md5 [0-9a-f]{8}|sha256 [0-9a-f]{8}", known.hash)
    cfg = compose(*f"backbone={known.backbone}".split(), "data.image_size=224")
    build.check(cfg)
    if "dinov2" not in known.backbone or importlib.util.find_spec("timm"):
        with torch.device("meta"):
            assert build.construct(cfg.backbone).dim in (384, 512, 768, 2048, 4096)
    if name.startswith("imagenet"):
        network = known.backbone.replace("resnet", "ResNet")
        (theirs,) = (one for one in getattr(models, f"{network}_Weights") if one.url == known.url)
        assert theirs.meta["_metrics"]["ImageNet-1K"]["acc@1"] == known.top1
        assert known.hash == f"sha256 {known.url.rpartition('-')[2].removesuffix('.pth')}"
        assert ("_v2" in name) == (theirs.name == "IMAGENET1K_V2")


def test_no_two_entries_share_a_place() -> None:
    assert len({published.place(name) for name in published.WEIGHTS}) == len(published.WEIGHTS)
    assert len({known.url for known in published.WEIGHTS.values()}) == len(published.WEIGHTS)


def test_a_name_that_is_nearly_one() -> None:
    with pytest.raises(UserError, match=r"ssl-bench stage=zoo lists; did you mean dino_vit_s16 or"):
        weights.find("dino_vits16")
    with pytest.raises(UserError, match=r"ssl-bench stage=zoo lists$"):
        weights.find("nothing/like/it")


def test_swav_was_shown_images_of_its_own_std(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_BENCH_CACHE", str(tmp_path))
    assert weights.look(published.place("swav_800ep")) == {"std": [0.228, 0.224, 0.225]}
    assert weights.look(published.place("dino_r50")) == {}


# --- as a command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_lincls_of_an_official_file(ssl_bench: Command, tmp_path: Path) -> None:
    method = tiny()
    write_official(method, tmp_path / "x.pth.tar")
    result = ssl_bench(
        *TINY, "stage=lincls", "pretrained=x.pth.tar", "epochs=1", "dir=run", check=True
    )
    wanted, whole = len(method.backbone.state_dict()), len(official_moco_state_dict(method))
    assert (
        f"loaded all {wanted} tensors of the backbone from x.pth.tar "
        "(state_dict.module.encoder_q.*)" in result.stderr
    )
    assert f"left out {whole - wanted} others: module.encoder_q.fc.0.weight" in result.stderr
    backbone = tiny(seed=1).backbone
    # the classifier's checkpoint holds the backbone it saw
    load_backbone(backbone, str(tmp_path / "run"))
    assert same(backbone, method.backbone)


def test_a_damaged_newest_state_is_refused_with_the_one_before(tmp_path: Path) -> None:
    """A silent change of the step would be another result."""
    checkpoint = Checkpoint(tmp_path / "run", "run")
    older, newest = checkpoint.save(10, model=tiny()), checkpoint.save(1200, model=tiny())
    whole = bytearray(newest.read_bytes())
    whole[len(whole) // 2] ^= 1
    newest.write_bytes(whole)
    with pytest.raises(UserError) as caught:
        load_backbone(tiny().backbone, str(tmp_path / "run"))
    assert str(caught.value).startswith(f"{newest}: damaged")
    assert str(caught.value).endswith(f"the state before it, of step 10, is pretrained={older}")
    load_backbone(tiny().backbone, str(older))


def test_large_files_are_read_once_for_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command asks an export for its recipe, mean and std, classes and labels, and a zoo name for
    its file.
    """
    state = {"a": torch.zeros(2)}
    metadata = {"ssl_bench": '{"augmentation": {"mean": [1, 1, 1]}}'}
    metadata[weights.DIGEST] = weights.digest(state, metadata["ssl_bench"])
    save_file(state, path := tmp_path / "model.safetensors", metadata)
    monkeypatch.setenv("SSL_BENCH_CACHE", str(tmp_path))
    told = ("resnet18", "MoCo v2", 200, 67.7, "MIT")
    one = published.Weights("https://x/one.pth", "md5 c4ca4238", *told)
    monkeypatch.setattr(published, "WEIGHTS", {"one": one})
    published.place("one").parent.mkdir()
    published.place("one").write_text("1")
    read: list[Path] = []
    load, file_digest = safetensors.torch.load_file, hashlib.file_digest
    monkeypatch.setattr(
        safetensors.torch, "load_file", lambda path: read.append(path) or load(path)
    )
    monkeypatch.setattr(
        hashlib,
        "file_digest",
        lambda file, *how: read.append(Path(file.name)) or file_digest(file, *how),
    )
    for _ in range(3):
        assert weights.look(path) == {"mean": [1, 1, 1]}
        assert weights.find("one") == published.place("one")
    assert sorted(read) == [path, published.place("one")]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        weights.look(path)
    published.place("one").write_text("2")
    with pytest.raises(UserError, match="its md5 is c81e728d"):
        weights.find("one")


@pytest.mark.parametrize("names", [5, "cat", {"a": 1}, [1, 2], None])
def test_names_of_classes_that_are_none(tmp_path: Path, names: object) -> None:
    """Of a file from elsewhere, and of a run's directory."""
    save_file(
        {"a": torch.zeros(2)},
        path := tmp_path / "m.safetensors",
        {"ssl_bench": json.dumps({"classes": names})},
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "classes.json").write_text(json.dumps({"classes": names}))
    for file in (path, tmp_path / "checkpoints" / "step0000000001.pt"):
        with pytest.raises(UserError, match="no list of texts"):
            weights.class_names(file)
