"""python scripts/bench_dashboard.py [--lines N] [--repeats K]: first paint, update and memory of the dashboard on a long run.

N is 100,000 unless given; `--lines 1000000 --repeats 1` is the longest that was tried (600 MB on the disk, about two minutes).

A short real run (an MLP on digits, a reading every 20 steps) is laid end to end until it has N lines; the dashboard is
started as a user starts it, and a real headless Chromium looks at it. Medians over K starts:

- start: from the command to its address on the terminal
- first paint: from opening the page, at once, to all panels drawn with whatever is read by then, and with every line read
- update: from the page's question to the last figure redrawn, after a line was added; and from the line to the figure,
  which includes the wait for the page's next question (one a second)
- memory: the server's peak resident set
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adaptive_opt.records import StepReport  # noqa: E402
from adaptive_opt.telemetry import read_reports, to_json  # noqa: E402
from tests.browser import Browser  # noqa: E402

PAINTED = "return document.querySelectorAll('.panel .main-svg .xy').length >= 8"
READ = "return document.querySelector('#facts')?.textContent.includes(arguments[0])"
WATCH = """
window.drawn = {};
for (const plot of document.querySelectorAll('.js-plotly-plot')) {
  plot.on('plotly_afterplot', () => { drawn.last = performance.now(); });
}
performance.clearResourceTimings();
"""
TOOK = """
const asked = performance.getEntriesByType('resource').filter((e) => e.name.includes('_dash-update-component'));
const big = asked.filter((e) => e.encodedBodySize > 5000);
return big.length && drawn.last ? drawn.last - big[big.length - 1].startTime : null;
"""


def real_run(folder: Path) -> list[StepReport]:
    """400 steps of training with 20 full readings."""
    import torch

    from adaptive_opt import AdaptiveOptimizer, LanczosProbe
    from adaptive_opt.telemetry import JsonlSink
    from experiments.loop import train
    from experiments.tasks.digits import Digits

    torch.set_num_threads(1)
    task = Digits(seed=0, steps=400)
    sink = JsonlSink(folder)
    base = torch.optim.AdamW(task.model.parameters(), lr=0.1)
    train(task, AdaptiveOptimizer(base, task.model, loss_fn=task.loss_fn, probe=LanczosProbe(every=20), sinks=[sink]))
    sink.close()
    return list(read_reports(folder))


def long_run(folder: Path, reports: list[StepReport], lines: int) -> Path:
    """The real run end to end, its steps counted on; events of its first round only."""
    folder.mkdir()
    at = 987654321  # stands for the step
    told = [replace(r, step=at, reading=r.reading and replace(r.reading, step=at)) for r in reports]
    first = [to_json(r) for r in told]
    later = [to_json(replace(r, events=())) for r in told]
    with (folder / "steps.jsonl").open("w") as file:
        for i in range(lines):
            line = first[i] if i < len(first) else later[i % len(later)]
            file.write(line.replace(str(at), str(i)) + "\n")
    return folder


def once(folder: Path, lines: int) -> dict[str, float]:
    """One start of the server and one look at it."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "adaptive_opt", "dashboard", str(folder), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        out = {"start, s": time.perf_counter() - began}
        browser = Browser()
        try:  # whatever happens, the server ends
            opened = time.perf_counter()
            browser.open(url)
            browser.wait(PAINTED, 120)
            out["first paint, s"] = time.perf_counter() - opened
            text = f"{lines:,} lines"
            browser.wait(READ.replace("arguments[0]", json.dumps(text)), 300)
            out["every line read and painted, s"] = time.perf_counter() - opened
            opened = time.perf_counter()
            browser.open(url)
            browser.wait(READ.replace("arguments[0]", json.dumps(text)), 120)
            browser.wait(PAINTED, 120)
            out["first paint of a run that is read, s"] = time.perf_counter() - opened
            out.update(updates(browser, folder, lines))
            status = Path(f"/proc/{server.pid}/status").read_text()
            out["memory, MiB"] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        finally:
            browser.close()
            server.send_signal(2)
    with (folder / "steps.jsonl").open("rb+") as file:  # without the lines that the updates added
        file.seek(0)
        for _ in range(lines):
            file.readline()
        file.truncate(file.tell())
    return out


def updates(browser: Browser, folder: Path, lines: int, count: int = 5) -> dict[str, float]:
    """Median of a few added lines."""
    template = next(read_reports(folder))
    redrawn, seen = [], []
    for i in range(count):
        time.sleep(1.5)
        browser.driver.execute_script(WATCH)
        step, began = lines + i, time.perf_counter()
        with (folder / "steps.jsonl").open("a") as file:
            file.write(to_json(replace(template, step=step, events=())) + "\n")
        browser.wait(f"return document.querySelector('#facts').textContent.startsWith('step {step:,} ')", 60)
        seen.append(time.perf_counter() - began)
        time.sleep(0.7)  # the last figure
        redrawn.append(float(browser.driver.execute_script(TOOK)))
    return {"update, ms": statistics.median(redrawn), "from the line to the page, s": statistics.median(seen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = long_run(Path(folder) / "long", real_run(Path(folder) / "short"), args.lines)
        size = (run / "steps.jsonl").stat().st_size / 2**20
        print(f"{args.lines:,} lines, {size:.0f} MiB, {args.repeats} starts; median (lowest to highest)\n", flush=True)
        rounds = [once(run, args.lines) for _ in range(args.repeats)]
    print("| | median | lowest to highest |\n|---|---|---|")
    for name in rounds[0]:
        values = [r[name] for r in rounds]
        print(f"| {name} | {statistics.median(values):.3g} | {min(values):.3g} to {max(values):.3g} |")


if __name__ == "__main__":
    main()
