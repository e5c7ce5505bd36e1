"""Which modality a series shows: what its tags say, why, and how sure that is.

Two witnesses. **Names** (SeriesDescription, ProtocolName, SequenceName, AcquisitionContrast) are what the operator or
the scanner called it; **timing** (TR, TE, TI and the kind of sequence) is what physics says. Where both agree the
confidence is 0.95; the scanner's own statement alone (ImageType, b-value, AcquisitionContrast) has 0.9, a name alone
0.8, timing alone 0.6, and a name that timing contradicts 0.4, which is too little to be used without being asked.

Reasons name attributes and times, never the text of a description, which may hold anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from medmae.imaging.dicom.facts import Facts

AGREED, STATED, NAMED, TIMED, DISPUTED = 0.95, 0.9, 0.8, 0.6, 0.4
ENOUGH: Final = 0.5  # less is left out until a user says what the series is

# ms. Windows of common protocols at 1.5 and 3 T; T2-FLAIR nulls fluid (T1 about 4 s) at TI 1500 to 3000 for its TRs.
FLAIR_TI = (1500.0, 3000.0)
LONG_TR, LONG_TE = 1800.0, 60.0
SHORT_TE = 30.0
T1_TR = 1200.0  # spin echo, short
T1_TI = (200.0, 1400.0)  # MPRAGE and T1-FLAIR
B_OF_DWI = 500.0  # s/mm2; a volume with less is the unweighted reference

_NAMES: Final = (  # the first that is found counts; matched on words of the description
    ("adc", r"adc|apparent diffusion|dadc"),
    ("swi", r"swi|swan|venobold|ven bold|susceptib\w*"),
    ("flair", r"t?2?[ ]?flair\w*|t2flair|dark ?fluid|tirm|fluid attenuat\w*"),
    ("t1c", r"t1(w|wi)? ?(ce|c|gd|gad|gado|km|post|plus c)|cet1\w*|gdt1\w*"),
    ("t1", r"[23]?d?t1\w*|mp2?rage|spgr|fspgr|bravo|vibe|tfe3d|thrive"),
    ("t2", r"[23]?d?t2\w*"),
    ("pd", r"pd\w*|dp|proton\w*|rho"),
    ("dwi", r"dwi|diff\w*|trace\w*|b ?1000|resolve|ep2d diff\w*"),
)
_OTHER: Final = (  # what is none of the canonical modalities, and would be mistaken for one
    ("an angiogram", r"tof|mra|mrv|angio\w*|pc3d|venogra\w*"),
    ("a projection", r"mips?|mnips?|minips?|projection"),
    ("a T2* image", r"t2 ?star|t2s|hemo\w*|haemo\w*|medic|fl2d t2\w*|gre t2\w*"),
    ("a perfusion image or map", r"perf\w*|pwi|r?cbv|r?cbf|mtt|ttp|tmax|asl|pcasl|dsc|dce"),
    ("a functional series", r"bold|fmri|resting state|rsfmri"),
    ("a map of diffusion", r"fa map|colfa|tensor|exp ?adc|eadc|md map"),
    ("a field map", r"field ?map\w*|b0 ?map|b1 ?map|gre field"),
    ("fat suppressed by inversion (STIR)", r"stir"),
    ("a phase image", r"phase|pha"),
    ("a quantitative map", r"t[12] ?map\w*|uni ?t1|r2s?map"),
)
_AFTER: Final = (
    r"post|gd|gad\w*|km|c ?\+|\+ ?c|ce|contrast|prohance|dotarem|gadovist|plus c|with c|mit km|post ?(con|gad|gd)\w*"
)
_BEFORE: Final = (
    r"pre(?! op)|nativ\w*|ohne|sans|without|plain|unenhanced|no ?contrast|non ?contrast|pre ?(con|gad|gd)\w*"
)
_TYPES: Final = {"ADC": "adc", "ADC_MAP": "adc", "SWI": "swi", "TRACEW": "dwi", "DIFFUSION": "dwi"}
_NO_IMAGE: Final = {
    "P": "a phase image",
    "PHASE": "a phase image",
    "PHASE MAP": "a phase image",
    "PHASE_MAP": "a phase image",
    "R": "a real part",
    "I": "an imaginary part",
    "FA": "a map of diffusion",
    "MNIP": "a projection",
    "MIP": "a projection",
    "MAX_IP": "a projection",
    "MIN_IP": "a projection",
    "MINIMUM": "a projection",
    "PROJECTION IMAGE": "a projection",
    "CBF": "a perfusion image or map",
    "CBV": "a perfusion image or map",
    "RCBV": "a perfusion image or map",
    "MTT": "a perfusion image or map",
    "TTP": "a perfusion image or map",
    "TMAX": "a perfusion image or map",
    "PERFUSION": "a perfusion image or map",
    "FIELD_MAP": "a field map",
    "T1 MAP": "a quantitative map",
    "T2 MAP": "a quantitative map",
    "T1_MAP": "a quantitative map",
    "T2_MAP": "a quantitative map",
}
# AcquisitionContrast (0008,9209), PS3.3 C.8.13.3.1.2
_ACQUIRED: Final = {"T1": "t1", "T2": "t2", "PROTON_DENSITY": "pd", "FLUID_ATTENUATED": "flair", "DIFFUSION": "dwi"}
_ACQUIRED_OTHER: Final = ("FLOW_ENCODED", "PERFUSION", "STIR", "TAGGING", "T2_STAR", "TOF")


@dataclass(frozen=True)
class Recognition:
    """``modality``: canonical, or None; ``confidence`` 0 to 1; ``reason``: a sentence without text of the header."""

    modality: str | None
    confidence: float
    reason: str


def recognise(facts: Facts) -> Recognition:
    """The modality that ``facts`` speak for. See the module's docstring for how they are weighed."""
    if facts.modality in ("CT", "PT"):
        name = {"CT": "ct", "PT": "pet"}[facts.modality]
        return Recognition(name, AGREED, f"Modality is {facts.modality}")
    if facts.modality != "MR":
        return Recognition(None, 0.0, "Modality is neither MR, CT nor PT")
    return no_modality(facts) or stated(facts) or weighed(facts)


