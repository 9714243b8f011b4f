"""python -m adaptive_opt_experiments [-m] [task=...] ...: what `python experiments/train.py` is in the clone."""

from .train import main

main()
