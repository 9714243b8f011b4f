"""What a controller needs to go on bit for bit, as plain types and tensors, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from adaptive_opt.interventions.base import copied
from adaptive_opt.length import StepLength
from adaptive_opt.modes import all_params
from adaptive_opt.records import LayerReading, Reading
from adaptive_opt.sharded import gathered, is_sharded
from adaptive_opt.verify import Trial

PLAIN = ("steps", "mode", "mode_since", "mode_is_treatment", "treatment_cost", "alarm", "last_trust", "said_untreated")
COPIED = ("not_before", "failures", "kappas")
PARTS = {
    "gate": "gate",
    "probe": "memory",
    "signals": "signals",
    "statistics": "statistics",
    "stays": "stays",
    "agreement": "agreement",
    "validation": "validation",
}


def written(control: Any) -> dict[str, Any]:
    """The checkpoint of a Controller; tensors are whole, also where the parameters are shards."""
    state = {
        "version": 1,
        **{name: getattr(control, name) for name in PLAIN},
        **{name: getattr(control, name).copy() for name in COPIED},
        "first_layers": None if control.first_layers is None else [asdict(layer) for layer in control.first_layers],
        "reading": None if control.reading is None else asdict(control.reading),
        "limit": control.limit,
        "trial": None if control.trial is None else control.trial.state_dict(),
        "length": None if control.length is None else control.length.state_dict(),
        "modes": {name: mode.state_dict() for name, mode in control.modes.items()},
        "interventions": {name: i.state_dict() for name, i in control.interventions.items()},
        **{name: getattr(control, part).state_dict() for name, part in PARTS.items()},
    }
    return gathered(state) if any(map(is_sharded, all_params(control.base))) else state


def read(control: Any, state: Mapping[str, Any]) -> None:
    """Put a checkpoint into a Controller; tensors go where the parameters are."""
    state = copied(state, all_params(control.base)[0].device)
    for name in (*PLAIN, *COPIED):
        setattr(control, name, state[name])
    layers = state["first_layers"]
    control.first_layers = None if layers is None else tuple(LayerReading(**layer) for layer in layers)
    control.reading = None if state["reading"] is None else Reading.from_dict(state["reading"])
    control.limit = state.get("limit")  # a checkpoint of before it was kept has none
    control.trial = Trial.from_state_dict(state["trial"])
    control.length = StepLength.from_state_dict(state.get("length"))  # older checkpoints have none
    for name, part in PARTS.items():
        if name in state:  # an older checkpoint lacks some
            getattr(control, part).load_state_dict(state[name])
    for kind, mine in (("modes", control.modes), ("interventions", control.interventions)):
        for name in mine.keys() & state[kind].keys():
            mine[name].load_state_dict(state[kind][name])


def check(state: Mapping[str, Any], modes: Mapping[str, Any]) -> None:
    """Raises ValueError when a checkpoint needs a mode that is not here."""
    if state["mode"] not in modes:
        raise ValueError(
            f"load_state_dict: the checkpoint was written in mode {state['mode']!r}, which is not among modes="
            f"{sorted(modes)}; its moments may be in that mode's basis, so give the mode again"
        )
