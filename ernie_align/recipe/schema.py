"""The frozen blocks that every stage's recipe is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

Part = Literal[
    "attention",
    "dense_mlp",
    "shared_experts",
    "text_experts",
    "vision_experts",
    "text_router",
    "vision_router",
    "vision_tower",
    "resampler",
    "embeddings",
    "lm_head",
    "norms",
]
PARTS: tuple[str, ...] = get_args(Part)

# LoRA adapts matrices. Norms are vectors; the embeddings are tied to the head in most of the family, so that a merge of
# an adapter on one would silently change the other; and TRL's fused head reads the raw weight past any adapter.
NOT_ADAPTABLE = {
    "embeddings": "the embeddings share their weight with the head in most ERNIE 4.5 models: a merge would change both",
    "lm_head": "the training loss reads the head's weight directly: an adapter on it would never be trained",
    "norms": "norms are vectors: LoRA adapts matrices",
}
ADAPTABLE = tuple(part for part in PARTS if part not in NOT_ADAPTABLE)

# One tensor per layer (experts) or a bare parameter (routers): LoRA has no activation to drop there.
WITHOUT_DROPOUT = ("text_experts", "vision_experts", "text_router", "vision_router")


def fault(at: str, what: str, *, why: str = "", fix: str = "") -> PydanticCustomError:
    """An error at key `at` of the block that raises it; recipe.load gives it its place in the file."""
    return PydanticCustomError("align", "{what}", {"at": at, "what": what, "why": why, "fix": fix})


class Block(BaseModel):
    """A strict, frozen piece of a recipe that knows where in the user's file each of its keys stands."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """`file:line:column  dotted.key` of `key`, or of the block where the user left the key out."""
        return self._places.get(key) or self._places.get("") or key

    def updated(self, **values: Any) -> Self:
        """The same block with other values, judged like any other; its keys stand where they stood."""
        block = type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **values})
        for name in self.__private_attributes__:
            setattr(block, name, getattr(self, name))
        return block


def parse_layers(layers: str | list[int]) -> list[int] | None:
    """`"all"` -> None, `"8-20"` -> [8, ..., 20] (both ends included), `"8-20,25"` and lists -> as written."""
    if isinstance(layers, list):
        return layers
    if layers == "all":
        return None
    numbers: list[int] = []
    for piece in layers.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{layers!r} is no set of layers")
        if dash and int(last) < int(first):
            raise ValueError(f"{piece.strip()!r} runs backwards")
        numbers.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    return numbers


def _check_layers(layers: str | list[int] | None) -> str | list[int] | None:
    if layers is None:
        return layers
    try:
        numbers = parse_layers(layers)
    except ValueError as error:
        raise fault("", str(error), fix='write all, a range such as "8-20", or a list of numbers') from None
    if numbers is not None and (not numbers or min(numbers) < 0):
        raise fault("", "no layers" if not numbers else f"layer {min(numbers)} does not exist", fix="count from 0")
    return layers


_Layers = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[int], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "text"),
]


class PartAdapter(Block):
    """Settings of one adapted part; what is left out comes from the adapter block."""

    rank: int | None = Field(None, ge=1, description="Of this part; otherwise adapter.rank")
    alpha: float | None = Field(None, gt=0, description="Of this part; otherwise adapter.alpha")
    layers: _Layers | None = Field(
        None, description="Layers of this part: of the language model, or blocks of the vision tower"
    )

    _layers_are_layers = field_validator("layers")(_check_layers)


class PartTune(Block):
    """Settings of one fully trained part."""

    layers: _Layers | None = Field(
        None, description="Layers of this part: of the language model, or blocks of the vision tower"
    )

    _layers_are_layers = field_validator("layers")(_check_layers)


def _shape(value: Any) -> str:
    return "mapping" if isinstance(value, Mapping) else "text" if isinstance(value, str) else "list"


def _some_scope(scopes: Any) -> Any:
    if not scopes:
        raise fault("", "no part is named", fix="name at least one part, or write all")
    return scopes


