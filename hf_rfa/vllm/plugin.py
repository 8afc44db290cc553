"""The entry point of vLLM's plugins: what it calls in each of its processes before it looks at a model."""

from vllm import ModelRegistry

from hf_rfa.vllm.config_parser import register_parser
from hf_rfa.vllm.served_classes import SERVED, served_name


def register() -> None:
    """Make converted folders known to vLLM; doing it again changes nothing."""
    known = ModelRegistry.get_supported_archs()
    for architecture in SERVED:
        name = served_name(architecture)
        if name not in known:  # by its path: vLLM looks at a class in a process of its own, and remembers
            ModelRegistry.register_model(name, f"hf_rfa.vllm.models:{name}")
    register_parser()
