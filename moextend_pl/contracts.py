"""Words that every room of the house shares; plain data only, no networks.

Shape legend used across the project: B batch, S sequence, T = B * S tokens, D width, E experts of the base layer,
N new experts, K experts selected per token, L layers, I images in a batch, P placeholder tokens of one image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import yaml

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a position that is not learned; the value `torch.nn.functional.cross_entropy` ignores."""

PLAN_SCHEMA = 1
PLAN_FILE = "extension_plan.yaml"
INITS = ("copy", "preserving")
ROUTINGS = ("open", "masked", "masked_tokens", "masked_sound")
CALIBRATIONS = ("additive", "multiplicative", "none")
COUNTINGS = ("reference", "paper")


class UserError(ValueError):
    """A mistake that the user can mend; the command line prints it as one sentence and exits with 2."""


@dataclass(frozen=True)
class SampleSpec:
    """What a model asks of its data: one fact in one place, handed to the datamodule by the model.

    Attributes:
        tokenizer: Turns text into ids; must carry a chat template.
        image_token_id: Id on every position that an image feature will fill; may lie outside the vocabulary.
        tokens_per_image: P, number of placeholders one image expands to.
        image_size: Side of the square, in pixels, that images become.
        image_mean: Per channel mean of the pixel values in [0, 1].
        image_std: Per channel standard deviation of the pixel values in [0, 1].
        packing_obstacle: Why the model cannot take rows of several documents; empty if it can.
        context: Longest sequence that the model was made for, in positions; None if it says none.
        resize: How images that are not square become one, see `samples.squares`; `resample` is the filter.
        tiles, thumbnail: How images are cut, see `samples.tiling`, and if thumbnails alone have placeholders (NVLM-H).
        sounds: Folder with the feature extractor of sounds, for a model that hears; `sound_seconds` is the longest one.
        tokens_per_sound: Placeholders that one sound expands to; their id is that of images, and one.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    tokens_per_image: int
    image_size: int
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    packing_obstacle: str = ""
    context: int | None = None
    resize: str = "squash"
    resample: str = "bicubic"
    tiles: str = ""
    thumbnail: bool = False
    sounds: str = ""
    sound_seconds: float = 0.0
    tokens_per_sound: int = 0


@dataclass
class Sample:
    """One conversation, expanded to its final length by the data worker.

    Attributes:
        key: Name of the sample inside its shard set.
        input_ids: (S,) ids; every image, or tile of one, stands as `tokens_per_image` placeholders.
        labels: (S,) ids to predict, `IGNORE_INDEX` where nothing is learned.
        pixel_values: (I, 3, H, W) normalised images in the order of their placeholders.
        image_keys: I names, one an image, equal for equal pictures of one shard set.
        prompt, answer: Texts asked and expected when the sample is used for generation.
        task: Name of the task its shard set belongs to; empty if none was given.
        tiles: (S,) which image each tag (NVLM-X), or placeholder of a thumbnail (NVLM-H), stands for, from 1, else 0.
        sounds, sound_keys: (N, ...) features of sounds in the order of their placeholders, and names; None without any.
    """

    key: str
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor
    image_keys: list[str]
    prompt: str = ""
    answer: str = ""
    task: str = ""
    tiles: Tensor | None = None
    sounds: Tensor | None = None
    sound_keys: list[str] = field(default_factory=list)


class HostFacts(NamedTuple):
    """What a step must know of a batch without asking the device, see `samples.host_facts`."""

    learned: Tensor  # (A,) places among all B * S from which a learned token is predicted
    targets: Tensor  # (A,) ids to predict there
    images: Tensor  # (P,) places among all B * S of image placeholders
    tokens: int  # number of real tokens, image placeholders included
    looked: Tensor | None = None  # (3, B, M) images that words look at, as `host_facts.Looked`, where there are `tiles`
    sounds: Tensor | None = None  # (Q,) places of sound placeholders


class Batch(TypedDict):
    """Collated samples; text-only batches have I = 0, and a tile of an image counts as one.

    Training batches are padded on the right. Generation batches hold prompts only, are padded on the left, and carry
    `prompts` and `answers`. Where rows are packed, each holds several samples, here called documents, and `documents`
    tells which token is whose: document n, counted from 1 over all rows, is sample n - 1 of `keys` and `tasks`. The
    first token of a document is never a label, since nothing of its own document stands before it.
    """

    keys: list[str]  # N samples; N = B but in packed batches
    input_ids: Tensor  # (B, S) int64
    attention_mask: Tensor  # (B, S) int64, 1 on real tokens
    labels: Tensor  # (B, S) int64
    pixel_values: Tensor  # (I, 3, H, W) float32
    image_keys: list[str]  # I
    prompts: NotRequired[list[str]]  # B
    answers: NotRequired[list[str]]  # B
    tasks: NotRequired[list[str]]  # N, names of the tasks that samples belong to
    documents: NotRequired[Tensor]  # (B, S) int64, 0 on padding
    tiles: NotRequired[Tensor]  # (B, S) int64, number of the image that a token stands for, counted over all rows
    sounds: NotRequired[Tensor]  # (U, ...) float32 features of sounds, where there are any
    sound_keys: NotRequired[list[str]]  # U
    known: NotRequired[HostFacts]  # added by the model before the batch leaves the host


@dataclass(frozen=True)
class TrainPlan:
    """Names of the parts that learn in this run; every other parameter is frozen.

    Attributes:
        parts: Names out of the module's `parts()`, for example `projector`, `routers`, `new_experts`.
    """

    parts: tuple[str, ...]


@dataclass(frozen=True)
class LayerGrowth:
    """Growth of one decoder layer.

    Attributes:
        layer: 0-based index that counts decoder layers of the model, dense ones included.
        sources: Experts of the layer that the new ones are copied from; its length is N.
    """

    layer: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class ExtensionPlan:
    """Which layers grow, from which experts, and how the new experts join the routing.

    Attributes:
        layers: Growth of each extended layer, by rising layer index.
        init: `copy` (the paper: a new expert competes with all others) or `preserving` (with its source only, so that
            the function at step 0 is the base's).
        routing: `open` (every token may reach new experts), `masked` (no sequence without an image), `masked_tokens`
            (no other token than an image's) or `masked_sound` (no sequence without a sound).
        calibration: `additive` (the paper's code: a correction added to routing scores), `multiplicative` (its Eq. 10)
            or `none`.
        seed: Seed of the calibration's random weights.
        task: If not empty, masked routing lets only samples of this task reach the new experts. Where a new expert is
            grown from one of an earlier extension and `init` is `preserving`, it serves only what may reach that one.
        report: How the layers were chosen: scores by layer, rule, numbers of samples. Not read back.
    """

    layers: tuple[LayerGrowth, ...]
    init: str = "preserving"
    routing: str = "masked"
    calibration: str = "additive"
    seed: int = 0
    task: str = ""
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("init", INITS), ("routing", ROUTINGS), ("calibration", CALIBRATIONS)):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"Expected `{name}` of the extension plan in {list(allowed)}, got {value!r}.")
        if type(self.task) is not str:  # a number in YAML would be the task of no sample
            raise UserError(f"Expected text as `task` of the extension plan, got {self.task!r}. Put it in quotes.")
        numbers = [self.seed, *(n for growth in self.layers for n in (growth.layer, *growth.sources))]
        if wrong := [n for n in numbers if type(n) is not int]:
            raise UserError(f"Expected `seed`, layers and sources of the extension plan as whole numbers, got {wrong}.")
        indices = [growth.layer for growth in self.layers]
        if indices != sorted(set(indices)):
            raise UserError(f"Expected every layer of the extension plan once and in rising order, got {indices}.")
        for growth in self.layers:
            if growth.layer < 0 or not growth.sources or min(growth.sources) < 0:
                raise UserError(f"Expected a layer >= 0 with at least one source expert >= 0, got {growth}.")

    def same_growth(self, other: ExtensionPlan) -> bool:
        """Tells whether another plan grows a model in the same way, whatever its report says."""
        return replace(self, report={}) == replace(other, report={})

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain lists and numbers, ready for YAML or JSON."""
        data = asdict(self)
        data["layers"] = [{"layer": g.layer, "sources": list(g.sources)} for g in self.layers]
        return {"schema": PLAN_SCHEMA, **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any], origin: str = "extension plan") -> ExtensionPlan:
        """Reads a plan from plain data.

        Args:
            data: As returned by `to_dict`.
            origin: Where the data came from, for the error message.

        Raises:
            UserError: If the schema is unknown, a key is missing or unknown, or a value is not allowed.
        """
        if not isinstance(data, dict) or data.get("schema") != PLAN_SCHEMA:
            got = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise UserError(f"{origin}: expected `schema: {PLAN_SCHEMA}`, got {got!r}. Write the plan anew.")
        body = {key: value for key, value in data.items() if key != "schema"}
        try:
            layers = tuple(LayerGrowth(**{**item, "sources": tuple(item["sources"])}) for item in body.pop("layers"))
            return cls(layers=layers, **body)
        except (KeyError, TypeError) as error:
            raise UserError(f"{origin}: not a valid extension plan ({error}).") from error

    def save(self, path: Path) -> None:
        """Writes the plan as YAML."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> ExtensionPlan:
        """Reads a plan written by `save`.

        Raises:
            UserError: If the file is missing or is not a valid plan.
        """
        if not path.is_file():
            raise UserError(f"Expected an extension plan at {path}, found no file. Run the probe stage first.")
        try:
            text = path.read_text(encoding="utf-8")
            # A few lines of aliases spell out to billions of values; `save` writes none.
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
                raise UserError(f"{path}: expected a plan without aliases (`*name`). Write out what they stand for.")
            data = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path}: not valid YAML ({error}).") from error
        return cls.from_dict(data, origin=str(path))


@dataclass(frozen=True)
class UpcycleSpec:
    """How the MLPs of one part become mixtures of experts (CuMo, arXiv 2405.05949).

    Attributes:
        experts: E, experts that each MLP becomes.
        top_k: K, experts per token.
        layers: Which MLPs, counted from 0 in the order of the blocks; None means all.
        from_scratch: Whether experts start at random and not as copies of the MLP.
        balance: Weight of the balance loss.
        z: Weight of the router z-loss.
        counting: How the balance loss counts: `reference` (the published code: first choices, image by image, then the
            mean over images) or `paper` (as Switch Transformer: all K choices over the batch). Both are 1 if uniform.
        seed: Seed of the routers, and of experts from scratch.
    """

    experts: int = 4
    top_k: int = 2
    layers: tuple[int, ...] | None = None
    from_scratch: bool = False
    balance: float = 0.1
    z: float = 0.01
    counting: str = "reference"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"Expected `top_k` of `upcycle` in 1..{self.experts} (its `experts`), got {self.top_k}.")
        if self.counting not in COUNTINGS:
            raise UserError(f"Expected `counting` of `upcycle` in {list(COUNTINGS)}, got {self.counting!r}.")
        if self.balance < 0 or self.z < 0:
            raise UserError(f"Expected `balance` and `z` of `upcycle` >= 0, got {self.balance} and {self.z}.")

    @classmethod
    def from_dict(cls, data: dict[str, Any] | None) -> UpcycleSpec | None:
        """Reads what `dataclasses.asdict` wrote, lists for tuples; None stays None."""
        if data is None:
            return None
        layers = data.get("layers")
        return cls(**{**data, "layers": None if layers is None else tuple(layers)})


def run_directory(trainer: Any) -> Path:
    """Returns the folder of a run; everything a stage writes lies in it."""
    return Path(trainer.default_root_dir)
