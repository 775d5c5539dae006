"""Makes exported models known to transformers at the moment when it first looks for one; until then this is free.

`import moextend_pl` imports neither torch nor transformers. It leaves a finder behind, which waits for the files in
which transformers keeps its lists of models and adds ours to them once they were read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto."


def add_configuration(auto: Any) -> None:
    """Adds the configuration to `configuration_auto`; the model is added when a configuration is first read."""
    from moextend_pl.export.configuration import MoExtendConfig

    class FirstRead(MoExtendConfig):
        """Imports the model only now, for it needs the lists in which it is entered, and takes seconds."""

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            add_model()
            return MoExtendConfig.from_dict(config_dict, **kwargs)

    auto.AutoConfig.register(MoExtendConfig.model_type, FirstRead, exist_ok=True)


def add_model() -> None:
    """Adds the model to the lists of transformers."""
    from transformers import AutoModelForImageTextToText

    from moextend_pl.export.configuration import MoExtendConfig
    from moextend_pl.export.modeling import MoExtendForConditionalGeneration

    AutoModelForImageTextToText.register(MoExtendConfig, MoExtendForConditionalGeneration, exist_ok=True)


def add_image_processor(auto: Any) -> None:
    """Adds the image processor to `image_processing_auto`; what it computes is the same with any backend."""
    from moextend_pl.export.configuration import MoExtendConfig
    from moextend_pl.export.processing import MoExtendImageProcessor

    classes = {"torchvision": MoExtendImageProcessor, "pil": MoExtendImageProcessor}
    auto.AutoImageProcessor.register(MoExtendConfig, image_processor_classes=classes, exist_ok=True)


def add_processor(auto: Any) -> None:
    """Adds the processor to `processing_auto`."""
    from moextend_pl.export.configuration import MoExtendConfig
    from moextend_pl.export.processing import MoExtendProcessor

    auto.AutoProcessor.register(MoExtendConfig, MoExtendProcessor, exist_ok=True)


LISTS: dict[str, Callable[[Any], None]] = {
    f"{AUTO}configuration_auto": add_configuration,
    f"{AUTO}image_processing_auto": add_image_processor,
    f"{AUTO}processing_auto": add_processor,
}


class _Adding(Loader):
    """Reads a file of transformers as it is read anyway, and adds to the list in it."""

    def __init__(self, loader: Any, add: Callable[[Any], None]) -> None:
        self.loader, self.add = loader, add

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.add(module)


class LateRegistration(MetaPathFinder):
    """Finds the files of `LISTS` as Python does, and has them read by `_Adding`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns how to read a file, None for all files but a few."""
        if fullname not in LISTS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _Adding(spec.loader, LISTS[fullname])
        return spec


def register() -> None:
    """Adds exported models to lists that were read already, and waits for the others; once a process."""
    if any(isinstance(finder, LateRegistration) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, LateRegistration())
    for name, add in LISTS.items():
        if name in sys.modules:
            add(sys.modules[name])
