"""The RFA operator: a float64 definition, and the linear-time forms that are tested against it."""
