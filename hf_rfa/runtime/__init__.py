"""What Transformers calls in a converted model."""
