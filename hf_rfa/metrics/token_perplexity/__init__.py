"""Token-weighted perplexity and bits per byte, as a metric of Hugging Face Evaluate."""
