"""The source report's published figures of 2024, kept apart from everything measured here.

They were measured on other pictures, on differing numbers of them, with thresholds moved on the test pictures. They
never enter ``comparison.csv``. Source: "Sandia Laboratories Project-AnomalyGPT", team SAM, Georgia Institute of
Technology, 2024; the fractions are the only ones of plausible size that round to the printed values.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row of the source report's comparison.

    Attributes:
        model, algorithm: as printed.
        accuracy: per cent, as printed.
        correct, n_images: the count that gives the printed accuracy; None when no count does.
        remark: what the number rests on.
    """

    model: str
    algorithm: str
    accuracy: float
    correct: int | None
    n_images: int | None
    remark: str


REPORT_2024: tuple[Published, ...] = (
    Published(
        "CLIP",
        "ResNet-50 similarity",
        100.0,
        50,
        50,
        "No count is printed; 50 is the declared test set. “Normal” only from similarity 1: an identity test.",
    ),
    Published(
        "CLIP",
        "cross-entropy head",
        83.67,
        41,
        49,
        "25 anomalies found, 8 missed, 16 normals right: 49 pictures, not the declared 50.",
    ),
    Published(
        "CLIP",
        "Isolation Forest",
        91.11,
        41,
        45,
        "4 anomalies missed. On 50 pictures that would be 92.0 %. Contamination and percentile moved on the test set.",
    ),
    Published(
        "CLIP",
        "Local Outlier Factor",
        97.62,
        41,
        42,
        "1 anomaly missed. On 50 pictures that would be 98.0 %. Contamination 0.45 chosen on the test set.",
    ),
    Published(
        "AnomalyCLIP",
        "both paintings",
        71.11,
        64,
        90,
        "34/45 (75.6 %, Mona Lisa) and 30/45 (66.7 %, Pearl Earring): 45 pictures each. AUROC 70.5 and 76.4.",
    ),
    Published(
        "AnomalyGPT",
        "both paintings",
        59.7,
        None,
        None,
        "Mean of 61.2 (Mona Lisa) and 58.2 (Pearl Earring); 58.2 is no k/50, k/49 or k/45. Pixel AUROC 62.3 and 59.7.",
    ),
)
"""In the order of the report's table."""

ALWAYS_2024 = Published(
    "(trivial rule)",
    "always “anomaly”",
    68.0,
    34,
    50,
    "Not in the report: what calling all 34 + 16 declared test pictures anomalous would have scored.",
)
"""The row that the report's table lacks."""

SUMMARY = (
    "These are the accuracies that the source report printed. Their denominators differ from row to row (49, 45, 42, "
    "90 pictures), although the text declares 50; the thresholds were moved on the test pictures themselves; and "
    "calling everything anomalous would have scored 68.0 %. They cannot be ranked among themselves, and not against "
    "the table above, which was measured on other pictures."
)
