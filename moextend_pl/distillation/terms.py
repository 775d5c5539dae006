"""The mathematics of distillation: what each term says of one position, one sample or one matrix.

All are 0, exactly, where student and teacher are equal. Shapes: T positions, V vocabulary, D width, N and A image and
answer positions of one sample, H heads, Q and K queries and keys, E experts. Everything is computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

TermFunction = Callable[[Tensor, Tensor], Tensor]


def standardised(logits_TV: Tensor) -> Tensor:
    """Takes mean and standard deviation (ddof 1) out of the logits of each position (LLAVADI, `norm_logits`)."""
    centred = logits_TV - logits_TV.mean(dim=-1, keepdim=True)
    return centred / (1e-7 + logits_TV.std(dim=-1, keepdim=True))


def forward_kl(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher, KL(teacher || student), in nats.

    Args:
        student_TV: Logits.
        teacher_TV: Logits.

    Returns:
        (T,), one value a position.
    """
    student, teacher = student_TV.float().log_softmax(-1), teacher_TV.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def reverse_kl(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the teacher from the student, KL(student || teacher), in nats.

    Args:
        student_TV: Logits.
        teacher_TV: Logits.

    Returns:
        (T,), one value a position.
    """
    return forward_kl(teacher_TV, student_TV)


def jensen_shannon(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """Jensen-Shannon divergence, half of each divergence from the mean of both: symmetric, at most ln 2.

    Args:
        student_TV: Logits.
        teacher_TV: Logits.

    Returns:
        (T,), one value a position, in nats.
    """
    student, teacher = student_TV.float().log_softmax(-1), teacher_TV.float().log_softmax(-1)
    # log p - log m = log 2 - log(1 + q / p), of which nothing overflows and which is 0 where p = q.
    apart = teacher - student
    first = student.exp() * (math.log(2) - F.softplus(apart))
    second = teacher.exp() * (math.log(2) - F.softplus(-apart))
    return (first + second).sum(-1) / 2


def squared_error(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    """Mean over the last dimension of squared differences, of logits or of hidden states.

    Args:
        student_TD: Of the student.
        teacher_TD: Of the teacher.

    Returns:
        (T,), one value a position.
    """
    return (student_TD.float() - teacher_TD.float()).square().mean(-1)


def tempered(divergence: TermFunction, temperature: float, standardise: bool) -> TermFunction:
    """Returns a divergence of logits divided by a temperature, times its square: gradients keep their size (Hinton).

    Args:
        divergence: Of two tensors of logits.
        temperature: 1 changes nothing.
        standardise: Whether logits are standardised first.
    """

    def of_logits(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        student, teacher = student_TV.float(), teacher_TV.float()
        if standardise:
            student, teacher = standardised(student), standardised(teacher)
        return divergence(student / temperature, teacher / temperature) * temperature**2

    return of_logits


def relation(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Compares how the image positions of one sample relate: 1 - cosine of the two matrices Z Z^T (LLaVA-KD).

    Neither a scale nor an orthogonal transform of Z changes it.

    Args:
        student_NV: Logits at the image positions.
        teacher_NV: Logits there; their width may differ from the student's.

    Returns:
        A scalar.
    """
    student, teacher = (F.normalize((z @ z.T).flatten(), dim=0) for z in (student_NV.float(), teacher_NV.float()))
    return (student - teacher).square().sum() / 2  # 1 - cosine of unit vectors, without its rounding


def affinity(student_NA: tuple[Tensor, Tensor], teacher_NA: tuple[Tensor, Tensor]) -> Tensor:
    """Compares how image positions and answer positions of one sample relate (LLAVADI, `align_affinity`).

    Args:
        student_NA: Hidden states at image positions (N, D), and at answer positions (A, D).
        teacher_NA: Those of the teacher, of any width.

    Returns:
        (N, A) squared differences of cosines.
    """
    student, teacher = (
        F.normalize(image.float(), dim=-1) @ F.normalize(answer.float(), dim=-1).T
        for image, answer in (student_NA, teacher_NA)
    )
    return (student - teacher).square()


def attention(student_QHK: Tensor, teacher_QHK: Tensor) -> Tensor:
    """Compares attention maps, of the mean over heads where the numbers of heads differ (LLAVADI, `align_attn_map`).

    Args:
        student_QHK: Attention weights of Q queries on K keys.
        teacher_QHK: Those of the teacher.

    Returns:
        (Q,) means over heads and keys of squared differences.
    """
    student, teacher = student_QHK.float(), teacher_QHK.float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    return (student - teacher).square().mean((1, 2))


def router_kl(student_TE: Tensor, teacher_TE: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's choice of experts from the teacher's, over the experts of both.

    Args:
        student_TE: Router logits; experts that the teacher lacks come last.
        teacher_TE: Those of the teacher.

    Returns:
        (T,), one value a position, in nats.
    """
    both = min(student_TE.shape[-1], teacher_TE.shape[-1])
    return forward_kl(student_TE[:, :both], teacher_TE[:, :both])
