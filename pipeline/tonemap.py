"""HDR or wide-gamut pictures -> SDR BT.709, on the small picture.

In: R'G'B' codes of PQ (SMPTE ST 2084), HLG (ARIB STD-B67) or SDR with BT.2020 primaries. Out: 8-bit R'G'B'
for a BT.709 display. The steps, each by its standard:

1. Codes to light on the display in cd/m2. PQ: the EOTF of ST 2084. HLG: inverse OETF and OOTF of BT.2100
   for a display of 1000 cd/m2, gamma 1.2. SDR: BT.1886, white at 203 cd/m2.
2. The tone curve of BT.2390 (its EETF, in PQ), from the peak of the source to 203 cd/m2, the reference
   white of BT.2408. It leaves light below half of white nearly alone and rolls off what is above. Each
   pixel is scaled by what the curve does to its largest component, so that hues and neutrals stay.
3. BT.2020 to BT.709 primaries (BT.2087); what lies outside is clipped.
4. The inverse of BT.1886 (gamma 2.4), not the camera curve of BT.709: the light of step 2 is meant for a
   display, and this is the code that makes an SDR display show it.

Curves over light are tables of `_STEPS` entries, even in the fourth root of light: a tenth of a code off at
most, and ten times as fast as the formulas.

N pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from av.video.frame import VideoFrame

BITS = 12
"""Bits of the codes that come in."""
SDR_WHITE = 203.0
"""cd/m2: the brightest light that is kept, and the light of SDR white."""
ASSUMED_PEAK = 1000.0
"""cd/m2, for PQ that does not tell its peak, and HLG: what most material is graded for."""
_HLG_GAMMA = 1.2
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
"""BT.2020 to BT.709 primaries, linear light (BT.2087)."""
_TO_709 /= _TO_709.sum(axis=1, keepdims=True)  # What rounding to four digits took from white.
_STEPS = 4096


def pq_light(code: np.ndarray) -> np.ndarray:
    """cd/m2 of PQ codes in [0, 1]: the EOTF of SMPTE ST 2084."""
    root = np.maximum(code, 0) ** (32 / 2523)
    light: np.ndarray = 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (
        8192 / 1305
    )
    return light


def pq_code(light: np.ndarray) -> np.ndarray:
    """PQ codes in [0, 1] of cd/m2: the inverse of `pq_light`."""
    power = (np.maximum(light, 0) / 10000) ** (1305 / 8192)
    code: np.ndarray = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** (2523 / 32)
    return code


def hlg_scene(code: np.ndarray) -> np.ndarray:
    """Scene light in [0, 1] of HLG codes in [0, 1]: the inverse OETF of BT.2100."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene: np.ndarray = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    return scene


def tone_curve(light: np.ndarray, *, peak: float) -> np.ndarray:
    """cd/m2 in [0, `SDR_WHITE`] for cd/m2 of a source with this peak: the EETF of BT.2390, black at 0."""
    source, target = pq_code(np.array([peak, SDR_WHITE]))
    code = np.minimum(pq_code(light) / source, 1)
    top = target / source
    if top >= 1:
        return np.minimum(light, SDR_WHITE)
    knee = 1.5 * top - 0.5
    t = (code - knee) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * top
    )
    return pq_light(np.where(code < knee, code, spline) * source)


def source_peak(frame: VideoFrame) -> float:
    """cd/m2 of the brightest pixel a PQ picture claims: MaxCLL, else the mastering display's peak, else
    1000."""
    level: Any = frame.side_data.get("CONTENT_LIGHT_LEVEL")
    if level is not None and (max_cll := int(np.frombuffer(bytes(level), "=u4")[0])):
        return float(np.clip(max_cll, SDR_WHITE, 10000))
    display: Any = frame.side_data.get("MASTERING_DISPLAY_METADATA")
    if display is not None:
        # AVMasteringDisplayMetadata: ten fractions, the largest luminance last, then two flags.
        fields = np.frombuffer(bytes(display), "=i4")
        if fields[21] and fields[19] > 0:
            return float(np.clip(fields[18] / fields[19], SDR_WHITE, 10000))
    return ASSUMED_PEAK


class ToneMap:
    """The mapping of one clip, its tables made once."""

    def __init__(self, transfer: str, *, peak: float, wide: bool) -> None:
        """`transfer` "PQ", "HLG" or "" for SDR; `peak` in cd/m2 of PQ; `wide` for BT.2020 primaries."""
        self._hlg, self._wide = transfer == "HLG", wide
        code = np.arange(2**BITS) / (2**BITS - 1)
        if transfer == "HLG":
            self._peak, light = ASSUMED_PEAK, hlg_scene(code)
        elif transfer == "PQ":
            self._peak, light = peak, np.minimum(pq_light(code), peak)
        else:
            self._peak, light = SDR_WHITE, SDR_WHITE * code**2.4
        self._light = light.astype(np.float32)
        curve = tone_curve(_samples(self._peak), peak=self._peak)
        self._shown = (curve / SDR_WHITE).astype(np.float32)
        self._code = np.round(255 * _samples(1) ** (1 / 2.4)).astype(np.uint8)
        self._code[0] = 0

    def apply(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [3, N] for the red, green and blue codes, uint16 [3, N] of `BITS` bits, full range."""
        light = self._light[codes]
        if self._hlg:
            luma = np.maximum(_LUMA_2020 @ light, 1e-6)
            light *= ASSUMED_PEAK * luma ** (_HLG_GAMMA - 1)
        largest = light.max(axis=0)
        light *= _looked_up(self._shown, largest, self._peak) / np.maximum(largest, 1e-6)
        if self._wide:
            light = _TO_709 @ light
        return _looked_up(self._code, light, 1)


def _samples(top: float) -> np.ndarray:
    """Light in (0, top] that the entries of a table stand for."""
    return top * (np.maximum(np.arange(_STEPS), 0.5) / (_STEPS - 1)) ** 4


def _looked_up(table: np.ndarray, light: np.ndarray, top: float) -> np.ndarray:
    """The entry nearest to each light in [0, top]."""
    place = np.sqrt(np.sqrt(np.clip(light * np.float32(1 / top), 0, 1)))
    place *= _STEPS - 1
    place += 0.5
    found: np.ndarray = table[place.astype(np.uint16)]
    return found
