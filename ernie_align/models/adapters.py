"""Scopes -> LoRA adapters or unfrozen weights, and the proof that the trainable weights are exactly those."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ernie_align.errors import ModelError
from ernie_align.models.architecture import Architecture, ParameterSpec
from ernie_align.models.trainable_parts import Target, adapter_targets, tuned_parameters

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn

    from ernie_align.models.load import Bundle
    from ernie_align.recipe import AdapterBlock, TuneBlock


REFERENCE_ADAPTER = "ref"  # TRL's name for the frozen copy of an adapter


def add_reference_adapter(model: PeftModel) -> None:
    """Put a frozen copy of the active adapter beside it: what the policy is held to while it goes on learning."""
    (active,) = model.active_adapters
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config[active])
    for name, parameter in list(model.named_parameters()):
        if f".{active}" in name:
            model.get_parameter(name.replace(f".{active}", f".{REFERENCE_ADAPTER}")).data.copy_(parameter.data)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(f".{REFERENCE_ADAPTER}" not in name)


def unfreeze(bundle: Bundle, block: TuneBlock) -> list[ParameterSpec]:
    """Freeze the model but for the tensors in scope. Returns those; raises ModelError where a scope matches nothing."""
    tensors = tuned_parameters(bundle.architecture, block)
    names = {tensor.name for tensor in tensors}
    for name, parameter in bundle.model.named_parameters():
        parameter.requires_grad_(name in names)
    return tensors


def attach_adapter(bundle: Bundle, block: AdapterBlock) -> list[Target]:
    """Put a fresh adapter (or the one in `block.path`) on the bundle's model, and prove its scope.

    Returns the targets; raises ModelError where a scope matches nothing or the adapter is another one.
    """
    from peft import get_peft_model
    from safetensors import SafetensorError

    from ernie_align.models.distributed.rank0_loading import materialize_trainable
    from ernie_align.models.expert_lora import load_adapter, sort_target_modules

    targets = adapter_targets(bundle.architecture, block)
    if block.path is None:
        config = lora_config(targets, block, bundle.architecture)
        with warnings.catch_warnings():
            # PEFT looks for rank and alpha patterns among modules only, and warns about those of bare parameters,
            # which it does apply (prove() below would notice if it did not)
            warnings.filterwarnings("ignore", message=".*keys did not match any targeted module.*")
            # the adapter remembers which revision of a hub model it belongs to
            revision = None if bundle.files.is_folder else bundle.files.revision
            bundle.model = sort_target_modules(get_peft_model(bundle.model, config, revision=revision))
    else:
        try:
            bundle.model = load_adapter(bundle.model, block.path, is_trainable=True)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError.at(
                block.where("path"), f"no adapter could be loaded from {block.path}: {reason}"
            ) from error
    materialize_trainable(bundle.model)
    validate_adapter(bundle.model, targets, where=block.where("path" if block.path else "scopes"))
    return targets


def lora_config(targets: Iterable[Target], block: AdapterBlock, architecture: Architecture) -> LoraConfig:
    """PEFT's config that names each target in full, so that nothing depends on how PEFT matches suffixes."""
    from peft import LoraConfig

    from ernie_align.models.expert_lora import register_expert_lora

    modules, parameters, ranks, alphas = [], [], {}, {}
    for target in targets:
        name = (
            target.tensor.name
            if _as_parameter(target.tensor, architecture)
            else target.tensor.name.removesuffix(".weight")
        )
        (parameters if _as_parameter(target.tensor, architecture) else modules).append(name)
        if target.rank != block.rank:
            ranks[re.escape(name)] = target.rank
        if target.alpha != block.alpha:
            alphas[re.escape(name)] = target.alpha
    if block.dropout and parameters:
        raise ModelError.at(
            block.where("dropout"),
            f"{block.dropout} with {parameters[0]}",
            why="in this family the dense and shared MLPs are adapted as bare parameters, where LoRA has no dropout",
            fix="set adapter.dropout to 0.0, or scope the adapter to attention",
        )
    config = LoraConfig(
        r=block.rank,
        lora_alpha=block.alpha,
        lora_dropout=block.dropout,
        use_rslora=block.use_rslora,
        target_modules=modules,  # [] and not None: None would mean PEFT's own choice for the architecture
        target_parameters=parameters,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        task_type="CAUSAL_LM",
    )
    return register_expert_lora(config)


def _as_parameter(tensor: ParameterSpec, architecture: Architecture) -> bool:
    """Whether PEFT is told the parameter instead of the module.

    Experts and routers are bare parameters. In the text family PEFT also takes every target module whose name ends in
    gate_proj, up_proj or down_proj for a routed expert of an old layout and rewrites it
    (peft.utils.transformers_weight_conversion maps ernie4_5_moe to qwen2_moe): named as parameters, the dense and
    shared MLPs keep their meaning here and in any plain PEFT that loads the adapter.
    """
    return tensor.kind != "linear" or (architecture.family == "moe" and tensor.part in ("dense_mlp", "shared_experts"))


def validate_adapter(model: PeftModel, targets: Iterable[Target], *, where: str) -> None:
    """The adapter sits on the targets, with their ranks and alphas, and nothing else is trained. Raises ModelError."""
    expected = {target.tensor.name: (target.rank, float(target.alpha)) for target in targets}
    found = adapted_tensors(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter_weights = {name for name, _ in model.named_parameters() if ".lora_" in name}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        name = odd[0]
        should, does = _say(expected.get(name)), _say(found.get(name))
        what = f"{len(odd)} tensors differ from the scope: {name} should be {should}, is {does}"
        raise ModelError.at(where, what, fix="let scopes, layers, rank and alpha say what the adapter is")
    if trained != adapter_weights or not trained:
        name = min(trained ^ adapter_weights, default="nothing")
        what = f"{name} is {'trained' if name in trained else 'not trained'}, against the scope"
        raise ModelError.at(where, what, fix="this is a fault of the toolkit or of PEFT: report it")


def adapted_tensors(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Name of each adapted tensor, as the base model has it -> (rank, alpha) of its active adapter."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, tuple[int, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            base = re.sub(r"\.base_layer", "", name).removeprefix("base_model.model.")
            parameter = getattr(module, "parameter_name", "weight")
            (adapter,) = module.active_adapters
            found[f"{base}.{parameter}"] = (module.r[adapter], float(module.lora_alpha[adapter]))
    return found


def _say(setting: tuple[int, float] | None) -> str:
    return "left alone" if setting is None else f"of rank {setting[0]} and alpha {setting[1]:g}"
