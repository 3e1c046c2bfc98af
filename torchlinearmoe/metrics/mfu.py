"""Model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311): FLOPs the model needs over those the device could do.

The peaks are the makers' dense figures (without sparsity) for matrix products, in TFLOP/s.
"""

import re

import torch

# First match wins, all words of the first column must be words of the device's name. Columns: bfloat16, float32 with
# TF32 allowed, float32.
_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    ("H100 PCIe", 756, 378, 51),
    ("H100 NVL", 835, 418, 60),
    ("H200 NVL", 835, 418, 60),
    ("H100", 989, 494, 67),
    ("H800", 989, 494, 67),
    ("H200", 989, 494, 67),
    ("GH200", 989, 494, 67),
    ("H20", 148, 74, 44),
    ("B200", 2250, 1125, 75),
    ("GB200", 2500, 1250, 80),
    ("A100", 312, 156, 19.5),
    ("A800", 312, 156, 19.5),
    ("A40", 150, 75, 37),
    ("A30", 165, 82, 10.3),
    ("A10", 125, 62, 31),
    ("L40S", 362, 183, 91),
    ("L40", 181, 90, 90),
    ("L4", 121, 60, 30),
    ("RTX 4090", 165, 82, 82),
    ("RTX 3090", 71, 35, 35),
    ("MI300X", 1307, 653, 163),
)


def peak_flops(device: torch.device | str, dtype: torch.dtype, peak_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of one device in matrix products of `dtype`, or None where it is not known (a CPU among them).

    peak_tflops: the recipe's `metrics.peak_tflops`, which goes before the table, on any device.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12
    device = torch.device(device)
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_flops_by_name(torch.cuda.get_device_name(device), dtype, tf32=tf32)


def peak_flops_by_name(name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Peak FLOP/s of the device that calls itself `name`, e.g. "NVIDIA H100 80GB HBM3"; None if not in the table.

    tf32: whether float32 products may be computed in TF32.
    """
    words = {word.lower() for word in re.split(r"[^A-Za-z0-9]+", name)}
    for key, bfloat16, tensor_float32, float32 in _PEAKS:
        if set(key.lower().split()) <= words:
            if dtype == torch.bfloat16:
                return bfloat16 * 1e12
            if dtype == torch.float32:
                return (tensor_float32 if tf32 else float32) * 1e12
    return None


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, *, devices: int = 1) -> float | None:
    """Share of the peak in use, 0 to 1, or None without a peak.

    tokens_per_second: of all `devices` together. flops_per_token: forward and backward, active parameters only.
    peak: FLOP/s of one device, from `peak_flops`.
    """
    if peak is None:
        return None
    return tokens_per_second * flops_per_token / (peak * devices)
