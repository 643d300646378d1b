"""Every setting of `preprocess`, as one tree of frozen models; those of `train`: `schemas.train_config`.

Unknown keys are errors that name their dotted path. A docstring under each field gives meaning,
unit and default. Files are read by `schemas.load`; nothing here touches the disk.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from schemas.text_family import FAMILIES, FamilyName

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Rate = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


class Settings(BaseModel):
    """Strict and frozen: no unknown key, no silent cast, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


Policy = Literal[
    "uniform",
    "keyframe",
    "fps",
    "contiguous",
    "cogvideox_floor",
    "cogvideox_sat",
    "finetrainers_linspace",
    "ttt_exact",
    "latentsync_contiguous",
]
AT_A_RATE = ("fps", "contiguous")
"""Policies that run at `target_fps` and can make several clips of a row."""
SEVERAL = ("chunk", "slide")
"""Of `frames.clips`, those under which the number of clips depends on the file."""


class FramesConfig(Settings):
    """Which pictures of a clip become its frames."""

    policy: Policy = "uniform"
    """`uniform`: the whole clip at stride S = total / num_frames. `keyframe`: the whole clip, denser where
    it is active. `fps`: resampled to `target_fps`. `contiguous`: pictures at one whole-number stride,
    the nearest to `target_fps`. The others repeat the frame arithmetic of the trainer they name,
    index for index."""
    boost: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """`keyframe`: weight of activity beside the even spread; 0 is `uniform`. No gap is longer than
    (1 + boost) times S plus the time one picture is on screen."""
    activity: Literal["packets", "exact"] = "packets"
    """`keyframe`: activity from packet sizes (free), or from the luma of every picture (decodes the clip
    a second time)."""
    target_fps: PositiveFloat = 8.0
    """Frames per second of `fps` and `contiguous`."""
    clips: Literal["head", "chunk", "slide", "whole"] = "head"
    """`fps` and `contiguous`: the first num_frames, consecutive clips, clips that overlap, or one clip as
    long as the row, up to num_frames. `whole` cuts to the nearest count below that the video encoder and
    `target` take. Frames left over at the end make no clip of their own."""
    slide_step: Positive = 24
    """`slide`: frames from the start of one clip to the start of the next."""
    short: Literal["interpolate", "nearest", "repeat_last", "drop", "error"] = "interpolate"
    """A clip with fewer pictures than num_frames (`whole`: than the least count of more than one frame):
    blend in time, show the nearest picture, repeat the last one, quarantine it as `too_short`, or stop the
    run."""
    max_slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Most frames made of one picture, on average, when filling up (num_frames / pictures); above it
    the clip is quarantined as `too_short`. Unset fills up any clip, and notes it above 2."""

    @model_validator(mode="after")
    def _clips_at_a_rate(self) -> FramesConfig:
        if self.clips != "head" and self.policy not in AT_A_RATE:
            raise ValueError(
                f"clips = {self.clips!r} needs policy = {' or '.join(map(repr, AT_A_RATE))}; "
                f"{self.policy!r} makes one clip of a row"
            )
        return self


class BucketConfig(Settings):
    """One output shape; the bucket with the nearest aspect ratio wins."""

    num_frames: Positive
    """Frames per clip, the most of one under `frames.clips = "whole"`; the video encoder's frame rule must
    allow it (`dct`: 4n + 1)."""
    height: Positive
    """Pixels; a multiple of 16 (8 of the encoder times 2 of the transformer's patch)."""
    width: Positive
    """Pixels; a multiple of 16."""


class ResizeConfig(Settings):
    """How a picture is fitted into its bucket."""

    mode: Literal["cover_crop", "pad", "stretch"] = "cover_crop"
    """`cover_crop` fills and cuts the centre, `pad` fits with black bars, `stretch` distorts."""


Level = Annotated[int, Field(ge=0, le=255)]


class PictureConfig(Settings):
    """What is done to pictures that are not plain progressive 8-bit video."""

    deinterlace: Literal["bwdif", "off"] = "bwdif"
    """Interlaced pictures: `bwdif` rebuilds the missing lines from the pictures around, `off` leaves both
    fields woven together; both are recorded."""
    hdr: Literal["tonemap", "quarantine", "keep"] = "tonemap"
    """PQ and HLG clips: mapped to SDR BT.709, quarantined as `hdr`, or kept with their curve (they look
    flat)."""
    background: Annotated[tuple[Level, Level, Level], Field(strict=False)] = (0, 0, 0)
    """Red, green, blue under transparent pixels."""


class DecodeConfig(Settings):
    """Who decodes."""

    backend: Literal["pyav", "torchcodec", "decord"] = "pyav"
    """`pyav`: the packet plan. The others decode what was chosen on the same timestamps; they convert
    colours their own way, and read fewer files."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: NVDEC, `torchcodec` only."""
    threads: Positive = 1
    """Decoder threads a clip. More than one only helps with fewer clips than cores."""

    @model_validator(mode="after")
    def _who_has_cuda(self) -> DecodeConfig:
        if self.device == "cuda" and self.backend != "torchcodec":
            raise ValueError(f"device = 'cuda' needs backend = 'torchcodec', found {self.backend!r}")
        return self


class TargetConfig(Settings):
    """Rules of the video model that will train on the latents, checked before anything runs. They change no
    number, but how long a clip is under `frames.clips = "whole"`."""

    frame_multiple: Positive = 1
    """num_frames must be a multiple of this, plus 1 (16 for whole seconds of CogVideoX 1.5 and TTT)."""
    patch_size_t: Positive = 1
    """Latent frames in a patch of the transformer; their number must divide (2 for CogVideoX 1.5)."""
    patch_size: Positive = 2
    """Latent rows and columns in a patch of the transformer; height and width must divide (1 for LTX)."""
    token_multiple: Positive = 1
    """Video and text tokens of a clip must be a multiple of this (64, TTT's mini-batch)."""
    segment_frames: NonNegative = 0
    """Frames a caption stands for, where a clip is told in segments (48, TTT's 3 s); 0: one caption."""


class VideoEncoderConfig(Settings):
    """The model that turns frames into latents. `dct` uses only `dtype`, `store` and `segment_frames`."""

    kind: Literal["dct", "diffusers"] = "dct"
    """`dct`: the embedded codec with CogVideoX's geometry; needs no weights. `diffusers`: any of its
    `AutoencoderKL*` classes, for video or frame by frame."""
    model: str = ""
    """Hub id or folder, of the VAE itself or of a whole pipeline."""
    subfolder: str = "vae"
    """Folder of the VAE inside a pipeline."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty: its main branch."""
    dtype: Dtype = "float32"
    """Type of the stored latents."""
    store: Literal["moments", "mean", "sample"] = "moments"
    """`moments` stores the posterior (`mean`, `logvar`), unscaled; the others one tensor `latents`."""
    image_latents: bool = False
    """Keep what image-to-video needs: the encoding of a clip's first frame alone. Where that is the clip's
    first latent frame, nothing more is stored."""
    segment_frames: NonNegative = 0
    """Encode a clip in independent pieces of so many frames, so that any window of whole pieces is what
    encoding it alone would give; 0: as a whole."""
    compute_dtype: Dtype = "float32"
    """Type the model runs in."""
    device: Device = "auto"
    """`auto`: a GPU where torch sees one."""
    batch_size: Positive | None = None
    """Clips of a bucket encoded at once; halved when memory runs out. Unset: 1 on a CPU, on a GPU as many as
    make the pixels of one clip of 49 x 480 x 720."""
    tiling: Literal["auto", "off", "on"] = "auto"
    """Encode in overlapping tiles: less memory, other numbers. `auto`: for the buckets of which a single
    clip does not fit without, found out before the first unit."""
    channels_last: bool = False
    """Weights and frames in channels-last layout: faster convolutions on some GPUs."""
    compile: bool = False
    """Compile the encoder with torch.compile: minutes at the start, faster afterwards on some GPUs."""

    @model_validator(mode="after")
    def _has_a_model(self) -> VideoEncoderConfig:
        if self.kind == "diffusers" and not self.model:
            raise ValueError("kind = 'diffusers' needs model: a hub id or a folder")
        if self.model and "kind" not in self.model_fields_set:
            raise ValueError("model without kind would not be used; expected kind = 'diffusers' beside it")
        return self


class TextEncoderConfig(Settings):
    """The model that turns captions into prompt embeddings; `tiny-t5` uses `max_length` and `padding`."""

    kind: Literal["tiny-t5", "t5"] = "tiny-t5"
    """`tiny-t5`: a seeded tiny T5 with the byte tokenizer; for demos and tests only. `t5`: the encoder of any
    T5, UMT5 or ByT5."""
    model: str = ""
    """Hub id or folder, of the encoder itself or of a whole pipeline."""
    subfolder: str = "text_encoder"
    """Folder of the encoder inside a pipeline; its tokenizer is in `tokenizer`."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty: its main branch."""
    family: FamilyName = "cogvideox"
    """The video model that will read the embeddings: decides whether the encoder sees an attention mask, what
    becomes of pad rows and how captions are cleaned."""
    max_length: Positive = 226
    """Tokens; longer captions are cut, and the sample says so. Unset: as in the pipeline of `family` (wan,
    allegro and cosmos 512, mochi 256, cogvideox 226, ltx 128); for `tiny-t5` 226."""
    padding: Literal["full", "trim"] = "full"
    """`full` keeps pad rows. `trim` drops them, where nothing is lost: they are zeros (wan, cosmos), or a
    mask hides them from the model (ltx, mochi, allegro); cogvideox sees them."""
    dtype: Dtype = "float32"
    """Type of the stored embeddings."""
    compute_dtype: Dtype = "float32"
    """Type the model runs in."""
    device: Device = "auto"
    """`auto`: a GPU where torch sees one."""
    batch_size: Positive | None = None
    """Captions encoded at once; halved when memory runs out. Unset: 1 on a CPU, 32 on a GPU."""

    @model_validator(mode="before")
    @classmethod
    def _length_of_the_family(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("kind") == "t5" and "max_length" not in given:
            name = given.get("family", "cogvideox")
            if isinstance(name, str) and name in FAMILIES:
                return {**given, "max_length": FAMILIES[name].max_length}
        return given

    @model_validator(mode="after")
    def _has_a_model(self) -> TextEncoderConfig:
        if self.kind == "t5" and not self.model:
            raise ValueError("kind = 't5' needs model: a hub id or a folder")
        if self.model and "kind" not in self.model_fields_set:
            raise ValueError("model without kind would not be used; expected kind = 't5' beside it")
        if self.kind == "t5" and self.padding == "trim" and not FAMILIES[self.family].trims:
            raise ValueError(
                f"padding = 'trim' would change what {self.family} is given: its T5 runs without a mask and "
                "its transformer sees the pad rows; expected padding = 'full'"
            )
        return self


class ExecutorConfig(Settings):
    """Where units run."""

    kind: Literal["auto", "local", "ray"] = "auto"
    """`auto`: `local` for one worker, `ray` for more or when an address is given."""
    workers: Positive = 2
    """Ray actors that each make whole units. `local` has one worker, this process, and begins with so many
    decoder children, as far as memory allows. The shards do not depend on it."""
    address: str = ""
    """Ray cluster to join; empty starts Ray on this machine."""
    gpus_per_worker: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """GPU share each actor asks Ray for; with 0 it sees none, with less than 1 an encoder takes no more than
    that share of the GPU's memory. Unset: a whole one where an encoder runs on GPUs and there are some, else
    0."""
    decoders_per_worker: Positive | None = None
    """Decoder children of each worker. Unset: as many as the measured ratio of decoding to encoding asks for
    and the machine has cores for (`local`: and memory)."""
    decode_actors: NonNegative = 0
    """Ray actors that only decode, on any node with a free core, and send frames to the workers, among which
    they are dealt out: at least one each. 0: every worker decodes on its own machine."""
    together: bool = False
    """Keep text and video encoder in a worker's memory at once, and run prompts and latents in one pass;
    otherwise prompts first, then latents."""

    @model_validator(mode="after")
    def _has_actors(self) -> ExecutorConfig:
        if self.kind == "local" and self.decode_actors:
            raise ValueError("decode_actors are Ray's; kind = 'local' has none: choose 'auto' or 'ray'")
        if self.decode_actors and self.decoders_per_worker:
            raise ValueError(
                "decoders_per_worker is of children, and with decode_actors workers have none; set one"
            )
        if 0 < self.decode_actors < self.workers:
            raise ValueError(
                f"decode_actors = {self.decode_actors} is fewer than workers = {self.workers}, which need "
                "one each; raise it, or 0 to decode in the workers"
            )
        return self


class UnitsConfig(Settings):
    """How rows are grouped into shards."""

    rows: Positive = 64
    """Clips per shard; never depends on the number of workers."""


class LimitsConfig(Settings):
    """What one clip may cost; past a limit it is quarantined, its neighbours go on."""

    max_bytes: Positive = 16 * 2**30
    """Size of the file in bytes; a download is ended there."""
    max_pixels: Positive = 8192 * 8192
    """Area of one coded picture in pixels."""
    max_seconds: PositiveFloat = 4 * 3600.0
    """Duration in seconds, as the header declares it and as the packets show it."""
    max_frames: Positive = 1_000_000
    """Video packets in the file, as the header declares them and as they are counted."""
    max_fps: PositiveFloat = 1000.0
    """Pictures per second on average; more is a broken clock, unless it is a high-speed camera's."""
    clip_timeout_s: PositiveFloat = 300.0
    """Wall clock for opening and decoding one clip, and for fetching one file, in seconds."""
    memory_bytes: Positive = 6 * 2**30
    """Address space of a decoder process in bytes, beside the shared memory that its clips lie in."""
    max_damage: Rate = 0.1
    """Share of the wanted pictures that may be undecodable; each is replaced by its nearest
    decodable neighbour and recorded. Above it the clip is quarantined as `damaged`."""


class SourcesConfig(Settings):
    """Which videos a manifest may name. Any path of this machine, and no URL, unless these say otherwise."""

    root: str = ""
    """Folder that every file must lie in, links followed; for manifests from strangers. Empty: a path in a
    manifest is taken at its word."""
    schemes: Annotated[tuple[Literal["http", "https", "s3"], ...], Field(strict=False)] = ()
    """Kinds of URL that may be fetched."""
    hosts: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Host names (for `s3`: buckets) that may be asked, with `:port` where it is not the usual one;
    `*.example.com` stands for every name below example.com. Addresses that are private, local or reserved
    are refused whatever their name."""

    @model_validator(mode="after")
    def _both_or_none(self) -> SourcesConfig:
        if bool(self.schemes) != bool(self.hosts):
            raise ValueError("URLs are fetched where both schemes and hosts are given; found only one")
        return self


class QuarantineConfig(Settings):
    """How many failed clips a run may end with."""

    max_rate: Rate = 0.05
    """Share of clips, without those dropped as `too_short` or `hdr`, which settings ask for; above it the
    command ends with exit code 3. Where it is above a half, so is the share of the first 200 clips that
    stops a run."""


class PreprocessConfig(Settings):
    """The config of `latentpress preprocess`."""

    manifest: Text
    """Manifest file (.jsonl, .csv, .parquet) or a folder of videos with sidecar captions."""
    output: Text
    """Folder of the latent dataset, or s3://BUCKET/PREFIX (extra `s3`)."""
    seed: int = 0
    """Seeds what is drawn at random (`store = "sample"`)."""
    identity: Literal["content", "sampled"] = "content"
    """What makes a source file the same file: all its bytes, or its size and sampled blocks."""
    frames: FramesConfig = FramesConfig()
    buckets: Annotated[tuple[BucketConfig, ...], Field(min_length=1, strict=False)] = (
        BucketConfig(num_frames=49, height=480, width=720),
    )
    resize: ResizeConfig = ResizeConfig()
    picture: PictureConfig = PictureConfig()
    decode: DecodeConfig = DecodeConfig()
    target: TargetConfig = TargetConfig()
    video_encoder: VideoEncoderConfig = VideoEncoderConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    executor: ExecutorConfig = ExecutorConfig()
    units: UnitsConfig = UnitsConfig()
    sources: SourcesConfig = SourcesConfig()
    limits: LimitsConfig = LimitsConfig()
    quarantine: QuarantineConfig = QuarantineConfig()

    @field_validator("buckets")
    @classmethod
    def _distinct(cls, buckets: tuple[BucketConfig, ...]) -> tuple[BucketConfig, ...]:
        seen: dict[BucketConfig, int] = {}
        for i, bucket in enumerate(buckets):
            if bucket in seen:
                raise ValueError(f"bucket {i} repeats bucket {seen[bucket]}; remove one")
            seen[bucket] = i
        return buckets
