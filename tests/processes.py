"""A function, or a command, in two processes."""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def start(function: Callable, *arguments: object, size: int) -> None:
    """Call function(rank, *arguments) in so many processes, and wait for them.

    They come from one that has imported torch and done nothing else, once for all tests.
    """
    mp.set_forkserver_preload(["torchvision", "torch._dynamo", "ssl_bench.command"])
    mp.start_processes(function, arguments, nprocs=size, start_method="forkserver")


def work(rank: int, size: int, job: Callable, folder: str) -> None:
    torch.set_num_threads(1)
    # They meet in a file: a port that is free now may be taken when it is wanted.
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size
    )
    torch.save(job(rank, size), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def in_processes(job: Callable, folder: Path, size: int = 2) -> list[dict[str, Tensor]]:
    start(work, size, job, str(folder), size=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def command(rank: int, size: int, words: Sequence[str], folder: str, environment: dict) -> None:
    from commands import run_here

    os.environ.clear()  # the one of the process that it comes from is older
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    result = run_here(words, Path(folder))
    assert result.returncode == 0, result.stderr


def on_ranks(words: Sequence[str], folder: Path, size: int = 2) -> None:
    """`ssl-bench` with these words, in so many processes, as torchrun starts them.

    Quicker than `devices=2`, which starts its own: these have imported torch.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    start(command, size, words, str(folder), os.environ | own, size=size)
