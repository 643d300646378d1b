"""Every setting of `train`, as one tree of frozen models.

Unknown keys are errors that name their dotted path. A docstring under each field gives meaning,
unit and default. Files are read by `schemas.load`; nothing here touches the disk.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from schemas.config import NonNegative, Positive, PositiveFloat, Rate, Settings, Text

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Patterns = Annotated[tuple[str, ...], Field(min_length=1, strict=False)]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


def _all_compile(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(_compiles, patterns))


class DatasetConfig(Settings):
    """One of several datasets that are trained on together."""

    path: Text
    """Latent dataset written by `latentpress preprocess`: a folder, or s3://BUCKET/PREFIX (extra `s3`)."""
    weight: PositiveFloat = 1.0
    """How often an epoch visits each of its samples; with 0.5 every other epoch does."""


class ModelConfig(Settings):
    """The video transformer."""

    kind: Literal["cogvideox", "dit"] = "cogvideox"
    """`cogvideox`: diffusers' CogVideoXTransformer3DModel on a packed token stream; `dit`: a plain diffusion
    transformer of this project, for training from scratch."""
    init: Text = "random"
    """`random`, or a folder or hub id in the diffusers layout."""
    revision: str = ""
    """Branch, tag or commit of a hub id."""
    attention: Literal["auto", "flash_attn_3", "varlen", "flash_attn_2", "flex", "sdpa"] = "auto"
    """How packed attention is computed; `auto` takes the best that passes its probe here, and says why."""
    recompute: Literal["none", "attention", "feed_forward", "block"] = "none"
    """What of each block is computed again in the backward pass instead of kept: less memory, more time.
    The results of attention are kept in any case (but for `flex`), as nothing costs more to compute again: a
    block then keeps its input and those, one value each per token and width."""
    compile: bool = False
    """Compile each block with torch.compile. With mesh.sp > 1 attention, and what ranks trade around it, runs
    between compiled parts."""
    num_layers: Positive = 2
    """Transformer blocks; this and the fields below, down to `text`, are for `init = "random"`: what a folder
    has is its own, and another value is refused."""
    num_attention_heads: Positive = 4
    """Heads per block."""
    attention_head_dim: Annotated[int, Field(gt=0, multiple_of=16)] = 32
    """Width of one head; a multiple of 16 (rotary embedding over time, height, width)."""
    time_embed_dim: Positive = 128
    """Width of the timestep embedding."""
    patch_size_t: Literal[1, 2] = 1
    """Latent frames per token; 2 as in CogVideoX 1.5."""
    image_condition: bool = False
    """Image to video: the clip's first frame is given beside the noisy latents."""
    text: Literal["joint", "cross"] = "joint"
    """`joint`: prompt and video tokens attend to each other; `cross` (`dit` only): video attends to the
    prompt in layers of their own, behind a projector."""
    local_frames: NonNegative = 0
    """Latent frames that attend to each other, each piece with a copy of the prompt (the first frame counts
    to the first piece); 0: the whole clip."""
    long_context: Literal["none", "linear"] = "none"
    """`linear`: a gated linear attention over the whole clip in every block, beside local attention."""


class MeshConfig(Settings):
    """Device mesh; the product is the world size."""

    dp_replicate: Positive = 1
    """HSDP replicas."""
    dp_shard: Positive = 1
    """FSDP shards per replica; 1 with more ranks means "all of them"."""
    sp: Positive = 1
    """Sequence-parallel degree: ranks that share the tokens of one pack. Divides the number of heads."""
    tp: Positive = 1
    """Tensor-parallel degree: ranks that share every matrix of a block. Divides the number of heads."""


class PrecisionConfig(Settings):
    """Arithmetic of the training step."""

    param: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and activations in forward and backward; bfloat16 on GPUs."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """Type of the gradient reduction."""
    deterministic: bool = True
    """Ask torch for deterministic kernels: the same run gives the same bits."""


class DataConfig(Settings):
    """How samples become packs."""

    budget_tokens: Positive = 4096
    """Tokens (video and text) per pack; at least the longest sample. A stage may have its own."""
    slots: Positive = 1
    """Packs per optimizer step over all ranks; the data-parallel world size must divide it. A stage may have
    its own."""
    balance_packs: Positive = 128
    """Packs whose order is given up so that the packs of one step cost about the same."""
    prefetch: NonNegative = 2
    """Packs read ahead; 0 reads in the training thread."""
    readers: Positive = 2
    """Threads that read ahead."""
    captions: Literal["each", "lot"] = "each"
    """Of a clip with several captions an epoch visits the clip with each, or once, with one drawn by lot."""
    caption_dropout: Rate = 0.0
    """Share of visits with the empty prompt in place of the caption; for guidance when sampling."""
    image_dropout: Rate = 0.0
    """Image to video: share of visits without the first frame's condition."""
    max_unreadable: NonNegative = 0
    """Samples that may be unreadable, on all ranks together, counted anew when a run is resumed; each is
    logged and weighs nothing. One more stops the run. Counts as 0 in a run with mesh.sp or mesh.tp above 1,
    where ranks share a pack and each reads it."""
    cache: str = ""
    """Folder that keeps what was read from s3:// datasets; empty: read anew each time."""
    cache_gb: PositiveFloat = 100.0
    """Most it may hold, in 1e9 bytes; what was used longest ago goes first."""


