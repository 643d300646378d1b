"""A VAE of diffusers before it has weights: its class, geometry, scaling and tiles, and then itself.

In: the files of a model. Out: what the card must know, found by running the class on the meta device, where
shapes are computed and nothing else, so that no table of ours can disagree with the library. The price: a
second or so for a large model, once in a process. `load` reads the weights, by the library's own code.

B clips, F pixel frames, T latent frames, C channels, H, W pixels or latent cells.
"""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.bucket import Geometry
from schemas.config import VideoEncoderConfig
from schemas.digest_cache import Stamp, stamp
from schemas.errors import ConfigError
from schemas.model_files import ModelFiles, find_model
from schemas.model_weights import VAE_WEIGHTS, read_model_json
from schemas.scaling import Scaling
from schemas.vae_rules import IMAGE_VAES, VAE_RULES, require_known, vae_image_scaling, vae_scaling

if TYPE_CHECKING:
    import torch

_KEY = "video_encoder.model"
_SCHEDULER = "scheduler/scheduler_config.json"
_COSMOS = "AutoencoderKLCosmos"
"""Its pipelines scale by `sigma_data` of their scheduler too."""
_OWN_PARTS = ("encoder.", "quant_conv.", "decoder.", "post_quant_conv.")
_SIDE = 128
"""Pixels of the probe: a multiple of every known compression."""
_MORE = 48
"""Frames of the probe after the first: a multiple of every known compression."""


def find_vae(config: VideoEncoderConfig) -> VaeModel:
    """The VAE a config names; ConfigError where there is no such model, or none of a known class."""
    files = find_model(
        config.model,
        subfolder=config.subfolder,
        revision=config.revision,
        key=_KEY,
        weights=VAE_WEIGHTS,
        beside=(_SCHEDULER,),
        has_all=_has_its_scheduler,
    )
    scheduler = _scheduler(files.folder)
    read = (*files.weights, scheduler) if scheduler.is_file() else files.weights
    return _described(files, config.model, tuple(map(stamp, read)))


@functools.lru_cache(maxsize=8)
def _described(files: ModelFiles, named: str, stamps: tuple[Stamp, ...]) -> VaeModel:
    return VaeModel(files, named=named)


