"""Configs: strict, overridable, and read back from their own resolved form."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.config import PreprocessConfig
from schemas.errors import ConfigError
from schemas.load import config_digest, load_config, resolved_toml
from schemas.train_config import TrainConfig

MINIMAL = 'manifest = "m.jsonl"\noutput = "out"\n[[buckets]]\nnum_frames = 49\nheight = 480\nwidth = 720\n'
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL)
    return path


def test_overrides_reach_nested_keys_and_list_items(config_file: Path) -> None:
    config = load_config(
        config_file,
        PreprocessConfig,
        overrides=["buckets.0.height=128", "limits.max_seconds=5", "output=../a b", "frames.short=drop"],
    )
    assert config.buckets[0].height == 128
    assert config.limits.max_seconds == 5.0
    assert config.output == "../a b"
    assert config.frames.short == "drop"


def test_resolved_config_reads_back_equal_and_hashes_alike(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, PreprocessConfig, overrides=["seed=7"])
    again = tmp_path / "again.toml"
    again.write_text(resolved_toml(config))
    assert load_config(again, PreprocessConfig) == config
    assert config_digest(load_config(again, PreprocessConfig)) == config_digest(config)
    other = load_config(config_file, PreprocessConfig, overrides=["seed=8"])
    assert config_digest(other) != config_digest(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("framez.policy=uniform", "unknown key 'framez'; did you mean 'frames'"),
        ("frames.polcy=uniform", "unknown key 'frames.polcy'; did you mean 'policy'"),
        ("frames.policy=fast", "frames.policy = 'fast': this version takes 'uniform', 'keyframe', 'fps'"),
        ("units.rows=0", "units.rows = 0: input should be greater than 0"),
        ("units.rows=2.5", "units.rows = 2.5"),
        ('units.rows="4"', "units.rows = '4'"),
        ("quarantine.max_rate=1.5", "quarantine.max_rate = 1.5"),
        ("limits.clip_timeout_s=inf", "limits.clip_timeout_s"),
        ("buckets.1.height=64", "buckets has no item 1, counted from 0"),
        ("buckets.height=64", "buckets is a list; name an item by position, buckets.0"),
        ("seed.x=1", "seed"),
        ("seed", "expected key=value"),
    ],
)
def test_a_wrong_override_names_its_key(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config_file, PreprocessConfig, overrides=[override])
    assert message in str(error.value)


def test_every_bad_key_is_named_at_once(config_file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config_file, PreprocessConfig, overrides=["a=1", "units.rows=0"])
    assert "unknown key 'a'" in str(error.value)
    assert "units.rows" in str(error.value)


TRAIN = 'dataset = "d"\noutput = "o"\n[[stages]]\nname = "a"\nsteps = 3\nlr = { peak = 1.0 }\n'


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.lr.peek=1", "unknown key 'stages.0.lr.peek'; did you mean 'peak'?"),
        ("stages.0.trainable=[5]", "stages.0.trainable.0 = 5: input should be a valid string"),
        ("stages=[]", "stages = []: tuple should have at least 1 item after validation, not 0"),
        (
            "stages.0.mesh={ranks = 2}",
            "unknown key 'stages.0.mesh.ranks'; known keys of stages.0.mesh: dp_rep",
        ),
        ('datasets=[{path = "e"}]', "expected `dataset` or `datasets`, found both"),
        ("seed={x = 1}", "seed: input should be a valid integer, found a section"),
        (
            "stages.0={name = 'a', steps = 3, lr = {peak = 1}, max_s = 3, max_frames = 9}",
            "stages.0: a window is bounded by max_s or by max_frames; found both",
        ),
    ],
)
def test_what_is_wrong_is_told_once_and_not_buried(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "train.toml"
    path.write_text(TRAIN)
    with pytest.raises(ConfigError) as error:
        load_config(path, TrainConfig, overrides=[override])
    told = str(error.value).removeprefix(f"{path}: ")
    assert told.startswith(message)
    assert told.count(": ") <= 1
    assert "{" not in told


def test_known_keys_are_listed_once_for_a_section(config_file: Path) -> None:
    unknown = ["xyzzy=1", "plugh=1", "units.xyzzy=1"]
    with pytest.raises(ConfigError) as error:
        load_config(config_file, PreprocessConfig, overrides=unknown)
    told = str(error.value)
    assert all(f"unknown key {key.partition('=')[0]!r}" in told for key in unknown)
    assert told.count("known keys here: manifest, output") == told.count("known keys of units: rows") == 1


def test_a_config_of_the_other_command_is_called_so(config_file: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.toml"
    train.write_text(TRAIN)
    with pytest.raises(ConfigError) as error:
        load_config(config_file, TrainConfig, overrides=["units.rows=4"])
    assert str(error.value).endswith(
        ": expected a config of `latentpress train`, with stages; found one of "
        "`latentpress preprocess`, with manifest, buckets, units"
    )
    with pytest.raises(
        ConfigError, match=r"with manifest; found one of `latentpress train`, with dataset, stages"
    ):
        load_config(train, PreprocessConfig)


def test_missing_required_keys_and_files_are_clear(tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    with pytest.raises(ConfigError, match="manifest is missing"):
        load_config(empty, PreprocessConfig)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "nowhere.toml", PreprocessConfig)
    empty.write_text("a = [1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(empty, PreprocessConfig)


@pytest.mark.parametrize("section", ["video_encoder", "text_encoder"])
def test_a_model_without_its_kind_is_refused(config_file: Path, section: str) -> None:
    toy = {"video_encoder": "dct", "text_encoder": "tiny-t5"}[section]
    config_file.write_text(f'{MINIMAL}[{section}]\nmodel = "owner/name"\n')
    with pytest.raises(
        ConfigError, match=rf"{section}.*model without kind would not be used; expected kind = "
    ):
        load_config(config_file, PreprocessConfig)
    config = load_config(config_file, PreprocessConfig, overrides=[f"{section}.kind={toy}"])
    again = config_file.with_name("again.toml")
    again.write_text(resolved_toml(config))
    assert load_config(again, PreprocessConfig) == config


@pytest.mark.parametrize("family", ["5", '["wan"]', '"nobody"'])
def test_a_family_that_is_none_is_said_in_words(config_file: Path, family: str) -> None:
    config_file.write_text(f'{MINIMAL}[text_encoder]\nkind = "t5"\nmodel = "m"\nfamily = {family}\n')
    with pytest.raises(ConfigError, match=r"text_encoder\.family"):
        load_config(config_file, PreprocessConfig)


def test_repeated_buckets_are_refused(config_file: Path) -> None:
    config_file.write_text(MINIMAL + "[[buckets]]\nnum_frames = 49\nheight = 480\nwidth = 720\n")
    with pytest.raises(ConfigError, match="bucket 1 repeats bucket 0"):
        load_config(config_file, PreprocessConfig)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("lr = { peak = -1.0 }", "stages.0.lr.peak"),
        ('trainable = ["]["]\nlr = { peak = 1.0 }', "stages.0.trainable"),
    ],
)
def test_stages_are_checked(tmp_path: Path, line: str, key: str) -> None:
    path = tmp_path / "train.toml"
    path.write_text(f'dataset = "d"\noutput = "o"\n[[stages]]\nname = "a"\nsteps = 3\n{line}\n')
    with pytest.raises(ConfigError, match=key):
        load_config(path, TrainConfig)


@pytest.mark.parametrize(
    ("folder", "model"),
    [("preprocess", PreprocessConfig), ("train", TrainConfig)],
    ids=["preprocess", "train"],
)
def test_shipped_configs_load(folder: str, model: type[PreprocessConfig | TrainConfig]) -> None:
    paths = sorted((REPOSITORY / "configs" / folder).glob("*.toml"))
    assert paths
    for path in paths:
        load_config(path, model)
