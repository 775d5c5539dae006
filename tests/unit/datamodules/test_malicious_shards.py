"""What a shard may not bring: programs, links, devices, and names that lead out of its folder."""

from __future__ import annotations

import tarfile

import pytest
from helpers.faulty_shards import GOOD, conversation_json, plain_image, write_tar

from datamodules.scan import index_shard
from moextend_pl.contracts import UserError

MALICIOUS = {
    "pickle": ([("a.pickle", b"cos\nsystem\n(S'x'\ntR.")], "expected members named"),
    "pyd": ([("a.json", conversation_json("q")), ("a.pyd", b"x")], "expected members named"),
    "weights": ([("a.pth", b"x")], "expected members named"),
    "svg": ([("a.svg", b"<svg/>")], "expected members named"),
    "backslash": ([("..\\a.json", b"{}")], "refused"),
    "home": ([("~/a.json", b"{}")], "refused"),
    "a number of thousands of digits": ([*GOOD, (f"good.{'9' * 5000}.png", plain_image(2))], "expected members named"),
    "two texts of one name": ([*GOOD, ("good.JSON", conversation_json())], "stands twice"),
    "two images of one name": ([*GOOD, ("good.png", plain_image(2))], "stands twice"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_members_are_refused(tmp_path, name):
    members, sentence = MALICIOUS[name]
    with pytest.raises(UserError, match=sentence):
        index_shard(write_tar(tmp_path / "0.tar", members), faults=[])


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
