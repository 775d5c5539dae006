"""What the package promises, on a real CUDA device: receipts, steps without a wait, resume, generation, CuMo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plain_experts import plain_loop
from helpers.tiny_world import GROWN, TinyWorld, make_plan, perturb
from lightning.pytorch import Callback, Trainer
from torch.utils._pytree import tree_map_only

from callbacks.expert_extension import ExpertExtension
from callbacks.outputs import SaveDelta
from callbacks.train_only import TrainOnly
from moextend_pl.contracts import Batch, TrainPlan, UpcycleSpec
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.kernels.gated_experts import gated_experts
from moextend_pl.samples.collate import collate_packed
from moextend_pl.training.optim import OptimSpec, build_optimizer

NEW = ("new_experts", "new_routers", "calibration")
EXTEND = (*NEW, "projector")


def there(model: MoExtend, batch: Batch) -> Batch:
    """Moves a batch as a trainer does."""
    moved: Any = tree_map_only(torch.Tensor, lambda t: t.cuda(), model.on_before_batch_transfer(batch, 0))
    moved["pixel_values"] = moved["pixel_values"].to(model.language.model.dtype)
    return moved


@contextmanager
def no_waiting() -> Iterator[None]:
    """Makes every wait for the device an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trained(model: MoExtend) -> MoExtend:
    """Moves what is new, as training would."""
    perturb([p for name in NEW for p in model.parts()[name]], size=0.3)
    return model


