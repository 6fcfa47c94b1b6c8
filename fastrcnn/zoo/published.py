"""The checkpoints that MMDetection, torchvision and Detectron2 publish, trained on COCO train2017, and their AP on val2017.

Sources: MMDetection 3.3.0's metafile.yml and README.md of each folder of configs/, torchvision's weights enumerations,
Detectron2's MODEL_ZOO.md.
"""

import re
from dataclasses import dataclass, field

from fastrcnn.models.profiles import get_profile

_CAFFE_BACKBONE = dict(style="caffe", norm_cfg=dict(requires_grad=False))
_CAFFE_INPUT = dict(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), bgr_to_rgb=False)
_CAFFE = dict(backbone=_CAFFE_BACKBONE, data_preprocessor=_CAFFE_INPUT)
_GN = dict(norm_cfg=dict(type="GN", num_groups=32))
_GN_WS = dict(**_GN, conv_cfg=dict(type="ConvWS"))


def _box_loss(kind: str) -> dict:
    loss = dict(type=kind, loss_weight=10.0)
    return dict(roi_head=dict(bbox_head=dict(reg_decoded_bbox=True, loss_bbox=loss)))


def _normalised(**layers) -> dict:
    head = dict(type="Shared4Conv1FCBBoxHead", **layers)
    return dict(backbone=layers, neck=layers, roi_head=dict(bbox_head=head))


def _deformable(kind: str, groups: int = 1) -> dict:
    dcn = dict(type=kind, deform_groups=groups, fallback_on_stride=False)
    return dict(dcn=dcn, stage_with_dcn=(False, True, True, True))


def _attention(kind: str) -> dict:
    cfg = dict(type="GeneralizedAttention", spatial_range=-1, num_heads=8, attention_type=kind, kv_stride=2)
    return dict(plugins=[dict(cfg=cfg, stages=(False, False, True, True), position="after_conv2")])


def _roi_pooling(kind: str) -> dict:
    layer = dict(_delete_=True, type=kind, output_size=7, output_channels=256)
    return dict(roi_head=dict(bbox_roi_extractor=dict(roi_layer=layer)))


def _groie() -> dict:
    """Every RoI from all levels (Rossi et al., 2020)."""
    pre = dict(type="ConvModule", in_channels=256, out_channels=256, kernel_size=5, padding=2, inplace=False)
    attention = dict(spatial_range=-1, num_heads=6, attention_type="0100", kv_stride=2)
    post = dict(type="GeneralizedAttention", in_channels=256, **attention)
    extractor = dict(type="GenericRoIExtractor", aggregation="sum", pre_cfg=pre, post_cfg=post)
    return dict(roi_head=dict(bbox_roi_extractor=dict(extractor, roi_layer=dict(sampling_ratio=2))))


# What a checkpoint's model has that the named one has not: overrides of `named_model`.
_VARIANTS = {
    "-": {},
    "caffe": _CAFFE,  # stride in the first 1x1 convolution, BGR input
    "caffe_rgb": dict(backbone=_CAFFE_BACKBONE),  # this one's configuration keeps the RGB input
    "iou": _box_loss("IoULoss"),
    "giou": _box_loss("GIoULoss"),
    "bounded_iou": _box_loss("BoundedIoULoss"),
    "gn": _normalised(**_GN) | dict(backbone=dict(frozen_stages=-1, zero_init_residual=False, **_GN)),
    "gn_ws": _normalised(**_GN_WS),
    "dconv": dict(backbone=_deformable("DCN")),
    "mdconv": dict(backbone=_deformable("DCNv2")),
    "mdconv4": dict(backbone=_deformable("DCNv2", groups=4)),
    "dpool": _roi_pooling("DeformRoIPoolPack"),
    "mdpool": _roi_pooling("ModulatedDeformRoIPoolPack"),
    "groie": _groie(),
    "attn0010": dict(backbone=_attention("0010")),
    "attn1111": dict(backbone=_attention("1111")),
    "attn0010_dconv": dict(backbone=_attention("0010") | _deformable("DCN")),
    "attn1111_dconv": dict(backbone=_attention("1111") | _deformable("DCN")),
    "person": _CAFFE,
    "road": _CAFFE,
    "r101_c4": dict(backbone=dict(depth=101), roi_head=dict(shared_head=dict(depth=101))),
    "r101_dc5": dict(backbone=dict(depth=101)),
}
_CLASSES = {"person": ("person",), "road": ("person", "bicycle", "car")}  # of the variants that know only these

