"""The frozen blocks of which every stage's recipe consists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, model_validator
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

# part -> why LoRA cannot adapt it
NOT_ADAPTABLE = {
    "embeddings": "most ERNIE 4.5 models tie the embeddings to the head: merging an adapter would change both",
    "lm_head": "TRL's fused loss reads the head's weight directly: an adapter on it would never be trained",
    "norms": "norms are vectors: LoRA adapts matrices",
}
ADAPTABLE = tuple(part for part in PARTS if part not in NOT_ADAPTABLE)

# Experts are one fused tensor per layer and routers a bare parameter: LoRA has no activation to drop there.
WITHOUT_DROPOUT = ("text_experts", "vision_experts", "text_router", "vision_router")


def fault(at: str, what: str, *, why: str = "", fix: str = "") -> PydanticCustomError:
    """Make the error that a block's validator raises about its key `at`; recipe.load adds the position in the file."""
    return PydanticCustomError("align", "{what}", {"at": at, "what": what, "why": why, "fix": fix})


class Block(BaseModel):
    """A strict, frozen part of a recipe that knows the position of each of its keys in the user's file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """Return `file:line:column  dotted.key` of `key`, or of the block if the user left the key out."""
        return self._places.get(key) or self._places.get("") or key

    def updated(self, **values: Any) -> Self:
        """Return a validated copy with other values; its keys keep their positions in the file."""
        block = type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **values})
        for name in self.__private_attributes__:
            setattr(block, name, getattr(self, name))
        return block


def parse_layers(layers: str | list[int]) -> list[int] | None:
    """Return the layer numbers: "8-20" -> [8, ..., 20] with both ends, "8-20,25" and lists as written, "all" -> None.

    Raises ValueError if the text names no layers.
    """
    if isinstance(layers, list):
        return layers
    if layers == "all":
        return None
    numbers: list[int] = []
    for piece in layers.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{layers!r} does not name layers")
        if dash and int(last) < int(first):
            raise ValueError(f"the range {piece.strip()!r} ends before it begins")
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
        what = f"layer {min(numbers)} does not exist" if numbers else "no layers are listed"
        raise fault("", what, fix="layers count from 0")
    return layers


def scalar_or_list(scalar: type, item: type) -> Any:
    """Return the type of a key that holds a scalar or a list. A plain union would report the faults of both."""
    return Annotated[
        Annotated[scalar, Tag("scalar")] | Annotated[list[item], Tag("list")],
        Discriminator(lambda value: "list" if isinstance(value, list) else "scalar"),
    ]


_Layers = Annotated[scalar_or_list(str, int), AfterValidator(_check_layers)]
_PART_LAYERS = "Language-model layers, or blocks of the vision tower, of this part"


class PartAdapter(Block):
    """Settings of one adapted part; missing ones come from the adapter block."""

    rank: int | None = Field(None, ge=1, description="Rank for this part; default: adapter.rank")
    alpha: float | None = Field(None, gt=0, description="Alpha for this part; default: adapter.alpha")
    layers: _Layers | None = Field(None, description=_PART_LAYERS)


class PartTune(Block):
    """Settings of one fully trained part."""

    layers: _Layers | None = Field(None, description=_PART_LAYERS)


def _check_scopes(scopes: Any) -> Any:
    if not scopes:
        raise fault("", "no part is listed", fix="list at least one part, or write all")
    return scopes


def _scopes(settings: type[Block]) -> Any:
    """Return the type of `scopes`: all, a list of parts, or a mapping from part to its settings."""
    kinds = {str: "text", dict: "mapping"}
    return Annotated[
        Annotated[Literal["all"], Tag("text")]
        | Annotated[list[Part], Tag("list")]
        | Annotated[dict[Part, settings | None], Tag("mapping")],
        Discriminator(lambda value: kinds.get(type(value), "list")),
        AfterValidator(_check_scopes),
    ]


class ModelBlock(Block):
    """The base model."""

    name: str = Field(description="Hub id (owner/name) or folder of a checkpoint in transformers' layout")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Dtype of weights; routers stay in float32")
    revision: str = Field("main", description="Branch, tag or commit on the hub; ignored for a folder")
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        "sdpa", description="transformers' attn_implementation"
    )


class AdapterBlock(Block):
    """LoRA adapters, scoped to parts of the model."""

    scopes: _scopes(PartAdapter) = Field(description="Part names, or all, or part: {rank, alpha, layers} for each part")
    layers: _Layers = Field("all", description='Language-model layers: all, "8-20", or a list')
    rank: int = Field(16, ge=1, description="LoRA rank of every adapted matrix; each expert has its own")
    alpha: float = Field(32, gt=0, description="The LoRA update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter; must be 0 for experts and routers")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead of alpha / rank")
    path: str | None = Field(None, description="Continue training the adapter in this folder instead of a new one")

    @property
    def parts(self) -> dict[str, PartAdapter]:
        """part -> its settings, in the recipe's order, with the block's rank and alpha filled in."""
        settings = self.scopes if isinstance(self.scopes, dict) else dict.fromkeys(self.part_names)
        return {
            part: (setting or PartAdapter()).model_copy(
                update={
                    "rank": (setting and setting.rank) or self.rank,
                    "alpha": (setting and setting.alpha) or self.alpha,
                }
            )
            for part, setting in settings.items()
        }

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts in scope; `all` means every part that can be adapted."""
        return ADAPTABLE if self.scopes == "all" else tuple(self.scopes)

    @model_validator(mode="after")
    def _parts_can_be_adapted(self) -> AdapterBlock:
        for part in self.part_names:
            if part in NOT_ADAPTABLE:
                raise fault(
                    "scopes",
                    f"{part} cannot be adapted",
                    why=NOT_ADAPTABLE[part],
                    fix=f"remove it, or train its own weights with stage: sft and tune.scopes: [{part}]",
                )
        without_dropout = [part for part in self.part_names if part in WITHOUT_DROPOUT]
        if self.dropout and without_dropout:
            raise fault(
                "dropout",
                f"{self.dropout} with scope {', '.join(without_dropout)}",
                why="experts are one fused tensor per layer and routers a bare one: LoRA cannot apply dropout there",
                fix=f"set adapter.dropout to 0.0, or remove {', '.join(without_dropout)} from adapter.scopes",
            )
        return self


