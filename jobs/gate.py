"""A gate on samples decoded again: which are past it, and how that is told to a person or a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from jobs.console import console, table
from pipeline.fidelity import MAX_DIFFERENCE, Fidelity, NotCompared


class Gate:
    """Samples held against their sources, and what is asked of them."""

    def __init__(
        self, results: list[Fidelity | NotCompared], *, min_psnr: float, notes: Sequence[str]
    ) -> None:
        """`min_psnr`: dB, for the mean of a sample's frames; `notes`: of settings that were adopted, which
        the samples are not decoded with."""
        self.results, self._min_psnr, self._notes = results, min_psnr, notes
        self.compared = [result for result in results if isinstance(result, Fidelity)]
        self.failed = [result for result in self.compared if not self._holds(result)]

    def _holds(self, result: Fidelity) -> bool:
        return result.psnr_db >= self._min_psnr and result.difference <= MAX_DIFFERENCE

    @property
    def passed(self) -> bool:
        """Not where nothing could be compared: such a gate has seen nothing."""
        return bool(self.compared) and not self.failed

    def as_dict(self) -> dict[str, Any]:
        psnr = [result.psnr_db for result in self.compared]
        return {
            "passed": self.passed,
            "compared": len(psnr),
            "min_psnr_db": min(psnr, default=None),
            "median_psnr_db": median(psnr) if psnr else None,
            "max_difference": max((result.difference for result in self.compared), default=None),
            "gate": {"min_psnr_db": self._min_psnr, "max_difference": MAX_DIFFERENCE},
            "notes": list(self._notes),
            "samples": [asdict(result) for result in self.results],
        }

    def report(self) -> None:
        """A table of the samples, and the outcome in a sentence."""
        rows = table("sample", "source", ">PSNR dB", ">worst frame", ">difference", "")
        for result in self.compared:
            numbers = f"{result.psnr_db:.1f}", f"{result.worst_frame_db:.1f}", f"{result.difference:.2g}"
            past = "past the gate" if result in self.failed else ""
            rows.add_row(result.sample_id[:12], result.source, *numbers, past)
        if self.compared:
            console.print(rows)
        for missing in self.results:
            if isinstance(missing, NotCompared):
                print(f"note: sample {missing.sample_id[:12]}, {missing.source}: {missing.note}")
        if self._notes:
            print("note: sources were decoded with the settings of the card, and others were adopted since")
        told = self.as_dict()
        if not self.compared:
            print(f"none of {len(self.results)} samples could be compared with its source: not passed")
            return
        print(
            f"{told['compared']} of {len(self.results)} samples compared with their sources: PSNR "
            f"{told['min_psnr_db']:.1f} dB at least, {told['median_psnr_db']:.1f} dB median (gate "
            f"{self._min_psnr:g} dB), difference {told['max_difference']:.2g} at most (gate "
            f"{MAX_DIFFERENCE:g}): " + ("passed" if self.passed else f"{len(self.failed)} past the gate")
        )
