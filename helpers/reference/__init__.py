"""Reference: a picture laid on genuine pictures of the artwork, and DINOv2's patches; notebook 05."""

from helpers.reference.detectors import load as load
