"""Data sets of a user's own: `__len__`, and `__getitem__` that gives an image and its label."""

import logging
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_bench
from ssl_bench.config import build
from ssl_bench.data.formats.digits import Digits
from ssl_bench.data.formats.own import Facts, Own, as_picture
from ssl_bench.data.pictures import squared
from ssl_bench.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
HEAD = """
import numpy as np
from PIL import Image
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
"""
# written by hand, as a user would: one that is right, and what one may get wrong
CLASSES = {
    "Good": """
        class Good:
            classes = ["a", "b", "c", "d"]
            def __init__(self, split, last: int = 3):
                self.last = last
                self.pixels = PIXELS[32:] if split == "val" else PIXELS[:32]
            def __len__(self):
                return len(self.pixels)
            def __getitem__(self, index):
                return Image.fromarray(self.pixels[index]), index % (self.last + 1)
    """,
    "Alone": """
        class Alone:
            def __len__(self):
                return 40
            def __getitem__(self, index):
                return PIXELS[index]
    """,
    "Three": """
        from typing import Literal
        class Three(Good):
            def __init__(self, split: Literal["pretrain", "train", "val"]):
                super().__init__(split)
                if split == "pretrain":
                    self.pixels = PIXELS[:20]
            def __getitem__(self, index):
                return super().__getitem__(index) if len(self.pixels) != 20 else self.pixels[index]
    """,
}
ITEMS = {
    "1 / 0": "__getitem__ raised ZeroDivisionError: division by zero",
    "(PIXELS[0], 1, 2)": r"a tuple of 3: return \(image, label\)",
    "{'image': 1}": "an image of type dict: give a picture of PIL's",
    "PIXELS[0] / 255, 1": r"an array float64 \(12, 12, 3\): .*transforms are for augmentation=",
    "T.zeros(3, 12, 12), 1": r"a tensor float32 \(3, 12, 12\): give",
    "T.zeros(4, 12, 12, dtype=T.uint8), 1": r"a tensor uint8 \(4, 12, 12\): give",
    "PIXELS[0].transpose(2, 0, 1), 1": r"an array uint8 \(3, 12, 12\): give",
    "PIXELS[0][:0], 1": r"an array uint8 \(0, 12, 3\): give",
    "PIXELS[:2], 1": r"an array uint8 \(2, 12, 12, 3\): give",
    "PIXELS[0], 'cat'": "a label 'cat' of type str: give the number of its class",
    "PIXELS[0], 1.0": "a label '1.0' of type float: give",
    "PIXELS[0], True": "a label 'True' of type bool",
    "PIXELS[0], -1": "a label -1: classes are numbered from 0",
    "PIXELS[0], T.tensor([1, 0])": r"a label 'tensor\(\[1, 0\]\)' of type Tensor: give the number",
    "PIXELS[0], np.float32(1)": "a label '1.0' of type float32: give the number",
}  # fmt: skip
OTHERS = {
    "class A(Good):\n    def __len__(self): return '3'": ".*A: its __len__ raised TypeError",
    "class A:\n def __getitem__(self, index): return PIXELS[0], 1": "A has no __len__",
    "import torch\nclass A(torch.utils.data.IterableDataset): ...": "A has no __len__",
    "class A:\n def __len__(self): return 3": "A has no __getitem__",
    "class A: ...": "A has no __len__ and no __getitem__",
    "class A(Good):\n def __len__(self): return 0": "holds no images: its __len__ gives 0",
    "class A(Good):\n def __init__(self, split): raise ValueError('no disk')": r"A\(split='\w+'\): "
    "ValueError: no disk",
    "class A(Good):\n def __init__(self, split): super().__init__(split); self.f = lambda: 0": "A "
    "can't be sent to the processes that read it .*: open files in __getitem__",
    "class A(Good):\n def __getitem__(self, index): return PIXELS[index], index // 39 or 'x'": "x",
}  # fmt: skip


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module of CLASSES and more; the current folder is its own. Gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"own_{abs(hash(tmp_path))}"

    def write(more: str = "") -> str:
        texts = [HEAD, *map(textwrap.dedent, CLASSES.values()), more]
        (tmp_path / f"{name}.py").write_text("\n".join(texts))
        return name

    yield write
    sys.modules.pop(name, None)


