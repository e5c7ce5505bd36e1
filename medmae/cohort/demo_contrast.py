"""The demo cohort's contrasts: what a scanner would show of tissues with given proton density, T1 and T2.

Signals come from the textbook equations of each sequence (Bernstein, King & Zhou, Handbook of MRI Pulse Sequences,
2004): T1 and T1c a spoiled gradient echo (sec. 14.1), T2 a spin echo, FLAIR an inversion-recovery spin echo
(sec. 14.2). So the four images of a study are tied together by its tissues, and not by any map of one grey value to
another: lesion and fluid are both bright on T2, and only T1 or the surroundings tell which FLAIR suppresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from medmae.cohort.demo_anatomy import Template, noise_field
from medmae.cohort.demo_lesions import LesionShares

MODALITIES: Final = ("t1", "t1c", "t2", "flair")
RELAXIVITY: Final = 4.5e-3  # of gadolinium agents near 1.5 T: 1/(ms mM)
TRANSVERSE_RELAXIVITY: Final = 5.0e-3


@dataclass(frozen=True)
class Tissue:
    """Proton density (water 1), T1 and T2 in ms, and the contrast agent it takes up in mM."""

    density: float
    t1: float
    t2: float
    uptake: float = 0.0


# Typical values between 1.5 and 3 T (Stanisz et al., MRM 2005; Bojorquez et al., MRI 2017, for the ranges). Blood has
# the short T2 that stands for its flow void; cortical veins and dura are "vessel".
TISSUES: Final = {
    "wm": Tissue(0.70, 830, 76),
    "gm": Tissue(0.81, 1330, 98),
    "csf": Tissue(1.00, 4100, 1400),
    "vessel": Tissue(0.80, 1500, 45, uptake=0.9),
    "choroid": Tissue(0.85, 1500, 160, uptake=0.4),
    "rim": Tissue(0.76, 1050, 100),  # the periventricular white matter, a little wetter
    "spot": Tissue(0.85, 1250, 150),
    "core": Tissue(0.95, 2700, 330),
    "oedema": Tissue(0.85, 1350, 140),
    "enhancing": Tissue(0.86, 1450, 125, uptake=0.45),
}


@dataclass(frozen=True)
class Protocol:
    """One study's sequence settings: times in ms, the flip angle in degrees."""

    t1_tr: float
    t1_flip: float
    t1c_tr: float
    t1c_flip: float
    t2_tr: float
    t2_te: float
    flair_tr: float
    flair_ti: float
    flair_te: float


def draw_protocol(rng: np.random.Generator) -> Protocol:
    """Settings as they differ between scanners; FLAIR's TI follows its TR so that fluid stays dark."""
    flair_tr = rng.uniform(8000, 10000)
    # The TI that nulls fluid: T1 ln 2 - T1 ln(1 + exp(-TR/T1)).
    null = TISSUES["csf"].t1 * (np.log(2) - np.log1p(np.exp(-flair_tr / TISSUES["csf"].t1)))
    return Protocol(
        t1_tr=rng.uniform(8, 10),
        t1_flip=rng.uniform(17, 21),
        t1c_tr=rng.uniform(7, 10),
        t1c_flip=rng.uniform(16, 22),
        t2_tr=rng.uniform(4000, 6000),
        t2_te=rng.uniform(85, 105),
        flair_tr=flair_tr,
        flair_ti=null * rng.uniform(0.94, 0.98),
        flair_te=rng.uniform(105, 130),
    )


