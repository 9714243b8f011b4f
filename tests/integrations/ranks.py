"""Real processes of one gloo group, kept for a whole test file: a test hands them a function and gets every rank's result."""

from __future__ import annotations

import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TESTS = Path(__file__).resolve().parents[1]
TIMEOUT = 180  # seconds for one function, also on a busy machine; a rank that waits for another for ever is a failed test


class Ranks:
    """`size` processes. `run(function, *args)` calls it on all of them and returns the list of results, by rank."""

    def __init__(self, size: int):
        self.size = size
        context = mp.get_context("forkserver")  # torch is imported once, for all of them
        context.set_forkserver_preload(["torch", "adaptive_opt.optimizer"])
        self.tasks = [context.Queue() for _ in range(size)]
        self.results = context.Queue()
        store = tempfile.mktemp(prefix="gloo-")
        self.processes = [
            context.Process(target=_serve, args=(rank, size, store, self.tasks[rank], self.results), daemon=True)
            for rank in range(size)
        ]
        before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PYTHONPATH")}
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS / "integrations"), str(TESTS.parent)])
        for process in self.processes:
            process.start()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        found = self.outcomes(function, *args)
        for rank, (ok, value) in enumerate(found):
            assert ok, f"rank {rank}:\n{value}"
        return [value for _, value in found]

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """(it returned, what) or (it raised, its traceback), by rank; a rank that ended without a word is (False, "")."""
        for task in self.tasks:
            task.put((function, args))
        found: dict[int, tuple[bool, Any]] = {}
        waited = 0.0
        while len(found) < self.size:
            try:
                rank, *outcome = self.results.get(timeout=0.5)
                found[rank] = (outcome[0], outcome[1])
            except queue.Empty:
                waited += 0.5
                gone = [r for r, p in enumerate(self.processes) if not p.is_alive() and r not in found]
                found.update(dict.fromkeys(gone, (False, "")))
                if waited > TIMEOUT:
                    self.close()
                    raise AssertionError(f"{function.__name__}: ranks {set(range(self.size)) - found.keys()} hang") from None
        return [found[rank] for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(5)


def _serve(rank: int, size: int, store: str, tasks: Any, results: Any) -> None:
    import warnings

    warnings.simplefilter("error")
    for theirs in (".*find_unused_parameters=True was specified.*", "FSDP2-wrapped module .* returned a view tensor.*"):
        warnings.filterwarnings("ignore", message=theirs)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        function, args = tasks.get()
        try:
            results.put((rank, True, function(*args)))
        except Exception:
            results.put((rank, False, traceback.format_exc()))
