"""Cached arrays: computed once, whatever is killed or damaged in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.caching import cached_arrays


class Computer:
    """Computes rows that tell which picture they belong to, and counts them."""

    def __init__(self, ids: list[str], die_after: int = 10**6) -> None:
        self.ids, self.computed, self.die_after = ids, [], die_after

    def __call__(self, indices: list[int]) -> dict[str, np.ndarray]:
        if len(self.computed) >= self.die_after:
            raise KeyboardInterrupt
        self.computed += [self.ids[index] for index in indices]
        numbers = np.array([float(self.ids[index][1:]) for index in indices])
        return {"embedding": np.stack([numbers, -numbers], 1).astype(np.float32), "patches": numbers.astype(np.float16)}


def names(*numbers: int) -> list[str]:
    return [f"p{number}" for number in numbers]


def get(folder: Path, ids: list[str], computer: Computer | None = None, settings: dict | None = None):
    computer = computer or Computer(ids)
    found = cached_arrays(folder, settings or {"model": "a"}, ids, computer, batch_size=3)
    np.testing.assert_array_equal(found["embedding"][:, 0], [float(name[1:]) for name in ids])
    np.testing.assert_array_equal(found["patches"], [float(name[1:]) for name in ids])
    assert found["embedding"].dtype == np.float32 and found["patches"].dtype == np.float16
    return found, computer.computed


def test_rows_are_computed_once_and_mapped_in_any_order(tmp_path: Path) -> None:
    found, computed = get(tmp_path, names(*range(10)))
    assert computed == names(*range(10)) and isinstance(found["embedding"], np.memmap)
    assert get(tmp_path, names(*range(10)))[1] == []
    assert get(tmp_path, names(7, 2, 11, 2, 12))[1] == names(11, 12)
    assert get(tmp_path, names(*range(3)), settings={"model": "b"})[1] == names(0, 1, 2)
    with pytest.raises(ValueError, match="read-only"):
        found["embedding"][0] = 1


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    ids = names(*range(9))
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, ids, Computer(ids, die_after=6))
    with open(next(tmp_path.glob("*/embedding.bin")), "ab") as file:
        file.write(b"half a batch without its line")
    assert get(tmp_path, ids)[1] == names(6, 7, 8)


@pytest.mark.parametrize("damage", ["flip", "cut", "torn line", "gone"])
def test_what_is_damaged_is_computed_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    ids = names(*range(9))
    get(tmp_path, ids)
    path = next(tmp_path.glob("*/rows.jsonl" if damage == "torn line" else "*/embedding.bin"))
    content = bytearray(path.read_bytes())
    content[4 * 8] ^= 1 if damage == "flip" else 0  # in the second batch
    content = content if damage == "flip" else content[:-5]
    path.unlink() if damage == "gone" else path.write_bytes(content)
    again = {"flip": ids[3:], "cut": ids[6:], "torn line": ids[6:], "gone": ids}[damage]
    assert get(tmp_path, ids)[1] == again
    assert "damaged or unfinished" in capsys.readouterr().out
    assert get(tmp_path, ids)[1] == []


def test_wrong_numbers_of_rows_and_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 rows were to be computed"):
        cached_arrays(tmp_path, {}, ["a", "b"], lambda indices: {"x": np.zeros((1, 3))})
    cached_arrays(tmp_path, {}, ["a"], lambda indices: {"x": np.zeros((1, 3))})
    with pytest.raises(ValueError, match="Change the settings"):
        cached_arrays(tmp_path, {}, ["b"], lambda indices: {"x": np.zeros((1, 4))})
