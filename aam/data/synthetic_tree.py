"""A random phylogeny, and sequences and niches that evolve along it: the ASVs of the synthetic data."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NUCLEOTIDES = np.frombuffer(b"ACGT", dtype=np.uint8)


@dataclass(frozen=True)
class Phylogeny:
    """A rooted binary tree in flat arrays; a parent comes before its children, the root is node 0."""

    parent: np.ndarray
    """int64 [nodes], -1 for the root."""
    duration: np.ndarray
    """Clock time of the edge above each node; every tip is at time 1."""
    length: np.ndarray
    """Substitutions per site on the edge above each node."""
    tips: np.ndarray
    """int64 [asvs], the nodes without children."""

    def generations(self) -> list[np.ndarray]:
        """Give the nodes below the root, all that are equally many edges away from it at a time."""
        level = np.zeros(len(self.parent), dtype=np.int64)
        for node in range(1, len(level)):
            level[node] = level[self.parent[node]] + 1
        order = np.argsort(level, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(level[order])) + 1)[1:]


class Niches(NamedTuple):
    """What ASVs need; each array has a row per ASV, and relatives have similar rows."""

    optimum: np.ndarray
    """Where on the gradient, 0 to 1, it does best."""
    width: np.ndarray
    """How far from there it still does well (one standard deviation)."""
    base: np.ndarray
    """How well it does anywhere."""
    site: np.ndarray
    """[asvs, sites], how well it does in each site."""


def birth_tree(tips: int, root_to_tip: float, rng: np.random.Generator) -> Phylogeny:
    """Draw a pure birth (Yule) tree whose edges run at different rates, `root_to_tip` long on average."""
    nodes = 2 * tips - 1
    parent = np.full(nodes, -1, dtype=np.int64)
    born, ended = np.zeros(nodes), np.zeros(nodes)
    # Each of k lineages is equally likely to split next, after a time of mean 1 / k; the last ends today.
    waits = rng.standard_exponential(tips) / np.arange(1, tips + 1)
    waits[0] = 0.0
    now, alive = 0.0, [0]
    for k in range(1, tips):
        now += waits[k - 1]
        place = int(rng.integers(k))
        split, children = alive[place], (2 * k - 1, 2 * k)
        ended[split] = now
        for child in children:
            parent[child], born[child] = split, now
        alive[place] = children[0]
        alive.append(children[1])
    ended[alive] = now + waits[-1]
    duration = (ended - born) / ended.max()
    rate = np.exp(rng.normal(-0.045, 0.3, nodes))  # mean 1: lineages keep different clocks
    return Phylogeny(parent, duration, duration * rate * root_to_tip, np.sort(np.array(alive)))


def evolve_traits(tree: Phylogeny, traits: int, pull: float, rng: np.random.Generator) -> np.ndarray:
    """Evolve traits along the tree and give them at the tips: [asvs, traits], each about standard normal.

    An Ornstein-Uhlenbeck process: tips that parted a time t ago correlate by exp(-2 * pull * t), so that
    relatives are alike and strangers are independent, however large the tree is.
    """
    values = rng.standard_normal((len(tree.parent), traits))
    kept = np.exp(-pull * tree.duration)[:, None]
    for nodes in tree.generations():
        kept_here = kept[nodes]
        values[nodes] = kept_here * values[tree.parent[nodes]] + np.sqrt(1 - kept_here**2) * values[nodes]
    return values[tree.tips]


def evolve_niches(tree: Phylogeny, sites: int, rng: np.random.Generator) -> Niches:
    """Evolve the niches of the tips; the optima spread evenly over the gradient, whatever tree was drawn."""
    optimum, width, base, *site = evolve_traits(tree, 3 + sites, 0.6, rng).T
    rank = np.argsort(np.argsort(optimum, kind="stable"), kind="stable")
    # A bit past both ends, so that the ends have as many ASVs around them as the middle.
    optimum = 1.2 * (rank + 0.5) / len(rank) - 0.1
    return Niches(optimum, 0.22 * np.exp(0.3 * width), base, np.stack(site, axis=1))


def evolve_sequences(tree: Phylogeny, length: int, rng: np.random.Generator) -> list[str]:
    """Evolve nucleotides by Jukes and Cantor's model with conserved and variable regions; tips differ."""
    rate = site_rates(length, rng)
    bases = np.empty((len(tree.parent), length), dtype=np.uint8)
    bases[0] = rng.integers(4, size=length)
    for nodes in tree.generations():
        expected = tree.length[nodes, None] * rate
        changed = rng.random(expected.shape) < 0.75 * -np.expm1(-4 / 3 * expected)
        shift = rng.integers(1, 4, size=changed.shape, dtype=np.uint8)
        bases[nodes] = (bases[tree.parent[nodes]] + shift * changed) % 4
    tips = make_distinct(bases[tree.tips], rate, rng)
    return [row.tobytes().decode() for row in NUCLEOTIDES[tips]]


def site_rates(length: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a rate for each site, mean 1: neighbouring sites are alike, as the loops and stems of 16S are."""
    window = np.hanning(13)[1:-1]
    noise = rng.standard_normal(length + len(window) - 1)
    smooth = np.convolve(noise, window / np.linalg.norm(window), "valid")
    rate = np.exp(0.9 * smooth + 0.6 * rng.standard_normal(length))
    return rate / rate.mean()


def make_distinct(bases: np.ndarray, rate: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change one site of every tip that repeats an earlier one, until none does: an ASV is its sequence."""
    bases = bases.copy()
    while True:
        _, first = np.unique(bases, axis=0, return_index=True)
        repeats = np.setdiff1d(np.arange(len(bases)), first)
        if not len(repeats):
            return bases
        sites = rng.choice(len(rate), size=len(repeats), p=rate / rate.sum())
        shift = rng.integers(1, 4, size=len(repeats), dtype=np.uint8)
        bases[repeats, sites] = (bases[repeats, sites] + shift) % 4


def to_newick(tree: Phylogeny, names: list[str]) -> str:
    """Write the tree in newick form, tip i named `names[i]`, without labels on the inner nodes."""
    text = [""] * len(tree.parent)
    for tip, name in zip(tree.tips, names, strict=True):
        text[tip] = name
    inner: list[list[str]] = [[] for _ in text]
    for node in range(len(text) - 1, 0, -1):
        # Children come after their parent, so that by now all of this node's own children are written.
        label = text[node] or f"({','.join(inner[node])})"
        inner[node] = []
        inner[tree.parent[node]].append(f"{label}:{tree.length[node]:.6f}")
    return f"({','.join(inner[0])});\n"
