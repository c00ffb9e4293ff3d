"""Load weights on rank 0 only; the other ranks get the model without weights, and their shard of each weight later.

Eight ranks that each read a model of 59 GB would need 8 · 59 GB of host memory. Here rank 0 reads it, and the others
receive the same model with its parameters on `meta`: shapes and dtypes without storage. Once the model is sharded, the
weights are scattered one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ernie_align.errors import AlignError, ModelError


def load_on_rank0(read: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Return the model that `read` loads on rank 0; on other ranks the same model with its parameters on meta.

    Buffers, which are small and computed from the config, are on all ranks. Call it on all ranks. Raises what `read`
    raises; then the other ranks raise ModelError.
    """
    if dist.get_rank() == 0:
        try:
            model = read()
        except Exception as error:
            _broadcast(error if isinstance(error, AlignError) else None)
            raise
        _broadcast(to_meta(model))
        return model
    received = _broadcast(None)
    if isinstance(received, AlignError):
        raise received
    if received is None:
        raise ModelError.at("rank 0", "it could not load the model", fix="see the error of rank 0")
    return received


def _broadcast(value: object) -> object:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def to_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model with its parameters on meta, without copying a weight."""
    return copy.deepcopy(model, {id(weight): _on_meta(weight) for weight in model.parameters()})


def _on_meta(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)


def pop_weights(model: nn.Module) -> dict[str, Tensor]:
    """Take the weights out of a model, by name, and leave its parameters on meta. Skips those that already are."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if not weight.is_meta}
    _replace(model, _on_meta)
    return weights


def scatter_weights(model: nn.Module, weights: dict[str, Tensor], device: torch.device | str) -> None:
    """Fill parameters on meta, sharded or not, from the full weights on rank 0. Call it on all ranks.

    weights: from `pop_weights`, on rank 0; each one is dropped once it is sent. device: where the parameters go. Other
    ranks hold one full tensor at a time.
    """
    is_rank0, names = dist.get_rank() == 0, {id(weight): name for name, weight in model.named_parameters()}

    def filled(weight: nn.Parameter) -> nn.Parameter:
        if is_rank0:
            value = weights.pop(names[id(weight)]).to(device).contiguous()
        else:
            value = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        dist.broadcast(value, src=0)
        if isinstance(weight, DTensor):
            shard = distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
            value = torch.empty_like(weight, device=device)
            value.to_local().copy_(shard.to_local())  # the shard may be a view, which would keep the full tensor
        return nn.Parameter(value, requires_grad=weight.requires_grad)

    _replace(model, filled)


def materialize_trainable(model: nn.Module) -> None:
    """Replace trained weights on meta by zeros in memory.

    PEFT creates an adapter on meta if its base is there, but TRL copies one adapter into another, and checkpoints are
    loaded into it. Rank 0's weights replace these zeros when the model is sharded.
    """
    _replace_trained_on_meta(model, lambda weight: torch.zeros_like(weight, device="cpu"))


def give_distinct_addresses(model: nn.Module, *, in_float32: bool) -> None:
    """Replace each trained parameter on meta by one number expanded to its shape, so that each has its own address.

    in_float32: the model will be sharded with float32 copies of its trained weights, which cannot be made from meta.
    """

    def expanded(weight: nn.Parameter) -> Tensor:
        return torch.zeros((), dtype=torch.float32 if in_float32 else weight.dtype).expand(weight.shape)

    _replace_trained_on_meta(model, expanded)


def _replace_trained_on_meta(model: nn.Module, by: Callable[[nn.Parameter], Tensor]) -> None:
    _replace(model, lambda weight: nn.Parameter(by(weight)) if weight.is_meta and weight.requires_grad else weight)


def _replace(model: nn.Module, by: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Replace each parameter by what `by` returns, in all modules that share it."""
    weights = list(model.named_parameters(remove_duplicate=False))
    replaced = {id(weight): by(weight) for weight in dict.fromkeys(weight for _, weight in weights)}
    changed = {name: replaced[id(weight)] for name, weight in weights if replaced[id(weight)] is not weight}
    # load_state_dict(assign=True) is the way to replace parameters that FSDP2 supports
    model.load_state_dict(changed, assign=True, strict=False)
