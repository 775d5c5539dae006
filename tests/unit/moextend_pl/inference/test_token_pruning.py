"""Dropping tokens while a prompt is read equals masking them, layer by layer, in a plain loop over eager layers."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny_families import tiny_model
from helpers.tiny_world import make_plan, perturb, tiny_mixtral
from torch import Tensor
from transformers import DynamicCache, MixtralForCausalLM

from moextend_pl.contracts import UserError
from moextend_pl.inference.token_importance import STEPS, TEMPERATURE
from moextend_pl.inference.token_pruning import pruned
from moextend_pl.moe.blocks import decoder_layers
from moextend_pl.moe.extension.growth import grow, new_parameters
from moextend_pl.moe.extension.reach import Reach

LAYERS, FIRST, LAST = 6, 2, 5
BEFORE, PICTURE, BEHIND = 3, 16, 5
SHARES = (1.0, 1.0, 2 / 3, 1 / 3, 0.0, 0.0)  # after each layer
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def model_of(seed: int = 0) -> MixtralForCausalLM:
    return tiny_mixtral(seed=seed, num_hidden_layers=LAYERS)


def prompt(seed: int, before: int = BEFORE, picture: int = PICTURE) -> tuple[Tensor, Tensor]:
    """Returns embeddings of a prompt of random words and a random picture, and where the picture stands."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(1, before + picture + BEHIND, 32, generator=generator)
    is_image = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
    is_image[:, before : before + picture] = True
    return embeddings, is_image


def walked(attention_HNN: Tensor, kept_N: Tensor) -> Tensor:
    """Importance by powers of a matrix in 64 bits, from probabilities that a softmax of a tenth sharpens."""
    logits = attention_HNN.double().log() / TEMPERATURE
    steps = logits.softmax(dim=-1).nan_to_num(0.0)
    starts = kept_N.double() / kept_N.sum()
    return (starts @ torch.linalg.matrix_power(steps, STEPS)).square().mean(dim=0).sqrt()


@torch.no_grad()
def masked_logits(
    model: MixtralForCausalLM, embeddings: Tensor, is_image_N: Tensor, behind: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """The reference: every layer computes all tokens; those that were dropped are only not read any more.

    The last tokens, `behind` of them, come after the prompt and say nothing about what is dropped.
    """
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    tokens, kept_N, read = embeddings.shape[1], torch.ones_like(is_image_N), []
    places = torch.arange(tokens)[None]
    turns = model.model.rotary_emb(embeddings, position_ids=places)
    for number, layer in enumerate(model.model.layers):
        read.append(kept_N)
        closed = torch.ones(tokens, tokens).triu(1).bool() | ~kept_N
        mask = torch.zeros(1, 1, tokens, tokens).masked_fill(closed, torch.finfo(torch.float32).min)
        caught: list[Tensor] = []
        with layer.self_attn.register_forward_hook(lambda _, __, out, caught=caught: caught.append(out[1][0])):
            embeddings = layer(embeddings, attention_mask=mask, position_embeddings=turns, position_ids=places)
        asked = tokens - behind
        scores_N = walked(caught[0][:, :asked, :asked], kept_N[:asked])
        scores_N = torch.cat([scores_N, scores_N.new_zeros(behind)]).masked_fill(~(is_image_N & kept_N), -1)
        stay_N = torch.zeros_like(kept_N)
        stay_N[scores_N.argsort(descending=True)[: int(is_image_N.sum() * SHARES[number])]] = True
        kept_N = (kept_N & ~is_image_N) | (stay_N & is_image_N)
    return model.lm_head(model.model.norm(embeddings))[0, -1], read


@torch.no_grad()
def dropped_logits(model: MixtralForCausalLM, embeddings: Tensor, is_image: Tensor) -> tuple[Tensor, list[Tensor]]:
    with pruned(model, FIRST, LAST, is_image, torch.ones_like(is_image)) as pruning:
        logits = model(inputs_embeds=embeddings, use_cache=True).logits[0, -1]
    return logits, [places[0] for places in pruning.places]


@pytest.mark.parametrize("seed", range(4))
def test_dropping_equals_masking(seed: int) -> None:
    model, (embeddings, is_image) = model_of(seed), prompt(seed)
    expected, read = masked_logits(model, embeddings, is_image[0])
    logits, places = dropped_logits(model, embeddings, is_image)
    for kept_N, places_N in zip(read, places, strict=False):
        assert places_N.tolist() == kept_N.nonzero().flatten().tolist()
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_each_layer_caches_what_the_schedule_says() -> None:
    model, (embeddings, is_image) = model_of(), prompt(0)
    cache = DynamicCache()
    with torch.no_grad(), pruned(model, FIRST, LAST, is_image, torch.ones_like(is_image)):
        model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    lengths = [cache.get_seq_length(layer) for layer in range(LAYERS)]
    assert lengths == [BEFORE + BEHIND + int(PICTURE * share) for share in (1.0, *SHARES[:-1])]


def test_a_model_is_itself_again_afterwards() -> None:
    model, (embeddings, is_image) = model_of(), prompt(0)
    with torch.no_grad():
        before = model(inputs_embeds=embeddings).logits
        dropped, _ = dropped_logits(model, embeddings, is_image)
        assert not torch.allclose(dropped, before[0, -1], atol=1e-4)
        assert torch.equal(model(inputs_embeds=embeddings).logits, before)
        no_image = torch.zeros_like(is_image)
        torch.testing.assert_close(dropped_logits(model, embeddings, no_image)[0], before[0, -1], **CLOSE)


@torch.no_grad()
def generated(model: MixtralForCausalLM, rows: list[tuple[Tensor, Tensor]], **options: int) -> list[list[int]]:
    """Generates 6 tokens for each prompt, padded on the left as a batch."""
    longest = max(embeddings.shape[1] for embeddings, _ in rows)
    embeddings, is_image = (
        torch.cat([torch.cat([part.new_zeros(1, longest - part.shape[1], *part.shape[2:]), part], 1) for part in parts])
        for parts in zip(*rows, strict=True)
    )
    real = torch.stack([torch.arange(longest) >= longest - part.shape[1] for part, _ in rows])
    with pruned(model, FIRST, LAST, is_image, real):
        made = model.generate(
            inputs_embeds=embeddings, attention_mask=real.long(), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, pad_token_id=0, **options,
        )  # fmt: skip
    return made.tolist()


def test_prompts_of_other_lengths_and_pictures_are_answered_as_alone() -> None:
    model = model_of()
    rows = [prompt(0), prompt(1, before=9, picture=4), prompt(2, before=1, picture=0)]
    assert generated(model, rows) == [generated(model, [row])[0] for row in rows]


def test_beams_are_followed_as_alone() -> None:
    model, rows = model_of(), [prompt(0), prompt(1, before=9, picture=4)]
    assert generated(model, rows, num_beams=3) == [generated(model, [row], num_beams=3)[0] for row in rows]


@torch.no_grad()
def test_a_cached_step_reads_what_was_kept() -> None:
    model, (embeddings, is_image) = model_of(), prompt(0)
    step = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(9))
    longer, is_image_N = torch.cat([embeddings, step], dim=1), torch.cat([is_image[0], torch.zeros(1).bool()])
    expected, _ = masked_logits(model, longer, is_image_N, behind=1)
    cache = DynamicCache()
    with pruned(model, FIRST, LAST, is_image, torch.ones_like(is_image)):
        model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        logits = model(inputs_embeds=step, past_key_values=cache, use_cache=True).logits[0, -1]
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("routing", ["open", "masked_tokens"])
def test_new_experts_are_reached_by_the_tokens_that_are_left(routing: str) -> None:
    model, (embeddings, is_image), reach = model_of(), prompt(0), Reach()
    grow(model, make_plan(range(LAYERS), init="copy", routing=routing), reach)
    perturb([parameter for part in new_parameters(model).values() for parameter in part])
    closed, _ = dropped_logits(model, embeddings, is_image)
    reach.set(torch.ones(1, dtype=torch.bool) if routing == "open" else is_image)
    expected, _ = masked_logits(model, embeddings, is_image[0])
    logits, _ = dropped_logits(model, embeddings, is_image)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert not torch.allclose(logits, closed, atol=1e-3)


