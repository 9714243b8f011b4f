"""Experiments: tasks, the loop, and the Hydra entry point train.py."""
