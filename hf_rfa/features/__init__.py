"""Feature maps and the draws of omega."""
