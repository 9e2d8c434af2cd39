"""The same tissue in two public data sets: testing a model of one on the other's slide tests it on what it has learned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Sections of the same four tumours were published with both studies (docs/data.md).
SAME_TISSUE = {
    ("her2st", "stnet"): {"E": "BC23567", "F": "BC23810", "G": "BC23903", "H": "BC24044"},
}


def leaking_slides(training_type: str, training_patients: Iterable[str], slides: Mapping[str, str]) -> dict[str, str]:
    """Slides whose tissue the training has seen.

    training_type, training_patients: what a model was trained on (validation patients included).
    slides: name -> patient of the external slides, whatever their folder is called: a public patient's identifier in
        either of the two (the BC number; for her2st the letter in a slide name such as E2) is recognised.
    returns: slide -> sentence that says why.
    """
    trained = set(training_patients)
    found = {}
    for (first, second), pairs in SAME_TISSUE.items():
        for here, there, partner in ((first, second, pairs), (second, first, {v: k for k, v in pairs.items()})):
            if training_type != here:
                continue
            for slide, patient in slides.items():
                for mine in sorted(trained & set(partner)):
                    if _is_of(partner[mine], slide, patient):
                        found[slide] = (
                            f"{slide} is tissue of {there} {partner[mine]}, which is {here} {mine}: a training patient"
                        )
    return found


def _is_of(identifier: str, slide: str, patient: str) -> bool:
    """Whether a slide is of a public patient: by its patient, or by a name such as BC23567_D2 or E2."""
    if patient == identifier:
        return True
    pattern = (
        rf"(?<![A-Za-z0-9]){re.escape(identifier)}(?![A-Za-z0-9])" if len(identifier) > 1 else rf"^{identifier}[1-6]$"
    )
    return re.search(pattern, slide) is not None
