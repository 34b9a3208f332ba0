"""Beside the network: two forests, boosted trees and a linear model on ASVs and on groups of similar ones.

The groups are those of a hierarchical clustering of the ASV vectors that stage 1 learned, so that ASVs which no
training sample has find their group, and no tree is needed to predict. All are kept in one checkpoint and predict as
one. Applying them needs NumPy and SciPy alone; only `aam.ensemble.members` needs scikit-learn.
"""
