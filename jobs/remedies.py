"""What can be done about quarantined clips: a reason code in, a sentence out."""

from __future__ import annotations

_RETRY = "then `latentpress retry` has the rows tried again"
_BROKEN = "The file is broken or cut off: get it anew, or leave its row out of the manifest."
_POLICY = "The trainer whose policy this is would not take such a clip: another frames.policy does."

_REMEDIES = {
    "backend": 'decode.backend cannot read it; "pyav", in a new dataset, may.',
    "damaged": "Pictures that were asked for, and those near them, cannot be decoded: get the file anew.",
    "decoder_crash": "It crashes FFmpeg, which cost this row alone: re-encode the file, or leave it out.",
    "empty": "The cache it was imported from holds no value there: make that entry anew, and import again.",
    "empty_file": _BROKEN,
    "empty_window": "start_s and end_s hold no picture of the file: mend them in the manifest.",
    "encrypted": "It is under DRM: only its owner has a form that can be decoded.",
    "fetch_failed": f"Its server does not have it, or answers amiss: mend the URL or the server; {_RETRY}.",
    "fetch_refused": "Its address is not allowed: if you trust it, name it in sources.schemes and hosts.",
    "format_refused": "Its container is not one that is opened: rewrite the file as MP4 or Matroska.",
    "hdr": 'picture.hdr drops HDR clips; "tonemap", in a new dataset, takes them.',
    "internal": "A fault of latentpress, not of the file: please report it with the message.",
    "no_decoder": "This FFmpeg cannot decode its codec or pixel format: re-encode the file.",
    "no_pictures": _BROKEN,
    "no_prompt": "The embeddings of its caption cannot be read: make them anew, and import again.",
    "no_video_stream": "It has no video: a sound or picture file? Leave its row out of the manifest.",
    "non_finite": "The encoder gave NaN or Inf: compute_dtype float32, in a new dataset, may not.",
    "not_a_file": "The path is no regular file: mend it in the manifest.",
    "open_failed": _BROKEN,
    "outside_root": "The file is outside of sources.root: move it there, or widen that if you trust its row.",
    "policy_error": _POLICY,
    "policy_refused": _POLICY,
    "timeout": f"It took too long: raise limits.clip_timeout_s if such clips are expected; {_RETRY}.",
    "too_short": "frames.short or max_slowdown drops clips with so few pictures; fewer num_frames take them.",
    "unreadable": "Its file in the cache cannot be read: make it anew, and import again.",
    "worker_crash": f"Encoding it alone killed its worker, mostly for want of memory: free some; {_RETRY}.",
}


def remedy(reason: str) -> str:
    """A sentence; of a reason that is not known, where to look."""
    if reason.startswith("limit_"):
        return f"It is over a limit that the message names: raise it if such clips are expected; {_RETRY}."
    return _REMEDIES.get(reason, "The message says what was found.")
