"""A stage 2 epoch on a frozen base: the base asked for every batch, against what it says kept, in turn.

    python benchmarks/frozen_base.py --data ibd --target surgery_and_ibd --classifier --batch-size 32 --json out.json

Seconds of the training part and of training and validation, medians of the rounds behind a warm-up that fills the
cache; the sizes of the model are the defaults. The base is a new one: its weights do not matter for the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from aam.config import DataConfig, LoopConfig, ModelConfig, TargetConfig, TrainConfig
from aam.data.batches import EpochBatches
from aam.data.draw import FIXED_DRAW
from aam.plan import make_plan
from aam.task import build_task
from aam.training.base_cache import BaseCache
from aam.training.checkpoint import TrainingState
from aam.training.logs import RunLog
from aam.training.loop import Engine, train_epoch, validate
from aam.training.memory import keep_freed_memory
from aam.training.optimizer import make_optimizer
from aam.training.schedule import make_schedule

CPU = torch.device("cpu")
KINDS = {
    "asked for every batch": (False, False),
    "kept, reads redrawn": (True, False),
    "kept, one draw": (True, True),
    "asked, one draw": (False, True),
}
"""Whether there is a cache, and whether all epochs have one draw. The last is for its losses, and taken once."""


def main() -> None:
    """Print a table; write it as JSON where that is asked for."""
    options = _options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the loop does
    with tempfile.TemporaryDirectory() as scratch:
        engines = {name: _engine(options, Path(scratch), *kind) for name, kind in KINDS.items()}
        rounds: dict[str, list[tuple[float, float, dict[str, float]]]] = {name: [] for name in KINDS}
        states = {name: TrainingState() for name in KINDS}
        for number in range(1 + options.rounds):
            for name, engine in engines.items():
                if name == "asked, one draw" and number > 0:
                    continue
                rounds[name].append(_epoch(engine, states[name], number + 1))
                print(f"round {number}  {name:22} {rounds[name][-1][0]:8.2f} {rounds[name][-1][1]:8.2f} s", flush=True)
    found = _summary(rounds, options)
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of table.biom, metadata.tsv, train.txt, val.txt")
    parser.add_argument("--target", help="column of the metadata")
    parser.add_argument("--classifier", action="store_true")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--attention-layers", type=int, default=1, help="of the heads; the base has 4 + 4")
    parser.add_argument("--embedding-dim", type=int, default=128)
    parser.add_argument("--count-weight", type=float, help="adds the count head")
    parser.add_argument("--samples", type=int, help="so many training samples only, and a third as many to validate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _engine(options: argparse.Namespace, scratch: Path, cached: bool, fixed: bool) -> Engine:
    data = DataConfig(cache_dir=scratch, fixed_rarefaction=fixed)
    if options.data is not None:
        files = {"table": "table.biom", "metadata": "metadata.tsv", "train_ids": "train.txt", "val_ids": "val.txt"}
        data = dataclasses.replace(data, **{name: options.data / file for name, file in files.items()})
    config = TrainConfig(
        data=data,
        model=ModelConfig(embedding_dim=options.embedding_dim, attention_layers=4, asv_layers=4),
        loss=TargetConfig(target=options.target, classifier=options.classifier, count_weight=options.count_weight),
        loop=LoopConfig(batch_size=options.batch_size, epochs=1 + options.rounds, base_cache=cached),
        pretrained="a new one",
        freeze_base=True,
    )
    plan = make_plan(config)
    heads = dataclasses.replace(plan.spec.predictor, attention_layers=options.attention_layers)
    train, val = plan.split.train[: options.samples], plan.split.val
    val = val[: options.samples and options.samples // 3]
    plan = dataclasses.replace(
        plan,
        spec=dataclasses.replace(plan.spec, predictor=heads),
        split=dataclasses.replace(plan.split, train=train, val=val),
    )
    task = build_task(plan, CPU)
    cache = BaseCache(task.model, plan.dataset, plan.spec.contract, None) if cached else None
    if cache is not None:
        started = perf_counter()
        cache.fill([EpochBatches(task.train, 1), EpochBatches(task.val, FIXED_DRAW)])
        print(f"filled in {perf_counter() - started:.1f} s", flush=True)
    return Engine(
        task=dataclasses.replace(task, bar_file=(scratch / "bar").open("w")),
        module=task.model,
        optimizer=make_optimizer(task.model, plan.loop.weight_decay),
        schedule=make_schedule(plan.loop.lr, None, 1000)[0],
        log=RunLog(None, []),
        device=CPU,
        autocast=None,
        cache=cache,
    )


def _epoch(engine: Engine, state: TrainingState, epoch: int) -> tuple[float, float, dict[str, float]]:
    """Seconds of the training part, seconds of all, losses."""
    torch.manual_seed(epoch)  # the same dropout in all kinds
    started = perf_counter()
    trained, _ = train_epoch(engine, state, epoch)
    train_seconds = perf_counter() - started
    validated, _ = validate(engine)
    losses = {f"train/{k}": v for k, v in trained.items()} | {f"val/{k}": v for k, v in validated.items()}
    return train_seconds, perf_counter() - started, {k: v for k, v in losses.items() if k.endswith("loss")}


def _summary(rounds: dict, options: argparse.Namespace) -> dict:
    """Medians, ratios of medians, the smallest and largest ratio of any two rounds, difference of the losses."""
    asked = rounds["asked for every batch"]
    found: dict = {"settings": {k: v if k == "threads" else str(v) for k, v in vars(options).items() if k != "json"}}
    for name in ("kept, reads redrawn", "kept, one draw"):
        same_draws = asked if name == "kept, reads redrawn" else rounds["asked, one draw"]
        pairs = [(a[2][k], b[2][k]) for a, b in zip(same_draws, rounds[name], strict=False) for k in a[2]]
        row: dict = {"loss_difference": max(abs(a - b) / abs(a) for a, b in pairs)}
        for part, column in (("train", 0), ("train and validation", 1)):
            slow, fast = ([r[column] for r in of[1:]] for of in (asked, rounds[name]))
            row[part] = {
                "asked_s": round(median(slow), 3),
                "kept_s": round(median(fast), 4),
                "ratio": round(median(slow) / median(fast), 1),
                "ratio_from_to": [round(min(slow) / max(fast), 1), round(max(slow) / min(fast), 1)],
            }
        found[name] = row
    return found


if __name__ == "__main__":
    main()
