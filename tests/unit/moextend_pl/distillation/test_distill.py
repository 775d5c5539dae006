"""A student with a frozen teacher: what it learns from, what it saves, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distilled import NEW, student, teaching_run
from helpers.tiny_world import TinyWorld, make_plan, perturb, tiny_mixtral
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.word_tokenizer import word_tokenizer
from moextend_pl import load
from moextend_pl.contracts import UserError
from moextend_pl.distillation.distill import Distill
from moextend_pl.distillation.losses import HiddenTerm, LogitTerm, RouterTerm
from moextend_pl.distillation.relations import AffinityTerm, AttentionTerm, RelationTerm
from moextend_pl.distillation.teacher import TeacherSpec
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend

LEARNING = ("projector", "distillation")


@pytest.fixture(scope="module")
def run(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that teaches."""
    return teaching_run(tiny_world, tmp_path_factory.mktemp("teacher") / "run")


@torch.no_grad()
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(tiny_world: TinyWorld, run: Path) -> None:
    terms = [
        *(LogitTerm(divergence=kind) for kind in ("forward", "reverse", "jsd", "mse")),
        *(LogitTerm(scope="image"), HiddenTerm(scope="all", project=False), RelationTerm(), AffinityTerm()),
        *(AttentionTerm(), RouterTerm()),
    ]
    model = student(tiny_world, terms, TeacherSpec(run=str(run)), parts=NEW, init_from=run, attn_implementation="eager")
    model.configure_model()
    output = model.eval()(tiny_world.batch(model, "iti"))
    assert {term.name for term in terms} <= set(output.router)
    assert all(output.router[term.name] == 0 for term in terms)
    plain = tiny_world.model(init_from=run, attn_implementation="eager")
    expected = plain(tiny_world.batch(plain, "iti"))
    torch.testing.assert_close([output.loss, output.token], [expected.loss, expected.token])
    assert output.accuracy == expected.accuracy