# (SPDX identifier, what the publisher states it for). MMDetection and torchvision state a licence for their code alone;
# torchvision adds that a model may be bound by the terms of the data it was trained on.
_LICENCES = {
    "mmdet": ("Apache-2.0", "code"),
    "torchvision": ("BSD-3-Clause", "code"),
    "detectron2": ("CC-BY-SA-3.0", "weights"),
}
_DIGESTS = {"mmdet": "sha256", "torchvision": "sha256", "detectron2": "md5"}


@dataclass(frozen=True)
class Published:
    """A published checkpoint p. `named_model(p.model, p.num_classes, p.profile, p.address, **p.overrides)` builds and loads
    it; `from_mmdet_config` builds the same from MMDetection's configuration p.name.
    """

    name: str  # the publisher's configuration or function: MMDetection's and Detectron2's paths are below configs/
    profile: str  # the publisher, whose semantics the weights were trained with
    model: str  # the named model
    ap: float  # published box AP in percent; of an RPN alone AR@1000
    address: str
    variant: str = "-"  # what distinguishes its model from the named one, in a word; `overrides` says it in full
    overrides: dict = field(default_factory=dict, hash=False)
    classes: tuple[str, ...] = ()  # where it does not know all of COCO's eighty

    @property
    def num_classes(self) -> int:
        """What to build the model with. torchvision's have an output for every one of COCO's numbers 1 to 90, ten of them
        unused, and its RetinaNet one for 0, too."""
        if self.model.startswith("rpn_"):
            return 1
        if self.profile == "torchvision":
            return 91 if self.name.startswith("retinanet") else 90
        return len(self.classes) or 80

    @property
    def metric(self) -> str:
        return "AR@1000" if self.name.startswith("rpn/") else "AP"

    @property
    def licence(self) -> str:
        return _LICENCES[self.profile][0]

    @property
    def licence_of(self) -> str:
        """ "weights", or "code" where the publisher states no licence for the weights: it is that of the code then."""
        return _LICENCES[self.profile][1]

    @property
    def digest(self) -> tuple[str, str]:
        """(algorithm, first hexadecimal digits) of the file's checksum, which the file's name ends in."""
        found = re.search(r"[-_]([0-9a-f]{6}|[0-9a-f]{8})\.\w+$", self.address)
        if found is None:
            raise ValueError(f"{self.address}: the file's name ends in no checksum")
        return _DIGESTS[self.profile], found[1]


