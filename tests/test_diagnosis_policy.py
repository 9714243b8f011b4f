"""Diagnosis and policy are pure: a reading and free signals in, conditions out; conditions in, a decision out."""

from dataclasses import replace

import pytest

from adaptive_opt import Condition, ConstantPolicy, LayerReading, Reading, RulePolicy
from adaptive_opt.diagnosis import diagnose
from adaptive_opt.records import Diagnosis, Finding, History, Stay, Trend
from adaptive_opt.signals import JUMP_GRAD, STALL, Signals

CALM = Trend(step=100, loss=1.0, grad_norm=1.0)
READING = Reading(
    step=100, loss=1.0, grad_norm=1.0, stability=0.3, overshoot=0.2, epsilon=10.0, lambda_min=-0.05, lambda_max=10.0
)


def layers(*rms):
    return tuple(LayerReading(f"l{i}", s, 0.0, s, 0.0, 1.0, chained=i > 0) for i, s in enumerate(rms))


def alone(*rms):
    return tuple(replace(layer, chained=False) for layer in layers(*rms))


def recurrent(sigma, times):
    return (LayerReading("rnn.weight_hh_l0", sigma, 0.0, sigma, 0.0, None, kind="recurrent", times=times),)


def conditions(trend=CALM, reading=None, **kwargs):
    return [f.condition for f in diagnose(trend, reading, **kwargs).findings]


@pytest.mark.parametrize(
    ("trend", "reading", "kwargs", "expected"),
    [
        (CALM, None, {}, [Condition.HEALTHY]),
        (CALM, READING, {}, [Condition.HEALTHY]),
        (replace(CALM, finite=False), None, {}, [Condition.NON_FINITE]),
        (replace(CALM, spike=True), None, {}, [Condition.BROKEN]),
        (replace(CALM, lost=0.6), None, {}, [Condition.BROKEN]),
        (CALM, replace(READING, stability=30.0, overshoot=9.0), {}, [Condition.UNSTABLE]),
        (replace(CALM, rising=True), replace(READING, stability=3.0, overshoot=3.0), {}, [Condition.UNSTABLE]),
        (
            CALM,
            replace(READING, stability=3.0, overshoot=3.0),
            {},
            [Condition.HEALTHY],
        ),  # loss does not rise: leave it alone
        (
            CALM,
            replace(READING, stability=30.0, overshoot=0.5),
            {},
            [Condition.HEALTHY],
        ),  # sharp, but the step does not go there
        (CALM, replace(READING, stability=1.0), {}, [Condition.SHARP]),
        (replace(CALM, stalled=True), replace(READING, lambda_min=-5.0), {}, [Condition.SADDLE]),
        (CALM, replace(READING, lambda_min=-5.0), {}, [Condition.HEALTHY]),  # negative curvature alone means nothing
        (CALM, READING, {"kappas": (200.0, 300.0, 10.0)}, [Condition.ILL_CONDITIONED]),
        (CALM, READING, {"kappas": (2000.0, 10.0, 10.0)}, [Condition.HEALTHY]),  # one outlier among three
        (CALM, replace(READING, layers=layers(1, 30, 1)), {}, [Condition.DRIFTING]),
        (CALM, replace(READING, layers=layers(*[3.0] * 12)), {}, [Condition.DRIFTING]),
        (CALM, replace(READING, layers=layers(*[0.4] * 12)), {}, [Condition.DRIFTING]),
        (CALM, replace(READING, layers=layers(0.6, 1.4, 3.0)), {}, [Condition.HEALTHY]),
        (CALM, replace(READING, layers=alone(*[0.4] * 12)), {}, [Condition.HEALTHY]),  # a norm or a skip between them
        (CALM, replace(READING, layers=layers(1, 0.01)), {}, [Condition.HEALTHY]),  # a branch
        (CALM, replace(READING, layers=recurrent(0.58, 64)), {}, [Condition.DRIFTING]),
        (CALM, replace(READING, layers=recurrent(3.0, 64)), {}, [Condition.DRIFTING]),
        (CALM, replace(READING, layers=recurrent(0.58, 8)), {}, [Condition.HEALTHY]),
        (CALM, replace(READING, layers=recurrent(0.58, 64)), {"first_layers": recurrent(0.58, 64)}, [Condition.HEALTHY]),
        (
            CALM,
            replace(READING, layers=layers(1, 30, 1)),
            {"first_layers": layers(1, 30, 1)},
            [Condition.HEALTHY],
        ),  # no drift
        (CALM, replace(READING, layers=layers(1, 60, 1)), {"first_layers": layers(1, 5, 1)}, [Condition.DRIFTING]),
    ],
)
def test_conditions_follow_from_their_evidence(trend, reading, kwargs, expected):
    assert conditions(trend, reading, **kwargs) == expected


