"""Beside the network: boosted trees on the shares of single ASVs, among the features that its heads read of a sample.

Both are kept in one checkpoint and predict as one. Applying them needs NumPy and SciPy alone; only
`aam.ensemble.members` needs scikit-learn.
"""
