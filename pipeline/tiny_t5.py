"""`tiny-t5`: the real T5 encoder class with a tiny config, the byte tokenizer (no files) and weights derived
from a fixed seed.

It needs no download and never changes; its embeddings tell captions apart but mean nothing, and it exists
for demos and tests. Captions are encoded one at a time, at a fixed shape, on one thread: slower than
batches, but a caption's bytes never depend on its neighbours or on the machine's core count.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipeline.text_encoding import TextEncoding
from schemas.codec import Tensor

_SEED = 0
_CONFIG: dict[str, Any] = {
    "vocab_size": 384,  # the byte tokenizer's: 3 special tokens, 256 bytes, 125 sentinels
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}


class TinyT5:
    """T5 with two layers of width 64.

    `padding = "full"` runs unmasked over `max_length` rows and keeps them all, as CogVideoX does: its
    transformer sees the pad rows. `"trim"` runs the same shape with the attention mask and keeps the
    caption's rows only.
    """

    name = "tiny-t5"

    def __init__(self, *, max_length: int, padding: str) -> None:
        self._max_length = max_length
        self._trim = padding == "trim"

    def hard_fields(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, weight in _weights().items():
            digest.update(f"{name} {weight.shape}\n".encode() + weight.tobytes())
        return {
            "kind": self.name,
            "config": _CONFIG,
            "weights_sha256": digest.hexdigest(),
            "tokenizer": "ByT5Tokenizer",
        }

    def check(self) -> None:
        pass  # it has no files

    def load(self) -> None:
        assert self._model

    def row_bytes(self) -> int:
        return 4 * int(_CONFIG["d_model"]) + 1

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return [len(self._tokenizer(caption).input_ids) for caption in captions]

    def batch_size(self) -> int:
        return 1

    def encode(self, captions: Sequence[str]) -> list[TextEncoding]:
        with _one_thread():
            return [self._encode(caption) for caption in captions]

    def _encode(self, caption: str) -> TextEncoding:
        (num_tokens,) = self.count_tokens([caption])
        tokens = self._tokenizer(
            caption, padding="max_length", truncation=True, max_length=self._max_length, return_tensors="pt"
        )
        mask = tokens.attention_mask
        embeds = self._model(tokens.input_ids, attention_mask=mask if self._trim else None).last_hidden_state[
            0
        ]
        kept = min(num_tokens, self._max_length) if self._trim else self._max_length
        return TextEncoding(
            tensors={
                "prompt_embeds": Tensor("F32", embeds[:kept].contiguous().numpy()),
                "prompt_mask": Tensor("U8", mask[0, :kept].numpy().astype(np.uint8)),
            },
            num_tokens=num_tokens,
            truncated=num_tokens > self._max_length,
        )

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from transformers import ByT5Tokenizer

        return ByT5Tokenizer()

    @functools.cached_property
    def _model(self) -> Any:
        """No file is read and the caller's random state stays as it is."""
        import torch
        from transformers import T5Config, T5EncoderModel

        with torch.random.fork_rng(devices=[]):
            model: Any = T5EncoderModel(T5Config(**_CONFIG))
        weights = {name: torch.from_numpy(weight) for name, weight in _weights().items()}
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
        model.load_state_dict(weights)
        return model.eval().requires_grad_(False)


def _weights() -> dict[str, np.ndarray]:
    """Name -> float32 weight at T5's initial scales, uniform instead of normal.

    Taken from a hash of the name by exact arithmetic: the same bits on every platform and with every
    version of every library.
    """
    width, inner, hidden = _CONFIG["d_model"], _CONFIG["num_heads"] * _CONFIG["d_kv"], _CONFIG["d_ff"]
    scales: dict[str, tuple[tuple[int, ...], float]] = {}  # name -> shape, variance
    for layer in range(_CONFIG["num_layers"]):
        attention = f"encoder.block.{layer}.layer.0.SelfAttention"
        dense = f"encoder.block.{layer}.layer.1.DenseReluDense"
        scales |= {
            f"{attention}.q.weight": ((inner, width), 1 / (width * _CONFIG["d_kv"])),
            f"{attention}.k.weight": ((inner, width), 1 / width),
            f"{attention}.v.weight": ((inner, width), 1 / width),
            f"{attention}.o.weight": ((width, inner), 1 / inner),
            f"{dense}.wi_0.weight": ((hidden, width), 1 / width),
            f"{dense}.wi_1.weight": ((hidden, width), 1 / width),
            f"{dense}.wo.weight": ((width, hidden), 1 / hidden),
        }
    buckets = (_CONFIG["relative_attention_num_buckets"], _CONFIG["num_heads"])
    scales |= {
        "shared.weight": ((_CONFIG["vocab_size"], width), 1.0),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (buckets, 1 / width),
    }
    weights = {name: _uniform(name, shape, variance) for name, (shape, variance) in scales.items()}
    norms = [f"block.{i}.layer.{j}.layer_norm" for i in range(_CONFIG["num_layers"]) for j in (0, 1)]
    for norm in (*norms, "final_layer_norm"):
        weights[f"encoder.{norm}.weight"] = np.ones(width, np.float32)
    return weights


def _uniform(name: str, shape: tuple[int, ...], variance: float) -> np.ndarray:
    data = hashlib.shake_256(f"{_SEED}/{name}".encode()).digest(4 * math.prod(shape))
    values = np.frombuffer(data, "<u4").astype(np.float64) / 2**31 - 1
    return (values * math.sqrt(3 * variance)).astype(np.float32).reshape(shape)


@contextmanager
def _one_thread() -> Iterator[None]:
    """How a matrix product is split over threads changes its last bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
