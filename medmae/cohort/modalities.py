"""Canonical modality names, and what the field calls them elsewhere.

Canonical: ``t1 t1c t2 flair pd swi dwi adc ct pet``. Aliases cover BraTS 2021 (t1ce) and 2023 (t1n, t1c, t2w,
t2f), BIDS suffixes, channel names of nnU-Net's dataset.json and common scanner spellings.
"""

from __future__ import annotations

import re
from typing import Final

CANONICAL: Final = ("t1", "t1c", "t2", "flair", "pd", "swi", "dwi", "adc", "ct", "pet")

_ALIASES: Final = {
    "t1": "t1 t1w t1n t1pre t1native mprage t1mprage bravo spgr t1gre t1se mrit1 t1weighted 3dt1",
    "t1c": "t1c t1ce t1gd t1gado t1wce t1cegd t1wgd t1post t1contrast t1wcontrast t1km cet1 t1wpost t1gadolinium "
    "t1wgadolinium t1postcontrast t1wpostcontrast t1contrastenhanced t1weightedpostcontrast 3dt1gado",
    "t2": "t2 t2w t2tse t2fse mrit2 t2weighted",
    "flair": "flair t2f t2flair fl t2wflair darkfluid flairw 3dflair flairweighted",
    "pd": "pd pdw protondensity pdweighted dp",
    "swi": "swi swan",
    "dwi": "dwi diffusion dwib1000 b1000 tracew trace",
    "adc": "adc adcmap",
    "ct": "ct ctscan ctres",
    "pet": "pet fdg fdgpet pt suv",
}
_LOOKUP: Final = {alias: name for name, aliases in _ALIASES.items() for alias in aliases.split()}


def canonical_modality(name: str) -> str | None:
    """The canonical name of a modality spelt any common way ("T1w+ce", "t2f", "FLAIR"), or None if unknown."""
    # T2* is not T2, and T1+ is a T1 after contrast: signs that mean something are words before the rest is dropped.
    spelt = re.sub(r"\+$", "post", name.lower().strip()).replace("*", "star")
    return _LOOKUP.get(re.sub(r"[^a-z0-9]", "", spelt))
