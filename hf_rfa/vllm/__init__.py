"""A plugin for vLLM that serves converted folders: linear heads in pages of constant size, exact heads in paged ones."""
