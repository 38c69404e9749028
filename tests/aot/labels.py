"""What the dtypes are called in the rows of the ratchet."""

import torch

LABELS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
