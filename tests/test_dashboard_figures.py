"""Figures are pure functions of the reports: they show errors and thresholds, say what is missing, and take text for text."""

import json
import re
from dataclasses import replace
from html import unescape

import pytest
from made_runs import MARKUP, append, healthy_run, hostile, plain, saddle_run

from adaptive_opt.dashboard import content, export, figures
from adaptive_opt.dashboard.figures.layers import worries, worst
from adaptive_opt.dashboard.figures.saddle import stalled
from adaptive_opt.dashboard.figures.sharpness import advice
from adaptive_opt.dashboard.figures.spectrum import outliers
from adaptive_opt.dashboard.panels import BELOW, PANELS
from adaptive_opt.dashboard.render import to_html
from adaptive_opt.dashboard.run import Run
from adaptive_opt.records import Event, LayerReading, Reading, StepReport
from adaptive_opt.telemetry import read_reports

EVERY = (*PANELS, *BELOW)


@pytest.fixture(scope="module")
def saddle(tmp_path_factory):
    return list(read_reports(saddle_run(tmp_path_factory.mktemp("runs") / "saddle")))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return list(read_reports(healthy_run(tmp_path_factory.mktemp("runs") / "healthy")))


def names(fig):
    return {t.name for t in fig.data}


@pytest.mark.parametrize("panel", EVERY, ids=lambda p: p.key)
def test_a_figure_is_a_pure_function_of_the_reports(panel, saddle):
    before = list(saddle)
    assert panel.draw(saddle).to_json() == panel.draw(saddle).to_json()
    assert saddle == before


@pytest.mark.parametrize("panel", EVERY, ids=lambda p: p.key)
@pytest.mark.parametrize("reports", [(), (plain(0),), (StepReport(0, None, None, 1e-3, 1.0, "base", False),)])
def test_what_was_not_measured_says_so(panel, reports):
    fig, chips, note = panel.draw(reports), panel.chips(reports), panel.note(reports)
    assert isinstance(note, str)
    if panel in PANELS:
        assert "not measured" in fig.layout.annotations[0].text
        assert all("not measured" in c.value for c in chips if c.label != "stall")


def test_the_condition_number_has_its_trend_its_spread_and_its_threshold(healthy):
    fig = figures.condition(healthy)
    assert names(fig) == {"range of three", "kappa_effective", "median of three", "kappa ≥", "the rules act above 50"}
    assert fig.layout.yaxis.type == "log"


def test_the_spectrum_marks_negative_side_and_outliers_and_shows_residuals(saddle):
    reading = next(r.reading for r in saddle if r.reading is not None and r.reading.kind == "full")
    fig = figures.spectrum(saddle)
    shown = {t.name: t for t in fig.data if t.mode == "markers"}
    assert "negative" in shown
    assert len(shown["negative"].x) == sum(v < -0.01 * reading.epsilon for v in reading.ritz_values)
    assert all(t.error_x.array is not None for t in shown.values())
    spike = replace(reading, ritz_values=(-0.1, 0.0, 0.1, 9.0), ritz_weights=(0.3, 0.4, 0.29, 0.01))
    assert outliers(spike) == [9.0]


def test_the_saddle_detector_has_errors_threshold_and_the_escape(saddle):
    fig = figures.saddle(saddle)
    by_name = {t.name: t for t in fig.data}
    assert by_name["lambda_min"].error_y.array is not None
    assert by_name["delta, estimated"].error_y.array is not None
    assert list(by_name["saddle: escaped"].x) == [49]
    assert by_name["delta ≥"].y[-1] >= 3


def test_the_stall_is_the_controllers_own_signal(saddle):
    assert stalled([r for r in saddle if r.step < 49])
    assert not stalled(saddle[-5:])


def test_the_layer_that_worries_is_named():
    tame = LayerReading("encoder.0", 1.0, 0.1, 0.9, 0.1, None)
    wild = LayerReading("encoder.layers.11.attention", 90.0, 1.0, 30.0, 1.0, None)
    reading = Reading(step=0, loss=1.0, grad_norm=1.0, layers=(tame, wild))
    reports = [plain(0, reading=reading)]
    assert worst(reports) is wild
    assert worries(wild)
    assert not worries(tame)
    panel = next(p for p in PANELS if p.key == "layers")
    assert panel.note(reports).startswith("Layer encoder.layers.11.attention worries: it multiplies the signal by 30")
    assert list(figures.layers(reports).data[0].z[1]) == [pytest.approx(1.477, abs=1e-3)]


