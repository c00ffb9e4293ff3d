"""Weights that the first process alone reads: the others get the model without them, and their own part of each later.

Eight processes that each read a model of 59 GB would need 8 · 59 GB of the machine's memory. Here the first one reads
it; the others are sent the same model whose parameters are on `meta`: shapes and dtypes that hold nothing. Whoever
cuts the model then gives the weights out, one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.distributed as processes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ernie_align.errors import AlignError, ModelError


def load_on_rank0(read: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """What `read` returns, in the first process; in the others the same model with its parameters on meta.

    Buffers, which are small and computed from the config, are everywhere. All processes call it. Raises what `read`
    raises, and ModelError in the others then.
    """
    if processes.get_rank() == 0:
        try:
            model = read()
        except Exception as error:
            _send(error if isinstance(error, AlignError) else None)
            raise
        _send(to_meta(model))
        return model
    sent = _send(None)
    if isinstance(sent, AlignError):
        raise sent
    if sent is None:
        raise ModelError.at("process 0", "it could not load the model", fix="see what it says")
    return sent


def _send(value: object) -> object:
    values = [value]
    processes.broadcast_object_list(values, src=0)
    return values[0]


def to_meta(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with parameters on meta. None of its weights is copied on the way."""
    return copy.deepcopy(model, {id(weight): _on_meta(weight) for weight in model.parameters()})


def _on_meta(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)


def pop_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model by name, which is left with parameters on meta. None where it has no others."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if not weight.is_meta}
    _replace(model, _on_meta)
    return weights


def scatter_weights(model: nn.Module, weights: dict[str, Tensor], device: torch.device | str) -> None:
    """Fill parameters on meta, whole or cut, from the whole ones of the first process. All processes call it.

    weights: of `take_weights`, in the first process; each is dropped once it is given out. device: where they go. No
    process but the first holds more of another's part than one tensor at a time.
    """
    is_first, names = processes.get_rank() == 0, {id(weight): name for name, weight in model.named_parameters()}

    def filled(weight: nn.Parameter) -> nn.Parameter:
        if is_first:
            whole = weights.pop(names[id(weight)]).to(device).contiguous()
        else:
            whole = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        processes.broadcast(whole, src=0)
        if isinstance(weight, DTensor):
            part = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
            own = torch.empty_like(weight, device=device)
            own.to_local().copy_(part.to_local())  # which may be a view that keeps the whole tensor
            whole = own
        return nn.Parameter(whole, requires_grad=weight.requires_grad)

    _replace(model, filled)


def materialize_trainable(model: nn.Module) -> None:
    """Trained weights that PEFT put on meta, beside their base, are zeros in memory: TRL copies an adapter into another
    one, and checkpoints are read into it. Those of the first process take their place when the model is sharded."""

    def kept(weight: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.zeros_like(weight, device="cpu")) if _is_trained_on_meta(weight) else weight

    _replace(model, kept)


def _is_trained_on_meta(weight: nn.Parameter) -> bool:
    return weight.is_meta and weight.requires_grad


def give_distinct_addresses(model: nn.Module, *, in_float32: bool) -> None:
    """Give each trained parameter on meta an address of its own: one number, seen as the whole.

    in_float32: whoever shards the model next trains float32 copies, and would make them of numbers that are not there.
    """

    def told_apart(weight: nn.Parameter) -> nn.Parameter:
        if not _is_trained_on_meta(weight):
            return weight
        dtype = torch.float32 if in_float32 else weight.dtype
        return nn.Parameter(torch.zeros((), dtype=dtype).expand(weight.shape))

    _replace(model, told_apart)


def _replace(model: nn.Module, by: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put what `by` returns in the place of each parameter, in all places that share it."""
    weights = list(model.named_parameters(remove_duplicate=False))
    others = {id(weight): by(weight) for weight in dict.fromkeys(weight for _, weight in weights)}
    changed = {name: others[id(weight)] for name, weight in weights if others[id(weight)] is not weight}
    # torch's own way to change what a module holds, of which FSDP2 takes note
    model.load_state_dict(changed, assign=True, strict=False)
