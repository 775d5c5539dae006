"""Dense language models of one base become the experts of one Mixtral (Uni-MoE's third stage, arXiv 2405.11273).

Tensors get the names of a published Mixtral, one expert after another, so that none is joined with others before it is
written; transformers stacks them when it reads the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moextend_pl.contracts import UpcycleSpec, UserError
from moextend_pl.convert.files import TensorFiles
from moextend_pl.models.model_folder import LIKE_MIXTRAL, is_like_mixtral
from moextend_pl.moe.upcycle import UpcycledRouter, layer_seed
from moextend_pl.runs.sources import NO_MATTER

MLP = re.compile(r"(model\.layers\.(\d+)\.)mlp\.(gate|up|down)_proj\.weight")
OF_THE_MODEL = ("model.", "lm_head.")  # other files may lie beside it, such as a publisher's own layout
PUBLISHED = {"gate": "w1", "up": "w3", "down": "w2"}
# What may differ between models that compute alike: the first one's is kept.
KEPT = (*NO_MATTER, "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "attention_dropout")


def model_tensors(files: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that belong to a causal language model, in the order of its files."""
    return [name for name in files if name.startswith(OF_THE_MODEL)]


def assembled(sources: Sequence[Mapping[str, Tensor]], spec: UpcycleSpec) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a mixture whose expert n is the MLP of source n, with routers as upcycling begins them.

    Args:
        sources: Tensors of dense models by name, of equal names and shapes.
        spec: Its `experts` are the sources.

    Returns:
        Names of a published Mixtral and tensors; what is no MLP is the first source's.
    """
    for name in model_tensors(sources[0]):
        tensor, found = sources[0][name], MLP.fullmatch(name)
        if found is None:
            yield name, tensor
            continue
        block = f"{found[1]}block_sparse_moe."
        for expert, source in enumerate(sources):
            yield f"{block}experts.{expert}.{PUBLISHED[found[3]]}.weight", source[name] if expert else tensor
        if found[3] == "gate":
            router = UpcycledRouter(tensor.shape[1], spec, tensor, layer_seed(spec, int(found[2])))
            yield f"{block}gate.weight", router.weight.detach()


def check_configurations(configs: Mapping[str, PreTrainedConfig], spec: UpcycleSpec) -> None:
    """Refuses models that no Mixtral computes, or whose configurations differ in what they compute.

    Args:
        configs: By source.
        spec: As in `assembled`.

    Raises:
        UserError: If it is so; names the source.
    """
    (first, base), *others = configs.items()
    for source, config in configs.items():
        if not is_like_mixtral(config, spec) or getattr(config, "quantization_config", None) is not None:
            raise UserError(
                f"Expected dense models of the families {' and '.join(LIKE_MIXTRAL)}, without biases and not "
                f"quantised, got {source}, a {config.model_type}. Name another source."
            )
    expected = base.to_dict()
    for source, config in others:
        values = config.to_dict()
        for key in sorted((expected.keys() | values.keys()) - set(KEPT), key=lambda key: (key != "model_type", key)):
            if expected.get(key) != values.get(key):
                raise UserError(
                    f"Expected sources trained from one base, got {source} with `{key}` {values.get(key)!r} where "
                    f"{first} has {expected.get(key)!r}. Leave one of them out."
                )


def check_tensors(sources: Mapping[str, TensorFiles], layers: int) -> None:
    """Refuses sources whose tensors differ in name, shape or type; reads none of them.

    Args:
        sources: By name.
        layers: Decoder layers that the configurations tell of.

    Raises:
        UserError: If it is so, or a layer lacks a part of its MLP; names the tensor.
    """
    (first, base), *others = sources.items()
    names = model_tensors(base)
    expected = {f"model.layers.{n}.mlp.{kind}_proj.weight" for n in range(layers) for kind in PUBLISHED}
    if odd := expected ^ {name for name in names if MLP.fullmatch(name)}:
        raise UserError(
            f"Expected in {first} the MLPs of {layers} layers, as its config.json says; {min(odd)} is missing or too "
            "much. Copy the model's folder again."
        )
    for source, tensors in others:
        if odd := set(names) ^ set(model_tensors(tensors)):
            raise UserError(
                f"Expected the same tensors in all sources, got {min(odd)} in only one of {first} and {source}. Name "
                "models trained from one base."
            )
        for name in names:
            ours, theirs = ((*held.shape(name), held.dtype(name)) for held in (base, tensors))
            if ours != theirs:
                raise UserError(
                    f"Expected {name} to have one shape and type in all sources, got {ours} in {first} and {theirs} "
                    f"in {source}. Name models trained from one base, saved in one type."
                )


def differences(sources: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Returns the names of tensors outside of MLPs that are not the same in all sources, bit for bit.

    Args:
        sources: Of equal names and shapes; one tensor of two sources is held at a time.
    """
    base, *others = sources
    shared = [name for name in model_tensors(base) if not MLP.fullmatch(name)]
    return [name for name in shared if not all(torch.equal(base[name], source[name]) for source in others)]
