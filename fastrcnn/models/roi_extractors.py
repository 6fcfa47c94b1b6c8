"""Features of each RoI from a pyramid: of the level that fits its size, or of all levels together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrcnn.layers import DeformRoIPoolPack, ModulatedDeformRoIPoolPack, build_plugin
from fastrcnn.models.profiles import Profile, get_profile
from fastrcnn.ops import multilevel_roi_align, roi_align
from fastrcnn.ops.roi_align import roi_levels

DEFORM_LAYERS = {"DeformRoIPoolPack": DeformRoIPoolPack, "ModulatedDeformRoIPoolPack": ModulatedDeformRoIPoolPack}


def roi_rescale(rois: Tensor, scale_factor: float) -> Tensor:
    """rois [K, 5] with sides `scale_factor` times as long, around the same centres."""
    centre, half = (rois[:, 1:3] + rois[:, 3:]) * 0.5, (rois[:, 3:] - rois[:, 1:3]) * scale_factor * 0.5
    return torch.cat([rois[:, :1], centre - half, centre + half], 1)


class _RoIExtractor(nn.Module):
    """roi_layer: dict(type="RoIAlign", output_size=7, sampling_ratio=0, aligned=True), or a deformable pooling, of which
    each level has its own (keys roi_layers.{level}.*). featmap_strides: image pixels a map pixel, one a level used."""

    def __init__(self, roi_layer: dict, out_channels: int, featmap_strides: Sequence[int]):
        super().__init__()
        options = dict(roi_layer)
        kind = options.pop("type", "RoIAlign")
        self.out_channels, self.featmap_strides = out_channels, list(featmap_strides)
        self.profile, self.roi_layers = get_profile("mmdet"), None
        if kind in DEFORM_LAYERS:
            layers = (DEFORM_LAYERS[kind](spatial_scale=1 / s, **options) for s in featmap_strides)
            self.roi_layers = nn.ModuleList(layers)
            return
        if kind != "RoIAlign":
            raise ValueError(f"roi_layer: expected RoIAlign or one of {sorted(DEFORM_LAYERS)}, got {roi_layer}")
        self.output_size = options.pop("output_size")
        self.sampling_ratio = options.pop("sampling_ratio", 0)
        self.aligned = options.pop("aligned", True)
        if options.pop("pool_mode", "avg") != "avg":
            raise ValueError(f"roi_layer: RoIAlign averages (pool_mode='avg'), got {roi_layer['pool_mode']!r}")
        options.pop("use_torchvision", None)  # which code computes the same numbers
        if options:
            raise ValueError(f"roi_layer: unknown options {sorted(options)}")

    def take_defaults(self, profile: Profile) -> None:
        self.profile = profile
        if self.roi_layers is None:
            self.sampling_ratio, self.aligned = profile.sampling_ratio, profile.aligned

    def _pool(self, level: int, x: Tensor, rois: Tensor) -> Tensor:
        """All `rois` from the map x of one level."""
        if self.roi_layers is not None:
            return self.roi_layers[level](x, rois)
        scale = 1.0 / self.featmap_strides[level]
        return roi_align(x, rois, self.output_size, scale, self.sampling_ratio, self.aligned)


class SingleRoIExtractor(_RoIExtractor):
    """Each RoI from the pyramid level that fits it: sqrt(area) below 2 * finest_scale pixels takes the finest, below
    4 * finest_scale the next, and so on (MMDetection's SingleRoIExtractor)."""

    def __init__(self, roi_layer: dict, out_channels: int, featmap_strides: Sequence[int], finest_scale: float = 56):
        super().__init__(roi_layer, out_channels, featmap_strides)
        self.finest_scale = finest_scale

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """feats: one [B, C, H, W] for each stride (more are left out); rois [K, 5] -> [K, C, out, out].

        roi_scale_factor: RoIs of a pyramid grow by it, and keep the level of their own size.
        """
        feats = feats[: len(self.featmap_strides)]
        if len(feats) == 1:
            roi_scale_factor = None  # as in MMDetection, which grows RoIs of a pyramid only
        if self.roi_layers is None and roi_scale_factor is None:
            return multilevel_roi_align(
                feats, rois, self.output_size, self.featmap_strides, self.sampling_ratio, self.aligned,
                self.finest_scale, self.profile.name,
            )  # fmt: skip
        levels = roi_levels(rois, len(feats), self.finest_scale, self.profile.name)
        if roi_scale_factor is not None:
            rois = roi_rescale(rois, roi_scale_factor)
        image, boxes = rois.split((1, 4), 1)  # on every other level a RoI is no image's, and its features are zeros
        here = (torch.where(levels[:, None] == i, image, -1.0) for i in range(len(feats)))
        return sum(self._pool(i, x, torch.cat([own, boxes], 1)) for i, (x, own) in enumerate(zip(feats, here)))


class GenericRoIExtractor(_RoIExtractor):
    """Every RoI from all levels, summed or concatenated (Rossi et al., GRoIE, 2020; MMDetection's GenericRoIExtractor).

    aggregation: "sum" or "concat" (out_channels is then that of all levels); pre_cfg: a layer on each level's features,
    shared by the levels; post_cfg: a layer on the result. Keys pre_module.*, post_module.*.
    """

    def __init__(
        self,
        roi_layer: dict,
        out_channels: int,
        featmap_strides: Sequence[int],
        aggregation: str = "sum",
        pre_cfg: dict | None = None,
        post_cfg: dict | None = None,
    ):
        super().__init__(roi_layer, out_channels, featmap_strides)
        if aggregation not in ("sum", "concat"):
            raise ValueError(f"aggregation: expected 'sum' or 'concat', got {aggregation!r}")
        self.aggregation = aggregation
        self.pre_module = None if pre_cfg is None else build_plugin(pre_cfg)[1]
        self.post_module = None if post_cfg is None else build_plugin(post_cfg)[1]

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """feats: one [B, C, H, W] for each stride (more are left out); rois [K, 5] -> [K, out_channels, out, out]."""
        feats = feats[: len(self.featmap_strides)]
        if len(feats) == 1:  # as in MMDetection: nothing to aggregate, nothing before or after
            return self._pool(0, feats[0], rois)
        if roi_scale_factor is not None:
            rois = roi_rescale(rois, roi_scale_factor)
        pooled = [self._pool(i, x, rois) for i, x in enumerate(feats)]
        if self.pre_module is not None:
            pooled = [self.pre_module(x) for x in pooled]
        out = sum(pooled) if self.aggregation == "sum" else torch.cat(pooled, 1)
        if out.shape[1] != self.out_channels:
            raise ValueError(f"out_channels: {self.out_channels}, but the levels give {out.shape[1]} channels")
        return out if self.post_module is None else self.post_module(out)


ROI_EXTRACTORS = {"SingleRoIExtractor": SingleRoIExtractor, "GenericRoIExtractor": GenericRoIExtractor}
