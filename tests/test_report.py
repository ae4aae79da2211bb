"""report, figures: self-contained, escaped, complete, readable for any names, and honest about what is missing."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_comparison as tiny
from PIL import Image

from helpers.judge import comparison, figures, report
from helpers.judge.comparison import Comparison

HOSTILE_KIND = "<script>alert('kind')</script>"
HOSTILE_CATEGORY = '"><img src=http://evil.example/x onerror=alert(1)>'
HOSTILE_ANSWER = "Yes, <b onclick=steal()>there</b> is </blockquote><iframe src='http://evil.example'> & more {{ c }}"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed in order."""

    def __init__(self, page: Path | str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(page if isinstance(page, str) else page.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def assert_asks_nothing_and_runs_nothing(self) -> None:
        assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(self.tags)
        for tag, name, value in self.attributes:
            assert not name.startswith("on") and name not in ("href", "action", "srcset"), (tag, name, value[:40])
            assert name != "src" or value.startswith("data:image/"), (tag, value[:40])


def write(folder: Path, compared: Comparison) -> Path:
    return report.write_report(compared, folder / "index.html", report.draw_all(compared, folder / "figures"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write(folder, tiny.compare(folder / "results", tiny.make_dataset(folder / "data"), maps=tiny.SCORES))


def test_the_page_asks_nothing_describes_its_pictures_and_filters_without_a_script(page: Path) -> None:
    reader = Reader(page)
    reader.assert_asks_nothing_and_runs_nothing()
    style = re.search(r"<style>(.*?)</style>", page.read_text(encoding="utf-8"), re.S).group(1)
    assert "url(" not in style and "@import" not in style
    words = [value for tag, name, value in reader.attributes if tag == "img" and name == "alt"]
    assert len(words) > 16 and all(len(one) > 8 for one in words)
    ids = {value for tag, name, value in reader.attributes if tag == "input" and name == "id"}
    assert ids == {value for tag, name, value in reader.attributes if tag == "label" and name == "for"} and len(ids) > 3


def test_hostile_names_and_answers_stay_text(tmp_path: Path) -> None:
    kinds = tuple(HOSTILE_KIND if kind == "stain" else kind for kind in tiny.KINDS)
    dataset = tiny.make_dataset(tmp_path / "data", kinds=kinds, categories=(HOSTILE_CATEGORY, "zeta"))
    reader = Reader(write(tmp_path, tiny.compare(tmp_path / "results", dataset, answer=HOSTILE_ANSWER)))
    reader.assert_asks_nothing_and_runs_nothing()
    assert "alert('kind')" in reader.text and HOSTILE_ANSWER in reader.text
    assert "onerror=alert(1)" in reader.text.lower()  # labels begin with capitals


def test_the_first_screen_says_what_was_found_where_by_whom_and_how_far_to_trust_it(page: Path) -> None:
    text = " ".join(Reader(page).text.split())
    first = text[: text.index("One click down")]
    assert "CLIP LOF finds 5 of 8 forged or altered pictures" in first
    assert "They can tell none of 1 pairs of detectors apart" in first
    assert "A genuine picture" in first and "of 2 found it" in first and "real alteration" in first
    assert "AnomalyGPT has no results yet: run 07_anomalygpt_test." in first
    assert "say nothing about the published models" in first


def test_the_strip_marks_only_what_the_detector_raises_an_alarm_on(tmp_path: Path, monkeypatch) -> None:
    scale = figures.map_scale
    monkeypatch.setattr(figures, "map_scale", lambda maps: scale(maps)._replace(limit=-1.0))  # tints all of it
    dataset = tiny.make_dataset(tmp_path / "data")
    html = write(tmp_path, tiny.compare(tmp_path / "results", dataset, maps=["clip_lof"])).read_text(encoding="utf-8")
    strip = html[html.index('class="strip"') : html.index('id="matrix"')]
    marked, alarms = [], []
    for content, words in re.findall(r'<figure><img[^>]*base64,([^"]+)">(.*?)</figure>', strip, re.S):
        red, green, _ = np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).mean(axis=(0, 1))
        marked.append(red - green > 40)
        alarms.append(("✓ CLIP LOF" in Reader(words).text) != ("A genuine picture" in words))
    assert marked == alarms and set(alarms) == {True, False}


def test_published_figures_stand_apart_with_their_denominators(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    apart = html[html.index('<details id="published"') :]
    apart = apart[: apart.index("</details>")]
    for count in ("41/49", "41/45", "41/42", "64/90", "34/50", "71.0–91.5"):
        assert count in apart
    assert "41/49" not in html.replace(apart, "")
    rows = pd.read_csv(Path(report.__file__).parent / "templates" / "published_2024.csv").dropna()
    assert len(rows) == 6 and (round(100 * rows.correct / rows.n_images, 2) == rows.accuracy).all()


def test_limits_of_few_sources_stand_beside_the_numbers(tmp_path: Path) -> None:
    words = "Harbour has one genuine picture: all is optimistic."
    dataset = dataclasses.replace(tiny.make_dataset(tmp_path / "data"), limits={"harbour": words})
    compared = tiny.compare(tmp_path / "results", dataset)
    page = report.write_report(compared, tmp_path / "index.html", {}).read_text(encoding="utf-8")
    assert page.count(words) == 3 and words in report.table_html(compared)  # both tables, the list of limits


@pytest.mark.parametrize("kinds", [("box", "stain"), ("good", "good"), ("replica",), ("good", "box"), None])
def test_odd_test_sets_still_make_a_page(kinds: tuple[str, ...] | None, tmp_path: Path) -> None:
    """Only anomalous, only normal, one picture, one of each, no results: what does not exist is a dash, no error."""
    dataset = tiny.make_dataset(tmp_path / "data", kinds=kinds or tiny.KINDS, categories=("harbour",))
    if kinds:
        facts = {"harbour": range(len(kinds))}, {"harbour": 0.5}
        tiny.write_result(tmp_path / "results" / "anomalyclip", dataset, "anomalyclip", *facts)
    compared = comparison.compare(dataset, tmp_path / "results", profile="full")
    text = Reader(write(tmp_path, compared)).text + Reader(report.table_html(compared)).text
    assert ("AnomalyCLIP" if kinds else "No detector has verdicts on these 8 test pictures yet") in text
    assert "say nothing about the published models" not in text and not re.search(r"\bnan\b", text.lower())


def test_many_paintings_with_long_and_foreign_names_stay_readable(tmp_path: Path) -> None:
    names = ("洛神赋图", *(f"painting_{n:02d}_{'with_a_very_long_name_' * 4}"[:98] for n in range(6)))
    dataset = tiny.make_dataset(tmp_path / "data", kinds=("good", "box", "replica"), categories=names)
    compared = tiny.compare(tmp_path / "results", dataset)
    drawn = report.draw_all(compared, tmp_path / "figures")
    assert {"auroc", "auroc_2", "scores", "scores_2", "scores_3"} <= set(drawn)
    assert "洛神赋图" in Reader(report.write_report(compared, tmp_path / "index.html", drawn)).text
    assert figures.painting_name(names[0], names) in ("洛神赋图", f"painting {sorted(names).index(names[0]) + 1}")
    assert max(map(len, figures.painting_name(names[1], names).split("\n"))) <= 26


def test_a_verdict_tints_only_what_exceeds_the_limit_and_keeps_the_rest() -> None:
    image, anomaly_map, mask = np.full((80, 60, 3), 120, np.uint8), np.zeros((8, 6)), np.zeros((80, 60), bool)
    anomaly_map[1:3, 1:3] = 1
    assert (figures.marked(image, anomaly_map, 2.0) == image).all()
    marked = figures.marked(image, anomaly_map, 0.5)
    assert (marked[20, 20] != image[20, 20]).any() and (marked[60:, 40:] == image[60:, 40:]).all()
    mask[50:70, 30:50] = True
    dashed = figures.marked(image, None, 0.0, mask)
    assert (dashed[55:65, 35:45] == image[55:65, 35:45]).all()
    edge = dashed[50, 30:50].mean(axis=1)
    assert edge.max() > 200 and edge.min() < 60  # light and dark dashes, readable on any ground
    part = figures.zoomed(np.arange(4800).reshape(80, 60), mask)  # at the right border, and not beyond it
    assert part.shape == (48, 48) and part[0, 0] == 32 * 60 + 12 and part[-1, -1] == 79 * 60 + 59


def test_figures_are_saved_with_words_and_ring_what_is_wrong(tmp_path: Path) -> None:
    frame = pd.DataFrame({"series": ["clip_lof"] * 3, "x": [1, 2, 3], "value": [0.5, 0.7, 0.6], "ring": [0, 0, 1]})
    fig = figures.lines(frame, title="A finding", x_label="epoch", y_label="loss")
    path = figures.save_figure(fig, "loss", tmp_path, "profile mini", close=True)
    assert figures.alt_text(path) == "loss against epoch, 1 lines. A finding"
    scores = pd.DataFrame({"method": "clip_lof", "category": "harbour", "anomaly_score": [1.0, 2, 3, 4],
                           "is_anomalous": [False, True, False, True], "threshold": 2.5})  # fmt: skip
    rings = [line for line in figures.scores(scores, title="t").axes[0].lines if line.get_fillstyle() == "none"]
    assert [list(line.get_xdata()) for line in rings] == [[3.0], [2.0]]  # a false alarm and a miss
    panel = figures.Panel(np.zeros((30, 20, 3), np.uint8), anomaly_map=np.ones((3, 2)), caption="one")
    assert figures.map_rows([panel], scale=figures.Scale(0, 0.5, 1), title="t").get_label().endswith("t")


def test_worse_photographs_are_counted_by_strength() -> None:
    facts = {"method": "clip_lof", "is_anomalous": [False, False, True, True], "threshold": 2.5}
    frame = pd.concat([
        pd.DataFrame({**facts, "category": category, "strength": strength, "anomaly_score": scores})
        for category, strength, scores in (("a", 0, (1, 2, 3, 4)), ("b", 0, (1, 3, 2, 4)), ("a", 1, (3, 4, 1, 2)),
                                           ("b", 1, (3, 1, 4, 2)))
    ])  # fmt: skip
    fig = report.robustness(frame)
    (ax,) = fig.axes
    assert list(ax.lines[0].get_ydata()) == [(1 + 0.75) / 2, (0 + 0.75) / 2]  # of the paintings' AUROCs the mean
    assert [text.get_text() for text in ax.texts] == ["1", "3"]  # false alarms of both paintings
    assert "on 4 genuine pictures: 3 to 3 on the worst" in fig.get_label()
