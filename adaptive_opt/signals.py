"""Signals that are free at every step: what the loss and the gradient norm of this run have been, and what stands out."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from statistics import fmean, median
from typing import Any

from adaptive_opt.records import Trend

WINDOW = 200  # good steps that "what this run has shown" looks back on
LEARNED = 5  # good steps before anything can stand out
JUMP_LOSS, JUMP_GRAD = 3.0, 5.0  # times the largest of the window, which fades; docs/evidence.md, "broken steps"
FADE = 0.98  # what is left of it after a good step: an unstable stretch must not hide a broken batch for 200 steps
RISE = 1.5  # times the running median, by the median of the last five
GAIN = 0.1  # of the first loss: less gain than that after ten steps counts as none, unless the loss is seen to fall
STALL = 40  # observed losses over which progress is judged
STALL_GAIN, STALL_NOISE = 0.01, 0.1  # relative to the loss: less gain than that, and quieter than that
GAINED, LITTLE = 0.2, 0.1  # of the first loss: progress of which half may be lost, or all
LOST_ERRORS = 4.0  # standard errors of a level; docs/evidence.md, "broken steps"
FALLS = 2.0  # standard errors, by which a loss that has gained little yet is seen to fall
MEDIAN_ERROR = 1.2533 * 1.4826  # of a median, times root n, in median absolute deviations, for Gaussian losses
TAIL = 0.1  # of the largest learning rate: a schedule that ends there stands still by its own will


class Signals:
    """Running windows over the losses and gradient norms of good steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.loss_steps: list[int] = []  # whose they are
        self.nats: list[float] = []  # and what loss_fn itself returned there, see Trend
        self.norm_steps: list[int] = []
        self.first_loss: float | None = None  # median of the first ten
        self.best_loss: float | None = None  # lowest running median
        self.peak = 0.0  # the largest learning rate so far

    def judge(
        self,
        step: int,
        loss: float | None,
        grad_norm: float | None,
        lr: float = 1.0,
        held: float = 1.0,
        nats: float = math.inf,
    ) -> Trend:
        """The Trend of a step that has not been taken yet; nothing but the largest learning rate is remembered.

        held: the share of that rate that the step is held at; one held short stands still by itself.
        """
        self.peak = max(self.peak, lr)
        finite = all(x is None or math.isfinite(x) for x in (loss, grad_norm))
        level = median(self.losses[-20:]) if self.losses else None
        return Trend(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            usual_loss=level,
            usual_grad_norm=median(self.norms[-20:]) if self.norms else None,
            finite=finite,
            spike=finite and self._spike(loss, grad_norm),
            stalled=held * lr >= TAIL * self.peak and self._stalled(),
            rising=loss is not None and self._rising(loss),
            lost=self._lost(level),
            nats=nats,
        )

    def remember(self, trend: Trend) -> None:
        """Add a good step to the windows."""
        if trend.loss is not None:
            _push(self.losses, trend.loss)
            _push(self.loss_steps, trend.step)
            _push(self.nats, trend.nats)
            if len(self.losses) == 10 and self.first_loss is None:
                self.first_loss = median(self.losses)
            if len(self.losses) >= 20:
                level = median(self.losses[-20:])
                self.best_loss = level if self.best_loss is None else min(self.best_loss, level)
        if trend.grad_norm is not None:
            _push(self.norms, trend.grad_norm)
            _push(self.norm_steps, trend.step)

    def forget(self, but: int | None = None) -> None:
        """The parameters have moved elsewhere: what was shown before says nothing about the level now.

        but: they went back to where they were before the step `but` was taken: what was shown up to there still holds, or
        the next broken batch would find nothing to stand out from.
        """
        last = -1 if but is None else but
        losses, norms = bisect_right(self.loss_steps, last), bisect_right(self.norm_steps, last)
        self.losses, self.loss_steps, self.nats = self.losses[:losses], self.loss_steps[:losses], self.nats[:losses]
        self.norms, self.norm_steps = self.norms[:norms], self.norm_steps[:norms]
        self.best_loss = median(self.losses[-20:]) if len(self.losses) >= 20 else None

    def since(self, step: int) -> list[float]:
        """The losses of this step and later."""
        return self.losses[bisect_left(self.loss_steps, step) :]

    def _spike(self, loss: float | None, grad_norm: float | None) -> bool:
        if grad_norm is None or len(self.norms) < LEARNED or grad_norm <= JUMP_GRAD * self.norms[-1]:
            return False
        if grad_norm <= JUMP_GRAD * _faded(self.norms):
            return False
        if loss is None or len(self.losses) < LEARNED:
            return True
        if min(self.losses) > 0:
            return loss > JUMP_LOSS * _faded(self.losses)
        most = max(self.losses)
        return loss > most + (JUMP_LOSS - 1) * _size(self.losses, most)

    def _rising(self, loss: float) -> bool:
        if not self.losses:
            return False
        start = self.losses[0]
        if len(self.losses) < 10 or self.first_loss is None:  # the first steps: against the start
            return loss > start + (RISE - 1) * _size(self.losses, start)
        now, before = median([*self.losses[-4:], loss]), self.losses[-24:-4]
        level = median(before)
        if now > level + (RISE - 1) * _size(before, level):
            return True
        no_gain = self.first_loss - now < GAIN * _size(self.losses, self.first_loss)
        return no_gain and not now < level - FALLS * _error(before, level, 5)

    def _stalled(self) -> bool:
        if len(self.losses) < STALL:
            return False
        recent = self.losses[-STALL:]
        old, new = fmean(recent[: STALL // 2]), fmean(recent[STALL // 2 :])
        mean = fmean(recent)
        size = _size(recent, mean)
        if old - new > STALL_GAIN * size:
            return False
        return math.sqrt(fmean((x - mean) ** 2 for x in recent)) <= STALL_NOISE * size

    def _lost(self, level: float | None) -> float:
        """Share of all progress that is gone again at the running median: 0 at the best level, 1 at that of the start.

        Within the noise nothing is lost. Little progress counts only where the loss is above its start again.
        """
        if level is None or self.first_loss is None or self.best_loss is None or len(self.losses) < 20:
            return 0.0
        gained, size = self.first_loss - self.best_loss, _size([self.first_loss, self.best_loss], self.first_loss)
        if gained <= LITTLE * size or level == self.best_loss:
            return 0.0
        lost, recent = (level - self.best_loss) / gained, self.losses[-20:]
        if gained <= GAINED * size and lost <= 1:
            return 0.0
        return lost if level - self.best_loss > LOST_ERRORS * _error(recent, level, len(recent)) else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, list) else v for k, v in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({k: list(v) if isinstance(v, list) else v for k, v in state.items()})
        if "nats" not in state:
            self.nats = [math.inf] * len(self.losses)  # neither did an older version know these
        if len(self.losses) != len(self.loss_steps) or len(self.norms) != len(self.norm_steps):
            self.losses, self.norms, self.loss_steps, self.norm_steps, self.nats = [], [], [], [], []  # nor kept steps


def _faded(values: list[float]) -> float:
    """The largest of them, the older the less: the last one counts whole."""
    most = 0.0
    for value in values:
        most = max(FADE * most, value)
    return most


def _push(window: list[Any], x: float) -> None:
    window.append(x)
    del window[:-WINDOW]


def _error(losses: list[float], level: float, count: int) -> float:
    """Standard error of the median of `count` losses like these around their level, were they Gaussian."""
    return MEDIAN_ERROR * median(abs(x - level) for x in losses) / math.sqrt(count)


def _size(losses: list[float], level: float) -> float:
    """What a change of the loss is measured against: its level while it is positive (cross-entropy, squares, ...).

    A loss that goes below zero has no level of its own; the spread of what was seen takes its place.
    """
    return level if min(losses) > 0 else max(losses) - min(losses)