def opened(target: str, **arguments: object) -> Own:
    node = {"_target_": target, "name": "mine", "image_size": 12, "workers": 1}
    build._schema(target, "data", ())  # as `build.check` has it
    return build.construct(node | arguments)


def test_its_images_and_labels_are_packed(module: Callable[[str], str]) -> None:
    data = opened(f"{module()}.Good")
    train, val, pretrain = (data.open(name) for name in ("train", "val", "pretrain"))
    assert np.array_equal(train.images, PIXELS[:32])
    assert np.array_equal(val.images, PIXELS[32:])
    assert pretrain.directory == train.directory
    assert (pretrain.labels == -1).all()
    assert train.labels.tolist() == [index % 4 for index in range(32)]
    assert (data.num_classes, data.class_names) == (4, ["a", "b", "c", "d"])
    assert data.split("train").where(3) == f"item 3 of {data.title}"
    other = opened(f"{module()}.Good", last=1)
    assert (other.num_classes, other.class_names) == (2, ())
    assert other.split("train").fingerprint != data.split("train").fingerprint
    assert other.split("pretrain").labels is None


@pytest.mark.parametrize("returned", ["torch.utils.data.Dataset", "Good", "'Good'"])
def test_a_function_that_says_what_it_gives(module: Callable[[str], str], returned: str) -> None:
    name = module(
        "import torch\n"
        f"def splits(split, last: int = 3) -> {returned}: return Good(split, last)\n"
        f"def all() -> {returned}: return Good('train')\n"
    )
    data = opened(f"{name}.splits", last=1)
    assert isinstance(data, Own)
    assert (data.title, data.arguments) == (f"{name}.splits", {"last": 1})
    if returned == "Good":
        assert np.array_equal(data.open("val").images, PIXELS[32:])
        assert np.array_equal(opened(f"{name}.all").open("pretrain").images, PIXELS[:32])


def test_what_is_asked_for_a_split(module: Callable[[str], str]) -> None:
    name = module()
    three = opened(f"{name}.Three")
    assert len(three.open("pretrain").images) == 20
    assert three.split("train").length == 32
    alone = opened(f"{name}.Alone")
    assert np.array_equal(alone.open("pretrain").images, PIXELS)
    assert alone.num_classes is None
    with pytest.raises(UserError, match=r"Alone takes no split=, so there is no split 'train'"):
        alone.split("train")
    bare = "class Bare(Good):\n def __getitem__(self, index): return super().__getitem__(index)[0]"
    module(bare)
    sys.modules.pop(name)
    data = opened(f"{name}.Bare")
    assert data.split("pretrain").length == 32
    with pytest.raises(UserError, match=r"item 0 of \w+.Bare comes without a label"):
        data.split("train")
    more = "class More(Good):\n def __init__(self, split): super().__init__(split, 5 if split == "
    more += "'val' else 3)"
    module(more)
    sys.modules.pop(name)
    with pytest.raises(UserError, match="'val' has label 5, and those of 'train' end at 3"):
        opened(f"{name}.More").split("val")


@pytest.mark.parametrize("item", ITEMS)
def test_an_item_that_is_none_is_one_line(item: str, module: Callable[[str], str]) -> None:
    text = f"class A(Good):\n    def __getitem__(self, index): return {item}"
    text = f"import torch as T\n{text}" if "T." in item else text
    name = module(text)
    with pytest.raises(UserError, match=rf"^item 0 of {name}.A: {ITEMS[item]}") as told:
        opened(f"{name}.A").split("pretrain")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", OTHERS)
def test_a_class_that_is_none_is_one_line(text: str, module: Callable[[str], str]) -> None:
    name = module(text)
    with pytest.raises(UserError, match=OTHERS[text]) as told:
        opened(f"{name}.A").split("train")
    assert "\n" not in str(told.value)


