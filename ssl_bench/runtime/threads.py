"""Threads that each compute alone."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch


def lone_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads of which each works on its part alone.

    Torch would let all threads share each operation, and wait for the last of them hundreds of
    times a view: seventy times slower on cores that other programs use, too.
    """
    shared = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    all_there = Barrier(count)

    def begin(_: int) -> None:
        # holds for this thread, and for threads that start from now on
        torch.set_num_threads(1)
        all_there.wait()

    list(pool.map(begin, range(count)))
    torch.set_num_threads(shared)
    return pool