def test_a_rise_that_the_reading_before_foresaw_is_the_steps_length():
    foreseen = replace(READING, step=98, stability=20.0, overshoot=3.5)
    rising = replace(CALM, rising=True)
    assert conditions(CALM, None, recent=foreseen) == [Condition.HEALTHY]
    assert conditions(rising, None, recent=READING) == [Condition.HEALTHY]
    assert conditions(rising, None, recent=foreseen) == [Condition.UNSTABLE]
    assert conditions(rising, READING, recent=foreseen) == [Condition.UNSTABLE]


def test_unscaled_data_is_seen_at_the_first_reading_and_its_layer_does_not_drift():
    first, *others = layers(0.5, 1.0, 1.0)
    raw = replace(READING, layers=(replace(first, fed=200.0), *others))
    assert conditions(CALM, raw) == [Condition.UNSCALED]
    assert conditions(CALM, replace(READING, layers=(replace(first, fed=3.0), *others))) == [Condition.HEALTHY]
    later = replace(raw, layers=(replace(first, fed=200.0, sigma_rms=50.0), *others))  # spread out over the data's units
    assert conditions(CALM, later, first_layers=raw.layers) == [Condition.HEALTHY]


def test_what_was_not_measured_is_no_condition():
    assert conditions(CALM, Reading(step=0, loss=1.0, grad_norm=1.0)) == [Condition.HEALTHY]


def of(*found):
    return Diagnosis(100, tuple(Finding(c, 1.0, 1.0, f"because {c}") for c in found))


ABLE = History(step=200, can_replay=True, can_validate=True, agreement=0.9)


