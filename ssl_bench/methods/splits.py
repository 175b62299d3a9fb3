"""Shuffled batch norm on fewer GPUs than MoCo's authors had.

It doesn't import torch, so that a configuration is read quickly.
"""

GPUS = 8  # the authors', each with its own batch norm (arXiv:1911.05722, section 4.1)


def resolve(bn_splits: int | None, processes: int, batch_size: int | None) -> int:
    """In how many parts the batch norm of each process sees its share of the batch.

    bn_splits=None: so many that all processes together have the authors' eight; fewer if these
    don't divide the share, or would leave a part one image. batch_size: that of all processes
    together, if known.
    """
    if bn_splits is not None:
        return bn_splits
    most = max(1, GPUS // processes)
    if batch_size is None:
        return most
    share = batch_size // processes
    return next((n for n in range(most, 1, -1) if share % n == 0 and share > n), 1)
