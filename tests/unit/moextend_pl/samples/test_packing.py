from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny_world import make_plan, perturb
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from moextend_pl.contracts import IGNORE_INDEX, Batch, Sample, TrainPlan, UpcycleSpec
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.moe.extension.reach import reachable
from moextend_pl.samples.collate import collate_packed, collate_training
from moextend_pl.samples.packing import attention_inputs, packing_obstacle, position_ids, sample_tokens, tokens_beside

DOCUMENTS = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [3, 4, 4, 4, 4, 4, 5]])
SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "n_routed_experts": 4, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0, "num_hidden_layers": 2}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
PACKABLE = {
    "mixtral": {"sliding_window": 4, "router_jitter_noise": 0.0},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3_moe": {},
    "olmoe": {},
    "gpt_oss": {"sliding_window": 4},
    "granitemoe": {},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "deepseek_v3": {**GROUPED, **LATENT, "num_key_value_heads": 4, "head_dim": 4},
    "glm4_moe": GROUPED,
    "dots1": GROUPED,
    "afmoe": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "num_dense_layers": 0},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
}
# transformers has no sdpa for the attention sinks of GPT-OSS.
CASES = [(name, kind) for name in PACKABLE for kind in ("eager", "sdpa") if (name, kind) != ("gpt_oss", "sdpa")]
LEAKING = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
}


def config_of(name, **options):
    return AutoConfig.for_model(name, **{**SMALL, **options})


def test_positions_restart_with_each_document():
    assert position_ids(DOCUMENTS).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 0]]


def test_an_image_opens_its_own_document_only_and_no_padding():
    is_image = torch.zeros(2, 7, dtype=torch.bool)
    is_image[0, 1] = is_image[1, 5] = True
    expected = [[d in (1, 4) for d in row] for row in DOCUMENTS.tolist()]
    assert tokens_beside(is_image, DOCUMENTS).tolist() == expected
    assert not tokens_beside(torch.zeros_like(is_image), DOCUMENTS).any()
    assert tokens_beside(is_image[:, :3], None).tolist() == [True, False]


def test_padding_and_fillers_are_no_tokens_of_samples():
    one = Sample("one", torch.tensor([3, 4, 5]), torch.tensor([IGNORE_INDEX, 4, 5]), torch.zeros(0, 3, 1, 1), [])
    filler = Sample("", torch.tensor([0]), torch.tensor([IGNORE_INDEX]), torch.zeros(0, 3, 1, 1), [])
    assert sample_tokens(collate_training([one, filler], 0)).tolist() == [[True] * 3, [False] * 3]
    packed = collate_packed([[one, filler, one], [filler]], 0)
    assert sample_tokens(packed).tolist() == [[True] * 3 + [False] + [True] * 3, [False] * 7]


def test_an_extension_of_a_task_is_reached_by_the_documents_of_that_task_only():
    is_image = torch.zeros(2, 7, dtype=torch.bool)
    is_image[0, 1] = is_image[0, 3] = is_image[1, 5] = True  # documents 1, 2 and 4
    tasks = ["chart", "photo", "chart", "chart", "chart"]
    expected = [[d in (1, 4) for d in row] for row in DOCUMENTS.tolist()]
    assert reachable("masked", "chart", is_image, tasks, DOCUMENTS).tolist() == expected
    tokens = is_image & torch.tensor(expected)
    assert torch.equal(reachable("masked_tokens", "chart", is_image, tasks, DOCUMENTS), tokens)
    assert not reachable("masked", "chart", is_image, None, DOCUMENTS).any()


