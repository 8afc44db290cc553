"""A plugin for vLLM that serves converted folders: states of constant size beside vLLM's own paged attention."""
