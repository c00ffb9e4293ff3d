"""Forwards of the policy and of its reference on completions, each with the routing of its images watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from ernie_align.data.collate import pad
from ernie_align.data.render import Renderer
from ernie_align.models.image_cache import ImageFeatureCache, find_backbone
from ernie_align.models.routing import ModalityTokens
from ernie_align.stages.fused_head import fused_head_forward
from ernie_align.stages.trainer import AlignmentTrainer
from ernie_align.stages.upo.groups import Group


class WatchedTrainer(AlignmentTrainer, GRPOTrainer):
    """GRPOTrainer whose every forward is watched, and whose reference is where the run began.

    renderer: of the prompts; frozen: the reference of full fine-tuning. Other arguments are AlignmentTrainer's and
    TRL's.
    """

    def __init__(
        self,
        *args: Any,
        renderer: Renderer,
        frozen: nn.Module | None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.renderer = renderer
        self.modality = ModalityTokens.from_config(self.model.config)
        if frozen is not None:
            self.ref_model = self.accelerator.prepare_model(frozen, evaluation_mode=True)
            cast = self.args.cast_lm_head_to_fp32
            add_fused_lm_head(self.ref_model, temperature=self.temperature, cast_lm_head_to_fp32=cast)
        self._forbid_modality_tokens()
        self._latest_logps: Tensor | None = None  # of the forward that was last done

    def _forbid_modality_tokens(self) -> None:
        """An answer ends where the template ends one, and holds no token that would ask for an image."""
        self.eos_token_ids = self.renderer.stop_ids
        modality = sorted(self.modality.ids) if self.modality else []
        if self.use_vllm:
            ours = {"stop_token_ids": self.eos_token_ids, "logit_bias": dict.fromkeys(modality, -100.0)}
            self.vllm_generation.generation_kwargs |= {name: value for name, value in ours.items() if value}
            return
        given = self.generation_kwargs.get("suppress_tokens") or []
        forbidden = sorted({*given, *modality}) or None
        for name, value in (("suppress_tokens", forbidden), ("eos_token_id", self.eos_token_ids)):
            setattr(self.generation_config, name, value)
            self.generation_kwargs[name] = value

    def _vision_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Counted from the images, as the guard wants it: placeholders by their grids, and a start and an end each."""
        grids = inputs.get("image_grid_thw")
        if grids is None:
            return 0
        return sum(self.renderer.vision.tokens(tuple(grid)) + 2 for grid in grids.tolist())

    def _padded(self, rows: Sequence[tuple[Group, int]]) -> dict[str, Any]:
        """TRL's inputs for completions (B of them): prompts padded on the left, answers on the right."""
        device = self.accelerator.device
        prompts = [list(group.example["input_ids"]) for group, _ in rows]
        answers = [group.ids[place] for group, place in rows]
        stops = set(self.renderer.stop_ids)
        counted = [not self.mask_truncated_completions or ids[-1] in stops for ids in answers]
        inputs: dict[str, Any] = {
            "prompt_ids": pad(prompts, self._tokenizer.pad_token_id, left=True),
            "prompt_mask": pad([[1] * len(ids) for ids in prompts], 0, left=True),
            "completion_ids": pad(answers, self._tokenizer.pad_token_id),
            "completion_mask": pad([[int(on)] * len(ids) for on, ids in zip(counted, answers, strict=True)], 0),
            **together([group.pixels for group, _ in rows]),
        }
        inputs = {name: values.to(device) for name, values in inputs.items()}
        if "pixel_values" in inputs:
            inputs["num_images"] = [len(group.pixels.get("image_grid_thw", ())) for group, _ in rows]
        return inputs

    def _logps(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """(B, C) log-probabilities of the completions, as the loss computes them."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "num_images") if name in inputs}
        keep = inputs["completion_ids"].shape[1]
        return self._get_per_token_logps_and_entropies(model, ids, mask, keep, **images)[0]

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        """TRL's forward of a batch, of the policy or of the reference, with the routing watched; the image of several
        completions is encoded once."""
        watch = self.reference_monitor if model is self.ref_model else self.monitor
        inner = self.accelerator.unwrap_model(model)
        images = ImageFeatureCache(frozen=self.vision_is_frozen).use(inner)
        scored = fused_head_forward(model, find_backbone(inner))
        with watch.check_forward(self._vision_tokens(kwargs), input_ids.numel()), images:
            result = super()._get_per_token_logps_and_entropies(scored, input_ids, *args, **kwargs)
        self._latest_logps = result[0]
        return result


def together(pixels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """pixel_values and image_grid_thw of several rows; nothing where none has an image."""
    names = ("pixel_values", "image_grid_thw")
    found = {name: [row[name] for row in pixels if name in row] for name in names}
    return {name: torch.cat(values) for name, values in found.items() if values}
