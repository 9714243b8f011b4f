"""Which folders make the wheel: the library, and the experiments with their configs under a name of their own.

In the clone the experiments are `experiments/` and `configs/`; installed, they are `adaptive_opt_experiments`, and `python -m
adaptive_opt_experiments ...` is what `python experiments/train.py ...` is here. Everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

NAME = "adaptive_opt_experiments"

setup(
    packages=[
        *find_packages(include=["adaptive_opt", "adaptive_opt.*"]),
        NAME,
        *(f"{NAME}.{package}" for package in find_packages("experiments")),
        f"{NAME}.configs",
    ],
    package_dir={NAME: "experiments", f"{NAME}.configs": "configs"},
)
