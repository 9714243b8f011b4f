"""Which Lanczos fits into the memory that its vectors may take."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_opt.curvature.backend import CannotMeasure
from adaptive_opt.curvature.lanczos import Matvec, Spectrum, lanczos
from adaptive_opt.curvature.questions import Question
from adaptive_opt.curvature.shared_lanczos import Shares, shared_lanczos
from adaptive_opt.curvature.thick_restart import thick_restart_lanczos
from adaptive_opt.curvature.two_pass import two_pass_lanczos

BESIDE = 4  # vectors that Lanczos holds beside its basis and the start
WORTH_RESTARTING = 8  # vectors: with fewer, restarts waste more products than a second pass


def lanczos_within(
    memory: int | None,
    matvec: Matvec,
    start: Tensor,
    num_steps: int,
    *,
    until: Question | None = None,
    shares: Shares | None = None,
) -> Spectrum:
    """`lanczos` with its vectors held to `memory` bytes; the Spectrum's `method` says how.

    The first that fits: the whole basis; a share of it, where `shares` of several processes are given (all must call then, with
    the same memory); the basis on the host, if the operator lives on another device; the basis in half
    precision; a restarted basis of eight vectors or more; no basis (two passes, five vectors with the start). The others need
    four vectors beside their basis. Raises CannotMeasure when not even five vectors fit.
    """
    n, size = start.numel(), start.element_size()
    m = min(num_steps, n)
    if memory is None or (m + BESIDE) * n * size <= memory:
        return lanczos(matvec, start, num_steps, until=until)
    if 5 * n * size > memory:
        raise CannotMeasure(
            f"memory={memory} bytes: Lanczos needs at least five vectors of {n} entries, {5 * n * size} bytes; give more, or "
            "measure one layer's parameters"
        )
    if shares is not None and n >= shares.size and ((m + 1) * -(-n // shares.size) + (BESIDE + 1) * n) * size <= memory:
        # one vector more, while one is gathered
        return shared_lanczos(matvec, start, num_steps, shares, until=until)
    if start.device.type != "cpu":
        return lanczos(matvec, start, num_steps, until=until, device="cpu")
    if size > 2 and m * n * 2 + BESIDE * n * size <= memory:
        return lanczos(matvec, start, num_steps, until=until, dtype=torch.float16)
    rows = memory // (n * size) - BESIDE
    if rows >= WORTH_RESTARTING:
        return thick_restart_lanczos(matvec, start, num_steps, rows, until=until)
    return two_pass_lanczos(matvec, start, num_steps, until=until)
