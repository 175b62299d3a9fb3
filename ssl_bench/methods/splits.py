"""Shuffled batch norm on fewer GPUs than MoCo's authors had. Without torch, for those who only read
configurations.
"""

GPUS = 8  # of the authors, each with a batch norm of its own (arXiv:1911.05722, section 4.1)


def resolve(bn_splits: int | None, processes: int, batch_size: int | None) -> int:
    """In how many parts the batch norm of each process sees its share of the batch. batch_size:
    global, where known.

    bn_splits=None: so many that all processes have the authors' eight together; fewer where these
    don't divide the share, or would leave a part one image.
    """
    if bn_splits is not None:
        return bn_splits
    most = max(1, GPUS // processes)
    if batch_size is None:
        return most
    share = batch_size // processes
    return next((n for n in range(most, 1, -1) if share % n == 0 and share > n), 1)