class ModelBlock(Block):
    """The base model."""

    name: str = Field(description="Hub id (owner/name) or folder of a checkpoint in transformers' layout")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of the loaded weights; routers stay in float32"
    )
    revision: str = Field("main", description="Branch, tag or commit on the hub; unused for a folder")
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        "sdpa", description="transformers' attn_implementation"
    )


class AdapterBlock(Block):
    """LoRA adapters, scoped to parts of the model."""

    scopes: Annotated[
        Annotated[Literal["all"], Tag("text")]
        | Annotated[list[Part], Tag("list")]
        | Annotated[dict[Part, PartAdapter | None], Tag("mapping")],
        Discriminator(_shape),
    ] = Field(description="Part names, a mapping from part to its own rank, alpha and layers, or all")
    layers: _Layers = Field("all", description='Language-model layers: all, "8-20", or a list')
    rank: int = Field(16, ge=1, description="Of every adapted matrix, and of each expert's")
    alpha: float = Field(32, gt=0, description="An update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="Before the adapter; experts and routers can have none")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead of alpha / rank")
    path: str | None = Field(None, description="Continue from the adapter in this folder instead of a fresh one")

    _layers_are_layers = field_validator("layers")(_check_layers)
    _scopes_name_something = field_validator("scopes")(_some_scope)

    @property
    def parts(self) -> dict[str, PartAdapter]:
        """part -> its settings, in the recipe's order, with the block's rank, alpha and layers filled in."""
        given = self.scopes if isinstance(self.scopes, dict) else dict.fromkeys(self.named)
        return {
            part: (own or PartAdapter()).model_copy(
                update={"rank": (own and own.rank) or self.rank, "alpha": (own and own.alpha) or self.alpha}
            )
            for part, own in given.items()
        }

    @property
    def named(self) -> tuple[str, ...]:
        """The parts in scope; `all` is every part that takes an adapter."""
        return ADAPTABLE if self.scopes == "all" else tuple(self.scopes)

    @model_validator(mode="after")
    def _parts_can_be_adapted(self) -> AdapterBlock:
        for part in self.named:
            if part in NOT_ADAPTABLE:
                raise fault(
                    "scopes",
                    f"{part} takes no adapter",
                    why=NOT_ADAPTABLE[part],
                    fix=f"drop it, or train it in full with stage: sft and tune.scopes: [{part}]",
                )
        bare = [part for part in self.named if part in WITHOUT_DROPOUT]
        if self.dropout and bare:
            raise fault(
                "dropout",
                f"{self.dropout} with scope {', '.join(bare)}",
                why="expert weights are one fused tensor per layer and routers a bare one, where LoRA has no dropout",
                fix=f"set adapter.dropout to 0.0, or drop {', '.join(bare)} from adapter.scopes",
            )
        return self


class TuneBlock(Block):
    """Full fine-tuning: the parts whose own weights are trained."""

    scopes: Annotated[
        Annotated[Literal["all"], Tag("text")]
        | Annotated[list[Part], Tag("list")]
        | Annotated[dict[Part, PartTune | None], Tag("mapping")],
        Discriminator(_shape),
    ] = Field("all", description="Part names, a mapping from part to its own layers, or all")
    layers: _Layers = Field("all", description='Language-model layers: all, "8-20", or a list')

    _layers_are_layers = field_validator("layers")(_check_layers)
    _scopes_name_something = field_validator("scopes")(_some_scope)

    @property
    def parts(self) -> dict[str, PartTune]:
        """part -> its settings, in the recipe's order. `all` is every part."""
        if isinstance(self.scopes, dict):
            return {part: own or PartTune() for part, own in self.scopes.items()}
        return dict.fromkeys(PARTS if self.scopes == "all" else self.scopes, PartTune())


