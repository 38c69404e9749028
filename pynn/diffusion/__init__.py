"""Diffusion: noise schedules and the process built on pynn's fused steps."""

from .process import GaussianDiffusion
from .schedule import PREDICTION_TYPES, VARIANCE_TYPES, Schedule

__all__ = ["PREDICTION_TYPES", "VARIANCE_TYPES", "GaussianDiffusion", "Schedule"]
