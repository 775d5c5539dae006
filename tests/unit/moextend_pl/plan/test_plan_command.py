"""The command line of `plan`: what it prints, what it writes, and its one-line errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from moextend_pl import cli
from moextend_pl.plan.command import PACKED

ROOT = Path(__file__).parents[4]
EXTEND = "configs/olmoe_1b_7b/3_extend.yaml"
SEQUENCES, LENGTH, STEPS = 128, 2048, 5198


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan(tmp_path: Path, *options: str, config: str = EXTEND) -> dict[str, Any]:
    """Runs the command and returns what it wrote as JSON."""
    out = tmp_path / "plan.json"
    assert cli.main(["plan", "--config", config, "--json", str(out), *options]) == 0
    data: dict[str, Any] = json.loads(out.read_text())
    return data


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["plan", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def total(data: dict[str, Any]) -> float:
    return sum(data["memory"].values())


def test_tables_end_with_the_verdict_and_name_what_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = plan(tmp_path, "--gpu", "h200", "--price", "3")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("fits: ")
    assert lines[-1].endswith(f"{data['time']['hours']:,.1f} hours, {data['time']['cost']:,.0f} USD")
    assert len(data["notes"]) == 4
    assert all(note in lines for note in data["notes"])
    sizes = [line.split() for line in lines if line.startswith("  new_experts")]
    assert sizes == [["new_experts", f"{8 * 3 * 2048 * 1024:,}", "0.1", "bfloat16,", "learns"]]
    assert f"{total(data) / 1e9:,.1f} GB needed" in lines[-1]


def test_time_and_cost_follow_from_operations_speed_and_price(tmp_path: Path) -> None:
    card = ["--gpu-tflops", "100", "--gpu-memory", "80", "--mfu", "0.5", "--price", "2"]
    data = plan(tmp_path, *card)
    batch = data["run"]["micro_batch"]
    seconds = STEPS * SEQUENCES / batch * sum(data["operations"].values()) / (0.5 * 100e12)
    assert data["time"]["hours"] == pytest.approx(seconds / 3600)
    assert data["time"]["cost"] == pytest.approx(2 * seconds / 3600)
    assert data["time"]["tokens_per_second"] * seconds == pytest.approx(STEPS * SEQUENCES * LENGTH)


def test_measured_speed_needs_no_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = plan(tmp_path, "--tokens-per-second", "1000")
    assert data["gpu"] is None
    assert data["time"]["hours"] == pytest.approx(STEPS * SEQUENCES * LENGTH / 1000 / 3600)
    assert "name a card with --gpu" in capsys.readouterr().out.splitlines()[-1]


def test_more_gpus_keep_the_global_batch_and_share_the_time(tmp_path: Path) -> None:
    one = plan(tmp_path, "--gpu", "h200", "--price", "3")
    eight = plan(tmp_path, "--gpu", "h200", "--price", "3", "--gpus", "8")
    assert eight["run"]["accumulate"] * 8 == one["run"]["accumulate"]
    assert eight["time"]["hours"] * 8 == pytest.approx(one["time"]["hours"])
    assert eight["time"]["cost"] == pytest.approx(one["time"]["cost"])
    # Each rank holds all of it, and a second copy of the gradients that are sent.
    assert total(eight) - total(one) == one["memory"]["gradients"] == eight["memory"]["buckets"]


def test_options_of_fit_change_the_plan(tmp_path: Path) -> None:
    sixteen, thirtytwo = plan(tmp_path), plan(tmp_path, "--trainer.precision", "32-true", "--data.batch_size", "4")
    assert thirtytwo["memory"]["gradients"] == 2 * sixteen["memory"]["gradients"]
    assert thirtytwo["run"]["micro_batch"] == 4
    mixed = plan(tmp_path, "--trainer.precision", "bf16-mixed", "--data.batch_size", "4")
    assert mixed["memory"]["weights"] == thirtytwo["memory"]["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("short", "long"), [("bf16", "bf16-mixed"), ("16", "16-mixed"), ("32", "32-true")])
def test_short_names_of_precisions_are_lightning_s(short: str, long: str, tmp_path: Path) -> None:
    brief, full = (plan(tmp_path, "--trainer.precision", name) for name in (short, long))
    assert brief["memory"] == full["memory"]


@pytest.mark.parametrize(("devices", "gpus"), [("0,1", 2), ("[0, 1]", 2), ("2", 2), ("3,", 1), ("auto", 1)])
def test_devices_are_counted_as_lightning_reads_them(devices: str, gpus: int, tmp_path: Path) -> None:
    assert plan(tmp_path, f"--trainer.devices={devices}", "--data.batch_size=4")["run"]["gpus"] == gpus


def test_time_uses_the_mean_length_and_memory_the_longest(tmp_path: Path) -> None:
    padded, packed = plan(tmp_path, "--gpu", "h200"), plan(tmp_path, "--gpu", "h200", "--mean-length", "1024")
    assert packed["memory"] == padded["memory"]
    assert 0.4 < packed["time"]["hours"] / padded["time"]["hours"] < 0.55


def test_weights_that_are_there_win_over_the_files_beside_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "weights" / "OLMoE-1B-7B-0924-Instruct"
    folder.mkdir(parents=True)
    config = json.loads((ROOT / "configs/olmoe_1b_7b/model/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    data = plan(tmp_path, config=str(ROOT / EXTEND))
    stock = plan(tmp_path, "--model.language.base", str(ROOT / "configs/olmoe_1b_7b/model"), config=str(ROOT / EXTEND))
    sizes = [{part["name"]: part["parameters"] for part in d["shape"]["parts"]} for d in (data, stock)]
    assert sizes[1]["language"] - sizes[0]["language"] == 2 * (50_304 - 1000) * 2048


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gpu", "h300"], "Expected `--gpu` among b200, h200,"),
        (["--gpu-tflops", "fast"], "argument --gpu-tflops: invalid float value: 'fast'."),
        (["--gpus", "0"], "Expected `--gpus` > 0, got 0."),
        (["--price", "nan"], "Expected `--price` > 0, got nan."),
        (["--tokens-per-second", "inf"], "Expected `--tokens-per-second` > 0, got inf."),
        (["--mfu", "30"], "Expected `--mfu` in (0, 1], the share of the card's speed, got 30."),
        (["--mean-length", "4096"], "Expected `--mean-length` within the 2048 tokens of a padded sequence, got 4096."),
        (["--json", "configs"], "Expected a file for `--json`, got the folder configs."),
        (["--gpus", "3"], "cannot be shared by 3 GPUs"),
        (["--length", "500"], "Expected sequences longer than the 576 tokens of an image, got 500."),
        (["--model.encoder.image_size", "224"], "Expected `encoder.image_size` 336,"),
        (["--data.init_args.rows", "{max_length: null}"], "Expected `data.rows.max_length` or `--length`"),
        (["--trainer.max_steps", "-1"], "Expected `trainer.max_steps` > 0, got -1."),
        (["--gpuz", "h200"], "there is no option '--gpuz'"),
    ],
)
def test_mistake_is_one_line(capsys: pytest.CaptureFixture[str], options: list[str], expected: str) -> None:
    assert expected in error_of(capsys, "--config", EXTEND, *options)


def test_plan_without_a_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config" in error_of(capsys, "--gpu", "h200")


def test_missing_weights_without_a_stand_in_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "recipe"
    shutil.copytree(ROOT / "configs" / "olmoe_1b_7b", folder)
    shutil.copy(ROOT / "configs" / "base.yaml", tmp_path)
    shutil.rmtree(folder / "tower")
    message = error_of(capsys, "--config", str(folder / "1_align.yaml"))
    assert "Expected a transformers vision model in weights/clip-vit-large-patch14-336" in message
    (folder / "extension_plan.yaml").unlink()
    message = error_of(capsys, "--config", str(folder / "3_extend.yaml"))
    assert "Expected an extension plan at runs/olmoe_1b_7b/2_probe/extension_plan.yaml" in message


def test_stage_of_the_language_model_alone_is_planned(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs/olmoe_1b_7b/1_align.yaml").read_text())
    path = tmp_path / "language.yaml"
    text = {
        "base": str(ROOT / "configs/base.yaml"),
        "trainer": {"default_root_dir": "runs/x", "max_steps": 10, "precision": "bf16-true"},
        "data": {"class_path": "datamodules.ImageTextShards", "init_args": config["data"]["init_args"]},
        "model": {
            "class_path": "moextend_pl.MoELanguageModel",
            "init_args": {"base": str(ROOT / "configs/olmoe_1b_7b/model")},
        },
    }
    path.write_text(yaml.safe_dump(text))
    data = plan(tmp_path, config=str(path))
    assert data["shape"]["tower"] is None
    parameters = sum(part["learning"] for part in data["shape"]["parts"])
    assert parameters == 6_919_161_856
    assert data["memory"]["gradients"] == 2 * parameters


def test_what_the_arithmetic_leaves_out_is_said(tmp_path: Path) -> None:
    plain = plan(tmp_path)["notes"]
    assert plan(tmp_path, "--trainer.strategy=ddp")["notes"] == plain
    assert plan(tmp_path, "--data.rows.packing=true")["notes"] == [*plain, PACKED]


def test_a_strategy_that_no_stage_takes_is_not_planned_either(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`trainer.strategy` fsdp" in error_of(capsys, "--config", EXTEND, "--trainer.strategy=fsdp")


def test_base_that_is_quantised_already_is_said_and_not_quantised_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = json.loads((ROOT / "configs/olmoe_1b_7b/model/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stock, "quantization_config": {"quant_method": "gptq"}}))
    option = f"--model.language.base={tmp_path}"
    assert f"{tmp_path} is quantised already" in plan(tmp_path, option, "--gpu", "rtx4090")["notes"][-1]
    assert "nf4" not in capsys.readouterr().out
    assert "is quantised already" in error_of(
        capsys, "--config", EXTEND, option, "--model.language.compute.quantize=nf4"
    )


def test_activation_checkpointing_trades_activations_for_operations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plain = plan(tmp_path)
    assert "computed again" not in capsys.readouterr().out
    recomputing = plan(tmp_path, "--model.init_args.language.compute.activation_checkpointing=true")
    assert "forward, computed again" in capsys.readouterr().out
    assert recomputing["memory"]["activations"] < 0.3 * plain["memory"]["activations"]
    assert sum(recomputing["operations"].values()) > 1.2 * sum(plain["operations"].values())


@pytest.mark.slow
def test_a_stage_of_cumo_is_planned_with_the_parameters_of_the_paper(tmp_path: Path) -> None:
    data = plan(tmp_path, "--gpus", "32", config="configs/cumo_mistral_7b/3_visual_instruction_tuning.yaml")
    sizes = {part["name"]: part["parameters"] for part in data["shape"]["parts"]}
    # The tower's last block is not read, and stays out: four MLPs and a router less than the paper's 0.908 B.
    assert sizes["projector"] == 100_704_256
    assert sizes["language"] == 7_241_732_096
    # The file says 256 sequences on one GPU.
    assert (data["run"]["micro_batch"], data["run"]["accumulate"]) == (8, 1)
    # Half of what the tower would keep in fp32, and a fortieth where its blocks keep their input only.
    tower = data["shape"]["tower"]
    assert data["run"]["recompute_images"]
    assert tower["again"] + tower["block"] / 8 < tower["saved"] / 15
