"""What GPUs can do at most, for model FLOPs utilisation: dense matrix products, no sparsity.

From the makers' data sheets. A device that is not here, or a slice of one (MIG), has no known
peak: `scaling.peak_tflops` says it.
"""

from __future__ import annotations

import re

# Pattern of the device's name -> TFLOP/s in fp32, tf32, bf16 and fp16; None: not supported.
PEAKS: tuple[tuple[str, float, float | None, float | None, float], ...] = (
    (r"\bB200\b", 75.0, 1100.0, 2250.0, 2250.0),
    (r"\bH200\b", 67.0, 494.7, 989.4, 989.4),
    (r"\bH100 PCIe\b", 51.0, 378.0, 756.0, 756.0),
    (r"\bH100 NVL\b", 60.0, 417.5, 835.0, 835.0),
    (r"\bH100\b", 67.0, 494.7, 989.4, 989.4),
    (r"\bA100\b", 19.5, 156.0, 312.0, 312.0),
    (r"\bA10\b", 31.2, 62.5, 125.0, 125.0),
    (r"\bL40S\b", 91.6, 183.0, 362.0, 362.0),
    (r"\bL4\b", 30.3, 60.0, 121.0, 121.0),
    (r"\bRTX 4090\b", 82.6, 82.6, 165.2, 165.2),
    (r"\bRTX 3090\b", 35.6, 35.6, 71.0, 71.0),
    (r"\bV100\b", 15.7, None, None, 125.0),
    (r"\bT4\b", 8.1, None, None, 65.0),
)


def known_peak(device_name: str, precision: str) -> float | None:
    """FLOP/s of a device, None where it is not known.

    Args:
        device_name: as torch.cuda.get_device_name says it.
        precision: fp32, tf32, bf16 or fp16.
    """
    if "MIG" in device_name:
        return None
    for pattern, *tflops in PEAKS:
        if re.search(pattern, device_name):
            peak = dict(zip(("fp32", "tf32", "bf16", "fp16"), tflops, strict=True))[precision]
            return None if peak is None else peak * 1e12
    return None
