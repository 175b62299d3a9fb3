"""The only module that knows `torch.distributed`.

Without a process group every function does what one process needs: nothing.
"""

import inspect
import os
import re
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_bench.errors import Abandoned, UserError

# what the backends say when a process at the other end is gone
GONE = re.compile(
    r"(closed|reset) by peer|Broken pipe|remote process exited|ncclRemoteError|"
    r"unhandled system error"
)


class World(NamedTuple):
    rank: int
    local_rank: int
    size: int
    local_size: int


def launched() -> World | None:
    """The world that torchrun, or srun with several tasks, started this process in, or None."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(
            int(env["RANK"]),
            int(env.get("LOCAL_RANK", 0)),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_WORLD_SIZE", 1)),
        )
    # The step's tasks, not the job's: a plain command in a batch script with --ntasks=2 is one
    # process.
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if size > 1:
        nodes = int(env.get("SLURM_STEP_NUM_NODES", 1))
        return World(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), size, size // nodes)
    return None


def first_node(nodes: str) -> str:
    """The first of Slurm's list of hosts.

    gpu03 of "gpu[03-04,07],login", r1i0n2 of "r1i[0-1]n[2-5]".
    """
    first = re.match(r"(\[[^]]*\]|[^,[])+", nodes)
    assert first, f"Slurm's {nodes!r} names no host"
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first[0])


def find_rank_0() -> None:
    """Set MASTER_ADDR and MASTER_PORT if nobody has."""
    if "MASTER_ADDR" in os.environ:
        return
    if "SLURM_STEP_NODELIST" not in os.environ:
        raise UserError(
            "RANK and WORLD_SIZE are set, and MASTER_ADDR isn't: start it by torchrun, "
            "or unset them"
        )
    os.environ["MASTER_ADDR"] = first_node(os.environ["SLURM_STEP_NODELIST"])
    # below 32768, from where on the system gives ports to anyone
    os.environ["MASTER_PORT"] = str(20000 + int(os.environ["SLURM_JOB_ID"]) % 12000)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the world of `launched()` for the time of the context.

    UserError if its processes don't meet within $SSL_BENCH_RENDEZVOUS seconds (300), Abandoned if
    one leaves.
    """
    world = launched()
    if world is None or dist.is_initialized():
        yield
        return
    find_rank_0()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(seconds=float(os.environ.get("SSL_BENCH_RENDEZVOUS", 300)))
    try:
        store, *_ = next(dist.rendezvous("env://", world.rank, world.size, timeout=patience))
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=patience
        )
    except RuntimeError as error:
        raise UserError(_not_met(world, patience, error)) from None
    # Rank 0 may pack a large data set while the others wait at the first collective.
    packing = timedelta(hours=2)
    store.set_timeout(packing)
    if hasattr(dist, "set_timeout"):  # since torch 2.14
        dist.set_timeout(packing)
    else:
        dist.distributed_c10d._set_pg_timeout(packing)
    try:
        yield
    except RuntimeError as error:
        if GONE.search(str(error)):
            raise Abandoned(
                f"another of the {world.size} processes has ended, and says why, if it could; "
                "the same command continues from the last state saved"
            ) from None
        raise
    finally:
        dist.destroy_process_group()


def _not_met(world: World, patience: timedelta, error: RuntimeError) -> str:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    reason = str(error).splitlines()[0].rstrip(".")
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        reason = (
            f"{address} is no name that {socket.gethostname()} knows: set MASTER_ADDR to one, "
            "or to an address"
        )
    return (
        f"process {world.rank} of {world.size} didn't meet the others at {address}:{port} within "
        f"{patience.total_seconds():g} s ($SSL_BENCH_RENDEZVOUS): {reason}"
    )


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


_imagined: int | None = None


def world_size() -> int:
    if _imagined is not None:
        return _imagined
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def as_if(processes: int) -> Iterator[None]:
    """Within it `world_size` is this, for what is asked of a run before its processes start."""
    global _imagined
    before, _imagined = _imagined, processes
    try:
        yield
    finally:
        _imagined = before


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """(N, ...) of every rank -> (world * N, ...) in rank order. No gradient."""
    if world_size() == 1:
        return tensor
    layout = torch.contiguous_format
    parts = [torch.empty_like(tensor, memory_format=layout) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return all_gather(tensor)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return total(grad).chunk(world_size())[rank()]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return total(tensor)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return total(grad)


def gather(tensor: Tensor) -> Tensor:
    """`all_gather` with a gradient: the sum of those that every rank's loss has for this part.

    If each rank then computes the loss of the whole batch, the gradients that DDP averages are
    those of one process that has the whole batch.
    """
    return tensor if world_size() == 1 else _Gather.apply(tensor)


def mean_with_grad(tensor: Tensor) -> Tensor:
    """Mean over ranks, with a gradient that flows to all of them."""
    return tensor if world_size() == 1 else _Total.apply(tensor) / world_size()


@torch.no_grad()
def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def share_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, which are the ones saved.

    Where each rank's batch norm sees its own images, its running statistics differ.
    """
    for buffer in module.buffers():
        broadcast(buffer)


@torch.no_grad()
def mean(tensor: Tensor) -> Tensor:
    return total(tensor) / world_size()


@torch.no_grad()
def total(tensor: Tensor) -> Tensor:
    """Sum over ranks."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """True on every rank if true on one. The collective is on the CPU, so that no GPU waits."""
    return flag if world_size() == 1 else bool(total(torch.tensor(float(flag))))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def data_parallel(model: nn.Module, device: torch.device, compress: str | None = None) -> nn.Module:
    """`model` for the forward pass, with gradients averaged over ranks.

    Keep `model` itself for its state. compress: "bf16" has gradients travel in half the bytes, by
    torch's hook; what is summed is rounded to bfloat16's eight bits.
    """
    if world_size() == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    # A queue of 65536 x 128 must not travel each step; every rank enqueues the same gathered keys
    # instead.
    renamed = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters  # torch 2.15
    quiet = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    ids = [device] if device.type == "cuda" else None
    parallel = ddp(model, device_ids=ids, gradient_as_bucket_view=True, **quiet)
    if compress == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel


def apart(model: nn.Module, alone: bool) -> AbstractContextManager[None]:
    """For a forward and a backward pass after which, if `alone`, ranks keep their gradients."""
    return model.no_sync() if alone and world_size() > 1 else nullcontext()
