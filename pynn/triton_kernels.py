"""The Triton kernels, one module per op. A source tree has them in ../triton_kernels, a wheel here."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "triton_kernels")]
