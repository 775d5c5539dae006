"""What a model still knows: perplexity and questions on given texts, base beside extended, and how far apart they are.

The base is the extended model whose new experts nobody reaches, which is the base bit for bit; where training changed
the base's own weights, a fresh one is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moextend_pl.evaluation.retention_texts import Row, TextSet, batches, choice_rows, text_rows
from moextend_pl.models.base_model import logits_of
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.moe.usage import RouterRecord
from moextend_pl.samples.packing import attention_inputs
from moextend_pl.training.half_precision import default_dtype

if TYPE_CHECKING:
    from moextend_pl.models.moextend import MoExtend

LENGTH, BATCH_TOKENS = 512, 512  # logits of 2048 tokens of a large vocabulary would take gigabytes
Logits = Callable[[Tensor, Tensor], Tensor]
"""From ids and mask (B, S) to logits (B, S, V)."""


@dataclass
class Knowledge:
    """What a model knows of one file.

    Attributes:
        perplexity: Of the texts; None without texts.
        accuracy: Share of questions whose right end is the most probable; None without questions.
        accuracy_norm: The same with log-probabilities divided by the length of each end in characters.
    """

    perplexity: float | None = None
    accuracy: float | None = None
    accuracy_norm: float | None = None


@dataclass
class Drift:
    """How far the extended model's logits are from the base's, over the counted tokens.

    Attributes:
        identical: Whether all are equal, bit for bit.
        largest: Largest difference of a logit.
        divergence: Mean Kullback-Leibler divergence from base to extended, in nats.
        same_choice: Share of tokens whose most probable token is the same.
        tokens: How many counted.
    """

    identical: bool = True
    largest: float = 0.0
    divergence: float = 0.0
    same_choice: float = 1.0
    tokens: int = 0


@dataclass
class Retention:
    """Base and extended model on one file.

    Attributes:
        name: Of the file.
        base: What the base knows.
        extended: What the extended model knows.
        drift: Between the two.
        chose_new: Share of tokens that chose a new expert in some layer.
        chose_new_by_layer: The same by layer that was extended.
    """

    name: str
    base: Knowledge = field(default_factory=Knowledge)
    extended: Knowledge = field(default_factory=Knowledge)
    drift: Drift = field(default_factory=Drift)
    chose_new: float = 0.0
    chose_new_by_layer: dict[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)


def extended_logits(language: MoELanguageModel) -> Logits:
    """Returns the model as it answers text."""
    return lambda ids, mask: language({"input_ids": ids, "attention_mask": mask})


def closed_logits(language: MoELanguageModel) -> Logits:
    """Returns the model with new experts that no token reaches."""

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        language.close_reach()
        batch: Any = {"input_ids": ids, "attention_mask": mask}
        return logits_of(language.model, {"input_ids": ids, **attention_inputs(language.model, batch)}, None)

    return logits


def keeps_base(model: MoExtend) -> bool:
    """Tells whether a model is its base again where no token reaches a new expert: no weight of the base learned."""
    own = model.base_names()
    changed = any(name in own for name in model.inherited if name.startswith("language."))
    return model.language.upcycle_spec is None and not changed


def base_logits(model: MoExtend) -> Logits:
    """Returns the base of a trained model: the model itself with closed experts, or a fresh one where it learned."""
    return closed_logits(model.language) if keeps_base(model) else untouched_logits(model)


def untouched_logits(model: MoExtend) -> Logits:
    """Returns the base of a trained model as its files hold it, read anew, in the model's type."""
    language, dtype = model.language, next(model.language.model.parameters()).dtype
    base = MoELanguageModel(
        base=str(language.base),
        tokenizer=language.tokenizer_path,
        chat_template=language.chat_template,
        dense=language.dense or language.upcycle_spec is not None,
        compute=language.compute,
    )
    # Built in its type, so that what stays in fp32 there does so here.
    with default_dtype(dtype):
        base.configure_model()
    return extended_logits(base.to(device=model.device, dtype=dtype).eval())


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Puts every part into evaluation mode, and back as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def token_losses(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Returns the negative log-likelihood of each token given those before it, (B, S) float64, 0 for the first."""
    losses = F.cross_entropy(logits_BSV[:, :-1].float().transpose(1, 2), ids_BS[:, 1:], reduction="none")
    return F.pad(losses.double(), (1, 0))


def know(texts: TextSet, tokenizer: Any, logits: Logits, device: torch.device, length: int = LENGTH) -> Knowledge:
    """Measures one model on one file.

    Args:
        texts: The file.
        tokenizer: Of the model.
        logits: The model.
        device: Of the model.
        length: Most tokens of a text that are predicted in a row.
    """
    found = Knowledge()
    rows = text_rows(texts.documents, tokenizer, length)
    if rows:
        sums = _row_losses(rows, logits, device)
        found.perplexity = math.exp(sum(sums) / max(sum(len(row.ids) - row.first for row in rows), 1))
    if texts.choices:
        rows = [row for choice in texts.choices for row in choice_rows(choice, tokenizer)]
        losses = iter(_row_losses(rows, logits, device))
        right = normed = 0
        for choice in texts.choices:
            each = [next(losses) for _ in choice.ends]
            by_length = [loss / max(len(end), 1) for loss, end in zip(each, choice.ends, strict=True)]
            right += each.index(min(each)) == choice.right
            normed += by_length.index(min(by_length)) == choice.right
        found.accuracy, found.accuracy_norm = right / len(texts.choices), normed / len(texts.choices)
    return found


def _row_losses(rows: Sequence[Row], logits: Logits, device: torch.device) -> list[float]:
    """Returns the negative log-likelihood of the counted tokens of each row."""
    found = [0.0] * len(rows)
    for places, ids, mask, counted in batches(rows, BATCH_TOKENS):
        ids, counted = ids.to(device), counted.to(device)
        sums = (token_losses(logits(ids, mask.to(device)), ids) * counted).sum(dim=1).tolist()
        for place, value in zip(places, sums, strict=True):
            found[place] = value
    return found


def drift(
    texts: TextSet, language: MoELanguageModel, base: Logits, length: int = LENGTH
) -> tuple[Drift, float, dict[int, float]]:
    """Compares extended model and base token by token.

    Args:
        texts: The file; of questions each end counts.
        language: The extended model.
        base: The base.
        length: As in `know`.

    Returns:
        The drift, the share of tokens that chose a new expert in some layer, and that share by extended layer.
    """
    rows = text_rows(texts.documents, language.tokenizer, length)
    rows += [row for choice in texts.choices for row in choice_rows(choice, language.tokenizer)]
    added = _added(language)
    found, same, divergence = Drift(), 0.0, 0.0
    chose, by_layer = 0.0, dict.fromkeys(added, 0.0)
    for _, ids, mask, _ in batches(rows, BATCH_TOKENS):
        ids, mask = ids.to(language.device), mask.to(language.device)
        with language.watch.recording() as records:
            after = extended_logits(language)(ids, mask)
        before = base(ids, mask)
        real = mask.bool()
        after, before = after[real].float(), before[real].float()
        found.identical &= torch.equal(after, before)
        found.largest = max(found.largest, (after - before).abs().max().item())
        logs = before.log_softmax(-1), after.log_softmax(-1)
        divergence += (logs[0].exp() * (logs[0] - logs[1])).sum().item()
        same += (after.argmax(-1) == before.argmax(-1)).sum().item()
        found.tokens += int(real.sum())
        new = {record.layer: _is_new(record, added[record.layer])[real.reshape(-1)] for record in records
               if record.layer in added}  # fmt: skip
        for layer, chosen in new.items():
            by_layer[layer] += chosen.sum().item()
        chose += torch.stack(list(new.values())).any(dim=0).sum().item() if new else 0
    count = max(found.tokens, 1)
    found.divergence, found.same_choice = divergence / count, same / count
    return found, chose / count, {layer: value / count for layer, value in by_layer.items()}


def _added(language: MoELanguageModel) -> dict[int, int]:
    """Returns the number of new experts of each extended layer."""
    added: dict[int, int] = {}
    for plan, _ in language.extensions:
        for growth in plan.layers:
            added[growth.layer] = added.get(growth.layer, 0) + len(growth.sources)
    return added


def _is_new(record: RouterRecord, added: int) -> Tensor:
    """Returns which tokens (T,) chose one of the last experts of a layer."""
    return (record.indices >= record.num_experts - added).any(dim=-1)


def measure(
    model: MoExtend, texts: Sequence[TextSet], length: int = LENGTH, base: Logits | None = None
) -> list[Retention]:
    """Measures base and extended model on texts.

    Args:
        model: A trained model.
        texts: Files.
        length: Most tokens of a text that are predicted in a row.
        base: What the model is compared with; None for its own base.
    """
    language, found = model.language, []
    with evaluating(model):
        base = base or base_logits(model)
        for each in texts:
            before = know(each, language.tokenizer, base, model.device, length)
            after = know(each, language.tokenizer, extended_logits(language), model.device, length)
            found.append(Retention(each.name, before, after, *drift(each, language, base, length)))
    language.close_reach()
    return found


def table(found: Sequence[Retention]) -> str:
    """Returns base beside extended, a line for each number."""
    lines = [f"{'texts':<20} {'':<14} {'base':>10} {'extended':>10}"]
    for each in found:
        for name in ("perplexity", "accuracy", "accuracy_norm"):
            before, after = getattr(each.base, name), getattr(each.extended, name)
            if before is not None:
                lines.append(f"{each.name:<20} {name:<14} {before:>10.4f} {after:>10.4f}")
        apart = "identical logits" if each.drift.identical else f"logits up to {each.drift.largest:.3g} apart"
        lines.append(
            f"{each.name:<20} {apart}, the same token first for {each.drift.same_choice:.2%} of {each.drift.tokens:,}; "
            f"{each.chose_new:.2%} chose a new expert"
        )
    return "\n".join(lines) + "\n"
