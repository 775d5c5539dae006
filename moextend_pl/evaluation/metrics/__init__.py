"""Scores of published protocols, each a function on plain text and a `torchmetrics.Metric` on any number of ranks."""

from moextend_pl.evaluation.metrics.answer_text import evalai_answer, vqa_answer
from moextend_pl.evaluation.metrics.captions import CIDErD, cider_d, ptb_words
from moextend_pl.evaluation.metrics.choices import CircularAccuracy, ScienceQAAccuracy, chosen_option, scienceqa_letter
from moextend_pl.evaluation.metrics.keyed import KeyedMetric
from moextend_pl.evaluation.metrics.matches import ANLS, ExactMatch, GQAAccuracy, anls, exact_match, gqa_answer
from moextend_pl.evaluation.metrics.soft_accuracy import VQAAccuracy, soft_score, vqa_accuracy
from moextend_pl.evaluation.metrics.yes_no import MMEScore, POPEScore, mme_answer, pope_answer

__all__ = [
    "ANLS",
    "CIDErD",
    "CircularAccuracy",
    "ExactMatch",
    "GQAAccuracy",
    "KeyedMetric",
    "MMEScore",
    "POPEScore",
    "ScienceQAAccuracy",
    "VQAAccuracy",
    "anls",
    "chosen_option",
    "cider_d",
    "evalai_answer",
    "exact_match",
    "gqa_answer",
    "mme_answer",
    "pope_answer",
    "ptb_words",
    "scienceqa_letter",
    "soft_score",
    "vqa_accuracy",
    "vqa_answer",
]