@pytest.mark.parametrize("routing", ["masked", "masked_tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", ["t", "ttt", "tttttttt"])
@torch.no_grad()
def test_text_logits_are_those_of_the_base_bit_for_bit(
    tiny_world: TinyWorld, dtype: torch.dtype, kinds: str, routing: str
) -> None:
    base = tiny_world.model().to("cuda", dtype)
    model = trained(tiny_world.model(make_plan(routing=routing, init="copy"))).to("cuda", dtype)
    batch = there(model, tiny_world.batch(model, kinds))
    assert torch.equal(model.language(batch, model.embed(batch)), base.language(batch, base.embed(batch)))
    mixed = there(model, tiny_world.batch(model, "ti"))
    got, expected = model.language(mixed, model.embed(mixed)), base.language(mixed, base.embed(mixed))
    length = int(mixed["attention_mask"][0].sum())
    # Beside a picture the groups of rows have other sizes, for which a GPU takes other kernels.
    torch.testing.assert_close(got[0, :length], expected[0, :length])
    assert not torch.allclose(got[1], expected[1], atol=0.1)


def stages(world: TinyWorld) -> dict[str, MoExtend]:
    spec = UpcycleSpec(experts=4, top_k=2)
    cumo = world.cumo(encoder=spec, projector=spec, language=spec)
    cumo.train_plan = TrainPlan(("encoder", "projector", "language", "routers"))
    cumo.configure_model()
    return {
        "align": world.model(None, ("projector",)),
        "probe": world.model(None, ("routers",)),
        "masked": world.model(make_plan(routing="masked"), EXTEND),
        "masked_tokens": world.model(make_plan(routing="masked_tokens"), EXTEND),
        "open": world.model(make_plan(routing="open"), EXTEND),
        "two experts": world.model(make_plan(GROWN, (1, 2)), EXTEND),
        "compiled": world.model(make_plan(routing="masked"), EXTEND, compile=True),
        "CuMo": cumo,
    }


NAMES = ("align", "probe", "masked", "masked_tokens", "open", "two experts", "compiled", "CuMo")


@pytest.mark.parametrize("kinds", ["iti", "tt", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_the_device_nowhere(tiny_world: TinyWorld, name: str, kinds: str) -> None:
    model = stages(tiny_world)[name].to("cuda", torch.bfloat16).train()
    model.cache_features = False
    if kinds == "packed":
        batch = collate_packed([tiny_world.samples(model, "it"), tiny_world.samples(model, "tt")], 0)
    else:
        batch = tiny_world.batch(model, kinds)
    batch = there(model, batch)
    optimizer, _ = build_optimizer(model.parameters(), OptimSpec(), total_steps=10)
    model(batch).loss.backward()  # compiles and autotunes, which may wait
    optimizer.step()
    with no_waiting():
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_a_cpu(tiny_world: TinyWorld, dtype: torch.dtype) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = trained(tiny_world.model(make_plan(routing="masked"), EXTEND)).to(device).train()
        batch = tiny_world.batch(model, "iti")
        batch = there(model, batch) if device == "cuda" else model.on_before_batch_transfer(batch, 0)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(batch).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, expected in zip(results[1], results[0], strict=True):
        size = expected.float().norm()
        assert (ours.cpu().float() - expected.float()).norm() <= (1e-4 if dtype == torch.float32 else 0.1) * size + 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("sizes", [(300, 128, 128, 8, 2, 2), (1000, 2048, 1024, 16, 1, 4), (77, 80, 72, 3, 0, 2)])
def test_kernels_learn_as_a_plain_loop(sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    tokens, width, inner, E, N, top_k = sizes
    torch.manual_seed(0)
    x, dy = torch.randn(2, tokens, width, device="cuda").to(dtype).unbind()
    weights = torch.rand(tokens, top_k, device="cuda")
    indices = torch.rand(tokens, E + N, device="cuda").topk(top_k).indices
    shapes = (2 * inner, width), (width, inner)
    stacks = [[(torch.randn(n, *shape, device="cuda") / width**0.5).to(dtype) for shape in shapes] for n in (E, N)]
    results = []
    for compute, kind in ((gated_experts, dtype), (plain_loop, torch.float64)):
        learning = [tensor.to(kind).requires_grad_() for tensor in (x, weights, *stacks[1])]
        y = compute(learning[0], indices, learning[1], [one.to(kind) for one in stacks[0]], learning[2:])
        learning = learning if N else learning[:2]
        results.append([y.detach(), *torch.autograd.grad(y, learning, dy.to(kind))])
    for ours, expected in zip(*results, strict=True):
        assert (ours.double() - expected).norm() <= tolerance * expected.norm()


class StopAt(Callback):
    """Ends a run after some steps, as a signal would, and leaves a checkpoint."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Saves and stops."""
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stopped.ckpt")
            trainer.should_stop = True


def fit(
    world: TinyWorld, folder: Path, *more: Callback, start: Path | None = None, language: Any = None, **options: Any
) -> MoExtend:
    """Trains the extension by Lightning on the device, as the command line does."""
    make_plan(routing="masked", init="copy").save(folder.parent / "plan.yaml")
    model = world.unbuilt(**(language or {}))
    callbacks = [TrainOnly(list(EXTEND)), ExpertExtension(plan=str(folder.parent / "plan.yaml")), SaveDelta(), *more]
    trainer = Trainer(
        default_root_dir=folder, max_steps=8, max_epochs=-1, accelerator="gpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=0, callbacks=callbacks, **options,
    )  # fmt: skip
    trainer.fit(model, world.datamodule(), ckpt_path=start, weights_only=False)
    return model


def learned(model: MoExtend) -> list[torch.Tensor]:
    return [p.detach().cpu() for part in EXTEND for p in model.parts()[part]]


def test_a_run_is_repeated_and_resumed_bit_for_bit(tiny_world: TinyWorld, tmp_path: Path) -> None:
    whole, again = (learned(fit(tiny_world, tmp_path / name)) for name in ("whole", "again"))
    stopped = learned(fit(tiny_world, tmp_path / "run", StopAt(4)))
    resumed = learned(fit(tiny_world, tmp_path / "run", start=tmp_path / "run" / "stopped.ckpt"))
    assert not all(map(torch.equal, whole, stopped))
    assert all(map(torch.equal, whole, again))
    assert all(map(torch.equal, whole, resumed))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_sixteen_bits_learn_and_are_loaded_again(tiny_world: TinyWorld, tmp_path: Path, precision: str) -> None:
    model = fit(tiny_world, tmp_path / "run", precision=precision).eval()
    loaded = MoExtend.load(tmp_path / "run").to("cuda")
    batch = there(loaded, tiny_world.batch(loaded, "iti"))
    with torch.no_grad():
        got = loaded.language(batch, loaded.embed(batch))
        expected = model.to("cuda").language(batch, model.embed(batch))
    assert torch.equal(got, expected)


def test_answers_are_those_of_a_cpu(tiny_world: TinyWorld) -> None:
    model = trained(tiny_world.model(make_plan(routing="masked", init="copy")))
    batch = tiny_world.batch(model, "itit", generation=True)
    expected = model.answer(batch)
    assert model.cuda().answer(there(model, batch)) == expected


def test_a_base_in_four_bits_is_extended_and_learns(tiny_world: TinyWorld, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = fit(tiny_world, tmp_path / "run", language={"quantize": "nf4"}, precision="bf16-true")
    assert all(p.isfinite().all() for part in NEW for p in model.parts()[part])


def test_growing_a_model_that_stands_on_the_device_leaves_everything_there(tiny_world: TinyWorld) -> None:
    model = tiny_world.language()
    model.cuda()
    model.extend(make_plan(routing="open"))
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    with torch.device("cuda"):
        built = tiny_world.model(make_plan(routing="open"))
    assert {p.device.type for part in NEW for p in built.parts()[part]} == {"cuda"}
