"""The package's own stage files: found by name, listed, copied."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.cli_runs import error_of

from moextend_pl import cli
from moextend_pl.cli.config_files import expand_layers, prepare_arguments
from moextend_pl.cli.recipes import HOME, copy, own_config, recipes

ROOT = Path(__file__).parents[4]


def test_files_of_the_package_are_those_of_the_repository() -> None:
    assert (ROOT / "moextend_pl" / "configs").is_symlink()
    assert HOME.resolve() == ROOT / "configs"
    assert {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()} == set(recipes())


def test_own_files_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("base: [base.yaml, easy_vqa/vqa.yaml]\n")
    expected = [ROOT / "configs" / name for name in ("base.yaml", "easy_vqa/data.yaml", "easy_vqa/vqa.yaml")]
    assert expand_layers(Path("mine.yaml"), "--config") == [*expected, Path("mine.yaml")]
    for name in ("easy_vqa/1_align.yaml", "configs/easy_vqa/1_align.yaml"):
        assert (
            prepare_arguments(["fit", "--config", name]).files[-1].resolve() == ROOT / "configs/easy_vqa/1_align.yaml"
        )


def test_a_file_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("seed_everything: 3\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\n")
    assert expand_layers(Path("mine.yaml"), "--config") == [Path("base.yaml"), Path("mine.yaml")]


@pytest.mark.parametrize("name", ["../setup.cfg", "/etc/passwd", "easy_vqa", "nowhere.yaml", "configs", ""])
def test_nothing_else_is_found(name: str) -> None:
    assert own_config(Path(name)) is None


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_copy_has_the_layers_of_the_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = copy(name, Path("mine"))
    source = HOME / name
    assert {path.relative_to("mine") for path in written} == {
        p.relative_to(source) for p in source.rglob("*") if p.is_file()
    }
    for path in written:
        if path.suffix == ".yaml":
            ours = [layer.resolve() for layer in expand_layers(source / path.relative_to("mine"), "x")]
            theirs = [layer.resolve() for layer in expand_layers(path, "x")]
            assert [layer.name for layer in theirs] == [layer.name for layer in ours]
            assert f"runs/{name}/" not in path.read_text()


def test_copies_go_into_a_folder_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs", "copy", "olmoe_1b_7b", str(tmp_path)]) == 0
    assert (tmp_path / "olmoe_1b_7b" / "3_extend.yaml").read_text().count("runs/olmoe_1b_7b") == 3
    assert str(tmp_path / "olmoe_1b_7b" / "1_align.yaml") in capsys.readouterr().out
    assert "Expected a new folder" in error_of(capsys, ["configs", "copy", "olmoe_1b_7b", str(tmp_path)])
    assert "out of cumo_mistral_7b" in error_of(capsys, ["configs", "copy", "olmo", str(tmp_path)])


def test_listing_names_every_stage_and_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    assert any("3_extend.yaml" in line and "new experts" in line for line in lines)
