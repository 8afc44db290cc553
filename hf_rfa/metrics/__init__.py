"""Metrics for Hugging Face Evaluate that load from a folder, without the hub."""
