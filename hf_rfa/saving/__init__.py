"""The files that hold a conversion."""
