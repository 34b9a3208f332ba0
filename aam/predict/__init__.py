"""What a trained model says of samples: predictions in the target's own units, and vectors."""

from aam.predict.job import Found, Predictions, predict
from aam.predict.output import check_outputs, write_found, write_predictions
from aam.predict.samples import predict_samples
from aam.predict.table import source_of

__all__ = [
    "Found",
    "Predictions",
    "check_outputs",
    "predict",
    "predict_samples",
    "source_of",
    "write_found",
    "write_predictions",
]
