"""Work in chunks on worker processes that stay small.

`multiprocessing` imports the main program again in every worker, and with it torch: gigabytes on a
machine with many cores. These workers import only what the task needs.
"""

import contextlib
import logging
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, islice
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from ssl_bench.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 256  # images: a few MB of pixels in a worker, and thousands of chunks to balance
AHEAD = 2  # chunks that a worker may do before they are asked for
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def default_workers() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_chunks(
    task: Callable[[int, int], Any],
    total: int,
    workers: int | None = None,
    title: str = "",
    done: Collection[int] = (),
) -> Generator[tuple[int, int, Any], None, None]:
    """Yield (start, stop, task(start, stop)) for every chunk of range(total), as they finish.

    `task` is pickled once; large numpy arrays in it are shared by all workers, not copied. An
    exception of the task is raised here. Closing the iterator, or leaving it by an exception, ends
    the workers. Shows a progress bar. done: the starts of chunks to leave out.
    """
    from ssl_bench.console import Bar  # not in the workers

    every = [(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    chunks = [chunk for chunk in every if chunk[0] not in done]
    begun = total - sum(stop - start for start, stop in chunks)
    count = min(workers or default_workers(), len(chunks))
    doing: dict[Connection, tuple[int, int]] = {}
    with started(task, count) as processes, Bar(total, title, begun=begun) as progress:
        waiting = iter(chunks)
        for connection in processes:
            doing[connection] = next(waiting)
            send(connection, doing[connection])
        while doing:
            for connection in wait(list(doing)):
                chunk = doing.pop(connection)
                result = receive(connection, processes[connection])
                if (following := next(waiting, None)) is not None:
                    doing[connection] = following
                    send(connection, following)
                progress.add(chunk[1] - chunk[0])
                yield *chunk, result


def run_in_order(
    task: Callable, chunks: Iterable[tuple], workers: int, waiting: Callable[[float, tuple], None]
) -> Generator[Any, None, None]:
    """Yield task(*chunk) for each of these chunks, in their order.

    The workers take turns, and none is more than AHEAD chunks ahead of what is asked for: where one
    is slow, the others wait. While nothing comes, `waiting` is called about once a second with the
    seconds waited and the chunk that is due; it may raise. For the rest see `run_chunks`.
    """
    chunks = iter(chunks)
    first = list(islice(chunks, AHEAD * workers))
    doing: deque[tuple[Connection, tuple, Future]] = deque()
    with (
        started(task, min(workers, len(first))) as processes,
        ThreadPoolExecutor(1, "source") as thread,
    ):

        def ask(connection: Connection, chunk: tuple) -> None:
            send(connection, chunk)
            result = thread.submit(receive, connection, processes[connection])
            doing.append((connection, chunk, result))

        try:
            for connection, chunk in zip(cycle(processes), first):
                ask(connection, chunk)
            while doing:
                connection, chunk, result = doing.popleft()
                began = time.monotonic()
                while not futures.wait([result], timeout=1).done:
                    waiting(time.monotonic() - began, chunk)
                for following in islice(chunks, 1):
                    ask(connection, following)
                yield result.result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
            for process in processes.values():  # ends the thread's read from them
                process.kill()


@contextlib.contextmanager
def started(task: Callable, count: int) -> Iterator[dict[Connection, subprocess.Popen]]:
    """Workers that hold the task and wait for its arguments (`send`); ended with the context."""
    processes: dict[Connection, subprocess.Popen] = {}
    with tempfile.TemporaryFile() as shared:
        buffers = []
        job = pickle.dumps(task, protocol=5, buffer_callback=buffers.append)
        sizes = [shared.write(buffer.raw()) for buffer in buffers]
        shared.flush()
        try:
            for _ in range(count):
                connection, process = _start(shared.fileno())
                processes[connection] = process
                with contextlib.suppress(BrokenPipeError):  # `receive` tells of a dead worker
                    connection.send((job, sizes))
            yield processes
        finally:
            for connection, process in processes.items():
                connection.close()
                process.kill()
                process.wait()


def _start(shared: int) -> tuple[Connection, subprocess.Popen]:
    ours, theirs = Pipe()
    with theirs:
        pipe = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ssl_bench.data.pool", str(pipe), str(shared)],
            pass_fds=(pipe, shared),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | ONE_THREAD,
        )
    return ours, process


def send(connection: Connection, chunk: tuple) -> None:
    with contextlib.suppress(BrokenPipeError):  # `receive` tells of a dead worker, with its status
        connection.send(chunk)


def receive(connection: Connection, process: subprocess.Popen) -> Any:
    try:
        result = connection.recv()
    except (EOFError, OSError):  # also in the midst of a result
        raise UserError(
            f"a data worker ended with status {process.wait()} (-9 often means out of memory); "
            "try fewer with data.workers=1"
        ) from None
    if isinstance(result, BaseException):
        raise result
    return result


def work(connection: Connection, shared: int) -> None:
    """The worker: receives one task, then chunks.

    EOFError, ConnectionResetError: the parent has closed the pipe, or is gone.
    """
    job, sizes = connection.recv()
    buffers = []
    if any(sizes):
        view = memoryview(mmap.mmap(shared, 0, access=mmap.ACCESS_READ))
        for size in sizes:
            buffers.append(view[:size])
            view = view[size:]
    else:
        buffers = [b"" for _ in sizes]
    task = pickle.loads(job, buffers=buffers)  # trusted: it comes from our own parent
    while True:
        chunk = connection.recv()
        try:
            result = task(*chunk)
        except (OSError, UserError) as error:
            result = error
        except Exception:
            result = RuntimeError(f"in a data worker:\n{traceback.format_exc()}")
        connection.send(result)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the parent is gone: end without a word
    with contextlib.suppress(EOFError, ConnectionResetError):  # also before it has sent the task
        work(Connection(int(sys.argv[1])), int(sys.argv[2]))
