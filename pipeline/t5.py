"""`t5`: the encoder of any T5, UMT5 or ByT5, run as the diffusers pipeline of a family runs it.

In: captions. Out: what that pipeline would give its transformer, bit for bit on a CPU in float32 and one at a
time. Every caption is padded to `max_length`, so that all batches have one shape; the trade-off is time spent
on pad tokens, which most families need anyway.

B captions, S prompt tokens, D embedding width.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.devices import pick_device
from pipeline.prompt_cleaning import cleaning
from pipeline.text_encoding import TextEncoding
from schemas.codec import DTYPES, TAGS, Tensor
from schemas.config import TextEncoderConfig
from schemas.errors import ConfigError, RunError
from schemas.model_files import find_model
from schemas.text_family import FAMILIES

if TYPE_CHECKING:
    import torch

_KEY = "text_encoder.model"
_MODELS = ("t5", "umt5", "mt5")
"""`model_type` of the models whose encoder has these conventions; ByT5 is a `t5`."""
_SHAPE = (
    *("model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"),
)
"""Entries of config.json that change the numbers."""
_VOCABULARY = ("tokenizer.json", "spiece.model")
_TOKENIZER = (*_VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SAYS_WHICH = ("tokenizer_config.json", "tokenizer.json", "config.json")
_USUAL_WIDTH = 512
"""`d_model` of a T5 whose config.json does not say."""
_BATCH_ON_GPU = 32


class T5:
    """One encoder with its tokenizer; weights are loaded at the first `encode`, or by `load`."""

    name = "t5"

    def __init__(self, config: TextEncoderConfig) -> None:
        """ConfigError where files are missing, or are not those of a T5."""
        self._config, self._family = config, FAMILIES[config.family]
        beside = config.subfolder.replace("text_encoder", "tokenizer")

        def has_all(folder: Path) -> bool:
            """Whether what is needed of the pipeline around it was fetched with an encoder."""
            is_part = folder.name == config.subfolder
            if is_part and config.family == "mochi" and not (folder.parent / "model_index.json").is_file():
                return False
            with contextlib.suppress(ConfigError):
                return _tokenizer_folder(folder, folder.parent / beside).is_dir()
            return False

        self._files = find_model(
            config.model,
            subfolder=config.subfolder,
            key=_KEY,
            revision=config.revision,
            weights="model",
            beside=("model_index.json", *(f"{beside}/{name}" for name in _TOKENIZER), *_TOKENIZER),
            has_all=has_all,
        )
        folder, found = self._files.folder, self._files.config.get("model_type")
        if found not in _MODELS:
            raise ConfigError(
                f"{_KEY} = {config.model!r}: expected a T5, UMT5 or ByT5, found model_type {found!r} in "
                f"{folder / 'config.json'}"
            )
        self._tokenizer_folder = _tokenizer_folder(folder, folder.parent / beside)

    def hard_fields(self) -> dict[str, Any]:
        config, shape = self._config, self._files.config
        fields = {
            "kind": self.name,
            "config": {name: shape[name] for name in _SHAPE if name in shape},
            "weights_sha256": self._files.weights_sha256(),
            "tokenizer_sha256": _files_sha256(self._tokenizer_folder),
            "family": config.family,
            "attention_mask": self._family.masked,
            "pad_rows": self._family.pad_rows,
            "dtype": config.dtype,
            "compute_dtype": config.compute_dtype,
        }
        if self._zeros_for_empty:
            fields["force_zeros_for_empty_prompt"] = True
        return fields

    def check(self) -> None:
        assert self._tokenizer
        cleaning(self._config.family)

    def load(self) -> None:
        self.check()
        assert self._model

    def row_bytes(self) -> int:
        width: int = self._files.config.get("d_model", _USUAL_WIDTH)
        return width * DTYPES[TAGS[self._config.dtype]].itemsize + 1

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return self._lengths(self._cleaned(captions))

    def batch_size(self) -> int:
        return self._config.batch_size or (1 if self._device.type == "cpu" else _BATCH_ON_GPU)

    def encode(self, captions: Sequence[str]) -> list[TextEncoding]:
        at_once = self.batch_size()
        starts = range(0, len(captions), at_once)
        return [each for start in starts for each in self._encode(captions[start : start + at_once])]

    def _encode(self, captions: Sequence[str]) -> list[TextEncoding]:
        import torch

        length, tokenizer, family = self._config.max_length, self._tokenizer, self._family
        texts = self._cleaned(captions)
        tokens = tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = tokens.input_ids, tokens.attention_mask
        if self._zeros_for_empty:
            empty = torch.tensor([caption == "" for caption in captions])
            ids[empty], mask[empty] = 0, 0
        there = mask.to(self._device)
        with torch.inference_mode():
            embeds = self._model(
                ids.to(self._device), attention_mask=there if family.masked else None
            ).last_hidden_state
            if not embeds.isfinite().all():
                raise RunError(
                    f"the text encoder gave numbers that are not finite in {self._config.compute_dtype}; "
                    "expected text_encoder.compute_dtype = 'bfloat16' or 'float32', and sound weights"
                )
            if family.pad_rows == "zeros":
                embeds = embeds.masked_fill(there[:, :, None] == 0, 0.0)
            stored = embeds.to(getattr(torch, self._config.dtype)).cpu()
            if not stored.isfinite().all():
                raise RunError(
                    f"the embeddings reach {embeds.abs().max():.3g}, more than text_encoder.dtype = "
                    f"{self._config.dtype!r} holds; expected 'bfloat16' or 'float32', in a new dataset"
                )
        values = (stored.view(torch.uint16) if self._config.dtype == "bfloat16" else stored).numpy()
        masks = mask.numpy().astype(np.uint8)
        encodings = []
        for row, row_mask, num_tokens in zip(values, masks, self._lengths(texts), strict=True):
            kept = max(1, int(row_mask.sum())) if self._config.padding == "trim" else length
            tensors = {
                "prompt_embeds": Tensor(TAGS[self._config.dtype], row[:kept].copy()),
                "prompt_mask": Tensor("U8", row_mask[:kept].copy()),
            }
            encodings.append(TextEncoding(tensors, num_tokens, truncated=num_tokens > length))
        return encodings

    def _cleaned(self, captions: Sequence[str]) -> list[str]:
        clean = cleaning(self._config.family)
        return [clean(caption) for caption in captions]

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each, before any cut."""
        return [len(each) for each in self._tokenizer(list(texts), verbose=False).input_ids]

    @functools.cached_property
    def _device(self) -> torch.device:
        return pick_device(self._config.device, key="text_encoder.device")

    @functools.cached_property
    def _zeros_for_empty(self) -> bool:
        """Whether the tokens and the mask of an empty prompt are zeros: a Mochi pipeline says so itself."""
        index = self._files.folder.parent / "model_index.json"
        if self._config.family != "mochi" or not index.is_file():
            return False
        return json.loads(index.read_bytes()).get("force_zeros_for_empty_prompt", False) is True

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with _plainly(f"{_KEY}: the tokenizer in {self._tokenizer_folder}"):
            return AutoTokenizer.from_pretrained(self._tokenizer_folder, local_files_only=True)

    @functools.cached_property
    def _model(self) -> Any:
        """On its device. The files are mapped, one copy in the system's cache for all workers of a machine;
        where they are of another type than `compute_dtype`, each worker also holds all weights in that type
        until they are on its GPU."""
        import torch
        from transformers import AutoModelForTextEncoding

        folder, device = self._files.folder, self._device
        with _plainly(f"{_KEY}: the model in {folder}"):
            model, report = AutoModelForTextEncoding.from_pretrained(
                folder,
                dtype=getattr(torch, self._config.compute_dtype),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
            )
        other = [name for name, *_ in report["mismatched_keys"]]
        if missing := sorted({*report["missing_keys"], *other}):
            raise ConfigError(
                f"{_KEY}: the weights in {folder} lack {len(missing)} of the tensors that config.json asks "
                f"for, such as {missing[0]}; fetch the model again"
            )
        return model.to(device).eval().requires_grad_(False)


