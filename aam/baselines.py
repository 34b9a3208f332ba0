"""What a model has to beat: simple models of scikit-learn on the same samples, at fixed settings.

None is tuned, none reads sequences or the tree, and all take the reads of the whole table, unrarefied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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

from aam.data.composition import centred_log_ratios
from aam.data.dataset import PreparedDataset

BASELINES_REGRESSION = ("mean", "depth", "ridge", "random_forest", "gradient_boosting")
BASELINES_CLASSES = ("majority", "depth", "logistic", "random_forest", "gradient_boosting")
"""`depth` knows how many reads a sample has, and no microbe: what it can predict may be the sequencing's doing."""

TOP_FEATURES = 500
"""Most prevalent ASVs, which the linear models and gradient boosting are given."""
RIDGE_PENALTIES = np.logspace(-2, 5, 15)
"""Of which RidgeCV takes the best by leave-one-out."""


def baseline_names(*, classifier: bool) -> tuple[str, ...]:
    """Names of the baselines for classes, or for a number."""
    return BASELINES_CLASSES if classifier else BASELINES_REGRESSION


def reads_of(dataset: PreparedDataset, sample_ids: Sequence[str]) -> sparse.csr_array:
    """Reads of samples, unrarefied: int64 [n, ASVs]."""
    cells = [dataset.sample(dataset.row[sample]) for sample in sample_ids]
    # Trees take 32-bit indices only.
    offsets = np.cumsum([0, *(len(asvs) for asvs, _ in cells)], dtype=np.int32)
    asvs, reads = (np.concatenate(parts) for parts in zip(*cells, strict=True))
    return sparse.csr_array((reads, asvs, offsets), shape=(len(cells), len(dataset.sequences)))


def relative_abundances(dataset: PreparedDataset, sample_ids: Sequence[str]) -> sparse.csr_array:
    """Reads of each ASV over those of the sample, unrarefied: float32 [n, ASVs]."""
    return _relative(reads_of(dataset, sample_ids))


def fit_predict(
    name: str,
    train_x: sparse.csr_array,
    train_y: np.ndarray,
    other_x: sparse.csr_array,
    *,
    classes: tuple[str, ...] = (),
    seed: int = 0,
    jobs: int | None = None,
) -> np.ndarray:
    """Train a baseline, and predict other samples.

    Parameters
    ----------
    name : str
        One of `BASELINES_REGRESSION`; with classes, of `BASELINES_CLASSES`.
    train_x, other_x : csr_array of int [n, ASVs]
        Reads, as of `reads_of`.
    train_y : ndarray [n]
        Numbers, or names of classes.
    classes : tuple of str
        All classes in the order wanted; empty for a number.
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
    model = _model(name, bool(classes), seed, jobs).fit(train, train_y)
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
    if name in ("mean", "majority"):
        return train, other  # not looked at
    if name == "depth":
        return np.log(train.sum(axis=1))[:, None], np.log(other.sum(axis=1))[:, None]
    if name == "random_forest":
        return _relative(train), _relative(other)
    prevalence = np.asarray(train.astype(bool).sum(axis=0))
    top = np.argsort(-prevalence, kind="stable")[:TOP_FEATURES]
    if name == "gradient_boosting":  # takes no sparse matrix
        return _relative(train)[:, top].toarray(), _relative(other)[:, top].toarray()
    return centred_log_ratios(train[:, top].toarray()), centred_log_ratios(other[:, top].toarray())


def _model(name: str, classifier: bool, seed: int, jobs: int | None) -> Any:
    """An estimator with its fixed settings."""
    if name in ("mean", "majority"):
        return DummyClassifier(strategy="prior") if classifier else DummyRegressor()
    if name == "ridge":
        return make_pipeline(StandardScaler(), RidgeCV(alphas=RIDGE_PENALTIES))
    if name == "logistic":
        return make_pipeline(StandardScaler(), LogisticRegression(C=0.001, max_iter=2000))
    if name in ("depth", "random_forest"):
        forest: Any = RandomForestClassifier if classifier else RandomForestRegressor
        least = 5 if name == "depth" else 1  # of one feature, a tree would learn each sample by heart
        return forest(n_estimators=500, max_features="sqrt", min_samples_leaf=least, random_state=seed, n_jobs=jobs)
    boosting = HistGradientBoostingClassifier if classifier else HistGradientBoostingRegressor
    return boosting(max_iter=300, learning_rate=0.05, random_state=seed)
