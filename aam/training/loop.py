"""The training loop: pure PyTorch, on one process or as one of many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from aam.batch import Batch
from aam.config import LoopConfig
from aam.data.batches import BatchPlan, EpochBatches, count_batches
from aam.data.draw import FIXED_DRAW, generator
from aam.model.sequence_predictor import SequencePredictor
from aam.training import checkpoint, collectives
from aam.training.base_cache import BaseCache
from aam.training.checkpoint import ModelSpec, TrainingState
from aam.training.feature_cache import FeatureCache
from aam.training.logs import ProgressBar, RunLog, summary_line
from aam.training.memory import clear_cache, keep_freed_memory, out_of_memory_advice
from aam.training.metrics import EpochArrays, EpochRecord
from aam.training.optimizer import make_optimizer, update
from aam.training.schedule import Schedule, make_schedule, run_length
from aam.training.step import Objective, autocast_of, cpu_has_bf16, step
from aam.training.trackers import open_trackers

Report = Callable[[dict[str, float], Callable[[Path], None] | None], None]
"""Takes the metrics of an epoch and, on the first worker, a function that writes its checkpoint to a path."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to train on what."""

    spec: ModelSpec
    model: nn.Module
    """Not wrapped, on its device, with the weights to start from."""
    objective: Objective
    train: BatchPlan
    val: BatchPlan
    config: LoopConfig
    folder: Path | None = None
    """Run folder for the logs; None leaves none."""
    report: Report | None = None
    """Called by all workers after each epoch."""
    bar_file: Any = None
    """Where the progress bar goes; standard error by default."""
    verbose: bool = True
    """Print the settings of the batches, and a line for each epoch."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What the epochs of a run share."""

    task: Task
    module: nn.Module
    """The model, wrapped where there are several workers."""
    optimizer: torch.optim.AdamW
    schedule: Schedule
    log: RunLog
    device: torch.device
    autocast: torch.dtype | None
    cache: BaseCache | None
    """Vectors of the ASVs, where the encoder is frozen."""
    features: FeatureCache | None
    """Features of the samples in their fixed rarefaction, where the heads read nothing else."""

    @property
    def epochs(self) -> int:
        """Epochs of the run, if its patience lasts."""
        return run_length(self.task.config, len(self.task.train.sample_ids))[0]


def fit(task: Task, resume_from: Path | None = None, *, until: int | None = None) -> TrainingState:
    """Train until the epochs or the patience run out.

    Parameters
    ----------
    task : Task
        Model, data, settings.
    resume_from : Path, optional
        Checkpoint of this run to go on from; the outcome is that of a run that was never interrupted.
    until : int, optional
        Epoch to stop after, with the learning rates of a run that goes on to its end.

    Returns
    -------
    TrainingState
        With the metrics of each epoch.

    Raises
    ------
    NonFiniteError, aam.training.memory.OutOfMemoryError
    """
    state, optimizer = TrainingState(), make_optimizer(task.model, task.config.weight_decay)
    torch.manual_seed(_worker_seed(task.config.seed, collectives.rank()))
    if resume_from is not None:
        state = _restore(task, optimizer, resume_from)
    engine = _make_engine(task, optimizer, state)
    advice = out_of_memory_advice(
        task.config, token_limit=task.spec.contract.token_limit, workers=collectives.world_size()
    )
    try:
        with advice:
            if engine.cache is not None:
                parts = [EpochBatches(task.train, 1), EpochBatches(task.val, FIXED_DRAW)]
                engine.cache.fill(parts, verbose=task.verbose)
            last = engine.epochs if until is None else min(until, engine.epochs)
            while state.epoch < last and state.bad_epochs < task.config.patience:
                _run_epoch(engine, state)
    finally:
        engine.log.close()
    return state


