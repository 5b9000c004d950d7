"""MHS-UNet (MHS-VM: multi-head scanning in parallel subspaces, arXiv:2406.05992). Code: PixDeep/MHS-VM, Apache-2.0.

VM-UNet whose blocks scan subspaces of the channels in different orders. The threshold of the scan route attention is
not in the weights: the published ISIC18 file is used with 0.4 (trained with 0.5), that of ISIC17 with 0.
"""

from functools import partial

from vmamba.heads.vmunet import KEYS as VMUNET_KEYS
from vmamba.heads.vmunet import VMUNet
from vmamba.mixers.mhs import FOUR_HEADS, MHS, THREE_HEADS
from vmamba.mixers.mhs import KEYS as MHS_KEYS
from vmamba.registry import register


class MHSUNet(VMUNet):
    """:class:`vmamba.heads.vmunet.VMUNet` with multi-head scans; its arguments."""


VARIANTS = {
    "mhs_unet_3h": dict(mixer=partial(MHS, threshold=0.0), scan=THREE_HEADS),
    "mhs_unet_4h": dict(mixer=partial(MHS, threshold=0.4), scan=FOUR_HEADS),
}

KEYS = [*VMUNET_KEYS, *MHS_KEYS]

register(
    MHSUNet, VARIANTS, keys=KEYS, paper="2406.05992", origin="https://github.com/PixDeep/MHS-VM", license="apache-2.0"
)
