"""A synthetic amplicon study: communities that follow one environmental gradient, a phylogeny, and metadata.

It stands in for real data in the demo, the tests and the benchmarks, at any size. Nothing here is as large as
samples x ASVs: every sample is drawn on its own and kept sparse.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import biom
import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import ndtri

from aam.data.synthetic_tree import Niches, birth_tree, evolve_niches, evolve_sequences, to_newick

GENERATOR_VERSION = 1  # raise it when the same settings come to give other data
SITES = ("gut", "skin", "soil")
MISSING = "not collected"

# How strongly things decide whether an ASV lives at a place (log scale; luck has a deviation of 1.3).
# With these UniFrac, richness and what a random forest reaches come out as in published studies of the gut.
BASE_EFFECT, SITE_EFFECT, SUBJECT_EFFECT = 3.0, 2.0, 1.0
TARGET_NOISE = 9.0  # in units of the target, in which the gradient spans 70


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What to generate; the same settings always give the same data."""

    samples: int = 200
    """Number of samples."""
    subjects: int = 40
    """Number of subjects that the samples are taken from; each has at least one sample, some have many."""
    asvs: int = 1000
    """Number of distinct ASVs, all of which are tips of the tree and have reads."""
    length: int = 120
    """Length of the sequences in nucleotides (real tables have 100 to 150)."""
    seed: int = 0
    """Seed of everything that is drawn."""
    median_depth: int = 10_000
    """Median number of reads per sample; depths are log-normal, about 2 % are below a tenth of it."""
    median_richness: int = 160
    """Median number of ASVs that live at a place, at most a quarter of all; shallow samples miss some."""
    root_to_tip: float = 0.22
    """Depth of the tree in substitutions per site; 0.22 makes unrelated ASVs differ at 25 to 35 %."""
    missing_share: float = 0.03
    """Share of samples whose target is written as "not collected"."""

    def __post_init__(self):
        for name in ("samples", "subjects", "median_depth", "median_richness", "root_to_tip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}.")
        if self.samples < self.subjects:
            raise ValueError(
                f"samples ({self.samples}) must be at least subjects ({self.subjects}): each has one or more."
            )
        if self.asvs < 20:
            raise ValueError(f"asvs must be at least 20, found {self.asvs}.")
        if self.length < 20:
            raise ValueError(f"length must be at least 20 nucleotides, found {self.length}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, found {self.seed}.")
        if not 0 <= self.missing_share < 1:
            raise ValueError(f"missing_share must be in [0, 1), found {self.missing_share}.")


class SyntheticDataset(NamedTuple):
    """The generated study, in memory; rows of `counts` are samples, columns are ASVs."""

    config: SyntheticConfig
    sample_ids: list[str]
    sequences: list[str]
    counts: sparse.csr_array
    newick: str
    metadata: pd.DataFrame
    niche_optimum: np.ndarray
    """Where on the gradient (0 to 1) each ASV does best: the truth behind the data, not written to files."""


class Places(NamedTuple):
    """Where the samples were taken: the truth behind the metadata."""

    subject: np.ndarray
    """int64 [samples], ascending."""
    position: np.ndarray
    """[samples], on the gradient, 0 to 1."""
    mixture: np.ndarray
    """[samples, sites], how much of each site a place holds."""


def generate(config: SyntheticConfig) -> SyntheticDataset:
    """Generate the study in memory."""
    for_tree, for_sequences, for_niches, for_places, for_reads = np.random.default_rng(config.seed).spawn(5)
    tree = birth_tree(config.asvs, config.root_to_tip, for_tree)
    sequences = evolve_sequences(tree, config.length, for_sequences)
    niches = evolve_niches(tree, len(SITES), for_niches)
    places, metadata = draw_places(config, for_places)
    counts = draw_counts(config, niches, places, for_reads)
    return SyntheticDataset(
        config=config,
        sample_ids=list(metadata.index),
        sequences=sequences,
        counts=counts,
        newick=to_newick(tree, sequences),
        metadata=metadata,
        niche_optimum=niches.optimum,
    )


