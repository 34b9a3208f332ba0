"""Stage 1, stage 2 and the report, as Ray jobs one after the other; jobs that are there already are followed."""

from __future__ import annotations

import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from aam.cli import parse, to_arguments
from aam.config import Location, PipelineConfig, PredictConfig, PretrainConfig, TrainConfig
from aam.distributed.checkpoints import RECORD, home_of
from aam.distributed.run import history, is_finished
from aam.distributed.storage import join, read_json
from aam.distributed.submission import (
    ROOT,
    Cluster,
    check_succeeded,
    connect_client,
    find_cluster,
    follow,
    job_environment,
    running_job,
    submit,
)
from aam.plan import check_resumable, make_plan
from aam.training.checkpoint import is_checkpoint

DEFAULT_TEST_FRACTION = 0.2
_SHARED = ("table", "metadata", "sequences", "group_column", "test_ids", "test_fraction")
"""What decides, with the seed, which samples are held back: both stages must agree on it."""

C = TypeVar("C", PretrainConfig, TrainConfig)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A job of the pipeline."""

    name: str
    script: str
    config: PretrainConfig | TrainConfig | PredictConfig

    def entrypoint(self, cluster: Cluster) -> str:
        """Command line of the job."""
        arguments = to_arguments(self.config)
        if cluster.uploads:
            return shlex.join(["python", f"jobs/{self.script}", *arguments])
        # With several Rays on a machine, the environment that Ray gives to a job may name another.
        address = f"RAY_ADDRESS={cluster.gcs_address}"
        return shlex.join(["env", address, sys.executable, str(ROOT / "jobs" / self.script), *arguments])

    def is_done(self) -> bool:
        """Whether its run folder holds a finished run of these settings and data; only for one that lies here.

        Raises
        ------
        ValueError
            Where it holds a run of others.
        """
        if isinstance(self.config, PredictConfig):
            return False  # takes seconds, and its report may have to tell of a better checkpoint
        home = home_of(self.config)
        record = read_json(join(home, RECORD))
        if record is None or not is_checkpoint(self.config.output_dir / "best"):
            return False
        check_resumable(record, self.config, self.config.output_dir)
        return is_finished(self.config.loop, len(record["split"]["train"]), history(home))


def plan_stages(config: PipelineConfig) -> list[Stage]:
    """The jobs of a pipeline, all their settings checked.

    Parameters
    ----------
    config : PipelineConfig
        Settings.

    Raises
    ------
    ValueError
        For settings that cannot work, or that let the stages hold back different samples.
    """
    data, folder = config.data, config.output_dir
    if data.test_ids is None and data.test_fraction == 0:
        data = replace(data, test_fraction=DEFAULT_TEST_FRACTION)
    storage, where = config.ray.storage_path, replace(config.ray, ray_address=None)
    if storage is not None:  # runs are kept there under the names of their folders: stage1 of which pipeline?
        where = replace(where, storage_path=Location(join(storage, folder.name)))
    both = [*to_arguments(config.model), *to_arguments(config.loop), *to_arguments(where), "--resume-or-start"]
    first = _parse(
        PretrainConfig,
        # One draw for all epochs is for the heads on a frozen base.
        [*to_arguments(replace(data, fixed_rarefaction=False)), *both, "--output-dir", str(folder / "stage1")],
        "--pretrain-flags",
        config.pretrain_flags,
    )
    # Stage 2 has no use for the tree without UniFrac, and would say so.
    second_data = data if config.loss.base_weight > 0 else replace(data, tree=None)
    frozen = ["--freeze-base"] if config.freeze_base else []
    second = _parse(
        TrainConfig,
        [*to_arguments(second_data), *both, *to_arguments(config.loss), *frozen, "--pretrained", home_of(first),
         "--output-dir", str(folder / "stage2")],
        "--train-flags",
        config.train_flags,
    )  # fmt: skip
    _check_agreement(config, folder, first, second)
    first, second = replace(first, preset=config.preset), replace(second, preset=config.preset)
    report = PredictConfig(
        checkpoint=Location(home_of(second)),
        output=folder / "predictions.tsv",
        part="test",
        report=folder / "report.md",
        base_cache=second.loop.base_cache,
        cache_dir=data.cache_dir,
    )
    return [
        Stage(name="stage 1", script="pretrain.py", config=first),
        Stage(name="stage 2", script="train.py", config=second),
        Stage(name="report", script="predict.py", config=report),
    ]


def _parse(config_type: type[C], arguments: list[str], flag: str, more: str) -> C:
    """Settings of a stage: those of the pipeline, and those of its own flags, which win."""
    try:
        return parse(config_type, [*arguments, *shlex.split(more)])
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        raise ValueError(f"{flag} {more!r}: not settings that this stage can use, as said above") from None
    except ValueError as error:  # a quote that is left open
        raise ValueError(f"{flag} {more!r}: {error}") from None


def _check_agreement(config: PipelineConfig, folder: Path, first: PretrainConfig, second: TrainConfig) -> None:
    if (first.output_dir, second.output_dir) != (folder / "stage1", folder / "stage2"):
        raise ValueError("--output-dir is for the whole pipeline: leave it out of --pretrain-flags and --train-flags")
    if first.preset is not None or second.preset is not None:
        raise ValueError("--preset is for the whole pipeline: leave it out of --pretrain-flags and --train-flags")
    differing = [name for name in _SHARED if getattr(first.data, name) != getattr(second.data, name)]
    if first.loop.seed != second.loop.seed:
        differing.append("seed")
    if differing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in differing)
        raise ValueError(
            f"{flags}: must be the same in both stages, which else hold back different samples; give it to the "
            "pipeline, not in --pretrain-flags or --train-flags"
        )


def run_pipeline(config: PipelineConfig) -> None:
    """Run what is left of a pipeline, its jobs' logs going to the terminal.

    Raises
    ------
    ValueError
        For settings that cannot work, or a cluster that does not answer.
    JobFailedError
        Where a job failed or was stopped.
    """
    stages = plan_stages(config)
    cluster = find_cluster(config.address, config.ray)
    client = connect_client(cluster)
    if not cluster.uploads and not stages[1].is_done():
        check_files(stages[1])
    for stage in stages:
        if not cluster.uploads and stage.is_done():
            print(f"{stage.name}: done already", flush=True)
            continue
        entrypoint = stage.entrypoint(cluster)
        labels = {"aam_pipeline": str(config.output_dir), "aam_stage": stage.name}
        job = running_job(client, labels, entrypoint)
        said = "follows" if job else "submitted as"
        if job is None:
            with tempfile.TemporaryDirectory() as scratch:
                job = submit(client, labels, entrypoint, job_environment(cluster, Path(scratch)))
        print(f"{stage.name}: {said} Ray job {job} at {cluster.address}", flush=True)
        try:
            follow(client, job)
        except KeyboardInterrupt:
            print(f"\n{stage.name}: {_what_becomes_of_it(cluster, job)}", file=sys.stderr, flush=True)
            raise
        check_succeeded(client, job, stage.name)
    print(f"pipeline done: {config.output_dir}\n" + _where_things_are(config.output_dir), flush=True)


def check_files(stage_2: Stage) -> None:
    """Refuse a target that stage 2 cannot learn before stage 1 is trained for it; where the files are at hand."""
    assert isinstance(stage_2.config, TrainConfig)
    make_plan(replace(stage_2.config, pretrained=None, freeze_base=False))


def _what_becomes_of_it(cluster: Cluster, job: str) -> str:
    again = "the same command, with this --output-dir,"
    if cluster.is_own:
        return f"ends with the Ray that was started here; {again} goes on from its last checkpoint"
    return f"its job goes on; {again} follows it again. To end it: ray job stop --address {cluster.address} {job}"


def _where_things_are(folder: Path) -> str:
    return "\n".join(
        [
            f"  report       {folder / 'report.md'}",
            f"  predictions  {folder / 'predictions.tsv'}",
            f"  stage 1      {folder / 'stage1'}",
            f"  stage 2      {folder / 'stage2'}",
        ]
    )
