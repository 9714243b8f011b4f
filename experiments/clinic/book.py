"""Finished runs, a JSON line each, and the order in which the others are run."""

from __future__ import annotations

import json
import subprocess
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .arms import ARMS
from .records import BASES, Job, Row
from .run import run
from .workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[2]


class Book:
    """The rows of a file. What is in it is not run again, failures included."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]
        self._done = {key(row) for row in self.rows}

    def __contains__(self, job: Job) -> bool:
        return job.key in self._done

    def fill(self, jobs: Iterable[Job], steps: int | None = None, share: float = 1.0) -> Iterator[Row]:
        """Run what is missing, and write each row as soon as it is there. A run that raises is a row with its error.

        steps: gradient-equivalents for each, in place of the workload's own; share: of the workload's own.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        at = revision()
        for job in jobs:
            if job in self:
                continue
            try:
                row = run(job, steps, share)
            except Exception as error:
                row = {**vars(job), "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-5)}
            row = {**row, "revision": at, "date": time.strftime("%Y-%m-%d")}
            self.rows.append(row)
            self._done.add(job.key)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            yield row

    def replace(self, rows: Sequence[Row]) -> None:
        """Write these in place of what the file holds: the same runs, with what is only known beside the others."""
        self.rows = list(rows)
        new = self.path.with_suffix(".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in rows))
        new.replace(self.path)


def key(row: Row) -> tuple[str, str, str, int, str]:
    return row["workload"], row["arm"], row["base"], row["seed"], row["budget"]


def jobs(workloads: Sequence[str], arms: Sequence[str], bases: Sequence[str], seeds: int) -> list[Job]:
    """The most telling first: bare, human and rules over everything, then the others, a seed after another.

    The rules run a second time with as many steps as the bare base: what their price has cost can then be told apart.
    """
    first = [arm for arm in ("bare", "human", "rules") if arm in arms]
    rest = [arm for arm in ARMS if arm in arms and arm not in first]
    out = []
    for some in (first, rest):
        for seed in range(seeds):
            for workload in workloads:
                for base in bases:
                    for arm in some:
                        if arm == "human" and WORKLOADS[workload].human is None:
                            continue
                        out.append(Job(workload, arm, base, seed))
                        if arm == "rules":
                            out.append(Job(workload, arm, base, seed, "steps"))
    return out


def revision() -> str:
    """The last commit that changed the library, with a plus where it is changed since; empty outside of a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words, "--", "adaptive_opt"], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


__all__ = ["ARMS", "BASES", "WORKLOADS", "Book", "Job", "jobs", "key"]
