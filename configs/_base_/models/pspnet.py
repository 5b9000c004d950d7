"""PSPNet of 256 channels on the third of three maps, an FCN head of 128 on the second; otherwise as ``upernet.py``."""

_base_ = "upernet.py"

model = dict(decode_head=dict(type="PSPHead", in_index=2, channels=256), auxiliary_head=dict(in_index=1, channels=128))
