"""Every setting of the project: frozen dataclasses whose fields are the flags of the jobs.

The line under a field is its `--help` text. A value that no run could use is refused here, in the words of the
flag. `None` means "decide for me": the default, or what `--pretrained` was trained with.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NewType

Location = NewType("Location", str)
"""A path, or a URI that pyarrow.fs knows: s3://bucket/runs, gs://bucket/runs."""
Precision = Literal["auto", "fastest", "fp32", "bf16"]
UnifracMetric = Literal["unweighted", "weighted", "faith_pd"]
DistanceMetric = Literal["unweighted", "weighted"]
Baseline = Literal[
    "mean",
    "median",
    "majority",
    "depth",
    "ridge",
    "logistic",
    "random_forest",
    "random_forest_third",
    "random_forest_median",
    "gradient_boosting",
]

DEFAULT_MAX_BP = 150
DEFAULT_HEAD_DROPOUT = 0.3
DEFAULT_RAREFY_DEPTH = 1000
DEFAULT_TOKEN_LIMIT = 1024
DEFAULT_COUNT_WEIGHT = 0.1


def is_uri(location: str | Path) -> bool:
    """Whether a location is a URI rather than a path."""
    return "://" in str(location)


def in_copied_folder() -> bool:
    """Whether this is a job that runs in Ray's copy of the folder it was submitted with, which goes with it."""
    return "working_dir_files" in Path.cwd().parts


def _new_folder(stage: str) -> Path:
    parent = Path.home() / "runs" if in_copied_folder() else Path("runs")
    return parent / f"{stage}-{datetime.now():%Y%m%d-%H%M%S}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read, and how a sample is drawn from it."""

    table: Path | None = None
    """BIOM table (v2.1 HDF5, v1 JSON) or QIIME 2 .qza. Without it: the built-in synthetic dataset."""
    tree: Path | None = None
    """Rooted phylogeny of the ASVs, newick or QIIME 2 .qza. Needed wherever UniFrac is a target."""
    metadata: Path | None = None
    """Sample metadata, QIIME 2 / Qiita TSV."""
    sequences: Path | None = None
    """FASTA or .qza with the sequences, where the table's feature ids are hashes."""
    train_ids: Path | None = None
    """File of training sample ids, one a line. Goes with --val-ids."""
    val_ids: Path | None = None
    """File of validation sample ids, one a line. Goes with --train-ids."""
    test_ids: Path | None = None
    """File of sample ids that no part of the training may see."""
    test_fraction: float = 0.0
    """Share of the samples drawn as test samples, which no part of the training may see, where no --test-ids are given;
    the same samples in both stages, given the same table, --seed and --group-column."""
    val_fraction: float = 0.2
    """Share of the samples drawn for validation where no id files are given."""
    group_column: str | None = None
    """Metadata column (a subject, say) whose samples are kept on one side of a drawn split."""
    rarefy_depth: int | None = None
    """Reads drawn from each sample without replacement; 0 uses all reads. [default: 1000, or as pretrained]"""
    token_limit: int | None = None
    """ASVs kept of a sample. [default: 1024, or as pretrained]"""
    token_choice: Literal["abundance", "random", "first"] | None = None
    """Which ASVs --token-limit keeps. [default: abundance, or as pretrained]"""
    fixed_rarefaction: bool = False
    """One rarefaction for all epochs, as validation has it: with --freeze-base, what the heads read of a sample is then
    computed once. Otherwise each epoch sees other reads, which helps against overfitting."""
    max_bp: int | None = None
    """Longest sequence that the nucleotide stack can read. [default: 150, or that of the table where that is
    longer; or as pretrained. Without a stack (--asv-layers 0): any]"""
    max_missing_from_tree: float = 0.2
    """Share of the reads whose ASVs the tree may lack before that is an error."""
    missing_samples: Literal["error", "ignore"] = "error"
    """What to do with samples of the table that the metadata lacks."""
    cache_dir: Path | None = None
    """Where prepared datasets are kept; every worker must see it. [default: $AAM_CACHE or ~/.cache/aam]"""

    def __post_init__(self) -> None:
        _require(
            (self.train_ids is None) == (self.val_ids is None),
            "--train-ids and --val-ids go together: give both or neither",
        )
        _require(0 < self.val_fraction < 1, f"--val-fraction must be between 0 and 1, not {self.val_fraction}")
        _require(0 <= self.test_fraction < 1, f"--test-fraction must be from 0 to below 1, not {self.test_fraction}")
        _require(
            self.test_fraction == 0 or (self.test_ids is None and self.train_ids is None),
            "--test-fraction draws test samples, which --test-ids, or --train-ids and --val-ids, already settle: "
            "leave it out (beside --train-ids, list test samples by --test-ids)",
        )
        _require(
            self.rarefy_depth is None or self.rarefy_depth >= 0,
            f"--rarefy-depth must be 0 (no rarefaction) or more, not {self.rarefy_depth}",
        )
        _require(
            self.token_limit is None or self.token_limit >= 1,
            f"--token-limit must be at least 1, not {self.token_limit}",
        )
        _require(self.max_bp is None or self.max_bp >= 1, f"--max-bp must be at least 1, not {self.max_bp}")
        _require(
            0 <= self.max_missing_from_tree <= 1,
            f"--max-missing-from-tree is a share from 0 to 1, not {self.max_missing_from_tree}",
        )
        if self.table is None:
            for flag in ("tree", "metadata", "sequences"):
                _require(getattr(self, flag) is None, f"--{flag} needs --table beside it")


