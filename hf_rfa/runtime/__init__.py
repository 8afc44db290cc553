"""The part of a converted model that Transformers calls."""
