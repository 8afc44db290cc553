"""What the commands `hf-rfa convert`, `hf-rfa chat` and `hf-rfa doctor` do."""
