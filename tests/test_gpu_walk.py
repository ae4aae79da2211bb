"""The walk of the full profile, in its tiny size: every step ends, and the table has a row for each."""

from __future__ import annotations

from pathlib import Path

import gpu_walk


def test_the_walk_ends(tmp_path: Path) -> None:
    options = "--size tiny --device cpu --pictures 2 --folder".split()
    steps = list(gpu_walk.main([*options, str(tmp_path)])[0])
    assert steps[:2] == ["write the small checkpoints", "write LLaMA and the delta"] and len(steps) == 12
