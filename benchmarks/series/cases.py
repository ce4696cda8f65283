"""The lab's case files: ``python -m benchmarks.series.cases --write DIR``.

    lab.jsonl       240 vignettes to evaluate on; the three rules decide 18 % of them, a share near MIETIC-36's 5 of 36
    nurses.jsonl    120 training vignettes with the labels of nurses who waver, in exact shares

Where nurses waver, a known share of the cases of a stratum is labelled one level too acute (`NURSE_LABELS`). The shares
are exact over an epoch, not drawn: what training makes of them is then no matter of a lucky draw.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from benchmarks.tiny_world.vignettes import SEED, draw_vignettes, row
from grpo.runtime.terminal import tolerate_narrow_encodings

LAB_MIX: Mapping[str, int] = MappingProxyType(
    {
        "lifesaving_done": 16,
        "lifesaving_other": 26,
        "severe_pain": 14,
        "open_injury": 14,
        "high_risk": 38,
        "danger_vitals": 20,
        "resources_many": 50,
        "resource_one": 36,
        "resource_none": 26,
    }
)
"""Cases of each stratum in lab.jsonl."""

NURSE_LABELS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "lifesaving_done": (6, 0),
        "lifesaving_other": (8, 0),
        "severe_pain": (6, 0),
        "open_injury": (6, 0),
        "high_risk": (14, 0),
        "danger_vitals": (8, 0),
        "resources_many": (36, 17),
        "resource_one": (24, 11),
        "resource_none": (12, 3),
    }
)
"""Stratum → cases in nurses.jsonl, and how many of them are labelled one level too acute."""


def lab_file() -> str:
    """The content of lab.jsonl, the same on every machine; its patients are of a split that training never has."""
    drawn = draw_vignettes("mietic36", sum(LAB_MIX.values()), mix=LAB_MIX, seed=SEED + 1)
    return "".join(row(replace(v, id=f"lab-{i:06d}")) for i, v in enumerate(drawn))


def nurses_file() -> str:
    """The content of nurses.jsonl: train vignettes of a draw of their own, some labelled one level too acute, evenly
    spread."""
    mix = {stratum: n for stratum, (n, _) in NURSE_LABELS.items()}
    drawn = draw_vignettes("train", sum(mix.values()), mix=mix, seed=SEED + 1)
    seen = dict.fromkeys(mix, 0)
    lines = []
    for i, vignette in enumerate(drawn):
        count, acute = NURSE_LABELS[vignette.stratum]
        k = seen[vignette.stratum]
        seen[vignette.stratum] += 1
        shift = (k + 1) * acute // count - k * acute // count
        lines.append(row(replace(vignette, id=f"nurses-{i:06d}", esi=vignette.esi - shift)))
    return "".join(lines)


FILES = MappingProxyType({"lab": lab_file, "nurses": nurses_file})


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    tolerate_narrow_encodings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.series.cases", description="Write the lab's case files."
    )
    parser.add_argument("--write", type=Path, required=True, metavar="DIR", help="folder for the two JSONL files")
    folder = parser.parse_args(argv).write
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (folder / f"{name}.jsonl").write_text(content(), encoding="ascii", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
