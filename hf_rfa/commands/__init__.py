"""What the commands `hf-rfa convert` and `hf-rfa chat` do."""
