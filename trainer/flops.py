"""Arithmetic of a step: a model's config and the shape of a pack in, floating-point operations out; and what
a device can do of them in a second.

A multiplication and an addition are two operations. Only matrix products count, as in PaLM's model FLOPs
utilization (https://arxiv.org/abs/2204.02311, appendix B): norms, activations and what is computed again in
the backward pass are work a faster program could leave out. Attention counts span by span, so packs of short
clips are not credited with the products between clips that no one computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trainer.architecture import Architecture
from trainer.collate import PackedInputs
from trainer.dit import WAVES


@dataclass(frozen=True)
class PackShape:
    """What the operations of a pack depend on."""

    video_tokens: int
    spans: tuple[int, ...]
    """Tokens of each attention span; their sum is the stream."""
    clips: tuple[int, ...]
    """Tokens of each clip in the stream."""
    prompts: tuple[int, ...]
    """Tokens of each clip's prompt, counted once."""

    @classmethod
    def of(cls, inputs: PackedInputs) -> PackShape:
        """Of a collated pack; on the host, or it waits for the device."""
        bounds = (inputs.cu_seqlens, inputs.clip_seqlens, inputs.text_seqlens)
        spans, clips, prompts = (tuple(each.diff().tolist()) for each in bounds)
        return cls(len(inputs.video), spans, clips, prompts)


class Flops(NamedTuple):
    """Floating-point operations of a forward pass."""

    matrices: float
    """Products with parameters."""
    attention: float
    """Products of activations with each other."""

    def __add__(self, other: object) -> Flops:
        """Those of both."""
        if not isinstance(other, Flops):
            return NotImplemented
        return Flops(self.matrices + other.matrices, self.attention + other.attention)

    @property
    def forward(self) -> float:
        return self.matrices + self.attention

    def training(self, *, trained: float = 1.0) -> float:
        """Forward and backward: every product has two of its size in the backward pass, by its two inputs;
        where the matrix is frozen, one. `trained`: share of the matrices' elements that are trained."""
        return (2.0 + trained) * self.matrices + 3.0 * self.attention


def pack_flops(architecture: Architecture, pack: PackShape) -> Flops:
    """Forward operations of a model on a pack.

    Modulation is computed once a clip, as the packed models do it, not once a token.
    """
    config = architecture.config
    head_dim = config["attention_head_dim"]
    width, time = config["num_attention_heads"] * head_dim, config["time_embed_dim"]
    cells = config["patch_size"] ** 2 * (config["patch_size_t"] or 1)
    stream, text, clips = sum(pack.spans), sum(pack.prompts), len(pack.clips)
    joint = architecture.kind == "cogvideox" or config["text"] == "joint"

    # q, k, v and out; up and down of a feed-forward four times as wide; two modulations of three parts for
    # each kind of token.
    block = stream * (4 + 8) * width**2 + clips * 2 * time * (6 if joint else 3) * width
    scores = sum(span * span for span in pack.spans) * 2 * width
    if not joint:  # video asks, its prompt answers
        block += (2 * stream + 2 * text) * width**2
        scores += sum(c * p for c, p in zip(pack.clips, pack.prompts, strict=True)) * 2 * width
    if architecture.long_context == "linear":
        block += stream * 4 * width**2
        scores += stream * 2 * width * head_dim

    ends = pack.video_tokens * cells * (config["in_channels"] + config["out_channels"]) * width
    ends += clips * (time * time + time * 2 * width)
    if architecture.kind == "cogvideox":
        ends += text * config["text_embed_dim"] * width + clips * width * time
        ends += 2 * (config["ofs_embed_dim"] or 0) ** 2
    else:
        ends += text * (config["text_embed_dim"] + width) * width + clips * WAVES * time
    layers = config["num_layers"]
    return Flops(2.0 * (layers * block + ends), 2.0 * layers * scores)


class Peak(NamedTuple):
    """Most operations a second, without sparsity, in 1e12."""

    bfloat16: float
    """On tensor cores with sums in float32, which is what torch asks for."""
    tf32: float
    float32: float
    """Outside the tensor cores, as torch multiplies float32 by default."""


_PEAKS: tuple[tuple[str, Peak], ...] = (
    # https://resources.nvidia.com/en-us-blackwell-architecture/blackwell-architecture-technical-brief
    ("GB200", Peak(2500, 1250, 80)),
    # https://www.nvidia.com/en-us/data-center/hgx/
    ("B200", Peak(2250, 1100, 75)),
    # https://www.nvidia.com/en-us/data-center/h200/ (the sheet's figures are with sparsity: twice these)
    ("H200 NVL", Peak(835.5, 417.5, 60)),
    ("H200", Peak(989.5, 494.5, 67)),
    # https://www.nvidia.com/en-us/data-center/grace-hopper-superchip/
    ("GH200", Peak(989.5, 494.5, 67)),
    # https://www.nvidia.com/en-us/data-center/h100/ (with sparsity: twice these)
    ("H100 NVL", Peak(835.5, 417.5, 60)),
    ("H100 PCIe", Peak(756.5, 378, 51)),
    ("H100", Peak(989.5, 494.5, 67)),
    # https://www.nvidia.com/en-us/data-center/a100/
    ("A100", Peak(312, 156, 19.5)),
    ("A800", Peak(312, 156, 19.5)),
    # https://www.nvidia.com/en-us/data-center/a40/
    ("A40", Peak(149.7, 74.8, 37.4)),
    # https://www.nvidia.com/en-us/data-center/products/a10-gpu/
    ("A10", Peak(125, 62.5, 31.2)),
    # https://www.nvidia.com/en-us/data-center/l40s/
    ("L40S", Peak(362, 183, 91.6)),
    # https://www.nvidia.com/en-us/data-center/l40/
    ("L40", Peak(181, 90.5, 90.5)),
    # https://www.nvidia.com/en-us/data-center/l4/ (with sparsity: twice these)
    ("L4", Peak(121, 60, 30.3)),
    # NVIDIA Ada GPU Architecture whitepaper, appendix A: FP16 and BF16 with FP32 accumulate
    ("RTX 4090", Peak(165.2, 82.6, 82.6)),
    # NVIDIA Ampere GA102 GPU Architecture whitepaper, table 9
    ("RTX 3090", Peak(71, 35.6, 35.6)),
    ("RTX A6000", Peak(154.8, 77.4, 38.7)),
    # NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A
    ("RTX 5090", Peak(209.5, 104.8, 104.8)),
)
"""By the words of the name CUDA tells; the first entry whose words are all in it."""

_OTHERS = {"LAPTOP", "MIG", "D", "MAX", "TI"}
"""Words of devices that share a name with a larger one, or are a part of one."""


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Operations a second `device_name` could do at most in products of `dtype`; None where unknown.

    float32 products take TF32 where `torch.set_float32_matmul_precision` allows it.
    """
    words = set(re.split(r"[\s-]+", device_name.upper()))
    found = [peak for name, peak in _PEAKS if words.issuperset(name.upper().split())]
    if not found or words & _OTHERS:
        return None
    if dtype in (torch.bfloat16, torch.float16):
        return found[0].bfloat16 * 1e12
    exact = torch.get_float32_matmul_precision() == "highest"
    return (found[0].float32 if exact else found[0].tf32) * 1e12


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """`peak_flops` of a torch device; None for CPUs."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
