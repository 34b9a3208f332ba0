"""What a model has to beat: simple models of scikit-learn on the same samples, at fixed settings.

None is tuned, none reads sequences or the tree, and all take the reads of the whole table, unrarefied, unless they are
to have what a model sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, get_args

import numpy as np
from scipy import sparse
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aam.config import Baseline, DataContract
from aam.data.composition import centred_log_ratios
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW, draw_sample

_OF_NUMBERS = {"mean", "median", "ridge", "random_forest_third", "random_forest_median"}
_OF_CLASSES = {"majority", "logistic"}
_CONSTANT = ("mean", "median", "majority")
TOP_FEATURES = 500
"""Most prevalent ASVs, which the linear models and gradient boosting are given."""
RIDGE_PENALTIES = np.logspace(-2, 5, 15)
"""Of which RidgeCV takes the best by leave-one-out."""


def baseline_names(*, classifier: bool) -> tuple[str, ...]:
    """Names of the baselines for classes, or for a number.

    `depth` knows how many reads a sample has, and no microbe: what it can predict may be the sequencing's doing.
    `random_forest` looks at the square root of the number of ASVs for each split, `random_forest_third` at a third;
    `random_forest_median` is the former, but says the median of what its leaves hold, where the others say a mean.
    """
    return tuple(name for name in get_args(Baseline) if name not in (_OF_NUMBERS if classifier else _OF_CLASSES))


def reads_of(
    dataset: PreparedDataset, sample_ids: Sequence[str], contract: DataContract | None = None
) -> sparse.csr_array:
    """Reads of samples: int64 [n, ASVs].

    Parameters
    ----------
    dataset : PreparedDataset
        Holds the samples.
    sample_ids : sequence of str
        Which of them.
    contract : DataContract, optional
        How a model draws them, to have the reads that it sees in validation and prediction; all reads without.
    """
    cells = [dataset.sample(dataset.row[sample]) for sample in sample_ids]
    if contract is not None:
        cells = [draw_sample(*cell, s, contract, FIXED_DRAW) for cell, s in zip(cells, sample_ids, strict=True)]
    # Trees take 32-bit indices only.
    offsets = np.cumsum([0, *(len(asvs) for asvs, _ in cells)], dtype=np.int32)
    asvs, reads = (np.concatenate(parts) for parts in zip(*cells, strict=True))
    return sparse.csr_array((reads.astype(np.int64), asvs, offsets), shape=(len(cells), len(dataset.sequences)))


def fit_predict(
    name: str,
    train_x: sparse.csr_array,
    train_y: np.ndarray,
    other_x: sparse.csr_array,
    *,
    classes: tuple[str, ...] = (),
    balanced: bool = False,
    seed: int = 0,
    jobs: int | None = None,
) -> np.ndarray:
    """Train a baseline, and predict other samples.

    Parameters
    ----------
    name : str
        One of `baseline_names`.
    train_x, other_x : csr_array of int [n, ASVs]
        Reads, as of `reads_of`.
    train_y : ndarray [n]
        Numbers, or names of classes.
    classes : tuple of str
        All classes in the order wanted; empty for a number.
    balanced : bool
        Classes weigh inversely to their frequency, as with `--class-weights balanced`.
    seed : int
        Of the forest.
    jobs : int, optional
        CPU cores that the forest may use; -1 for all. Boosting takes `OMP_NUM_THREADS`, or all.

    Returns
    -------
    ndarray of float64
        Numbers [n], or probabilities [n, classes]; 0 for a class that no training sample has.
    """
    assert name in baseline_names(classifier=bool(classes)), name
    train, other = _features(name, train_x, other_x)
    model = _model(name, bool(classes), "balanced" if balanced else None, seed, jobs).fit(train, train_y)
    if not classes:
        return np.asarray(model.predict(other), dtype=np.float64)
    known = model.predict_proba(other)
    probabilities = np.zeros((len(known), len(classes)))
    probabilities[:, [classes.index(known_class) for known_class in model.classes_]] = known
    return probabilities


def _relative(reads: sparse.csr_array) -> sparse.csr_array:
    shares = reads.data / np.repeat(np.asarray(reads.sum(axis=1)), np.diff(reads.indptr))
    return sparse.csr_array((shares.astype(np.float32), reads.indices, reads.indptr), shape=reads.shape)


def _features(name: str, train: sparse.csr_array, other: sparse.csr_array) -> tuple[Any, Any]:
    """Features of the training samples and of the others; which ASVs they are of is for the former to say."""
    if name in _CONSTANT:
        return train, other  # not looked at
    if name == "depth":
        return np.log(train.sum(axis=1))[:, None], np.log(other.sum(axis=1))[:, None]
    if name.startswith("random_forest"):
        return _relative(train), _relative(other)
    prevalence = np.asarray(train.astype(bool).sum(axis=0))
    top = np.argsort(-prevalence, kind="stable")[:TOP_FEATURES]
    if name == "gradient_boosting":  # takes no sparse matrix
        return _relative(train)[:, top].toarray(), _relative(other)[:, top].toarray()
    return centred_log_ratios(train[:, top].toarray()), centred_log_ratios(other[:, top].toarray())


def _model(name: str, classifier: bool, class_weight: str | None, seed: int, jobs: int | None) -> Any:
    """An estimator with its fixed settings."""
    weights: dict[str, Any] = {"class_weight": class_weight} if classifier else {}
    if name in _CONSTANT:
        return DummyClassifier(strategy="prior") if classifier else DummyRegressor(strategy=name)
    if name == "ridge":
        return make_pipeline(StandardScaler(), RidgeCV(alphas=RIDGE_PENALTIES))
    if name == "logistic":
        return make_pipeline(StandardScaler(), LogisticRegression(C=0.001, max_iter=2000, **weights))
    if name == "gradient_boosting":
        boosting = HistGradientBoostingClassifier if classifier else HistGradientBoostingRegressor
        return boosting(max_iter=300, learning_rate=0.05, random_state=seed, **weights)
    forest: Any = RandomForestClassifier if classifier else RandomForestRegressor
    forest = _MedianForest if name == "random_forest_median" else forest
    least = 5 if name == "depth" else 1  # of one feature, a tree would learn each sample by heart
    looked_at = 1 / 3 if name == "random_forest_third" else "sqrt"
    return forest(
        n_estimators=500, max_features=looked_at, min_samples_leaf=least, random_state=seed, n_jobs=jobs, **weights
    )


class _MedianForest(RandomForestRegressor):
    """Says the weighted median of the training samples in the leaves of a sample (Meinshausen 2006, JMLR 7)."""

    def fit(self, X: Any, y: np.ndarray) -> Self:
        super().fit(X, y)
        self.targets_, self.leaves_ = np.asarray(y, dtype=np.float64), self.apply(X)
        return self

    def predict(self, X: Any) -> np.ndarray:
        *first, nodes = np.cumsum([0, *(tree.tree_.node_count for tree in self.estimators_)])
        weights = shared_leaves(self.apply(X) + first, self.leaves_ + first, nodes)
        return weighted_quantile(self.targets_, weights, 0.5)


def shared_leaves(leaves_nT: np.ndarray, leaves_mT: np.ndarray, nodes: int) -> np.ndarray:
    """How much each training sample counts for each sample, by the leaves they share: float64 [n, m], rows sum to 1.

    Parameters
    ----------
    leaves_nT, leaves_mT : ndarray of int
        Leaf of each sample, and of each training sample, in each tree; no leaf is of two trees.
    nodes : int
        Of all trees.
    """

    def one_hot(leaves: np.ndarray) -> sparse.csr_matrix:
        n, T = leaves.shape
        return sparse.csr_matrix((np.ones(n * T), leaves.ravel(), np.arange(0, n * T + 1, T)), (n, nodes))

    own, theirs = one_hot(leaves_nT), one_hot(leaves_mT)
    sizes = np.maximum(np.asarray(theirs.sum(axis=0)).ravel(), 1)
    return sparse.csr_matrix(own @ sparse.diags(1 / sizes) @ theirs.T).toarray() / leaves_mT.shape[1]


def weighted_quantile(values: np.ndarray, weights: np.ndarray, quantile: float) -> np.ndarray:
    """Lowest value up to which there is the share `quantile` of the weight.

    Parameters
    ----------
    values : ndarray of float64 [m]
        Targets of the training samples.
    weights : ndarray of float64 [n, m]
        Rows sum to 1.
    quantile : float
        Above 0, below 1.

    Returns
    -------
    ndarray of float64 [n]
    """
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[:, order], axis=1)
    return values[order][(reached >= quantile * reached[:, -1:]).argmax(axis=1)]
