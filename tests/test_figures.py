"""figures and report_figures: labelled axes, one colour scale, saved whole, nothing hidden by a hostile name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_comparison as tiny
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from helpers import results
from helpers.data import manifest as data
from helpers.judge import _old_figures as figures
from helpers.judge import comparison, report_figures

RNG = np.random.default_rng(3)
PICTURE = tiny.picture(1)
MASK = tiny.mask(1)
MAP = RNG.random((9, 6)).astype(np.float32)


@pytest.fixture(autouse=True)
def _close_all():
    yield
    plt.close("all")


def score_set(method: str = "clip_lof", category: str = "mona_lisa") -> figures.ScoreSet:
    labels = np.arange(12) < 8
    return figures.ScoreSet(method, category, RNG.normal(size=12) + labels, labels, 0.9, (0.8, 0.6, 0.95))


def rates(groups: tuple[str, ...] = ("box", "line")) -> list[figures.Rate]:
    return [figures.Rate(method, group, 0.5, 0.2, 0.8, 6) for method in ("clip_lof", "anomalyclip") for group in groups]


def builders() -> dict[str, Callable[[], Figure]]:
    panel = figures.Panel(PICTURE, MASK, MAP, "box")
    history = [{"epoch": n, "train_loss": 1 / (n + 1), "validation_auroc": 0.5 + n / 20} for n in range(5)]
    sets = [score_set(), score_set("anomalyclip")]
    return {
        "map_panels": lambda: figures.map_panels(
            [panel, figures.Panel(PICTURE)], limits=(0, 1), title="T", threshold=0.5
        ),
        "map_comparison": lambda: figures.map_comparison(PICTURE, None, {"clip_patch_knn": (MAP, (0, 1))}, title="T"),
        "roc": lambda: figures.roc(sets, title="T"),
        "score_histograms": lambda: figures.score_histograms(sets, title="T"),
        "kind_bars": lambda: figures.kind_bars(rates(), title="T"),
        "interval_plot": lambda: figures.interval_plot(rates(), title="T", x_label="AUROC", chance=0.5),
        "visibility_curve": lambda: figures.visibility_curve(rates(("faint", "strong")), title="T"),
        "quality": lambda: figures.quality_vs_seconds(
            [figures.Point("clip_lof", 0.8, 0.7, 0.9, 0.1)], title="T", y_label="q"
        ),
        "picture_grid": lambda: figures.picture_grid([panel] * 3, title="T", n_columns=2),
        "kind_grid": lambda: figures.kind_grid([("box", PICTURE, PICTURE, MASK)] * 3, title="T"),
        "loss_curve": lambda: figures.loss_curve(history, title="T"),
    }


def test_every_figure_is_saved_whole_on_white_with_title_and_alt_text(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that collapses warns
        for name, build in builders().items():
            fig = build()
            assert fig.get_suptitle() == "T", name
            path = figures.save_figure(fig, name, tmp_path, "the footer", close=True)
            assert figures.alt_text(path).rstrip(".").endswith("T"), name
            with Image.open(path) as image:
                assert image.size[0] > 400 and image.getpixel((0, 0))[:3] == (255, 255, 255), name
                assert np.asarray(image.convert("L")).std() > 1, name
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "name", ["roc", "score_histograms", "kind_bars", "interval_plot", "visibility_curve", "quality"]
)
def test_charts_name_their_axes(name: str) -> None:
    fig = builders()[name]()
    assert any(ax.get_xlabel() for ax in fig.axes)
    assert any(ax.get_ylabel() or any(text.get_text() for text in ax.get_yticklabels()) for ax in fig.axes)


@pytest.mark.parametrize("name", ["picture_grid", "kind_bars"])
def test_footer_does_not_cover_the_axes(name: str, tmp_path: Path) -> None:
    fig = builders()[name]()
    figures.save_figure(fig, name, tmp_path, "footer " * 60)
    footer = fig.texts[-1].get_window_extent()
    lowest = min(ax.get_tightbbox().y0 for ax in fig.axes if ax.get_visible())
    assert footer.y1 <= lowest + 1


def test_all_maps_of_a_figure_share_the_given_limits() -> None:
    quiet, loud = MAP * 0.1, MAP * 10
    panels = [figures.Panel(PICTURE, MASK, values) for values in (quiet, loud)]
    fig = figures.map_panels(panels, limits=(0.0, 2.0), title="T")
    maps = [image for ax in fig.axes for image in ax.images if image.get_cmap().name == figures.MAP_COLORS]
    assert len(maps) == 2
    assert {image.get_clim() for image in maps} == {(0.0, 2.0)}


def test_threshold_is_marked_only_where_it_is_on_the_scale() -> None:
    def words(threshold: float) -> list[str]:
        fig = figures.map_panels([figures.Panel(PICTURE, MASK, MAP)], limits=(0, 1), title="T", threshold=threshold)
        return [text.get_text() for ax in fig.axes for text in ax.texts]

    assert "threshold" in words(0.5)
    assert "threshold" not in words(7.0)


def test_map_limits_are_one_scale_over_all_pictures() -> None:
    maps = [np.full((100, 100), 0.0, np.float32), np.full((300, 300), 5.0, np.float32)]
    low, high = figures.map_limits(iter(maps))
    assert low < 1 and high == 5.0
    assert figures.map_limits([np.full((3, 3), 2.0)]) == (2.0, 3.0)
    assert figures.map_limits([]) == (0.0, 1.0)


def test_overlay_leaves_a_quiet_picture_grey_and_paints_a_loud_one() -> None:
    quiet = figures.overlay(PICTURE, np.zeros((5, 4)), (0.0, 1.0))
    assert quiet.shape == PICTURE.shape and quiet.dtype == np.uint8
    assert np.ptp(quiet.astype(int), axis=2).max() <= 1
    loud = figures.overlay(PICTURE, np.ones((5, 4)), (0.0, 1.0))
    assert np.ptp(loud.astype(int), axis=2).min() > 20
    np.testing.assert_array_equal(figures.overlay(PICTURE, np.full((5, 4), 99.0), (0.0, 1.0)), loud)


def test_what_is_unknown_is_said_in_words() -> None:
    fig = figures.map_panels([figures.Panel(PICTURE)], limits=(0, 1), title="T")
    words = {text.get_text() for ax in fig.axes for text in ax.texts}
    assert "no mask known" in words and "method makes\nno map" in words


def test_roc_counts_ties_as_auroc_does() -> None:
    x, y = figures._roc_points(np.array([1.0, 1.0, 2.0, 0.0]), np.array([True, False, True, False]))
    np.testing.assert_allclose(x, [0, 0, 0.5, 1])
    np.testing.assert_allclose(y, [0, 0.5, 1, 1])
    assert np.trapezoid(y, x) == pytest.approx(0.875)


def test_every_method_has_its_own_distinguishable_colour() -> None:
    assert tuple(figures.METHOD_COLORS) == results.METHODS
    colors = np.array([to_rgb(figures.method_color(method)) for method in results.METHODS])
    # red and green merged, as for a red-green blind reader; blue kept
    merged = np.stack([colors[:, :2].mean(axis=1), colors[:, 2]], axis=1)
    distances = np.abs(merged[:, None] - merged[None]).max(axis=2) + np.eye(len(merged))
    assert distances.min() > 0.05
    assert figures.method_color("another_tool") == figures.OTHER_COLOR


def test_a_dollar_sign_in_a_name_is_a_dollar_sign(tmp_path: Path) -> None:
    hostile = r"$\undefined{$ <script>"
    fig = figures.kind_bars([figures.Rate(hostile, hostile, 0.5, 0.2, 0.8, 3)], title=hostile)
    assert figures.save_figure(fig, "hostile", tmp_path, hostile).stat().st_size > 1000


def test_loss_curve_leaves_gaps_for_missing_numbers() -> None:
    fig = figures.loss_curve([{"epoch": 1, "loss": 1.0, "auroc": None}, {"epoch": 2, "auroc": 0.6}], title="T")
    lines = {line.get_label(): line.get_xydata().tolist() for ax in fig.axes for line in ax.lines}
    assert lines == {"loss": [[1, 1.0]], "auroc": [[2, 0.6]]}
    assert figures.loss_curve([], title="nothing yet").axes


def test_show_live_is_silent_outside_a_notebook() -> None:
    fig = figures.loss_curve([{"epoch": 1, "loss": 1.0}], title="T")
    assert figures.show_live(fig) is None
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize("draw", [figures.picture_grid, figures.kind_grid])
def test_empty_grids_are_refused(draw) -> None:
    with pytest.raises(ValueError, match="at least one"):
        draw([], title="T")


# ------------------------------------------------------------------------------------------- figures of a comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> comparison.Comparison:
    folder = tmp_path_factory.mktemp("compared")
    dataset = tiny.make_dataset(folder / "data", repeat=2)
    for method, scores in tiny.SCORES.items():
        twice = {category: [*values, *values] for category, values in scores.items()}
        tiny.write_result(
            folder / "results" / method, dataset, method, twice, tiny.THRESHOLDS[method],
            with_maps=method == "anomalyclip",
        )  # fmt: skip
    return comparison.compare(dataset, folder / "results", profile="mini")


def test_draw_all_saves_what_there_is_to_show(compared: comparison.Comparison, tmp_path: Path) -> None:
    drawn = report_figures.draw_all(compared, tmp_path, footer=report_figures.footer(compared))
    expected = {"auroc", "roc", "scores", "quality_vs_seconds", "kinds"}
    expected |= {"failures_clip_lof", "maps_anomalyclip", "failures_anomalyclip"}
    # 12 marks: no bins need 8; one method with maps: nothing to compare
    assert set(drawn) == expected | {"visibility"}
    assert all(path.stat().st_size > 5000 for path in drawn.values())
    assert not plt.get_fignums()


def test_failures_show_the_worst_first_with_score_and_limit(compared: comparison.Comparison) -> None:
    fig = report_figures.failures(compared, "clip_lof")
    captions = [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()]
    # per repeat: harbour misses 0 (replica) and 2.5 (box), portrait misses 20 (replica); one false alarm at 4
    assert fig.get_suptitle().startswith("CLIP LOF: 6 missed and 2 false alarms")
    assert captions[0].split("\n")[0] == "missed: replica" and "limit 30" in captions[0]
    assert captions[-1] == "false alarm\nHarbour\nscore 4, limit 3.5\np = 0.25"


def test_a_method_without_results_is_refused_by_name(compared: comparison.Comparison) -> None:
    with pytest.raises(ValueError, match="'anomalygpt' has no results"):
        report_figures.map_panels(compared, "anomalygpt")


def test_titles_state_counts_of_this_comparison(compared: comparison.Comparison) -> None:
    # clip_lof misses 2 + 1 of 8, anomalyclip 0 + 4 of 8; twice each. False alarms: 1 of 16 normals, twice
    title = report_figures.scores(compared).get_suptitle().replace("\n", " ")
    assert title.startswith("Left of the thresholds stay 14 of 32 anomalous pictures; right of them lie 2 of 32 normal")
    assert report_figures.footer(compared).endswith("32 test pictures, 16 anomalous · intervals 95 %")


def test_only_the_trivial_rule_draws_nothing(tmp_path: Path) -> None:
    dataset = tiny.make_dataset(tmp_path / "data", kinds=("good", "box"), categories=("harbour",))
    assert isinstance(dataset, data.Dataset)
    alone = comparison.compare(dataset, tmp_path / "results", profile="mini")
    assert report_figures.draw_all(alone, tmp_path / "figures") == {}


def test_points_of_equal_time_stand_side_by_side() -> None:
    places = figures._side_by_side([0.13, 1.4, 0.13, 0.131])
    assert places[0] == 0.13 and places[1] == 1.4
    assert sorted(places) == [places[0], places[2], places[3], places[1]]
    assert all(later / earlier > 1.05 for earlier, later in zip(sorted(places), sorted(places)[1:]))


def test_the_colour_scale_puts_what_normal_pictures_reach_in_its_middle(compared: comparison.Comparison) -> None:
    """Maps of normal pictures lie in [0, 0.1], marks near 1: a scale over all would hide everything below 0.5."""
    (result,) = (result for result in compared.methods if result.method == "anomalyclip")
    low, high = report_figures._limits(result)
    assert low == pytest.approx(0.0, abs=0.01) and high == pytest.approx(0.2, abs=0.01)
