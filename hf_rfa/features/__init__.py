"""Feature maps, the draws of omega, and the far kernel built from both."""
