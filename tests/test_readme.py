"""The README shows the recorded run, and nothing it names is missing."""

import re

import pytest
import record_results as readme

from helpers import profiles
from helpers.colab import preflight
from helpers.colab.preflight import RATES
from helpers.weights import catalog as weight_plan

README = readme.README.read_text(encoding="utf-8")


def test_results_table_is_the_recorded_run_and_a_changed_number_is_noticed(monkeypatch, tmp_path) -> None:
    assert readme.main(["--check"]) == 0
    before, mark, table = README.partition(readme._BEGIN)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    readme.README.write_text(before + mark + re.sub(r"0\.\d", "0.x", table, count=1), encoding="utf-8")
    assert readme.main(["--check"]) == 1
    with pytest.raises(ValueError, match="needs the two lines"):
        readme.with_table("no table here", "| a |")


def test_links_and_anchors_resolve() -> None:
    headings = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)]
    anchors = {heading.replace(" ", "-") for heading in headings}
    for target in set(re.findall(r"\]\((?!https?://)([^)]+)\)", README)):
        found = target[1:] in anchors if target.startswith("#") else (profiles.REPOSITORY / target).exists()
        assert found, target


THEIRS = {
    "Transport endpoint is not connected", "mount failed: timeout during initial read of root folder",
    "Requesting secret HF_TOKEN timed out", "Notebook does not have access to secret", "401", "GatedRepoError",
    "Cannot retrieve the public link of the file", "Your session crashed after using all available RAM",
    "CUDA out of memory", "No space left on device", "the 'state' key is missing from 'metadata.widgets'",
    "ImportError: libGL.so.1",
}  # fmt: skip
"""Messages of Colab, Drive, the hub and the system; all others in the troubleshooting table are our own."""


def test_troubleshooting_knows_what_users_meet_and_quotes_our_messages_as_they_are() -> None:
    section = README.partition("## Troubleshooting")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    troubles = {text for row in rows for text in re.findall(r"`([^`]+)`", row)}
    assert len(troubles) >= 15 and troubles >= THEIRS
    files = [*sorted((profiles.REPOSITORY / "helpers").rglob("*.py")), profiles.REPOSITORY / "colab_setup.sh"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\n\s*f?"', "", source)  # a message goes on in the next line
    for text in troubles - THEIRS:
        assert all(part.strip() in source for part in re.split(r"\.\.\.|'", text)), text


def test_licences_are_those_of_the_plan() -> None:
    plan = weight_plan.route(profiles.REPOSITORY / "workspace" / "none", profiles.WeightsSettings())
    section = README.partition("## Weights of the full profile")[2].partition("\n### ")[0]
    rows = {row.split(" | ")[0].strip("| "): row for row in section.splitlines() if row.startswith("| ")}
    names = {"vicuna": "LLaMA", "imagebind": "ImageBind", "pandagpt": "PandaGPT", "anomalygpt": "AnomalyGPT"}
    for file in plan.files:
        start = names.get(file.component.split("/")[0], "AnomalyCLIP")
        if file.licence.startswith("Apache"):
            start = "Vicuna"
        (row,) = [row for name, row in rows.items() if name.startswith(start)]
        assert file.licence.split(" + ")[0].split(", ")[0] in row, f"{file.licence} is not in: {row}"


@pytest.mark.parametrize("stem", sorted(path.stem for path in (profiles.REPOSITORY / "notebooks").glob("*.ipynb")))
def test_minutes_and_units_are_those_of_the_cost_table(stem: str) -> None:
    stage = preflight.STAGES[stem]
    (row,) = [line for line in README.splitlines() if f"](notebooks/{stem}.ipynb) |" in line]
    seconds, minutes, units = row.split(" | ")[-3:]
    assert seconds == f"{stage.mini_seconds} s" and minutes == f"{stage.l4_minutes} min"
    assert units.rstrip(" |") == f"{RATES['L4'] * stage.l4_minutes / 60:.1f}"


def test_every_setting_of_the_environment_and_every_room_is_explained() -> None:
    helpers = profiles.REPOSITORY / "helpers"
    text = "\n".join(path.read_text(encoding="utf-8") for path in helpers.rglob("*.py"))
    asked = set(re.findall(r'environ\.get\("(ART_[A-Z_]+)"', text))
    assert asked and all(f"| `{name}` |" in README for name in asked)
    rooms = [path for path in helpers.iterdir() if (path / "__init__.py").exists()]
    assert len(rooms) > 5 and all(f"`{room.name}/`" in README for room in rooms)
