"""Caches of other trainers become datasets: the same numbers, paired as there; or a refusal by name."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLWan
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from jobs import cli
from jobs.inspect import inspect_sample
from jobs.retry import retry
from jobs.train import train
from pipeline.collect import find_orphans
from pipeline.export import read_samples
from pipeline.imports.options import Format, ImportOptions
from pipeline.imports.story import import_cache
from pipeline.imports.units import Importer
from schemas.card import Card, read_card
from schemas.check import check_dataset
from schemas.codec import Tensor, as_float32, from_float32
from schemas.config import LimitsConfig
from schemas.dataset import Dataset
from schemas.errors import ConfigError, DatasetError, ManifestError, StaleDatasetError
from schemas.index import read_empty_prompt, read_index, read_quarantine, read_tensor
from schemas.scaling import scale
from tests.pipeline.imports.caches import (
    WIDTH,
    normal,
    write_cogvideo,
    write_finetrainers,
    write_musubi,
    write_ttt_video,
)

C = 4
CAT, DOG = "a cat", "a dog"
MEAN, STD = [0.25, -0.5, 1.0, 0.0], [1.0, 2.0, 0.5, 4.0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cogvideox`, `wan`, `hunyuan` and `text`, saved as published ones are."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cogvideox: Any = AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4),
            latent_channels=C,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7,
        )
        cogvideox.save_pretrained(folder / "cogvideox")
        wan: Any = AutoencoderKLWan(base_dim=4, z_dim=C, num_res_blocks=1, latents_mean=MEAN, latents_std=STD)
        wan.save_pretrained(folder / "wan")
        hunyuan: Any = AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=C, norm_num_groups=2
        )
        hunyuan.save_pretrained(folder / "hunyuan")
        config = T5Config(
            vocab_size=384,
            d_model=WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
        T5EncoderModel(config).save_pretrained(folder / "text" / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "text" / "tokenizer")
    return folder


@pytest.fixture
def imported(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """Import a cache into `tmp_path/dataset`; it verifies clean."""

    def run(source: Path, form: Format, vae: str = "cogvideox", **options: Any) -> Path:
        dataset = tmp_path / "dataset"
        import_cache(asked(source, dataset, form, models / vae, **options))
        verdict = check_dataset(dataset)
        assert verdict.clean, verdict.findings
        assert not find_orphans(Dataset(dataset), older_than_s=0)
        return dataset

    return run


def asked(source: Path, dataset: Path, form: Format, vae: Path, **options: Any) -> ImportOptions:
    return ImportOptions(source=source, output=str(dataset), format=form, vae=str(vae), fps=8.0, **options)


def rows(dataset: Path) -> dict[str, dict[str, Any]]:
    """Index rows by source."""
    return {row["source"]: row for row in read_index(dataset).to_pylist()}


def bits(tensor: Tensor) -> torch.Tensor:
    """A stored bfloat16 tensor as torch has it."""
    assert tensor.dtype == "BF16"
    return torch.from_numpy(tensor.data.view(np.int16).copy()).view(torch.bfloat16)


def trained_on(dataset: Path, row: dict[str, Any], card: Card) -> torch.Tensor:
    """Scaled latents as bfloat16, [C, T, H, W]."""
    values = scale(as_float32(read_tensor(dataset, row, "latents")), card.scaling)
    return bits(from_float32(values, dtype="BF16")).transpose(0, 1)


def cogvideo(root: Path, *, frames: int = 3, resolution: str = "9x32x32", **changes: Any) -> Path:
    clips = {
        "videos/a.mp4": (CAT, normal(C, frames, 4, 4, seed=1)),
        "videos/b.mp4": (DOG, normal(C, frames, 4, 4, seed=2)),
    }
    texts = {CAT: normal(8, WIDTH, seed=3), DOG: normal(8, WIDTH, seed=4)}
    return write_cogvideo(root, clips, **({"resolution": resolution, "embeddings": texts} | changes))


@pytest.mark.parametrize(("frames", "num_frames", "causal"), [(3, 9, True), (2, 8, False)])
def test_cogvideo_scaled_samples_come_back_bit_for_bit_once_scaled(
    tmp_path: Path, imported: Callable[..., Path], frames: int, num_frames: int, causal: bool
) -> None:
    """Image-to-video has 4n + 1 frames; text-to-video one fewer than its resolution says, in chunks of 4."""
    dataset = imported(cogvideo(tmp_path / "data", frames=frames), "cogvideo")
    card, found = read_card(dataset), rows(dataset)
    assert (card.stored, card.scaling.factor, card.geometry.causal) == ("sample", 0.7, causal)
    assert card.imported_from == "cogvideo"
    assert card.hard["latents"]["imported_from"]["says"] == {"model_name": "cogvideox-t2v"}
    names = {f"cache/video_latent/cogvideox-t2v/9x32x32/{stem}.safetensors": stem for stem in "ab"}
    assert found.keys() == names.keys()
    for seed, (name, caption) in enumerate(zip(sorted(found), (CAT, DOG), strict=True), start=1):
        row = found[name]
        assert (row["caption"], row["num_frames"]) == (caption, num_frames)
        assert torch.equal(trained_on(dataset, row, card), normal(C, frames, 4, 4, seed=seed))
        assert torch.equal(bits(read_tensor(dataset, row, "prompt_embeds")), normal(8, WIDTH, seed=seed + 2))
        assert read_tensor(dataset, row, "prompt_mask").data.tolist() == [1] * 8
        assert row["pts_s"] == [i / 8 for i in range(num_frames)]


def test_a_video_listed_again_keeps_both_captions_and_lines_end_with_newlines_alone(
    tmp_path: Path, imported: Callable[..., Path]
) -> None:
    broken = "a\u2028cat\x85sits"
    texts = {caption: normal(8, WIDTH, seed=seed) for seed, caption in enumerate((broken, CAT, DOG))}
    source = cogvideo(tmp_path / "data", embeddings=texts)
    (source / "prompts.txt").write_text(f"{broken}\n{CAT}\n{DOG}\n")
    (source / "videos.txt").write_text("videos/a.mp4\nvideos/./a.mp4\nvideos/b.mp4\n")
    dataset = imported(source, "cogvideo")
    found = sorted((Path(row["source"]).stem, row["caption"]) for row in read_index(dataset).to_pylist())
    assert found == [("a", CAT), ("a", broken), ("b", DOG)]
    commit = Dataset(dataset).commit("latents", 0)
    assert commit is not None
    assert len(commit.samples) == 2


@pytest.mark.parametrize("early", [True, False])
def test_finetrainers_moments_keep_their_bits(
    tmp_path: Path, imported: Callable[..., Path], early: bool
) -> None:
    """CogVideoX: channels come first in 0.0.1 and time comes first later."""
    moments = [normal(2 * C, 3, 4, 4, seed=seed) for seed in (1, 2)]
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (
            {"latents": (each if early else each.transpose(0, 1))[None]},
            {"prompt_embeds" if early else "encoder_hidden_states": normal(1, 8, WIDTH, seed=seed)},
        )
        for seed, each in enumerate(moments, start=3)
    ]
    dataset = imported(write_finetrainers(tmp_path / "cache", pairs, early=early), "finetrainers")
    found = rows(dataset)
    assert read_card(dataset).stored == "moments"
    for (_, row), each, seed in zip(sorted(found.items()), moments, (3, 4), strict=True):
        stored = [bits(read_tensor(dataset, row, name)) for name in ("mean", "logvar")]
        assert torch.equal(torch.cat(stored, dim=1).transpose(0, 1), each)
        assert torch.equal(bits(read_tensor(dataset, row, "prompt_embeds")), normal(8, WIDTH, seed=seed))
        assert row["caption"].startswith("[not in the cache: ")
    assert len({row["caption"] for row in found.values()}) == 2


def wan_latents(seed: int, *, mean: list[float] = MEAN) -> dict[str, Any]:
    """As finetrainers saves them: moments, channels first, and 1 / std under `latents_std`."""
    return {
        "latents": normal(1, 2 * C, 3, 4, 4, seed=seed),
        "latents_mean": torch.tensor(mean),
        "latents_std": 1 / torch.tensor(STD),
    }


def test_finetrainers_wan_and_masks(tmp_path: Path, imported: Callable[..., Path]) -> None:
    mask = torch.tensor([[True] * 5 + [False] * 3])
    text = {"encoder_hidden_states": normal(1, 8, WIDTH, seed=9), "encoder_attention_mask": mask}
    dataset = imported(
        write_finetrainers(tmp_path / "cache", [(wan_latents(1), text)]), "finetrainers", "wan"
    )
    (row,) = rows(dataset).values()
    assert torch.equal(
        bits(read_tensor(dataset, row, "mean")), wan_latents(1)["latents"][0, :C].transpose(0, 1)
    )
    assert read_tensor(dataset, row, "prompt_mask").data.tolist() == [1] * 5 + [0] * 3
    assert read_card(dataset).scaling.mean == tuple(MEAN)


def test_ttt_video_moments_and_segments(tmp_path: Path, imported: Callable[..., Path]) -> None:
    moments = normal(2 * C, 3, 4, 4, seed=1)
    texts = [normal(8, WIDTH, seed=seed) for seed in (2, 3)]
    cache = write_ttt_video(tmp_path / "cache", [(moments, texts), (moments, texts[1:])])
    dataset = imported(cache / "train.jsonl", "ttt-video")
    found = read_index(dataset).to_pylist()
    for row, expected in zip(found, (texts, texts[1:]), strict=True):
        stored = [bits(read_tensor(dataset, row, name)) for name in ("mean", "logvar")]
        assert torch.equal(torch.cat(stored, dim=1), moments.permute(1, 0, 2, 3))
        assert torch.equal(bits(read_tensor(dataset, row, "prompt_embeds")), torch.cat(expected))
    commit = Dataset(dataset).commit("prompts", 1)
    assert commit is not None
    assert [sample.meta["segments"] for sample in commit.samples] == [[8, 8], [8]]


def musubi(root: Path, name: str = "clip_1", *, seed: int = 1, caption: str = CAT, **changes: Any) -> Path:
    given: dict[str, Any] = {
        "frames": 9,
        "caption": caption,
        "text": {"varlen_t5_bfloat16": normal(5 + seed, WIDTH, seed=seed)},
    }
    return write_musubi(root, name, normal(C, 3, 4, 4, seed=seed), **(given | changes))


def test_musubi_wan_scaled_means_and_cut_text(tmp_path: Path, imported: Callable[..., Path]) -> None:
    cache = tmp_path / "cache"
    musubi(cache, more={"clip_float16": torch.zeros(3, dtype=torch.float16)})
    musubi(cache, "clip_2", seed=2, caption="")
    dataset = imported(cache, "musubi", "wan", leave_out=("clip",))
    card, found = read_card(dataset), rows(dataset)
    assert (card.stored, card.padding, card.scaling.std) == ("mean", "trim", tuple(STD))
    assert card.hard["latents"]["imported_from"]["left_out"] == ["clip"]
    for (_, row), seed, caption in zip(sorted(found.items()), (1, 2), (CAT, ""), strict=True):
        values = scale(as_float32(read_tensor(dataset, row, "latents")), card.scaling)
        expected = normal(C, 3, 4, 4, seed=seed).transpose(0, 1).float().numpy()
        # Twice an ulp of what was subtracted and added in float32.
        assert np.abs(values - expected).max() <= 2**-22 * (
            max(map(abs, MEAN)) / min(STD) + np.abs(expected).max()
        )
        assert row["caption"] == caption
        assert torch.equal(
            bits(read_tensor(dataset, row, "prompt_embeds")), normal(5 + seed, WIDTH, seed=seed)
        )
    assert torch.equal(bits(read_empty_prompt(dataset)["prompt_embeds"]), normal(7, WIDTH, seed=2))


def test_musubi_hunyuan_samples_are_unscaled_and_masked(
    tmp_path: Path, imported: Callable[..., Path]
) -> None:
    text = {"llm_bfloat16": normal(6, WIDTH, seed=3), "llm_mask": torch.tensor([1, 1, 1, 0, 0, 0])}
    more = {"clipL_bfloat16": normal(16, seed=4)}
    cache = tmp_path / "cache"
    musubi(cache, text=text | more, end="hv", architecture="hunyuan_video")
    dataset = imported(cache, "musubi", "hunyuan", leave_out=("clipL",))
    (row,) = rows(dataset).values()
    assert torch.equal(bits(read_tensor(dataset, row, "latents")).transpose(0, 1), normal(C, 3, 4, 4, seed=1))
    assert read_tensor(dataset, row, "prompt_mask").data.tolist() == [1, 1, 1, 0, 0, 0]


# --------------------------------------------------------------------- a dataset like any other


def test_it_is_drawn_exported_and_trained_on(tmp_path: Path, imported: Callable[..., Path]) -> None:
    dataset = imported(cogvideo(tmp_path / "data"), "cogvideo")
    drawn = inspect_sample(dataset, output=tmp_path / "a.png")
    assert drawn["psnr"] is None
    assert "imported from a cache of cogvideo" in drawn["notes"][0]
    assert (tmp_path / "a.png").stat().st_size
    samples = list(read_samples(dataset, read_card(dataset)))
    assert [sample.meta["caption"] for sample in samples] == [CAT, DOG]
    config = tmp_path / "train.toml"
    config.write_text(
        f"""