class LossConfig(Settings):
    """The objective."""

    objective: Literal["v", "eps", "flow"] = "v"
    """`v`: CogVideoX's velocity on its zero-terminal-SNR schedule; `eps`: the noise, on the same schedule
    without that rescaling; `flow`: rectified flow, noise minus clean."""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """How a clip's timestep is drawn; `logit_normal` is for `flow`."""
    shift: PositiveFloat = 1.0
    """`flow` only: how far timesteps are moved towards noise (Stable Diffusion 3's timestep shift)."""
    keyframe_lambda: PositiveFloat = 1.0
    """Weight of the most active frames beside 1 for still ones, from the dataset's frame weights."""
    consistency_alpha: NonNegativeFloat = 0.0
    """Weight of the error of differences between neighbouring latent frames of a clip."""
    normalize: Literal["per_clip", "per_token"] = "per_clip"
    """Every clip weighs the same, or every token does."""

    @model_validator(mode="after")
    def _flow_only(self) -> LossConfig:
        if self.objective != "flow" and (self.timesteps != "uniform" or self.shift != 1.0):
            raise ValueError("timesteps = 'logit_normal' and shift are settings of objective = 'flow'")
        return self


class OptimConfig(Settings):
    """AdamW and the gradient clip."""

    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """Decay of the first and second moment; 0 or more, below 1."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled; not on biases and norms."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient-norm clip."""


class CheckpointConfig(Settings):
    """When training state is saved."""

    every: Positive = 500
    """Optimizer steps between saves; the last step is always saved."""
    keep: Positive = 2
    """Newest complete checkpoints kept."""
    background: bool = True
    """Write while training goes on; the step waits only for a copy to host memory."""
    time_limit_s: NonNegativeFloat = 0.0
    """Seconds after its start at which the run saves and ends, to be started again; 0: none but a Slurm job's
    own end time."""
    time_margin_s: NonNegativeFloat = 120.0
    """Seconds before that limit by which the last step should be done: time to save in. No step is begun that
    would not be done by then if it took as long as the longest of the last twenty."""

    @model_validator(mode="after")
    def _time_to_train(self) -> CheckpointConfig:
        if 0 < self.time_limit_s <= self.time_margin_s:
            raise ValueError(
                f"time_limit_s = {self.time_limit_s:g} leaves no time to train: expected more than "
                f"time_margin_s, {self.time_margin_s:g} s, which is kept for the last save"
            )
        return self


class ValidationConfig(Settings):
    """What is held out and looked at. Comparable between runs: same split, noise and timesteps."""

    share: Rate = 0.0
    """Share of the source files that is never trained on, by a hash of their content; 0: none, and losses
    and samples are of training clips."""
    every: NonNegative = 0
    """Optimizer steps between validations; each stage ends with one too, and 0 means no others. Only where
    `share` or `samples` is set; a checkpoint is saved before each."""
    clips: Positive = 64
    """Most clips whose loss is taken, the same ones each time."""
    timesteps: Annotated[tuple[Rate, ...], Field(min_length=1, strict=False)] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels at which every clip's loss is taken, as shares of the schedule."""
    samples: NonNegative = 0
    """Clips that are sampled from their captions and shown beside the originals."""
    sample_steps: Positive = 50
    """Denoising steps of a sample."""
    guidance: NonNegativeFloat = 6.0
    """Classifier-free guidance against the empty prompt; 1: none."""


class LrGroupConfig(Settings):
    """A learning rate of their own for some parameters; warm-up is that of the others."""

    match: Text
    """Regex over parameter names, or a named group, as in `trainable`; of several groups the first that fits
    counts."""
    peak: NonNegativeFloat
    """Highest value."""
    kind: Literal["cosine", "constant"] = "cosine"
    """After warm-up: cosine to `end` at the stage's end, or constant."""
    end: NonNegativeFloat = 0.0
    """Where the cosine ends."""

    _regex = field_validator("match")(_compiles)


