"""A model block -> a bundle of model, processor and anatomy, routed right and proved complete."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.errors import Fault, ModelError
from ernie_align.models.architecture import Architecture
from ernie_align.models.checkpoint_files import CheckpointFiles
from ernie_align.models.distributed.layout import ParallelLayout
from ernie_align.models.pixels import ImageSizes, load_image_processor
from ernie_align.models.routing import ModalityTokens, install_routing

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, ProcessorMixin
    from transformers.tokenization_utils_tokenizers import TokenizersBackend


@dataclass
class Bundle:
    """A loaded model with everything that belongs to it.

    model: the transformers model, or a PeftModel around it once an adapter is on; files: where it came from; weights:
    the folder its weights came from instead, if one was given; parallel: how it is shared out over the processes;
    modality, image_sizes, image_processor: None for a text model; processor: the tokenizer of a text model.
    """

    model: PreTrainedModel | Any
    architecture: Architecture
    files: CheckpointFiles
    tokenizer: TokenizersBackend
    processor: ProcessorMixin | TokenizersBackend
    modality: ModalityTokens | None = None
    image_sizes: ImageSizes | None = None
    image_processor: Any = None
    weights: str | None = None
    parallel: ParallelLayout | None = None

    def save_processor(self, folder: str) -> None:
        """Tokenizer, chat template and processor files, byte for byte as they came."""
        self.files.copy_processor(folder)


def load_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    attention: str = "sdpa",
    where: str = "",
    weights: str | None = None,
    parallel: ParallelLayout | None = None,
    adapters: bool = False,
    first_reads: bool = False,
) -> Bundle:
    """Load a checkpoint of one of the three families, or an adapter and the base it names.

    name: folder or hub id; dtype: of the weights, `auto` for the checkpoint's own
    (routers and correction biases stay float32); where: what an error
    about the name should point at; weights: a folder to take the weights from instead (a checkpoint of a run), the
    rest coming from `name`; parallel: share the model out over the processes so (no adapter that is already there);
    adapters: they will be put on, and FSDP2 comes after them (models.parallel.spread); first_reads: the weights are on
    the first process alone, and on meta in the others, for whoever shards the model next. With `parallel`, the first
    process alone reads them anyhow.
    Raises ModelError for other models, missing weights, and anything that differs from the family's anatomy.
    """
    from ernie_align.models.packed_attention import install_packed_attention

    name = str(name)
    files = CheckpointFiles(name, revision, where)
    if files.is_adapter:
        return _load_adapter(files, dtype=dtype, attention=attention)
    config = files.read_json("config.json")
    architecture = Architecture.from_config(config, where=where or f"{name}/config.json")
    tokenizer = files.tokenizer()
    read = partial(_load_weights, weights or name, None if weights else revision, architecture, dtype, attention)
    if parallel or first_reads:
        from ernie_align.models.distributed.rank0_loading import load_on_rank0

        model = load_on_rank0(read)
    else:
        model = read()
    if parallel:
        from ernie_align.models.distributed.sharding import shard_model

        shard_model(model, parallel, adapters=adapters, where=where or name)
    bundle = Bundle(model, architecture, files, tokenizer, processor=tokenizer, weights=weights, parallel=parallel)
    if architecture.has_vision:
        from ernie_align.models.processor import build_processor
        from ernie_align.models.token_dispatch import install_token_dispatch

        bundle.modality = ModalityTokens.from_config(config)
        bundle.image_sizes = ImageSizes.from_config(files.image_settings())
        bundle.image_processor = load_image_processor(name, revision)
        bundle.processor = build_processor(name, revision, bundle.image_processor, tokenizer)
        install_routing(model.model)
        install_token_dispatch(model.model.language_model)
        if _is_launched():
            from ernie_align.models.distributed.dummy_vision import install_dummy_vision

            install_dummy_vision(model.model)
    install_packed_attention(model)
    return bundle


def _is_launched() -> bool:
    """One process of a group, if only of one: DDP wraps that one too, and waits for its gradients."""
    import torch.distributed as processes

    return processes.is_available() and processes.is_initialized()


def _load_weights(
    name: str, revision: str | None, architecture: Architecture, dtype: str, attention: str
) -> PreTrainedModel:
    import torch
    import transformers
    from safetensors import SafetensorError

    cls = {
        "dense": transformers.Ernie4_5ForCausalLM,
        "moe": transformers.Ernie4_5_MoeForCausalLM,
        "vl_moe": transformers.Ernie4_5_VLMoeForConditionalGeneration,
    }[architecture.family]
    try:
        model, info = cls.from_pretrained(
            name,
            revision=revision or "main",
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError.at(name, f"the weights could not be loaded: {reason}") from error
    # transformers fills what it does not find with random numbers and goes on
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost:
        what = f"{len(lost)} weights are missing or of another shape, {lost[0]} among them"
        raise ModelError.at(name, what, fix="name a whole checkpoint of this model")
    _prove(model, architecture, name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("e_score_correction_bias"):
            parameter.requires_grad_(False)  # True after from_pretrained, False when built: no gradient belongs here
    return model


def _prove(model: nn.Module, architecture: Architecture, name: str) -> None:
    """The table of parts is the model, name by name and shape by shape: all scopes rest on it."""
    real = {parameter_name: tuple(parameter.shape) for parameter_name, parameter in model.named_parameters()}
    told = {tensor.name: tensor.shape for tensor in architecture.tensors}
    odd = [key for key in {**told, **real} if told.get(key) != real.get(key)]
    if odd:
        lines = [f"{key}: {told.get(key, 'absent')} expected, {real.get(key, 'absent')} found" for key in odd]
        fix = "this version of transformers builds the family differently: install the one in constraints.txt"
        raise ModelError(*(Fault(name, line, fix=fix) for line in lines[:5]))


def _load_adapter(files: CheckpointFiles, *, dtype: str, attention: str) -> Bundle:
    from ernie_align.models.expert_lora import load_adapter

    config = files.read_json("adapter_config.json")
    base = config.get("base_model_name_or_path")
    base_files = CheckpointFiles(base or "", config.get("revision"))
    if not base or (base_files.is_folder and not (Path(base) / "config.json").is_file()):
        fix = (
            "run from the folder that this path is relative to, or mend base_model_name_or_path in adapter_config.json"
        )
        raise ModelError.at(files.where or files.name, f"the adapter's base {base!r} is not here", fix=fix)
    bundle = load_model(base, dtype=dtype, revision=config.get("revision"), attention=attention, where=files.where)
    bundle.model = load_adapter(bundle.model, files.name, revision=files.revision)
    return bundle
