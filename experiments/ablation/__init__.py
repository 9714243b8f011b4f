"""What a set of finished runs says: honest statistics over workloads, arms and seeds. `python scripts/ablate.py RUNS_DIR`."""
