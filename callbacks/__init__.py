"""What happens at the borders of a stage."""

from callbacks.checkpoints import StageCheckpoint
from callbacks.expert_extension import ExpertExtension
from callbacks.frozen_guard import FrozenGuard
from callbacks.ledger import SampleLedger
from callbacks.outputs import SaveDelta, SavePretrained, StageReceipt
from callbacks.predictions import WritePredictions
from callbacks.progress import StageProgress, StageSpeed
from callbacks.retention_gate import RetentionGate
from callbacks.train_only import TrainOnly
from callbacks.usage_log import UsageLog
from callbacks.usage_report import UsageReport

__all__ = [
    "ExpertExtension",
    "FrozenGuard",
    "RetentionGate",
    "SampleLedger",
    "SaveDelta",
    "SavePretrained",
    "StageCheckpoint",
    "StageProgress",
    "StageReceipt",
    "StageSpeed",
    "TrainOnly",
    "UsageLog",
    "UsageReport",
    "WritePredictions",
]
