"""`t5`: what the diffusers pipelines give their transformers, from tiny models saved as real ones are."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from jobs.preprocess import report
from pipeline.graph import preprocess
from pipeline.prompt_cleaning import cleaning
from pipeline.text_encode import load_text_encoder
from pipeline.text_encoding import TextEncoding
from schemas.card import read_card
from schemas.check import check_dataset
from schemas.codec import as_float32
from schemas.config import PreprocessConfig, TextEncoderConfig
from schemas.errors import ConfigError, MissingExtraError, RunError
from schemas.index import read_empty_prompt, read_index, read_tensor
from schemas.load import check_config
from schemas.text_family import FAMILIES, FamilyName
from tests.videos import make_video

CAPTIONS = [
    "A cat sleeps in the sun.",
    "",
    "Two  dogs &amp;amp; a\tcat,   running: caf\u00c3\u00a9 <b>3840x2160</b> http://a.com/b.mp4",
    "Red cups on a table. " * 12,
    "L\u00f6we",
]
FIND_SPEC = "pipeline.prompt_cleaning.importlib.util.find_spec"
LENGTH = 48
WIDTH = 32
_TINY = {
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
PIPELINES: dict[FamilyName, str] = {
    "cogvideox": "CogVideoXPipeline",
    "wan": "WanPipeline",
    "ltx": "LTXPipeline",
    "mochi": "MochiPipeline",
    "allegro": "AllegroPipeline",
    "cosmos": "CosmosTextToWorldPipeline",
}


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece vocabulary with T5's special tokens, such as published T5s have."""
    folder = tmp_path_factory.mktemp("spiece")
    (folder / "text").write_text("\n".join(CAPTIONS[:1] + CAPTIONS[2:] + ["a quick brown fox jumps", "0123"]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spiece"),
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "spiece.model"


def save_model(folder: Path, kind: str = "T5EncoderModel", *, vocab_size: int = 400) -> None:
    model = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = model(model.config_class(vocab_size=vocab_size, **_TINY))
        for parameter in made.parameters():  # the weights that T5 begins with tell few captions apart
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    made.save_pretrained(folder)


def save_pipeline(folder: Path, spiece: Path, kind: str = "T5EncoderModel") -> Path:
    """The layout of a whole pipeline, its tokenizer a `spiece.model` alone."""
    save_model(folder / "text_encoder", kind)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(spiece.read_bytes())
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 226}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, spiece: Path) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("t5"), spiece)


def config(model: Path, **settings: Any) -> TextEncoderConfig:
    tree = {"kind": "t5", "model": str(model), "device": "cpu", "max_length": LENGTH, **settings}
    return TextEncoderConfig.model_validate(tree)


def embeds(encoding: TextEncoding) -> np.ndarray:
    return as_float32(encoding.tensors["prompt_embeds"])


def mask(encoding: TextEncoding) -> list[int]:
    return encoding.tensors["prompt_mask"].data.tolist()


def expected(model: Path, family: FamilyName, captions: list[str], **settings: bool) -> list[np.ndarray]:
    """Per caption what the family's own pipeline gives its transformer."""
    text_encoder = transformers.AutoModelForTextEncoding.from_pretrained(model / "text_encoder")
    tokenizer = transformers.T5Tokenizer.from_pretrained(model / "tokenizer")
    pipeline = object.__new__(getattr(diffusers, PIPELINES[family]))
    pipeline.tokenizer, pipeline.text_encoder = tokenizer, text_encoder
    pipeline._internal_dict = diffusers.configuration_utils.FrozenDict(
        {"force_zeros_for_empty_prompt": False, **settings}
    )
    given: dict[str, Any] = {"max_sequence_length": LENGTH, "device": torch.device("cpu")}
    found = []
    for caption in captions:
        with torch.no_grad():
            if family == "allegro":
                out = pipeline.encode_prompt(caption, False, clean_caption=True, **given)
            else:
                out = pipeline._get_t5_prompt_embeds(caption, **given)
        found.append((out[0] if isinstance(out, tuple) else out)[0].numpy())
    return found


