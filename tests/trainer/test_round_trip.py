"""The road from given weights through a run to the stock pipeline changes nothing that was not learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

from jobs.train import export_model
from tests.trainer.datasets import PROMPT_WIDTH, write_dataset
from tests.trainer.stock import stock_model
from tests.trainer.test_look import Noted, run
from tests.trainer.test_loop import config
from tests.trainer.test_sample import STEPS, stock
from trainer.parallel import Member, join
from trainer.sample import Sample


class Kept(Noted):
    """Pictures that keep the samples."""

    samples: list[Sample]

    def write(self, folder: Path, samples: list[Sample]) -> None:  # type: ignore[override]
        self.samples = samples


@pytest.mark.parametrize("variant", ["5b", "1.5"])
def test_a_run_of_learning_rate_zero_exports_what_samples_as_before(variant: str, tmp_path: Path) -> None:
    """The stock pipeline draws what it drew of the weights before, and what the run itself draws."""
    width = {"in_channels": 16, "out_channels": 16, "text_embed_dim": PROMPT_WIDTH, "max_text_seq_length": 8}
    stock_model(variant, **width).save_pretrained(tmp_path / "before")
    settings = config(
        write_dataset(tmp_path / "set"),
        tmp_path / "run",
        model={"init": str(tmp_path / "before")},
        stages=[{"name": "still", "steps": 2, "lr": {"peak": 0.0}}],
        validation={"samples": 3, "sample_steps": STEPS, "guidance": 1.0},
    )
    pictures = Kept()
    with join(Member.alone(), settings.mesh, deterministic=True) as world:
        run(world, settings, pictures)
    export_model(tmp_path / "run", tmp_path / "after")
    after, report = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not any(report.values()), report
    before = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "before")
    scheduler = CogVideoXDDIMScheduler.from_pretrained(tmp_path / "after" / "scheduler")
    assert len(pictures.samples) == 3
    for sample in pictures.samples:
        expected = stock(before, sample.reference, guidance=1.0)
        found = stock(after, sample.reference, guidance=1.0, scheduler=scheduler)
        assert torch.equal(found, expected)
        most = expected.abs().max().item()
        torch.testing.assert_close(sample.latents, expected, rtol=1e-4, atol=1e-4 * most)
