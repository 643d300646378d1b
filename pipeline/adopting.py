"""Whether another model file makes the same numbers, before a dataset takes it on: tried on what is stored.

In: a dataset and the config that is to go on with it. Out: nothing, or an error that says how far apart they
are. A few captions, or one sample's source, are encoded again where the workers run; the price is that the
source must still be there, and that a difference which neither shows is not seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.executor import in_worker
from pipeline.fidelity import MAX_DIFFERENCE, Fidelity, NotCompared, choose_samples, compare
from pipeline.text_encode import load_text_encoder
from pipeline.video_encode import load_video_encoder
from schemas.adoption import unsettled
from schemas.card import Card
from schemas.codec import as_float32
from schemas.config import PreprocessConfig
from schemas.dataset import Dataset
from schemas.errors import StaleDatasetError
from schemas.index import read_empty_prompt, read_index, read_tensor
from schemas.sample import EMPTY_PROMPT_UNIT

_CAPTIONS = 7
"""Tried beside the empty one, which says nothing of a tokenizer."""
_SAMPLES = 8
"""Of which the first whose source is there is encoded again."""
_ROW = ("sample_id", "caption", "prompt_shard", "prompt_embeds_shape", "prompt_embeds_dtype")


def require_same_numbers(dataset: Dataset, config: PreprocessConfig, *, have: Card, want: Card) -> None:
    """StaleDatasetError where an encoder of `config` with other files than the card's gives other numbers
    than those stored, or where that cannot be found out. Where nothing is stored, nothing is held."""
    differences = unsettled(dataset.root, have=have, want=want)
    problem = None
    if any(name.startswith("text_encoder.") for name in differences):
        problem = in_worker(config, unlike_prompts, config)
    if problem is None and any(name.startswith("video_encoder.") for name in differences):
        problem = in_worker(config, unlike_samples, config, have)
    if problem is not None:
        raise StaleDatasetError(f"{dataset.root}: --adopt is refused: {problem}", differences)


def unlike_prompts(config: PreprocessConfig) -> str | None:
    """How far the embeddings of stored captions are from what the text encoder of `config` makes of them, if
    that is too far."""
    dataset = Dataset(config.output)
    if EMPTY_PROMPT_UNIT not in dataset.finished()["prompts"]:
        return None
    stored = {"": as_float32(read_empty_prompt(dataset.root)["prompt_embeds"])}
    columns = [*_ROW, *(f"prompt_embeds_{name}" for name in ("offset", "nbytes", "checksum"))]
    for row in read_index(dataset.root, columns=columns).slice(0, _CAPTIONS).to_pylist():
        stored[row["caption"]] = as_float32(read_tensor(dataset.root, row, "prompt_embeds"))
    fresh = load_text_encoder(config.text_encoder).encode(list(stored))
    for (caption, old), new in zip(stored.items(), fresh, strict=True):
        difference = prompt_difference(old, as_float32(new.tensors["prompt_embeds"]))
        if difference > MAX_DIFFERENCE:
            return (
                f"the text encoder gives {caption[:40]!r} other embeddings: they differ by {difference:.2g} "
                f"of their size, at most {MAX_DIFFERENCE} is the same model saved anew. Use the model of the "
                "card, or give another --set output=FOLDER"
            )
    return None


def prompt_difference(stored: np.ndarray, fresh: np.ndarray) -> float:
    """Root mean square difference of the worst row of [S, D], by that of all stored; 1 for other shapes."""
    if stored.shape != fresh.shape:
        return 1.0
    rows = np.sqrt(np.mean((stored - fresh) ** 2, axis=1))
    return float(rows.max() / max(float(np.sqrt(np.mean(stored**2))), 1e-12))


def unlike_samples(config: PreprocessConfig, have: Card) -> str | None:
    """How far a stored sample is from what the video encoder of `config` makes of its source, if that is too
    far; or why that cannot be said."""
    if not len(Dataset(config.output).finished()["latents"]):
        return None
    rows: list[dict[str, Any]] = choose_samples(config.output, have, _SAMPLES)
    if not rows:
        return None
    settings = config.video_encoder.model_copy(update={"image_latents": False})
    encoder = load_video_encoder(settings)
    gone: NotCompared | None = None
    for found in compare(
        config.output, have, rows, limits=config.limits, sources=config.sources, encoder=encoder
    ):
        if isinstance(found, Fidelity):
            if found.difference <= MAX_DIFFERENCE:
                return None
            return (
                f"the video encoder gives {found.source} other latents: they differ by "
                f"{found.difference:.2g}, at most {MAX_DIFFERENCE} is the same model saved anew. Use the "
                "model of the card, or give another --set output=FOLDER"
            )
        gone = found
    assert gone is not None
    return (
        f"no stored sample can be encoded again to see whether the video encoder is the same: {gone.note}. "
        f"Put a source back, such as {gone.source}, or give another --set output=FOLDER"
    )
