"""From softmax attention to random features and back."""
