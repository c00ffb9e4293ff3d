"""Attach LoRA adapters to the parameters in scope, or unfreeze them, and check that exactly those are trained."""

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
    """Add a frozen copy of the active adapter, which is the reference while training continues that adapter."""
    (active,) = model.active_adapters
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config[active])
    for name, parameter in list(model.named_parameters()):
        if f".{active}" in name:
            model.get_parameter(name.replace(f".{active}", f".{REFERENCE_ADAPTER}")).data.copy_(parameter.data)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(f".{REFERENCE_ADAPTER}" not in name)


def unfreeze(bundle: Bundle, block: TuneBlock) -> list[ParameterSpec]:
    """Freeze all parameters except those in scope, and return these. Raises ModelError if a scope matches nothing."""
    tensors = tuned_parameters(bundle.architecture, block)
    names = {tensor.name for tensor in tensors}
    for name, parameter in bundle.model.named_parameters():
        parameter.requires_grad_(name in names)
    return tensors


def attach_adapter(bundle: Bundle, block: AdapterBlock) -> list[Target]:
    """Attach a new adapter (or the one in `block.path`) to the bundle's model, and check its scope.

    Returns the targets; raises ModelError if a scope matches nothing or the adapter in `block.path` differs from it.
    """
    from peft import get_peft_model
    from safetensors import SafetensorError

    from ernie_align.models.expert_lora import load_adapter, sort_target_modules

    targets = adapter_targets(bundle.architecture, block)
    if block.path is None:
        config = lora_config(targets, block, bundle.architecture)
        with warnings.catch_warnings():
            # PEFT looks for rank and alpha patterns among modules only, and warns about those of bare parameters,
            # which it does apply (validate_adapter below would notice if it did not)
            warnings.filterwarnings("ignore", message=".*keys did not match any targeted module.*")
            # PEFT writes the revision of a hub model into the adapter's config
            revision = None if bundle.files.is_folder else bundle.files.revision
            bundle.model = sort_target_modules(get_peft_model(bundle.model, config, revision=revision))
    else:
        try:
            bundle.model = load_adapter(bundle.model, block.path, is_trainable=True)
        except (OSError, ValueError, SafetensorError) as error:
            what = f"no adapter could be loaded from {block.path}: {str(error).splitlines()[0]}"
            raise ModelError.at(block.where("path"), what) from error
    if any(weight.is_meta for weight in bundle.model.parameters()):
        from ernie_align.models.distributed.rank0_loading import materialize_trainable

        materialize_trainable(bundle.model)
    validate_adapter(bundle.model, targets, where=block.where("path" if block.path else "scopes"))
    return targets


def lora_config(targets: Iterable[Target], block: AdapterBlock, architecture: Architecture) -> LoraConfig:
    """Return PEFT's config with the full name of every target, so that it does not depend on PEFT's suffix matching.

    Raises ModelError for dropout on bare parameters, for which PEFT has none.
    """
    from peft import LoraConfig

    from ernie_align.models.expert_lora import register_expert_lora

    modules, parameters, ranks, alphas = [], [], {}, {}
    for target in targets:
        if _is_bare_parameter(target.tensor, architecture):
            name = target.tensor.name
            parameters.append(name)
        else:
            name = target.tensor.name.removesuffix(".weight")
            modules.append(name)
        if target.rank != block.rank:
            ranks[re.escape(name)] = target.rank
        if target.alpha != block.alpha:
            alphas[re.escape(name)] = target.alpha
    if block.dropout and parameters:
        raise ModelError.at(
            block.where("dropout"),
            f"dropout {block.dropout} is not supported on {parameters[0]}",
            why="in this family the dense and shared MLPs are adapted as bare parameters, where PEFT has no dropout",
            fix="set adapter.dropout to 0.0, or scope the adapter to attention",
        )
    config = LoraConfig(
        r=block.rank,
        lora_alpha=block.alpha,
        lora_dropout=block.dropout,
        use_rslora=block.use_rslora,
        target_modules=modules,  # [] and not None: with None PEFT would choose modules by architecture
        target_parameters=parameters,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        task_type="CAUSAL_LM",
    )
    return register_expert_lora(config)


def _is_bare_parameter(tensor: ParameterSpec, architecture: Architecture) -> bool:
    """Return True if PEFT is given the name of the parameter instead of its module.

    Experts and routers are bare parameters. In the text family PEFT also takes every target module whose name ends in
    gate_proj, up_proj or down_proj for a routed expert of an old layout and rewrites it
    (peft.utils.transformers_weight_conversion maps ernie4_5_moe to qwen2_moe): named as parameters, the dense and
    shared MLPs keep their meaning here and in any plain PEFT that loads the adapter.
    """
    return tensor.kind != "linear" or (architecture.family == "moe" and tensor.part in ("dense_mlp", "shared_experts"))


def validate_adapter(model: PeftModel, targets: Iterable[Target], *, where: str) -> None:
    """Check that the adapter covers exactly the targets, with their ranks and alphas, and that only it is trained.

    Raises ModelError.
    """
    expected = {target.tensor.name: (target.rank, float(target.alpha)) for target in targets}
    actual = adapted_tensors(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter_weights = {name for name, _ in model.named_parameters() if ".lora_" in name}
    differing = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    if differing:
        name = differing[0]
        what = (
            f"the adapter differs from the recipe in {len(differing)} tensors: for {name} the recipe has "
            f"{_format_setting(expected.get(name))}, the adapter {_format_setting(actual.get(name))}"
        )
        raise ModelError.at(where, what, fix="write the scopes, layers, rank and alpha of this adapter into the recipe")
    if trained != adapter_weights or not trained:
        name = min(trained ^ adapter_weights, default="no tensor")
        what = f"{name} is {'trained but not in' if name in trained else 'not trained, although it is in'} the adapter"
        raise ModelError.at(where, what, fix="this is a bug of ernie-align or of PEFT: please report it")


def adapted_tensors(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Return name of each adapted tensor in the base model -> (rank, alpha) of its active adapter."""
    from peft.tuners.lora import LoraLayer

    settings: dict[str, tuple[int, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            base = re.sub(r"\.base_layer", "", name).removeprefix("base_model.model.")
            parameter = getattr(module, "parameter_name", "weight")
            (adapter,) = module.active_adapters
            settings[f"{base}.{parameter}"] = (module.r[adapter], float(module.lora_alpha[adapter]))
    return settings


def _format_setting(setting: tuple[int, float] | None) -> str:
    return "no LoRA" if setting is None else f"rank {setting[0]} and alpha {setting[1]:g}"