def draw_places(config: SyntheticConfig, rng: np.random.Generator) -> tuple[Places, pd.DataFrame]:
    """Draw where the samples were taken, and the metadata that tell of it, all text.

    Ids are numbers with leading and trailing zeros ("0001.10"), which a careless reader turns into 1.1.
    """
    n = config.samples
    extra = rng.multinomial(n - config.subjects, rng.dirichlet(np.full(config.subjects, 3.0)))
    subject = np.repeat(np.arange(config.subjects), 1 + extra)
    visit = np.concatenate([np.arange(size) for size in 1 + extra])
    position = rng.uniform(0, 1, config.subjects)[subject] + rng.normal(0, 0.15, n)
    position = position.clip(0, 1)
    site = rng.integers(len(SITES), size=n)
    # A place is mostly what its name says, but holds something of the other sites too: the classes overlap.
    own_share = rng.beta(3.5, 2, (n, 1))
    mixture = own_share * np.eye(len(SITES))[site] + (1 - own_share) * rng.dirichlet(np.ones(len(SITES)), n)
    # The span leaves room for noise at both ends: few values are cut off at 0 and 100.
    measured = np.clip(15 + 70 * position + rng.normal(0, TARGET_NOISE, n), 0, 100)
    measured = [f"{value:.2f}" for value in measured]
    if config.missing_share:
        for row in rng.choice(n, size=max(1, round(config.missing_share * n)), replace=False):
            measured[row] = MISSING
    names = [f"{s + 1:04d}" for s in subject]
    digits = max(2, len(str(visit.max() + 1)))
    ids = [f"{s}.{v + 1:0{digits}d}" for s, v in zip(names, visit, strict=True)]
    columns = {
        "subject": names,
        "visit": [str(v + 1) for v in visit],
        "gradient": measured,
        "site": [SITES[s] for s in site],
        "plate": [f"plate-{p + 1}" for p in rng.integers(4, size=n)],
    }
    return Places(subject, position, mixture), pd.DataFrame(columns, index=pd.Index(ids, name="sample-id"))