def _run_epoch(engine: Engine, state: TrainingState) -> None:
    """Train, validate, log, save."""
    task, epoch = engine.task, state.epoch + 1
    started = perf_counter()
    train_metrics, samples = train_epoch(engine, state, epoch)
    seconds = perf_counter() - started
    val_metrics, arrays = validate(engine)
    clear_cache(task.config, "epoch")
    metrics: dict[str, float] = {"epoch": epoch}
    metrics |= {f"train/{name}": value for name, value in train_metrics.items()}
    metrics |= {f"val/{name}": value for name, value in val_metrics.items()}
    metrics["lr"] = engine.schedule.lr(state.update - 1)
    metrics["throughput(samples/s)"] = samples / seconds
    val_loss = val_metrics["total_loss"]
    if not torch.isfinite(torch.tensor(val_loss)):
        raise NonFiniteError(f"validation loss is {val_loss} after epoch {epoch}: lower --lr")
    # Of equals the later is the best, as Ray has it; but only a lower loss gives the patience back.
    state.bad_epochs = 0 if val_loss < state.best_loss else state.bad_epochs + 1
    improved = val_loss <= state.best_loss
    if improved:
        state.best_loss, state.best_epoch = val_loss, epoch
    state.epoch = epoch
    metrics |= {"best_epoch": state.best_epoch, "epochs_without_improvement": state.bad_epochs}
    metrics["skipped_updates"] = state.skipped
    state.history.append(metrics)
    engine.log.epoch(metrics)
    if collectives.rank() == 0 and task.verbose:
        print(summary_line(metrics, engine.epochs, improved=improved), flush=True)
    if improved:
        engine.log.best(arrays, _gathered_ids(task.val), task.objective.target, epoch)
    if task.report is not None:
        rng_states = _gather_rng(engine.device)
        optimizer_state = engine.optimizer.state_dict()

        def write(path: Path) -> None:
            checkpoint.save(path, task.model, task.spec, state, optimizer_state, rng_states)

        task.report(metrics, write if collectives.rank() == 0 else None)


def train_epoch(engine: Engine, state: TrainingState, epoch: int) -> tuple[dict[str, float], int]:
    """One pass over the training samples, or what the run has left of it; advances `state` by its updates.

    Returns
    -------
    dict of float
        Metrics.
    int
        Samples seen, by all workers.
    """
    task, config = engine.task, engine.task.config
    engine.module.train()
    batches = EpochBatches(
        task.train,
        epoch,
        rank=collectives.rank(),
        world=collectives.world_size(),
        most=(engine.schedule.total - state.update) * config.gradient_accumulation_steps,
    )
    record = EpochRecord(task.objective, engine.device)
    bar = ProgressBar(epoch, engine.epochs, len(batches), shown=collectives.rank() == 0, file=task.bar_file)
    pending: list[tuple[torch.Tensor, list[str]]] = []  # updates not yet looked at: flag, samples
    running, finite, group_ids = torch.zeros((), device=engine.device), _true(engine), []
    for number, (batch, cached) in enumerate(load(engine, batches), start=1):
        group = _group_size(number, len(batches), config.gradient_accumulation_steps)
        last_of_group = number % config.gradient_accumulation_steps == 0 or number == len(batches)
        with _no_sync(engine.module, not last_of_group):
            losses, predictions = step(
                engine.module,
                batch,
                task.objective,
                autocast=engine.autocast,
                chunk_size=config.asv_chunk_size,
                **cached,
            )
            task.objective.weights.check(losses)
            total = task.objective.weights.total(losses)
            # DDP averages over the workers; the losses are shares of a sum over them.
            (total * (collectives.world_size() / group)).backward()
        step_finite = total.detach().isfinite()
        finite, running = finite & step_finite, running + total.detach().nan_to_num(0.0, 0.0, 0.0)
        record.add(batch, losses, predictions, step_finite)
        group_ids += batch.sample_ids
        del losses, total, predictions
        if last_of_group:
            lr = engine.schedule.lr(state.update)
            if number == len(batches):
                _histograms(engine, epoch)
            skipped = update(engine.optimizer, finite, lr=lr, clip_norm=config.clip_norm)
            pending.append((skipped, group_ids))
            state.update += 1
            finite, group_ids = _true(engine), []
        clear_cache(config, "batch")
        if bar.due(number):
            _look_at_updates(state, pending, config)
        mean = running.item() * collectives.world_size() / number if bar.due(number) else None
        bar.advance(number, mean, engine.schedule.lr(max(0, state.update - 1)))
    bar.close()
    seen = sum(len(positions) for positions in batches.batches)
    return record.losses() | record.arrays().metrics(task.objective.target), seen


