"""The walk of the full profile, in its tiny size: every step ends, and the table has a row for each."""

from __future__ import annotations

import gpu_walk


def test_the_walk_ends(tmp_path) -> None:
    arguments = [
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--folder",
        str(tmp_path),
        "--pictures",
        "4",
        "--training-steps",
        "2",
    ]
    steps = list(gpu_walk.main(arguments)[0])
    assert steps[:2] == ["write the small checkpoints", "write LLaMA and the delta"] and len(steps) == 12