def draw_counts(config: SyntheticConfig, niches: Niches, places: Places, rng: np.random.Generator) -> sparse.csr_array:
    """Draw the reads of each sample: which ASVs live there, how abundant they are, what the sequencer saw."""
    n, asvs = config.samples, config.asvs
    depth = np.round(lognormal_quantiles(config.median_depth, 1.1, n, rng)).clip(1).astype(np.int64)
    living = lognormal_quantiles(min(config.median_richness, asvs / 4), 0.75, n, rng)
    living = np.clip(np.round(living), 5, asvs // 2).astype(np.int64)
    spread = lognormal_quantiles(1.5, 0.4, n, rng)  # some communities are even, some ruled by a few
    best, best_sample = np.full(asvs, -np.inf), np.zeros(asvs, dtype=np.int64)
    columns, reads, own = [], [], np.empty(0)
    for i in range(n):
        if i == 0 or places.subject[i] != places.subject[i - 1]:
            own = rng.standard_normal(asvs, dtype=np.float32)
        distance = (places.position[i] - niches.optimum) / niches.width
        fitness = BASE_EFFECT * niches.base + SITE_EFFECT * niches.site @ places.mixture[i]
        fitness += SUBJECT_EFFECT * own - 0.5 * distance**2
        better = fitness > best
        best[better], best_sample[better] = fitness[better], i
        # Who arrives first, at rates exp(fitness), lives there: a weighted draw without replacement.
        arrival = rng.standard_exponential(asvs, dtype=np.float32) * np.exp(-fitness)
        present = np.sort(np.argpartition(arrival, living[i])[: living[i]])
        abundance = np.exp(0.7 * fitness[present] + spread[i] * rng.standard_normal(len(present)))
        seen = rng.multinomial(depth[i], abundance / abundance.sum())
        columns.append(present[seen > 0])
        reads.append(seen[seen > 0])
    # A table lists only what was seen, so an ASV without reads gets one where it would have done best.
    unseen = np.setdiff1d(np.arange(asvs), np.concatenate(columns))
    rows = np.concatenate([np.repeat(np.arange(n), [len(c) for c in columns]), best_sample[unseen]])
    values = np.concatenate([*reads, np.ones(len(unseen), dtype=np.int64)])
    return sparse.coo_array((values, (rows, np.concatenate([*columns, unseen]))), shape=(n, asvs)).tocsr()


def lognormal_quantiles(median: float, sigma: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Give n log-normal values at even quantiles, shuffled: so a small study has the extremes too."""
    return median * np.exp(sigma * ndtri((rng.permutation(n) + 0.5) / n))


def write(dataset: SyntheticDataset, folder: Path) -> None:
    """Write table.biom, tree.nwk, metadata.tsv, README.md and the settings (config.json) into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    by_asv = sparse.csr_matrix(dataset.counts.T, dtype=np.float64)  # biom knows no sparse arrays yet
    table = biom.Table(by_asv, dataset.sequences, dataset.sample_ids)
    with h5py.File(folder / "table.biom", "w") as file:
        # A fixed date: the same settings give the same bytes, hence the same key in caches.
        table.to_hdf5(file, "aam.data.synthetic", creation_date=datetime(2020, 1, 1))
    (folder / "tree.nwk").write_text(dataset.newick)
    dataset.metadata.to_csv(folder / "metadata.tsv", sep="\t")
    (folder / "README.md").write_text(readme(dataset))
    (folder / "config.json").write_text(stamp(dataset.config))


def stamp(config: SyntheticConfig) -> str:
    """Give what the data depends on, as kept beside it."""
    return json.dumps({"generator_version": GENERATOR_VERSION, **asdict(config)}, indent=2) + "\n"


def readme(dataset: SyntheticDataset) -> str:
    """Say what the files hold and that nobody measured it."""
    config, counts = dataset.config, dataset.counts
    settings = "\n".join(f"- `{f.name}`: {getattr(config, f.name)}" for f in fields(config))
    return f"""# SYNTHETIC data

Nothing here was measured. `python -m aam.data.synthetic` (generator version {GENERATOR_VERSION}) drew it
from seed {config.seed}.

- `table.biom`: {config.samples} samples x {config.asvs} ASVs of {config.length} nt; ids are the sequences.
  Reads per sample: {spanned(counts.sum(axis=1))}. ASVs per sample: {spanned(np.diff(counts.indptr))}.
- `tree.nwk`: a rooted tree over exactly these sequences.
- `metadata.tsv`: `subject` ({config.subjects} of them, with repeated samples: split by it), `visit`,
  `gradient` (regression target, 0 to 100, noisy; some are "{MISSING}"), `site` (3 overlapping classes),
  `plate` (means nothing).

How: a birth tree with rate variation; sequences evolved along it (Jukes-Cantor, conserved and variable
regions); niches on one gradient and in three sites that evolve along it too, so that relatives live alike;
each sample draws its ASVs by fitness, log-normal abundances with an effect of the subject, and its reads.

Settings:

{settings}
"""


def spanned(values: np.ndarray) -> str:
    """Write the range and the median of whole numbers."""
    return f"{values.min()} to {values.max()}, median {np.median(values):.0f}"


def ensure(folder: Path, config: SyntheticConfig) -> Path:
    """Write the study into the folder unless it is there already; another study there is an error."""
    folder = Path(folder)
    if is_written(folder, config):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(generate(config), temporary)
        temporary.chmod(0o755)  # mkdtemp keeps the folder from others, who may well read it
        os.replace(temporary, folder)
    except OSError:
        # Another process may have put the same study there meanwhile.
        if not is_written(folder, config):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def is_written(folder: Path, config: SyntheticConfig) -> bool:
    """Tell whether the folder holds this study; refuse a folder that holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    kept = folder / "config.json"
    if kept.is_file() and kept.read_text() == stamp(config):
        return True
    raise ValueError(
        f"{folder} exists and is not the synthetic data set asked for (other settings or other files). "
        "Delete it, or give another folder."
    )


def main() -> None:
    """Write a study from the command line."""
    import tyro

    def command(config: tyro.conf.OmitArgPrefixes[SyntheticConfig], output: Path) -> None:
        """Generate a synthetic amplicon study: table.biom, tree.nwk and metadata.tsv.

        Parameters
        ----------
        config
            What to generate.
        output
            Folder to write; if it already holds this very study, nothing is done.
        """
        try:
            print(ensure(output, config))
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None

    tyro.cli(command, prog="python -m aam.data.synthetic")


if __name__ == "__main__":
    main()
