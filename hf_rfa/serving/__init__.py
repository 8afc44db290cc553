"""An OpenAI-compatible server, `hf-rfa serve FOLDER`, that batches requests as they come; extra `serve`."""
