"""For the workers of `pool`."""

import os
import signal
import time


class Slow:
    """A decoder on which everything waits, from the second batch on."""

    def __init__(self, read, kill):
        self.read, self.kill = read, kill

    def __call__(self, index):
        if index >= 5 and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60 * (index >= 5))
        return self.read(index)


class Stuck:
    """A decoder that doesn't get on with one image, and with all others does."""

    def __init__(self, read, index):
        self.read, self.index = read, index

    def __call__(self, index):
        time.sleep(60 * (index == self.index))
        return self.read(index)
