"""How vLLM learns that a folder is a converted one: the parser of its config sends it to the model that serves it.

A converted folder's `config.json` names the class of the original model, and vLLM would serve that one, with softmax.
So the parser of Hugging Face configs, which vLLM lets plugins replace by name, looks for the conversion beside it.
"""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from vllm.transformers_utils.config import HFConfigParser, get_config_parser, register_config_parser

from hf_rfa.errors import CheckpointError
from hf_rfa.runtime.record import CONFIG_FIELD
from hf_rfa.saving.saved_files import CONFIG_FILE, read_json
from hf_rfa.saving.source import Source
from hf_rfa.vllm.served_classes import name_server

#: vLLM's name for the format that it takes a folder with a `config.json` for.
FORMAT = "hf"


class ConvertedConfigParser(HFConfigParser):
    """vLLM's own parser; the config of a converted model names the model that serves it."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict, PretrainedConfig]:
        """The config as a dictionary and as an object.

        Raises:
            CheckpointError: `config.json` speaks of a conversion that is not there.
            UnsupportedModelError: A converted model of a class that the plugin does not serve.
        """
        values, config = super().parse(model, trust_remote_code, revision, code_revision, **kwargs)
        marked = CONFIG_FIELD in values
        if marked or (Path(model) / CONFIG_FILE).is_file():
            source = Source.of(model, {"revision": revision})
            path = source.find(CONFIG_FILE)
            if path is None:
                raise CheckpointError(
                    f"{source} was converted, but {CONFIG_FILE} is not there: it would run softmax attention. Copy it "
                    "beside the weights, or save the model again."
                )
            name_server(config, str(read_json(path).get("architecture")))
        return values, config


def register_parser() -> None:
    """Put the parser in the place of vLLM's own; doing it again changes nothing."""
    if not isinstance(get_config_parser(FORMAT), ConvertedConfigParser):
        register_config_parser(FORMAT)(ConvertedConfigParser)