class TuneBlock(Block):
    """Full fine-tuning of the listed parts: their own weights are trained."""

    scopes: _scopes(PartTune) = Field("all", description="Part names, or all, or part: {layers} for each part")
    layers: _Layers = Field("all", description='Language-model layers: all, "8-20", or a list')

    @property
    def parts(self) -> dict[str, PartTune]:
        """part -> its settings, in the recipe's order. `all` means every part."""
        if isinstance(self.scopes, dict):
            return {part: setting or PartTune() for part, setting in self.scopes.items()}
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
    """One source of rows: a file (or glob), or a dataset on the hub."""

    path: str | None = Field(None, description="JSON, JSONL, Parquet or CSV file, or a glob for several")
    dataset: str | None = Field(None, description="Dataset on the hub, owner/name")
    config: str | None = Field(None, description="Configuration of the hub dataset")
    split: str = Field("train", description="Split of the hub dataset")
    format: Format | None = Field(None, description="Row format of this source; default: data.format")
    weight: float = Field(1.0, gt=0, description="Times each row is seen per epoch: 0.5 is a random half of the rows")
    limit: int | None = Field(None, ge=1, description="Use only the first rows, at most this many")

    @property
    def name(self) -> str:
        """The name of this source in logs and errors."""
        return self.path or f"{self.dataset}:{self.split}"

    @model_validator(mode="after")
    def _one_origin(self) -> SourceBlock:
        if (self.path is None) == (self.dataset is None):
            what = "neither path nor dataset is given" if self.path is None else "both path and dataset are given"
            raise fault("path" if self.path else "", what, fix="write path: for a file, or dataset: for a hub dataset")
        return self


class DataBlock(Block):
    """Sources of rows and how they are read."""

    train: list[SourceBlock] = Field(min_length=1, description="Sources of training rows, mixed by weight")
    eval: list[SourceBlock] = Field(default_factory=list, description="Held-out rows, evaluated at the end of the run")
    format: Literal["auto"] | Format = Field("auto", description="Row format; auto detects it for each source")
    media_root: str | None = Field(
        None, description="Folder of the images, which paths may not leave; default: the folder of the source's file"
    )
    media_folders: list[str] = Field(default_factory=list, description="More folders from which images may be read")
    allow_urls: scalar_or_list(bool, str) = Field(
        False, description="Fetch images that rows give by URL: true allows public addresses, a list only these hosts"
    )
    max_length: int = Field(4096, ge=8, description="Maximum tokens of a row, image tokens included")
    overlong: Literal["drop", "cut"] = Field(
        "drop",
        description="Rows over max_length: drop, or cut after the last answer that fits (prompts: lose oldest turns)",
    )
    thinking: bool = Field(False, description="enable_thinking of the chat template; a row may override it")
    streaming: bool = Field(False, description="Read rows on demand; requires training.max_steps")


class RunBlock(Block):
    """The run directory and the seed."""

    dir: str = Field(description="New folder for everything that the run writes")
    seed: int = Field(0, ge=0, description="Seed for the order of rows, new adapters, dropout and rollouts")


class Recipe(Block):
    """A validated recipe. One subclass per stage adds the stage's own blocks."""

    stage: str
    model: ModelBlock
    data: DataBlock
    training: dict[str, Any] = Field(default_factory=dict, description="Keys of the stage's TRL config")
    run: RunBlock

    _given: str = PrivateAttr("")

    # Key of another stage's recipe -> what to write instead, for the error about a block in the wrong recipe.
    keys_of_other_stages: ClassVar[Mapping[str, str]] = {}

    @property
    def as_given(self) -> str:
        """The user's file, followed by the overrides of the command line as comments."""
        return self._given

    @classmethod
    def training_model(cls) -> type[BaseModel]:
        """Return the stage's TRL config as a pydantic model, without the keys that the recipe sets elsewhere."""
        raise AssertionError(f"{cls.__name__} has no TRL config")

    @classmethod
    def reserved_training_keys(cls) -> Mapping[str, str]:
        """Return keys of the TRL config that may not be set under `training:` -> where to set them, or why not."""
        return {}