# Families of the battery whose attention reads all tokens before, in several ways: with norms, by latent vectors.
FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "phimoe",
    "deepseek_v3",
    "ernie4_5_moe",
    "dots1",
]


WHOLE = {"mixtral": {"sliding_window": None}, "phimoe": {"sliding_window": None}}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_drops_as_it_would_mask(family: str) -> None:
    model, (embeddings, is_image) = tiny_model(family, **WHOLE.get(family, {})), prompt(0)
    tokens = embeddings.shape[1]
    with pruned(model, 1, 3, is_image, torch.ones_like(is_image)) as pruning:
        dropped = model(inputs_embeds=embeddings).logits[0, -1]
    read = iter([torch.zeros(tokens).bool().index_fill(0, places[0], True) for places in pruning.places])

    def hide(_: object, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict]:
        mask = torch.ones(tokens, tokens).tril().bool() & next(read) | torch.eye(tokens).bool()
        return args, {**options, "attention_mask": mask[None, None]}

    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(hide, with_kwargs=True)
    assert [places.shape[1] for places in pruning.places] == [24, 24, 16, 8, 8]
    torch.testing.assert_close(dropped, model(inputs_embeds=embeddings).logits[0, -1], **CLOSE)


REFUSED = {
    "mixtral": "others",
    "gpt_oss": "sdpa",
    "jamba": "others",
    "minimax": "others",
    "qwen3_next": "others",
    "afmoe": "others",
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_with_windows_or_states_are_refused(family: str) -> None:
    _, is_image = prompt(0)
    with pytest.raises(UserError, match=REFUSED[family]), pruned(tiny_model(family), 1, 3, is_image, ~is_image):
        pass


def test_a_cache_that_does_not_grow_is_refused() -> None:
    model, (_, is_image) = model_of(), prompt(0)
    model.generation_config.cache_implementation = "static"
    with pytest.raises(UserError, match="cache that grows, got .*static"), pruned(model, 1, 3, is_image, ~is_image):
        pass


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (3, 3), (2, 7)])
def test_a_span_outside_of_the_layers_is_refused(first: int, last: int) -> None:
    _, is_image = prompt(0)
    with pytest.raises(UserError, match="0 <= first < last <= 6"), pruned(model_of(), first, last, is_image, is_image):
        pass
