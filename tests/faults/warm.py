"""What the fork server imports once for all drivers; importing starts no thread that a fork would lose."""

import importlib.util

import av  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch  # noqa: F401
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel  # noqa: F401  (the package itself is lazy)

import pipeline.graph
import pipeline.text_encode
import pipeline.video_encode  # noqa: F401

if importlib.util.find_spec("pandas"):  # pyarrow looks for it when it is first given rows
    importlib.import_module("pandas")
