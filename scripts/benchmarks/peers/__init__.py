"""Peers: other attentions beside the operator (operators.py), other caches beside converted models (README.md)."""
