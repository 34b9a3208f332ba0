"""Which reads and ASVs of a sample the model sees: rarefaction and truncation, as pure functions.

A draw depends on the seed, the epoch and the sample's id alone, so every worker, a resumed run and a later
prediction make the same one without talking to each other.
"""

from __future__ import annotations

import hashlib

import numpy as np

from aam.config import DataContract

FIXED_DRAW = 0
"""The epoch of the one draw that validation and prediction use; training epochs count from 1."""


def generator(*key: int | str) -> np.random.Generator:
    """Random generator for a key, the same on every machine.

    Parameters
    ----------
    *key : int or str
        For instance seed, epoch and sample id.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def draw_sample(
    asvs: np.ndarray, counts: np.ndarray, sample_id: str, contract: DataContract, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rarefy a sample and keep at most `token_limit` of its ASVs.

    Parameters
    ----------
    asvs : ndarray of int [n]
        ASVs of the sample, ascending.
    counts : ndarray of int [n]
        Their reads, none 0.
    sample_id : str
        Part of the key of the draw.
    contract : DataContract
        Depth, token limit and seed.
    epoch : int
        Training epoch from 1, or `FIXED_DRAW`.

    Returns
    -------
    asvs, counts : ndarray
        The ASVs that were drawn, ascending, and their reads.
    """
    rng = generator(contract.seed, epoch, sample_id)
    if contract.rarefy_depth:
        drawn = rng.multivariate_hypergeometric(counts.astype(np.int64), contract.rarefy_depth, method="marginals")
        kept = np.flatnonzero(drawn)
        asvs, counts = asvs[kept], drawn[kept]
    if len(asvs) > contract.token_limit:
        kept = np.sort(_choose(counts, contract, rng))
        asvs, counts = asvs[kept], counts[kept]
    return asvs, counts


def _choose(counts: np.ndarray, contract: DataContract, rng: np.random.Generator) -> np.ndarray:
    if contract.token_choice == "abundance":
        return np.argsort(-counts, kind="stable")[: contract.token_limit]
    if contract.token_choice == "random":
        return rng.choice(len(counts), contract.token_limit, replace=False)
    return np.arange(contract.token_limit)