@pytest.mark.parametrize(
    ("family", "kind"), [*((name, "T5EncoderModel") for name in PIPELINES), ("wan", "UMT5EncoderModel")]
)
def test_a_family_gets_what_its_own_pipeline_gives(
    tmp_path: Path, spiece: Path, family: FamilyName, kind: str
) -> None:
    model = save_pipeline(tmp_path, spiece, kind)
    want = expected(model, family, CAPTIONS)
    alone = load_text_encoder(config(model, family=family)).encode(CAPTIONS)
    together = load_text_encoder(config(model, family=family, batch_size=4)).encode(CAPTIONS)
    for wanted, one, other in zip(want, alone, together, strict=True):
        assert embeds(one).shape == (LENGTH, WIDTH)
        assert embeds(one).tobytes() == wanted.tobytes()
        np.testing.assert_allclose(embeds(other), wanted, atol=1e-5, rtol=1e-5)
        assert (mask(one), one.num_tokens, one.truncated) == (mask(other), other.num_tokens, other.truncated)
        assert sum(mask(one)) == min(one.num_tokens, LENGTH)
    assert [one.truncated for one in alone].count(True) >= 1
    assert len({wanted.tobytes() for wanted in want}) == len(CAPTIONS)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.trims])
def test_trim_keeps_what_the_model_can_see(model: Path, family: FamilyName) -> None:
    full = load_text_encoder(config(model, family=family)).encode(CAPTIONS)
    trimmed = load_text_encoder(config(model, family=family, padding="trim")).encode(CAPTIONS)
    for whole, cut in zip(full, trimmed, strict=True):
        kept = sum(mask(whole))
        assert mask(cut) == [1] * kept
        assert embeds(cut).tobytes() == embeds(whole)[:kept].tobytes()
        if FAMILIES[family].pad_rows == "zeros":
            assert not embeds(whole)[kept:].any()
        elif kept < LENGTH:
            assert embeds(whole)[kept:].any()


def test_trim_is_refused_where_it_loses_something(model: Path) -> None:
    tree = {"kind": "t5", "model": str(model), "padding": "trim"}
    with pytest.raises(ConfigError, match=r"transformer sees the pad rows; expected padding = 'full'"):
        check_config({"manifest": "m", "output": "o", "text_encoder": tree}, PreprocessConfig, where="test")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_length_is_the_family_s_unless_it_is_given(family: FamilyName) -> None:
    tree = {"kind": "t5", "model": "m", "family": family}
    assert TextEncoderConfig.model_validate(tree).max_length == FAMILIES[family].max_length
    assert TextEncoderConfig.model_validate({**tree, "max_length": 77}).max_length == 77
    assert TextEncoderConfig.model_validate({"family": family}).max_length == 226


