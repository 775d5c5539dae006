"""Terms against numpy and hand-made numbers, on batches with no, one and several pictures of mixed sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moextend_pl.contracts import IGNORE_INDEX, UserError
from moextend_pl.distillation import terms
from moextend_pl.distillation.losses import DistillTerm, HiddenTerm, LogitTerm, RouterTerm, heard
from moextend_pl.distillation.presets import PRESETS, chosen_terms
from moextend_pl.distillation.relations import AffinityTerm, AttentionTerm, RelationTerm
from moextend_pl.distillation.scopes import SCOPES, Scope, find_places, find_scopes
from moextend_pl.distillation.signals import Signals
from moextend_pl.moe.usage import RouterRecord
from moextend_pl.samples.host_facts import with_host_facts

IMAGE, VOCABULARY, WIDTH, HEADS, EXPERTS = 50, 12, 6, 2, 4
# A row is a sample: i image, q question, a answer, . padding. Two pictures of different sizes; one; none.
ROWS = ["iiiqiiqaa", "iiqqaaa..", "qqqaa...."]
EVERY: list[DistillTerm] = [
    *(LogitTerm(divergence=kind) for kind in ("forward", "reverse", "jsd", "mse")),
    LogitTerm(scope="image", temperature=2.0),
    LogitTerm(scope="all", standardise=True, mean="samples"),
    HiddenTerm(scope="text", project=False),
    RelationTerm(),
    AffinityTerm(),
    AttentionTerm(),
    RouterTerm(),
]


def batch_of(rows: list[str], **more: Any) -> Any:
    def mask(letters: str) -> Tensor:
        return torch.tensor([[letter in letters for letter in row] for row in rows])

    ids = torch.arange(mask("i").numel()).reshape(mask("i").shape) % VOCABULARY
    return {
        "keys": [str(n) for n in range(len(rows))],
        "input_ids": ids.masked_fill(mask("i"), IMAGE),
        "attention_mask": mask("iqa").long(),
        "labels": torch.where(mask("a"), ids, IGNORE_INDEX),
        **more,
    }


def scopes_of(batch: Any, with_pictures: bool = True) -> dict[str, Scope]:
    masks = find_scopes(batch, IMAGE, with_pictures)
    return find_places(batch, with_host_facts(batch, IMAGE)["known"], masks, set(SCOPES)).scopes


def signals(seed: int, tokens: int = 27, length: int = 9, experts: int = EXPERTS) -> Signals:
    """Returns what was heard at all tokens; every logit is asked for where `all` is."""
    make = torch.Generator().manual_seed(seed)
    logits, hidden, routed = (torch.randn(tokens, n, generator=make) for n in (VOCABULARY, WIDTH, experts))
    weights = torch.randn(tokens, HEADS, length, generator=make).softmax(-1)
    records = [RouterRecord(0, experts, routed, routed.topk(2).indices)]
    return Signals(logits, hidden, weights, records, length)


def compared(term: DistillTerm, student: Signals, teacher: Signals, rows: list[str] = ROWS) -> Tensor:
    """Compares on rows without padding in front: the asked positions are the real tokens."""
    batch = batch_of(rows)
    scopes, real_T = scopes_of(batch), batch["attention_mask"].flatten().bool()
    own, aim = (replace(each, logits=heard(each.logits)[real_T]) for each in (student, teacher))
    return term.compare(own, aim, scopes, None)


def places(letters: str, shift: int = 0, rows: list[str] = ROWS) -> list[list[int]]:
    """Returns by plain loop where letters stand in the flattened rows, sample by sample."""
    width = len(rows[0])
    return [[n * width + i - shift for i, x in enumerate(row) if x in letters] for n, row in enumerate(rows)]


@pytest.mark.parametrize("term", EVERY, ids=lambda term: f"{term.name}_{term.mean}")
def test_every_term_is_exactly_0_where_the_student_is_its_teacher(term: DistillTerm) -> None:
    same = signals(1)
    assert compared(term, same, replace(same)) == 0
    assert compared(term, same, signals(2)) > 0


def softmax(x: Any) -> Any:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kl(p: Any, q: Any) -> Any:
    return (p * (np.log(p) - np.log(q))).sum(-1)


def cosines(x: Any, y: Any) -> Any:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)) @ (y / np.linalg.norm(y, axis=-1, keepdims=True)).T


def z_score(x: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) / (1e-7 + x.std(-1, ddof=1, keepdims=True))


def relation_of(s: Any, t: Any) -> float:
    mine, aim = (s @ s.T).ravel(), (t @ t.T).ravel()
    return float(1 - mine @ aim / np.linalg.norm(mine) / np.linalg.norm(aim))


def oracle(term: DistillTerm, student: Signals, teacher: Signals) -> float:
    """Computes a term in numpy, fp64, over lists of places found by a plain loop."""
    (sl, sh, sa), (tl, th, ta) = (
        [x.double().numpy() for x in (each.logits, each.hidden, each.attention) if x is not None]
        for each in (student, teacher)
    )
    (sr, tr) = (each.routers[0].logits.double().numpy() for each in (student, teacher))
    own, image, real = places("a"), places("i"), places("iqa")
    if isinstance(term, AffinityTerm):
        blocks = [(cosines(sh[i], sh[a]) - cosines(th[i], th[a])) ** 2 for i, a in zip(image, own, strict=True)]
        return float(np.concatenate([block.ravel() for block in blocks]).mean())
    if isinstance(term, RelationTerm):
        return float(np.mean([relation_of(sl[i], tl[i]) for i in image if i]))
    if isinstance(term, AttentionTerm):
        kinds = {"image": image, "answer": own}
        means = []
        for block in term.blocks:
            looking, seen = (kinds[word] for word in block.split("_"))
            squares = [
                np.mean([(sa[q, :, k % 9] - ta[q, :, k % 9]) ** 2 for k in keys])
                for queries, keys in zip(looking, seen, strict=True)
                for q in queries
                if keys
            ]
            means.append(np.mean(squares))
        return float(np.mean(means))
    if isinstance(term, RouterTerm):
        return float(kl(softmax(tr), softmax(sr))[np.concatenate(real)].mean())
    if isinstance(term, HiddenTerm):
        return float(((sh - th) ** 2).mean(-1)[np.concatenate(places("qa"))].mean())
    assert isinstance(term, LogitTerm)
    if term.scope == "image":
        return 4 * float(kl(softmax(tl / 2), softmax(sl / 2))[np.concatenate(image).astype(int)].mean())
    if term.scope == "all":
        values = kl(softmax(z_score(tl)), softmax(z_score(sl)))
        return float(np.mean([values[row].mean() for row in real]))
    p, q = softmax(tl), softmax(sl)
    middle = (p + q) / 2
    by_kind = {"forward": kl(p, q), "reverse": kl(q, p), "mse": ((sl - tl) ** 2).mean(-1)}
    by_kind["jsd"] = (kl(p, middle) + kl(q, middle)) / 2
    return float(by_kind[term.divergence][np.concatenate(places("a", shift=1))].mean())


@pytest.mark.parametrize("term", EVERY, ids=lambda term: f"{term.name}_{term.mean}")
def test_every_term_is_that_of_numpy_on_pictures_of_mixed_number_and_size(term: DistillTerm) -> None:
    student, teacher = signals(1), signals(2)
    assert float(compared(term, student, teacher)) == pytest.approx(oracle(term, student, teacher), rel=1e-5, abs=1e-6)


def test_divergences_of_three_words_are_those_by_hand() -> None:
    teacher, student = (torch.tensor([p]).log() for p in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    assert float(terms.forward_kl(student, teacher)) == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert float(terms.reverse_kl(student, teacher)) == pytest.approx(0.25 * math.log(2), abs=1e-6)
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)  # mean 3/8, 2/8, 3/8
    assert float(terms.jensen_shannon(student, teacher)) == pytest.approx(expected, abs=1e-6)
    far = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    assert terms.jensen_shannon(far[:1], far[1:]) == pytest.approx(math.log(2))
    assert torch.equal(terms.jensen_shannon(student, teacher), terms.jensen_shannon(teacher, student))


def test_relation_changes_neither_by_a_scale_nor_by_an_orthogonal_transform() -> None:
    z, other = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    assert float(terms.relation(z * 3.7, z)) == pytest.approx(0, abs=1e-6)
    assert float(terms.relation(z @ turn, z)) == pytest.approx(0, abs=1e-6)
    assert float(terms.relation(z, other)) > 0.05


def test_the_prediction_of_the_first_answer_token_counts() -> None:
    student, teacher = signals(1), signals(2)
    before = compared(LogitTerm(), student, teacher)
    assert teacher.logits is not None
    teacher.logits[places("a")[0][0] - 1, 0] += 1  # as released, nobody would notice
    assert compared(LogitTerm(), student, teacher) != before
    teacher.logits[places("a")[0][-1], 0] += 1  # what follows the last answer token is nobody's answer
    after = compared(LogitTerm(), student, teacher)
    teacher.logits[places("a")[0][-1], 0] += 1
    assert compared(LogitTerm(), student, teacher) == after


def test_a_batch_without_pictures_or_answers_gives_0_and_gradients() -> None:
    for term in EVERY:
        student = signals(1)
        for part in (student.logits, student.hidden, student.attention, student.routers[0].logits):
            assert part is not None
            part.requires_grad_()
        value = compared(term, student, signals(2), ["qqqq....."] * 3)
        assert value.isfinite()
        if term.scope in ("image", "answer", "answer_own"):
            assert value == 0


def test_packed_samples_are_compared_as_if_they_stood_alone() -> None:
    packed = batch_of(["iiqaqaa..", "iqaaiiqa."])
    packed["documents"] = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 4, 4, 4, 4, 0]])
    packed["keys"] = list("abcd")
    scopes = scopes_of(packed)
    assert scopes["image"].counts == (2, 0, 1, 2)
    assert scopes["answer"].counts == (1, 2, 2, 1)
    assert scopes_of(packed, with_pictures=False)["all"].places.tolist() == [4, 5, 6]


def test_samples_with_pictures_can_be_left_out() -> None:
    assert scopes_of(batch_of(ROWS), with_pictures=False)["all"].counts == (0, 0, 5)


def test_a_student_with_more_experts_is_compared_on_those_of_both() -> None:
    student, teacher = signals(1, experts=6), signals(1)
    student.routers[0] = replace(
        student.routers[0], logits=torch.cat([teacher.routers[0].logits, torch.ones(27, 2)], 1)
    )
    assert compared(RouterTerm(), student, teacher) == 0


def test_heads_of_different_number_are_averaged() -> None:
    maps = signals(1).attention
    assert maps is not None
    assert terms.attention(maps, maps.mean(1, keepdim=True)).abs().max() == 0


def test_a_map_to_another_width_learns() -> None:
    adapter = HiddenTerm().adapter(WIDTH, 9)
    assert adapter is not None
    student, teacher = signals(1), signals(2)
    teacher.hidden = torch.randn(27, 9)
    HiddenTerm().compare(student, teacher, scopes_of(batch_of(ROWS)), adapter).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())


def test_presets_are_the_published_lists() -> None:
    assert [term.name for term in chosen_terms("llava_kd")] == [
        "logits_forward_answer",
        "logits_forward_image",
        "relation",
    ]
    assert [(term.name, term.weight) for term in chosen_terms("llavadi")] == [
        ("logits_forward_answer", 5.0),
        ("hidden_answer", 5.0),
    ]
    assert all(term.facts()["scope"] == "all" for term in PRESETS["llavadi_shipped"]())


MISTAKES: dict[str, Callable[[], object]] = {
    "weight": lambda: RelationTerm(0.0),
    "scope": lambda: LogitTerm(scope="answers"),
    "mean": lambda: HiddenTerm(mean="rows"),
    "divergence": lambda: LogitTerm(divergence="kl"),
    "temperature": lambda: LogitTerm(temperature=0.0),
    "blocks": lambda: AttentionTerm(blocks=["image"]),
    "project": lambda: HiddenTerm(project=False).adapter(4, 8),
    "one of": lambda: chosen_terms("llava"),
    "each of them once": lambda: chosen_terms([RelationTerm(), RelationTerm()]),
    "at least one term": lambda: chosen_terms([]),
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_told(word: str) -> None:
    with pytest.raises(UserError, match=word):
        MISTAKES[word]()
