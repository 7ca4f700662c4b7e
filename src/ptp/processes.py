"""Which of several processes this is, as torchrun and accelerate tell each of theirs."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process among all, from 0; 0 where there is one."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def leave() -> None:
    """Close the connections to the other processes, if there are any.

    One that ends with them open may abort, or have another fail.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
