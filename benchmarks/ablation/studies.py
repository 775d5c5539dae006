"""What each study varies. A new study is a new entry of `STUDIES`; nothing else knows its variants.

An override is `place in a stage file -> value`. A place is dotted; inside a list of classes a part names the class
(`trainer.callbacks+.ExpertExtension.init_args.init`). `SEED` as a value stands for the seed of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SEED = "<seed>"
Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One level of one factor, all else as the default.

    Attributes:
        factor: What is varied.
        level: How.
        changes: Stage -> overrides of its file.
        last: Stage file that stands in the place of the study's last one.
    """

    factor: str
    level: str
    changes: Mapping[str, Overrides]
    last: str = ""

    @property
    def name(self) -> str:
        """Name of its folders, as `layer_rule-first_half`."""
        return f"{self.factor}-{self.level}".replace(" ", "_")


Level = tuple[str, str]
"""A factor and one of its levels."""


@dataclass(frozen=True)
class Claim:
    """What is said of two levels.

    Attributes:
        better: Level that is said to be better.
        worse: The other one.
        source: Who says it, where, and by how much.
        metric: Measure that it speaks of here.
    """

    better: Level
    worse: Level
    source: str
    metric: str = "vqa"


def _claim(factor: str, better: str, worse: str, source: str, metric: str = "vqa") -> Claim:
    return Claim((factor, better), (factor, worse), source, metric)


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        data: Data set that `shards build` makes.
        configs: Folder of its stage files below `configs/`.
        folder: Folder of runs that those files name.
        data_folder: Folder of the data that they name.
        base: Stages that are run once, each on its own.
        stages: Stages that are run for every seed, one after another; the last one is measured.
        seeded: Overrides of all of `stages`, to make a seed count.
        defaults: Factor -> its level in the stage files as they are.
        variants: All other levels.
        claims: What is said, by the papers first of all.
        pilot: Standard deviation over seeds of a difference of accuracies, as known before the runs.
        seconds: Usual seconds of a stage on one core, for the time left.
        quick: Overrides of every stage for a smoke test.
        quick_data: Further options of `shards build` for a smoke test.
        every: Overrides of single stages in all variants, applied before the variant's own.
    """

    data: str
    configs: str
    folder: str
    data_folder: str
    base: tuple[str, ...]
    stages: tuple[str, ...]
    seeded: Overrides
    defaults: Mapping[str, str]
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...] = ()
    pilot: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    quick: Overrides = field(default_factory=dict)
    quick_data: tuple[str, ...] = ()
    every: Mapping[str, Overrides] = field(default_factory=dict)


EXTENSION = "trainer.callbacks+.ExpertExtension.init_args"
RULES = "moextend_pl.moe.selection"


def _rule(level: str, name: str, **options: Any) -> Variant:
    rule = {"class_path": f"{RULES}.{name}", **({"init_args": options} if options else {})}
    return Variant("layer rule", level, {"2_probe": {f"{EXTENSION}.rule": rule}})


PARTS = "trainer.callbacks+.TrainOnly.init_args.parts"


LEARNS = ("learns", "new experts, masked")
FULL = ("learns", "all (full fine-tuning)")


def _extend(factor: str, level: str, option: str) -> Variant:
    return Variant(factor, level, {"3_extend": {f"{EXTENSION}.{option}": level}})


SHORT_TEST = {"trainer.limit_test_batches": 4, "trainer.limit_predict_batches": 4}
MOEXTEND_SCENES = Study(
    data="scenes",
    configs="scenes",
    folder="runs/scenes",
    data_folder="runs/scenes/data",
    base=("0_vision", "0_language"),
    stages=("1_align", "2_probe", "3_extend"),
    seeded={"seed_everything": SEED, "data.init_args.rows.seed": SEED},
    defaults={
        "layer rule": "shift",
        "calibration": "additive",
        "init": "preserving",
        "routing": "masked",
        "source": "after",
        "new experts": "1",
        LEARNS[0]: LEARNS[1],
    },
    variants=(
        Variant(*FULL, {}, last="full_finetune"),
        _extend("routing", "open", "routing"),
        _rule("KL divergence", "DivergenceRule", fraction=0.5),
        _rule("interval", "IntervalLayers", step=2),
        _rule("random", "RandomRule", fraction=0.5, seed=SEED),
        _rule("first half", "FirstLayers", fraction=0.5),
        _rule("last half", "LastLayers", fraction=0.5),
        _rule("least shift", "LeastShiftRule", fraction=0.5),
        _rule("all", "AllLayers"),
        _extend("calibration", "multiplicative", "calibration"),
        Variant(
            "calibration",
            "none",
            {"3_extend": {f"{EXTENSION}.calibration": "none", PARTS: ["projector", "new_experts", "new_routers"]}},
        ),
        _extend("init", "copy", "init"),
        _extend("routing", "masked_tokens", "routing"),
        Variant("source", "before", {"2_probe": {f"{EXTENSION}.source": "before"}}),
        Variant("source", "random", {"2_probe": {f"{EXTENSION}.source": "random", f"{EXTENSION}.seed": SEED}}),
        *(Variant("new experts", str(n), {"2_probe": {f"{EXTENSION}.new_experts": n}}) for n in (2, 4)),
    ),
    claims=(
        Claim(LEARNS, FULL, "MoExtend: forgets less", "text"),
        Claim(("routing", "open"), FULL, "MoExtend: forgets less, as published", "text_open"),
        Claim(LEARNS, FULL, "sees as well after the same steps"),
        _claim("layer rule", "shift", "interval", "MoExtend, Table 3: 59.9 against 59.7"),
        _claim("layer rule", "shift", "first half", "MoExtend, Table 3: 59.9 against 59.6"),
        _claim("layer rule", "shift", "last half", "MoExtend, Section 2.2; no row of its own"),
        _claim("layer rule", "shift", "random", "MoExtend, Section 2.2; no row of its own"),
        _claim("layer rule", "shift", "least shift", "MoExtend, Section 2.2: its contrary"),
        _claim("layer rule", "shift", "all", "MoExtend, Table 3: 59.9 against 59.6"),
        _claim("calibration", "additive", "multiplicative", "MoExtend, Table 5: 446.1 against 444.8 or a divergence"),
        _claim("calibration", "additive", "none", "MoExtend, Section 2.4: calibration is needed; no row without it"),
        _claim("init", "copy", "preserving", "MoExtend, Table 4: copying is best; nothing like preserving is in it"),
        _claim("source", "after", "random", "MoExtend, Eq. 8: the most used expert"),
        _claim("new experts", "2", "1", "more experts learn more"),
        _claim("new experts", "4", "1", "more experts learn more"),
    ),
    seconds={"data": 20, "0_vision": 40, "0_language": 180, "1_align": 25, "2_probe": 15, "3_extend": 60},
    every={"3_extend": {**SHORT_TEST, f"{EXTENSION}.seed": SEED}, "full_finetune": SHORT_TEST},
    quick_data=("--images", "60"),
    quick={
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 1,
        "trainer.limit_test_batches": 1,
        "trainer.limit_predict_batches": 1,
        "data.init_args.batch_size": 4,
        "data.init_args.evaluation.batch_size": 8,
        "data.init_args.evaluation.samples": 8,
    },
)

MOEXTEND = replace(
    MOEXTEND_SCENES,
    data="easy-vqa",
    configs="easy_vqa",
    folder="runs/quickstart",
    data_folder="runs/quickstart/data",
    # A fifth of the quickstart's steps: where it ends, all variants answer nearly everything.
    every={stage: {**own, "trainer.max_steps": 300} for stage, own in MOEXTEND_SCENES.every.items()},
    quick_data=(),
    # Two levels that spread by 0.011 each, over three seeds of an earlier study.
    pilot=0.016,
)

STAGE_3 = "3_instruction"
FROZEN_TOWER = {PARTS: ["projector", "language"]}


def _without(*parts: str) -> Overrides:
    return {f"model.init_args.{part}.upcycle": None for part in parts}


def _spec(*parts: str, **changes: Any) -> Overrides:
    return {f"model.init_args.{part}.upcycle.{key}": value for part in parts for key, value in changes.items()}


def _stage_3(factor: str, level: str, *overrides: Overrides) -> Variant:
    return Variant(factor, level, {STAGE_3: {key: value for each in overrides for key, value in each.items()}})


# The rows of CuMo's Table 3, one after another: each adds one thing to the row before it.
NO_LOSSES = {"balance": 0.0, "z": 0.0}
CUMO = Study(
    data="easy-vqa",
    configs="easy_vqa/cumo",
    folder="runs/quickstart/cumo",
    data_folder="runs/quickstart/data",
    base=("0_vision", "0_language"),
    stages=("1_pretrain", "2_prefinetune", STAGE_3),
    # One scale: a tower that learns at two costs five times as much, in every row alike.
    seeded={"seed_everything": SEED, "data.init_args.rows.seed": SEED, "model.init_args.encoder.features.scales": [1]},
    defaults={"built up": "and upcycled tower (CuMo)", "experts": "2 of 4", "losses": "balance and z"},
    variants=(
        _stage_3("built up", "dense, tower frozen", _without("encoder", "projector"), FROZEN_TOWER),
        _stage_3(
            "built up",
            "projector from scratch",
            _without("encoder"),
            _spec("projector", from_scratch=True, **NO_LOSSES),
            FROZEN_TOWER,
        ),
        _stage_3("built up", "projector upcycled", _without("encoder"), _spec("projector", **NO_LOSSES), FROZEN_TOWER),
        _stage_3("built up", "and both losses", _without("encoder"), FROZEN_TOWER),
        _stage_3("built up", "and dense tower learns", _without("encoder")),
        _stage_3(
            "built up",
            "and upcycled language model",
            {"model.init_args.language.upcycle": {"experts": 4, "top_k": 2, "balance": 0.1, "z": 0.01, "seed": SEED}},
            {PARTS: ["encoder", "projector", "language", "routers"]},
        ),
        _stage_3("built up", "all dense, all learns", _without("encoder", "projector")),
        _stage_3("experts", "1 of 4", _spec("encoder", "projector", top_k=1)),
        _stage_3("experts", "2 of 8", _spec("encoder", "projector", experts=8)),
        _stage_3("losses", "none", _spec("encoder", "projector", **NO_LOSSES)),
        _stage_3("losses", "balance", _spec("encoder", "projector", z=0.0)),
    ),
    claims=(
        _claim("built up", "projector upcycled", "projector from scratch", "CuMo, Table 3: SEED 67.1 against 65.1"),
        _claim("built up", "projector upcycled", "dense, tower frozen", "CuMo, Table 3: SEED 67.1 against 66.4"),
        _claim("built up", "and both losses", "projector upcycled", "CuMo, Table 3: SEED 67.4 against 67.1"),
        _claim("built up", "and dense tower learns", "and both losses", "CuMo, Table 3: SEED 69.0 against 67.4"),
        _claim(
            "built up",
            "and upcycled tower (CuMo)",
            "and dense tower learns",
            "CuMo, Table 3: SEED 69.8 against 69.0",
        ),
        _claim(
            "built up",
            "and upcycled language model",
            "and upcycled tower (CuMo)",
            "CuMo, Table 3: SEED 69.9 against 69.6",
        ),
        _claim("experts", "2 of 4", "2 of 8", "CuMo, Table 3: SEED 69.8 against 69.2 in the tower"),
    ),
    seconds={"data": 20, "0_vision": 60, "0_language": 60, "1_pretrain": 60, "2_prefinetune": 60, STAGE_3: 90},
    every={
        STAGE_3: {
            # Few steps: the dense rows are already at 0.94 after 300.
            "trainer.max_steps": 150,
            "trainer.val_check_interval": 150,
            "trainer.limit_test_batches": 4,
            **_spec("encoder", "projector", seed=SEED),
        }
    },
    quick=MOEXTEND_SCENES.quick,
)

STUDIES: dict[str, Study] = {"moextend": MOEXTEND, "moextend_scenes": MOEXTEND_SCENES, "cumo": CUMO}
