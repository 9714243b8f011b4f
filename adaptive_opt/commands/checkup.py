"""`python -m adaptive_opt checkup`: one page on a model and its checkpoint, before it is shipped."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_opt.checkup import checkup
from adaptive_opt.curvature import BACKENDS, CURVATURES
from adaptive_opt.page import page
from adaptive_opt.telemetry.jsonl import plain
from adaptive_opt.verdict import verdict

INSIDE = ("model", "state_dict", "model_state_dict")  # where trainers put the model's part of a checkpoint


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="FILE.py:FUNCTION",
        help="or package.module:FUNCTION; a function without arguments that returns (model, loss_fn, data), where data is one "
        "batch (x, y) or a DataLoader",
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="a state dict to load into the model first")
    parser.add_argument("--json", metavar="FILE", help="write the reading and the verdict there too; - for the terminal alone")
    parser.add_argument("--train", action="store_true", help="measure in training mode; the default is what inference sees")
    parser.add_argument("--device", help="where to measure: cpu, cuda, ... (default: where the function put the model)")
    parser.add_argument("--num-steps", type=int, default=30, help="Lanczos steps (default: %(default)s)")
    parser.add_argument("--max-batches", type=int, default=8, help="batches to read at the most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="modules or parameters to take the Hessian of")
    parser.add_argument("--layers", nargs="+", default=["weight"], help="kinds of layers: weight norm attention rnn")
    parser.add_argument("--curvature", choices=CURVATURES, default="hessian")
    parser.add_argument("--backend", choices=BACKENDS, help="how products are made (default: chosen)")
    parser.add_argument("--memory", type=int, metavar="BYTES", help="for kept graphs, and again for the vectors")


def run(args: argparse.Namespace) -> int:
    """Measure, print the page, write the JSON. Exit status 2 with one sentence where the call cannot work."""
    try:
        model, loss_fn, data = _built(args.target)
        if args.checkpoint is not None:
            _load(model, args.checkpoint)
        model.train(args.train)
        if args.device is not None:
            model.to(args.device)
        if args.json != "-":
            print("measuring ...", file=sys.stderr)
        reading = checkup(
            model,
            loss_fn,
            data,
            num_steps=args.num_steps,
            max_batches=args.max_batches,
            seed=args.seed,
            only=args.only,
            curvature=args.curvature,
            backend=args.backend,
            memory=args.memory,
            layers=args.layers,
        )
    except (Refused, ValueError, TypeError) as error:
        print(f"checkup: {error}", file=sys.stderr)
        return 2
    found = verdict(reading)
    if args.json is not None:
        text = json.dumps(plain({"schema": 1, "reading": asdict(reading), "verdict": asdict(found)}), indent=2)
        if args.json == "-":
            print(text)
            return 0
        Path(args.json).write_text(text + "\n")
    count = sum(p.numel() for p in model.parameters())
    loaded = f", {args.checkpoint}" if args.checkpoint else ""
    print(page(reading, found, f"{type(model).__name__}, {count:,} parameters{loaded}"), end="")
    return 0


class Refused(Exception):
    """The call cannot work; the message says why and what would."""


def _built(target: str) -> tuple[nn.Module, Any, Any]:
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise Refused(f"{target!r}: give FILE.py:FUNCTION or package.module:FUNCTION")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise Refused(f"{target!r}: {error}; run it where the module can be imported, or give FILE.py:FUNCTION") from error
    build = getattr(module, name, None)
    if not callable(build):
        raise Refused(f"{target!r}: {place} has no function {name!r}")
    made = build()
    if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], nn.Module):
        raise Refused(f"{target!r}: {name}() must return (model, loss_fn, data), with a torch.nn.Module first")
    return made


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` does
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _load(model: nn.Module, file: str) -> None:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise Refused(f"{file}: no such file") from error
    except Exception as error:  # torch's own errors name no way out
        why = str(error).partition("\n")[0]
        raise Refused(f"{file}: not a checkpoint of tensors and plain types ({why}); save model.state_dict()") from error
    inside = next((state[k] for k in INSIDE if isinstance(state, Mapping) and isinstance(state.get(k), Mapping)), state)
    if not isinstance(inside, Mapping) or not all(isinstance(v, torch.Tensor) for v in inside.values()):
        raise Refused(f"{file}: no state dict of a model; one was looked for at the top and under {', '.join(INSIDE)}")
    try:
        model.load_state_dict(inside)
    except RuntimeError as error:
        raise Refused(f"{file} does not fit {type(model).__name__}: {' '.join(str(error).split())}") from error
