"""The figures: regret place by place, healed rates, and the share of places within a regret."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..figures.common import BLUE, GREY, ORANGE, save
from .records import Row
from .tables import regrets, standings, wilson

STYLES = {"rules": (BLUE, 2.6), "bare": ("black", 1.8), "human": (ORANGE, 1.8)}  # colour and width of what is looked for first


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """regret.png, healed.png and profile.png; a figure with nothing to show is left out."""
    names = [figure(rows, folder / name) for figure, name in FIGURES]
    return [name for name in names if name]


def regret_map(rows: Sequence[Row], path: Path) -> str:
    found = regrets(rows)
    arms = [s.arm for s in standings(rows)]
    if not found:
        return ""
    table = np.array([[values.get(arm, np.nan) for arm in arms] for values in found.values()]).round(2) + 0.0  # no -0.00
    fig, ax = plt.subplots(figsize=(1.6 + 0.72 * len(arms), 1.3 + 0.24 * len(found)), layout="constrained")
    image = ax.imshow(np.clip(table, 0, 1), aspect="auto", cmap="cividis_r", vmin=0, vmax=1)
    for i, j in np.ndindex(table.shape):
        if np.isfinite(table[i, j]):
            ax.text(
                j,
                i,
                f"{table[i, j]:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if table[i, j] > 0.5 else "black",
            )
    ax.set_xticks(range(len(arms)), arms, rotation=45, ha="right", fontsize=8)
    ax.set_yticks(range(len(found)), [", ".join(place) for place in found], fontsize=8)
    ax.set_title("regret: 0 the best arm of the row, 1 nothing learned\n(the human is not among the arms)", fontsize=9)
    fig.colorbar(image, ax=ax, shrink=0.5)
    return save(fig, path)


def healed(rows: Sequence[Row], path: Path) -> str:
    found = [s for s in standings(rows) if s.sick and s.arm != "bare"]
    if not found:
        return ""
    fig, ax = plt.subplots(figsize=(7, 0.9 + 0.32 * len(found)), layout="constrained")
    for y, s in enumerate(found):
        low, high = wilson(s.healed, s.sick)
        colour = STYLES.get(s.arm, (GREY, 0))[0]
        ax.plot([low, high], [y, y], color=colour, lw=2)
        ax.plot(s.healed / s.sick, y, "o", color=colour)
        ax.annotate(f"{s.healed} of {s.sick}", (high, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
    ax.axvline(0.85, color="0.5", lw=0.8, ls=":")
    ax.set_yticks(range(len(found)), [s.arm for s in found])
    ax.invert_yaxis()
    ax.set_xlim(-0.02, 1.15)
    ax.set_xlabel("share healed of the runs in which the bare base fails\n(bars: Wilson 95 %; dotted: the aim, 85 %)")
    ax.grid(axis="x", alpha=0.3)
    return save(fig, path)


def profile(rows: Sequence[Row], path: Path) -> str:
    found = regrets(rows)
    if not found:
        return ""
    fig, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
    grid = np.linspace(0, 1, 201)
    for i, arm in enumerate(s.arm for s in standings(rows)):
        values = np.array([v[arm] for v in found.values() if arm in v])
        if len(values):
            colour, width = STYLES.get(arm, (plt.get_cmap("tab20")(i), 1.2))
            share = (values[:, None] <= grid).mean(0)
            ax.step(grid, share, where="post", color=colour, lw=width, label=f"{arm} ({len(values)})")
    ax.set_xlabel("regret")
    ax.set_ylabel("share of places with no more")
    ax.set_ylim(0, 1.02)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), title="arm (places)")
    return save(fig, path)


FIGURES = ((regret_map, "regret.png"), (healed, "healed.png"), (profile, "profile.png"))