def words_of(text: str) -> str:
    """Lower-case words between single blanks, ``*`` as "star" and ``+`` kept; case and punctuation do not matter."""
    text = text.lower().replace("*", " star ").replace("+c", " +c ").replace("c+", " c+ ").replace("+gd", " post ")
    return " " + re.sub(r"[^a-z0-9+]+", " ", text).strip() + " "


def says(text: str, pattern: str) -> bool:
    """Whether one of the words (or pairs of words) of ``text`` is all of ``pattern``."""
    return re.search(rf"(?<= )(?:{pattern})(?= )", text) is not None


def no_modality(facts: Facts) -> Recognition | None:
    """Images that are none of the canonical modalities, whatever their timing."""
    for part in facts.image_type[2:]:
        if part in _NO_IMAGE:
            return Recognition(None, 0.0, f"ImageType says {_NO_IMAGE[part]}")
    if facts.contrast in _ACQUIRED_OTHER:
        return Recognition(None, 0.0, f"AcquisitionContrast is {facts.contrast}")
    text = words_of(facts.text)
    for what, pattern in _OTHER:
        if says(text, pattern):
            return Recognition(None, 0.0, f"the description says {what}")
    return None


def stated(facts: Facts) -> Recognition | None:
    """What the scanner states: maps and weighting of diffusion, susceptibility."""
    for part, modality in _TYPES.items():  # the first is the most particular
        if part in facts.image_type[2:] and not (modality == "dwi" and facts.b_value is not None):
            return Recognition(modality, STATED, f"ImageType says {part}")
    named = name_of(facts)
    if named in ("adc", "swi"):
        return Recognition(named, NAMED, "the description names it")
    if "swi" in facts.sequence:
        return Recognition("swi", STATED, "SequenceName says susceptibility weighting")
    if facts.b_value is None:
        return Recognition("dwi", NAMED, "the description names it") if named == "dwi" else None
    if facts.b_value >= B_OF_DWI:
        return Recognition("dwi", STATED, f"b-value {facts.b_value:g} s/mm2")
    if facts.b_value > 0 or named == "dwi" or "EP" in facts.words:
        reason = f"b-value {facts.b_value:g} s/mm2: the reference of a diffusion series"
        return Recognition(None, 0.0, reason)
    return None