dataset = "{dataset}"
output = "{tmp_path / "run"}"
model = {{ num_layers = 1, num_attention_heads = 1, attention_head_dim = 16, time_embed_dim = 8 }}
data = {{ budget_tokens = 64 }}
stages = [{{ name = "one", steps = 1, lr = {{ peak = 1e-3 }} }}]
"""
    )
    assert train(config, overrides=[], nproc=1) == 0
    assert (tmp_path / "run" / "loss.png").exists()


def test_an_interrupted_import_goes_on_and_a_second_has_nothing_to_do(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cogvideo(tmp_path / "data")
    options = [
        asked(source, tmp_path / name, "cogvideo", models / "cogvideox", unit_rows=1)
        for name in ("one", "two")
    ]
    import_cache(options[0])
    run, made = Importer.run, list[int]()

    def stops(self: Importer, unit: Any, **kwargs: Any) -> Any:
        if len(made) == 4:  # of three units of prompts and two of latents
            raise KeyboardInterrupt
        made.append(unit.number)
        return run(self, unit, **kwargs)

    monkeypatch.setattr(Importer, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        import_cache(options[1])
    verdict = check_dataset(tmp_path / "two")
    assert (verdict.unfinished, verdict.findings) == (1, [])
    assert verdict.rerun.startswith(f"latentpress import {source} --format cogvideo --vae ")
    monkeypatch.undo()
    assert import_cache(options[1])[1]
    shards = [sorted(path.name for path in (tmp_path / name).rglob("*.tar")) for name in ("one", "two")]
    assert len(shards[0]) == 4
    assert shards[0] == shards[1]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two" / "commits").rglob("*")}
    summary, ran = import_cache(options[1])
    assert not ran
    assert summary["kept"] == 2
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "two" / "commits").rglob("*")}


def test_what_a_cache_gains_is_added(tmp_path: Path, imported: Callable[..., Path]) -> None:
    cache = musubi(tmp_path / "cache").parent
    dataset = imported(cache, "musubi", "wan")
    musubi(cache, "clip_2", seed=2, caption=DOG)
    imported(cache, "musubi", "wan")
    assert sorted(row["caption"] for row in rows(dataset).values()) == [CAT, DOG]
    assert Dataset(dataset).finished()["latents"].tolist() == [0, 1]


def test_torn_and_non_finite_files_are_quarantined(tmp_path: Path, imported: Callable[..., Path]) -> None:
    cache = tmp_path / "cache"
    paths = [musubi(cache, f"clip_{seed}", seed=seed, caption=f"clip {seed}") for seed in range(1, 6)]
    paths[0].write_bytes(paths[0].read_bytes()[:-40])
    wrong = normal(C, 3, 4, 4, seed=2)
    wrong[0, 0, 0, 0] = float("nan")
    musubi(cache, "clip_2", seed=2, caption="clip 2")
    write_musubi(
        cache,
        "clip_2",
        wrong,
        frames=9,
        caption="clip 2",
        text={"varlen_t5_bfloat16": normal(7, WIDTH, seed=2)},
    )
    (cache / "clip_3_wan_te.safetensors").write_bytes(b"\0" * 100)
    dataset = imported(cache, "musubi", "wan")
    table = read_quarantine(dataset).to_pylist()
    found = {Path(row["source"]).name[:6]: (row["stage"], row["reason"]) for row in table}
    assert found == {
        "clip_1": ("import", "unreadable"),
        "clip_2": ("import", "non_finite"),
        "clip_3": ("import", "no_prompt"),
    }
    assert "clip_1" in next(row["message"] for row in table if row["source"].startswith("clip_1"))
    assert len(rows(dataset)) == 2
    musubi(cache, caption="clip 1")
    imported(cache, "musubi", "wan")
    assert len(rows(dataset)) == 3


def finetrainers(root: Path, *, clips: int = 2) -> Path:
    """CogVideoX of the later layout; the folder of its files."""
    write_finetrainers(
        root,
        [
            (
                {"latents": normal(1, 3, 2 * C, 4, 4, seed=seed)},
                {"encoder_hidden_states": normal(1, 8, WIDTH, seed=seed)},
            )
            for seed in range(clips)
        ],
    )
    return root / "finetrainers-precomputed-data"


@pytest.mark.parametrize("checked", [True, False])
def test_a_changed_byte_of_a_pt_file_is_seen_where_it_has_checksums(
    tmp_path: Path, imported: Callable[..., Path], checked: bool
) -> None:
    torch.serialization.set_crc32_options(checked)
    try:
        files = finetrainers(tmp_path / "cache")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("latent-0.pt", "condition-1.pt"):
        values = (normal(1, 3, 2 * C, 4, 4, seed=0) if name[0] == "l" else normal(1, 8, WIDTH, seed=1)).view(
            torch.uint8
        )
        data = bytearray((files / name).read_bytes())
        data[data.index(values.numpy().tobytes())] ^= 1
        (files / name).write_bytes(data)
    table = read_quarantine(imported(tmp_path / "cache", "finetrainers")).to_pylist()
    found = {Path(row["source"]).name: row["reason"] for row in table}
    assert found == ({"latent-0.pt": "unreadable", "latent-1.pt": "no_prompt"} if checked else {})
    assert "data/0 does not match its checksum" in table[0]["message"] if checked else not table


def test_empty_tensors_and_archives_that_claim_too_much_are_quarantined(
    tmp_path: Path, imported: Callable[..., Path]
) -> None:
    files = finetrainers(tmp_path / "cache", clips=5)
    torch.save({"latents": normal(1, 0, 2 * C, 4, 4, seed=1)}, files / "latent-0.pt")
    torch.save({"encoder_hidden_states": normal(1, 0, WIDTH, seed=1)}, files / "condition-1.pt")
    with zipfile.ZipFile(files / "latent-2.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("latent-2/data.pkl", bytes(10**6))
    with (files / "latent-3.pt").open("wb") as file:
        file.truncate(LimitsConfig().max_bytes + 1)
    table = read_quarantine(imported(tmp_path / "cache", "finetrainers")).to_pylist()
    assert {Path(row["source"]).name: row["reason"] for row in table} == {
        "latent-0.pt": "empty",
        "latent-1.pt": "no_prompt",
        "latent-2.pt": "unreadable",
        "latent-3.pt": "limit_bytes",
    }
    assert any("claims to hold more bytes than it has" in row["message"] for row in table)


def test_rows_that_are_tried_again_are_imported(
    tmp_path: Path, imported: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = musubi(tmp_path / "cache").parent
    musubi(cache, "clip_2", seed=2, caption=DOG)
    torn = next(cache.glob("clip_1_*_wan.safetensors"))
    sound = torn.read_bytes()
    torn.write_bytes(sound[:-40])
    dataset = imported(cache, "musubi", "wan")
    assert retry(dataset, reasons=[], everything=True, as_json=False) == 0
    told = capsys.readouterr().out
    assert f"run `latentpress import {cache} --format musubi" in told
    assert told.rstrip().endswith(f"-o {dataset}`")
    imported(cache, "musubi", "wan")
    assert read_quarantine(dataset)["attempts"].to_pylist() == [2]


# -------------------------------------------------------------------------- the empty prompt


def test_the_empty_prompt_of_the_cache_is_taken(tmp_path: Path, imported: Callable[..., Path]) -> None:
    texts = {CAT: normal(8, WIDTH, seed=3), DOG: normal(8, WIDTH, seed=4), "": normal(8, WIDTH, seed=5)}
    dataset = imported(cogvideo(tmp_path / "data", embeddings=texts), "cogvideo")
    assert torch.equal(bits(read_empty_prompt(dataset)["prompt_embeds"]), texts[""])


def test_the_empty_prompt_is_made_by_the_encoder_given(
    tmp_path: Path, models: Path, imported: Callable[..., Path]
) -> None:
    dataset = imported(cogvideo(tmp_path / "data"), "cogvideo", text_encoder=str(models / "text"))
    found = read_empty_prompt(dataset)
    assert (found["prompt_embeds"].dtype, found["prompt_embeds"].shape) == ("BF16", (8, WIDTH))
    assert found["prompt_mask"].data.tolist() == [1] * 8  # as of captions, which have no mask in the cache


def test_the_empty_prompt_has_a_mask_where_captions_have(
    tmp_path: Path, models: Path, imported: Callable[..., Path]
) -> None:
    mask = torch.tensor([[True] * 5 + [False] * 3])
    text = {"encoder_hidden_states": normal(1, 8, WIDTH, seed=9), "encoder_attention_mask": mask}
    source = write_finetrainers(tmp_path / "cache", [(wan_latents(1), text)])
    dataset = imported(source, "finetrainers", "wan", text_encoder=str(models / "text"))
    assert read_empty_prompt(dataset)["prompt_mask"].data.tolist() == [1] + [0] * 7


def test_without_one_the_dataset_says_so(tmp_path: Path, imported: Callable[..., Path]) -> None:
    dataset = imported(cogvideo(tmp_path / "data"), "cogvideo")
    assert any("--text-encoder" in note for note in check_dataset(dataset).notes)
    assert read_quarantine(dataset).num_rows == 0
    with pytest.raises(DatasetError, match="no empty prompt: the cache has no embeddings"):
        read_empty_prompt(dataset)


# --------------------------------------------------------------------------------- refusals


class Loads:
    """What `weights_only` does not load."""


def other_model(source: Path) -> None:
    cogvideo(source, model="cogvideox1.5-t2v")


def no_prompt(source: Path) -> None:
    next((source / "cache" / "prompt_embeddings").iterdir()).unlink()


def same_stem(source: Path) -> None:
    (source / "videos.txt").write_text("one/a.mp4\ntwo/a.mp4\n")


def no_list(source: Path) -> None:
    (source / "prompts.txt").unlink()


def save_latents(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    folder = source / "cache" / "video_latent" / "cogvideox-t2v" / "9x32x32"
    save_file(tensors, folder / "b.safetensors")


def more_keys(source: Path) -> None:
    values = normal(C, 3, 4, 4, seed=1)
    save_latents(source, {"encoded_video": values, "first_frame": values[:, :1].clone()})


def other_channels(source: Path) -> None:
    save_latents(source, {"encoded_video": normal(16, 3, 4, 4, seed=1)})


def other_type(source: Path) -> None:
    save_latents(source, {"encoded_video": normal(C, 3, 4, 4, seed=1, dtype=torch.float16)})


def other_rule(source: Path) -> None:
    save_latents(source, {"encoded_video": normal(C, 2, 4, 4, seed=1)})


def other_frames(source: Path) -> None:
    save_latents(source, {"encoded_video": normal(C, 5, 4, 4, seed=1)})


def other_size(source: Path) -> None:
    save_latents(source, {"encoded_video": normal(C, 3, 2, 4, seed=1)})


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (other_model, "video_latent: expected the latents of one model.*move all but one"),
        (no_prompt, r"\w\.safetensors: its prompt embeddings .* are missing.*let the trainer compute"),
        (same_stem, "videos.txt: 1 file names come twice, such as 'a'.*take them out"),
        (no_list, "prompts.txt cannot be read: .*give --prompts FILE"),
        (more_keys, r"b\.safetensors: holds 'first_frame'.*--leave-out first_frame"),
        (other_channels, r"b\.safetensors: latents of shape \[3, 16, 4, 4\].*give the VAE it is of"),
        (other_type, r"b\.safetensors: type float16, but bfloat16 in .*a\.safetensors"),
        (other_rule, r"b\.safetensors: frame rule 4n frames, but 4n \+ 1 frames in"),
        (other_frames, r"b\.safetensors: 5 latent frames of 9 or 8 frames.*give the VAE"),
        (other_size, r"b\.safetensors: 2 x 4 latent cells of 32 x 32 pixels.*give the VAE"),
    ],
)
def test_a_cogvideo_cache_that_cannot_be_known_is_refused(
    tmp_path: Path, models: Path, spoil: Callable[[Path], None], told: str
) -> None:
    source = cogvideo(tmp_path / "data")
    spoil(source)
    with pytest.raises(ConfigError, match=told):
        import_cache(asked(source, tmp_path / "dataset", "cogvideo", models / "cogvideox"))
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(
    ("latents", "text", "told"),
    [
        (
            wan_latents(1, mean=[9.0, 9.0, 9.0, 9.0]),
            {},
            r"latent-0\.pt: was made with a VAE of mean \[9, 9, 9, .*give the VAE it is of",
        ),
        (wan_latents(1) | {"latents_mean": Loads()}, {}, r"latent-0\.pt: holds objects .* running code"),
        (wan_latents(1), {"pooled_projections": normal(1, 8, seed=1)}, "--leave-out pooled_projections"),
        (
            wan_latents(1),
            {"encoder_attention_mask": torch.ones(1, 3)},
            r"condition-0\.pt: its mask is \[1, 3\]",
        ),
        (
            wan_latents(1),
            {"encoder_attention_mask": "none"},
            r"condition-0\.pt: its mask is a str; expected a",
        ),
        (
            wan_latents(1) | {"latents": torch.zeros(1).expand(1, 2 * C, 3, 30000, 30000)},
            {},
            r"latent-0\.pt: 'latents' of shape .*30000\] stands for more numbers than the file holds",
        ),
        (
            wan_latents(1) | {"latents": torch.zeros(1, 2 * C, 3, 4, 4).to_sparse()},
            {},
            "stands for more numbers than the file holds",
        ),
        (
            wan_latents(1) | {"latents": torch.zeros(1, 2 * C, 3, 4, 4, device="meta")},
            {},
            "stands for more numbers than the file holds",
        ),
    ],
)
def test_finetrainers_files_that_cannot_be_known_are_refused(
    tmp_path: Path, models: Path, latents: dict[str, Any], text: dict[str, Any], told: str
) -> None:
    embeds = {"encoder_hidden_states": normal(1, 8, WIDTH, seed=9)}
    source = write_finetrainers(tmp_path / "cache", [(latents, embeds | text)])
    with pytest.raises(ConfigError, match=told):
        import_cache(asked(source, tmp_path / "dataset", "finetrainers", models / "wan"))


def test_musubi_caches_that_cannot_be_known_are_refused(tmp_path: Path, models: Path) -> None:
    def told(**changes: Any) -> str:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (tmp_path / "cache").mkdir()
        musubi(tmp_path / "cache", **changes)
        with pytest.raises(ConfigError) as refusal:
            import_cache(asked(tmp_path / "cache", tmp_path / "dataset", "musubi", models / "wan"))
        return str(refusal.value)

    assert "holds latents of 'fp'; only wan, hv are whole clips" in told(end="fp", architecture="framepack")
    assert "its metadata says architecture 'hunyuan_video'" in told(architecture="hunyuan_video")
    image = {"latents_image_3x4x4_bfloat16": normal(C + 4, 3, 4, 4, seed=1)}
    assert "--leave-out latents_image_3x4x4_bfloat16" in told(more=image)
    assert "3 latent frames of 13 frames" in told(frames=13)


def no_stated(source: Path) -> Path:
    return finetrainers(source)


def stated(source: Path) -> Path:
    text = {"encoder_hidden_states": normal(1, 8, WIDTH, seed=9)}
    return write_finetrainers(source, [(wan_latents(1), text)])


def masked(source: Path) -> Path:
    latents = {"latents": normal(1, 2 * C, 3, 4, 4, seed=1)}
    text = {"prompt_embeds": normal(1, 8, WIDTH, seed=9), "prompt_attention_mask": torch.ones(1, 8)}
    return write_finetrainers(source, [(latents, text)], early=True)


def ttt_video(source: Path) -> Path:
    return write_ttt_video(source, [(normal(2 * C, 3, 4, 4, seed=1), [normal(8, WIDTH, seed=2)])])


def musubi_wan(source: Path) -> Path:
    return musubi(source).parent


def musubi_hv(source: Path) -> Path:
    return musubi(source, end="hv", architecture="hunyuan_video").parent


@pytest.mark.parametrize(
    ("form", "write", "vae", "told"),
    [
        ("cogvideo", cogvideo, "wan", "cogvideo are made with an AutoencoderKLCogVideoX: give"),
        ("ttt-video", ttt_video, "hunyuan", "ttt-video are made with an AutoencoderKLCogVideoX"),
        ("musubi", musubi_wan, "cogvideox", "wan latents of musubi-tuner are made with an AutoencoderKLWan"),
        ("musubi", musubi_hv, "cogvideox", "made with an AutoencoderKLHunyuanVideo"),
        (
            "finetrainers",
            no_stated,
            "wan",
            r"without latents_mean, as in .*latent-0\.pt, are made with an Auto",
        ),
        ("finetrainers", stated, "cogvideox", "with latents_mean, .* are made with an AutoencoderKLWan"),
        ("finetrainers", masked, "cogvideox", "holds a mask, and --vae is an AutoencoderKLCogVideoX"),
    ],
)
def test_a_vae_of_another_class_than_the_trainer_uses_is_refused(
    tmp_path: Path, models: Path, form: Format, write: Callable[[Path], Path], vae: str, told: str
) -> None:
    source = write(tmp_path / "cache")
    with pytest.raises(ConfigError, match=told):
        import_cache(asked(source, tmp_path / "dataset", form, models / vae))
    assert not (tmp_path / "dataset").exists()


def test_a_text_encoder_is_no_vae(tmp_path: Path, models: Path) -> None:
    source, folder = cogvideo(tmp_path / "data"), models / "text" / "text_encoder"
    with pytest.raises(ConfigError, match="expected a VAE in the layout of diffusers, found a 't5' of"):
        import_cache(asked(source, tmp_path / "dataset", "cogvideo", folder))


def test_only_regular_files_are_opened(tmp_path: Path, models: Path) -> None:
    """A pipe would be waited on for ever."""
    files = finetrainers(tmp_path / "cache")
    options = asked(tmp_path / "cache", tmp_path / "dataset", "finetrainers", models / "cogvideox")
    (files / "latent-1.pt").unlink()
    os.mkfifo(files / "latent-1.pt")
    with pytest.raises(ConfigError, match=r"latent-1\.pt: is no regular file; take it out"):
        import_cache(options)
    (files / "latent-1.pt").unlink()
    (files / "latent-1.pt").symlink_to("nowhere")
    told = r"1 of 4 files of the cache cannot be read\n.*latent-1\.pt: No such"
    with pytest.raises(ManifestError, match=told):
        import_cache(options)
    lines = ttt_video(tmp_path / "lines") / "train.jsonl"
    lines.unlink()
    os.mkfifo(lines)
    with pytest.raises(ConfigError, match=r"train\.jsonl: is no regular file"):
        import_cache(asked(lines.parent, tmp_path / "dataset", "ttt-video", models / "cogvideox"))


def test_a_folder_of_other_things_is_refused(tmp_path: Path, models: Path) -> None:
    source = cogvideo(tmp_path / "data")
    with pytest.raises(StaleDatasetError, match="give another -o FOLDER"):
        import_cache(asked(source, source, "cogvideo", models / "cogvideox"))


def test_missing_files_of_ttt_video_are_named(tmp_path: Path, models: Path) -> None:
    cache = write_ttt_video(
        tmp_path / "cache", [(normal(2 * C, 3, 4, 4, seed=1), [normal(8, WIDTH, seed=2)])]
    )
    next((cache / "text").rglob("*.pt")).unlink()
    with pytest.raises(ConfigError, match=r"train\.jsonl: line 1 names .*_txt_emb\.pt, which is missing"):
        import_cache(asked(cache, tmp_path / "dataset", "ttt-video", models / "cogvideox"))


def test_other_options_and_changed_prompts_are_refused(tmp_path: Path, models: Path) -> None:
    source, dataset = cogvideo(tmp_path / "data"), tmp_path / "dataset"
    options = asked(source, dataset, "cogvideo", models / "cogvideox")
    import_cache(options)
    with pytest.raises(StaleDatasetError, match=r"imported_from .*'fps': 8.0.*'fps': 16.0"):
        import_cache(ImportOptions(**{**vars(options), "fps": 16.0}))
    name = hashlib.sha256(CAT.encode()).hexdigest()
    other = source / "cache" / "prompt_embeddings" / f"{hashlib.sha256(DOG.encode()).hexdigest()}.safetensors"
    shutil.copy(other, source / "cache" / "prompt_embeddings" / f"{name}.safetensors")
    with pytest.raises(StaleDatasetError, match=r"a\.safetensors: its prompt embeddings changed"):
        import_cache(options)


def test_the_width_of_the_text_encoder_is_checked_before_anything_is_written(
    tmp_path: Path, models: Path
) -> None:
    texts = {CAT: normal(8, 48, seed=3), DOG: normal(8, 48, seed=4)}
    source = cogvideo(tmp_path / "data", embeddings=texts)
    options = asked(
        source, tmp_path / "dataset", "cogvideo", models / "cogvideox", text_encoder=str(models / "text")
    )
    with pytest.raises(ConfigError, match=rf"--text-encoder gives embeddings {WIDTH} wide, .* are 48"):
        import_cache(options)
    assert not (tmp_path / "dataset").exists()


def test_the_command_says_what_it_did(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, dataset = cogvideo(tmp_path / "data"), tmp_path / "dataset"
    words = ["latentpress", "import", str(source), "-o", str(dataset), "--format", "cogvideo"]
    monkeypatch.setattr(sys, "argv", [*words, "--vae", str(models / "cogvideox"), "--fps", "8"])
    said = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        said.append(capsys.readouterr())
    assert "2 of 2 clips imported" in said[0].out
    assert "no empty prompt" in said[0].out
    assert [line.split()[:2] for line in said[0].err.splitlines()] == [["prompts", "3/3"], ["latents", "2/2"]]
    assert "nothing to do" in said[1].out
    assert not said[1].err