def test_a_mistake_in_an_item_that_only_a_worker_sees(module: Callable[[str], str]) -> None:
    text = "class A(Alone):\n def __len__(self): return 400\n"
    text += " def __getitem__(self, i): return PIXELS[i % 40] if i != 7 else 1 / 0"
    name = module(text)
    with pytest.raises(UserError, match=rf"item 7 of {name}.A: __getitem__ raised ZeroDivision"):
        opened(f"{name}.A").split("pretrain")
    store = opened(f"{name}.A", on_error="skip").open("pretrain")
    assert len(store.images) == 399


def test_the_content_is_what_it_is_known_by(module: Callable[[str], str], tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", PIXELS)
    text = "class A(Alone):\n"
    text += " def __init__(self, path): self.images = np.load(path)\n"
    text += " def __getitem__(self, index): return self.images[index], 0"
    name = module(text)
    first = opened(f"{name}.A", path="one.npy").split("pretrain")
    np.save(tmp_path / "two.npy", PIXELS)
    again = opened(f"{name}.A", path="two.npy").split("pretrain")
    assert again.fingerprint == first.fingerprint
    assert again.store_name != first.store_name
    changed = PIXELS.copy()
    changed[39, 0, 0] ^= 1
    np.save(tmp_path / "one.npy", changed)
    other = opened(f"{name}.A", path="one.npy").split("pretrain")
    assert other.fingerprint != first.fingerprint
    assert other.store_name != first.store_name


def test_a_damaged_note_is_made_anew(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module()
    whole = opened(f"{name}.Good", cache=str(tmp_path / "cache")).split("train")
    (note,) = (tmp_path / "cache").glob("*.facts")
    text = note.read_text()
    for damaged in (text[:-9], text.replace("[0, 1", "[1, 1"), "", "[]", "{}"):
        note.write_text(damaged)
        assert Facts.read(note) is None
        split = opened(f"{name}.Good", cache=str(tmp_path / "cache")).split("train")
        assert split.fingerprint == whole.fingerprint
        assert note.read_text() == text


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16", "F", "LA"])
def test_pictures_of_any_mode_are_those_of_their_files(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(PIXELS[0]).convert("L" if mode in ("I;16", "F") else "RGB")
    picture = picture.convert(mode)
    assert squared(as_picture(picture), 8).shape == (8, 8, 3)


def test_tensors_arrays_and_pictures_are_the_same_image() -> None:
    expected = squared(Image.fromarray(PIXELS[0]), 8)
    tensor = torch.from_numpy(PIXELS[0]).permute(2, 0, 1)
    for image in (PIXELS[0], tensor, PIXELS[0][::-1][::-1]):
        assert np.array_equal(squared(as_picture(image), 8), expected)
    grey = PIXELS[0, :, :, 0]
    three = squared(as_picture(np.repeat(grey[..., None], 3, 2)), 8)
    for image in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert np.array_equal(squared(as_picture(image), 8), three)


@pytest.mark.slow
def test_it_trains_as_ours_does(module: Callable[[str], str], tmp_path: Path) -> None:
    """The digits, as a user's own: the same images and labels, so the same weights."""
    name = module(
        textwrap.dedent("""
        from sklearn.datasets import load_digits
        from torch.utils.data import Dataset
        class MyDigits(Dataset):
            def __init__(self, split):
                digits = load_digits()
                part = slice(-500, None) if split == "val" else slice(None, -500)
                self.images = (digits.images[part] * (255 / 16)).round().astype(np.uint8)
                self.labels = digits.target[part]
            def __len__(self):
                return len(self.images)
            def __getitem__(self, index):
                return self.images[index], self.labels[index]
        """)
    )
    ours, own = Digits(16), opened(f"{name}.MyDigits", image_size=16)
    for split in ("train", "val"):
        assert np.array_equal(ours.open(split).images, own.open(split).images)
        assert np.array_equal(ours.open(split).labels, own.open(split).labels)
    small = ["data.image_size=16", "backbone.width=8", "backbone.stem=small", "device=cpu"]
    mine = ["data=own", "data.name=mine", f"data._target_={name}.MyDigits"]
    train = ["stage=pretrain", "method=simsiam", "epochs=1", "schedule=constant", "batch_size=256"]
    train += ["method.dim=32", "method.predictor_dim=8", "eval_every=0"]
    made = [ssl_bench.train([*data, *small, *train]) for data in (mine, ["data=digits"])]
    weights = [
        torch.load(next(Path(run).glob("checkpoints/*.pt")), weights_only=True)["model"]
        for run in made
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    judged = [
        ssl_bench.train(["stage=knn", *data, *small, f"pretrained={made[0].directory}"]).metrics
        for data in (mine, ["data=digits"])
    ]
    assert judged[0] == judged[1]
    lincls = ["stage=lincls", *mine, *small, f"pretrained={made[0].directory}", "epochs=1"]
    ran = ssl_bench.train([*lincls, "batch_size=256", "schedule=constant"])
    assert ran.metrics["val_top1"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data._target_=MODULE.Good +data.lst=3", "data.lst: no such key; did you mean data.last"),
        ("data._target_=MODULE.Good +data.last=a", "data.last=a: input should be a valid integer"),
        ("data._target_=MODULE.Good +data.split=val", "data.split: no such key"),
        ("data._target_=MODULE.Good data.last=2", r"has a \+: \+data.last="),
        ("data._target_=MODULE.Nothing", "can't be imported"),
        ("data._target_=MODULE.Bad", "data._target_=MODULE.Bad has no __len__"),
        ("data._target_=MODULE.said +data.n=a", "data.n=a: input should be a valid integer"),
        (
            "data._target_=MODULE.tacit",
            r"annotate it, def tacit\(\.\.\.\) -> torch\.",
        ),
        ("data._target_=math.sin", "doesn't say that it gives a data set: annotate it"),
        (
            "data._target_=MODULE.number",
            "number is a value of type int: name a class or a",
        ),
        ("data._target_=MODULE.said_partly", "is a value of type partial: name a class or a func"),
        ("data._target_=MODULE", "data._target_=MODULE: name a class or a function, like my_mod"),
        ("data._target_=5", "data._target_=5: name a class or a function, like my_module.MyOwn"),
        ("data.name=mine", "data._target_ needs a value"),
        ("data._target_=MODULE.Alone stage=knn", "Alone takes no split=, so there is no split"),
    ],
)
def test_a_mistake_is_one_line(words: str, said: str, module: Callable[[str], str]) -> None:
    name = module(
        "import functools, torch\n"
        "class Bad: ...\n"
        "number = 5\n"
        "def tacit(): return Good('train')\n"
        "def said(n: int = 3) -> torch.utils.data.Dataset: return Good('train')\n"
        "said_partly = functools.partial(said, 3)\n"
    )
    with pytest.raises(UserError, match=said.replace("MODULE", name)):
        ssl_bench.train(["data=own", *words.replace("MODULE", name).split(), "pretrained=null"])


def test_the_name_of_other_images_is_warned_of(
    module: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    name = module("class Bad: ...")
    logging.getLogger("ssl_bench").addHandler(caplog.handler)
    for words, warned in (([], True), (["data=own"], False), (["data.name=mine"], False)):
        caplog.clear()
        with pytest.raises(UserError, match=r"data.lst: no such key"):
            ssl_bench.train([*words, f"data._target_={name}.Good", "+data.lst=3"])
        assert ("is the name of other images" in caplog.text) == warned


def test_a_run_from_elsewhere_names_no_class(module: Callable[[str], str]) -> None:
    name = module()
    config = {"data": {"_target_": f"{name}.Good", "name": "mine"}}
    with pytest.raises(UserError, match="is not ours, and this command doesn't name it"):
        build.found(config, "data", build.literal({}), Path("config.yaml"))
    assert name not in sys.modules