def _tokenizer_folder(folder: Path, beside: Path) -> Path:
    """Where the tokenizer is: with the encoder, else beside it, as in a pipeline. ConfigError where there is
    none, for which transformers would make one up."""
    for place in (folder, beside):
        config = place / "tokenizer_config.json"
        if any((place / name).is_file() for name in _VOCABULARY):
            # A vocabulary alone does not say what tokenizer it is of; a model's config.json does.
            if not any((place / name).is_file() for name in _SAYS_WHICH):
                raise ConfigError(
                    f"{_KEY}: {place} holds a vocabulary, but none of {', '.join(_SAYS_WHICH)}, which say "
                    "how it is used; copy the model's tokenizer_config.json there"
                )
            return place
        if config.is_file() and b"ByT5Tokenizer" in config.read_bytes():  # bytes need no vocabulary
            return place
    raise ConfigError(
        f"{_KEY}: found no tokenizer: neither {beside} nor {folder} holds {' or '.join(_VOCABULARY)}; put "
        "the model's tokenizer there"
    )


def _files_sha256(folder: Path) -> str:
    """Digest of a tokenizer's files, by name."""
    digest = hashlib.sha256()
    for name in sorted(_TOKENIZER):
        if (folder / name).is_file():
            digest.update(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _plainly(what: str) -> Iterator[None]:
    """Turn an error of loading into one sentence, without the bars and reports of transformers."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ConfigError(f"{what} cannot be loaded: {reason.splitlines()[0]}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
