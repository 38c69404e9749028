"""The Gaussian diffusion process: training loss and ancestral sampling around any model(x, t, **kwargs)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .. import ops
from ..ops.random import make_key
from .schedule import Schedule

Model = Callable[..., torch.Tensor]


class GaussianDiffusion:
    """Noises, scores and samples with one schedule and one parametrisation of the model (Ho et al. 2020).

    Args:
        schedule: the noise schedule.
        prediction_type: "epsilon", "sample", "v", "score" or "mean", see `Schedule.reverse_table`.
        variance_type: "fixed_small", "fixed_large" or "learned_range". With "learned_range" the model's output has
            twice the channels of x: the prediction, then v.
        clip_sample: x_0 is clipped to [-clip_sample, clip_sample] in reverse steps; None: not clipped.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_sample: float | None = 1.0,
    ):
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.variance_type = variance_type
        self.clip_sample = clip_sample if prediction_type != "mean" else None
        self._tables: dict[tuple, torch.Tensor] = {}
        self._loss_table: torch.Tensor | None = None
        self._respaced = not torch.equal(schedule.timesteps, torch.arange(len(schedule)))
        self._reverse_table = schedule.reverse_table(prediction_type, variance_type)

    def _on(self, device: torch.device, name: str, table: torch.Tensor) -> torch.Tensor:
        if device.type == "cpu":
            return table
        key = (name, device)
        if key not in self._tables or self._tables[key].shape != table.shape:
            self._tables[key] = table.to(device)
        return self._tables[key]

    def forward_table(self, device: torch.device) -> torch.Tensor:
        return self._on(device, "forward", self.schedule.forward_table)

    def reverse_table(self, device: torch.device) -> torch.Tensor:
        return self._on(device, "reverse", self._reverse_table)

    def loss_table(self, device: torch.device, weights: torch.Tensor | None = None) -> torch.Tensor:
        if weights is not None:
            return self.schedule.loss_table(self.prediction_type, weights).to(device)
        if self._loss_table is None:  # a "mean" prediction has none, so it is made on first use
            self._loss_table = self.schedule.loss_table(self.prediction_type)
        return self._on(device, "loss", self._loss_table)

    def forward_jump(self, x, t, s=None, **noise_source):
        """`pynn.ops.forward_jump` with this process's schedule."""
        return ops.forward_jump(x, t, self.forward_table(x.device), s, **noise_source)

    def forward_step(self, x, t, **noise_source):
        """`pynn.ops.forward_step` with this process's schedule."""
        return ops.forward_step(x, t, self.forward_table(x.device), **noise_source)

    def reverse_step(self, x, t, output, **noise_source):
        """`pynn.ops.reverse_step` with this process's schedule, parametrisation and clipping.

        Args:
            x: (B, C, ...) samples at timestep t.
            t: int64 (B,) or one for all.
            output: the model's output, (B, C, ...), or (B, 2 C, ...) with learned_range.
        """
        variance = None
        if self.variance_type == "learned_range":
            if output.dim() < 2 or output.shape[1] != 2 * x.shape[1]:
                raise ValueError(
                    f"GaussianDiffusion: learned_range expects a model output with {2 * x.shape[1]} channels, "
                    f"got shape {tuple(output.shape)}"
                )
            output, variance = output.chunk(2, dim=1)
        table = self.reverse_table(x.device)
        return ops.reverse_step(x, t, output, table, variance=variance, clip=self.clip_sample, **noise_source)

    def loss(
        self,
        model: Model,
        x0: torch.Tensor,
        *,
        t: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        weights: torch.Tensor | None = None,
        **model_kwargs,
    ) -> torch.Tensor:
        """The denoising loss of a batch: noise to a random timestep, predict, compare.

        Args:
            model: called as model(x_t, timesteps, **model_kwargs).
            x0: (B, ...) clean data in [-1, 1].
            t: int64 (B,) indices; uniformly drawn when None.
            generator: of the timesteps and of the noise key; torch's default generator when None.
            weights: (T,) loss weight of each timestep, see `Schedule.min_snr_weights`.
        Returns:
            Scalar mean of the per-sample losses.
        """
        if t is None:
            t = torch.randint(len(self.schedule), (x0.shape[0],), generator=generator).to(x0.device)
        key = make_key(x0.device, generator=generator)
        loss_table = self.loss_table(x0.device, weights)
        x_t = self.forward_jump(x0, t, seed=key)
        output = model(x_t, self.model_timesteps(t), **model_kwargs)
        return ops.diffusion_loss(output, x0, t, loss_table, seed=key).mean()

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """What the model is told at indices t (differs from t for a respaced schedule)."""
        return self._on(t.device, "timesteps", self.schedule.timesteps)[t] if self._respaced else t

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        seed: int | torch.Tensor | None = None,
        device: torch.device | str | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
        trajectory_every: int | None = None,
        guidance_scale: float = 1.0,
        unconditional: dict | None = None,
        **model_kwargs,
    ):
        """Draws samples by running every reverse step (Ho et al. 2020, algorithm 2).

        Args:
            model: called as model(x, timesteps, **model_kwargs).
            shape: (B, C, ...) of the samples.
            generator, seed: where the noise comes from, see `pynn.ops.random.make_key`; a seed of shape (B,) gives
                every sample its own stream, whatever batch it is drawn in.
            device: of the samples; the model's first parameter's when None.
            progress: wraps the iterable of timesteps, for example tqdm.
            trajectory_every: also return the samples every this many steps.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022): output = uncond + scale (cond - uncond);
                1 runs the model once per step.
            unconditional: keyword arguments of the unconditional call, needed when guidance_scale is not 1.
        Returns:
            x_0 (B, C, ...) in float32, or (x_0, list of (t, x_t)) with trajectory_every.
        Raises:
            ValueError: guidance without `unconditional`, or trajectory_every < 1.
        """
        if guidance_scale != 1.0 and unconditional is None:
            raise ValueError("GaussianDiffusion.sample: guidance_scale needs unconditional= keyword arguments")
        if trajectory_every is not None and trajectory_every < 1:
            raise ValueError(f"GaussianDiffusion.sample: expected trajectory_every >= 1, got {trajectory_every}")
        if device is None:
            device = next((p.device for p in getattr(model, "parameters", lambda: iter(()))()), torch.device("cpu"))
        device = torch.device(device)
        key = make_key(device, generator=generator, seed=seed)
        # Draw k of a sample starts at counter k * stride, so that the draws of one key never overlap.
        per_draw = -(-torch.Size(shape).numel() // 4) if key.dim() == 1 else -(-torch.Size(shape[1:]).numel() // 4)
        stride = torch.tensor([0, per_draw], device=device)
        x = ops.normal(shape, seed=key, device=device)
        trajectory = [(len(self.schedule), x)]
        steps: Iterable[int] = range(len(self.schedule) - 1, -1, -1)
        for t in progress(steps) if progress is not None else steps:
            index = torch.full((shape[0],), t, dtype=torch.int64, device=device)
            told = self.model_timesteps(index)
            output = model(x, told, **model_kwargs)
            if guidance_scale != 1.0:
                without = model(x, told, **{**model_kwargs, **(unconditional or {})})
                output = torch.lerp(without, output, guidance_scale)
            key = key + stride
            x = self.reverse_step(x, index, output, seed=key)
            if trajectory_every is not None and t % trajectory_every == 0:
                trajectory.append((t, x))
        return x if trajectory_every is None else (x, trajectory)
