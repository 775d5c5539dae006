"""What is settled before vLLM starts: options that a model needs, and those under which it would answer wrongly."""

from __future__ import annotations

from typing import Any

from moextend_pl.contracts import ExtensionPlan
from moextend_pl.moe.extension.reach import check_task
from moextend_vllm import TOKENIZER_MODE
from moextend_vllm.places import FLAG, MOST_EXTENSIONS


class StartUp:
    """Settles options; vLLM calls it, by these names, while it reads them."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Sets our tokenizer, positions that carry flags, and plain execution.

        Raises:
            UserError: If questions would need a task that was not named at export.
            ValueError: If the model cannot be served.
        """
        config = model_config.hf_config
        plans = [ExtensionPlan.from_dict(plan) for plan in config.plans]
        check_task(plans, config.task, has_image=True)
        if len(plans) > MOST_EXTENSIONS:
            raise ValueError(f"Expected a model extended at most {MOST_EXTENSIONS} times, got {len(plans)} extensions.")
        if model_config.max_model_len >= FLAG:
            raise ValueError(f"Expected --max-model-len below {FLAG}, got {model_config.max_model_len}. Lower it.")
        if model_config.quantization is not None:
            raise ValueError(
                f"Expected an exported model as it is, got --quantization {model_config.quantization}, which knows "
                "nothing of new experts. Leave it out."
            )
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = TOKENIZER_MODE
        # vLLM lets the model say positions where sections of M-RoPE are named; no rotary embedding reads these.
        config.mrope_section = [1, 1, 1]
        # Masks are made anew for each pass, which neither a compiled nor a recorded pass would see.
        model_config.enforce_eager = True

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Turns off what would mix up requests.

        Raises:
            ValueError: If an option was given that is not supported.
        """
        parallel = vllm_config.parallel_config
        if parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1:
            raise ValueError(
                "Expected one device for a model, got --tensor-parallel-size or --pipeline-parallel-size above 1, "
                "which nobody has tested with new experts. Start one server a device, or serve with "
                "`python -m moextend_pl serve`."
            )
        if vllm_config.speculative_config is not None or vllm_config.lora_config is not None:
            raise ValueError("Expected neither speculative decoding nor LoRA, got one of them. Leave it out.")
        plans = [ExtensionPlan.from_dict(plan) for plan in vllm_config.model_config.hf_config.plans]
        if any(plan.routing == "masked" for plan in plans):
            # Keys and values of a text depend on whether a picture comes after it.
            vllm_config.cache_config.enable_prefix_caching = False
