"""What a run leaves for people: metrics.jsonl, TensorBoard, pictures, validation predictions, a bar."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from aam.training.metrics import EpochArrays, class_probabilities
from aam.training.targets import Target
from aam.training.trackers import Tracker

VALIDATION = "validation_predictions.tsv"


class RunLog:
    """Logs of a run, by its first worker alone; the others hold one with `folder=None` that does nothing.

    Parameters
    ----------
    folder : Path or None
        The run folder.
    history : list of dict
        Metrics of the epochs already done, where a run is resumed: what was logged of later ones is redone.
    trackers : list of Tracker
        Where the metrics go as well.
    """

    def __init__(self, folder: Path | None, history: list[dict[str, float]], trackers: Sequence[Tracker] = ()) -> None:
        self.folder, self.writer, self.trackers = folder, None, trackers
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        done = int(history[-1]["epoch"]) if history else 0
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        with (folder / "metrics.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in history)

    def epoch(self, metrics: dict[str, float]) -> None:
        """Write the metrics of an epoch, at once: a run may be stopped without warning."""
        if self.folder is None or self.writer is None:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        for tag, value in metrics.items():
            if tag != "epoch":
                self.writer.add_scalar(tag, value, int(metrics["epoch"]))
        self.writer.flush()
        for tracker in self.trackers:
            tracker.log({tag: value for tag, value in metrics.items() if tag != "epoch"}, int(metrics["epoch"]))

    def histograms(self, model: nn.Module, gradients: dict[str, torch.Tensor], epoch: int) -> None:
        """Weights and gradients, by the names of the parameters.

        Parameters
        ----------
        model : nn.Module
            Not wrapped.
        gradients : dict of str to Tensor
            Of the epoch's last update, as they were before they were cleared.
        epoch : int
            From 1.
        """
        if self.writer is None:
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.writer.add_histogram(f"weights/{name}", parameter.detach().float().cpu(), epoch)
        for name, gradient in gradients.items():
            if gradient.isfinite().all():
                self.writer.add_histogram(f"gradients/{name}", gradient.float().cpu(), epoch)

    def best(self, arrays: EpochArrays, sample_ids: list[str], target: Target | None, epoch: int) -> None:
        """Pictures and validation predictions of an epoch that is the best so far."""
        if self.folder is None or self.writer is None:
            return
        if target is not None and arrays.target is not None and arrays.target_true is not None:
            write_validation(self.folder / VALIDATION, sample_ids, arrays, target)
        try:
            self._draw(self.folder / "figures", self.writer, arrays, target, epoch)
        except Exception as error:  # a disk that is full, a strange name: a run is none the worse without pictures
            print(f"note: pictures of epoch {epoch} could not be made: {type(error).__name__}: {error}", flush=True)

    def _draw(
        self, folder: Path, writer: SummaryWriter, arrays: EpochArrays, target: Target | None, epoch: int
    ) -> None:
        # Here and not above: matplotlib takes its time, and one worker alone draws.
        from matplotlib.image import imsave

        from aam.training.figures import DPI, draw, make_figures

        folder.mkdir(exist_ok=True)
        for name, figure in make_figures(arrays, target).items():
            pixels = draw(figure)
            imsave(folder / f"{name}.png", pixels, dpi=DPI)
            writer.add_image(f"val/{name}", pixels[..., :3], epoch, dataformats="HWC")

    def close(self) -> None:
        """Close the files, after errors too."""
        if self.writer is not None:
            self.writer.close()
        for tracker in self.trackers:
            tracker.close()


def write_validation(path: Path, sample_ids: list[str], arrays: EpochArrays, target: Target) -> None:
    """Table of the validation samples: id, truth, prediction; for classes the probability of each too."""
    assert arrays.target is not None
    assert arrays.target_true is not None
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["SampleID", "true", "prediction", *target.classes, *target.beside])
        if target.classes:
            probabilities = class_probabilities(arrays.target)
            for i, truth, row in zip(sample_ids, arrays.target_true, probabilities, strict=True):
                writer.writerow([i, target.classes[truth], target.classes[row.argmax()], *map(float, row)])
        else:
            truths = target.transform.inverse(arrays.target_true)
            predicted = target.decode(arrays.target)[:, [target.point, *target.beside.values()]]
            for i, truth, values in zip(sample_ids, truths, predicted.tolist(), strict=True):
                writer.writerow([i, float(f"{truth:.7g}"), *values])  # targets are float32


def format_loss(value: float) -> str:
    """Four decimals; scientific below 1e-4."""
    return f"{value:.2e}" if abs(value) < 1e-4 else f"{value:.4f}"


def summary_line(metrics: dict[str, float], epochs: int, *, improved: bool) -> str:
    """An epoch in one line: its losses, and the metrics of the validation samples."""
    parts = [f"epoch {int(metrics['epoch'])}/{epochs}"]
    for part in ("train", "val"):
        found = {k.removeprefix(f"{part}/"): v for k, v in metrics.items() if k.startswith(f"{part}/")}
        shown = {k: v for k, v in found.items() if k.endswith("_loss") or part == "val"}
        parts.append(f"{part} " + " ".join(f"{k.removesuffix('_loss')} {v:.4g}" for k, v in shown.items()))
    parts.append(f"{metrics['throughput(samples/s)']:.1f} samples/s")
    return " | ".join(parts) + (" | best so far" if improved else "")


class ProgressBar:
    """Bar of an epoch on the first worker: `Epoch 5/100`, then step, running mean of the loss, and lr.

    Parameters
    ----------
    epoch, epochs : int
        This epoch, from 1, and how many there are.
    steps : int
        Steps of an epoch.
    shown : bool
        False on all workers but the first.
    file : text stream, optional
        Where to; standard error by default.
    """

    def __init__(self, epoch: int, epochs: int, steps: int, *, shown: bool, file: TextIO | None = None) -> None:
        stream = file or sys.stderr
        # In a log each refresh is a line: a few of them are enough, and none for an epoch that is over by then.
        interval = 0.1 if stream.isatty() else 20.0
        self.bar = tqdm(
            total=steps,
            desc=f"Epoch {epoch}/{epochs}",
            disable=not shown,
            file=stream,
            delay=0 if stream.isatty() else interval,
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
        )
        self.steps = steps
        self.loss = ""

    def due(self, step: int) -> bool:
        """Whether a look at the loss is worth waiting for the device: at both ends, and now and then."""
        return step in (1, self.steps) or step % 20 == 0

    def advance(self, step: int, loss: float | None, lr: float) -> None:
        """One step further; the loss stays as it was last seen where it is None."""
        if loss is not None:
            self.loss = f"Loss {format_loss(loss)}, "
        self.bar.set_postfix_str(f"Step {step}/{self.steps}, {self.loss}LR {lr:.2e}", refresh=False)
        self.bar.update(1)

    def close(self) -> None:
        """Show the bar once more and leave it."""
        self.bar.close()
