"""Beside the network: a forest and boosted trees on the features that its heads read of a sample.

All are kept in one checkpoint and predict as one. Applying them needs NumPy and SciPy alone; only
`aam.ensemble.members` needs scikit-learn.
"""
