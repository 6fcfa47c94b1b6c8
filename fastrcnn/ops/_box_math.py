"""The exponential of csrc/box_math.h, operation for operation: scores that tie or trade places by the last bit do so in
the references, too.
"""

import torch
from torch import Tensor

COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
ROUND = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest integer


def exp(x: Tensor) -> Tensor:
    """e^x, about 1 ulp off; in float32 it saturates at e^-87.3 and e^88.3. NaN stays NaN. Differentiable."""
    if x.dtype == torch.float64:
        return x.exp()
    clamped = x.clamp(-87.3, 88.3)
    n = ((clamped.detach() * 1.44269504 + ROUND) - ROUND).nan_to_num()
    r = (clamped - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, COEFFICIENTS[0])
    for c in COEFFICIENTS[1:]:
        p = p * r + c
    return (p * r * r + r + 1.0) * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + exp(-x))
