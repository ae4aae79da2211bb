"""Genuine picture -> photographed again, or damaged, with a mask that is true to the pixel."""

from helpers.synthesis.marks import (
    LOCAL_KINDS,
    VISIBILITY_BINS,
    place_of,
    rng_for,
    seed_for,
    synthesize,
    visibility,
    visibility_bin,
)
from helpers.synthesis.photographs import (
    ANOMALOUS_VARIATIONS,
    NORMAL_VARIATIONS,
    VARIATIONS,
    damaged_view,
    rephotograph,
    variations_table,
    vary,
)

__all__ = [
    "ANOMALOUS_VARIATIONS",
    "LOCAL_KINDS",
    "NORMAL_VARIATIONS",
    "VARIATIONS",
    "VISIBILITY_BINS",
    "damaged_view",
    "place_of",
    "rephotograph",
    "rng_for",
    "seed_for",
    "synthesize",
    "variations_table",
    "vary",
    "visibility",
    "visibility_bin",
]