def test_of_the_teacher_nothing_is_learned_saved_or_left_behind(
    tiny_world: TinyWorld, run: Path, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    model = student(tiny_world, "llavadi", TeacherSpec(run=str(run)), parts=LEARNING)
    saves = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    trainer = make_trainer(saves, steps=2, enable_checkpointing=True)
    trainer.fit(model, tiny_world.datamodule("mixed"))
    assert {"val/logits_forward_answer", "val/hidden_answer"} <= set(trainer.callback_metrics)
    assert {"train/logits_forward_answer", "train/hidden_answer"} <= set(trainer.callback_metrics)
    teacher = model.teacher.model
    assert isinstance(teacher, MoExtend)
    assert not teacher.training
    untouched = load(run)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), untouched.parameters(), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    plain = tiny_world.model(parts=["projector"])
    adapters = {f"adapters.hidden_answer.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()} | adapters
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == plain.checkpoint_names() | adapters
    in_optimizer = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(in_optimizer) == len(list(plain.projector.parameters())) + len(adapters)
    save_delta(model, tmp_path / "done")
    left = load(tmp_path / "done")
    batch = tiny_world.batch(left, "it")
    with torch.no_grad():
        torch.testing.assert_close(left(batch).token, model.eval()(batch).token)


@pytest.mark.parametrize(
    "precision", ["32-true", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bf16-mixed", "bf16-true"))]
)
def test_a_run_that_goes_on_ends_as_if_nothing_had_happened(
    tiny_world: TinyWorld, run: Path, make_trainer: Callable[..., Trainer], tmp_path: Path, precision: str
) -> None:
    ends = []
    for start in (None, tmp_path / "step=2.ckpt"):
        model = student(tiny_world, "llavadi_shipped", TeacherSpec(run=str(run)), parts=LEARNING)
        saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
        trainer = make_trainer(saves, steps=4, enable_checkpointing=True, precision=precision, limit_val_batches=0)
        trainer.fit(model, tiny_world.datamodule("mixed"), ckpt_path=start, weights_only=True)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        teacher = model.teacher.language(model)
        assert next(teacher.parameters()).dtype == next(model.language.parameters()).dtype
    assert all(p.isfinite().all() for p in ends[0].values())
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


def test_a_checkpoint_goes_on_with_the_same_teacher_and_terms_only(
    tiny_world: TinyWorld, run: Path, tmp_path: Path
) -> None:
    def sources(terms: Any = "llava_kd", teacher: Path = run) -> dict[str, Any]:
        model = student(tiny_world, terms, TeacherSpec(run=str(teacher)))
        model.teacher.read(model)
        return model.sources()["optim"]

    first = sources()
    assert first == sources(teacher=teaching_run(tiny_world, tmp_path / "moved"))
    assert first != sources(teacher=teaching_run(tiny_world, tmp_path / "other", seed=4))
    assert first != sources([LogitTerm(2.0)])


@torch.no_grad()
def test_the_forgetting_guard_compares_texts_with_the_frozen_original(tiny_world: TinyWorld) -> None:
    """With open routing new experts change what texts say; the original teaches without a copy of itself."""
    found = []
    for teacher in (TeacherSpec(), TeacherSpec(base=str(tiny_world.base))):
        model = student(tiny_world, [LogitTerm(scope="text")], teacher, make_plan(routing="open"), NEW)
        model.configure_model()
        perturb([p for name in NEW for p in model.parts()[name]])
        batch = tiny_world.batch(model, "tit")
        found.append(float(model(batch).router["logits_forward_text"]))
        assert model(tiny_world.batch(model, "ii")).router["logits_forward_text"] == 0  # pictures are not its subject
    ids, mask = batch["input_ids"], batch["attention_mask"]
    texts = torch.tensor([True, False, True])
    stock = tiny_world.stock()(input_ids=ids[texts], attention_mask=mask[texts]).logits.log_softmax(-1)
    own = model.language(batch, model.embed(batch))[texts].log_softmax(-1)
    expected = (stock.exp() * (stock - own)).sum(-1)[mask[texts].bool()].mean()
    assert found == pytest.approx([float(expected)] * 2, rel=1e-4)
    assert expected > 1e-3


def test_the_original_under_the_student_is_the_base_bit_for_bit_also_after_learning(tiny_world: TinyWorld) -> None:
    model = student(tiny_world, [LogitTerm(scope="all")], TeacherSpec(), make_plan(routing="open", init="copy"), NEW)
    model.configure_model()
    perturb([p for name in NEW for p in model.parts()[name]])
    batch = model.with_host_facts(tiny_world.batch(model.train(), "tt"))
    heard = model.teach(batch)
    assert heard is not None
    assert heard.logits is not None
    assert not heard.logits.requires_grad
    with torch.no_grad():
        stock = tiny_world.stock()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(heard.logits, stock.flatten(0, 1)[batch["distilled"].asked.learned])
    assert model.language.model.training
    model(batch).loss.backward()
    assert all(p.grad is not None for name in NEW[1:] for p in model.parts()[name])


@pytest.mark.slow
def test_a_teacher_in_4_bits_teaches_and_stays_so(tiny_world: TinyWorld, run: Path) -> None:
    model = student(tiny_world, "llava_kd", TeacherSpec(run=str(run), quantize="nf4"))
    model.configure_model()
    teacher = model.teacher.language(model).model
    assert any(p.dtype == torch.uint8 for p in teacher.parameters())
    whole = student(tiny_world, "llava_kd", TeacherSpec(run=str(run)))
    whole.configure_model()
    terms = [m(tiny_world.batch(m, "iti")).router["logits_forward_answer"] for m in (model, whole)]
    assert 0 < abs(float(terms[0] - terms[1])) < 0.5 * float(terms[1])


def test_no_teacher_is_read_where_answers_are_asked_for(
    tiny_world: TinyWorld, run: Path, make_trainer: Callable[..., Trainer]
) -> None:
    model = student(tiny_world, "llava_kd", TeacherSpec(run=str(run)))
    data = tiny_world.datamodule("mixed", test={"vqa": tiny_world.data("vqa", "test")})
    make_trainer(limit_test_batches=1).test(model, data)
    assert model.teacher.model is None


def other_words(world: TinyWorld, folder: Path) -> TeacherSpec:
    words = word_tokenizer(["these are other words"])
    tiny_mixtral(len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return TeacherSpec(base=str(folder))


def wider_logits(world: TinyWorld, folder: Path) -> TeacherSpec:
    tokenizer = world.language().tokenizer
    tiny_mixtral(len(tokenizer) + 5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TeacherSpec(base=str(folder))


TEXT = [LogitTerm(scope="text")]
MISTAKES: dict[str, Callable[[TinyWorld, Path, Path], Distill]] = {
    "have no counterpart.*train on its answers": lambda w, f, _: student(w, TEXT, other_words(w, f)),
    "Compare hidden states instead": lambda w, f, _: student(w, TEXT, wider_logits(w, f)),
    "sees pictures for .'relation'": lambda w, *_: student(w, [RelationTerm()], TeacherSpec()),
    "the default. Set": lambda w, _, run: student(w, [AttentionTerm()], TeacherSpec(run=str(run))),
    "Add 'distillation'": lambda w, _, run: student(w, "llavadi", TeacherSpec(run=str(run))),
    r"learns: \['language'\]": lambda w, *_: student(w, TEXT, TeacherSpec(), parts=("language",)),
    "RouterTerm compares routers": lambda w, *_: student(
        w, [RouterTerm(scope="text")], TeacherSpec(base=str(w.dense), dense=True)
    ),
    "got both": lambda w, *_: student(w, TEXT, TeacherSpec(run="a", base="b")),
    "got neither": lambda w, *_: student(w, TEXT, TeacherSpec(quantize="nf4")),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_teacher_that_cannot_be_compared_is_refused(
    tiny_world: TinyWorld, run: Path, tmp_path: Path, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        MISTAKES[words](tiny_world, tmp_path, run).configure_model()


def test_a_teacher_that_is_shown_other_pictures_is_refused(tiny_world: TinyWorld, run: Path) -> None:
    model = student(tiny_world, "llava_kd", TeacherSpec(run=str(run)))
    model.encoder.config["pool"] = 1
    with pytest.raises(UserError, match="tokens_per_image 4 and"):
        model.configure_model()


def test_a_student_that_looks_by_cross_attention_is_refused(tiny_world: TinyWorld) -> None:
    model = student(tiny_world, TEXT, TeacherSpec())
    model.projector.cross_attention = 2
    with pytest.raises(UserError, match="pictures are tokens"):
        model.configure_model()