def signal(modality: str, protocol: Protocol, tissue: Tissue, r1: np.ndarray, r2: np.ndarray) -> np.ndarray:
    """The magnitude a sequence measures of ``tissue`` where its relaxation rates 1/T1, 1/T2 are multiplied by ``r1``,
    ``r2`` (N,). Contrast agent acts on T1c alone. The equations are in the references of the module's docstring."""
    rate1, rate2 = r1 / tissue.t1, r2 / tissue.t2
    if modality in ("t1", "t1c"):
        if modality == "t1c":
            rate1 = rate1 + RELAXIVITY * tissue.uptake
            rate2 = rate2 + TRANSVERSE_RELAXIVITY * tissue.uptake
            tr, flip = protocol.t1c_tr, np.radians(protocol.t1c_flip)
        else:
            tr, flip = protocol.t1_tr, np.radians(protocol.t1_flip)
        left = np.exp(-tr * rate1)
        echo = np.exp(-3.0 * rate2)  # TE 3 ms
        return np.asarray(tissue.density * np.sin(flip) * (1 - left) / (1 - np.cos(flip) * left) * echo)
    if modality == "t2":
        recovered = 1 - np.exp(-protocol.t2_tr * rate1)
        return np.asarray(tissue.density * recovered * np.exp(-protocol.t2_te * rate2))
    inverted = 1 - 2 * np.exp(-protocol.flair_ti * rate1) + np.exp(-protocol.flair_tr * rate1)
    return np.asarray(tissue.density * np.abs(inverted) * np.exp(-protocol.flair_te * rate2))


@dataclass(frozen=True)
class Anatomy:
    """Shares of the points (N,) that are ``wm``, ``gm``, ``csf`` and the rest of ``TISSUES``: they sum to 1. ``r1`` and
    ``r2`` multiply the relaxation rates 1/T1, 1/T2 of solid tissue: the study's texture."""

    shares: dict[str, np.ndarray]
    r1: np.ndarray
    r2: np.ndarray
    lesions: LesionShares


def healthy_shares(rng: np.random.Generator, template: Template, points: np.ndarray) -> dict[str, np.ndarray]:
    """wm, gm, csf (summing to 1), ventricles and rim at template ``points`` (N, 3), with this study's own boundaries.

    The template is an average over people, so its cortex is blurred: log shares are sharpened, shifted by smooth noise
    (gyri and sulci that only this study has) and by the study's share of fluid (atrophy).
    """
    fluid = rng.uniform(-0.2, 0.9)
    logs = []
    for name, offset in (("wm", 0.0), ("gm", 0.0), ("csf", fluid)):
        share = np.log(np.clip(getattr(template, name).at(points), 1e-4, 1))
        own = 0.35 * noise_field(rng, template, 3, step=2.5).at(points)
        logs.append(1.6 * (share + offset) + own)
    wm, gm, csf = np.exp(logs - np.max(logs, axis=0))
    total = wm + gm + csf
    ventricles = np.minimum(template.ventricles.at(points), csf / total)
    return {
        "wm": wm / total,
        "gm": gm / total,
        "csf": csf / total,
        "ventricles": ventricles,
        "rim": template.rim.at(points),
    }


def vessels(
    rng: np.random.Generator, template: Template, points: np.ndarray, sulci: np.ndarray, spacing: float
) -> np.ndarray:
    """The share (N,) of vessels and dura in the fluid outside the ventricles (``sulci``, its share).

    Arteries and veins are the curves along which two smooth noise fields both vanish; falx and superior sagittal sinus
    lie in the midline; what is left of the dura covers the brain in patches.
    """
    width = 0.10 + 0.05 * spacing
    one, other = (noise_field(rng, template, 7, step=3.0).at(points) / width for _ in range(2))
    curves = np.exp(-(one**2) - other**2)
    x, y, z = points.T
    midline = np.exp(-((x / 1.8) ** 2)) * np.clip((z + 5) / 30, 0, 1)
    sinus = np.exp(-((x / 5) ** 2)) * np.clip(-(y + 40) / 30, 0, 1) * np.clip(z / 20, 0, 1)
    depth = np.clip((template.brain.at(points) - 0.5) / 0.5, 0, 1)  # 0 on the surface
    patches = np.clip(noise_field(rng, template, 9).at(points), 0, 1)
    dura = (1 - depth) * patches * 0.5
    return np.asarray(np.clip(np.maximum.reduce([curves, 0.35 * midline, 0.6 * sinus, dura]), 0, 0.9) * sulci)


