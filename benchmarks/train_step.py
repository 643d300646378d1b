"""What a training step costs: packed, padded or a clip at a time; determinism, saves and waiting for data.

Whole steps of the trainer's own parts with random weights and made-up clips, the curriculum's lengths in
equal shares: forward, backward, gradient clip, AdamW. Batches are noised, collated and pinned beforehand, as
the trainer does while the step before runs; what that takes is a number of its own. Every way trains on the
same clips; tokens count once and without padding. `pad to longest` and `pad in batch` have as many clips in a
batch as the budget holds of the longest, padded to the longest of all or of their batch; they compute the
padding, as attention with a mask does. On CPUs ways are timed in CPU seconds, which other work on the machine
leaves as they are. Beside the tokens/s stands their share of a ceiling: of the FLOPs the device has by its
data sheet, and of those it reaches in one large matrix product.

Every rank calls `measure`, alone, under --nproc or under torchrun.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from benchmarks.models import architecture_of
from schemas.config import Positive, PositiveFloat, Settings, Text
from schemas.load import check_config
from schemas.train_config import MeshConfig, TrainConfig
from trainer.architecture import Architecture
from trainer.attention import Attention
from trainer.batch import Batch, prepare
from trainer.catalog import Catalog
from trainer.checkpoint import KEYS, checkpoints_folder, newest
from trainer.feed import feed
from trainer.flops import PackShape, device_peak, pack_flops
from trainer.loader import Loader
from trainer.losses import batch_loss
from trainer.metrics import memory_gb
from trainer.mixture import Mixture
from trainer.model import build_model
from trainer.objective import make_objective
from trainer.optim import make_optimizer, set_lr
from trainer.order import keyed_generator
from trainer.packing import Pack, Segment, StepWeights, plan_packs
from trainer.parallel import Member, World, join
from trainer.probe import choose_attention
from trainer.saver import Saver
from trainer.sharding import clip_grad_norm, fill, parallelize, predict

FPS, TEMPORAL, SPATIAL, PATCH = 8, 4, 8, 2
PACKED, PADDED, IN_BATCH, ONE = "packed", "pad to longest", "pad in batch", "batch 1"
EXACT = "packed, deterministic"
GOALS = {PADDED: 2.5, ONE: 1.2}
"""Tokens/s of `packed` over these; the second is for short clips on a GPU."""
GOAL_MFU = {"dit": 0.40, "cogvideox-5b": 0.35}
"""One H200, bfloat16, compiled."""
GOAL_SAVE, GOAL_WAIT = 0.02, 0.01
SAVE_EVERY = 500
Pixels = Annotated[int, Field(gt=0, multiple_of=SPATIAL * PATCH)]


class StepSettings(Settings):
    """What is measured."""

    model: Text
    """One of `benchmarks.models`."""
    durations_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, strict=False)]
    height: Pixels
    width: Pixels
    prompt_tokens: Positive
    budget: Positive
    """Tokens of a pack, in units of the longest clip."""
    packs: Positive
    """Per rank and step, about."""
    dtype: Literal["float32", "bfloat16"]
    attention: Literal["auto", "flash_attn_3", "varlen", "flash_attn_2", "flex", "sdpa"] = "auto"
    recompute: Literal["none", "attention", "feed_forward", "block"] = "none"
    compile: bool = False
    layers: Positive | None = None
    """In place of the model's own number."""
    reps: Positive = 5
    saves: Positive = 3
    dataset: str = ""
    """To measure waiting for data on."""
    loader_steps: Positive = 30

    def frames(self, seconds: float) -> int:
        """Latent frames of a clip."""
        return int(seconds * FPS) // TEMPORAL + 1

    def tokens(self, seconds: float) -> int:
        """Video and prompt tokens of a clip."""
        side = SPATIAL * PATCH
        return self.frames(seconds) * (self.height // side) * (self.width // side) + self.prompt_tokens


Clip = tuple[float, float]
"""Its seconds, and those it is padded to."""
Way = list[list[Clip]]
"""Micro-batches of one rank, a forward and backward pass each."""


class Bench:
    """A model in training, and made-up clips for it."""

    def __init__(self, settings: StepSettings, world: World) -> None:
        self.settings, self.world = settings, world
        self.architecture, self.config = _setup(settings, ranks=world.dp_size)
        model = self.architecture.config
        with _determinism(True):  # some kernels are told when they are chosen
            self._exact = self._route(model)
        self.attention = self._route(model)
        with torch.device("meta"):
            self.model = build_model(self.architecture, self.attention)
        parallelize(
            self.model,
            world=world,
            precision=self.config.precision,
            recompute=settings.recompute,
            compile=settings.compile,
        )
        fill(self.model, self._random, device=world.device)
        self.optimizer = make_optimizer(self.model, self.config.optim, self.config.stages[0].lr)
        self.objective = make_objective(self.config.loss, self.architecture.schedule)
        self._made: dict[Clip, Segment] = {}

    def pack(self, clips: Sequence[Clip]) -> Pack:
        """Random latents; a clip of one length is the same in every pack."""
        return Pack(tuple(self._made.setdefault(clip, self._segment(clip)) for clip in clips))

    def batches(self, packs: Sequence[Pack]) -> list[Batch]:
        """What the trainer's feed makes of packs."""
        made = [prepare(pack, objective=self.objective, layout=self.model.layout) for pack in packs]
        return [batch.pinned() for batch in made] if self.world.device.type == "cuda" else made

    def step(self, batches: Sequence[Batch], *, exact: bool = False) -> float:
        """One optimizer step, as the training loop takes it; seconds until the device is done."""
        self.model.attention = (self._exact if exact else self.attention).function
        weights = StepWeights(sum(len(batch.lengths) for batch in batches), 1.0, 1)
        self.world.barrier()
        began = time.perf_counter()
        with _determinism(exact):
            for batch in batches:
                prediction = predict(self.model, batch.inputs, world=self.world)
                target = batch.to(self.world.device)
                share, _ = batch_loss(prediction, target, loss=self.config.loss, step=weights)
                share.backward()
            clip_grad_norm(self.model.parameters(), max_norm=self.config.optim.max_grad_norm)
            set_lr(self.optimizer, self.config.stages[0].lr, step_in_stage=0, steps=1)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
        return time.perf_counter() - began

    def _route(self, model: dict[str, Any]) -> Attention:
        return choose_attention(
            self.settings.attention,
            device=self.world.device,
            dtype=getattr(torch, self.settings.dtype),
            heads=model["num_attention_heads"],
            head_dim=model["attention_head_dim"],
        )

    def _random(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """Values on the device at once: drawing billions on the host, as training does, takes minutes."""
        return torch.randn([part.stop - part.start for part in slices], device=self.world.device) * 0.02

    def _segment(self, clip: Clip) -> Segment:
        seconds, padded = clip
        model, settings = self.architecture.config, self.settings
        key = f"{seconds:g} s"
        generator = keyed_generator("bench train", key)
        size = (settings.height // SPATIAL, settings.width // SPATIAL)
        shape = (settings.frames(padded), model["out_channels"], *size)
        prompt = (settings.prompt_tokens, model["text_embed_dim"])
        return Segment(
            sample_id=key,
            key=key,
            latents=torch.randn(shape, generator=generator),
            prompt_embeds=torch.randn(prompt, generator=generator),
            seconds=seconds,
        )


def measure(settings: StepSettings, *, member: Member, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """All numbers of one model; None but on the first of the ranks, which all call it."""
    with join(member, MeshConfig(), deterministic=True) as world:
        torch.use_deterministic_algorithms(False)
        bench = Bench(settings, world)
        say = tell if world.is_main else lambda _: None
        parameters = sum(parameter.numel() for parameter in bench.model.parameters())
        say(f"{settings.model}: {parameters:,} parameters; attention {bench.attention.reason}")
        numbers = {
            "settings": settings.model_dump() | {"dataset": Path(settings.dataset).name},
            "ranks": world.size,
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": parameters,
            "attention": bench.attention.name,
            "ways": _ways(bench, say),
            "saves": _saves(bench, say),
            "loader": _loader(bench) if settings.dataset else None,
        }
        return numbers if world.is_main else None


def plan_ways(settings: StepSettings, *, rank: int, ranks: int) -> dict[str, Way]:
    """The micro-batches of a rank: the same clips for every way, of each duration as many, but for those few
    that ranks cannot share. Where all clips are of one length there is nothing to pad."""
    longest = max(map(settings.tokens, settings.durations_s))
    once = sum(map(settings.tokens, settings.durations_s))
    wanted = settings.packs * ranks
    repeats = max(1, round(wanted * settings.budget * longest / once))
    seconds = list(settings.durations_s) * repeats
    random.Random(0).shuffle(seconds)
    planned = plan_packs(map(settings.tokens, seconds), capacity=settings.budget * longest)
    packs = [[seconds[i] for i in pack] for pack in planned]
    packs.sort(key=lambda pack: sum(settings.tokens(s) ** 2 for s in pack), reverse=True)
    # As many passes on every rank: FSDP gathers weights in each.
    packs = packs[: len(packs) // ranks * ranks]
    clips = [s for pack in packs for s in pack]
    random.Random(1).shuffle(clips)
    batches = [clips[i : i + settings.budget] for i in range(0, len(clips), settings.budget)]
    ways = {PACKED: [[(s, s) for s in pack] for pack in packs]}
    if len(set(settings.durations_s)) > 1:
        ways |= {
            PADDED: [[(s, max(settings.durations_s)) for s in batch] for batch in batches],
            IN_BATCH: [[(s, max(batch)) for s in batch] for batch in batches],
        }
    ways |= {
        # Those that run at the same time are of about the same length, as packs of one step are.
        ONE: [[(s, s)] for s in sorted(clips, reverse=True)],
    }
    return {name: way[: len(way) // ranks * ranks][rank::ranks] for name, way in ways.items()}


def _ways(bench: Bench, say: Callable[[str], None]) -> dict[str, Any]:
    settings, world = bench.settings, bench.world
    ways = plan_ways(settings, rank=world.dp_rank, ranks=world.dp_size)
    ways[EXACT] = ways[PACKED]
    batches: dict[str, list[Batch]] = {}
    preparing: dict[str, float] = {}
    for name, way in ways.items():
        packs = [bench.pack(clips) for clips in way]
        began = time.perf_counter()
        batches[name] = bench.batches(packs)
        preparing[name] = time.perf_counter() - began
    dtype = getattr(torch, settings.dtype)
    clock = time.perf_counter if world.device.type == "cuda" else time.process_time
    peak, product = device_peak(world.device, dtype), product_flops(world.device, dtype, clock=clock)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    for rep in range(-1, settings.reps):  # the first one compiles and warms up
        for name, way in ways.items():
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = clock()
            bench.step(batches[name], exact=name == EXACT)
            taken = clock() - began
            if rep < 0:
                say(f"  {name}: {len(way)} passes, warm-up {taken:.2f} s")
                continue
            seconds[name].append(taken)
            if rep < settings.reps - 1:
                continue
            clips = [s for batch in way for s, _ in batch]
            own = sum(_flops(bench.architecture, settings, s) for s in clips)
            tokens, flops = world.sum([sum(map(settings.tokens, clips)), own])
            median = statistics.median(seconds[name])
            rate = flops / median / world.size
            found[name] = {
                "passes": len(way),
                "clips": len(clips),
                "step_s": round(median, 4),
                "spread_s": [round(min(seconds[name]), 4), round(max(seconds[name]), 4)],
                "prepare_s": round(preparing[name], 4),
                "tokens": int(tokens),
                "tokens_per_s": round(tokens / median, 1),
                "mfu": round(rate / peak, 4) if peak else None,
                "of_product": round(rate / product, 4),
                "memory_gb": round(memory_gb(world.device), 2),
            }
            say(f"  {name}: {median:.2f} s a step, {tokens / median:,.0f} tokens/s, MFU {found[name]['mfu']}")
    for numbers in found.values():
        numbers["packed_over"] = round(found[PACKED]["tokens_per_s"] / numbers["tokens_per_s"], 3)
    return found


def _saves(bench: Bench, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Seconds that a save takes from training, and their share of it at one every SAVE_EVERY steps; None, and
    says so, where two checkpoints have no room on disk."""
    world, settings = bench.world, bench.settings
    state = 3 * 4 * sum(parameter.numel() for parameter in bench.model.parameters())  # AdamW's moments too
    free = world.on_main(lambda: shutil.disk_usage(tempfile.gettempdir()).free)
    if free < 2.1 * state:
        say(
            f"  saves are left out: {2.1 * state / 1e9:.0f} GB are needed in {tempfile.gettempdir()}, "
            f"{free / 1e9:.0f} GB are free; set TMPDIR"
        )
        return None
    way = plan_ways(settings, rank=world.dp_rank, ranks=world.dp_size)[PACKED]
    batches = bench.batches([bench.pack(clips) for clips in way])
    alone = statistics.median(bench.step(batches) for _ in range(settings.reps))
    found: dict[str, Any] = {"step_s": round(alone, 4), "every": SAVE_EVERY}
    for name, background in (("background", True), ("foreground", False)):
        blocked, costs = [], []
        with (
            _shared_folder(world) as output,
            Saver(output, world=world, keep=1, background=background) as saver,
        ):
            for number in range(1, settings.saves + 1):
                began = time.perf_counter()
                saver.save(number, model=bench.model, optimizer=bench.optimizer, meta=_META)
                blocked.append(time.perf_counter() - began)
                steps = 0
                while background and (steps == 0 or not _is_whole(output, number, world)):
                    bench.step(batches)
                    steps += 1
                saver.wait()
                costs.append(time.perf_counter() - began - steps * alone)
        cost = max(0.0, statistics.median(costs))
        found[name] = {
            "blocked_s": round(statistics.median(blocked), 4),
            "cost_s": round(cost, 4),
            "share": round(cost / (SAVE_EVERY * alone + cost), 5),
        }
    return found


_META: dict[str, Any] = dict.fromkeys(key for key in KEYS if key not in ("step", "files"))


def _is_whole(output: Path, number: int, world: World) -> bool:
    """Whether the checkpoint is on disk; the same on all ranks, which take steps together."""

    def look() -> bool:
        saved = newest(checkpoints_folder(output))
        return saved is not None and saved.step == number

    return world.on_main(look)


@contextmanager
def _shared_folder(world: World) -> Iterator[Path]:
    """A temporary folder of the first rank."""
    folder = world.on_main(lambda: tempfile.mkdtemp(prefix="latentpress-bench-"))
    try:
        yield Path(folder)
    finally:
        world.barrier()
        if world.is_main:
            shutil.rmtree(folder)


def _loader(bench: Bench) -> dict[str, Any]:
    """Share of the time of steps on a real dataset that waits for their batches, after the first step."""
    world, layout = bench.world, bench.model.layout
    waits, seconds = [], []
    with Loader(
        Mixture.of(bench.config.mixture),
        config=bench.config,
        patch_t=layout.patch_t,
        rank=world.dp_rank,
        world_size=world.dp_size,
    ) as loader:
        steps = feed(
            loader,
            steps=range(bench.settings.loader_steps),
            plan=bench.architecture,
            objective=bench.objective,
            world=world,
            ahead=True,
        )
        began = time.perf_counter()
        for data in steps:
            waits.append(time.perf_counter() - began)
            bench.step(data.batches)
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
    return {
        "steps": len(waits),
        "step_s": round(statistics.median(seconds[1:]), 4),
        "first_wait_s": round(waits[0], 4),
        "waiting": round(sum(waits[1:]) / sum(seconds[1:]), 5),
    }


def product_flops(device: torch.device, dtype: torch.dtype, *, clock: Callable[[], float]) -> float:
    """Operations a second of one large matrix product: what there is to be had on this machine."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        began = clock()
        _ = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    return 2 * size**3 / min(seconds)


def _setup(settings: StepSettings, *, ranks: int) -> tuple[Architecture, TrainConfig]:
    """The model, of the dataset's channels and prompts where there is one, and how it is trained."""
    architecture = architecture_of(settings.model)
    changed = {} if settings.layers is None else {"num_layers": settings.layers}
    budget = 1
    if settings.dataset:
        catalog = Catalog(settings.dataset)
        frames, channels, height, width = catalog.shapes.T
        prompts, prompt_width = catalog.prompt_shapes.T
        changed |= {"in_channels": int(channels[0]), "out_channels": int(channels[0])}
        changed |= {"text_embed_dim": int(prompt_width[0]), "max_text_seq_length": int(prompts.max())}
        tokens = frames * (height // PATCH) * (width // PATCH) + prompts
        budget = settings.budget * int(tokens.max())
    config = {
        "dataset": settings.dataset or "none",
        "output": "none",
        "precision": {"param": settings.dtype},
        "data": {"budget_tokens": budget, "slots": settings.packs * ranks},
        "stages": [
            {"name": "bench", "steps": settings.loader_steps, "lr": {"peak": 1e-5, "kind": "constant"}}
        ],
    }
    checked = check_config(config, TrainConfig, where="benchmarks.train_step")
    return replace(architecture, config=architecture.config | changed), checked


def _flops(architecture: Architecture, settings: StepSettings, seconds: float) -> float:
    """Of a clip, forward and backward."""
    tokens, prompt = settings.tokens(seconds), settings.prompt_tokens
    shape = PackShape(tokens - prompt, spans=(tokens,), clips=(tokens,), prompts=(prompt,))
    return pack_flops(architecture, shape).training()


@contextmanager
def _determinism(exact: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(exact)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
