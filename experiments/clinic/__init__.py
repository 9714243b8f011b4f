"""The clinic: sick and healthy runs, and every arm's result on them at equal compute. `python scripts/clinic.py`."""