# Columns: name, model, variant, AP, address.
_MMDET = """
# Faster R-CNN
dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco                          r50_fpn         dconv           41.3  https://download.openmmlab.com/mmdetection/v2.0/dcn/faster_rcnn_r50_fpn_dconv_c3-c5_1x_coco/faster_rcnn_r50_fpn_dconv_c3-c5_1x_coco_20200130-d68aed1e.pth
dcn/faster-rcnn_r50_fpn_dpool_1x_coco                                r50_fpn         dpool           38.9  https://download.openmmlab.com/mmdetection/v2.0/dcn/faster_rcnn_r50_fpn_dpool_1x_coco/faster_rcnn_r50_fpn_dpool_1x_coco_20200307-90d3c01d.pth
dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco                       r50_fpn         mdconv          41.4  https://download.openmmlab.com/mmdetection/v2.0/dcn/faster_rcnn_r50_fpn_mdconv_c3-c5_1x_coco/faster_rcnn_r50_fpn_mdconv_c3-c5_1x_coco_20200130-d099253b.pth
dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco                r50_fpn         mdconv4         41.5  https://download.openmmlab.com/mmdetection/v2.0/dcn/faster_rcnn_r50_fpn_mdconv_c3-c5_group4_1x_coco/faster_rcnn_r50_fpn_mdconv_c3-c5_group4_1x_coco_20200130-01262257.pth
dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco                             r50_fpn         mdpool          38.7  https://download.openmmlab.com/mmdetection/v2.0/dcn/faster_rcnn_r50_fpn_mdpool_1x_coco/faster_rcnn_r50_fpn_mdpool_1x_coco_20200307-c0df27ff.pth
empirical_attention/faster-rcnn_r50-attn1111_fpn_1x_coco             r50_fpn         attn1111        40.0  https://download.openmmlab.com/mmdetection/v2.0/empirical_attention/faster_rcnn_r50_fpn_attention_1111_1x_coco/faster_rcnn_r50_fpn_attention_1111_1x_coco_20200130-403cccba.pth
empirical_attention/faster-rcnn_r50-attn0010_fpn_1x_coco             r50_fpn         attn0010        39.1  https://download.openmmlab.com/mmdetection/v2.0/empirical_attention/faster_rcnn_r50_fpn_attention_0010_1x_coco/faster_rcnn_r50_fpn_attention_0010_1x_coco_20200130-7cb0c14d.pth
empirical_attention/faster-rcnn_r50-attn1111-dcn_fpn_1x_coco         r50_fpn         attn1111_dconv  42.1  https://download.openmmlab.com/mmdetection/v2.0/empirical_attention/faster_rcnn_r50_fpn_attention_1111_dcn_1x_coco/faster_rcnn_r50_fpn_attention_1111_dcn_1x_coco_20200130-8b2523a6.pth
empirical_attention/faster-rcnn_r50-attn0010-dcn_fpn_1x_coco         r50_fpn         attn0010_dconv  42.0  https://download.openmmlab.com/mmdetection/v2.0/empirical_attention/faster_rcnn_r50_fpn_attention_0010_dcn_1x_coco/faster_rcnn_r50_fpn_attention_0010_dcn_1x_coco_20200130-1a2e831d.pth
faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco                        r50_fpn         caffe           37.8  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_caffe_fpn_1x_coco/faster_rcnn_r50_caffe_fpn_1x_coco_bbox_mAP-0.378_20200504_180032-c5925ee5.pth
faster_rcnn/faster-rcnn_r50_fpn_1x_coco                              r50_fpn         -               37.4  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth
faster_rcnn/faster-rcnn_r50_fpn_amp-1x_coco                          r50_fpn         -               37.5  https://download.openmmlab.com/mmdetection/v2.0/fp16/faster_rcnn_r50_fpn_fp16_1x_coco/faster_rcnn_r50_fpn_fp16_1x_coco_20200204-d4dc1471.pth
faster_rcnn/faster-rcnn_r50_fpn_2x_coco                              r50_fpn         -               38.4  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_2x_coco/faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth
faster_rcnn/faster-rcnn_r50_fpn_iou_1x_coco                          r50_fpn         iou             37.9  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_iou_1x_coco/faster_rcnn_r50_fpn_iou_1x_coco_20200506_095954-938e81f0.pth
faster_rcnn/faster-rcnn_r50_fpn_giou_1x_coco                         r50_fpn         giou            37.6  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_giou_1x_coco-0eada910.pth
faster_rcnn/faster-rcnn_r50_fpn_bounded-iou_1x_coco                  r50_fpn         bounded_iou     37.4  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_bounded_iou_1x_coco-98ad993b.pth
faster_rcnn/faster-rcnn_r50-caffe_fpn_ms-2x_coco                     r50_fpn         caffe           39.7  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_caffe_fpn_mstrain_2x_coco/faster_rcnn_r50_caffe_fpn_mstrain_2x_coco_bbox_mAP-0.397_20200504_231813-10b2de58.pth
faster_rcnn/faster-rcnn_r50-caffe_fpn_ms-3x_coco                     r50_fpn         caffe           39.9  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_caffe_fpn_mstrain_3x_coco/faster_rcnn_r50_caffe_fpn_mstrain_3x_coco_20210526_095054-1f77628b.pth
faster_rcnn/faster-rcnn_r50_fpn_ms-3x_coco                           r50_fpn         -               40.3  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_mstrain_3x_coco/faster_rcnn_r50_fpn_mstrain_3x_coco_20210524_110822-e10bd31c.pth
faster_rcnn/faster-rcnn_r50-tnr-pre_fpn_1x_coco                      r50_fpn         -               40.2  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_tnr-pretrain_1x_coco/faster_rcnn_r50_fpn_tnr-pretrain_1x_coco_20220320_085147-efedfda4.pth
groie/faste-rcnn_r50_fpn_groie_1x_coco                               r50_fpn         groie           38.3  https://download.openmmlab.com/mmdetection/v2.0/groie/faster_rcnn_r50_fpn_groie_1x_coco/faster_rcnn_r50_fpn_groie_1x_coco_20200604_211715-66ee9516.pth
gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco                          r50_fpn         gn_ws           39.7  https://download.openmmlab.com/mmdetection/v2.0/gn%2Bws/faster_rcnn_r50_fpn_gn_ws-all_1x_coco/faster_rcnn_r50_fpn_gn_ws-all_1x_coco_20200130-613d9fe2.pth
resnet_strikes_back/faster-rcnn_r50-rsb-pre_fpn_1x_coco              r50_fpn         -               40.8  https://download.openmmlab.com/mmdetection/v2.0/resnet_strikes_back/faster_rcnn_r50_fpn_rsb-pretrain_1x_coco/faster_rcnn_r50_fpn_rsb-pretrain_1x_coco_20220113_162229-32ae82a9.pth
scratch/faster-rcnn_r50-scratch_fpn_gn-all_6x_coco                   r50_fpn         gn              40.7  https://download.openmmlab.com/mmdetection/v2.0/scratch/faster_rcnn_r50_fpn_gn-all_scratch_6x_coco/scratch_faster_rcnn_r50_fpn_gn_6x_bbox_mAP-0.407_20200201_193013-90813d01.pth
faster_rcnn/faster-rcnn_r50-caffe_fpn_ms-1x_coco-person              r50_fpn         person          55.8  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_1x_coco-person/faster_rcnn_r50_fpn_1x_coco-person_20201216_175929-d022e227.pth
faster_rcnn/faster-rcnn_r50-caffe_fpn_ms-1x_coco-person-bicycle-car  r50_fpn         road            44.1  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_1x_coco-person-bicycle-car/faster_rcnn_r50_fpn_1x_coco-person-bicycle-car_20201216_173117-6eda6d92.pth
dcn/faster-rcnn_r101-dconv-c3-c5_fpn_1x_coco                         r101_fpn        dconv           42.7  https://download.openmmlab.com/mmdetection/v2.0/dcn/faster_rcnn_r101_fpn_dconv_c3-c5_1x_coco/faster_rcnn_r101_fpn_dconv_c3-c5_1x_coco_20200203-1377f13d.pth
faster_rcnn/faster-rcnn_r101-caffe_fpn_1x_coco                       r101_fpn        caffe           39.8  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_caffe_fpn_1x_coco/faster_rcnn_r101_caffe_fpn_1x_coco_bbox_mAP-0.398_20200504_180057-b269e9dd.pth
faster_rcnn/faster-rcnn_r101_fpn_1x_coco                             r101_fpn        -               39.4  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_1x_coco/faster_rcnn_r101_fpn_1x_coco_20200130-f513f705.pth
faster_rcnn/faster-rcnn_r101_fpn_2x_coco                             r101_fpn        -               39.8  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_2x_coco/faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth
faster_rcnn/faster-rcnn_r101-caffe_fpn_ms-3x_coco                    r101_fpn        caffe_rgb       42.0  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_caffe_fpn_mstrain_3x_coco/faster_rcnn_r101_caffe_fpn_mstrain_3x_coco_20210526_095742-a7ae426d.pth
faster_rcnn/faster-rcnn_r101_fpn_ms-3x_coco                          r101_fpn        -               41.8  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_mstrain_3x_coco/faster_rcnn_r101_fpn_mstrain_3x_coco_20210524_110822-4d4d2ca8.pth
gn+ws/faster-rcnn_r101_fpn_gn-ws-all_1x_coco                         r101_fpn        gn_ws           41.7  https://download.openmmlab.com/mmdetection/v2.0/gn%2Bws/faster_rcnn_r101_fpn_gn_ws-all_1x_coco/faster_rcnn_r101_fpn_gn_ws-all_1x_coco_20200205-a93b0d75.pth
gn+ws/faster-rcnn_x50-32x4d_fpn_gn-ws-all_1x_coco                    x50_32x4d_fpn   gn_ws           40.7  https://download.openmmlab.com/mmdetection/v2.0/gn%2Bws/faster_rcnn_x50_32x4d_fpn_gn_ws-all_1x_coco/faster_rcnn_x50_32x4d_fpn_gn_ws-all_1x_coco_20200203-839c5d9d.pth
dcn/faster-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco                   x101_32x4d_fpn  dconv           44.5  https://download.openmmlab.com/mmdetection/v2.0/dcn/faster_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco/faster_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco_20200203-4f85c69c.pth
faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco                       x101_32x4d_fpn  -               41.2  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_x101_32x4d_fpn_1x_coco/faster_rcnn_x101_32x4d_fpn_1x_coco_20200203-cff10310.pth
faster_rcnn/faster-rcnn_x101-32x4d_fpn_2x_coco                       x101_32x4d_fpn  -               41.2  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_x101_32x4d_fpn_2x_coco/faster_rcnn_x101_32x4d_fpn_2x_coco_bbox_mAP-0.412_20200506_041400-64a12c0b.pth
faster_rcnn/faster-rcnn_x101-32x4d_fpn_ms-3x_coco                    x101_32x4d_fpn  -               42.5  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_x101_32x4d_fpn_mstrain_3x_coco/faster_rcnn_x101_32x4d_fpn_mstrain_3x_coco_20210524_124151-16b9b260.pth
gn+ws/faster-rcnn_x101-32x4d_fpn_gn-ws-all_1x_coco                   x101_32x4d_fpn  gn_ws           42.1  https://download.openmmlab.com/mmdetection/v2.0/gn%2Bws/faster_rcnn_x101_32x4d_fpn_gn_ws-all_1x_coco/faster_rcnn_x101_32x4d_fpn_gn_ws-all_1x_coco_20200212-27da1bc2.pth
faster_rcnn/faster-rcnn_x101-32x8d_fpn_ms-3x_coco                    x101_32x8d_fpn  -               42.4  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_x101_32x8d_fpn_mstrain_3x_coco/faster_rcnn_x101_32x8d_fpn_mstrain_3x_coco_20210604_182954-002e082a.pth
faster_rcnn/faster-rcnn_x101-64x4d_fpn_1x_coco                       x101_64x4d_fpn  -               42.1  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_x101_64x4d_fpn_1x_coco/faster_rcnn_x101_64x4d_fpn_1x_coco_20200204-833ee192.pth
faster_rcnn/faster-rcnn_x101-64x4d_fpn_2x_coco                       x101_64x4d_fpn  -               41.6  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_x101_64x4d_fpn_2x_coco/faster_rcnn_x101_64x4d_fpn_2x_coco_20200512_161033-5961fa95.pth
faster_rcnn/faster-rcnn_x101-64x4d_fpn_ms-3x_coco                    x101_64x4d_fpn  -               43.1  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_x101_64x4d_fpn_mstrain_3x_coco/faster_rcnn_x101_64x4d_fpn_mstrain_3x_coco_20210524_124528-26c63de6.pth
faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco                         r50_c4          -               35.6  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_caffe_c4_1x_coco/faster_rcnn_r50_caffe_c4_1x_coco_20220316_150152-3f885b85.pth
faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco                      r50_c4          -               35.9  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_caffe_c4_mstrain_1x_coco/faster_rcnn_r50_caffe_c4_mstrain_1x_coco_20220316_150527-db276fed.pth
faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco                        r50_dc5         -               37.2  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_caffe_dc5_1x_coco/faster_rcnn_r50_caffe_dc5_1x_coco_20201030_151909-531f0f43.pth
faster_rcnn/faster-rcnn_r50-caffe-dc5_ms-1x_coco                     r50_dc5         -               37.4  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_caffe_dc5_mstrain_1x_coco/faster_rcnn_r50_caffe_dc5_mstrain_1x_coco_20201028_233851-b33d21b9.pth
faster_rcnn/faster-rcnn_r50-caffe-dc5_ms-3x_coco                     r50_dc5         -               38.7  https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_caffe_dc5_mstrain_3x_coco/faster_rcnn_r50_caffe_dc5_mstrain_3x_coco_20201028_002107-34a53b2c.pth
# RetinaNet
retinanet/retinanet_r18_fpn_1x_coco                    retinanet_r18_fpn         -      31.7  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r18_fpn_1x_coco/retinanet_r18_fpn_1x_coco_20220407_171055-614fd399.pth
retinanet/retinanet_r18_fpn_1xb8-1x_coco               retinanet_r18_fpn         -      31.7  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r18_fpn_1x8_1x_coco/retinanet_r18_fpn_1x8_1x_coco_20220407_171255-4ea310d7.pth
resnet_strikes_back/retinanet_r50-rsb-pre_fpn_1x_coco  retinanet_r50_fpn         -      39.0  https://download.openmmlab.com/mmdetection/v2.0/resnet_strikes_back/retinanet_r50_fpn_rsb-pretrain_1x_coco/retinanet_r50_fpn_rsb-pretrain_1x_coco_20220113_175432-bd24aae9.pth
retinanet/retinanet_r50-caffe_fpn_1x_coco              retinanet_r50_fpn         caffe  36.3  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_caffe_fpn_1x_coco/retinanet_r50_caffe_fpn_1x_coco_20200531-f11027c5.pth
retinanet/retinanet_r50_fpn_1x_coco                    retinanet_r50_fpn         -      36.5  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_fpn_1x_coco/retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth
retinanet/retinanet_r50_fpn_amp-1x_coco                retinanet_r50_fpn         -      36.4  https://download.openmmlab.com/mmdetection/v2.0/fp16/retinanet_r50_fpn_fp16_1x_coco/retinanet_r50_fpn_fp16_1x_coco_20200702-0dbfb212.pth
retinanet/retinanet_r50_fpn_2x_coco                    retinanet_r50_fpn         -      37.4  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_fpn_2x_coco/retinanet_r50_fpn_2x_coco_20200131-fdb43119.pth
retinanet/retinanet_r50_fpn_ms-640-800-3x_coco         retinanet_r50_fpn         -      39.5  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_fpn_mstrain_3x_coco/retinanet_r50_fpn_mstrain_3x_coco_20210718_220633-88476508.pth
retinanet/retinanet_r101-caffe_fpn_1x_coco             retinanet_r101_fpn        caffe  38.5  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_caffe_fpn_1x_coco/retinanet_r101_caffe_fpn_1x_coco_20200531-b428fa0f.pth
retinanet/retinanet_r101-caffe_fpn_ms-3x_coco          retinanet_r101_fpn        caffe  40.7  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_caffe_fpn_mstrain_3x_coco/retinanet_r101_caffe_fpn_mstrain_3x_coco_20210721_063439-88a8a944.pth
retinanet/retinanet_r101_fpn_1x_coco                   retinanet_r101_fpn        -      38.5  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_1x_coco/retinanet_r101_fpn_1x_coco_20200130-7a93545f.pth
retinanet/retinanet_r101_fpn_2x_coco                   retinanet_r101_fpn        -      38.9  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth
retinanet/retinanet_r101_fpn_ms-640-800-3x_coco        retinanet_r101_fpn        -      41.0  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_mstrain_3x_coco/retinanet_r101_fpn_mstrain_3x_coco_20210720_214650-7ee888e0.pth
retinanet/retinanet_x101-32x4d_fpn_1x_coco             retinanet_x101_32x4d_fpn  -      39.9  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_32x4d_fpn_1x_coco/retinanet_x101_32x4d_fpn_1x_coco_20200130-5c8b7ec4.pth
retinanet/retinanet_x101-32x4d_fpn_2x_coco             retinanet_x101_32x4d_fpn  -      40.1  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_32x4d_fpn_2x_coco/retinanet_x101_32x4d_fpn_2x_coco_20200131-237fc5e1.pth
retinanet/retinanet_x101-64x4d_fpn_1x_coco             retinanet_x101_64x4d_fpn  -      41.0  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_1x_coco/retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth
retinanet/retinanet_x101-64x4d_fpn_2x_coco             retinanet_x101_64x4d_fpn  -      40.8  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_2x_coco/retinanet_x101_64x4d_fpn_2x_coco_20200131-bca068ab.pth
retinanet/retinanet_x101-64x4d_fpn_ms-640-800-3x_coco  retinanet_x101_64x4d_fpn  -      41.6  https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_mstrain_3x_coco/retinanet_x101_64x4d_fpn_mstrain_3x_coco_20210719_051838-022c2187.pth
# RPN alone; the number is AR@1000
rpn/rpn_r50-caffe_fpn_1x_coco   rpn_r50_fpn         caffe  58.7  https://download.openmmlab.com/mmdetection/v2.0/rpn/rpn_r50_caffe_fpn_1x_coco/rpn_r50_caffe_fpn_1x_coco_20200531-5b903a37.pth
rpn/rpn_r50_fpn_1x_coco         rpn_r50_fpn         -      58.2  https://download.openmmlab.com/mmdetection/v2.0/rpn/rpn_r50_fpn_1x_coco/rpn_r50_fpn_1x_coco_20200218-5525fa2e.pth
rpn/rpn_r50_fpn_2x_coco         rpn_r50_fpn         -      58.6  https://download.openmmlab.com/mmdetection/v2.0/rpn/rpn_r50_fpn_2x_coco/rpn_r50_fpn_2x_coco_20200131-0728c9b3.pth
rpn/rpn_r101-caffe_fpn_1x_coco  rpn_r101_fpn        caffe  60.0  https://download.openmmlab.com/mmdetection/v2.0/rpn/rpn_r101_caffe_fpn_1x_coco/rpn_r101_caffe_fpn_1x_coco_20200531-0629a2e2.pth
rpn/rpn_r101_fpn_1x_coco        rpn_r101_fpn        -      59.7  https://download.openmmlab.com/mmdetection/v2.0/rpn/rpn_r101_fpn_1x_coco/rpn_r101_fpn_1x_coco_20200131-2ace2249.pth
rpn/rpn_r101_fpn_2x_coco        rpn_r101_fpn        -      60.2  https://download.openmmlab.com/mmdetection/v2.0/rpn/rpn_r101_fpn_2x_coco/rpn_r101_fpn_2x_coco_20200131-24e3db1a.pth
rpn/rpn_x101-32x4d_fpn_1x_coco  rpn_x101_32x4d_fpn  -      60.6  https://download.openmmlab.com/mmdetection/v2.0/rpn/rpn_x101_32x4d_fpn_1x_coco/rpn_x101_32x4d_fpn_1x_coco_20200219-b02646c6.pth
rpn/rpn_x101-32x4d_fpn_2x_coco  rpn_x101_32x4d_fpn  -      61.1  https://download.openmmlab.com/mmdetection/v2.0/rpn/rpn_x101_32x4d_fpn_2x_coco/rpn_x101_32x4d_fpn_2x_coco_20200208-d22bd0bb.pth
rpn/rpn_x101-64x4d_fpn_1x_coco  rpn_x101_64x4d_fpn  -      61.0  https://download.openmmlab.com/mmdetection/v2.0/rpn/rpn_x101_64x4d_fpn_1x_coco/rpn_x101_64x4d_fpn_1x_coco_20200208-cde6f7dd.pth
rpn/rpn_x101-64x4d_fpn_2x_coco  rpn_x101_64x4d_fpn  -      61.5  https://download.openmmlab.com/mmdetection/v2.0/rpn/rpn_x101_64x4d_fpn_2x_coco/rpn_x101_64x4d_fpn_2x_coco_20200208-c65f524f.pth
"""
_TORCHVISION = """
fasterrcnn_resnet50_fpn     r50_fpn               -  37.0  https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth
fasterrcnn_resnet50_fpn_v2  r50_fpn_v2            -  46.7  https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth
retinanet_resnet50_fpn      retinanet_r50_fpn     -  36.4  https://download.pytorch.org/models/retinanet_resnet50_fpn_coco-eeacb38b.pth
retinanet_resnet50_fpn_v2   retinanet_r50_fpn_v2  -  41.5  https://download.pytorch.org/models/retinanet_resnet50_fpn_v2_coco-5905b1c5.pth
"""
_DETECTRON2 = """
COCO-Detection/faster_rcnn_R_50_C4_1x          r50_c4              -         35.7  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_R_50_C4_1x/137257644/model_final_721ade.pkl
COCO-Detection/faster_rcnn_R_50_DC5_1x         r50_dc5             -         37.3  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_R_50_DC5_1x/137847829/model_final_51d356.pkl
COCO-Detection/faster_rcnn_R_50_FPN_1x         r50_fpn             -         37.9  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl
COCO-Detection/faster_rcnn_R_50_C4_3x          r50_c4              -         38.4  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_R_50_C4_3x/137849393/model_final_f97cb7.pkl
COCO-Detection/faster_rcnn_R_50_DC5_3x         r50_dc5             -         39.0  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_R_50_DC5_3x/137849425/model_final_68d202.pkl
COCO-Detection/faster_rcnn_R_50_FPN_3x         r50_fpn             -         40.2  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl
COCO-Detection/faster_rcnn_R_101_C4_3x         r50_c4              r101_c4   41.1  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_R_101_C4_3x/138204752/model_final_298dad.pkl
COCO-Detection/faster_rcnn_R_101_DC5_3x        r50_dc5             r101_dc5  40.6  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_R_101_DC5_3x/138204841/model_final_3e0943.pkl
COCO-Detection/faster_rcnn_R_101_FPN_3x        r101_fpn            -         42.0  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl
COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x  x101_32x8d_fpn      -         43.0  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x/139173657/model_final_68b088.pkl
COCO-Detection/retinanet_R_50_FPN_1x           retinanet_r50_fpn   -         37.4  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl
COCO-Detection/retinanet_R_50_FPN_3x           retinanet_r50_fpn   -         38.7  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/retinanet_R_50_FPN_3x/190397829/model_final_5bd44e.pkl
COCO-Detection/retinanet_R_101_FPN_3x          retinanet_r101_fpn  -         40.4  https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/retinanet_R_101_FPN_3x/190397697/model_final_971ab9.pkl
"""


