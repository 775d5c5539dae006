"""What a shard may not bring: programs, links, devices, and names that lead out of its folder."""

from __future__ import annotations

import tarfile
from collections import Counter

import pytest
from helpers.faulty_shards import GOOD, conversation_json, plain_image, write_tar

from datamodules.reader import ShardReader
from datamodules.scan import build_index, index_shard
from moextend_pl.contracts import UserError

REFUSED = {
    "backslash": ([("..\\a.json", b"{}")], "refused"),
    "home": ([("~/a.json", b"{}")], "refused"),
    "two texts of one name": ([*GOOD, ("good.JSON", conversation_json())], "stands twice"),
    "two images of one name": ([*GOOD, ("good.png", plain_image(2))], "stands twice"),
}
SKIPPED = {
    "pickle": ("good.pickle", b"cos\nsystem\n(S'x'\ntR."),
    "pyd": ("good.pyd", b"x"),
    "weights": ("good.pth", b"x"),
    "svg": ("good.svg", b"<svg/>"),
    "a number of thousands of digits": (f"good.{'9' * 5000}.png", plain_image(2)),
    "no image of its own": ("good.seg.png", plain_image(2)),
    "a text of another name": ("good.0.json", b"{}"),
    "a compressed text": ("good.json.gz", b"x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malicious_members_are_refused(tmp_path, name):
    members, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        index_shard(write_tar(tmp_path / "0.tar", members), faults=[])


@pytest.mark.parametrize("name", SKIPPED)
def test_members_of_other_kinds_are_never_read_and_counted(tmp_path, name):
    member, data = SKIPPED[name]
    skipped: Counter[str] = Counter()
    shard = index_shard(write_tar(tmp_path / "0.tar", [GOOD[0], (member, data), *GOOD[1:]]), skipped=skipped)
    assert skipped == {member.removeprefix("good"): 1}
    assert [part.extension for part in shard.sample(0)] == ["json", "png"]
    build_index(tmp_path)
    (raw,) = [ShardReader(tmp_path).read(0)]
    assert raw.images == (GOOD[1][1],)


@pytest.mark.parametrize("name", ["/etc/passwd.json", "../../x.json", "a/" * 40 + "../" * 50 + "x.json"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_odd_paths_in_extension_headers_are_refused(tmp_path, name, form):
    def deep(info):
        info.name = name
        info.pax_headers = {"path": name}
        return info

    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=form) as tar:
        tar.addfile(deep(tarfile.TarInfo(name)))
    with pytest.raises(UserError, match="Absolute names and `..` are refused"):
        index_shard(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="refused"):
        index_shard(path)