def test_mochi_zeroes_the_empty_prompt_where_its_pipeline_says_so(tmp_path: Path, spiece: Path) -> None:
    model = save_pipeline(tmp_path, spiece)
    plain = load_text_encoder(config(model, family="mochi"))
    (model / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": True}))
    zeroed = load_text_encoder(config(model, family="mochi", batch_size=3))
    assert {**plain.hard_fields(), "force_zeros_for_empty_prompt": True} == zeroed.hard_fields()
    want = expected(model, "mochi", CAPTIONS, force_zeros_for_empty_prompt=True)
    for wanted, one, caption in zip(want, zeroed.encode(CAPTIONS), CAPTIONS, strict=True):
        np.testing.assert_allclose(embeds(one), wanted, atol=1e-5, rtol=1e-5)
        assert any(mask(one)) == (caption != "")
    (empty,) = load_text_encoder(config(model, family="mochi", padding="trim")).encode([""])
    assert (embeds(empty).shape, mask(empty)) == ((1, WIDTH), [0])


def test_byt5_and_its_tokenizer_in_one_folder(tmp_path: Path) -> None:
    save_model(tmp_path)
    tokenizer = transformers.ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (encoding,) = load_text_encoder(config(tmp_path, max_length=16)).encode(["A cat."])
    assert (encoding.num_tokens, mask(encoding)) == (7, [1] * 7 + [0] * 9)
    ids = tokenizer("A cat.", padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = transformers.T5EncoderModel.from_pretrained(tmp_path)(ids).last_hidden_state[0]
    assert embeds(encoding).tobytes() == wanted.numpy().tobytes()


def test_a_whole_t5_gives_its_encoder(tmp_path: Path, spiece: Path) -> None:
    save_pipeline(tmp_path, spiece)
    save_model(tmp_path / "text_encoder", "T5ForConditionalGeneration")
    (encoding,) = load_text_encoder(config(tmp_path)).encode(["A cat."])
    (wanted,) = expected(tmp_path, "cogvideox", ["A cat."])
    assert embeds(encoding).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("family", ["cogvideox", "wan"])
def test_stored_type_rounds_once(model: Path, family: FamilyName) -> None:
    (exact,) = load_text_encoder(config(model, family=family)).encode(["A cat."])
    for dtype, tag in (("bfloat16", "BF16"), ("float16", "F16")):
        (stored,) = load_text_encoder(config(model, family=family, dtype=dtype)).encode(["A cat."])
        assert stored.tensors["prompt_embeds"].dtype == tag
        rounded = torch.from_numpy(embeds(exact)).to(getattr(torch, dtype)).float().numpy()
        assert embeds(stored).tobytes() == rounded.tobytes()
        (computed,) = load_text_encoder(config(model, family=family, compute_dtype=dtype)).encode(["A cat."])
        assert computed.tensors["prompt_embeds"].dtype == "F32"
        assert 0 < np.abs(embeds(computed) - embeds(exact)).max() < 0.2


def test_hard_fields_tell_models_tokenizers_and_conventions_apart_without_weights(
    model: Path, tmp_path: Path, spiece: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
        fields = load_text_encoder(config(model)).hard_fields()
    assert str(model) not in json.dumps(fields)
    moved = save_pipeline(tmp_path / "moved", spiece)
    assert load_text_encoder(config(moved)).hard_fields() == fields

    def differing(**settings: Any) -> set[str]:
        found = load_text_encoder(config(moved, **settings)).hard_fields()
        return {name for name in fields.keys() | found.keys() if fields.get(name) != found.get(name)}

    assert differing(family="ltx") == {"family", "pad_rows"}
    assert differing(compute_dtype="bfloat16", batch_size=7) == {"compute_dtype"}
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512}
    (moved / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert differing() == {"tokenizer_sha256"}
    save_model(moved / "text_encoder", "UMT5EncoderModel")
    assert differing() == {"tokenizer_sha256", "weights_sha256", "config"}


def test_its_own_tokenizer_comes_before_one_beside_it(tmp_path: Path, spiece: Path) -> None:
    model = save_pipeline(tmp_path, spiece)
    (want,) = load_text_encoder(config(model)).encode(["A cat."])
    (tmp_path / "tokenizer").rename(tmp_path / "own")
    for path in (tmp_path / "own").iterdir():
        path.rename(tmp_path / "text_encoder" / path.name)
    (tmp_path / "own").rmdir()
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    for given in (model, model / "text_encoder"):
        (found,) = load_text_encoder(config(given)).encode(["A cat."])
        assert embeds(found).tobytes() == embeds(want).tobytes()


@pytest.mark.parametrize("padding", ["full", "trim"])
def test_tokens_and_bytes_are_known_without_weights(
    model: Path, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"family": "wan", "padding": padding, "dtype": "bfloat16"}
    encodings = load_text_encoder(config(model, **settings)).encode(CAPTIONS)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    unloaded = load_text_encoder(config(model, **settings))
    unloaded.check()
    assert unloaded.count_tokens(CAPTIONS) == [encoding.num_tokens for encoding in encodings]
    for encoding in encodings:
        rows = min(encoding.num_tokens, LENGTH) if padding == "trim" else LENGTH
        assert rows * unloaded.row_bytes() == sum(each.data.nbytes for each in encoding.tensors.values())


def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path, spiece: Path) -> None:
    def said(model: Path | str, **settings: Any) -> str:
        with pytest.raises(ConfigError) as refused:
            load_text_encoder(config(Path(model), **settings)).load()
        assert "\n" not in str(refused.value)
        return str(refused.value)

    (tmp_path / "empty").mkdir()
    assert "text_encoder.model" in said(tmp_path / "nowhere")
    assert "no config.json" in said(tmp_path / "empty")
    model = save_pipeline(tmp_path / "t5", spiece)
    settings = (model / "tokenizer" / "tokenizer_config.json").read_bytes()
    (model / "tokenizer" / "tokenizer_config.json").unlink()
    assert "holds a vocabulary, but none of tokenizer_config.json" in said(model)
    (model / "tokenizer" / "tokenizer_config.json").write_bytes(settings)
    (model / "tokenizer" / "spiece.model").unlink()
    assert "found no tokenizer" in said(model)
    (model / "tokenizer" / "spiece.model").write_bytes(b"torn")
    assert "cannot be loaded" in said(model)
    (model / "tokenizer" / "spiece.model").write_bytes(spiece.read_bytes())
    path = model / "text_encoder" / "model.safetensors"
    weights = safetensors_of(path)
    whole = path.read_bytes()
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_safetensors(weights, path)
    assert "lack 1 of the tensors" in said(model)
    weights["encoder.block.1.layer.0.SelfAttention.q.weight"] = torch.zeros(3, 3)
    save_safetensors(weights, path)
    assert "lack 1 of the tensors" in said(model)
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in said(model)
    path.unlink()
    assert "lacks model.safetensors" in said(model)
    config_path = model / "text_encoder" / "config.json"
    config_path.write_text(json.dumps({"model_type": "bert"}))
    path.write_bytes(whole)
    assert "expected a T5, UMT5 or ByT5, found model_type 'bert'" in said(model)
    if not torch.cuda.is_available():
        config_path.write_text(json.dumps({"model_type": "t5"}))
        assert "torch sees no GPU here" in said(model, device="cuda")


def test_a_hub_that_is_out_of_reach_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"text_encoder.model = 'nobody/nothing'") as refused:
        load_text_encoder(config(Path("nobody/nothing")))
    assert "\n" not in str(refused.value)


def test_a_dataset_holds_every_caption_of_a_clip_and_the_empty_prompt(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video(tmp_path / "a.mp4", num_frames=9, size=(48, 32))
    cells = {"video": "a.mp4", "captions": [CAPTIONS[0], *CAPTIONS[2:]]}
    (tmp_path / "m.jsonl").write_text(json.dumps(cells) + "\n")
    root = tmp_path / "latents"
    tree = {
        "manifest": str(tmp_path / "m.jsonl"),
        "output": str(root),
        "buckets": [{"num_frames": 9, "height": 32, "width": 48}],
        "text_encoder": config(model, family="wan", padding="trim").model_dump(),
        "executor": {"kind": "local"},
    }
    settings = check_config(tree, PreprocessConfig, where="test")
    with pytest.MonkeyPatch.context() as patch:
        cleaning.cache_clear()
        patch.setattr(FIND_SPEC, lambda name: None)
        with pytest.raises(MissingExtraError, match="ftfy"):
            preprocess(settings)
    assert not root.exists()
    summary, ran = preprocess(settings)
    assert "only for trials, since no published model reads what it makes: video_encoder.kind = 'dct'\n" in (
        capsys.readouterr().err
    )
    long = sum(n > LENGTH for n in load_text_encoder(settings.text_encoder).count_tokens(cells["captions"]))
    assert summary["last_run"]["prompts"]["captions_cut"] == long > 1
    report(settings, summary, ran=ran, over=False)
    told = " ".join(capsys.readouterr().out.split())
    assert "4 of 4 captioned clips kept, 0 quarantined 1 clip encoded in" in told
    assert f"note: {long} captions were cut to {LENGTH} tokens" in told
    assert check_dataset(root).clean
    index = read_index(root).to_pylist()
    assert {row["caption"] for row in index} == set(cells["captions"])
    assert len({row["sample_id"] for row in index}) == 1
    captions = [row["caption"] for row in index]
    found = [read_tensor(root, row, "prompt_embeds") for row in index]
    found.append(read_empty_prompt(root)["prompt_embeds"])
    for tensor, wanted in zip(found, expected(model, "wan", [*captions, ""]), strict=True):
        kept = len(tensor.data)
        assert as_float32(tensor).tobytes() == wanted[:kept].tobytes()
        assert not wanted[kept:].any()
    assert read_card(root).hard["prompts"]["text_encoder.pad_rows"] == "zeros"


def test_cleaning_asks_for_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaning.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(FIND_SPEC, lambda name: None)
        for family in ("wan", "allegro"):
            with pytest.raises(MissingExtraError, match="ftfy"):
                cleaning(family)
        assert cleaning("mochi")(CAPTIONS[2]) == CAPTIONS[2]
    assert cleaning("wan")(CAPTIONS[2]) == prompt_clean(CAPTIONS[2]) != CAPTIONS[2]
    assert "3840" not in cleaning("allegro")(CAPTIONS[2])


def test_numbers_that_are_not_finite_stop_the_run(tmp_path: Path, spiece: Path) -> None:
    model = save_pipeline(tmp_path, spiece)
    path = model / "text_encoder" / "model.safetensors"
    weights = safetensors_of(path)
    weights["encoder.final_layer_norm.weight"].fill_(float("inf"))
    save_safetensors(weights, path)
    with pytest.raises(RunError, match="not finite"):
        load_text_encoder(config(model)).encode(["A cat."])


def test_embeddings_that_the_stored_type_cannot_hold_stop_the_run(tmp_path: Path, spiece: Path) -> None:
    model = save_pipeline(tmp_path, spiece)
    path = model / "text_encoder" / "model.safetensors"
    weights = safetensors_of(path)
    weights["encoder.final_layer_norm.weight"].fill_(1e6)
    save_safetensors(weights, path)
    with pytest.raises(RunError, match=r"more than text_encoder\.dtype = 'float16' holds"):
        load_text_encoder(config(model, dtype="float16")).encode(["A cat."])
    (encoding,) = load_text_encoder(config(model, dtype="bfloat16")).encode(["A cat."])
    assert np.isfinite(embeds(encoding)).all()


def test_it_says_nothing_and_uses_what_batch_it_is_told(
    model: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load_text_encoder(config(model))
    with caplog.at_level(logging.WARNING):
        encoder.encode(CAPTIONS)
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])
    assert encoder.batch_size() == 1
    assert load_text_encoder(config(model, batch_size=9)).batch_size() == 9


@pytest.mark.gpu
@pytest.mark.parametrize("family", PIPELINES)
def test_a_gpu_gives_the_same_to_rounding(model: Path, family: FamilyName) -> None:
    want = load_text_encoder(config(model, family=family)).encode(CAPTIONS)
    encoder = load_text_encoder(config(model, family=family, device="cuda"))
    assert encoder.batch_size() == 32
    for wanted, found in zip(want, encoder.encode(CAPTIONS), strict=True):
        np.testing.assert_allclose(embeds(found), embeds(wanted), atol=1e-3, rtol=1e-3)
        assert mask(found) == mask(wanted)


def safetensors_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(path.read_bytes())


def save_safetensors(weights: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, path, metadata={"format": "pt"})