@pytest.mark.parametrize(
    ("stability", "overshoot", "says"),
    [
        (73.7, 35.5, "Lower the learning rate below 1.4e-05"),
        (3.0, 0.5, "does not overshoot"),
        (0.95, None, "edge"),
        (0.1, None, "Room"),
        (None, None, "not measured"),
    ],
)
def test_the_score_implies_an_advice(stability, overshoot, says):
    reading = Reading(step=0, loss=1.0, grad_norm=1.0, stability=stability, overshoot=overshoot)
    assert says in advice(reading, lr=1e-3)


def test_lipschitz_shows_bound_and_local_with_its_error():
    reading = Reading(step=0, loss=1.0, grad_norm=1.0, lipschitz_bound=40.0, lipschitz_local=8.0, lipschitz_local_error=0.5)
    fig = figures.lipschitz([plain(0, reading=reading)])
    assert {t.name: t.y[0] for t in fig.data} == {"bound ≤": 40.0, "local ≥": 8.0}
    assert fig.data[1].error_y.array[0] == 0.5
    panel = next(p for p in PANELS if p.key == "lipschitz")
    assert "5 times what is there" in panel.note([plain(0, reading=reading)])


def test_treatments_are_marked_by_their_outcome():
    told = [Event(i, "escape", "seen", "done", outcome) for i, outcome in enumerate(("kept", "reverted", "done", "pending"))]
    fig = figures.training([plain(i, events=(e,)) for i, e in enumerate(told)])
    assert {"treatment kept", "taken back", "done", "on trial"} <= names(fig)
    assert {t.marker.symbol for t in fig.data if t.mode == "markers"} == {"star", "x", "diamond", "circle-open"}


def test_every_hover_is_a_sentence_with_limits(saddle, healthy):
    for panel in EVERY:
        for trace in panel.draw(saddle).data:
            assert trace.hoverinfo == "skip" or trace.hovertemplate, (panel.key, trace.name)
    for panel in EVERY:
        assert all(c.says.endswith(".") for c in panel.chips(healthy))


def test_runs_are_laid_over_each_other_by_colour_and_dash(saddle, healthy):
    fig = figures.compare({"a": saddle, "b": healthy})
    assert {(t.name, t.line.color, t.line.dash) for t in fig.data} == {("a", "#0072B2", "solid"), ("b", "#D55E00", "dash")}


# ---- text is text --------------------------------------------------------------------------------------------------------


def test_an_export_holds_hostile_names_and_logs_as_text_only(tmp_path):
    append(tmp_path, hostile())
    page = export.document(Run(tmp_path / "steps.jsonl").finish(), MARKUP)
    own = page[page.rindex("<body>") :]
    assert own.count("<script>") == 2  # the figures and the keys
    assert "<img" not in own
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in own


def test_an_export_asks_nothing_of_anybody(tmp_path):
    append(tmp_path, plain(0))
    page = export.document(Run(tmp_path / "steps.jsonl").finish(), "run")
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", page)
    assert "default-src 'none'" in unescape(page)


def test_a_figure_shows_markup_of_names_as_text():
    for panel in EVERY:
        for trace in json.loads(panel.draw([hostile()]).to_json())["data"]:
            for field in ("name", "text", "hovertemplate"):
                assert "<img" not in json.dumps(trace.get(field)), (panel.key, field)
                assert "<script" not in json.dumps(trace.get(field)), (panel.key, field)


def test_static_html_escapes_text_and_attributes():
    from dash import dcc, html

    part = html.Div(['<b>"', html.Span("x", title='"><script>')], className="a", style={"color": "red"})
    assert to_html(part) == (
        '<div class="a" style="color:red">&lt;b&gt;&quot;<span title="&quot;&gt;&lt;script&gt;">x</span></div>'
    )
    with pytest.raises(TypeError, match="no static form"):
        to_html(dcc.Graph())


def test_the_log_shows_the_latest_first(saddle):
    shown = to_html(content.log(saddle))
    assert "escape</b> kept" in shown
    assert to_html(content.log([plain(0)])) == '<p class="note">Nothing was treated: there was no reason to.</p>'