def choroid(points: np.ndarray, ventricles: np.ndarray) -> np.ndarray:
    """The share (N,) of choroid plexus: in the atria of the lateral ventricles."""
    x, y, z = points.T
    distance = ((np.abs(x) - 20) / 6) ** 2 + ((y + 38) / 8) ** 2 + ((z - 12) / 8) ** 2
    return np.asarray(0.8 * np.exp(-distance) * ventricles)


def draw_anatomy(
    rng: np.random.Generator,
    template: Template,
    points: np.ndarray,
    lesions: LesionShares,
    healthy: dict[str, np.ndarray],
    spacing: float,
) -> Anatomy:
    """What is at each of template ``points`` (N, 3 mm), and how its relaxation varies within tissues."""
    rim_strength = rng.uniform(0.2, 0.9)
    blood = vessels(rng, template, points, healthy["csf"] - healthy["ventricles"], spacing)
    plexus = choroid(points, healthy["ventricles"])
    rim = healthy["wm"] * healthy["rim"] * rim_strength
    shares = {
        "wm": healthy["wm"] - rim,
        "gm": healthy["gm"],
        "csf": healthy["csf"] - blood - plexus,
        "vessel": blood,
        "choroid": plexus,
        "rim": rim,
    }
    ill = lesions.core + lesions.oedema + lesions.rim + lesions.spot
    shares = {name: share * (1 - ill) for name, share in shares.items()}
    shares |= {"spot": lesions.spot, "core": lesions.core, "oedema": lesions.oedema, "enhancing": lesions.rim}

    # Detail is signal on T1: brighter means faster T1 relaxation. Iron and myelin shorten T2 along with it.
    detail = template.detail.at(points) * rng.uniform(0.7, 1.3)
    texture1 = noise_field(rng, template, 4, step=3.0).at(points) + 0.7 * noise_field(rng, template, 15).at(points)
    texture2 = noise_field(rng, template, 4, step=3.0).at(points) + 0.7 * noise_field(rng, template, 15).at(points)
    r1 = np.exp(0.9 * detail + 0.020 * texture1)
    r2 = np.exp(0.5 * detail + 0.020 * texture2 + 0.010 * texture1)
    return Anatomy(shares, r1.astype(np.float32), r2.astype(np.float32), lesions)


def draw_tissues(rng: np.random.Generator) -> dict[str, Tissue]:
    """This study's tissues: density, T1 and T2 some percent off the typical ones, uptake by up to a half (the dose)."""
    dose = rng.uniform(0.7, 1.3)
    return {
        name: Tissue(
            float(tissue.density * np.exp(rng.normal(0, 0.01))),
            float(tissue.t1 * np.exp(rng.normal(0, 0.03))),
            float(tissue.t2 * np.exp(rng.normal(0, 0.03))),
            float(tissue.uptake * dose * rng.uniform(0.8, 1.2)),
        )
        for name, tissue in TISSUES.items()
    }


def contrast(modality: str, anatomy: Anatomy, tissues: dict[str, Tissue], protocol: Protocol) -> np.ndarray:
    """The image of one modality at the anatomy's points, (N,) float32, before scanner gain, bias field and noise."""
    image = np.zeros(anatomy.r1.shape, np.float32)
    for name, share in anatomy.shares.items():
        here = np.flatnonzero(share > 1e-3)
        fluid = name in ("csf", "vessel")
        r1, r2 = (np.ones(1, np.float32),) * 2 if fluid else (anatomy.r1[here], anatomy.r2[here])
        tissue = tissues[name]
        if name == "spot":
            black, uptake = anatomy.lesions.blackness[here], anatomy.lesions.uptake[here]
            r1 = r1 / (1 + 0.5 * black)
            r2 = r2 / (1 + 0.25 * black)
            if modality == "t1c":
                r1 = r1 + RELAXIVITY * tissue.t1 * uptake
        image[here] += share[here] * signal(modality, protocol, tissue, r1, r2)
    return image