Format = Literal[
    "messages",
    "prompt_completion",
    "sharegpt",
    "alpaca",
    "erniekit",
    "erniekit_vl",
    "preference",
    "sharegpt_preference",
    "alpaca_preference",
    "erniekit_preference",
    "ultrafeedback",
    "prompt",
]


class SourceBlock(Block):
    """One source of rows: a file (or glob) or a data set of the hub."""

    path: str | None = Field(None, description="JSON, JSONL, Parquet or CSV file; a glob names several")
    dataset: str | None = Field(None, description="Hub data set, owner/name")
    config: str | None = Field(None, description="Configuration of the hub data set")
    split: str = Field("train", description="Split of the hub data set")
    format: Format | None = Field(None, description="Of this source; otherwise data.format")
    weight: float = Field(1.0, gt=0, description="Times each row is seen per epoch: 0.5 a random half, 2.0 twice")
    limit: int | None = Field(None, ge=1, description="Use only this many rows, the first ones")

    @property
    def name(self) -> str:
        """What logs and errors call this source."""
        return self.path or f"{self.dataset}:{self.split}"

    @model_validator(mode="after")
    def _one_origin(self) -> SourceBlock:
        if (self.path is None) == (self.dataset is None):
            what = "neither path nor dataset" if self.path is None else "both path and dataset"
            raise fault(
                "path" if self.path else "", what, fix="name a file with path:, or a hub data set with dataset:"
            )
        return self


class DataBlock(Block):
    """Where the rows come from and how they are read."""

    train: list[SourceBlock] = Field(min_length=1, description="Sources of training rows, mixed by their weights")
    eval: list[SourceBlock] = Field(default_factory=list, description="Held-out rows, measured at the end of a run")
    format: Literal["auto"] | Format = Field("auto", description="auto finds the format of each source and names it")
    media_root: str | None = Field(
        None, description="Folder of the images, which paths may not leave; otherwise the folder of the source's file"
    )
    media_folders: list[str] = Field(
        default_factory=list, description="Folders beside it whose images may be read too, such as where links lead"
    )
    allow_urls: Annotated[
        Annotated[bool, Tag("switch")] | Annotated[list[str], Tag("hosts")],
        Discriminator(lambda value: "hosts" if isinstance(value, list) else "switch"),
    ] = Field(
        False, description="Fetch images that rows name by URL: true from public addresses, a list from these hosts"
    )
    max_length: int = Field(4096, ge=8, description="Tokens of a row, image tokens included")
    overlong: Literal["drop", "cut"] = Field(
        "drop",
        description="A row over max_length: drop it, or cut it at a turn (its end; of a pair, the prompt's beginning)",
    )
    thinking: bool = Field(False, description="enable_thinking of the chat template; a row may override it")
    streaming: bool = Field(False, description="Read rows as they are needed; needs training.max_steps")


class RunBlock(Block):
    """Where the run is kept, and its seed."""

    dir: str = Field(description="A new folder for everything the run keeps")
    seed: int = Field(0, ge=0, description="Of the order of rows, fresh adapters, dropout and rollouts")


class Recipe(Block):
    """What was asked. One subclass per stage adds the stage's own blocks."""

    stage: str
    model: ModelBlock
    data: DataBlock
    training: dict[str, Any] = Field(default_factory=dict, description="Keys of the TRL config behind the stage")
    run: RunBlock

    _given: str = PrivateAttr("")

    # Keys of other stages' recipes, and the stage each belongs to: for the error about a block in the wrong recipe.
    keys_of_other_stages: ClassVar[Mapping[str, str]] = {}

    @property
    def as_given(self) -> str:
        """The user's file, and the overrides of the command line behind it as comments."""
        return self._given

    @classmethod
    def training_model(cls) -> type[BaseModel]:
        """The stage's TRL config as a pydantic model: every key it has, minus those the recipe sets elsewhere."""
        raise AssertionError(f"{cls.__name__} names no TRL config")

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        """Keys of the TRL config that are not set under `training:` -> where they are set, or why they are not."""
        return {}
