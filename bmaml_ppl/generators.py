"""The states of torch's random number generators, put back after use."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

__all__ = ["rewound", "seeded"]


def rewound(device: torch.device) -> AbstractContextManager[None]:
    """Puts torch's generators back after the block, so that what comes next makes the same draws."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators for the block and puts their states back afterwards."""
    with rewound(device):
        # Not torch.manual_seed: it seeds every GPU, and only `device` is put back.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