class VaeModel:
    """What a folder of a VAE says of it; the same object as long as its files are the same."""

    def __init__(self, files: ModelFiles, *, named: str) -> None:
        """`named` is what the config calls it."""
        self.files = files
        self.name = require_known(files.config.get("_class_name"), key=f"{_KEY} = {named!r}")
        self.by_frame = self.name in IMAGE_VAES
        """Whether it encodes pictures, [N, 3, H, W], and no clips."""
        self._class = self._find_class()
        defaults = _defaults(self._class)
        given = {name: value for name, value in self.files.config.items() if not name.startswith("_")}
        self.config = {**defaults, **given}
        self.own_config = {
            name: value
            for name, value in given.items()
            if value != defaults.get(name, inspect.Parameter.empty)
        }
        """Arguments that are not the defaults of the class, in the order of their names."""
        empty = self._on_meta()
        # HunyuanVideo always encodes in overlapping pieces of time, LTX can.
        along_time = hasattr(empty, "_temporal_tiled_encode")
        self._tiles_time = along_time and not empty.use_framewise_encoding
        self.time_tiles = _sizes(empty, "num_frames") if along_time and not self._tiles_time else {}
        """Sizes in frames of overlapping pieces that every clip is encoded in."""
        self.cuts_patches = self.config.get("in_channels", 3) != 3
        """Whether frames are rearranged before its encoder sees them (Wan 2.2)."""
        self.geometry = self._probe(empty)
        self.takes_batches = self._takes(empty, num_clips=2)
        """False where the library encodes one clip at a time only."""
        self.tiles = self._tiles(empty)
        """Sizes of the tiles of `encode(tiled=True)`; empty where tiles are no choice."""
        self.scaling = self._scaling()
        self.image_scaling = vae_image_scaling(self.config)

    def load(self, *, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
        """The model with its weights; ConfigError where they are not those that its config describes."""
        try:
            model, report = self._class.from_pretrained(
                str(self.files.folder),
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,  # the other way needs accelerate
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
                raise
            raise ConfigError(f"{_KEY}: {self.files.folder} cannot be loaded: {error}") from error
        # diffusers only warns of weights that it left as they were drawn, or left out.
        more = [name for name in report["unexpected_keys"] if name.startswith(_OWN_PARTS)]
        for names, what in ((report["missing_keys"], "are missing"), (more, "are not in it")):
            if names:
                raise ConfigError(
                    f"{_KEY}: the weights in {self.files.folder} are not those its config.json describes: "
                    f"{len(names)} {what}, such as {min(names)}; fetch the model again, both of one place"
                )
        # Weights keep asking for gradients: torch has other kernels for those that do not, and other bits.
        return model.eval().to(device)

    def set_tiling(self, model: Any, *, tiled: bool) -> None:
        """Let `model` encode and decode in tiles, in space and in time, or whole."""
        if _windows(model):
            model.enable_tiling()  # knows no other way
        elif hasattr(model, "tiled_encode"):
            (model.enable_tiling if tiled else model.disable_tiling)()
            if self._tiles_time:  # the library asks the flag of decoding, when it encodes too
                model.use_framewise_encoding = model.use_framewise_decoding = tiled

    def _find_class(self) -> Any:
        import diffusers

        found = getattr(diffusers, self.name, None)
        if found is None:
            raise ConfigError(
                f"{_KEY}: diffusers {diffusers.__version__} has no {self.name}; install a newer one"
            )
        return found

    def _on_meta(self) -> Any:
        import torch

        try:
            with torch.device("meta"):
                model = self._class.from_config({**self.files.config})
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(
                f"{_KEY}: {self.files.folder / 'config.json'} does not describe a {self.name}: {error}"
            ) from error
        return model.eval().requires_grad_(False).to("meta")  # also what its modules brought along

    def _probe(self, model: Any) -> Geometry:
        """The rule by which the class turns F, H, W into T, C, H, W."""
        if windows := _windows(model):
            length, height, width = (window[0] for window in windows)
            frames, channels, rows, _ = self._shape(model, length, height, width)
            return Geometry(length // frames, height // rows, channels, causal=False, windows=windows)
        if self.by_frame:
            _, channels, rows, _ = self._shape(model, 1, _SIDE, _SIDE)
            return Geometry(1, _SIDE // rows, channels)
        first = self._shape(model, 1, _SIDE, _SIDE)
        frames, channels, rows, _ = self._shape(model, 1 + _MORE, _SIDE, _SIDE)
        geometry = Geometry(_MORE // max(1, frames - 1), _SIDE // rows, channels)
        if (first[0], geometry.latent_frames(1 + _MORE)) != (1, frames) or _SIDE % rows:
            raise ConfigError(
                f"{_KEY}: 1 and {1 + _MORE} frames of {_SIDE} x {_SIDE} pixels give a {self.name} {first[0]} "
                f"and {frames} latent frames of {rows} rows: expected 1 and one more for every n frames"
            )
        return geometry

    def _shape(self, model: Any, frames: int, height: int, width: int, *, clips: int = 1) -> tuple[int, ...]:
        """(T, C, H, W) of what comes out."""
        import torch

        size = (clips, 3, height, width) if self.by_frame else (clips, 3, frames, height, width)
        self.set_tiling(model, tiled=False)
        with torch.no_grad():
            moments = model.encode(torch.empty(size, device="meta")).latent_dist.mode()
        shape = tuple(moments.shape[1:])
        return (1, *shape) if self.by_frame else (shape[1], shape[0], *shape[2:])

    def _takes(self, model: Any, *, num_clips: int) -> bool:
        windows = self.geometry.windows or ((1, 1), (_SIDE, 1), (_SIDE, 1))
        try:
            self._shape(model, *(length for length, _ in windows), clips=num_clips)
        except RuntimeError:
            return False
        return True

    def _tiles(self, model: Any) -> dict[str, Any]:
        if self.geometry.windows or not hasattr(model, "tiled_encode"):
            return {}
        sizes = _sizes(model)
        return {**sizes, "temporal": True} if self._tiles_time else sizes

    def _scaling(self) -> Scaling:
        buffers = self._buffers() if VAE_RULES[self.name] == "buffers" else None
        scaling = vae_scaling(self.name, self.config, buffers=buffers, sigma_data=self._sigma_data())
        expected, found = self.geometry.channels, len(scaling.mean)
        if found and (found % expected if scaling.rule == "per_channel_and_frame" else found != expected):
            raise ConfigError(
                f"{_KEY}: {self.files.folder} has {found} latents_mean for {expected} latent channels"
            )
        return scaling

    def _buffers(self) -> dict[str, list[float]]:
        from safetensors import safe_open

        found: dict[str, list[float]] = {}
        for path in self.files.weights:
            with safe_open(path, framework="np") as file:
                for name in {"latents_mean", "latents_std"} & set(file.keys()):
                    found[name] = file.get_tensor(name).astype("float32").tolist()
        if len(found) != 2:
            raise ConfigError(f"{_KEY}: the weights in {self.files.folder} lack latents_mean or latents_std")
        return found

    def _sigma_data(self) -> float:
        if self.name != _COSMOS:
            return 1.0
        path = _scheduler(self.files.folder)
        if not path.is_file():
            raise ConfigError(
                f"{_KEY}: the latents of {self.files.folder} are scaled by sigma_data of its pipeline's "
                f"scheduler, and there is no {path}; name the folder of the pipeline, or put that file there"
            )
        return float(read_model_json(path, key=_KEY).get("sigma_data") or 1.0)


def _scheduler(folder: Path) -> Path:
    return folder.parent / _SCHEDULER


def _has_its_scheduler(folder: Path) -> bool:
    config = read_model_json(folder / "config.json", key=_KEY)
    return config.get("_class_name") != _COSMOS or _scheduler(folder).is_file()


def _sizes(model: Any, of: str = "") -> dict[str, Any]:
    """Of its tiles, by name."""
    sizes = sorted(vars(model).items())
    return {name: value for name, value in sizes if name.startswith("tile_") and of in name}


def _windows(model: Any) -> tuple[tuple[int, int], ...]:
    """(length, step) of Allegro's windows in F, H, W, which leave out what they do not reach."""
    if not (hasattr(model, "kernel") and hasattr(model, "stride")):
        return ()
    return tuple(zip(model.kernel, model.stride, strict=True))


def _defaults(model_class: Any) -> dict[str, Any]:
    """Of the class's arguments, as JSON would hold them."""
    parameters = inspect.signature(model_class.__init__).parameters
    named = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    tree: dict[str, Any] = json.loads(json.dumps(named))
    return tree
