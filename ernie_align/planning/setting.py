"""What of a recipe bears on memory and time, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ernie_align.models.architecture import Architecture
from ernie_align.models.trainable_parts import Target
from ernie_align.recipe import Recipe
from ernie_align.stages import STAGES

Strategy = Literal["ddp", "fsdp", "ep", "zero2", "zero3"]
Device = Literal["gpu", "cpu"]

# TRL's and transformers' defaults of the keys that matter here.
_DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "optim": "adamw_torch_fused",
    "num_train_epochs": 3,
}


@dataclass(frozen=True)
class Workload:
    """One recipe on given hardware.

    rows: sequences in a forward that learns, on each device (both sides of a pair count); tokens: of each, at most;
    vision: share of them that are image tokens; scored: share that predicts a trained token; trained: sizes by part, of
    the adapter with LoRA; targets: adapted tensors; copies: of the trained adapter beside it (the reference of one that
    is gone on with); reference: a second whole model is held; drawn: completions of a rollout on each device,
    `generations` of each prompt; padded: rows differ in length; flat: and are laid end to end, each attended by itself;
    shared: a row holds a prompt with both of its answers. LoRA on experts is computed by models.grouped.
    """

    stage: str
    bytes_each: int
    rows: int
    tokens: int
    accumulation: int
    checkpointing: bool
    eager: bool
    optimizer: str
    trained: dict[str, int]
    targets: tuple[Target, ...] | None
    copies: int = 0
    reference: bool = False
    asks_reference: bool = False
    drawn: int = 0
    completion: int = 0
    generations: int = 1
    vision: float = 0.0
    scored: float = 1.0
    steps: int | None = None
    gpus: int = 1
    strategy: Strategy = "ddp"
    base_bits: int = 16
    device: Device = "gpu"
    padded: bool = True
    flat: bool = False
    shared: bool = False

    @classmethod
    def of(cls, recipe: Recipe, architecture: Architecture, *, vision: float) -> Workload:
        """From a recipe and its model's table of parts. Raises ModelError where a scope matches nothing."""
        given = {key: recipe.training.get(key, default) for key, default in _DEFAULTS.items()}
        trained = STAGES[recipe.stage].trained_parameters(recipe, architecture)
        targets = tuple(item for item in trained if isinstance(item, Target))
        sizes: dict[str, int] = {}
        for item in trained:
            part, size = (item.tensor.part, item.tensor.lora_size(item.rank)) if targets else (item.part, item.size)
            sizes[part] = sizes.get(part, 0) + size
        batch = given["per_device_train_batch_size"]
        flat = bool(recipe.training.get("packing") or recipe.training.get("padding_free"))
        steps = recipe.training.get("max_steps")
        setting = cls(
            stage=recipe.stage,
            bytes_each=2 if recipe.model.dtype == "bfloat16" else 4,
            rows=batch,
            tokens=recipe.data.max_length,
            accumulation=given["gradient_accumulation_steps"],
            checkpointing=bool(given["gradient_checkpointing"]),
            eager=recipe.model.attention == "eager",
            optimizer=given["optim"],
            trained=sizes,
            targets=targets or None,
            vision=vision if architecture.has_vision else 0.0,
            steps=steps if isinstance(steps, int) and steps > 0 else None,
            base_bits=8 * (2 if recipe.model.dtype == "bfloat16" else 4),
            flat=flat,
        )
        if flat and setting.eager:  # its scores are of the whole sequence that the batch is laid into
            setting = replace(setting, rows=1, tokens=setting.positions)
        return _with_policy(setting, recipe) if recipe.stage in ("dpo", "upo") else setting

    @property
    def positions(self) -> int:
        """Tokens of a forward that learns, padding included."""
        return self.rows * self.tokens

    @property
    def max_length(self) -> int:
        """data.max_length of such rows."""
        return round(self.tokens * (1 + self.vision) / 2) if self.shared else self.tokens - self.completion

    def of_length(self, max_length: int) -> Workload:
        """The same with another data.max_length."""
        tokens = round(2 * max_length / (1 + self.vision)) if self.shared else max_length + self.completion
        return replace(self, tokens=tokens)

    @property
    def masked(self) -> bool:
        """Attention is given a mask, which rows of one length and rows laid end to end do without."""
        return self.shared or (self.padded and self.rows > 1 and not self.flat)

    @property
    def is_adapter(self) -> bool:
        """LoRA; otherwise the weights themselves are trained."""
        return self.targets is not None

    @property
    def trainable(self) -> int:
        """Values that are trained."""
        return sum(self.trained.values())


def _with_policy(setting: Workload, recipe: Any) -> Workload:
    """Preference stages: pairs of rows, references, rollouts."""
    if recipe.stage == "dpo":
        asks = not recipe.dpo.reference_free and recipe.dpo.reference == "auto"
        setting = replace(setting, asks_reference=asks)
        setting = _with_shared_prompt(setting) if recipe.dpo.shared_prompt else replace(setting, rows=2 * setting.rows)
    else:
        block = recipe.upo
        per_generation = recipe.training.get("steps_per_generation") or setting.accumulation
        setting = replace(
            setting,
            tokens=setting.tokens + block.max_completion_length,
            completion=block.max_completion_length,
            drawn=setting.rows * per_generation,
            generations=block.num_generations,
            asks_reference=block.needs_reference,
        )
    return replace(
        setting,
        copies=int(recipe.continues_adapter),
        reference=recipe.adapter is None and setting.asks_reference,
    )


def _with_shared_prompt(setting: Workload) -> Workload:
    """Images stand in the prompt, so they at least are shared; how much of the text is, no recipe says.

    A share v of max_length tokens: a row has (2 - v) · max_length, of which v / (2 - v) are image tokens.
    """
    longest = round((2 - setting.vision) * setting.tokens)
    return replace(setting, tokens=longest, vision=setting.vision * setting.tokens / longest, shared=True)
