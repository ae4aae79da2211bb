"""report: self-contained, escaped, complete, and honest about what is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny_comparison as tiny
from PIL import Image

from helpers.data import manifest as data
from helpers.judge import comparison, figures, report, report_figures

HOSTILE_KIND = "<script>alert('kind')</script>"
HOSTILE_CATEGORY = '"><img src=http://evil.example/x onerror=alert(1)>'
HOSTILE_ANSWER = "Yes, <b onclick=steal()>there</b> is </blockquote><iframe src='http://evil.example'> & more"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def close(self):
        super().close()
        assert not self._open


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    return reader


def write(folder: Path, dataset: data.Dataset, *, with_figures: bool = True, **answers: str) -> Path:
    for method in ("clip_lof", "anomalyclip"):
        scores = {category: tiny.SCORES[method][name] for category, name in zip(dataset.categories, tiny.CATEGORIES)}
        limits = {
            category: tiny.THRESHOLDS[method][name] for category, name in zip(dataset.categories, tiny.CATEGORIES)
        }
        tiny.write_result(
            folder / "results" / method,
            dataset,
            method,
            scores,
            limits,
            with_maps=with_figures,
            answer=answers.get(method, ""),
        )
    compared = comparison.compare(dataset, folder / "results", profile="mini")
    drawn = {"auroc": report_figures.auroc(compared), "kinds": report_figures.kinds(compared)}
    drawn = {name: figures.save_figure(fig, name, folder, close=True) for name, fig in drawn.items()}
    if with_figures:
        drawn = report_figures.draw_all(compared, folder / "figures", footer=report_figures.footer(compared))
    return report.write_report(compared, folder / "index.html", drawn)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write(folder, tiny.make_dataset(folder / "data"))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    kinds = tuple(HOSTILE_KIND if kind == "stain" else kind for kind in tiny.KINDS)
    dataset = tiny.make_dataset(folder / "data", kinds=kinds, categories=(HOSTILE_CATEGORY, "zeta"))
    return write(folder, dataset, with_figures=False, anomalyclip=HOSTILE_ANSWER)


def test_the_page_loads_nothing_and_runs_nothing(page: Path) -> None:
    reader = read(page)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    for tag, name, value in reader.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "srcset", "poster", "data"):
            assert value.startswith("data:image/"), (tag, name, value[:40])
        if name in ("href", "action"):
            assert value.startswith("#"), (tag, name, value[:40])
    style = re.search(r"<style>(.*?)</style>", page.read_text(encoding="utf-8"), re.S).group(1)
    assert "url(" not in style and "@import" not in style


def test_every_link_of_the_page_has_its_target(page: Path) -> None:
    attributes = read(page).attributes
    targets = {value for _, name, value in attributes if name == "id"}
    links = {value[1:] for tag, name, value in attributes if tag == "a" and name == "href"}
    assert links and links <= targets


def test_hostile_names_and_answers_stay_text(hostile_page: Path) -> None:
    reader = read(hostile_page)
    assert not {"script", "iframe"} & set(reader.tags)
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)
    assert all(value.startswith("data:") for _, name, value in reader.attributes if name == "src")
    assert "alert('kind')" in reader.text
    assert HOSTILE_ANSWER in reader.text
    assert "onerror=alert(1)" in reader.text.lower()  # labels begin with capitals


def test_answers_are_counted_strictly(hostile_page: Path) -> None:
    text = " ".join(read(hostile_page).text.split())
    assert "right on 8 of 16 pictures (50.0 %, interval 28–72 %): it says yes on 16, and 0 answers" in text
    assert "Always answering yes would be right on 8." in text


def test_pictures_are_inlined_with_words_for_those_who_cannot_see_them(page: Path) -> None:
    images = [value for tag, name, value in read(page).attributes if tag == "img" and name == "alt"]
    assert len(images) >= 7 and all(len(words) > 20 for words in images)


def test_the_headline_and_the_table_carry_the_measured_numbers(page: Path) -> None:
    text = " ".join(read(page).text.split())
    assert "On 16 test pictures of 2 paintings, CLIP LOF ranks first: image AUROC 0.81 [0.50, 0.97]" in text
    assert "12/16" in text and "Harbour8 test pictures, 4 anomalous and 4 normal" in text
    assert "AnomalyGPT has no results yet: run 07_anomalygpt_test." in text
    assert "say nothing about the published models" in text


def test_published_figures_stand_apart_with_their_denominators(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    apart = html[html.index('<section id="published"') :]
    apart = apart[: apart.index("</section>")]
    for count in ("41/49", "41/45", "41/42", "64/90", "34/50", "71.0–91.5"):
        assert count in apart
    rest = html.replace(apart, "")
    assert "41/49" not in rest and "97.62" not in rest


def test_refused_results_are_named(tmp_path: Path) -> None:
    dataset = tiny.make_dataset(tmp_path / "data")
    other = tiny.make_dataset(tmp_path / "other", repeat=2)
    twice = {category: [*values, *values] for category, values in tiny.SCORES["clip_lof"].items()}
    tiny.write_result(tmp_path / "results" / "clip_lof", other, "clip_lof", twice, tiny.THRESHOLDS["clip_lof"])
    compared = comparison.compare(dataset, tmp_path / "results", profile="full")
    text = " ".join(read(report.write_report(compared, tmp_path / "index.html", {})).text.split())
    assert f"measured on dataset {other.hash[:12]}" in text
    assert "say nothing about the published models" not in text


def test_warnings_count_copies_of_one_source(tmp_path: Path) -> None:
    dataset = tiny.make_dataset(tmp_path / "data")
    compared = comparison.compare(dataset, tmp_path / "results", profile="mini")
    text = " ".join(read(report.write_report(compared, tmp_path / "index.html", {})).text.split())
    assert "Harbour is tested on 4 normal pictures: even no false alarm at all allows a true rate of 49.0 %." in text
    assert "source pictures; copies" not in text  # every picture is its own source here


def test_large_pictures_become_jpeg_and_small_ones_stay_png(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:100, :100]).save(tmp_path / "small.png")
    assert report.data_uri(tmp_path / "large.png").startswith("data:image/jpeg;base64,")
    assert report.data_uri(tmp_path / "small.png").startswith("data:image/png;base64,")


def test_the_page_is_of_reasonable_size(page: Path) -> None:
    assert 100_000 < page.stat().st_size < 6_000_000


@pytest.mark.parametrize("kinds", [("box", "stain"), ("good", "good"), ("replica",), ("good", "box")])
def test_odd_test_sets_still_make_a_page(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Only anomalous, only normal, one picture, one of each: numbers that do not exist are dashes, not errors."""
    dataset = tiny.make_dataset(tmp_path / "data", kinds=kinds, categories=("harbour",))
    scores = {"harbour": range(len(kinds))}
    tiny.write_result(tmp_path / "results" / "anomalyclip", dataset, "anomalyclip", scores, {"harbour": 0.5})
    compared = comparison.compare(dataset, tmp_path / "results", profile="mini")
    drawn = {}
    for name in ("roc", "scores", "kinds"):
        figure = getattr(report_figures, name)(compared)
        if figure is not None:
            drawn[name] = figures.save_figure(figure, name, tmp_path, close=True)
    page = report.write_report(compared, tmp_path / "index.html", drawn)
    assert "AnomalyCLIP" in read(page).text
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan[a-z]*", "", read(page).text.lower())
    assert "AnomalyCLIP" in comparison.as_text(comparison.write(compared, tmp_path))
