"""`precision=`: torch's switches, and the scaled loss of float16 (on the CPU, where it is slow, as
on a GPU).
"""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import compose
from compared import assert_identical

from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.runs.checkpoint import complete
from ssl_bench.runtime.floor import matmul_rate
from ssl_bench.runtime.precision import emulated, prepare

RUN = [
    "stage=pretrain",
    "precision=fp16",
    "device=cpu",
    "data=digits",
    "data.image_size=16",
    "backbone=resnet18",
]
RUN += [
    "backbone.width=4",
    "batch_size=256",
    "method=simsiam",
    "method.dim=16",
    "method.predictor_dim=8",
    "epochs=2",
]
RUN += ["log_every=1", "eval_every=0"]


def start_with(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale))


def test_float16_skips_steps_that_overflow_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_with(monkeypatch, 2.0**22)
    whole, part = tmp_path / "whole", tmp_path / "part"
    launch(compose(*RUN, f"dir={whole}", "save_every=7"))
    shutil.copytree(whole, part)
    (part / "summary.json").unlink()
    complete(part)[0].unlink()
    launch(compose(*RUN, f"dir={part}", "save_every=7"))
    last, before = (torch.load(path, weights_only=True) for path in complete(whole))
    assert (last["step"], before["step"]) == (10, 7)
    assert 1 < before["scaler"]["scale"] < 2.0**22
    assert_identical(last, torch.load(complete(part)[0], weights_only=True))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    norms = torch.tensor([line["grad_norm"] for line in lines])
    taken = norms.isfinite()
    assert 0 < (skipped := int((~taken[:7]).sum())) < 7  # which ones depends on the processor
    assert before["scaler"]["scale"] == 2.0 ** (22 - skipped)
    assert norms[taken].max() < 10  # of the gradients themselves, not of the scaled ones


def test_float16_that_no_scale_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_with(monkeypatch, 1.0)
    with pytest.raises(UserError, match=r"diverged at step \d+: .* try a lower optimizer\.base_lr"):
        launch(
            compose(
                *RUN,
                f"dir={tmp_path}",
                "optimizer.base_lr=1e9",
                "save_every=1000",
                "optimizer.scaling=none",
            )
        )


@pytest.fixture
def switches() -> None:
    """As they were, afterwards."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(
    ("precision", "convolutions", "products"),
    [
        ("fp32", False, "highest"),
        ("tf32", True, "high"),
        ("bf16", True, "highest"),
        ("fp16", True, "highest"),
    ],
)
def test_switches(
    precision: str, convolutions: bool, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    prepare(precision, torch.device("cuda"))
    assert torch.backends.cudnn.allow_tf32 is convolutions
    assert torch.get_float32_matmul_precision() == products


@pytest.mark.usefixtures("switches")
def test_bfloat16_that_is_only_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(
        UserError, match="precision=bf16: Tesla T4 has no bfloat16; type precision=fp16"
    ):
        prepare("bf16", torch.device("cuda"))


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(
    ("precision", "flags", "emulates"),
    [
        ("bf16", "avx2 avx512_bf16", False),
        ("bf16", "avx2 f16c", True),
        ("fp16", "avx2 f16c", True),
        ("fp16", "fphp asimdhp", False),
        ("fp32", "avx2", False),
        ("bf16", None, False),  # not told by this system
    ],
)
def test_a_cpu_that_emulates(
    precision: str,
    flags: str | None,
    emulates: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line says so, and no training is measured against its products."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
    monkeypatch.setattr("ssl_bench.runtime.precision.FLAGS", tmp_path / "cpuinfo")
    assert emulated(precision, cpu) is emulates
    assert not emulated(precision, gpu)
    with caplog.at_level("WARNING"):
        prepare(precision, cpu, tells=False)
        assert not caplog.messages
        prepare(precision, cpu)
    assert len(caplog.messages) == emulates
    assert all(f"precision={precision}: this CPU" in said for said in caplog.messages)
    if emulates:
        assert matmul_rate.__wrapped__(cpu, precision) is None