def name_of(facts: Facts) -> str | None:
    """The modality that the description names; else the protocol, which may be the whole exam's; else the sequence."""
    for text in map(words_of, (facts.text, facts.protocol, facts.sequence)):
        for modality, pattern in _NAMES:
            if says(text, pattern):
                return modality
    return None


def weighed(facts: Facts) -> Recognition:
    """T1, T2, PD and FLAIR by name and timing; then T1 before or after contrast agent."""
    named, (timed, times) = name_of(facts), timing(facts)
    acquired = _ACQUIRED.get(facts.contrast)
    if acquired is not None and (named is None or alike(named, acquired)):
        found = Recognition(acquired, AGREED if timed == acquired else STATED, f"AcquisitionContrast; {times}")
    elif named is None and (timed is None or not facts.words):  # times of what kind of sequence?
        return Recognition(None, 0.0, f"neither the description nor the timing tells ({times})")
    elif named is None:
        found = Recognition(timed, TIMED, f"timing: {times}")
    elif named == "flair" and timed == "t1":  # "T1 FLAIR": inversion for contrast of tissue, not against fluid
        found = Recognition("t1", NAMED, f"a FLAIR by name, T1-weighted by timing: {times}")
    elif timed is None:
        found = Recognition(named, NAMED, f"the description names it ({times})")
    elif alike(named, timed):
        found = Recognition(named, AGREED, f"the description names it and timing agrees: {times}")
    elif named == "flair" and timed == "t2" and facts.ti is None:
        found = Recognition("flair", NAMED, f"the description names it; TI is not stated ({times})")
    elif named == "pd" and timed == "t2" or named == "t2" and timed == "pd":  # the two echoes of one series
        found = Recognition(timed, TIMED, f"timing decides between PD and T2: {times}")
    else:
        found = Recognition(named, DISPUTED, f"named {named}, but timing says {timed}: {times}")
    return with_agent(found, facts)


def alike(named: str, other: str) -> bool:
    return named.removesuffix("c") == other


def timing(facts: Facts) -> tuple[str | None, str]:
    """(t1, t2, pd, flair or None, the times in words) from TR, TE, TI and the kind of sequence."""
    tr, te, ti = facts.tr, facts.te, facts.ti
    pairs = (("TR", tr), ("TE", te), ("TI", ti))
    told = ", ".join(f"{name} {value:g} ms" for name, value in pairs if value is not None) or "no times stated"
    if tr is None or te is None:
        return None, told
    if ti is not None and FLAIR_TI[0] <= ti <= FLAIR_TI[1] and tr >= 2 * ti and te > SHORT_TE:
        return "flair", told
    inverted = ti is not None and T1_TI[0] <= ti <= T1_TI[1] and te < SHORT_TE
    if inverted and ("MP" in facts.words or "GR" in facts.words or "GRADIENT" in facts.words or tr < 3500):
        return "t1", told
    if "EP" in facts.words or (ti is not None and ti > 0):
        return None, told  # echo-planar, and inversions for other ends: timing alone does not tell
    if "GR" in facts.words or "GRADIENT" in facts.words:
        return ("t1" if te < 8 and tr < 100 else None), told  # a spoiled gradient echo with a short TE
    return spin_echo(tr, te), told


def spin_echo(tr: float, te: float) -> str | None:
    if tr <= T1_TR and te <= SHORT_TE:
        return "t1"
    if tr >= LONG_TR and te >= LONG_TE:
        return "t2"
    return "pd" if tr >= LONG_TR and te <= 50 else None


def with_agent(found: Recognition, facts: Facts) -> Recognition:
    """A T1 after contrast agent is t1c. The tag and the description are asked; where they disagree it is not sure."""
    if found.modality not in ("t1", "t1c"):
        return found
    text = words_of(facts.text)
    before = says(text, _BEFORE)
    after = found.modality == "t1c" or (says(text, _AFTER) and not before)
    if facts.agent and before:
        why = "ContrastBolusAgent is stated, but the description says before contrast agent"
        return Recognition("t1", min(found.confidence, DISPUTED), f"{found.reason}; {why}")
    if facts.agent:
        return Recognition("t1c", found.confidence, f"{found.reason}; ContrastBolusAgent is stated")
    if after:
        why = "the description says after contrast agent, ContrastBolusAgent is not stated"
        return Recognition("t1c", min(found.confidence, 0.7), f"{found.reason}; {why}")
    return Recognition("t1", found.confidence, found.reason)
