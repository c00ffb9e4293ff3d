"""A policy and its reference: what dpo and upo train, and the model that it is held to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from ernie_align.errors import RecipeError
from ernie_align.models.adapters import attach, unfreeze
from ernie_align.models.scopes import adapter_targets, tuned_tensors
from ernie_align.recipe import AdapterBlock, Recipe, TuneBlock
from ernie_align.recipe.schema import fault

if TYPE_CHECKING:
    from torch import nn

    from ernie_align.models.anatomy import Anatomy, Tensor
    from ernie_align.models.load import Bundle
    from ernie_align.models.scopes import Target
    from ernie_align.stages.reference import ReferenceLogps


class PolicyRecipe(Recipe):
    """Training of adapters (`adapter:`), or of the parts in `tune.scopes`."""

    adapter: AdapterBlock | None = None
    tune: TuneBlock | None = None

    @model_validator(mode="after")
    def _one_way_to_train(self) -> PolicyRecipe:
        if self.adapter is not None and self.tune is not None:
            raise fault("tune", "both adapter and tune", fix="train adapters, or weights: keep one of the two")
        return self

    @property
    def keeps_adapter(self) -> bool:
        """The policy goes on with an adapter, whose first state is the reference."""
        return self.adapter is not None and self.adapter.path is not None


def scope(recipe: PolicyRecipe, anatomy: Anatomy) -> list[Target] | list[Tensor]:
    """See Stage."""
    return _trained(recipe, lambda block: adapter_targets(anatomy, block), lambda block: tuned_tensors(anatomy, block))


def wrap(recipe: PolicyRecipe, bundle: Bundle) -> list[Target] | list[Tensor]:
    """See Stage."""
    return _trained(recipe, lambda block: attach(bundle, block), lambda block: unfreeze(bundle, block))


def _trained(
    recipe: PolicyRecipe, by_adapter: Callable[[AdapterBlock], Any], by_tune: Callable[[TuneBlock], Any]
) -> Any:
    if recipe.adapter is not None:
        return by_adapter(recipe.adapter)
    if recipe.tune is not None:
        return by_tune(recipe.tune)
    fix = "write adapter: {scopes: [...]} or tune: {scopes: all}, or name an adapter to go on with as model.name"
    raise RecipeError.at(recipe.where("adapter"), "nothing says what is trained", fix=fix)


def frozen_model(recipe: PolicyRecipe, bundle: Bundle) -> nn.Module:
    """The recipe's model once more, routed and shared out like the policy. Of a resumed run too, it is where the run
    began."""
    from ernie_align.models.load import load_model

    block = recipe.model
    reference = load_model(
        block.name,
        dtype=block.dtype,
        revision=block.revision,
        attention=block.attention,
        where=block.where("name"),
        parallel=bundle.parallel,
    )
    return reference.model.requires_grad_(False)


def stored_reference(recipe: PolicyRecipe, bundle: Bundle, run_dir: Path, *, depends_on: str) -> ReferenceLogps:
    """Where the reference's log-probabilities of whole data sets are kept, each asked once.

    depends_on: what they depend on beside the reference's weights and the rows.
    """
    from ernie_align.stages.reference import ReferenceLogps

    fingerprint = bundle.files.fingerprint(recipe.adapter.path if recipe.keeps_adapter else None)
    # a policy that goes on from a checkpoint of full fine-tuning is no longer its own reference
    is_reference = recipe.adapter is not None or bundle.weights is None
    model = f"{fingerprint} {recipe.model.dtype} {depends_on}"
    return ReferenceLogps(run_dir / "reference", model, can_compute=is_reference)
