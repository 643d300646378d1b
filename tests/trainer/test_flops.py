"""Counted by formula equals counted by torch while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.stock import CONFIGS, SDPA, clips, clips_for, pack_inputs, packed_model, tiny_architecture
from trainer.architecture import Architecture
from trainer.collate import collate
from trainer.flops import Flops, PackShape, pack_flops, peak_flops
from trainer.model import build_model
from trainer.objective import Schedule

DIT: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "time_embed_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 12,
    "max_text_seq_length": 7,
    "patch_size": 2,
    "patch_size_t": 1,
    "text": "joint",
}


def counted(run: Callable[[], object]) -> int:
    """What torch counts; it does not know the fused CPU attention, but the products it is made of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def plain_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """The trainer's is one operation, into which torch does not look."""
    parts = []
    for start, end in pairwise(bounds.tolist()):
        state = torch.einsum("lnd,lne->nde", k[start:end], v[start:end])
        parts.append(torch.einsum("lnd,nde->lne", q[start:end], state))
    return torch.cat(parts)


@pytest.mark.parametrize("local_frames", [0, 2])
@pytest.mark.parametrize("variant", CONFIGS)
def test_operations_of_cogvideox_are_those_torch_counts(variant: str, local_frames: int) -> None:
    if variant == "5b-i2v" and local_frames:
        pytest.skip("learned positions are those of whole clips")
    model = packed_model(variant, local_frames=local_frames)
    inputs, _ = pack_inputs(clips_for(variant), variant=variant, local_frames=local_frames)
    architecture = tiny_architecture(variant, local_frames=local_frames)
    found = pack_flops(architecture, PackShape.of(inputs))
    assert found.forward == counted(lambda: model(inputs))
    assert found.attention > 0.05 * found.forward  # or a wrong count of it would hardly show


@pytest.mark.parametrize("long_context", ["none", "linear"])
@pytest.mark.parametrize("text", ["joint", "cross"])
def test_operations_of_the_dit_are_those_torch_counts(text: str, long_context: Any) -> None:
    architecture = Architecture(
        "dit", DIT | {"text": text}, Schedule(), local_frames=2, long_context=long_context
    )
    model = build_model(architecture, SDPA)
    model.context_attention = plain_linear_attention
    segments = clips(((3, 12, 16, 7), (1, 8, 12, 3), (5, 16, 8, 1)))
    inputs = collate(
        [segment.latents for segment in segments],
        [segment.prompt_embeds for segment in segments],
        [5, 6, 7],
        layout=architecture.layout,
    )
    assert pack_flops(architecture, PackShape.of(inputs)).forward == counted(lambda: model(inputs))


@pytest.mark.parametrize("trained", [1.0, 0.0])
def test_backward_operations_are_those_torch_counts(trained: float) -> None:
    model = packed_model("5b").requires_grad_(trained == 1.0)
    inputs, _ = pack_inputs(clips(), variant="5b")
    inputs.video.requires_grad_()
    inputs.text.requires_grad_()
    found = pack_flops(tiny_architecture("5b"), PackShape.of(inputs)).training(trained=trained)
    # Torch also counts sums of modulation gradients by clip, and none of a timestep: little, even here.
    assert counted(lambda: model(inputs).sum().backward()) == pytest.approx(found, rel=0.03)


def test_attention_is_counted_inside_spans() -> None:
    architecture = tiny_architecture("5b")
    two = PackShape(80, spans=(50, 50), clips=(50, 50), prompts=(10, 10))
    single = PackShape(40, spans=(50,), clips=(50,), prompts=(10,))
    halves = [pack_flops(architecture, single) for _ in range(2)]
    together = pack_flops(architecture, two)
    assert together == halves[0] + halves[1]
    across = pack_flops(architecture, replace(two, spans=(100,)))
    assert across == Flops(together.matrices, 2 * together.attention)


def test_a_frozen_matrix_has_one_product_less() -> None:
    flops = Flops(matrices=10.0, attention=4.0)
    assert flops.training() == 3 * flops.forward
    assert flops.training(trained=0.0) == 2 * 10 + 3 * 4


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H200", 989.5e12, 67e12),
        ("NVIDIA H200 NVL", 835.5e12, 60e12),
        ("NVIDIA GH200 480GB", 989.5e12, 67e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 67e12),
        ("NVIDIA H100 PCIe", 756.5e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("Quadro", None, None),
    ],
)
def test_peaks_by_device_name(name: str, bfloat16: float | None, float32: float | None) -> None:
    assert peak_flops(name, torch.bfloat16) == bfloat16
    assert peak_flops(name, torch.float32) == float32
