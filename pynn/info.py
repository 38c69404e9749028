"""python -m pynn.info: versions, devices, which kernels are available and why not, and a one-second self-check."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable

import torch

import pynn

from . import backends


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Name -> version or description of everything that a bug report needs."""
    core = backends._core
    cuda = torch.version.cuda or "not in this torch"
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "pynn": pynn.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": f"{_cpu_model()}, {torch.get_num_threads()} threads",
        "instruction set": f"{backends.cpu_isa} (built: {core.cpu_isas if core else 'unknown'})",
        "CUDA in torch": cuda,
        "GPUs": ", ".join(gpus) or "none",
        "CUDA kernels for": (core.cuda_archs or "none") if core else "unknown",
        "compiler": core.compiler if core else "unknown (pynn._core was not built)",
    }


def availability() -> list[tuple[str, str, str]]:
    """(op, backend, '' or the reason why it cannot run) for every public op."""
    return [
        (op, backend, backends.why_not(_KERNEL_OF.get(op, f"{op.removesuffix('_cell')}_fwd"), backend))
        for op in pynn.ops.__all__
        if op[0].islower()  # classes go with the ops that take them
        for backend in backends.unavailable
    ]


_KERNEL_OF = {
    "forward_step": "forward_jump_fwd",
    "normal": "normal",
    "group_norm_conv2d": "group_norm_statistics",
    **dict.fromkeys(
        ("cosine_attention", "hard_attention", "local_attention", "multi_head_attention"),
        "scaled_dot_product_attention_fwd",
    ),
}


def _check_normal() -> bool:
    z = pynn.ops.normal((1 << 16,), seed=1).double()
    return abs(z.mean().item()) < 0.02 and abs(z.std().item() - 1) < 0.02


def _check_conv2d() -> bool:
    x, w = torch.randn(2, 5, 9, 9), torch.randn(7, 5, 3, 3)
    return torch.allclose(pynn.ops.conv2d(x, w, padding=1), torch.conv2d(x, w, padding=1), rtol=1e-4, atol=1e-4)


def _check_group_norm() -> bool:
    x = torch.randn(2, 6, 5, 5)
    return torch.allclose(pynn.ops.group_norm(x, 3), torch.nn.functional.group_norm(x, 3), rtol=1e-4, atol=1e-4)


def _check_attention() -> bool:
    q, k, v = torch.randn(3, 2, 2, 7, 8)
    reference = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return torch.allclose(pynn.ops.scaled_dot_product_attention(q, k, v), reference, rtol=1e-4, atol=1e-4)


def _check_lstm() -> bool:
    layer, x = torch.nn.LSTM(5, 7), torch.randn(4, 2, 5)
    output, _ = pynn.ops.lstm(x, None, *(p.detach() for p in layer.parameters()))
    return torch.allclose(output, layer(x)[0], rtol=1e-4, atol=1e-4)


CHECKS: dict[str, Callable[[], bool]] = {
    "normal": _check_normal,
    "conv2d": _check_conv2d,
    "group_norm": _check_group_norm,
    "scaled_dot_product_attention": _check_attention,
    "lstm": _check_lstm,
}


def print_availability() -> None:
    """A row per op, a column per backend; the reasons stand below, numbered."""
    rows = availability()
    reasons = list(dict.fromkeys(reason for _, _, reason in rows if reason))
    print(f"\n{'op':<30}" + "".join(f"{backend:<11}" for backend in backends.unavailable))
    for op in pynn.ops.__all__:
        marks = ("yes" if not reason else f"no [{reasons.index(reason) + 1}]" for name, _, reason in rows if name == op)
        print(f"{op:<30}" + "".join(f"{mark:<11}" for mark in marks))
    for number, reason in enumerate(reasons, 1):
        print(f"[{number}] {reason}")


def main() -> int:
    """Prints the report; returns 1 when a self-check fails."""
    for name, value in versions().items():
        print(f"{name:<18} {value}")
    print_availability()
    print("\nself-check (CPU)")
    failed = 0
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            outcome = "ok" if check() else "WRONG RESULT"
        except Exception as error:
            outcome = f"FAILED: {error}"
        failed += outcome != "ok"
        print(f"{name:<30} {outcome} ({1e3 * (time.perf_counter() - start):.0f} ms)")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
