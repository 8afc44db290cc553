"""From a folder to a running server."""

from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from hf_rfa.checkpoint import load_any, load_tokenizer
from hf_rfa.serving.app import create_app
from hf_rfa.serving.engine import Engine
from hf_rfa.serving.metrics import Metrics
from hf_rfa.serving.model import ServedModel
from hf_rfa.serving.orders import Orders
from hf_rfa.serving.settings import ServeSettings


def serve(settings: ServeSettings) -> None:
    """Serve a model until SIGTERM or Ctrl-C; running requests may then end, new ones are not accepted.

    Raises:
        CheckpointError: The model or its tokenizer cannot be loaded.
        UnsupportedModelError: Its texts cannot share a batch.
        ConfigError: An option does not fit the model.
    """
    app = app_of(settings)
    uvicorn.run(
        app, host=settings.host, port=settings.port, timeout_graceful_shutdown=settings.drain_seconds
    )  # fmt: skip


def app_of(settings: ServeSettings) -> FastAPI:
    """The application for a folder, its model loaded and tried."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    code = {"trust_remote_code": settings.trust_remote_code}
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_any(settings.folder, dtype=settings.dtype, **code).to(device)
    return app_for(model, load_tokenizer(settings.folder, **code), settings)


def app_for(model: Any, tokenizer: Any, settings: ServeSettings) -> FastAPI:
    """The application for a loaded model."""
    served = ServedModel(model, settings.max_length)
    metrics = Metrics(settings.max_batch)
    engine = Engine(
        served, metrics, max_batch=settings.max_batch, max_waiting=settings.max_waiting,
        prefill_tokens=settings.prefill_tokens,
    )  # fmt: skip
    orders = Orders(
        tokenizer, name=settings.name or Path(settings.folder).name, max_length=served.max_length,
        vocabulary=served.vocabulary, ends=served.ends,
    )  # fmt: skip
    return create_app(engine, orders, metrics)
