"""Prediction shared out over workers of a real Ray: what one process predicts, also where a worker is lost."""

from __future__ import annotations

import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from skbio import DistanceMatrix

from aam.config import PredictRayConfig, TargetConfig
from aam.distributed.prediction import ray_executor
from aam.predict.samples import Worker
from aam.training import checkpoint
from runs import TINY, fit_here, pretrain_config, train_config

WORKERS = ["--num-workers", "2", "--cpus-per-worker", "1"]


@pytest.fixture(scope="module")
def trained(synthetic_folder, tmp_path_factory):
    """Folder of a run, and its plan."""
    folder = tmp_path_factory.mktemp("run") / "run"
    target = TargetConfig(target="gradient", target_loss="quantile", quantiles=(0.1, 0.5, 0.9))
    return folder, fit_here(train_config(synthetic_folder, folder, model=TINY, target=target, epochs=1))


def test_two_workers_predict_what_one_process_does(run_here, ray_cluster, synthetic_folder, trained, tmp_path):
    folder, _ = trained
    flags = ["--checkpoint", folder / "best", "--table", synthetic_folder / "table.biom", "--batch-size", "3"]
    for name, more in (("one", []), ("two", WORKERS)):
        out = ["--output", tmp_path / f"{name}.tsv", "--embeddings", tmp_path / f"{name}.parquet"]
        done = run_here("predict.py", *flags, *out, "--asv-chunk-size", "20", *more)
        assert done.returncode == 0, done.stderr
    one, two = (pd.read_csv(tmp_path / f"{name}.tsv", sep="\t", index_col=0) for name in ("one", "two"))
    assert list(one.columns) == ["prediction", "q0.1", "q0.9"]
    assert list(one.index) == list(two.index)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    one, two = (pd.read_parquet(tmp_path / f"{name}.parquet").set_index("SampleID") for name in ("one", "two"))
    assert list(one.index) == list(two.index)
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_two_workers_write_the_distances_that_one_process_does(run_here, ray_cluster, synthetic_folder, tmp_path):
    fit_here(pretrain_config(synthetic_folder, tmp_path / "run", model=TINY, epochs=1))
    flags = ["--checkpoint", tmp_path / "run" / "best", "--table", synthetic_folder / "table.biom", "--batch-size", "3"]
    matrices = []
    for name, more in (("one", []), ("two", WORKERS)):
        done = run_here("predict.py", *flags, "--distances", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        matrices.append(DistanceMatrix.read(str(tmp_path / name)))
    assert matrices[0].ids == matrices[1].ids
    np.testing.assert_allclose(matrices[0].data, matrices[1].data, atol=2e-6)


def test_a_lost_worker_is_replaced_and_its_share_done_again(ray_cluster, trained, tmp_path):
    folder, plan = trained
    worker = Worker(
        loaded=checkpoint.load(folder / "best"),
        dataset=plan.dataset,
        batch_size=8,
        device=torch.device("cpu"),
        autocast=None,
    )

    def die(worker, item, folder, deaths):
        """Encode some ASVs, but for as many times as it has to die first: a node may run out of memory."""
        died = len(list(folder.glob(f"{item}-*")))
        if item == 2 and died < deaths[0]:
            (folder / f"{item}-{died}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return worker.encode(np.arange(4 * item, 4 * item + 4))

    map_items = ray_executor(PredictRayConfig(num_workers=2, cpus_per_worker=1, max_failures=1)).start(worker)
    found = dict(map_items(die, range(4), tmp_path, [1]))
    assert len(list(tmp_path.iterdir())) == 1
    assert sorted(found) == [0, 1, 2, 3]
    np.testing.assert_allclose(
        np.concatenate([found[i] for i in range(4)]), worker.encode(np.arange(16)), rtol=0, atol=1e-5
    )

    def refuse(worker, item):
        raise ValueError("a fault of the user")

    with pytest.raises(ValueError, match="a fault of the user"):
        list(map_items(refuse, range(4)))
    with pytest.raises(RuntimeError, match=r"lost more than 1 times \(--max-failures\).*lower --batch-size"):
        list(map_items(die, [2], tmp_path, [10]))
