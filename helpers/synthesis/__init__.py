"""Genuine picture -> photographed again, or damaged, with a mask that is true to the pixel."""

from helpers.synthesis.kinds import LOCAL_KINDS, REPORT_KINDS
from helpers.synthesis.marks import HELD_OUT_KINDS, VISIBILITY_BINS, rng_for, seed_for, synthesize, visibility_bin
from helpers.synthesis.photographs import (
    ANOMALOUS_VARIATIONS,
    NORMAL_VARIATIONS,
    REPORT_VARIATIONS,
    RETAKES,
    VARIATIONS,
    damaged_view,
    rephotograph,
    vary,
)

__all__ = ["HELD_OUT_KINDS", "LOCAL_KINDS", "REPORT_KINDS", "VISIBILITY_BINS", "rng_for", "seed_for", "synthesize"]
__all__ += ["ANOMALOUS_VARIATIONS", "NORMAL_VARIATIONS", "REPORT_VARIATIONS", "RETAKES", "VARIATIONS", "damaged_view"]
__all__ += ["rephotograph", "vary", "visibility_bin"]