def _rows(table: str, profile: str) -> list[Published]:
    rows = []
    for line in table.strip().splitlines():
        if line.startswith("#"):
            continue
        name, model, variant, ap, address = line.split()
        known = _CLASSES.get(variant, ())
        rows.append(Published(name, profile, model, float(ap), address, variant, _VARIANTS[variant], known))
    return rows


PEERS = ("torchvision", "mmdet", "detectron2")  # in the order in which `coco_weights` prefers them
PUBLISHED = (*_rows(_MMDET, "mmdet"), *_rows(_TORCHVISION, "torchvision"), *_rows(_DETECTRON2, "detectron2"))


def published_for(name: str, profile: str | None = None) -> list[Published]:
    """The checkpoints that fit the named model as it is, without overrides, best AP first."""
    as_it_is = [p for p in PUBLISHED if p.model == name and not p.overrides and not p.classes]
    return sorted((p for p in as_it_is if profile in (None, p.profile)), key=lambda p: -p.ap)


def coco_weights(name: str, profile: str | None = None) -> Published:
    """The published checkpoint that `weights="coco"` stands for: the best one that fits the named model in this profile.

    profile None: torchvision's where there are any, else MMDetection's, else Detectron2's. Raises ValueError that lists
    what exists.
    """
    for peer in PEERS if profile is None else (get_profile(profile).name,):
        found = published_for(name, peer)
        if found:
            return found[0]
    wanted = repr(name) if profile is None else f"{name!r} in the profile {profile!r}"
    own = [f"{p.name} ({p.profile}{', with overrides' if p.overrides else ''})" for p in PUBLISHED if p.model == name]
    names = dict.fromkeys(p.model for p in PUBLISHED if published_for(p.model))
    exist = f"for this model there are {', '.join(own)}" if own else f"they exist for {', '.join(names)}"
    raise ValueError(f'weights: no published "coco" weights fit {wanted}; {exist}')
