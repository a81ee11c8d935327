"""Random generators: one seed in, as many independent streams out as there are workers."""

import numpy as np
import torch


def seed_everything(seed: int, num_generators: int) -> list[np.random.Generator]:
    """Seed torch's global generator and return `num_generators` independent numpy generators.

    All of them are spawned from one `numpy.random.SeedSequence`, so that no two of them, and no two seeds, share a
    stream. The i-th generator does not depend on how many there are.

    Args:
        seed: at least 0.
        num_generators: how many generators to return.
    """
    torch.manual_seed(seed)
    return [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(num_generators)]
