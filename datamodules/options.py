"""Groups of options of `ImageTextShards`: what a row holds, how a stage is measured, how samples are read."""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.bad_samples import MAX_BAD_SAMPLES
from datamodules.streaming import StreamOptions


@dataclass(frozen=True)
class RowSpec:
    """What a row of a batch holds, and in which order.

    Attributes:
        turns: `together` (a sample is a whole conversation) or `single` (each question with its answer is
            a sample; for sets whose questions do not depend on each other).
        max_length: Longest sequence; longer ones are cut, but never inside an image. None for the model's context.
        packing: Whether a row of a training batch holds as many samples as fit into `max_length` tokens, each
            attending to itself only, instead of one. `batch_size` stays the number of rows.
        bucket: Batches whose samples are sorted by length together, so that little is padded; 1 for none.
        seed: Seed of the order.
    """

    turns: str = "together"
    max_length: int | None = None
    packing: bool = False
    bucket: int = 1
    seed: int = 0


@dataclass(frozen=True)
class EvaluationSpec:
    """How much is validated, tested and predicted at once.

    Attributes:
        batch_size: Rows of a batch over all ranks together; that of training if None.
        samples: Validate on this many samples only, drawn once; None for all.
    """

    batch_size: int | None = None
    samples: int | None = None


@dataclass(frozen=True)
class ReadingSpec:
    """How samples are read; changes speed and patience, never the samples.

    Attributes:
        num_workers: Processes that read and encode.
        keep_mib: MiB of samples, and again of decoded pictures, that each process keeps in memory of each set once they
            were read: for sets that fit there and are seen often. 0 reads them anew each time.
        max_bad_samples: How many different samples of the training and validation sets may be damaged; each is
            replaced by a placeholder without weight and listed in `bad_samples.jsonl` of the run directory. Tests and
            predictions allow none, since they would measure something else.
        streaming: Cache and patience for folders that are addresses, such as `s3://bucket/train`.
    """

    num_workers: int = 0
    keep_mib: int = 0
    max_bad_samples: int = MAX_BAD_SAMPLES
    streaming: StreamOptions | None = None
