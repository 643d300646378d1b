"""Captions as a family's pipeline cleans them, by the functions of diffusers themselves.

diffusers leaves out steps whose library is not installed; here such a library is asked for instead, since
other text gives other numbers.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

from schemas.errors import MissingExtraError
from schemas.text_family import FamilyName

_NEEDS: dict[FamilyName, tuple[tuple[str, str], ...]] = {
    "wan": (("ftfy", "ftfy"),),
    "allegro": (("ftfy", "ftfy"), ("bs4", "beautifulsoup4")),
}
"""Modules that the cleaning of a family uses, and the packages that hold them."""


@functools.cache
def cleaning(family: FamilyName) -> Callable[[str], str]:
    """The cleaning of one caption; MissingExtraError where a library that it uses is not installed."""
    for module, package in _NEEDS.get(family, ()):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, "pipeline")
    if family == "wan":
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return prompt_clean
    if family == "allegro":
        from diffusers.pipelines.allegro.pipeline_allegro import AllegroPipeline

        # Methods that read nothing of a pipeline but their own patterns, so one without models will do.
        pipeline = object.__new__(AllegroPipeline)
        return lambda caption: pipeline._text_preprocessing(caption, clean_caption=True)[0]
    return lambda caption: caption
