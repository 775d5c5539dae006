"""The command that tries claims: which runs a study needs, which are left, and what is made of their numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_1samp, ttest_rel

from moextend_pl.contracts import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ablation() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import claims
        from ablation import planning, report, running, studies, verdicts

        rooms = {"planning": planning, "report": report, "running": running, "studies": studies, "verdicts": verdicts}
        yield SimpleNamespace(claims=claims, **rooms)


@pytest.fixture
def plan(ablation: SimpleNamespace, tmp_path: Path) -> Any:
    study = ablation.studies.MOEXTEND_SCENES
    return ablation.planning.make_plan(study, tmp_path, study.variants, [0, 1])


def file_of(plan: Any, name: str) -> dict[str, Any]:
    return yaml.safe_load(plan.runs[name].config)


def extension_of(plan: Any, name: str) -> dict[str, Any]:
    callbacks = file_of(plan, name)["trainer"]["callbacks+"]
    (found,) = [item["init_args"] for item in callbacks if item["class_path"] == "callbacks.ExpertExtension"]
    return found


def test_variants_share_every_stage_that_they_do_not_change(ablation: SimpleNamespace, plan: Any) -> None:
    study = ablation.studies.MOEXTEND_SCENES
    stages = [run.stage for run in plan.runs.values()]
    of_the_probe = sum("2_probe" in variant.changes for variant in study.variants)
    assert {stage: stages.count(stage) for stage in set(stages)} == {
        "data": 1, "0_vision": 1, "0_language": 1, "1_align": 2,
        "2_probe": 2 * (1 + of_the_probe), "3_extend": 2 * len(study.variants), "full_finetune": 2,
    }  # fmt: skip
    assert [name for name, run in plan.runs.items() if run.measured] == [
        name for name in plan.runs if "/3_extend/" in name or "/full_finetune/" in name
    ]


def test_every_run_comes_after_the_runs_that_it_reads_from(plan: Any, tmp_path: Path) -> None:
    order = list(plan.runs)
    for name, run in plan.runs.items():
        assert all(order.index(other) < order.index(name) for other in run.after)
    assert plan.runs["seed1/3_extend/routing-open"].after == ("seed1/2_probe/default",)
    assert plan.runs["seed1/3_extend/layer_rule-all"].after == ("seed1/2_probe/layer_rule-all",)


@pytest.mark.parametrize("name", ["moextend", "moextend_scenes"])
@pytest.mark.parametrize("quick", [False, True])
def test_no_study_writes_into_the_folders_of_the_stage_files(
    ablation: SimpleNamespace, tmp_path: Path, name: str, quick: bool
) -> None:
    study = ablation.studies.STUDIES[name]
    plan = ablation.planning.make_plan(study, tmp_path, study.variants, [0], quick)
    ablation.planning.write_layers(study, tmp_path)
    layers = [path.read_text() for path in (tmp_path / "configs").rglob("*.yaml")]
    assert len(layers) == 3  # base, data, vqa
    assert not any(study.folder in text for text in [*layers, *(run.config for run in plan.runs.values())])


def test_a_variant_differs_from_the_default_in_its_one_factor(plan: Any, tmp_path: Path) -> None:
    default, changed = (extension_of(plan, f"seed1/3_extend/{name}") for name in ("default", "routing-open"))
    assert default == {
        "plan": str(tmp_path / "seed1/2_probe/default/extension_plan.yaml"),
        "init": "preserving", "routing": "masked", "seed": 1,
    }  # fmt: skip
    assert changed == {**default, "routing": "open"}
    rule = extension_of(plan, "seed1/2_probe/layer_rule-random")["rule"]
    assert rule == {"class_path": "moextend_pl.moe.selection.RandomRule", "init_args": {"fraction": 0.5, "seed": 1}}
    assert extension_of(plan, "seed0/2_probe/source-before")["source"] == "before"
    grown = extension_of(plan, "seed0/3_extend/source-before")["plan"]
    assert grown == str(tmp_path / "seed0/2_probe/source-before/extension_plan.yaml")


def test_the_defaults_of_the_table_are_those_of_the_stage_files(ablation: SimpleNamespace, plan: Any) -> None:
    from callbacks.expert_extension import ExpertExtension
    from moextend_pl.contracts import ExtensionPlan

    defaults = ablation.studies.MOEXTEND_SCENES.defaults
    extend = {"calibration": ExtensionPlan(layers=()).calibration, **extension_of(plan, "seed0/3_extend/default")}
    assert {key: extend[key] for key in ("calibration", "init", "routing")}.items() <= defaults.items()
    probe = extension_of(plan, "seed0/2_probe/default")
    assert probe["rule"]["class_path"].endswith("ShiftRule")
    assert defaults["layer rule"] == "shift"
    assert probe.get("source", ExpertExtension(rule=object()).source) == defaults["source"]  # type: ignore[arg-type]


def test_seeds_reach_every_stage_of_their_own_and_no_other(plan: Any) -> None:
    for name in ("seed1/1_align/default", "seed1/2_probe/default", "seed1/3_extend/init-copy"):
        assert file_of(plan, name)["seed_everything"] == 1
        assert file_of(plan, name)["data"]["init_args"]["rows"]["seed"] == 1
    assert "seed_everything" not in file_of(plan, "base/0_language")


def test_what_a_variant_does_not_have_is_not_trained(plan: Any) -> None:
    parts = {}
    for name in ("default", "calibration-none", "calibration-multiplicative"):
        callbacks = file_of(plan, f"seed0/3_extend/{name}")["trainer"]["callbacks+"]
        (parts[name],) = [
            item["init_args"]["parts"] for item in callbacks if item["class_path"] == "callbacks.TrainOnly"
        ]
    assert parts["default"] == parts["calibration-multiplicative"]
    assert [part for part in parts["default"] if part != "calibration"] == parts["calibration-none"]


def test_an_override_of_a_class_that_is_not_there_is_refused(ablation: SimpleNamespace) -> None:
    tree = {"callbacks": [{"class_path": "a.B", "init_args": {}}]}
    ablation.planning.change(tree, "callbacks.B.init_args.x", 1)
    assert tree == {"callbacks": [{"class_path": "a.B", "init_args": {"x": 1}}]}
    with pytest.raises(UserError, match="class C"):
        ablation.planning.change(tree, "callbacks.C.init_args.x", 1)


def run_plan(ablation: SimpleNamespace, plan: Any, out: Path, fails: tuple[str, ...] = ()) -> tuple[Any, list[str]]:
    """Runs a plan with stand-ins for the processes; returns the outcomes and the names in order of their start."""
    started: list[str] = []

    def do(folder: Path, run: Any, configs: Path) -> dict[str, Any]:
        assert all(name in done for name in run.after)
        started.append(run.name)
        outcome = {"digest": run.digest, "status": "failed" if run.name in fails else "done", "seconds": 1.0}
        path = ablation.running.state_path(folder, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(outcome))
        done.add(run.name)
        return outcome

    done = {name for name, run in plan.runs.items() if ablation.running.read_outcome(out, run)}
    clock = ablation.running.Clock({}, 2)
    return ablation.running.run_all(plan, out, out, 2, clock, do), started


def test_what_is_finished_is_not_run_again(ablation: SimpleNamespace, plan: Any, tmp_path: Path) -> None:
    outcomes, started = run_plan(ablation, plan, tmp_path)
    assert sorted(started) == sorted(plan.runs) == sorted(outcomes)
    assert run_plan(ablation, plan, tmp_path) == (outcomes, [])


def test_a_changed_stage_and_all_after_it_are_run_again(ablation: SimpleNamespace, tmp_path: Path) -> None:
    study = ablation.studies.MOEXTEND_SCENES
    before = ablation.planning.make_plan(study, tmp_path, study.variants, [0])
    run_plan(ablation, before, tmp_path)
    changed = replace(study, every={**study.every, "2_probe": {"trainer.max_steps": 7}})
    after = ablation.planning.make_plan(changed, tmp_path, study.variants, [0])
    _, started = run_plan(ablation, after, tmp_path)
    changed_stages = {"2_probe", "3_extend", "full_finetune"}  # the baseline starts where the extension does
    assert {after.runs[name].stage for name in started} == changed_stages
    assert len(started) == sum(run.stage in changed_stages for run in after.runs.values())


def test_a_failed_run_stops_only_what_reads_from_it_and_is_tried_again(
    ablation: SimpleNamespace, plan: Any, tmp_path: Path
) -> None:
    outcomes, started = run_plan(ablation, plan, tmp_path, fails=("seed0/2_probe/layer_rule-all",))
    assert outcomes["seed0/3_extend/layer_rule-all"]["status"] == "skipped"
    assert outcomes["seed1/3_extend/layer_rule-all"]["status"] == "done"
    assert len(started) == len(plan.runs) - 1
    again = {"seed0/2_probe/layer_rule-all", "seed0/3_extend/layer_rule-all"}
    assert set(run_plan(ablation, plan, tmp_path)[1]) == again


def outcome(vqa: float, text: float = 0.9, **more: Any) -> dict[str, Any]:
    measures = {"vqa": vqa, "text": text, "finite": True, "new_parameters": 5, "layers": [1, 2], **more}
    return {"status": "done", "seconds": 9.0, "training_seconds": 4.0, "measures": measures}


def rows_of(ablation: SimpleNamespace, numbers: dict[tuple[str, str], list[Any]]) -> Any:
    results = {level: {seed: f"{level}{seed}" for seed in range(len(runs))} for level, runs in numbers.items()}
    outcomes = {f"{level}{seed}": run for level, runs in numbers.items() for seed, run in enumerate(runs)}
    return ablation.report.collect(ablation.planning.Plan({}, results), outcomes)


def test_mean_and_standard_deviation_over_seeds(ablation: SimpleNamespace) -> None:
    study = ablation.studies.MOEXTEND_SCENES
    rows = rows_of(ablation, {("default", "default"): [outcome(0.5), outcome(0.6), outcome(0.7)]})
    (item,) = ablation.report.summary(study, rows)
    assert item["vqa"]["mean"] == pytest.approx(0.6)
    assert item["vqa"]["std"] == pytest.approx(0.1)  # by hand: sqrt((0.01 + 0 + 0.01) / 2)
    assert item["text_open"]["mean"] is None
    assert item["seconds"] == 4.0
    assert "0.6000 ± 0.1000" in ablation.report.markdown(study, rows)


def test_a_run_that_failed_or_diverged_is_told_and_left_out_of_the_mean(ablation: SimpleNamespace) -> None:
    study = ablation.studies.MOEXTEND_SCENES
    failed = {"status": "failed", "error": "error: no such calibration"}
    default = [outcome(0.5)] * 3
    levels = {("default", "default"): default, ("init", "copy"): [outcome(0.4), outcome(0.0, finite=False), failed]}
    rows = rows_of(ablation, levels)
    copied = next(item for item in ablation.report.summary(study, rows) if item["level"] == "copy")
    assert copied["vqa"] == {"mean": 0.4, "std": None, "seeds": {0: 0.4}}
    text = ablation.report.markdown(study, rows)
    assert "init, copy, seed 1: diverged" in text
    assert "init, copy, seed 2: error: no such calibration" in text


@pytest.mark.parametrize(
    ("shift", "interval", "word"),
    [
        ([0.50, 0.60, 0.70], [0.45, 0.56, 0.65], "supported"),  # seeds differ, the difference is always near 0.05
        ([0.50, 0.60, 0.70], [0.55, 0.66, 0.75], "contradicted"),
        ([0.50, 0.60, 0.70], [0.60, 0.50, 0.71], "undecided"),
        ([0.50], [0.60], "one seed, no verdict"),
    ],
)
def test_findings_follow_from_the_difference_within_each_seed(
    ablation: SimpleNamespace, shift: list[float], interval: list[float], word: str
) -> None:
    numbers = {("default", "default"): [*map(outcome, shift)], ("layer rule", "interval"): [*map(outcome, interval)]}
    (found,) = ablation.report.findings(ablation.studies.MOEXTEND_SCENES, rows_of(ablation, numbers))
    assert (found.claim.better, found.claim.worse, found.verdict) == (
        ("layer rule", "shift"), ("layer rule", "interval"), word,
    )  # fmt: skip


def test_each_claim_is_judged_by_its_p_value_corrected_for_all(ablation: SimpleNamespace) -> None:
    default, close, far = [0.5, 0.6, 0.7], [0.48, 0.57, 0.66], [0.40, 0.51, 0.6]
    first = {("default", "default"): [*map(outcome, default)], ("layer rule", "interval"): [*map(outcome, close)]}
    study = ablation.studies.MOEXTEND_SCENES
    (alone,) = ablation.report.findings(study, rows_of(ablation, first))
    both = ablation.report.findings(study, rows_of(ablation, {**first, ("layer rule", "random"): [*map(outcome, far)]}))
    assert alone.p == pytest.approx(0.0351, abs=1e-4)  # t = 0.03 / (0.01 / sqrt(3)) of 2 degrees, by a table
    assert [one.verdict for one in (alone, both[0])] == ["supported", "supported"]
    assert both[1].p == pytest.approx(2 * ablation.verdicts.paired_effect([0.1, 0.09, 0.1]).p)
    assert both[0].smallest > alone.smallest


def test_an_effect_has_the_interval_and_p_value_of_a_paired_t_test(ablation: SimpleNamespace) -> None:
    first, second = [5.1, 4.8, 6.0, 5.5], [4.0, 4.9, 5.1, 4.2]
    effect = ablation.verdicts.paired_effect([a - b for a, b in zip(first, second, strict=True)])
    assert effect.p == pytest.approx(ttest_rel(first, second).pvalue)
    assert (effect.high - effect.low) / 2 == pytest.approx(3.1824 * effect.spread / 2, rel=1e-4)  # from a printed table
    assert ablation.verdicts.paired_effect([0.1, 0.1]).p == 0.0
    assert ablation.verdicts.paired_effect([0.0, 0.0]).p == 1.0


def test_the_smallest_effect_is_found_four_times_in_five(ablation: SimpleNamespace) -> None:
    generator = np.random.default_rng(0)
    for seeds, claims in ((8, 1), (8, 15), (3, 1)):
        true = ablation.verdicts.smallest_effect(2.0, seeds, claims)
        drawn = generator.normal(true, 2.0, (20_000, seeds))
        found = (ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05 / claims) & (drawn.mean(axis=1) > 0)
        assert found.mean() == pytest.approx(0.8, abs=0.015)


def test_p_values_are_corrected_as_holm_does(ablation: SimpleNamespace) -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1, and never falling.
    assert ablation.verdicts.corrected([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ablation.verdicts.corrected([0.9, 0.8]) == [1.0, 1.0]
    assert ablation.verdicts.corrected([]) == []


def test_the_page_gets_the_tables_of_a_study(ablation: SimpleNamespace, tmp_path: Path) -> None:
    page = tmp_path / "claims.md"
    page.write_text("# Page\n\n<!-- claims.py moextend -->\nold\n<!-- end -->\n")
    copied = [outcome(0.4), outcome(0.5)]
    rows = rows_of(ablation, {("default", "default"): [outcome(0.5), outcome(0.61)], ("init", "copy"): copied})
    ablation.claims.write_page(page, "moextend", ablation.studies.MOEXTEND, rows, 8)
    text = page.read_text()
    assert "| init: copy over preserving | MoExtend, Table 4" in text
    assert "| pictures | -10.50 [" in text
    assert "| init | copy | 0.4500 ± 0.0707 |" in text
    assert "8 seeds find one of" in text


def test_the_plot_shows_every_level(ablation: SimpleNamespace, tmp_path: Path) -> None:
    failed = {"status": "failed", "error": "no"}
    numbers = {("default", "default"): [outcome(0.5), outcome(0.6)], ("routing", "open"): [failed, failed]}
    ablation.report.plot(ablation.studies.MOEXTEND_SCENES, rows_of(ablation, numbers), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_variants_are_chosen_by_factor_or_by_name(ablation: SimpleNamespace) -> None:
    study = ablation.studies.MOEXTEND_SCENES
    choose = ablation.claims.chosen_variants
    assert {v.factor for v in choose(study, ["layer_rule"])} == {"layer rule"}
    assert sorted(v.name for v in choose(study, ["routing-open", "init"])) == ["init-copy", "routing-open"]
    assert choose(study, []) == list(study.variants)
    with pytest.raises(UserError, match="got 'colour'"):
        choose(study, ["colour"])


def test_a_mistake_ends_in_one_line_and_exit_code_2(ablation: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    assert ablation.claims.main(["moextend", "--out", str(tmp_path), "--only", "colour"]) == 2
    assert capsys.readouterr().err.startswith("error: Expected `--only`")


@pytest.mark.slow
def test_the_quick_study_runs_and_then_has_nothing_left_to_do(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/claims.py"), "moextend_scenes", "--out", str(tmp_path / "a")]
    command += ["--quick", "--seeds", "0", "--only", "routing-open"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stdout + first.stderr
    data = json.loads((tmp_path / "a/ablation.json").read_text())
    assert [(item["factor"], item["level"]) for item in data["levels"]] == [("routing", "masked"), ("routing", "open")]
    for item in data["levels"]:
        assert item["troubles"] == {}
        assert 0 <= item["vqa"]["mean"] <= 1
        assert item["facts"]["new_parameters"]["0"] > 0
    assert (tmp_path / "a/ablation.png").is_file()
    assert "| routing | masked (default) |" in (tmp_path / "a/ablation.md").read_text()
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert f"{len(data['runs'])} of {len(data['runs'])} runs are there already" in second.stdout
    assert json.loads((tmp_path / "a/ablation.json").read_text()) == data
