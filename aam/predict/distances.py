"""UniFrac and Faith's PD without a tree, from the clades and tips of samples; files that scikit-bio and QIIME 2 read.

Distances of n samples are computed and written in blocks of rows, so that the matrix never stands in memory.

Shape letters: n samples, b rows of a block, N ASVs of these samples one after the other, P clades.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array

from aam.config import DistanceMetric, UnifracMetric
from aam.data.files import replacing
from aam.model.clades import DISTANCES, Tips
from aam.predict.samples import SampleOutputs
from aam.training.checkpoint import Checkpoint
from aam.training.metrics import UNIFRAC_NAMES

GRAIN = 2.0**-30
"""Of the lengths of tips in samples: of multiples of it, float64 sums are exact in any order."""
BLOCK = 2**20
"""Distances of a block."""
_DIGITS = np.array([list(f"{number:03d}".encode()) for number in range(1000)], dtype=np.uint8)
_CELL = 9
"""Letters of a distance with its tab: 0.123456"""


def check_learned(loaded: Checkpoint, metric: UnifracMetric) -> None:
    """Refuse a metric that the clades of a model do not tell.

    Raises
    ------
    ValueError
        Says why they do not, and what to do.
    """
    spec = loaded.spec
    learned = [of.metric for of in spec.unifrac]
    if metric in learned:
        return
    name = UNIFRAC_NAMES[metric]
    if learned:
        other = next((of for of in learned if of != "faith_pd"), None)
        instead = f", or give --distance-metric {other}" if other is not None and metric != "faith_pd" else ""
        raise ValueError(
            f"{loaded.path}: {name} cannot be predicted, as stage 1 learned {', '.join(learned)} alone; pretrain with "
            f"--unifrac-metric {' '.join([*learned, metric])}{instead}"
        )
    if spec.predictor is not None and not spec.freeze_base:
        raise ValueError(
            f"{loaded.path}: {name} cannot be predicted, as the encoder learned the target alone, and its clades do "
            "not give UniFrac; give a stage 1 run, or train stage 2 on one with --freeze-base"
        )
    raise ValueError(
        f"{loaded.path}: {name} cannot be predicted, as stage 1 was trained without UniFrac (--base-weight 0); "
        f"pretrain with --base-weight 1 and --unifrac-metric {metric}"
    )


def check_ids(sample_ids: Sequence[str]) -> None:
    """Refuse ids that a distance matrix in text cannot hold.

    Raises
    ------
    ValueError
        Names one, and says what to do.
    """
    for sample in sample_ids:
        if sample.startswith("#") or sample != sample.strip() or any(sign in sample for sign in "\t\n\r"):
            raise ValueError(
                f"--distances: sample {sample!r} cannot stand in a distance matrix, where # begins a comment, a tab "
                "ends a cell, and spaces around an id are lost; give it another id in the table"
            )


def distance_blocks(
    outputs: SampleOutputs, lengths: np.ndarray, metric: DistanceMetric, *, rows: int | None = None
) -> Iterator[np.ndarray]:
    """Predicted UniFrac of some samples to all, block by block.

    Parameters
    ----------
    outputs : SampleOutputs
        Of all samples: presences for unweighted, shares for weighted UniFrac, and their ASVs with their tips.
    lengths : ndarray of float32 [P]
        Of the clades.
    metric : str
        unweighted or weighted.
    rows : int, optional
        Samples of a block. [default: as many as keep it below `BLOCK`]

    Yields
    ------
    ndarray of float32 [b, n]
        0 to 1; 0 where a sample meets itself; the same for both orders of a pair, to the last bit.
    """
    everyone = torch.from_numpy(outputs.presence if metric == "unweighted" else outputs.share)
    lengths_P = torch.from_numpy(lengths)
    tips = _SampleTips(outputs, metric)
    of_samples = torch.from_numpy(tips.total.astype(np.float32))
    step, done = rows or max(1, BLOCK // len(everyone)), 0
    for part in everyone.split(step):
        block = slice(done, done + len(part))
        common = np.stack([tips.common(row) for row in range(block.start, block.stop)])
        in_block = Tips(of_samples[block], of_samples, torch.from_numpy(common.astype(np.float32)))
        yield DISTANCES[metric](part, everyone, lengths_P, in_block).numpy()
        done = block.stop


class _SampleTips:
    """Lengths of the tips of samples, and of those that two have in common: the same for both orders of a pair."""

    def __init__(self, outputs: SampleOutputs, metric: DistanceMetric) -> None:
        self.ends = np.cumsum(outputs.richness)
        kinds, first, self.asv = np.unique(outputs.asvs, return_index=True, return_inverse=True)
        self.weight = np.ones(len(self.asv)) if metric == "unweighted" else outputs.abundance.astype(np.float64)
        # Of an ASV, one length: those of several batches differ by rounding.
        self.length = outputs.tip_lengths[first].astype(np.float64)[self.asv]
        sample = np.repeat(np.arange(len(self.ends)), outputs.richness)
        shape = (len(kinds), len(self.ends))
        self.samples_of = csr_array((self.weight, (self.asv, sample)), shape=shape)
        # Not np.add.reduceat, which fails where a sample is empty.
        self.total = np.bincount(sample, weights=_grains(self.length * self.weight), minlength=len(self.ends))

    def common(self, row: int) -> np.ndarray:
        """Lengths that a sample has in common with each, by the smaller weight of an ASV: float64 [n]."""
        own = slice(self.ends[row - 1] if row else 0, self.ends[row])
        others = self.samples_of[self.asv[own]]
        times = np.diff(others.indptr)
        smaller = np.minimum(others.data, np.repeat(self.weight[own], times))
        shared = _grains(np.repeat(self.length[own], times) * smaller)
        return np.bincount(others.indices, weights=shared, minlength=len(self.ends))


def _grains(lengths: np.ndarray) -> np.ndarray:
    return np.rint(lengths / GRAIN) * GRAIN


def distance_matrix(outputs: SampleOutputs, lengths: np.ndarray, metric: DistanceMetric) -> np.ndarray:
    """Predicted UniFrac of all pairs of a few thousand samples: float64 [n, n]; see `distance_blocks`."""
    return np.concatenate(list(distance_blocks(outputs, lengths, metric))).astype(np.float64)


def write_distances(path: Path, sample_ids: Sequence[str], blocks: Iterator[np.ndarray]) -> None:
    """Write a distance matrix as text that `skbio.DistanceMatrix.read` and `qiime tools import` take.

    Parameters
    ----------
    path : Path
        Tab separated: a row of ids that begins with a tab, then the id and the distances of each sample.
    sample_ids : sequence of str
        Of the rows, and of the columns.
    blocks : iterator of ndarray [b, n]
        The rows, in order.
    """
    ids = iter(sample_ids)
    with replacing(path) as part, part.open("wb") as file:
        file.write("".join(f"\t{sample}" for sample in sample_ids).encode() + b"\n")
        for block in blocks:
            for cells in _as_text(block):
                file.write(f"{next(ids)}\t".encode() + cells.tobytes())


def _as_text(distances: np.ndarray) -> np.ndarray:
    """Rows of distances with six decimals, as letters: uint8 [b, n * _CELL]."""
    # Letter by letter in numpy: a format string for each of 400 million distances takes ten minutes.
    assert np.isfinite(distances).all(), "a sample without any clade"
    millionths = np.rint(distances.astype(np.float64) * 1e6).astype(np.int64)
    text = np.empty((*distances.shape, _CELL), dtype=np.uint8)
    text[..., 0] = ord("0") + millionths // 1_000_000
    text[..., 1] = ord(".")
    text[..., 2:5] = _DIGITS[millionths // 1000 % 1000]
    text[..., 5:8] = _DIGITS[millionths % 1000]
    text[..., 8] = ord("\t")
    text[:, -1, 8] = ord("\n")
    return text.reshape(len(text), -1)


def write_faith_pd(path: Path, sample_ids: Sequence[str], values: np.ndarray) -> None:
    """Write Faith's PD of samples as metadata that QIIME 2 takes: columns sample-id, faith_pd."""
    rows = (f"{sample}\t{value:.6g}\n" for sample, value in zip(sample_ids, values.tolist(), strict=True))
    with replacing(path) as part:
        part.write_text("".join(["sample-id\tfaith_pd\n", *rows]))
