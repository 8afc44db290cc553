"""Which classes of Transformers the plugin serves, and how a config names vLLM's models for them."""

from transformers import PretrainedConfig

from hf_rfa.errors import UnsupportedModelError

#: The class of the model that was converted, as in `rfa_config.json`.
SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
#: What vLLM reads as "this model does not only have softmax layers".
HYBRID = "linear_attention"


def served_name(architecture: str) -> str:
    """The name of the model that serves a converted model of this class.

    Example:
        >>> served_name("LlamaForCausalLM")
        'RFALlamaForCausalLM'
    """
    return f"RFA{architecture}"


def name_server(config: PretrainedConfig, architecture: str) -> None:
    """Let the config of a converted model of class `architecture` name the model that serves it."""
    if architecture not in SERVED:
        raise UnsupportedModelError(
            f"The vLLM plugin serves converted models of {', '.join(SERVED)}. Got {architecture}. Serve the folder "
            "with `hf-rfa serve`."
        )
    config.architectures = [served_name(architecture)]
    kinds = getattr(config, "layer_types", None)
    if kinds:
        local = sorted(set(kinds) - {"full_attention"})
        if local:
            raise UnsupportedModelError(
                f"The vLLM plugin serves models without a sliding window. Got layers of the kind {local}. Serve the "
                "folder with `hf-rfa serve`."
            )
        config.layer_types = [HYBRID] * len(kinds)
