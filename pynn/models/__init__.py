"""Models built on pynn layers."""
