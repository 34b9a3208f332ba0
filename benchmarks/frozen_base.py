"""A stage 2 epoch on a frozen base: the encoder run for every batch, against its output cached, in turn.

    python benchmarks/frozen_base.py --data ibd --target surgery_and_ibd --classifier --batch-size 32 --json out.json

Three ways: the encoder runs for every batch; vectors of ASVs are cached, and reads redrawn in each epoch; features of
samples are cached, which needs one rarefaction for all epochs, or all reads. Seconds of the training part and of
training and validation, medians of the rounds after a warm-up that fills the caches. As in training, validation reads
cached features wherever there are any. The base is a new one: its weights do not matter for the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from aam.config import DataConfig, LoopConfig, ModelConfig, TargetConfig, TrainConfig
from aam.data.batches import EpochBatches
from aam.data.draw import FIXED_DRAW
from aam.plan import make_plan
from aam.task import build_task
from aam.training.base_cache import BaseCache
from aam.training.checkpoint import TrainingState
from aam.training.feature_cache import FeatureCache
from aam.training.logs import RunLog
from aam.training.loop import Engine, train_epoch, validate
from aam.training.memory import keep_freed_memory
from aam.training.optimizer import make_optimizer
from aam.training.schedule import make_schedule

CPU = torch.device("cpu")
EVERY, VECTORS, FEATURES = "encoder run for every batch", "ASV vectors cached", "sample features cached"
EVERY_FIXED = "encoder run, one rarefaction"


class Kind(NamedTuple):
    """A way to take an epoch."""

    cached: bool
    fixed: bool
    """One rarefaction for all epochs."""


KINDS = {EVERY: Kind(False, False), VECTORS: Kind(True, False), FEATURES: Kind(True, True)}
KINDS |= {EVERY_FIXED: Kind(False, True)}  # for its losses, and run once


class Epoch(NamedTuple):
    """What an epoch took, and its losses."""

    train_s: float
    both_s: float
    losses: dict[str, float]


def main() -> None:
    """Print a table; write it as JSON where that is asked for."""
    options = _options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the loop does
    with tempfile.TemporaryDirectory() as scratch:
        engines = {name: _engine(options, Path(scratch), kind) for name, kind in KINDS.items()}
        if engines[FEATURES].features is None:
            print(f"note: heads that read ASVs have no {FEATURES}: vectors are, with one rarefaction", flush=True)
        fill_s = _fill_seconds(engines[VECTORS])
        rounds: dict[str, list[Epoch]] = {name: [] for name in KINDS}
        states = {name: TrainingState() for name in KINDS}
        for number in range(1 + options.rounds):
            for name, engine in engines.items():
                if name == EVERY_FIXED and number > 0:
                    continue
                epoch = _epoch(engine, states[name], number + 1)
                rounds[name].append(epoch)
                print(f"round {number}  {name:28} {epoch.train_s:8.3f} {epoch.both_s:8.3f} s", flush=True)
    result = {"encode_all_asvs_s": round(fill_s, 2)} | _summary(rounds, options)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of table.biom, metadata.tsv, train.txt, val.txt")
    parser.add_argument("--target", help="column of the metadata")
    parser.add_argument("--classifier", action="store_true")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--asv-layers", type=int, default=0, help="of the base's nucleotide stack")
    parser.add_argument("--head-layers", type=int, default=0, help="attention layers of the target head over ASVs")
    parser.add_argument("--embedding-dim", type=int, default=128)
    parser.add_argument("--clades", type=int, default=512)
    parser.add_argument("--count-weight", type=float, help="adds the count head")
    parser.add_argument("--all-reads", action="store_true", help="no rarefaction, in place of 1,000 reads")
    parser.add_argument("--samples", type=int, help="so many training samples only, and a third as many to validate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _engine(options: argparse.Namespace, scratch: Path, kind: Kind) -> Engine:
    data = DataConfig(cache_dir=scratch, fixed_rarefaction=kind.fixed, rarefy_depth=0 if options.all_reads else None)
    if options.data is not None:
        files = {"table": "table.biom", "metadata": "metadata.tsv", "train_ids": "train.txt", "val_ids": "val.txt"}
        data = dataclasses.replace(data, **{name: options.data / file for name, file in files.items()})
    loss = TargetConfig(
        target=options.target,
        classifier=options.classifier,
        count_weight=options.count_weight,
        head_layers=options.head_layers,
    )
    config = TrainConfig(
        data=data,
        model=ModelConfig(embedding_dim=options.embedding_dim, clades=options.clades, asv_layers=options.asv_layers),
        loss=loss,
        loop=LoopConfig(batch_size=options.batch_size, epochs=1 + options.rounds, base_cache=kind.cached),
        pretrained="a new one",
        freeze_base=True,
    )
    plan = make_plan(config)
    train, val = plan.split.train[: options.samples], plan.split.val
    val = val[: options.samples and options.samples // 3]
    task = build_task(dataclasses.replace(plan, split=dataclasses.replace(plan.split, train=train, val=val)), CPU)
    cache = BaseCache(task.model, plan.dataset, None) if kind.cached else None
    features = None
    if cache is not None:
        cache.fill([EpochBatches(task.train, 1), EpochBatches(task.val, FIXED_DRAW)], verbose=False)
        # With all reads, cached vectors would never be used beside cached features.
        if FeatureCache.fits(task.model, plan.dataset) and (kind.fixed or not options.all_reads):
            features = FeatureCache(task.model, plan.dataset, cache)
    return Engine(
        task=dataclasses.replace(task, bar_file=(scratch / "bar").open("w"), verbose=False),
        module=task.model,
        optimizer=make_optimizer(task.model, plan.loop.weight_decay),
        schedule=make_schedule(plan.loop.lr, None, 1000)[0],
        log=RunLog(None, []),
        device=CPU,
        autocast=None,
        cache=cache,
        features=features,
    )


def _fill_seconds(engine: Engine) -> float:
    """To encode all ASVs of the samples once."""
    task = engine.task
    cache = BaseCache(task.model, task.train.dataset, None, on_disk=False)
    cache.base.eval()
    started = perf_counter()
    cache.fill([EpochBatches(task.train, 1), EpochBatches(task.val, FIXED_DRAW)], verbose=False)
    return perf_counter() - started


def _epoch(engine: Engine, state: TrainingState, epoch: int) -> Epoch:
    torch.manual_seed(epoch)  # the same dropout in all kinds
    started = perf_counter()
    trained, _ = train_epoch(engine, state, epoch)
    train_s = perf_counter() - started
    validated, _ = validate(engine)
    losses = {f"train/{k}": v for k, v in trained.items()} | {f"val/{k}": v for k, v in validated.items()}
    return Epoch(train_s, perf_counter() - started, {k: v for k, v in losses.items() if k.endswith("loss")})


def _summary(rounds: dict[str, list[Epoch]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians, ratios of medians, the smallest and largest ratio of any two rounds, difference of the losses."""
    every = rounds[EVERY]
    settings = {k: v if isinstance(v, int | float | None) else str(v) for k, v in vars(options).items() if k != "json"}
    result: dict[str, Any] = {"settings": settings}
    for name, same_reads in ((VECTORS, every), (FEATURES, rounds[EVERY_FIXED])):
        pairs = [(a.losses[k], b.losses[k]) for a, b in zip(same_reads, rounds[name], strict=False) for k in a.losses]
        row: dict[str, Any] = {"loss_difference": max(abs(a - b) / abs(a) for a, b in pairs)}
        for part, column in (("train", 0), ("train and validation", 1)):
            slow, fast = ([epoch[column] for epoch in of[1:]] for of in (every, rounds[name]))
            row[part] = {
                "encoder_run_s": round(median(slow), 4),
                "cached_s": round(median(fast), 4),
                "ratio": round(median(slow) / median(fast), 2),
                "ratio_range": [round(min(slow) / max(fast), 2), round(max(slow) / min(fast), 2)],
            }
        result[name] = row
    return result


if __name__ == "__main__":
    main()
