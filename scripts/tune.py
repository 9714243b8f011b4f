"""python scripts/tune.py [--trials N] [--seeds K] [--search KEY=LOW:HIGH:log KEY=A,B ...] [OVERRIDE ...]

Optuna by ask and tell: searches the named keys of the config (default: base.lr from 1e-5 to 1, logarithmically) for the best
`measure.metric`, the mean over K seeds. The study lies in an SQLite file and goes on where it was stopped: what is done is not
run again. Example:

python scripts/tune.py --trials 20 --study hot experiment=hot --search base.lr=1e-4:10:log policy=base,rules
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hydra import compose, initialize_config_dir  # noqa: E402

from experiments import train  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the config, for every run")
    parser.add_argument("--trials", type=int, default=20, help="in all, those of earlier calls included (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each trial (default %(default)s)")
    parser.add_argument("--search", nargs="+", default=["base.lr=1e-5:1:log"], metavar="KEY=SPACE")
    parser.add_argument("--study", default="tune", help="name of the study and of its folder (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/tune"), help="where tune.db and the runs are (default %(default)s)"
    )
    args = parser.parse_args()
    try:
        import optuna
    except ImportError:
        print('tune: Optuna is not installed: pip install "adaptive-opt[sweeps]"', file=sys.stderr)
        return 1
    if args.trials < 1 or args.seeds < 1:
        parser.error(f"--trials {args.trials} --seeds {args.seeds}: 1 or more")
    try:
        spaces = dict(map(space, args.search))
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    measure = configured(args.overrides).measure
    study = optuna.create_study(
        storage=f"sqlite:///{(args.out / 'tune.db').resolve()}",
        study_name=args.study,
        load_if_exists=True,
        direction="maximize" if measure.higher else "minimize",
        sampler=optuna.samplers.TPESampler(seed=0),
    )
    state = optuna.trial.TrialState
    for left in study.get_trials(states=(state.RUNNING,)):  # of a call that was killed
        study.tell(left.number, state=state.FAIL)
    while len(study.get_trials(states=(state.COMPLETE,))) < args.trials:
        trial = study.ask()
        chosen = {key: suggest(trial, key, what) for key, what in spaces.items()}
        words = [*args.overrides, *(f"{key}={value}" for key, value in chosen.items())]
        value = run(words, args.seeds, args.out / args.study / f"trial{trial.number}")
        study.tell(trial, value if math.isfinite(value) else worst(measure.higher))
        print(f"trial {trial.number}: {' '.join(words[len(args.overrides) :])} -> {measure.metric} {value:.5g}", flush=True)
    print(f"best of {args.trials}: {study.best_params} -> {measure.metric} {study.best_value:.5g}")
    return 0


def space(word: str) -> tuple[str, Any]:
    """`KEY=LOW:HIGH`, `KEY=LOW:HIGH:log` or `KEY=A,B,...`. Raises ValueError that quotes anything else."""
    key, _, what = word.partition("=")
    parts = what.split(":")
    try:
        if key and len(parts) in (2, 3) and parts[2:] in ([], ["log"]):
            low, high = float(parts[0]), float(parts[1])
            if low < high and (low > 0 or len(parts) == 2):
                return key, (low, high, len(parts) == 3)
    except ValueError:
        pass
    if key and len(parts) == 1 and "," in what:
        return key, what.split(",")
    raise ValueError(f"--search {word}: KEY=LOW:HIGH, KEY=LOW:HIGH:log (above 0), or KEY=A,B,...")


def suggest(trial: Any, key: str, what: Any) -> Any:
    if isinstance(what, list):
        return trial.suggest_categorical(key, what)
    return trial.suggest_float(key, what[0], what[1], log=what[2])


def run(words: list[str], seeds: int, folder: Path) -> float:
    """Mean of the metric over the seeds; NaN where a run ended with it."""
    values = []
    for seed in range(seeds):
        cfg = configured([*words, f"seed={seed}", "resume=true", "telemetry=quiet"])
        train.run(cfg, folder / f"seed{seed}")
        value = json.loads((folder / f"seed{seed}" / "metrics.json").read_text())[cfg.measure.metric]
        values.append(math.nan if value is None else value)
    return fmean(values)


def configured(words: list[str]) -> Any:
    with initialize_config_dir(train.CONFIGS, version_base="1.3"):
        return compose("train", words)


def worst(higher: bool) -> float:
    """What a run that ended with NaN is told as."""
    return -1e30 if higher else 1e30


if __name__ == "__main__":
    sys.exit(main())
