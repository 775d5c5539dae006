"""The parser takes values as they stand: it opens nothing that they name and imports only what is allowed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from helpers.cli_runs import ALLOW, error_of, fit
from helpers.shaky_server import ShakyServer, shaky_server
from helpers.tiny_world import TinyWorld
from jsonargparse import ArgumentParser

from moextend_pl import cli

RAN = "raise SystemExit('imported')\n"
MONITOR = "lightning.pytorch.callbacks.ThroughputMonitor"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module beside the run that ends the process when it is imported."""
    (tmp_path / "evil_module.py").write_text(RAN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    assert "evil_module" not in sys.modules


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShakyServer]:
    """A server that answers with what could be taken for settings."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "set").write_text("/another/folder\n")
    (folder / "page.yaml").write_text("path: /another/folder\n")
    with shaky_server(folder) as running:
        yield running


@pytest.mark.parametrize("name", ["", "/page.yaml", "/nowhere"])
@pytest.mark.parametrize("form", ["--data.train={}", "--data.init_args.val=[{}]", "file", "set"])
def test_address_reaches_the_data_untouched_and_unasked(
    capsys: pytest.CaptureFixture[str], stage: Path, server: ShakyServer, name: str, form: str
) -> None:
    address = f"{server.url}{name}"
    more = stage.with_name("more.yaml")
    train = {"file": address, "set": [{"path": address}]}.get(form, "unused")
    data = {"class_path": "datamodules.ImageTextShards", "init_args": {"train": train}}
    more.write_text(yaml.safe_dump({"data": data}))
    options = [form.format(address)] if form.startswith("--") else []
    argv = ["fit", "--config", str(stage), "--config", str(more), *ALLOW, *options, "--print_config"]
    assert cli.main(argv) == 0
    read = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert address in str(read["val" if "val" in form else "train"])
    assert "/another/folder" not in str(read)
    assert server.requests == []


@pytest.mark.parametrize("key", ["data.train", "model.inner", "model"])
def test_value_that_names_a_file_is_not_replaced_by_what_stands_there(
    stage: Path, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "values.yaml"
    file.write_text("{class_path: toy_stage.Inner, init_args: {width: 77}, path: /another/folder}\n")
    argv = ["fit", "--config", str(stage), *ALLOW, "--data=datamodules.ImageTextShards", f"--{key}={file}"]
    code = cli.main([*argv, "--print_config"])
    said = capsys.readouterr()
    assert "/another/folder" not in said.out + said.err
    assert "77" not in said.out + said.err
    assert (code, str(file) in said.out + said.err) == (0 if key == "data.train" else 2, True)


def test_run_reads_shards_behind_a_server_from_its_config(tiny_world: TinyWorld, tmp_path: Path) -> None:
    stage = {
        "trainer": {"default_root_dir": str(tmp_path / "run"), "max_steps": 2, "accelerator": "cpu", "logger": False,
                    "enable_progress_bar": False, "use_distributed_sampler": False},
        "model": {"class_path": "moextend_pl.MoELanguageModel", "init_args": {"base": str(tiny_world.base)}},
        "data": {"class_path": "datamodules.ImageTextShards", "init_args": {"batch_size": 4, "reading": {
            "num_workers": 0, "streaming": {"cache_dir": str(tmp_path / "cache")}}}},
    }  # fmt: skip
    with shaky_server(Path(tiny_world.data("text"))) as server:
        stage["data"]["init_args"]["train"] = server.url
        (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage))
        done: Any = cli.run(["fit", "--config", str(tmp_path / "stage.yaml")])
        assert done.trainer.global_step == 2
        assert {"index.json", "00000.tar"} <= {name for name, _, _ in server.requests}


@pytest.mark.usefixtures("evil")
@pytest.mark.parametrize(
    "setting",
    [
        {"class_path": MONITOR, "init_args": {"batch_size_fn": "evil_module.f"}},
        {"class_path": MONITOR, "init_args": {"batch_size_fn": {"class_path": "evil_module.f"}}},
        {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": "evil_module.f"}},
        {"class_path": "callbacks.ExpertExtension", "init_args": {"rule": "evil_module.Rule"}},
        {"class_path": "evil_module.f"},
        "evil_module.f",
    ],
)
def test_code_of_another_package_is_not_imported_whatever_key_names_it(
    capsys: pytest.CaptureFixture[str], stage: Path, setting: Any
) -> None:
    more = stage.with_name("more.yaml")
    more.write_text("# a line\n" + yaml.safe_dump({"trainer": {"callbacks+": [setting]}}, default_flow_style=True))
    message = error_of(capsys, ["fit", "--config", str(stage), "--config", str(more), *ALLOW])
    name = "evil_module.Rule" if "Rule" in str(setting) else "evil_module.f"
    assert message.startswith(f"{more}:")
    assert f": '{name}' is outside of the packages that a config may import" in message
    assert message.endswith("if you trust it, add `--allow-class-path evil_module`.")


@pytest.mark.usefixtures("evil")
def test_code_is_not_imported_where_a_class_takes_anything(capsys: pytest.CaptureFixture[str], stage: Path) -> None:
    argv = ["fit", "--config", str(stage), *ALLOW, "--model.anything={class_path: evil_module.Model}"]
    assert "'evil_module.Model' is outside of the packages" in error_of(capsys, argv)


def test_allowed_package_does_not_lend_its_imports(capsys: pytest.CaptureFixture[str], stage: Path) -> None:
    callback = f"{{class_path: {MONITOR}, init_args: {{batch_size_fn: torch.os.system}}}}"
    message = error_of(capsys, ["fit", "--config", str(stage), *ALLOW, f"--trainer.callbacks+={callback}"])
    assert "'posix.system' is outside of the packages" in message


@pytest.mark.parametrize("value", ["hello", "3", "torch.nothing.f", "torch.float32"])
def test_what_is_no_function_is_refused_where_one_is_asked_for(
    capsys: pytest.CaptureFixture[str], stage: Path, value: str
) -> None:
    callback = f"{{class_path: {MONITOR}, init_args: {{batch_size_fn: {value}}}}}"
    message = error_of(capsys, ["fit", "--config", str(stage), *ALLOW, f"--trainer.callbacks+={callback}"])
    asked = "expected the dotted name of a function, as `package.module.function`"
    assert message == f"`trainer.callbacks.batch_size_fn`: {asked}, got '{value}'."


def test_folder_that_looks_like_a_class_is_a_folder(capsys: pytest.CaptureFixture[str], stage: Path) -> None:
    argv = ["fit", "--config", str(stage), *ALLOW, "--data=datamodules.ImageTextShards", "--data.train=llava.V2"]
    assert cli.main([*argv, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["train"] == "llava.V2"


def test_other_parsers_of_the_process_are_left_as_they_were(stage: Path, tmp_path: Path) -> None:
    def other(value: str) -> Any:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--it", type=type)
        return parser.parse_args([f"--it={value}"]).it

    assert other("fractions.Fraction").__name__ == "Fraction"
    fit(stage)
    assert other("decimal.Decimal").__name__ == "Decimal"
    assert "s" in jsonargparse._optionals._get_config_read_mode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n".join(["a0: &a0 [x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]),
         "aliases spelled out, it holds more than 20000 values"),
        ("\n".join(["a0: &a0 {x: 1, y: 2}", *(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}" for n in range(1, 40))]),
         "aliases spelled out, it holds more than 20000 values"),
        ("a: " + "[" * 5000 + "]" * 5000, "values nest deeper than 40 levels"),
        ("a: &a [*a]", "a value holds itself"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["config", "earlier run"])
def test_text_that_spells_out_beyond_any_setting_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], stage: Path, tmp_path: Path, text: str, words: str, place: str
) -> None:
    if place == "config":
        bomb = tmp_path / "bomb.yaml"
        argv = ["--config", str(bomb)]
    else:
        fit(stage)
        bomb, argv = tmp_path / "run" / "config.yaml", []
    bomb.write_text(text)
    begin = time.monotonic()
    message = error_of(capsys, ["fit", "--config", str(stage), *argv, *ALLOW])
    assert time.monotonic() - begin < 10
    assert message.startswith(str(bomb))
    assert words in message or place == "earlier run"


def test_aliases_of_a_usual_size_are_read(stage: Path) -> None:
    text = stage.read_text().replace("n_experts: 2", "n_experts: &n 2").replace("ToyData", "ToyData\n  init_args:")
    stage.write_text(text + "    batch_size: *n\n")
    assert fit(stage).datamodule.batch_size == 2