def test_padded_batches_keep_their_mask():
    mask = torch.ones(2, 3)
    assert attention_inputs(None, Batch(attention_mask=mask)) == {"attention_mask": mask}


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_masks_that_ask_the_device_for_nothing_hide_padding_as_transformers_does(name, attention):
    torch.manual_seed(0)
    config = config_of(name, **PACKABLE[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    ids, mask = torch.randint(3, 40, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    mask[0, 11:] = 0
    with torch.no_grad():
        own = model(ids, attention_mask=mask, use_cache=False).logits
        ours = model(ids, **attention_inputs(model, Batch(attention_mask=mask), asks=False), use_cache=False).logits
    torch.testing.assert_close(ours[mask.bool()], own[mask.bool()])


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_each_document_of_a_row_is_computed_as_if_alone(name, attention, asks):
    config = config_of(name, **PACKABLE[name])
    assert packing_obstacle(config) == ""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    lengths, ids = [7, 1, 5], torch.randint(3, 40, (1, 16))
    documents = torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor([*lengths, 3]))[None]
    with torch.no_grad():
        packed = model(ids, **attention_inputs(model, Batch(documents=documents), asks), use_cache=False).logits[0]
        alone = [model(part, use_cache=False).logits[0] for part in ids[:, :13].split(lengths, dim=1)]
    torch.testing.assert_close(packed[:13], torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert packed.isfinite().all()


def test_flash_attention_which_takes_no_masks_of_documents_is_no_way_to_pack():
    config = config_of("qwen3_moe", **PACKABLE["qwen3_moe"])
    assert "`attn_implementation: flash_attention_2` does not keep" in packing_obstacle(config, "flash_attention_2")
    assert packing_obstacle(config, "eager") == packing_obstacle(config, "flex_attention") == ""


@pytest.mark.parametrize("name", LEAKING)
def test_models_that_carry_what_they_read_across_documents_are_told_apart(name):
    assert packing_obstacle(config_of(name, **LEAKING[name])).startswith(f"{name} has layers (")


def samples_of(tiny_world, model, kinds):
    """One sample for each letter, `i` or `t`, out of batches of one."""
    samples = []
    for number, kind in enumerate(kinds):
        batch = tiny_world.batch(model, kind, first=3 * number + 1)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        samples.append(Sample(batch["keys"][0], ids, labels, batch["pixel_values"], batch["image_keys"]))
    return samples


def test_a_text_beside_an_image_is_routed_as_by_the_base_and_gives_its_logits(tiny_world):
    world = tiny_world.model(make_plan(routing="masked", init="copy"))
    language = world.language
    perturb([p for part in ("new_experts", "new_routers", "calibration") for p in language.parts()[part]])
    samples = samples_of(tiny_world, world, "titit")
    batch = collate_packed([samples[:3], samples[3:]], pad_id=0)
    base = tiny_world.language()
    with torch.no_grad(), language.watch.recording() as records:
        logits = language(batch, world.embed(batch))
    for number in (1, 3, 5):
        here = batch["documents"] == number
        ids = samples[number - 1].input_ids[None]
        alone = Batch(input_ids=ids, attention_mask=torch.ones_like(ids))
        with torch.no_grad(), base.watch.recording() as expected:
            expected_logits = base(alone)[0]
        for record, base_record in zip(records, expected, strict=True):
            assert torch.equal(record.indices[here.flatten()], base_record.indices)
        torch.testing.assert_close(logits[here], expected_logits, atol=1e-5, rtol=1e-5)
    reached = [(record.indices[(batch["documents"] == 2).flatten()] >= 4).any() for record in records]
    assert any(reached), "no image token reached a new expert: the test would prove nothing"


def extended_model(tiny_world, routing):
    model = tiny_world.model(make_plan(routing=routing), ["projector", "new_experts", "new_routers"])
    # Off their start, where a new expert ties with its source and rounding decides.
    perturb([p for part in ("new_experts", "new_routers", "calibration") for p in model.language.parts()[part]], 0.1)
    return model


def upcycled_model(tiny_world):
    spec = UpcycleSpec(experts=4, top_k=2)
    model = tiny_world.cumo(encoder=spec, projector=spec, language=spec)
    model.train_plan = TrainPlan(("encoder", "projector", "language", "routers"))
    model.configure_model()
    perturb([p for name, p in model.named_parameters() if ".experts." in name or ".gate." in name], 0.1)
    return model.eval()


MODELS = {
    "masked": lambda world: extended_model(world, "masked"),
    "open": lambda world: extended_model(world, "open"),
    "cumo": upcycled_model,
}


@pytest.mark.parametrize("kind", MODELS)
def test_each_sample_has_the_same_loss_packed_and_alone(tiny_world, kind):
    world = MODELS[kind](tiny_world)
    samples = samples_of(tiny_world, world, "tiitit")
    batch = collate_packed([samples[:4], samples[4:]], pad_id=0)
    padded = collate_training(samples, pad_id=0)
    with torch.no_grad():
        packed_losses = losses_by_sample(world.language, batch, world.embed(batch))
        padded_losses = losses_by_sample(world.language, padded, world.embed(padded))
        whole = [world.language.losses(b, world.embed(b), balanced=False).token for b in (batch, padded)]
    torch.testing.assert_close(packed_losses, padded_losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole[0], whole[1], atol=1e-5, rtol=1e-5)


def test_each_text_has_the_same_loss_packed_and_alone_in_qwen3(tiny_world):
    default = AutoConfig.for_model("qwen3_moe")
    of_words = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    sizes = {name: value for name, value in SMALL.items() if hasattr(default, name) and name not in of_words}
    language = MoELanguageModel(base={"model_type": "qwen3_moe", **sizes}, tokenizer=str(tiny_world.base))
    language.configure_model()
    language.eval()
    samples = samples_of(tiny_world, language, "ttttt")
    with torch.no_grad():
        packed = losses_by_sample(language, collate_packed([samples[:2], samples[2:]], 0), None)
        padded = losses_by_sample(language, collate_training(samples, 0), None)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


def losses_by_sample(language, batch, embeddings):
    """Mean loss of each sample by a plain loop over its tokens."""
    logits = language(batch, embeddings)
    owners = batch.get("documents")
    if owners is None:
        owners = batch["attention_mask"] * torch.arange(1, len(batch["keys"]) + 1)[:, None]
    losses = [[] for _ in batch["keys"]]
    for row in range(len(owners)):
        for place in range(owners.shape[1] - 1):
            owner, label = int(owners[row, place + 1]), int(batch["labels"][row, place + 1])
            if label != IGNORE_INDEX:
                losses[owner - 1].append(F.cross_entropy(logits[row, place], torch.tensor(label)))
    return torch.stack([torch.stack(own).mean() for own in losses])


@pytest.mark.parametrize(("kind", "losses"), [("masked", "token"), ("cumo", "loss")])
def test_gradients_of_packed_rows_are_those_of_padded_ones(tiny_world, kind, losses):
    plain = MODELS[kind](tiny_world)
    packed = copy.deepcopy(plain)
    samples = samples_of(tiny_world, plain, "tiit")
    values = []
    for model, batch in ((plain, collate_training(samples, 0)), (packed, collate_packed([samples], 0))):
        values.append(getattr(model(batch), losses))
        values[-1].backward()
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
    for (name, one), other in zip(plain.named_parameters(), packed.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert any(one.grad is not None and one.grad.any() for one in plain.parameters())
