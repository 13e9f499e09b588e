"""The page stands alone, tells everything, and survives a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.reports import made_up, sample

from slipstream.contract import Verdict
from slipstream.reports import page, theme
from slipstream.reports.document import LayerTable, Report

VOID = {"meta", "path", "circle", "br", "link", "use"}


class Checker(HTMLParser):
    """Fails on tags that do not nest, and collects what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(html: str) -> str:
    """The page's text, after its structure was checked."""
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == [] and checker.loads == []
    assert "@import" not in html and "url(http" not in html
    return checker.text


def released() -> Report:
    return made_up.report(*sample.whole_run())


def test_the_page_of_a_release_has_every_engine_and_gate() -> None:
    text = check(page.render(released(), {}))
    for cell in sample.MADE_UP:
        recipe, _, target = cell.partition("@")
        assert f"{recipe}{target}" in text
    assert "is live: 7.65×" in text
    assert "14 verdicts" in text and "3 reused from earlier runs" in text
    assert "not faster" in text and "a" * 64 in text


def test_sizes_and_what_is_only_for_comparison_are_told() -> None:
    report = released()
    rows = tuple(r.model_copy(update={"comparison": r.cell.endswith("portable")}) for r in report.rows)
    html = page.render(report.model_copy(update={"rows": rows}), {})
    assert html.count("<small>for comparison</small>") == sum(r.comparison and not r.release for r in rows) > 0
    assert "<small>arena 120 kB</small>" in html and "<small>gzipped</small>" in html


def test_an_empty_run_still_gives_a_page() -> None:
    text = check(page.render(made_up.report(), {}))
    assert "failed before the gates could judge" in text
    assert "No evidence for baseline@server" in text


def test_reasons_are_escaped() -> None:
    hostile = Verdict(gate="<b>x", answer="fail", reason='<script>alert("x")</script>')
    outputs = [o.model_copy(update={"verdicts": (hostile,)}) for o in sample.validate_outputs()]
    html = page.render(made_up.report(*outputs), {})
    check(html)
    assert "&lt;script&gt;" in html


def test_tiles_of_a_run_without_a_winner_count_the_engines() -> None:
    tiles = {f.name: f.value for f in page.tiles(made_up.report(*sample.validate_outputs()))}
    assert tiles == {"engines judged": "6", "passed": "3", "rejected": "3", "allowed drop": "1 pt"}


def test_both_palettes_are_whole_and_text_is_readable() -> None:
    assert theme.LIGHT.keys() == theme.DARK.keys()
    for palette in (theme.LIGHT, theme.DARK):
        for name in ("ink", "muted", "accent", "second", "third", "fourth", "good", "bad", "unsure"):
            assert contrast(palette[name], palette["paper"]) >= 4.5, name


def contrast(one: str, two: str) -> float:
    """Contrast ratio of two colors, WCAG 2.2, section 1.4.3."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    dark, light = sorted((luminance(one), luminance(two)))
    return (light + 0.05) / (dark + 0.05)


def test_plots_follow_the_theme_and_the_same_report_gives_the_same_plots() -> None:
    pytest.importorskip("matplotlib", reason="needs the environment serve")
    from slipstream.reports import plots

    drawn = {name: plots.svg(figure) for name, figure in plots.draw(released()).items()}
    assert set(drawn) == set(page.PLOTS)
    assert drawn == {name: plots.svg(figure) for name, figure in plots.draw(released()).items()}
    for name, svg in drawn.items():
        inline = theme.themed(svg)
        assert "var(--ink)" in inline or "var(--muted)" in inline, name
        assert not re.search("|".join(theme.LIGHT.values()), inline), name
    assert "pruned-int8" in drawn["pareto"] and "torch eager" in drawn["latency"] and "canary" in drawn["timeline"]
    assert plots.draw(made_up.report()) == {}


@pytest.mark.parametrize("apart", [1.02, 1.3, 8.0])
def test_an_axis_of_any_length_can_be_read_and_all_names_are_in_the_plot(apart: float) -> None:
    pytest.importorskip("matplotlib", reason="needs the environment serve")
    from slipstream.reports import plots

    near = {cell: 0.05 * apart ** (number / 7) for number, cell in enumerate(sample.MADE_UP)}
    select = sample.select_output(rows=sample.rows(near))
    figure = plots.draw(made_up.report(*sample.validate_outputs(), select))["pareto"]
    figure.canvas.draw()
    [axes] = figure.axes
    low, high = axes.get_xlim()
    assert 3 <= sum(low <= tick <= high for tick in axes.get_xticks()) <= 15
    places = [text.get_window_extent() for text in axes.texts]
    assert all(axes.bbox.x0 <= place.x0 and place.x1 <= axes.bbox.x1 for place in places)


def test_the_plot_of_quality_and_time_is_of_the_run_by_which_the_release_was_picked() -> None:
    """Once it drew the milliseconds of each engine's own run, in which the picked one looked slower than another."""
    pytest.importorskip("matplotlib", reason="needs the environment serve")
    from slipstream.reports import plots

    slow_moment = sample.evidence("pruned-int8@server", 1).model_copy(update={"latency": sample.latency(5.0, 1)})
    rows = sample.rows()
    for row in rows:
        if row["cell"] == "pruned-int8@server":
            row["evidence"] = slow_moment.model_dump(mode="json")
    report = made_up.report(*sample.validate_outputs(), sample.select_output(rows=rows))
    places = {r.cell: plots._place(r) for r in report.rows}
    passed = {r.cell: places[r.cell] for r in report.rows if r.status == "passed"}
    assert min(passed, key=lambda cell: passed[cell][0]) == report.winner == "pruned-int8@server"
    assert "pareto" not in plots.draw(made_up.report(*sample.validate_outputs())), "no engine passed: there was no race"


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the environment serve")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    from slipstream.reports import plots

    made = released()
    html = page.render(made, {name: plots.svg(figure) for name, figure in plots.draw(made).items()})
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    shot = tmp_path / "page.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2600", f"--screenshot={shot}"]
    subprocess.run([*command, f"file://{tmp_path}/index.html"], check=True, capture_output=True, timeout=120)
    assert shot.stat().st_size > 100_000  # a blank page of this size has 10 kB


def test_layers_are_shown_for_engines_that_tell_them_and_long_tables_are_cut() -> None:
    plain = check(page.render(released(), {}))
    assert "Layers" not in plain
    table = LayerTable(
        cell="int8@gpu", columns=("layer", "precision", "onnx"), rows=(("k<0>", "INT8", "conv1, relu1"),), total=900
    )
    text = check(page.render(released().model_copy(update={"layers": (table,)}), {}))
    for told in ("int8@gpu", "k<0>", "conv1, relu1", "1 of 900 layers"):
        assert told in text