@pytest.mark.parametrize(
    ("found", "history", "mode", "interventions"),
    [
        ([Condition.HEALTHY], replace(ABLE, step=24), "base", ()),
        ([Condition.NON_FINITE], ABLE, "base", ("rollback",)),
        ([Condition.DRIFTING, Condition.UNSTABLE], ABLE, "base", ("spectral", "damp")),  # what moves comes first
        ([Condition.UNSCALED, Condition.DRIFTING, Condition.UNSTABLE], ABLE, "standardised", ()),  # alone
        ([Condition.UNSCALED], replace(ABLE, can_replay=False), "base", ()),
        ([Condition.UNSCALED], replace(ABLE, mode="kfac", trial="kfac"), "kfac", ()),
        ([Condition.UNSCALED], replace(ABLE, not_before={"standardised": 300}), "base", ()),
        ([Condition.BROKEN, Condition.UNSCALED], ABLE, "base", ("rollback",)),
        ([Condition.SADDLE], ABLE, "base", ("escape",)),
        ([Condition.SADDLE], replace(ABLE, can_replay=False), "base", ()),
        ([Condition.ILL_CONDITIONED], ABLE, "kfac", ()),
        ([Condition.ILL_CONDITIONED], replace(ABLE, step=20), "base", ()),  # dwell
        ([Condition.ILL_CONDITIONED], replace(ABLE, trial="spectral"), "base", ()),  # one trial at a time
        ([Condition.ILL_CONDITIONED], replace(ABLE, not_before={"kfac": 300}), "base", ()),  # cool-down
        ([Condition.SHARP], ABLE, "sam", ()),
        ([Condition.SHARP], replace(ABLE, can_validate=False), "base", ()),  # only validation shows what SAM is worth
        ([Condition.SHARP], replace(ABLE, mode="kfac"), "sam", ()),  # what is learnt by heart shall not be learnt faster
        ([Condition.ILL_CONDITIONED], replace(ABLE, mode="sam"), "sam", ()),  # one mode at a time
        ([Condition.SADDLE], replace(ABLE, trial="spectral"), "base", ()),
        ([Condition.SADDLE], replace(ABLE, mode="kfac", trial="kfac"), "kfac", ("escape",)),  # that was tried without a cause
        ([Condition.NON_FINITE], replace(ABLE, trial="kfac"), "base", ("rollback",)),  # urgent
        (
            [Condition.NON_FINITE, Condition.BROKEN, Condition.DRIFTING, Condition.UNSTABLE, Condition.SADDLE, Condition.SHARP],
            ABLE,
            "base",
            ("rollback", "rollback", "spectral", "damp"),
        ),  # all that are urgent, and the first of the others
        ([Condition.DRIFTING, Condition.ILL_CONDITIONED, Condition.SHARP], ABLE, "base", ("spectral",)),
        ([Condition.ILL_CONDITIONED, Condition.SHARP], ABLE, "sam", ()),  # whatever the order of the findings
        ([Condition.SHARP], replace(ABLE, mode="sam"), "sam", ()),  # a larger dose
    ],
)
def test_the_table_decides(found, history, mode, interventions):
    decision = RulePolicy().decide(of(*found), history)
    assert (decision.mode, decision.interventions) == (mode, interventions)
    assert decision.reasons == tuple(f"because {c}" for c in found[: len(interventions)])


@pytest.mark.parametrize(
    ("levels", "mode"),
    [((2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0), "kfac"), ((1.0,) * 10, "base"), ((1.0,) * 9, "kfac")],
)
def test_a_mode_that_was_only_tried_is_left_when_it_gains_no_more(levels, mode):
    there = replace(ABLE, mode="kfac", stays=(Stay("kfac", 25, 175, 175.0, levels),))
    decision = RulePolicy().decide(of(Condition.HEALTHY), there)
    assert decision.mode == mode
    assert ("gains no more" in decision.reason) is (mode == "base")
    assert RulePolicy(tries=()).decide(of(Condition.HEALTHY), there).mode == "kfac"


@pytest.mark.parametrize(
    ("history", "mode"),
    [
        (ABLE, "kfac"),
        (replace(ABLE, step=24), "base"),  # the base has shown nothing yet
        (replace(ABLE, mode_since=190), "base"),
        (replace(ABLE, trial="spectral"), "base"),
        (replace(ABLE, not_before={"kfac": 300}), "base"),
        (replace(ABLE, available=frozenset({"base", "sam"})), "base"),
        (replace(ABLE, agreement=0.29), "base"),  # noise limits the run
        (replace(ABLE, agreement=None), "base"),
        (replace(ABLE, nats=0.09), "base"),  # nearly all labels are learnt
        (replace(ABLE, ending=True), "base"),  # its gain would come too late
        (replace(ABLE, mode="sam"), "sam"),
    ],
)
def test_kfac_is_tried_where_nothing_stands_in_the_way(history, mode):
    calm = of(Condition.HEALTHY)
    decision = RulePolicy().decide(calm, history)
    assert (decision.mode, decision.expects is not None) == (mode, mode == "kfac")
    assert RulePolicy(tries=()).decide(calm, history).mode == history.mode


def test_a_constant_policy_does_nothing_but_what_it_was_allowed():
    sick = of(Condition.NON_FINITE, Condition.UNSTABLE, Condition.ILL_CONDITIONED)
    assert ConstantPolicy("sam").decide(sick, ABLE).mode == "sam"
    assert ConstantPolicy("base").decide(sick, ABLE).interventions == ()
    assert ConstantPolicy("base", ("damp",)).decide(sick, ABLE).interventions == ("damp",)


