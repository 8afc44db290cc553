"""Which classes of Transformers the plugin serves, and the names of vLLM's models for them."""

#: The class of the model that was converted, as in `rfa_config.json`.
SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def served_name(architecture: str) -> str:
    """The name of the model that serves a converted model of this class.

    Example:
        >>> served_name("LlamaForCausalLM")
        'RFALlamaForCausalLM'
    """
    return f"RFA{architecture}"
