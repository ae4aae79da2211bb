"""Keeps the README's results table equal to the last recorded ``mini`` run (a maintainer's tool).

python -m tests.record_results --record   # take the rows of workspace/mini/report/comparison.csv, rewrite its table
python -m tests.record_results --check    # exit 1 when the README shows anything else
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from helpers import files, profiles
from helpers.judge import comparison, findings
from helpers.results import METHODS, category_label, method_label

README = profiles.REPOSITORY / "README.md"
RECORDED = profiles.REPOSITORY / "tests" / "golden" / "mini_comparison.csv"
_BEGIN, _END = "<!-- results: begin (python -m tests.record_results --record) -->", "<!-- results: end -->"


def with_table(text: str, table: str) -> str:
    """The README with another table between its two marks; ``ValueError`` when they are missing or not in order."""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"README.md needs the two lines {_BEGIN!r} and {_END!r} around the results table.")
    return f"{before}{begin}\n\n{table.strip()}\n\n{end}{after}"


def as_markdown(path: Path) -> str:
    """The results table of the README: one row per method, AUROC per painting, pooled rates."""
    table = comparison.read(path)
    look, ids = comparison.numbers(table), list(dict.fromkeys(table.method))
    shown = findings.summary(table).drop(columns=["image AUROC", "accuracy"])
    for place, name in enumerate(sorted(set(table.category) - {"all"})):
        aurocs = [findings.estimate(look.get((method, name, "all", "image_auroc"))) for method in ids]
        shown.insert(place, f"image AUROC, {category_label(name)}", aurocs)
    lines = [["method", *shown.columns], ["---"] * (1 + len(shown.columns))]
    lines += [[str(name), *cells] for name, cells in zip(shown.index, shown.to_numpy())]
    absent = [method for method in METHODS if method not in ids]
    lines += [[f"{method_label(m)} (run `{comparison.NOTEBOOKS[m]}`)", *["–"] * len(shown.columns)] for m in absent]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    facts = f"{findings.n_pictures(table, 'all')}, dataset `{str(table.dataset_hash.iloc[0])[:12]}`"
    words = "Brackets are 95 % intervals; thresholds were set on genuine pictures before any test picture was read."
    return f"{text}\n\nProfile `{table.profile.iloc[0]}`, {facts}. {words}\n"


def main(arguments: Sequence[str]) -> int:
    """Record or check; 0 when README and recorded run agree afterwards."""
    if arguments == ["--record"]:
        table = comparison.read(profiles.REPOSITORY / "workspace" / "mini" / "report" / "comparison.csv")
        files.write_text(RECORDED, table[table["kind"] == "all"].to_csv(index=False))
        files.write_text(README, with_table(README.read_text(encoding="utf-8"), as_markdown(RECORDED)))
    text = README.read_text(encoding="utf-8")
    if text == with_table(text, as_markdown(RECORDED)):
        return 0
    print("The results table of README.md is not that of tests/golden/mini_comparison.csv: run with --record.")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