def fed(losses, norms=None):
    signals = Signals()
    for i, loss in enumerate(losses):
        signals.remember(signals.judge(i, loss, 1.0 if norms is None else norms[i]))
    return signals


def test_a_batch_stands_out_only_by_loss_and_gradient_together():
    signals = fed([1.0] * 20)
    assert signals.judge(20, 100.0, 10 * JUMP_GRAD).spike
    assert not signals.judge(20, 100.0, 1.0).spike
    assert not signals.judge(20, 1.0, 10 * JUMP_GRAD).spike


def test_nothing_stands_out_before_anything_was_seen():
    assert not fed([1.0] * 3).judge(3, 100.0, 1000.0).spike


def test_a_plateau_is_a_stall_and_a_noisy_or_falling_loss_is_not():
    assert fed([2.3] * STALL).judge(STALL, 2.3, 0.0).stalled
    assert not fed([2.3 * 0.99**i for i in range(STALL)]).judge(STALL, 1.0, 1.0).stalled
    assert not fed([1.0, 2.0] * (STALL // 2)).judge(STALL, 1.0, 1.0).stalled


def test_a_schedules_end_is_no_stall():
    signals = fed([2.3] * STALL)
    assert signals.judge(STALL, 2.3, 0.0, 1.0).stalled
    assert not signals.judge(STALL, 2.3, 0.0, 0.09).stalled


def test_lost_progress_is_measured_against_the_progress_made():
    down_and_up = [2.0] * 10 + [0.5] * 40 + [1.6] * 30
    assert fed(down_and_up).judge(80, 1.6, 1.0).lost == pytest.approx((1.6 - 0.5) / 1.5)
    assert fed([2.0] * 60).judge(60, 2.0, 1.0).lost == 0.0


def test_an_unstable_stretch_hides_no_broken_batch_for_long():
    norms = [1.0] * 30 + [300.0] * 5 + [1.0] * 200
    assert not fed([1.0] * 36, norms[:36]).judge(36, 100.0, 1000.0).spike
    assert fed([1.0] * 110, norms[:110]).judge(110, 100.0, 1000.0).spike


def test_little_gain_counts_as_none_unless_the_loss_is_seen_to_fall():
    flat, falling = [2.3, 2.31] * 10, [2.3, 2.31] * 7 + [2.26, 2.24, 2.22, 2.2, 2.18, 2.16]
    assert fed(flat).judge(20, 2.3, 1.0).rising
    assert not fed(falling).judge(20, 2.14, 1.0).rising
    assert fed(flat).judge(20, 2.26, 1.0).rising  # one low loss is none


def test_progress_within_the_noise_is_not_lost_and_little_progress_only_above_the_start():
    noisy = [2.0, 3.0] * 10 + [0.6, 2.6] * 20 + [1.0, 3.0] * 10
    assert fed(noisy).judge(80, 1.0, 1.0).lost == 0.0
    little = [2.0] * 10 + [1.7] * 30
    assert fed([*little, *[1.9] * 20]).judge(60, 1.9, 1.0).lost == 0.0
    assert fed([*little, *[2.2] * 20]).judge(60, 2.2, 1.0).lost == pytest.approx(0.5 / 0.3)


def test_after_a_return_what_was_shown_before_the_snapshot_still_tells_a_broken_batch():
    signals = fed([1.0] * 30 + [50.0] * 5, [1.0] * 30 + [200.0] * 5)  # a stretch that the run went back from
    assert not signals.judge(35, 100.0, 10 * JUMP_GRAD).spike
    signals.forget(but=24)
    assert signals.losses == signals.norms == [1.0] * 25
    assert signals.judge(36, 100.0, 10 * JUMP_GRAD).spike
    signals.forget()
    assert not signals.judge(36, 100.0, 10 * JUMP_GRAD).spike


def test_signals_go_on_from_a_checkpoint():
    signals, other = fed([1.0, 0.9, 0.8] * 10), Signals()
    other.load_state_dict(signals.state_dict())
    assert vars(other) == vars(signals)
