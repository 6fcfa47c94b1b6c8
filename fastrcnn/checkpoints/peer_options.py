"""What a checkpoint may decide of a model beside its weights and its peer's profile."""

import dataclasses
import json
from dataclasses import dataclass

Colour = tuple[float, ...]  # one for each channel
EXTRA_STATE = "_extra_state"  # a state dict's key for a detector's profile and options, as the bytes of a text
OURS = (EXTRA_STATE, ".loss_normalizer")  # ends of keys that no peer's model has


def _colour(value) -> Colour:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 256:
        raise ValueError
    return tuple(map(_number, value))


def _number(value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:  # NaN is not, either
        raise ValueError
    return value


def _truth(value) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _divisor(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
        raise ValueError
    return value


def _style(value) -> str:
    if value not in ("pytorch", "caffe"):
        raise ValueError
    return value


def _epsilon(value) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError
    return value


_READ = dict(mean=_colour, std=_colour, bgr_to_rgb=_truth, pad_size_divisor=_divisor, style=_style,
             norm_eps=_epsilon)  # fmt: skip


@dataclass(frozen=True)
class PeerOptions:
    """What is None is not said: a model then keeps its own, or its profile's."""

    mean: Colour | None = None  # of the input, in the network's channel order and range
    std: Colour | None = None
    bgr_to_rgb: bool | None = None  # MMDetection's: False is a network that wants BGR
    pad_size_divisor: int | None = None
    style: str | None = None  # of the bottlenecks: "pytorch", whose stride is on the 3x3 convolution, or "caffe"
    norm_eps: float | None = None  # of the backbone's batch norms

    def said(self) -> dict:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    def over(self, other: "PeerOptions") -> "PeerOptions":
        """These, and `other`'s where nothing is said."""
        return dataclasses.replace(other, **self.said())

    @classmethod
    def read(cls, content: dict) -> "PeerOptions":
        """Of plain data. Raises ValueError naming what is no option or not of its kind."""
        options = {}
        for key, value in content.items():
            if key not in _READ:
                raise ValueError(f"unknown option {key!r}, expected some of {', '.join(_READ)}")
            try:
                options[key] = _READ[key](value)
            except (TypeError, ValueError):
                raise ValueError(f"{key}: not understood: {str(value)[:60]!r}") from None
        return cls(**options)


def to_text(profile: str, options: PeerOptions) -> str:
    """A profile's name and options as JSON, to lie beside weights (see `BaseDetector`)."""
    return json.dumps(dict(profile=profile, **options.said()))


def from_text(text: str) -> tuple[str, PeerOptions]:
    """What `to_text` wrote. Raises ValueError."""
    content = json.loads(text) if isinstance(text, str) and len(text) < 10_000 else None
    if not isinstance(content, dict) or not isinstance(content.get("profile"), str):
        raise ValueError("expected JSON of a profile and its options")
    return content.pop("profile"), PeerOptions.read(content)
