"""Modalities by what scanners of several makers write into their headers."""

from __future__ import annotations

from typing import Any

import pytest

from medmae.imaging.dicom.contrast import ENOUGH, recognise
from medmae.imaging.dicom.facts import Facts

SE, GR, IR = ("SE",), ("GR", "SP", "MP"), ("SE", "IR")


def facts(text: str = "", **more: Any) -> Facts:
    return Facts(**{"modality": "MR", "text": text.lower(), **more})


@pytest.mark.parametrize(
    ("expected", "seen"),
    [
        ("t1", facts("t1_mprage_sag_p2_iso", tr=2300, te=2.98, ti=900, words=GR)),
        ("t1", facts("Ax T1 SE", tr=500, te=12, words=SE)),
        ("t1", facts("FSPGR 3D BRAVO", tr=8.2, te=3.2, ti=450, words=("GR",))),
        ("t1", facts("SAG T1 FLAIR", tr=2300, te=20, ti=860, words=IR)),
        ("t1c", facts("t1_mprage_sag post KM", tr=2300, te=2.98, ti=900, words=GR, agent=True)),
        ("t1c", facts("AX T1 +C", tr=500, te=12, words=SE)),
        ("t1", facts("AX T1", protocol="mri brain with and without contrast", tr=500, te=12, words=SE)),
        ("t1c", facts("AX T1", protocol="brain without and with contrast", tr=500, te=12, words=SE, agent=True)),
        ("t2", facts("AX FSE", protocol="t2 tra", tr=4000, te=100, words=SE)),
        ("t1c", facts("T1 tra", tr=500, te=12, words=SE, agent=True)),
        ("t1c", facts("", tr=500, te=12, words=SE, agent=True)),
        ("t2", facts("AX T2 FSE", tr=4800, te=100, words=SE)),
        ("t2", facts("t2_space_sag", tr=3200, te=410, words=SE)),
        ("flair", facts("t2_tirm_tra_dark-fluid", tr=9000, te=81, ti=2500, words=IR)),
        ("flair", facts("AX FLAIR", tr=9000, te=120, ti=2250, words=IR)),
        ("flair", facts("", tr=9000, te=120, ti=2250, words=IR)),
        ("flair", facts("3D Brain VIEW FLAIR SHC", tr=4800, te=340, ti=1650, words=IR)),
        ("flair", facts("flair_longTR", tr=11000, te=140, words=SE)),
        ("pd", facts("PD TSE", tr=3000, te=15, words=SE)),
        ("t2", facts("PD/T2 dual echo", tr=3000, te=95, words=SE)),
        ("swi", facts("SWI_Images", image_type=("ORIGINAL", "PRIMARY", "M", "SWI"), tr=28, te=20)),
        ("swi", facts("SWAN", tr=40, te=25, words=("GR",))),
        ("dwi", facts("ep2d_diff_3scan_trace_p2", b_value=1000.0, words=("EP",), tr=6000, te=90)),
        ("dwi", facts("resolve", image_type=("DERIVED", "PRIMARY", "DIFFUSION", "TRACEW"))),
        ("adc", facts("ep2d_diff_ADC", image_type=("DERIVED", "PRIMARY", "DIFFUSION", "ADC"))),
        ("t1", facts("", contrast="T1")),
        ("flair", facts("", contrast="FLUID_ATTENUATED", tr=9000, te=120, ti=2500)),
        ("ct", Facts(modality="CT", text="head t1")),
        ("pet", Facts(modality="PT")),
    ],
)
def test_the_modality_is_recognised(expected: str, seen: Facts) -> None:
    found = recognise(seen)
    assert found.modality == expected
    assert found.confidence >= ENOUGH
    assert not seen.text or seen.text not in found.reason


@pytest.mark.parametrize(
    "seen",
    [
        facts("ep2d_diff", b_value=0.0, words=("EP",)),
        facts("SWI", image_type=("ORIGINAL", "PRIMARY", "P", "SWI")),
        facts("mIP_Images(SW)", image_type=("ORIGINAL", "PRIMARY", "M", "MNIP")),
        facts("TOF_3D_multi-slab", tr=21, te=3.4, words=("GR",)),
        facts("t2*_gre hemo", tr=620, te=20, words=("GR",)),
        facts("ep2d_perf", tr=1500, te=30, words=("EP",)),
        facts("t2_stir_cor", tr=4000, te=60, ti=160, words=IR),
        facts("bold resting", tr=2000, te=30, words=("EP",)),
        facts("whatever"),
        facts("", tr=2000, te=30),
        facts("", contrast="T2_STAR"),
        Facts(modality="US", text="t1"),
    ],
)
def test_what_is_no_canonical_modality_stays_unknown(seen: Facts) -> None:
    assert recognise(seen).modality is None


def test_conflicts_lower_the_confidence_below_what_is_used() -> None:
    named = recognise(facts("AX T2", tr=500, te=12, words=SE))
    assert named.modality == "t2" and named.confidence < ENOUGH and "TE 12 ms" in named.reason
    agent = recognise(facts("t1 nativ", tr=500, te=12, words=SE, agent=True))
    assert agent.modality == "t1" and agent.confidence < ENOUGH


def test_agreement_is_surer_than_a_name_and_a_name_than_timing() -> None:
    both = recognise(facts("AX T2", tr=4800, te=100, words=SE)).confidence
    name = recognise(facts("AX T2")).confidence
    time = recognise(facts("", tr=4800, te=100, words=SE)).confidence
    assert both > name > time >= ENOUGH