class LrConfig(Settings):
    """Learning rate as a pure function of the step."""

    peak: NonNegativeFloat
    """Highest value."""
    warmup: NonNegative = 0
    """Linear warm-up, in steps."""
    kind: Literal["cosine", "constant"] = "cosine"
    """After warm-up: cosine to `end` at the stage's end, or constant."""
    end: NonNegativeFloat = 0.0
    """Where the cosine ends."""
    groups: Annotated[tuple[LrGroupConfig, ...], Field(strict=False)] = ()
    """Other rates for some parameters, as in [{ match = "@long_context", peak = 1e-4 }]."""


class FilterConfig(Settings):
    """Which samples a stage trains on; all that meet every condition given."""

    min_s: NonNegativeFloat = 0.0
    """Shortest clip, in source seconds."""
    longest_s: PositiveFloat | None = None
    """Longest clip, in source seconds (`max_s` of a stage cuts longer ones instead)."""
    buckets: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Names of buckets, as in "49x480x720"."""
    tags: dict[str, Annotated[tuple[str | int | float | bool, ...], Field(strict=False)]] = Field(
        default_factory=dict
    )
    """Extra columns of the manifest and the values that are wanted, as in {"style" = ["anime"]}. Of a list
    one of its items; 5 also finds the text "5", as CSV files have it."""


class LoraConfig(Settings):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685) instead of the matrices themselves."""

    targets: Patterns = ("to_q", "to_k", "to_v", r"to_out\.0")
    """Regexes that the names of linear layers end with."""
    rank: Positive = 128
    """Width of the adapters."""
    alpha: PositiveFloat | None = None
    """Their scale is alpha / rank; unset: 1."""

    _regexes = field_validator("targets")(_all_compile)


class StageConfig(Settings):
    """One part of the curriculum."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    """Used in logs and checkpoints."""
    steps: Positive
    """Optimizer steps."""
    init: str = ""
    """Start weights, as `model.init`; empty: those of the stage before."""
    filter: FilterConfig = FilterConfig()
    max_s: PositiveFloat | None = None
    """Longest window of a sample used, in source seconds (`schemas.windows`); unset uses whole samples."""
    max_frames: Positive | None = None
    """Longest window in pixel frames, in place of `max_s`; a count that the encoder takes."""
    window: Literal["prefix", "slice", "segments"] = "prefix"
    """Which part of a longer sample is used: `prefix` is its first latent frames, `slice` any run of them,
    drawn at each visit, `segments` any run of whole pieces of a dataset encoded in independent pieces.
    `latentpress inspect --drift` says how near these are to encoding the window alone."""
    budget_tokens: Positive | None = None
    """In place of data.budget_tokens."""
    slots: Positive | None = None
    """In place of data.slots."""
    token_multiple: Positive = 1
    """What the tokens of every window must be a multiple of, also where its caption is dropped; TTT-Video's
    layers take blocks of 64."""
    mesh: MeshConfig | None = None
    """In place of `mesh`."""
    trainable: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Regexes over parameter names, or named groups (`@attention`, `@norms` ...); one that matches nothing is
    an error. Empty: all parameters, or with `lora` none besides the adapters."""
    lora: LoraConfig | None = None
    """Train adapters beside linear layers, and what `trainable` names."""
    lr: LrConfig

    _regexes = field_validator("trainable")(_all_compile)

    @model_validator(mode="after")
    def _one_window(self) -> StageConfig:
        if self.max_s is not None and self.max_frames is not None:
            raise ValueError("a window is bounded by max_s or by max_frames; found both")
        return self


class TrainConfig(Settings):
    """The config of `latentpress train`."""

    dataset: str = ""
    """Latent dataset written by `latentpress preprocess`: a folder, or s3://BUCKET/PREFIX (extra `s3`)."""
    datasets: Annotated[tuple[DatasetConfig, ...], Field(strict=False)] = ()
    """Several datasets, in place of `dataset`."""
    output: Text
    """Folder of the run: checkpoints, metrics, loss curve, samples."""
    seed: int = 0
    """Seeds initialisation, order, noise and timesteps."""
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, strict=False)]

    @property
    def mixture(self) -> tuple[DatasetConfig, ...]:
        """The datasets, however they were given."""
        return self.datasets or (DatasetConfig(path=self.dataset),)

    @model_validator(mode="after")
    def _some_data(self) -> TrainConfig:
        if bool(self.dataset) == bool(self.datasets):
            raise ValueError(
                "expected `dataset` or `datasets`, found " + ("both" if self.dataset else "none")
            )
        return self

    @model_validator(mode="after")
    def _stage_names(self) -> TrainConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, found {names}")
        return self
