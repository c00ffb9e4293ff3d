"""What every trainer watches while it trains: that images reach the vision pool, and that numbers stay finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ernie_align.errors import RunError
from ernie_align.models.distributed.dummy_vision import clear_unused_vision_gradients, find_dummy_vision_backbone
from ernie_align.models.routing_stats import check_routing, count_routed_tokens, find_expert_pools

if TYPE_CHECKING:
    import torch
    from torch import nn

_SHOWN_ROWS = 16


class TrainingMonitor:
    """Composed into a trainer, which tells it about each batch. One per model: a reference has its own.

    row_name: (source, row) -> the row's name, for errors.
    """

    def __init__(self, model: nn.Module, row_name: Callable[[int, int], str]):
        self.blocks = find_expert_pools(model)
        self.backbone = find_dummy_vision_backbone(model)  # None on one process
        self.row_name = row_name
        self.learns = False  # whether a loss since the last step had a gradient of its own
        self.rows: list[tuple[int, int]] = []  # of the step so far

    def take(self, inputs: dict[str, Any]) -> int:
        """Take what is not the model's out of a batch: the names of its rows, and its number of vision tokens."""
        rows, vision_tokens = inputs.pop("rows", None), inputs.pop("vision_tokens", None)
        if rows is not None:
            self.rows += [tuple(row) for row in rows.tolist()]
        return 0 if vision_tokens is None else int(vision_tokens)

    @contextmanager
    def forward(self, vision_tokens: int, tokens: int | None = None) -> Iterator[None]:
        """Around the forward of a batch of so many positions, or around a generation (None).

        Every vision token in the data must reach the vision pool. It costs one hook call per pool and layer, which
        reads a shape, so it watches every batch and not the first. Raises ModelError where a token went astray.
        """
        with count_routed_tokens(self.blocks) as seen:
            yield
        check_routing(seen, vision_tokens=vision_tokens, tokens=tokens)

    def finite(self, value: torch.Tensor | float, what: str, step: int) -> None:
        """Stop the run at a loss or gradient norm that is no number. Raises RunError naming the step and its rows."""
        import math

        number = float(value)
        if math.isfinite(number):
            return
        names = [self.row_name(*row) for row in self.rows[:_SHOWN_ROWS]]
        more = len(self.rows) - len(names)
        rows = "\n    ".join(names + ([f"and {more} more rows"] if more > 0 else []))
        raise RunError.at(
            f"step {step}",
            f"the {what} is {number}",
            why=f"the rows of this step:\n    {rows}",
            fix="mend the rows, then --resume; or begin anew in another run.dir with a lower learning_rate",
        )

    def attach_to_graph(self, loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
        """The loss with a gradient, zero where nothing in scope is on its way.

        A batch of text where only vision parts are trained teaches nothing, and is no reason to stop.
        """
        if not model.training:
            return loss
        self.learns |= loss.requires_grad
        if loss.requires_grad:
            return loss
        return loss + 0 * sum(weight.sum() for weight in model.parameters() if weight.requires_grad)

    def gradient(self, norm: torch.Tensor | float, step: int, model: nn.Module) -> None:
        """The last moment before the optimizer: stop at a norm that is no number, and let nothing move without cause.

        An optimizer takes a gradient of zeros for a reason to go on by its momentum, and to decay the weight.
        """
        self.finite(norm, "gradient", step)
        if self.backbone is not None:
            clear_unused_vision_gradients(self.backbone)
        elif not self.learns:
            model.zero_grad(set_to_none=True)
        self.learns = False
        self.end_step()

    def end_step(self) -> None:
        """Forget the rows of the step."""
        self.rows.clear()