@dataclass(frozen=True, kw_only=True)
class DataContract:
    """How samples are drawn: fixed by a run, kept in its checkpoints, and honoured by whoever loads them."""

    max_bp: int = DEFAULT_MAX_BP
    """Longest sequence, in nucleotides."""
    rarefy_depth: int = DEFAULT_RAREFY_DEPTH
    """Reads drawn from each sample; 0 uses all."""
    token_limit: int = DEFAULT_TOKEN_LIMIT
    """ASVs kept of a sample."""
    token_choice: str = "abundance"
    """Which ASVs the token limit keeps."""
    seed: int = 0
    """Seed of the rarefaction draws."""

    @property
    def is_random(self) -> bool:
        """Whether two draws of a sample differ."""
        return self.rarefy_depth > 0 or self.token_choice == "random"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model."""

    embedding_dim: int | None = None
    """Width of every vector, D. [default: 128, or as pretrained]"""
    clades: int | None = None
    """Soft clades that the encoder learns: more of them tell finer differences between samples. [default: 512, or as
    pretrained]"""
    attention_heads: int | None = None
    """Heads of each attention layer. [default: 4, or as pretrained]"""
    asv_layers: int | None = None
    """Layers of the nucleotide stack, which adds to what the k-mers tell of an ASV, for most of the time; 0: k-mers
    alone. [default: 0, or as pretrained]"""
    dropout: float | None = None
    """Dropout in the target heads and on the residual branches of transformers; 0: none, of the heads' features either,
    half of which are hidden otherwise. Clades have none: they learn worse with it. [default: 0.3 in the heads, 0.1 in
    the nucleotide stack, or as pretrained]"""
    kmer: int | None = None
    """Length of the k-mers by which ASVs are read; 0 for none. [default: 5, or as pretrained]"""

    def __post_init__(self) -> None:
        for flag, least in (("embedding_dim", 1), ("attention_heads", 1), ("clades", 2), ("asv_layers", 0)):
            value = getattr(self, flag)
            _require(
                value is None or value >= least, f"--{flag.replace('_', '-')} must be at least {least}, not {value}"
            )
        _require(
            self.kmer != 0 or self.asv_layers != 0,
            "--kmer 0 and --asv-layers 0 leave nothing to read: raise one of them",
        )
        _require(self.kmer is None or 0 <= self.kmer <= 6, f"--kmer must be from 0 to 6, not {self.kmer}")
        _require(
            self.dropout is None or 0 <= self.dropout < 1,
            f"--dropout must be at least 0 and below 1, not {self.dropout}",
        )
        if self.embedding_dim is not None:
            heads = self.attention_heads or 4
            _require(
                self.embedding_dim % heads == 0,
                f"--embedding-dim {self.embedding_dim} must be a multiple of --attention-heads {heads}",
            )


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The training loop."""

    batch_size: int = 8
    """Samples of a step over all workers together; UniFrac spans all pairs of them."""
    epochs: int = 1000
    """Passes over the training samples."""
    max_updates: int | None = None
    """Updates after which a run ends, in the middle of an epoch if need be: bounds the time that a large table takes.
    [default: none]"""
    lr: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """AdamW's weight decay; none on norms, biases and embeddings."""
    warmup_steps: int | None = None
    """Updates of linear warm-up. [default: 10,000, at most a tenth of the run]"""
    patience: int = 50
    """Epochs without a better validation loss before the run stops."""
    gradient_accumulation_steps: int = 1
    """Steps whose gradients make one update."""
    clip_norm: float = 1.0
    """Largest norm of the gradients of an update."""
    max_skipped_updates: int = 10
    """Updates in a row that may be skipped for a non-finite loss or gradient before the run ends."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; auto is bf16 on CUDA and fp32 on CPU. Losses are always fp32. On CPUs with bf16
    instructions (AMX, AVX512-BF16) bf16 takes half to two thirds of the time; the run says so where there are any, and
    fastest takes bf16 there too."""
    seed: int = 0
    """Seed of the weights, the split, the shuffles, the rarefaction and the masks."""
    asv_chunk_size: int | None = None
    """Distinct ASVs encoded at a time, activations recomputed in the backward pass: less memory, more time."""
    gradient_checkpointing: bool = False
    """Compute each transformer block's activations anew in the backward pass: less memory, 1.4 times the time."""
    base_cache: bool = True
    """Compute the ASV vectors of a frozen base once, and keep them beside the prepared dataset for all runs; compute
    what the heads read of samples whose reads do not change once a run. Otherwise, both for every batch."""
    use_expandable_segments: bool = False
    """CUDA allocator with expandable segments: less fragmentation of GPU memory."""
    clear_cache: Literal["batch", "epoch", "never"] = "never"
    """When to hand cached GPU memory back (batch: after every chunk and step; slow)."""
    loader_workers: int = 0
    """Processes that build batches ahead of each worker; 0 builds them in the loop."""
    histogram_every: int = 10
    """Epochs between histograms of weights and gradients in TensorBoard; 0 for none."""
    report: bool = True
    """Write report.html, one page on data, curves, predictions and ASVs that matter, when the run has ended."""
    wandb: str | None = None
    """Weights & Biases project to log to as well. Needs the extra: pip install 'aam[wandb]'."""
    mlflow: str | None = None
    """MLflow tracking URI to log to as well, http://host:5000 say. Needs the extra: pip install 'aam[mlflow]'."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 2, f"--batch-size must be at least 2 (pairs), not {self.batch_size}")
        for flag in ("epochs", "patience", "gradient_accumulation_steps", "max_skipped_updates"):
            value = getattr(self, flag)
            _require(value >= 1, f"--{flag.replace('_', '-')} must be at least 1, not {value}")
        _require(
            self.max_updates is None or self.max_updates >= 1,
            f"--max-updates must be at least 1, not {self.max_updates}",
        )
        for flag in ("lr", "clip_norm"):
            _require(getattr(self, flag) > 0, f"--{flag.replace('_', '-')} must be above 0")
        _require(self.weight_decay >= 0, "--weight-decay must not be negative")
        _require(self.warmup_steps is None or self.warmup_steps >= 0, "--warmup-steps must not be negative")
        _require(self.asv_chunk_size is None or self.asv_chunk_size >= 1, "--asv-chunk-size must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Where the workers run."""

    num_workers: int | str = 1
    """Training processes; each takes its share of every batch. MIN:MAX starts with what the cluster has for them,
    and goes on with more or fewer as nodes come and go."""
    use_gpu: bool | None = None
    """One GPU for each worker. [default: where the cluster has enough of them]"""
    cpus_per_worker: int | None = None
    """CPU cores, and threads, of each worker. [default: the cluster's, shared out; at most 4 with a GPU]"""
    max_failures: int = 3
    """How often lost workers are replaced, the run going on from its last checkpoint."""
    placement: Literal["pack", "spread"] = "pack"
    """Workers on as few nodes as possible, or on as many."""
    storage_path: Location | None = None
    """Folder or URI (s3://..., gs://...) that all nodes see. The run is kept there, under the name of --output-dir,
    which then gets a copy of its logs, best and last. [default: in --output-dir, which all nodes must then see]"""
    ray_address: str | None = None
    """Ray cluster to run on. [default: $RAY_ADDRESS, or a running local one, or a new local one]"""

    def __post_init__(self) -> None:
        least, most = self.workers
        _require(1 <= least <= most, f"--num-workers must be a number from 1, or MIN:MAX, not {self.num_workers}")
        _require(self.cpus_per_worker is None or self.cpus_per_worker >= 1, "--cpus-per-worker must be at least 1")
        _require(self.max_failures >= 0, "--max-failures must not be negative")

    @property
    def workers(self) -> tuple[int, int]:
        """Least and most workers."""
        parts = str(self.num_workers).split(":")
        if len(parts) > 2 or not all(part.isdigit() for part in parts):
            raise ValueError(f"--num-workers must be a number from 1, or MIN:MAX, not {self.num_workers}")
        return int(parts[0]), int(parts[-1])


