"""The commands of `python -m adaptive_opt`, one a file."""