@torch.no_grad()
def validate(engine: Engine) -> tuple[dict[str, float], EpochArrays]:
    """Each validation sample once, in fixed blocks with fixed draws and masks: losses, metrics, predictions."""
    task = engine.task
    engine.module.eval()
    record = EpochRecord(task.objective, engine.device)
    batches = EpochBatches(task.val, FIXED_DRAW, rank=collectives.rank(), world=collectives.world_size())
    for batch, cached in load(engine, batches):
        # The bare model: DDP has nothing to do without gradients.
        losses, predictions = step(
            task.model,
            batch,
            task.objective,
            autocast=engine.autocast,
            chunk_size=task.config.asv_chunk_size,
            **cached,
        )
        record.add(batch, losses, predictions)
        clear_cache(task.config, "batch")
    arrays = record.arrays()
    return record.losses() | arrays.metrics(task.objective.target), arrays


def load(engine: Engine, batches: EpochBatches) -> Iterator[tuple[Batch, dict[str, torch.Tensor]]]:
    """The batches on the device and, where the encoder is frozen, what is cached for `step`."""
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=engine.task.config.loader_workers,
        pin_memory=engine.device.type == "cuda",
    )
    for host_batch in loader:
        cached = {}
        if engine.features is not None and batches.has_fixed_draws:
            cached["cached_features"] = engine.features.features_of(host_batch)
        elif engine.cache is not None:
            cached["cached_vectors"] = engine.cache.vectors_of(host_batch)
        yield host_batch.to(engine.device), cached


def _make_engine(task: Task, optimizer: torch.optim.AdamW, state: TrainingState) -> Engine:
    device = next(task.model.parameters()).device
    config, module = task.config, task.model
    if collectives.world_size() > 1:
        module = DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
    steps = count_batches(len(task.train.sample_ids), task.train.batch_size)
    _, total = run_length(config, len(task.train.sample_ids))
    schedule, warning = make_schedule(config.lr, config.warmup_steps, total)
    if collectives.rank() == 0 and task.verbose:
        world = collectives.world_size()
        print(
            f"batch: {config.batch_size} samples over {world} workers, {config.batch_size / world:g} each, x "
            f"{config.gradient_accumulation_steps} accumulated; {steps} steps an epoch, {total} updates, "
            f"{schedule.warmup} of warm-up" + (f"\n{warning}" if warning else ""),
            flush=True,
        )
    # It plans anew for each shape, half a second at a time, and no two batches have the same.
    torch.backends.cuda.enable_cudnn_sdp(False)
    autocast = autocast_of(config.precision, device.type)
    if device.type == "cpu":
        keep_freed_memory()
        if config.precision == "auto" and not task.spec.freeze_base and collectives.rank() == 0 and cpu_has_bf16():
            print(
                "note: this CPU has bf16 instructions; try --precision fastest, half to two thirds of the time",
                flush=True,
            )
    cache = features = None
    if task.spec.freeze_base and config.base_cache:
        cache = BaseCache(task.model, task.train.dataset, autocast, chunk_size=config.asv_chunk_size)
        assert isinstance(task.model, SequencePredictor)
        if FeatureCache.fits(task.model, task.train.dataset):
            features = FeatureCache(task.model, task.train.dataset, cache)
    return Engine(
        task=task,
        module=module,
        optimizer=optimizer,
        schedule=schedule,
        log=_open_log(task, state),
        device=device,
        autocast=autocast,
        cache=cache,
        features=features,
    )


