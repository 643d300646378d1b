"""What the numbers of a dataset mean: its card in, a few plain sentences out."""

from __future__ import annotations

from collections.abc import Iterator

from schemas.bucket import bucket_name
from schemas.card import UNKNOWN, Card
from schemas.scaling import Scaling

_POLICIES = {
    "uniform": "evenly over the whole clip",
    "keyframe": "over the whole clip, denser where it is active",
    "fps": "resampled to {target_fps:g} frames/s",
    "contiguous": "pictures at one whole-number stride, nearest to {target_fps:g} frames/s",
}
_SHORT = {
    "interpolate": "blended in time",
    "nearest": "filled with the nearest picture",
    "repeat_last": "filled with their last picture",
    "drop": "quarantined",
    "error": "an error",
}
_STORED = {
    "moments": "mean and logvar of the posterior",
    "mean": "the posterior's mean",
    "sample": "a draw from the posterior",
}


def meaning(card: Card) -> list[tuple[str, str]]:
    """(of what, sentence), most important first."""
    return list(_sentences(card))


def _sentences(card: Card) -> Iterator[tuple[str, str]]:
    settings, geometry = card.settings, card.geometry
    if card.imported_from:
        yield "origin", f"imported from a cache of {card.imported_from}; what that does not tell is {UNKNOWN}"
    yield "video encoder", _video_encoder(card)
    first = "the first frame alone, then " if geometry.causal and geometry.temporal > 1 else ""
    pieces = f", in pieces of {geometry.segment_frames} frames" if geometry.segment_frames else ""
    yield (
        "latents",
        f"{first}{geometry.temporal} frames of {geometry.spatial} x {geometry.spatial} pixels to one cell of "
        f"{geometry.channels} channels{pieces}; T C H W",
    )
    stored = f"{_STORED[card.stored]}, {settings.video_encoder.dtype}, unscaled"
    image = {
        "first_latent": "; the first latent frame is the image's",
        "apart": "; image latents beside them",
    }
    yield "stored", stored + image.get(card.image, "")
    yield "scaling", f"a trainer reads {_scaling(card.scaling)}"
    yield "text encoder", _text_encoder(card)
    yield "frames", _frames(card)
    yield "pictures", _pictures(card)
    tiled = [name for bucket in settings.buckets if card.is_tiled(name := bucket_name(bucket))]
    if tiled:
        yield "tiles", f"{', '.join(tiled)} were encoded in overlapping tiles"
    by = {"content": "all of its bytes", "sampled": "its size and parts of its bytes"}
    if (identity := card.hard["latents"].get("identity")) in by:
        yield "identity", f"a source file is the same file by {by[identity]}"


def _video_encoder(card: Card) -> str:
    encoder, fields = card.settings.video_encoder, card.hard["latents"]
    if encoder.kind == "dct":
        return "dct, the embedded cosine codec: for demos, tests and smoke runs, no trained VAE"
    weights = str(fields.get("video_encoder.weights_sha256", UNKNOWN))
    name = fields.get("video_encoder.class", encoder.kind)
    return f"{name} of {encoder.model}, run in {encoder.compute_dtype}; weights {weights[:12]}"


def _text_encoder(card: Card) -> str:
    encoder, fields = card.settings.text_encoder, card.hard["prompts"]
    kept = "pad rows kept" if card.padding == "full" else "pad rows cut off"
    length = fields.get("text_encoder.max_length") or "an unknown number of"
    if encoder is None:
        return f"not known; up to {length} tokens, {kept}"
    if encoder.kind == "tiny-t5":
        return f"tiny-t5, untrained: for demos, tests and smoke runs; up to {length} bytes, {kept}"
    weights = str(fields.get("text_encoder.weights_sha256", UNKNOWN))
    return (
        f"{encoder.model}, as {encoder.family} runs it; up to {length} tokens, {kept}; stored as "
        f"{encoder.dtype}; weights {weights[:12]}"
    )


def _scaling(scaling: Scaling) -> str:
    times = f" * {scaling.factor:g}" if scaling.factor != 1 else ""
    if scaling.rule == "factor":
        return f"(x - {scaling.shift:g}){times}" if scaling.shift else f"x{times or ' as it is'}"
    if scaling.rule == "none":
        return "x as it is"
    by = "channel and latent frame" if scaling.rule == "per_channel_and_frame" else "channel"
    return f"(x - mean) / std{times}, with a mean and a std for each {by}"


def _frames(card: Card) -> str:
    frames = card.settings.frames
    if frames is None:
        return "how they were taken is not known"
    told = _POLICIES.get(frames.policy, "index for index as the trainer of that name takes them")
    clips = f", clips = {frames.clips!r}" if frames.policy in ("fps", "contiguous") else ""
    return (
        f"{frames.policy}: {told.format(target_fps=frames.target_fps)}{clips}; clips with too few "
        f"pictures are {_SHORT[frames.short]}"
    )


def _pictures(card: Card) -> str:
    resize, picture = card.settings.resize, card.settings.picture
    if resize is None or picture is None:
        return "how they were resized is not known"
    return (
        f"resized by {resize.mode}; interlaced lines {picture.deinterlace}, HDR {picture.hdr}, transparency "
        f"over RGB {', '.join(f'{value:g}' for value in picture.background)}"
    )
