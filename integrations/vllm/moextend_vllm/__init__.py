"""A plug-in that lets vLLM serve a folder that `python -m moextend_pl export --target hf` wrote."""

from __future__ import annotations

ARCHITECTURE = "MoExtendForConditionalGeneration"
"""How `config.json` of an exported folder names its model."""

TOKENIZER_MODE = "moextend"
"""Name of our tokenizer among vLLM's."""


def register() -> None:
    """Adds model, tokenizer and start-up checks to vLLM's lists; vLLM calls it in each of its processes."""
    # Imported here: an entry point is read by every process that asks for plug-ins.
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    import moextend_pl  # noqa: F401 - tells transformers what an exported folder holds
    from moextend_vllm.start import StartUp

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    MODELS_CONFIG_MAP[ARCHITECTURE] = StartUp
    ModelRegistry.register_model(ARCHITECTURE, "moextend_vllm.model:MoExtendForVllm")
    TokenizerRegistry.register(TOKENIZER_MODE, "moextend_vllm.tokenizer", "MarkTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "vllm.renderers.hf", "HfRenderer")
