"""From a folder to a running server."""

import socket
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from hf_rfa.checkpoint import load_any, load_tokenizer
from hf_rfa.errors import ConfigError
from hf_rfa.runtime.devices import chosen_device
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
        ConfigError: An option does not fit the model, or the address is not to be had.
    """
    check_address(settings.host, settings.port)
    app = app_of(settings)
    uvicorn.run(
        app, host=settings.host, port=settings.port, timeout_graceful_shutdown=settings.drain_seconds
    )  # fmt: skip


def check_address(host: str, port: int) -> None:
    """Whether a server can listen there, asked before a model is loaded, which may take minutes.

    Raises:
        ConfigError: The port is in use, the host is none of this machine's.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"The server cannot listen on {host!r}, port {port}. Got: {error.strerror}. Choose another --port or "
            "--host, or stop what listens there."
        ) from error


def app_of(settings: ServeSettings) -> FastAPI:
    """The application for a folder, its model loaded and tried."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    code = {"trust_remote_code": settings.trust_remote_code}
    device = chosen_device(settings.device)
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
