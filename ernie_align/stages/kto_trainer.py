"""TRL's KTOTrainer on labeled completions with images, with a reference that is exact in every mode."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl import KTOTrainer

from ernie_align.data.render import IGNORE_INDEX
from ernie_align.models.image_cache import ImageFeatureCache, find_backbone
from ernie_align.stages.fused_head import fused_head_forward
from ernie_align.stages.trainer import AlignmentTrainer, TrainingMonitor


class UnpairedTrainer(AlignmentTrainer, KTOTrainer):
    """KTOTrainer over encoded rows. TRL's loss code receives finished log-probabilities of policy and reference.

    Arguments are those of AlignmentTrainer and of TRL.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.precompute_ref_logps = True  # from here on, TRL reads the reference from the batch
        # TRL chooses KL completions before training, which fixes the order of rows; UnpairedCollator chooses them
        # within each batch, so rows can be shuffled
        self.args.train_sampling_strategy = "random"

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the rows, which are already encoded."""
        return dataset

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return TRL's loss of a batch, and record TRL's metrics. The reference comes first, before activations."""
        vision_tokens = self.monitor.pop_metadata(inputs)
        images = ImageFeatureCache(frozen=self.vision_is_frozen)
        reference = self._forward(self.ref_model or self.model, self.reference_monitor, inputs, images, vision_tokens)
        ref_logps, ref_kl_logps = self.compute_ref_log_probs(reference, inputs)
        policy = self._forward(model, self.monitor, inputs, images, vision_tokens)
        kl_logps = super()._compute_kl_logps(policy, inputs)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
        outputs = policy(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels)
        inputs = {**inputs, "ref_logps": ref_logps}
        if self.calculate_KL:
            inputs |= {"ref_KL_logps": ref_kl_logps, "KL_logps": kl_logps}
        loss_of = self._unpaired_loss if self.model.training else self._eval_loss
        return self.finish_loss(loss_of(outputs, inputs))

    def _forward(
        self,
        model: nn.Module,
        monitor: TrainingMonitor,
        inputs: dict[str, Tensor],
        images: ImageFeatureCache,
        vision_tokens: int,
    ) -> Callable[..., Any]:
        """Return a forward pass of `model` on matched or KL sequences of this batch, with the images of the batch."""
        unwrapped = self.accelerator.unwrap_model(model)
        scored = fused_head_forward(model, find_backbone(unwrapped))
        pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}

        def forward(*, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> Any:
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **pixels}
            with monitor.check_forward(vision_tokens, input_ids.numel()), images.use(unwrapped):
                return scored(**given, fused_lm_head=True, use_cache=False)

        return forward

    def _compute_kl_logps(self, model, batch):
        """Return the (B,) log-probabilities of the KL completions, computed in compute_loss."""
        return batch.get("KL_logps")

    def _unpaired_loss(self, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """Return TRL's loss from finished outputs and log-probabilities."""
        return super()._compute_loss(lambda **_: outputs, inputs, False)

    def _eval_loss(self, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """Return the loss of the non-padding rows, or zero if there are none; add it and TRL's metrics to the means.

        The KL term is the mean over the non-padding rows of all ranks.
        """
        rows = len(inputs["label"])
        count = self.count_non_padding_rows(rows)
        fields = {name: value for name, value in vars(outputs).items() if torch.is_tensor(value) and value.ndim}
        outputs = SimpleNamespace(**{name: value[:count] for name, value in fields.items() if len(value) == rows})
        names = ("input_ids", "attention_mask", "completion_mask", "label", "ref_logps")
        batch = {name: inputs[name][:count] for name in names}
        if self.calculate_KL:
            kl = (inputs["KL_logps"] - inputs["ref_KL_logps"])[:count].sum()
            total, number = self.accelerator.reduce(torch.stack([kl, kl.new_tensor(count)]), reduction="sum")
            batch |= {"KL_logps": (total / number).view(1), "ref_KL_logps": kl.new_zeros(1)}
        if not count:
            return inputs["ref_logps"].new_zeros(())
        local = self.without_gathering()
        loss = local._unpaired_loss(outputs, batch)
        tokens, desirable = batch["completion_mask"][:, 1:].sum(dim=1), batch["label"].bool()
        weights = {"entropy": tokens.sum()}  # a mean over tokens; TRL's other metrics are means over rows
        for side, of_side in (("chosen", desirable), ("rejected", ~desirable)):
            weights |= dict.fromkeys((f"rewards/{side}", f"logps/{side}"), of_side.sum())
            weights[f"logits/{side}"] = tokens[of_side].sum()
        self.eval_means.add("loss", loss.item(), count)
        for name, (value,) in local._metrics["eval"].items():
            self.eval_means.add(name, value, float(weights.get(name, count)))
        return loss

    def pop_eval_means(self) -> dict[str, float]:
        """Return the means, with the margin between those of all desirable and of all undesirable rows."""
        means = super().pop_eval_means()
        means.pop("rewards/margins", None)
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means
