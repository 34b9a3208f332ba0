"""A trained model and samples: predictions in the target's own units, UniFrac without a tree, and vectors."""

from aam.predict.job import PredictionResult, Predictions, predict
from aam.predict.output import check_outputs, write_predictions, write_result
from aam.predict.samples import predict_samples
from aam.predict.table import source_of

__all__ = [
    "PredictionResult",
    "Predictions",
    "check_outputs",
    "predict",
    "predict_samples",
    "source_of",
    "write_predictions",
    "write_result",
]