def _open_log(task: Task, state: TrainingState) -> RunLog:
    if collectives.rank() > 0 or task.folder is None:
        return RunLog(None, state.history)
    settings = {**asdict(task.config), **asdict(task.spec.encoder), **asdict(task.spec.contract)}
    task.folder.mkdir(parents=True, exist_ok=True)
    return RunLog(task.folder, state.history, open_trackers(task.config, task.folder, settings))


def _restore(task: Task, optimizer: torch.optim.AdamW, path: Path) -> TrainingState:
    """Put weights, optimizer and random states as they were when the checkpoint was written."""
    loaded = checkpoint.load(path)
    if loaded.spec != task.spec:
        raise ValueError(f"{path}: the run was started with other settings; resume with the ones it had")
    checkpoint.load_weights(task.model, loaded.model.state_dict(), source=path)
    state, optimizer_state, rng_states = checkpoint.load_training_state(path)
    optimizer.load_state_dict(optimizer_state)
    if collectives.rank() < len(rng_states):
        own = rng_states[collectives.rank()]
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
    return state


def _gather_rng(device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Random states of all workers, on each of them."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    gathered: list[dict[str, torch.Tensor]] = [{} for _ in range(collectives.world_size())]
    for name, own in states.items():
        rows = collectives.gather_array(own.numpy(), device).reshape(collectives.world_size(), -1)
        for of_rank, row in zip(gathered, rows, strict=True):
            of_rank[name] = torch.from_numpy(row.copy())
    return gathered


def _worker_seed(seed: int, rank: int) -> int:
    return int(generator(seed, "worker", rank).integers(2**63))


def _gathered_ids(plan: BatchPlan) -> list[str]:
    """Ids of the validation samples in the order in which the workers' predictions are gathered."""
    world = collectives.world_size()
    found = []
    for rank in range(world):
        batches = EpochBatches(plan, FIXED_DRAW, rank=rank, world=world)
        found += [plan.sample_ids[p] for positions in batches.own_positions() for p in positions]
    return found


def _group_size(number: int, steps: int, accumulation: int) -> int:
    """Steps of the group that step `number` belongs to; the last group may be smaller."""
    first = (number - 1) // accumulation * accumulation
    return min(accumulation, steps - first)


def _no_sync(module: nn.Module, wanted: bool):
    if wanted and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def _true(engine: Engine) -> torch.Tensor:
    return torch.ones((), dtype=torch.bool, device=engine.device)


def _histograms(engine: Engine, epoch: int) -> None:
    """Every few epochs, from the last gradients before they are cleared."""
    every = engine.task.config.histogram_every
    if every and (epoch == 1 or epoch % every == 0) and collectives.rank() == 0:
        named = engine.task.model.named_parameters()
        gradients = {name: p.grad.detach() for name, p in named if p.grad is not None}
        engine.log.histograms(engine.task.model, gradients, epoch)


def _look_at_updates(state: TrainingState, pending: list[tuple[torch.Tensor, list[str]]], config: LoopConfig) -> None:
    """Count and name what was skipped since the last look; too many in a row end the run."""
    for flag, sample_ids in pending:
        if flag.item() == 0:
            state.skipped_in_a_row = 0
            continue
        state.skipped += 1
        state.skipped_in_a_row += 1
        print(
            f"WARNING: update skipped for a non-finite loss or gradient ({state.skipped} so far); "
            f"samples of worker {collectives.rank()}: {', '.join(sample_ids)}",
            flush=True,
        )
        if state.skipped_in_a_row >= config.max_skipped_updates:
            raise NonFiniteError(
                f"{state.skipped_in_a_row} updates in a row had a non-finite loss or gradient, the last with "
                f"samples {', '.join(sample_ids)}: lower --lr, or look at these samples"
            )
    pending.clear()
