"""Load a checkpoint as a bundle of model, tokenizer, processor and architecture, with the routing hooks installed.

Also the versions and the hardware that results depend on.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
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

    model: the transformers model, or the PeftModel once an adapter is attached; files: of its checkpoint; weights: the
    folder its weights were loaded from instead, if any; parallel: its tensor and expert parallelism, if any;
    modality, image_sizes, image_processor: None for a text model; processor: the tokenizer for a text model.
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
        """Copy tokenizer, chat template and processor files byte for byte."""
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
    rank0_loading: bool = False,
) -> Bundle:
    """Load a checkpoint of one of the three families, or an adapter and its base model.

    name: folder or hub id; dtype: of the weights, `auto` for the checkpoint's own (routers and correction biases stay
    float32); where: what an error about the name points at; weights: a folder to load the weights from instead (a
    checkpoint of a run), everything else comes from `name`; parallel: shard the model this way (not for an adapter);
    adapters: with `parallel`, adapters are attached next, and then FSDP2 is applied (distributed.sharding.apply_fsdp);
    rank0_loading: load weights on rank 0 only, and leave them on meta on other ranks until the model is sharded;
    always so with `parallel`.
    Raises ModelError for other models, missing weights, and parameters that differ from the family's architecture.
    """
    import torch.distributed

    from ernie_align.models.packed_attention import install_packed_attention

    name = str(name)
    files = CheckpointFiles(name, revision, where)
    if files.is_adapter:
        return _load_adapter(files, dtype=dtype, attention=attention)
    config = files.read_json("config.json")
    architecture = Architecture.from_config(config, where=where or f"{name}/config.json")
    tokenizer = files.tokenizer()
    read = partial(_load_weights, weights or name, None if weights else revision, architecture, dtype, attention)
    if parallel or rank0_loading:
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
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # in a group of one rank too: DDP wraps the model, and waits for its gradients
            from ernie_align.models.distributed.dummy_vision import install_dummy_vision

            install_dummy_vision(model.model)
    install_packed_attention(model)
    return bundle


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
    # transformers initializes missing weights randomly and continues
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        what = f"{len(absent)} weights are missing or have another shape, for example {absent[0]}"
        raise ModelError.at(name, what, fix="use a complete checkpoint of this model")
    _validate(model, architecture, name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("e_score_correction_bias"):
            parameter.requires_grad_(False)  # from_pretrained sets True; it is not trained by gradient
    return model


def _validate(model: nn.Module, architecture: Architecture, name: str) -> None:
    """Check names and shapes of all parameters against the architecture, on which all scopes depend."""
    actual = {parameter_name: tuple(parameter.shape) for parameter_name, parameter in model.named_parameters()}
    expected = {tensor.name: tensor.shape for tensor in architecture.tensors}
    differing = [key for key in {**expected, **actual} if expected.get(key) != actual.get(key)]
    if differing:
        lines = [f"{key}: expected {expected.get(key, 'none')}, got {actual.get(key, 'none')}" for key in differing]
        fix = "this version of transformers builds the family differently: install the one in constraints.txt"
        raise ModelError(*(Fault(name, line, fix=fix) for line in lines[:5]))


def _load_adapter(files: CheckpointFiles, *, dtype: str, attention: str) -> Bundle:
    from ernie_align.models.expert_lora import load_adapter

    config = files.read_json("adapter_config.json")
    base = config.get("base_model_name_or_path")
    base_files = CheckpointFiles(base or "", config.get("revision"))
    if not base or (base_files.is_folder and not (Path(base) / "config.json").is_file()):
        fix = "run from the folder that this path is relative to, or fix base_model_name_or_path in adapter_config.json"
        raise ModelError.at(files.where or files.name, f"no model at {base!r}, the base of this adapter", fix=fix)
    bundle = load_model(base, dtype=dtype, revision=config.get("revision"), attention=attention, where=files.where)
    bundle.model = load_adapter(bundle.model, files.name, revision=files.revision)
    return bundle


PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def environment() -> dict[str, Any]:
    """Return versions and hardware that affect results."""
    import torch

    from ernie_align.models.pixels import pixel_backend

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "ernie_align": version("ernie-align"),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "pixels_by": pixel_backend(),
    }
