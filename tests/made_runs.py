"""Real runs for the tests of the dashboard, and lines to go on with."""

from dataclasses import replace

import torch

from adaptive_opt import AdaptiveOptimizer, LanczosProbe, RulePolicy
from adaptive_opt.records import Condition, Decision, Diagnosis, Event, Finding, LayerReading, Reading, StepReport
from adaptive_opt.telemetry import JsonlSink, to_json
from experiments.loop import train
from experiments.tasks.digits import Digits
from experiments.tasks.saddle import Saddle


def saddle_run(folder, steps=60):
    """Starts on a ridge and is helped off it at step 49: a diagnosis, an escape, a verdict."""
    task = Saddle(seed=0, steps=steps)
    base = torch.optim.SGD(task.model.parameters(), lr=0.1)
    return _train(task, base, LanczosProbe(), folder)


def healthy_run(folder, steps=40):
    """A small MLP at a sensible rate, with a full reading every tenth step."""
    task = Digits(seed=0, steps=steps, width=16)
    return _train(task, torch.optim.AdamW(task.model.parameters(), lr=1e-3), LanczosProbe(every=10), folder)


def _train(task, base, probe, folder):
    sink = JsonlSink(folder, {"task": type(task).__name__}, seed=0)
    train(
        task, AdaptiveOptimizer(base, task.model, loss_fn=task.loss_fn, probe=probe, policy=RulePolicy(tries=()), sinks=[sink])
    )
    sink.close()
    return folder


def plain(step, **more):
    """A report of a step in which nothing happened."""
    healthy = Diagnosis(step, (Finding(Condition.HEALTHY, 0.0, 0.0, "nothing stands out"),))
    report = StepReport(step, 2.0 / (step + 1), 0.5, 1e-3, 1.0, "base", True, None, healthy, Decision())
    return replace(report, **more)


def unstable(step, reading, evidence="the step is 73.7 times its stability limit and overshoots 35.5 times"):
    """A report in which the learning rate turns out too high, and is held."""
    found = Diagnosis(step, (Finding(Condition.UNSTABLE, 73.7, 2.0, evidence),))
    event = Event(step, "damp", evidence, "holding the learning rate at 0.00535 of the user's", "pending")
    return plain(step, diagnosis=found, events=(event,), lr_scale=0.00535, reading=reading)


MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def hostile(step=0):
    """A report that holds markup wherever it may hold text."""
    layer = LayerReading(MARKUP, 1.0, 0.1, 0.9, 0.1, None, kind=MARKUP)
    reading = Reading(step=step, loss=1.0, grad_norm=1.0, layers=(layer,), notes=(f"lipschitz: {MARKUP}",))
    return plain(step, mode=MARKUP, reading=reading, events=(Event(step, "damp", MARKUP, MARKUP, MARKUP, MARKUP),))


def append(folder, *reports):
    """Go on with a run, as its sink would."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "steps.jsonl").open("a") as file:
        file.writelines(to_json(r) + "\n" for r in reports)
