"""FSDP2: parameters of which each process holds a shard (DTensor), and the whole ones that a replay lends the modules.

Through FSDP2's own hooks there is no second derivative: the first backward pass frees the storage that the second one needs
(docs/design.md, "Several processes"). So the hooks are off inside of a replay, and the modules hold whole parameters: what is
measured there is the plain model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_opt.curvature import whole


def is_sharded(x: object) -> bool:
    return hasattr(x, "device_mesh")  # a DTensor, without importing what only those need who have one


def placed(x: Tensor, like: Tensor) -> Tensor:
    """x laid out as `like` is: this process's shard of it, without communication; x itself where `like` is whole."""
    if not is_sharded(like) or is_sharded(x) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def gathered(tree: Any) -> Any:
    """The same nested plain containers with every sharded tensor whole: to be called on all processes."""
    if isinstance(tree, Tensor):
        return whole(tree)
    if isinstance(tree, dict):
        return {k: gathered(v) for k, v in tree.items()}
    return type(tree)(gathered(v) for v in tree) if isinstance(tree, (list, tuple)) else tree


def fsdp_states(modules: Sequence[nn.Module]) -> list[Any]:
    """FSDP2's own state of each module that `fully_shard` was called on."""
    return [m._get_fsdp_state() for m in _of_class("FSDPModule", modules)]


def first_fsdp(model: nn.Module) -> str | None:
    """The name of FSDP2's predecessor's class, if it wraps a part of this model."""
    return next((type(m).__name__ for m in _of_class("FullyShardedDataParallel", model.modules())), None)


def _of_class(name: str, modules: Iterable[nn.Module]) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has no such module
    kind = getattr(fsdp, name, ())
    return [m for m in modules if isinstance(m, kind)]


def refusal(model: nn.Module) -> str | None:
    """Why a model with sharded parameters cannot be replayed whole, or None."""
    sharded = [p for p in model.parameters() if is_sharded(p)]
    if not sharded:
        return None
    states = fsdp_states(list(model.modules()))
    if not states:
        return "the parameters are DTensors of no FSDP2 module (tensor parallel?): only fully_shard's can be replayed"
    mesh, layout = sharded[0].device_mesh, sharded[0].placements  # type: ignore[attr-defined]
    if not all(p.device_mesh == mesh for p in sharded):  # type: ignore[attr-defined]
        return "the parameters are sharded over several meshes"
    if mesh.ndim > 2 or (mesh.ndim == 2 and not layout[0].is_replicate()):
        return f"the parameters are laid out as {layout}: only (shard) and (replicate, shard) can be replayed"
    if mesh.ndim == 2 and mesh.size() != torch.distributed.get_world_size():
        return f"the mesh {tuple(mesh.shape)} has {mesh.size()} of {torch.distributed.get_world_size()} processes"
    cast = next((s._mp_policy.param_dtype for s in states if s._mp_policy.param_dtype is not None), None)
    if cast is not None:
        return f"MixedPrecisionPolicy(param_dtype={cast}): a replay of the whole parameters would run in another precision"
    return None


@contextmanager
def lent_whole(params: Sequence[Tensor], modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, the modules hold whole parameters and FSDP2's hooks are off; yields those that stand for `params`.

    Gathering them takes the memory of the whole model, and every process must come here.
    """
    if not any(map(is_sharded, params)):
        yield list(params)
        return
    kept = [(m, dict(m._parameters)) for m in modules if any(map(is_sharded, m._parameters.values()))]
    lent: dict[int, Tensor] = {}
    with torch.no_grad():
        for _, parameters in kept:
            for p in parameters.values():
                if is_sharded(p) and p is not None and id(p) not in lent:
                    lent[id(p)] = nn.Parameter(whole(p.detach()), p.requires_grad)
    if any(is_sharded(p) and id(p) not in lent for p in params):
        raise RuntimeError("FSDP2 parameters are not where they were sharded: is set_reshard_after_backward(False) in use?")
    handles = [h for s in fsdp_states(modules) for h in (s._pre_forward_hook_handle, s._post_forward_hook_handle)]
    hooks = [(hook_dict, dict(hook_dict)) for h in handles for hook_dict in _hook_dicts(h)]
    try:
        for m, parameters in kept:
            m._parameters.update({k: lent.get(id(p), p) for k, p in parameters.items()})  # type: ignore[arg-type]
        for h in handles:
            for single in getattr(h, "handles", (h,)):
                (single.hooks_dict_ref() or {}).pop(single.id, None)
        yield [lent.get(id(p), p) for p in params]
    finally:
        for m, parameters in kept:
            m._parameters.update(parameters)
        for hook_dict, before in hooks:
            hook_dict.clear()
            hook_dict.update(before)


def _hook_dicts(handle: Any) -> list[dict[int, Any]]:
    found = [single.hooks_dict_ref() for single in getattr(handle, "handles", (handle,))]
    return [d for d in found if d is not None]
