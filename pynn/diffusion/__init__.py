"""Diffusion: schedules, process, samplers."""
