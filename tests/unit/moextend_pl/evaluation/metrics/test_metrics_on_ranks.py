"""A metric gives the same score on any number of ranks: padded samples count once, a rank may have none."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.random_answers import captions

from moextend_pl.evaluation.metrics import CIDErD, KeyedMetric, MMEScore, POPEScore


def rows() -> list[tuple[str, str, Any]]:
    return [(f"k{n}", said, told) for n, (said, told) in enumerate(captions(8, 21))]


def update(metric: KeyedMetric, part: list[tuple[str, str, Any]]) -> None:
    keys, said, told = zip(*part, strict=True)
    metric.update(keys, said, told)


def whole() -> dict[str, float]:
    metric = CIDErD()
    update(metric, rows())
    return {name: value.item() for name, value in metric.compute().items()}


def test_batches_add_up_and_fillers_do_not_count() -> None:
    metric = CIDErD()
    for start in range(0, 21, 4):
        update(metric, rows()[start : start + 4])
    update(metric, rows()[:3])  # again, as a padding sampler would
    update(metric, [("", "a filler", ["nobody"])])
    assert {name: value.item() for name, value in metric.compute().items()} == whole()
    assert len(metric.records()) == 21
    metric.reset()
    assert metric.records() == []


def test_text_of_any_script_survives() -> None:
    metric = CIDErD()
    update(metric, [("schlüssel\n1", "ein Bär \u2028 \n 熊", ["ein Bär", "熊"])])
    (record,) = metric.records()
    assert record == {"key": "schlüssel\n1", "prediction": "ein Bär \u2028 \n 熊", "truth": ["ein Bär", "熊"]}


def test_one_picture_split_over_batches_is_one_picture() -> None:
    metric = MMEScore()
    for n, label in enumerate(("yes", "no")):
        metric.update([str(n)], [label], [{"subtask": "OCR", "image": "1", "label": label}])
    assert metric.compute()["total"].item() == 200


def on_rank(rank: int, world: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    metric, empty = CIDErD(), POPEScore()
    if rank < 2:  # the third rank has nothing
        mine = rows()[rank::2]
        update(metric, [*mine, rows()[0]])  # every rank is padded with the first sample
    scores = {name: value.item() for name, value in metric.compute().items()}
    assert empty.compute() == {}
    torch.save({"scores": scores, "local": len(metric.records())}, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_score_of_three_ranks_is_that_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked, which needs no import of torch again.
    mp.start_processes(on_rank, args=(3, port, str(tmp_path)), nprocs=3, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    # Joined in another order of samples, sums differ in the last bit.
    assert all(each["scores"] == pytest.approx(whole(), rel=1e-12) for each in found)
    assert [each["local"] for each in found] == [11, 11, 0]
