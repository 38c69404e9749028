"""torch.nn-compatible layers on pynn kernels."""