@dataclass(frozen=True, kw_only=True)
class PretrainLossConfig:
    """Losses of stage 1."""

    unifrac_metric: tuple[UnifracMetric, ...] = ("unweighted",)
    """What to learn of each pair of samples, one or several: unweighted and normalised weighted UniFrac; and of each
    sample, Faith's PD. With several, the loss is their mean."""
    made_up_fraction: float = 0.5
    """Made-up samples beside the real ones in each training batch, per real one: random mixtures and subsets of their
    ASVs, whose exact UniFrac is as good a target. They cost time, and help most with few samples. 0: none."""
    kmer_dropout: float = 0.3
    """Fraction of the k-mers that a training batch hides from the model, of all ASVs alike: it must not rest on a few,
    and places lineages that it has never seen better."""
    base_weight: float = 1.0
    """Weight of the UniFrac loss (MSE of all pairs of the batch over the variance of the distances)."""
    nuc_weight: float | None = None
    """Weight of the masked-nucleotide loss (cross entropy). [default: 1 with a nucleotide stack, --asv-layers]"""
    mask_fraction: float = 0.15
    """Share of each sequence's nucleotides that are masked."""

    def __post_init__(self) -> None:
        _require(self.base_weight >= 0, "--base-weight must not be negative")
        _require(self.nuc_weight is None or self.nuc_weight >= 0, "--nuc-weight must not be negative")
        _require(self.base_weight > 0 or self.nuc_weight != 0, "one of --base-weight, --nuc-weight must be above 0")
        _require(0 <= self.kmer_dropout < 1, "--kmer-dropout must be at least 0 and below 1")
        _require(0 <= self.made_up_fraction <= 4, "--made-up-fraction must be from 0 to 4")
        _require(
            len(self.unifrac_metric) > 0 and len({*self.unifrac_metric}) == len(self.unifrac_metric),
            "--unifrac-metric must be one or more different ones of unweighted, weighted, faith_pd",
        )
        _require(0 < self.mask_fraction < 1, "--mask-fraction must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Target, heads and losses of stage 2."""

    target: str | None = None
    """Metadata column to predict. [default with the built-in dataset: gradient]"""
    classifier: bool = False
    """Predict classes rather than a number."""
    target_transform: Literal["none", "zscore", "minmax", "log1p-zscore"] = "zscore"
    """How a numeric target is scaled for training; predictions are always in its own units."""
    target_loss: Literal["huber", "mse", "mae", "quantile"] = "huber"
    """Loss of a numeric target."""
    quantiles: tuple[float, ...] = (0.05, 0.5, 0.95)
    """Quantiles that --target-loss quantile learns. The one nearest to 0.5 is the prediction; the others, an interval,
    are written beside it."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the cross entropy; balanced: inversely to their frequency."""
    head_layers: int = 0
    """Attention layers over the ASVs of a sample that the target's head has beside what it reads of clades; the count
    head has one at least."""
    target_heads: int = 4
    """Heads of the target, trained side by side; their mean is the prediction."""
    known_asvs: int = 500
    """Most prevalent ASVs of the training samples whose shares the target head reads, each by itself and as the centre
    of a group of similar ASVs. 0: it reads clades alone."""
    ensemble: bool = False
    """When the network is trained, fit boosted trees on the shares of its known ASVs, and predict by the weighted mean
    of both. The weights come from samples that neither was fitted to; in the end the trees learn from the validation
    samples too. Both are in the best checkpoint."""
    ensemble_folds: int = 4
    """Folds of the training and validation samples that set the weights of the ensemble's members: each fold is
    predicted by members, a network too, that were fitted without it. These networks are averaged with the run's own.
    The folds also choose the rounds of boosting, the temperature of probabilities, and the calibration slope of
    predicted numbers. Groups of --group-column stay together; without it, those of a column that the id files keep
    apart. 0, or a base that is not frozen: the validation samples alone set the weights."""
    target_weight: float = 1.0
    """Weight of the target's loss."""
    count_weight: float | None = None
    """Weight of the loss on the abundances of masked ASVs; 0 leaves the count head out. [default: 0.1; 0 with
    --freeze-base, where the count head trains nothing that the target uses]"""
    count_mask_fraction: float = 0.15
    """Share of a sample's ASVs whose abundance the count head has to fill in."""
    base_weight: float = 0.0
    """Weight of the UniFrac loss in stage 2; needs --tree and --no-freeze-base."""

    def __post_init__(self) -> None:
        _require(self.count_weight is None or self.count_weight >= 0, "--count-weight must not be negative")
        _require(self.base_weight >= 0, "--base-weight must not be negative")
        _require(self.ensemble_folds == 0 or self.ensemble_folds >= 2, "--ensemble-folds must be 0 or at least 2")
        _require(self.head_layers >= 0, "--head-layers must not be negative")
        _require(self.target_heads >= 1, "--target-heads must be at least 1")
        _require(self.known_asvs >= 0, "--known-asvs must not be negative")
        _require(self.target_weight > 0, "--target-weight must be above 0")
        _require(0 < self.count_mask_fraction < 1, "--count-mask-fraction must be between 0 and 1")
        _require(
            len(self.quantiles) > 0 and len({*self.quantiles}) == len(self.quantiles),
            "--quantiles must be one or more different numbers",
        )
        _require(all(0 < q < 1 for q in self.quantiles), "--quantiles must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Stage 1: train a SequenceEncoder on UniFrac (and, with --asv-layers, masked nucleotides), without labels."""

    preset: str | None = None
    """Recipe of settings, one of those listed above; a flag that is given wins over it."""
    output_dir: Path = field(default_factory=lambda: _new_folder("pretrain"))
    """Run folder: settings, metrics.jsonl, TensorBoard logs, pictures and checkpoints."""
    resume: bool = False
    """Go on with the interrupted run in --output-dir."""
    resume_or_start: bool = False
    """Go on with the run in --output-dir where there is one, else start it; one that is finished stays as it is."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: PretrainLossConfig = field(default_factory=PretrainLossConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        _require(
            self.data.tree is not None or self.data.table is None or self.loss.base_weight == 0,
            "--tree is needed for the UniFrac loss (or give --base-weight 0)",
        )
        _check_batch(self.loop, self.ray)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Stage 2: train a SequencePredictor for a column of the metadata, on a stage 1 encoder or from scratch."""

    preset: str | None = None
    """Recipe of settings, one of those listed above; a flag that is given wins over it."""
    output_dir: Path = field(default_factory=lambda: _new_folder("train"))
    """Run folder: settings, metrics.jsonl, TensorBoard logs, pictures, predictions and checkpoints."""
    pretrained: Location | None = None
    """Stage 1 run folder (its best checkpoint is taken) or a checkpoint, path or URI. Without it: from scratch."""
    freeze_base: bool = False
    """Keep the pretrained encoder as it is and train the heads only; what it says is computed once (--base-cache)."""
    resume: bool = False
    """Go on with the interrupted run in --output-dir."""
    resume_or_start: bool = False
    """Go on with the run in --output-dir where there is one, else start it; one that is finished stays as it is."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: TargetConfig = field(default_factory=TargetConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if self.data.table is not None:
            _require(self.data.metadata is not None, "--metadata is needed for the target")
            _require(self.loss.target is not None, "--target is needed: the metadata column to predict")
        _require(
            not self.freeze_base or self.pretrained is not None,
            "--freeze-base needs --pretrained: a random encoder would stay random",
        )
        if self.loss.base_weight > 0:
            _require(
                self.data.tree is not None or self.data.table is None,
                "--base-weight needs --tree: UniFrac is its target",
            )
            _require(not self.freeze_base, "--base-weight trains the base, which --freeze-base keeps as it is")
        _check_batch(self.loop, self.ray)

    @property
    def count_weight(self) -> float:
        """Weight of the count head's loss, as given or as it is by default."""
        if self.loss.count_weight is not None:
            return self.loss.count_weight
        return 0.0 if self.freeze_base else DEFAULT_COUNT_WEIGHT


@dataclass(frozen=True, kw_only=True)
class PredictRayConfig(RayConfig):
    """Where the workers that predict run."""

    num_workers: int | str = 1
    """Processes that share the samples; 1 is this one, without Ray. MIN:MAX: as many as the cluster has room for."""
    use_gpu: bool | None = None
    """One GPU for each worker. [default: where there are enough of them]"""
    max_failures: int = 3
    """How often each worker, if it is lost, is replaced and its share done again."""
    storage_path: Location | None = None
    """Folder or URI that all nodes see, to which the prepared dataset is copied for those that do not see the
    --cache-dir."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Predict the target of new samples with a trained stage 2 model, in the target's own units; with a model of either
    stage, UniFrac and Faith's PD without a tree, and vectors of samples and ASVs.
    """

    checkpoint: Location
    """Run folder (its best checkpoint is taken) or a checkpoint, path or URI; of stage 2 for predictions."""
    table: Path | None = None
    """BIOM table or .qza of the new samples. [default: the table that the model was trained on]"""
    output: Path | None = None
    """Table of predictions to write, predictions.tsv say. Beside it: for classes, class_probabilities.tsv, and
    predictions.skipped.tsv where samples cannot be predicted; of these, what earlier predictions left goes."""
    embeddings: Path | None = None
    """Table of sample embeddings to write, .tsv or .parquet: to which degree a sample has each clade, times the length
    of the clade. --distances counts the ASVs' own branches too, and is nearer to UniFrac than distances of these."""
    asv_embeddings: Path | None = None
    """Table of the vectors of all ASVs of the table to write, by sequence, .tsv or .parquet."""
    distances: Path | None = None
    """Matrix of the predicted UniFrac of all pairs of samples to write, text that scikit-bio and QIIME 2 read. No tree
    is needed; the model must have learned the metric, which a base that was fine-tuned for a target has lost."""
    distance_metric: DistanceMetric = "unweighted"
    """UniFrac of the --distances, one of those that stage 1 learned (--unifrac-metric)."""
    faith_pd: Path | None = None
    """Table of the predicted Faith's PD of each sample to write, metadata for QIIME 2. Needs a stage 1 that learned it
    (--unifrac-metric faith_pd)."""
    part: Literal["all", "train", "val", "test"] = "all"
    """Which samples: all of the table, or those that the run trained on, validated on, or held back (run.json)."""
    report: Path | None = None
    """Markdown file to write: scores on the predicted samples, what was trained on what, how to repeat it."""
    metadata: Path | None = None
    """Metadata with the target of the samples, to score the predictions with in the --report.
    [default: that of the training, where no --table is given]"""
    sequences: Path | None = None
    """FASTA or .qza with the sequences, where the table's feature ids are hashes."""
    prediction_draws: int = 1
    """Rarefactions of each sample over which the predicted target is averaged; with several, their standard deviation
    is written beside it, as prediction_sd: of the number, or of the probability of the predicted class."""
    batch_size: int = 32
    """Samples at a time."""
    asv_chunk_size: int = 1024
    """Distinct ASVs encoded at a time."""
    precision: Precision = "auto"
    """Arithmetic, as in training; auto is bf16 on CUDA and fp32 on CPU."""
    base_cache: bool = True
    """Read the ASV vectors of a frozen base, kept beside the prepared dataset, and keep new ones there."""
    cache_dir: Path | None = None
    """Where prepared datasets are kept. [default: $AAM_CACHE or ~/.cache/aam]"""
    ray: PredictRayConfig = field(default_factory=PredictRayConfig)

    def __post_init__(self) -> None:
        outputs = self.outputs
        _require(
            bool(outputs),
            "nothing to write: give --output, --embeddings, --asv-embeddings, --distances, --faith-pd or --report",
        )
        for path in outputs:
            _require(not path.parts[0].endswith(":"), f"{path}: is a URI; give a path, and copy what is there")
            _require(outputs.count(path) == 1, f"{path}: is given twice; give each a name of its own")
            _require(not path.is_dir(), f"{path}: is a folder; give the name of a file in it")
        for flag in ("embeddings", "asv_embeddings"):
            path = getattr(self, flag)
            _require(
                path is None or path.suffix in (".tsv", ".parquet"),
                f"--{flag.replace('_', '-')} {path}: the name must end with .tsv or .parquet",
            )
        _require(self.prediction_draws >= 1, "--prediction-draws must be at least 1")
        _require(self.batch_size >= 1, "--batch-size must be at least 1")
        _require(self.asv_chunk_size >= 1, "--asv-chunk-size must be at least 1")
        _require(self.sequences is None or self.table is not None, "--sequences needs --table beside it")

    @property
    def outputs(self) -> list[Path]:
        """All that is to be written, as it was named."""
        tables = (self.output, self.report, self.embeddings, self.asv_embeddings, self.distances, self.faith_pd)
        return [path for path in tables if path is not None]

    @property
    def of_samples(self) -> list[Path]:
        """Tables of samples that are to be written; beside the first goes the one that names samples skipped."""
        tables = (self.output, self.embeddings, self.distances, self.faith_pd)
        return [path for path in tables if path is not None]


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Stage 1, stage 2 from its best checkpoint, and a report on held-out samples, as Ray jobs one after the other.

    The same command goes on where it was interrupted, and repeats nothing that is done. Settings are those of both
    stages; what is only one stage's goes into --pretrain-flags or --train-flags.
    """

    preset: str | None = None
    """Recipe of settings, one of those listed above; a flag that is given wins over it."""
    output_dir: Path = field(default_factory=lambda: _new_folder("pipeline"))
    """Folder for stage1, stage2, predictions.tsv and report.md. On a remote cluster, this and all other paths are those
    of the cluster's machines: give them in full."""
    pretrain_flags: str = ""
    """More flags for stage 1, in quotes: --pretrain-flags "--epochs 50 --lr 1e-3"."""
    train_flags: str = ""
    """More flags for stage 2, in quotes."""
    freeze_base: bool = False
    """Keep the pretrained encoder as it is in stage 2 and train the heads only."""
    address: str | None = None
    """Dashboard of a remote Ray cluster, http://HOST:8265, to which this checkout is uploaded.
    [default: $RAY_API_SERVER_ADDRESS, or the Ray cluster of this machine, or a new local one]"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: TargetConfig = field(default_factory=TargetConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        _require(
            self.data.train_ids is None or self.data.test_ids is not None,
            "--test-ids is needed beside --train-ids and --val-ids: the report is on those samples",
        )
        _require(
            self.address is None or self.ray.ray_address is None,
            "--address and --ray-address both name a cluster: give one",
        )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Sweep: trials of stage 1 or stage 2 that differ in their settings; ASHA stops those that fall behind.

    Every other flag of jobs/pretrain.py or jobs/train.py, --preset and --patience too, holds for all trials.
    """

    stage: Literal["pretrain", "train"]
    """What a trial is."""
    num_samples: int = 8
    """Trials, each with settings drawn at random."""
    max_concurrent: int | None = None
    """Trials at a time; they share the cluster. [default: as many as it has room for]"""
    lr: tuple[float, float] | None = None
    """LO HI: learning rates, drawn log-uniformly. [default: 1e-5 1e-3, where nothing else is searched]"""
    token_limit: tuple[int, ...] = ()
    """Token limits to choose from."""
    search: tuple[str, ...] = ()
    """More to search: NAME=A,B,C chooses, NAME=LO..HI draws uniformly, NAME=LO..HI:log log-uniformly. NAME is any
    setting: dropout=0..0.3 embedding-dim=64,128 weight-decay=1e-4..1e-1:log"""
    grace_period: int | None = None
    """Epochs before ASHA may stop a trial. [default: an eighth of --epochs, at most --patience]"""
    reduction_factor: float = 3.0
    """At each rung ASHA lets one in so many trials go on."""
    search_seed: int = 0
    """Seed of the settings that are drawn."""

    def __post_init__(self) -> None:
        _require(self.num_samples >= 1, "--num-samples must be at least 1")
        _require(self.max_concurrent is None or self.max_concurrent >= 1, "--max-concurrent must be at least 1")
        _require(self.lr is None or 0 < self.lr[0] <= self.lr[1], "--lr LO HI: LO must be above 0, HI not below LO")
        _require(all(limit >= 1 for limit in self.token_limit), "--token-limit must be at least 1")
        _require(self.grace_period is None or self.grace_period >= 1, "--grace-period must be at least 1")
        _require(self.reduction_factor > 1, "--reduction-factor must be above 1")


RunConfig = PretrainConfig | TrainConfig


def _check_batch(loop: LoopConfig, ray: RayConfig) -> None:
    most = ray.workers[1]
    _require(
        most == 1 or loop.batch_size >= 2 * most,
        f"--batch-size {loop.batch_size} (over all workers) must be at least 2 x --num-workers {most}",
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dataclasses as JSON types; paths as text."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model on test samples beside simple baselines that were trained on the same samples.

    Trains both stages for each of --seeds, and in each of --folds; or takes a finished run (--checkpoint). The same
    command goes on where it was interrupted, and repeats nothing that is done. Settings are those of both stages; what
    is only one stage's goes into --pretrain-flags or --train-flags.
    """

    preset: str | None = None
    """Recipe of settings, one of those listed above; a flag that is given wins over it."""
    output_dir: Path = field(default_factory=lambda: _new_folder("evaluation"))
    """Folder for evaluation.md, evaluation.tsv, predictions.tsv and the runs: seed-0/stage1, seed-0/stage2, ..."""
    json: Path | None = None
    """File for all scores as JSON, for scripts."""
    checkpoint: Location | None = None
    """Finished run to score on its test samples (run.json), or on those of --test-ids; nothing is trained then. For
    stage 2, --table, --target and other id files must be the run's. For stage 1, its UniFrac is scored: with another
    --table and its --tree, on all samples of that table."""
    study_column: str | None = None
    """Metadata column whose values, studies say, are scored each by itself: with --checkpoint of a stage 1 run."""
    seeds: int = 1
    """Models to train, with --seed and the seeds after it; all on the same split."""
    folds: int | None = None
    """Cross-validation: each sample is a test sample in one of so many folds, whole groups with --group-column.
    [default: one split, by id files or drawn]"""
    repeats: int = 1
    """How often the folds are drawn anew."""
    transductive: bool = False
    """Let stage 1, which reads no labels, train on the test samples too; the results say so."""
    pretrained: Location | None = None
    """Finished stage 1 for all models, instead of one trained for each; where it has seen test samples, without their
    labels, the results say so."""
    from_scratch: bool = False
    """No stage 1: stage 2 trains the encoder too. What does stage 1 help?"""
    label_fraction: float = 1.0
    """Share of the training samples, and of the validation samples, whose target stage 2 and the baselines may use,
    drawn by --seed; stage 1 has all of both. For learning curves."""
    rarefied_baselines: bool = False
    """Baselines read what the model sees of each sample, --rarefy-depth reads, in place of all reads: for a target that
    goes along with how deeply samples were sequenced."""
    skip_baselines: tuple[Baseline, ...] = ()
    """Baselines to do without; gradient_boosting may take minutes."""
    pretrain_flags: str = ""
    """More flags for stage 1, in quotes: --pretrain-flags "--epochs 50 --lr 1e-3"."""
    train_flags: str = ""
    """More flags for stage 2, in quotes."""
    freeze_base: bool = False
    """Keep the pretrained encoder as it is in stage 2 and train the heads only."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: TargetConfig = field(default_factory=TargetConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        data = self.data
        _require(self.seeds >= 1, f"--seeds must be at least 1, not {self.seeds}")
        _require(self.folds is None or self.folds >= 2, f"--folds must be at least 2, not {self.folds}")
        _require(self.repeats >= 1, f"--repeats must be at least 1, not {self.repeats}")
        _require(
            0 < self.label_fraction <= 1, f"--label-fraction must be above 0, at most 1, not {self.label_fraction}"
        )
        _require(
            not self.from_scratch or self.pretrained is None,
            "--from-scratch does without a stage 1, which --pretrained names: give one of them",
        )
        _require(
            not self.from_scratch or not self.freeze_base,
            "--from-scratch trains the encoder, which --freeze-base keeps as it is: give one of them",
        )
        _require(self.repeats == 1 or self.folds is not None, "--repeats needs --folds, which it draws anew")
        listed = data.train_ids is not None or data.test_ids is not None or data.test_fraction > 0
        _require(
            not listed or self.folds is None,
            "--folds makes each sample a test sample: leave out --train-ids, --val-ids, --test-ids and --test-fraction",
        )
        _require(
            data.train_ids is None or data.test_ids is not None,
            "--test-ids is needed beside --train-ids and --val-ids: the scores are on those samples",
        )
        _require(
            self.study_column is None or self.checkpoint is not None,
            "--study-column scores the UniFrac of a stage 1 run: give it by --checkpoint",
        )
        if self.checkpoint is not None:
            trains = {
                "--folds": self.folds is not None,
                "--test-fraction": data.test_fraction > 0,
                "--transductive": self.transductive,
                "--pretrained": self.pretrained is not None,
                "--from-scratch": self.from_scratch,
                "--label-fraction": self.label_fraction < 1,
                "--pretrain-flags": bool(self.pretrain_flags) and self.preset is None,
                "--train-flags": bool(self.train_flags) and self.preset is None,
            }
            given = ", ".join(flag for flag, is_given in trains.items() if is_given)
            _require(not given, f"--checkpoint scores a finished run and trains nothing: leave out {given}")
