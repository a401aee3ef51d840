"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable

from contrastile.normalizer import BatchLogNormalizer, StochasticLogNormalizerMemory
from contrastile.prototypes import PrototypeLogNormalizer
from contrastile.sweeping_normalizers import QueueLogNormalizer

from examples.synthetic.global_losses import FastCLIP, ISogCLR, SogCLR
from examples.synthetic.methods import DCL, Gamma, GammaByEmbedding, InfoNCE, Method
from examples.synthetic.moco import MoCo
from examples.synthetic.problem import LATENT

MethodOf = Callable[[int, int], Method]  # of runs and samples

# What examples/results/synthetic.json and the pages about it hold.
SWEPT: dict[str, MethodOf] = {
    "InfoNCE": lambda runs, samples: InfoNCE(),
    "DCL": lambda runs, samples: DCL(),
    "SogCLR": SogCLR,
    "gamma, no memory": lambda runs, samples: Gamma(runs, samples, normalizer=BatchLogNormalizer()),
    "gamma, mean": Gamma,
    "gamma, sampled": lambda runs, samples: Gamma(runs, samples, sampled=True),
    "gamma, lagged": lambda runs, samples: Gamma(runs, samples, mode="lagged"),
}

METHODS: dict[str, MethodOf] = {
    **SWEPT,
    "gamma, prototypes": lambda runs, samples: GammaByEmbedding(
        runs, samples, lambda: PrototypeLogNormalizer(16, LATENT)
    ),
    "gamma, one average": lambda runs, samples: GammaByEmbedding(
        runs, samples, lambda: PrototypeLogNormalizer(1, LATENT, window=128)
    ),
    "gamma, queue": lambda runs, samples: GammaByEmbedding(runs, samples, lambda: QueueLogNormalizer(256, LATENT)),
    "gamma, log u": lambda runs, samples: Gamma(
        runs, samples, mode="lagged", normalizer=StochasticLogNormalizerMemory(runs * samples, update_rate=0.3)
    ),
    "MoCo": lambda runs, samples: MoCo(runs),
    "iSogCLR": ISogCLR,
    "FastCLIP": FastCLIP,
}
