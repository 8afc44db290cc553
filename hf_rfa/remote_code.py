"""What the code file in a converted folder imports: `trust_remote_code=True` where nothing has imported hf_rfa yet."""

from typing import Any

from transformers import AutoConfig


class ConvertedConfig:
    """Stands where the Auto classes expect a config class: by the time they ask it, hf_rfa is imported.

    It hands over to `AutoConfig`, which now reads the original's type; so do the model classes that follow.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: the folder's own config is not of this class, and saving it copies no code."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The model's config, of the original's class."""
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=True, **kwargs)
