"""Small detectors and segmentors of mmdet and mmseg around a backbone, with one batch of made-up data."""

import numpy as np
import torch

import vmamba.mm  # noqa: F401
from tests.mm_parts import small_cfg


def upernet(name: str, **options) -> dict:
    """Configuration of UPerNet with an auxiliary head, 8 channels, 3 classes."""
    from mmengine.registry import MODELS

    channels = MODELS.build(small_cfg(name, **options)).channels
    head = dict(channels=8, num_classes=3, norm_cfg=dict(type="BN"), align_corners=False, dropout_ratio=0.0)
    return dict(
        type="EncoderDecoder",
        data_preprocessor=dict(
            type="SegDataPreProcessor", mean=[128.0] * 3, std=[64.0] * 3, pad_val=0, seg_pad_val=255, size_divisor=1
        ),
        backbone=small_cfg(name, **options),
        decode_head=dict(type="UPerHead", in_channels=channels, in_index=[*range(len(channels))], **head),
        auxiliary_head=dict(type="FCNHead", in_channels=channels[-2], in_index=len(channels) - 2, num_convs=1, **head),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )


def mask_rcnn(name: str, **options) -> dict:
    """Configuration of Mask R-CNN with a feature pyramid of 8 channels, 2 classes."""
    from mmengine.registry import MODELS

    channels = MODELS.build(small_cfg(name, **options)).channels
    coder = dict(type="DeltaXYWHBBoxCoder")
    assigner = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.3, min_pos_iou=0.0, match_low_quality=True)
    sampler = dict(type="RandomSampler", num=16, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True)
    proposals = dict(nms_pre=50, max_per_img=20, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0)
    strides = [4, 8, 16, 32]

    def align(size):
        layer = dict(type="RoIAlign", output_size=size, sampling_ratio=0)
        return dict(type="SingleRoIExtractor", roi_layer=layer, out_channels=8, featmap_strides=strides)

    return dict(
        type="MaskRCNN",
        data_preprocessor=dict(
            type="DetDataPreprocessor", mean=[128.0] * 3, std=[64.0] * 3, pad_size_divisor=32, pad_mask=True
        ),
        backbone=small_cfg(name, **options),
        neck=dict(type="FPN", in_channels=list(channels), out_channels=8, num_outs=4),
        rpn_head=dict(
            type="RPNHead", in_channels=8, feat_channels=8, bbox_coder=coder,
            anchor_generator=dict(type="AnchorGenerator", scales=[4], ratios=[0.5, 1.0, 2.0], strides=strides),
        ),
        roi_head=dict(
            type="StandardRoIHead", bbox_roi_extractor=align(7), mask_roi_extractor=align(14),
            bbox_head=dict(
                type="Shared2FCBBoxHead", in_channels=8, fc_out_channels=16, num_classes=2, bbox_coder=coder
            ),
            mask_head=dict(type="FCNMaskHead", num_convs=1, in_channels=8, conv_out_channels=8, num_classes=2),
        ),
        train_cfg=dict(
            rpn=dict(assigner=assigner, sampler=sampler, allowed_border=-1, pos_weight=-1, debug=False),
            rpn_proposal=proposals,
            rcnn=dict(assigner=assigner, sampler=sampler, mask_size=28, pos_weight=-1, debug=False),
        ),
        test_cfg=dict(
            rpn=proposals,
            rcnn=dict(score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=5, mask_thr_binary=0.5),
        ),
    )  # fmt: skip


def classification_batch(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Images of the one size in ``sizes`` and labels 0, 1 ..., as a data loader of timm's transforms gives them."""
    images = torch.stack(_images(sizes)) / 128 - 1
    return [images, torch.arange(len(sizes))]


def segmentation_batch(*sizes: tuple[int, int]) -> dict:
    """Images of ``sizes`` with random labels, as a data loader of mmseg gives them."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator, samples = torch.Generator().manual_seed(0), []
    for height, width in sizes:
        sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
        sample.gt_sem_seg = PixelData(data=torch.randint(3, (1, height, width), generator=generator))
        samples.append(sample)
    return {"inputs": _images(sizes), "data_samples": samples}


def detection_batch(*sizes: tuple[int, int], boxes: int = 2) -> dict:
    """Images of ``sizes`` with ``boxes`` rectangles each, as a data loader of mmdet gives them."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    samples = []
    for height, width in sizes:
        size = (height, width)
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
        corners = torch.tensor([[2.0, 3.0, width * 0.6, height * 0.7], [5.0, 1.0, width - 1.0, height * 0.5]])[:boxes]
        masks = np.zeros((boxes, height, width), np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, corners.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        sample = DetDataSample(metainfo=meta)
        labels = torch.arange(boxes) % 2
        sample.gt_instances = InstanceData(bboxes=corners, labels=labels, masks=BitmapMasks(masks, height, width))
        samples.append(sample)
    return {"inputs": _images(sizes), "data_samples": samples}


def _images(sizes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
