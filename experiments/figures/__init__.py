"""The figures of the article "Three Numbers", computed: `python scripts/figures.py`. One file a figure.

Each has `draw(folder) -> Drawn`: it trains what it needs, writes PNGs into the folder, and says what holds and what does not,
with the numbers that it measured.
"""
