"""What a network asks of the images that it is given, checked before a convolution complains in its own words."""

from timm.models import register_notrace_function
from torch import Tensor


@register_notrace_function
def check_image(x: Tensor, channels: int, least: int = 1) -> Tensor:
    """``x``, if it is a batch of images (b, channels, h, w) with h and w of at least ``least`` pixels.

    Raises:
        ValueError: it is not; the message says what came and what would do.
    """
    shape = tuple(x.shape)
    if len(shape) != 4:
        advice = "; x[None] makes a batch of one image" if len(shape) == 3 else ""
        raise ValueError(f"images must be (batch, {channels}, height, width), got the shape {shape}{advice}")
    if shape[1] != channels:
        last = "; x.permute(0, 3, 1, 2) puts channels first" if shape[3] == channels else ""
        advice = last or f"; make the network with in_chans={shape[1]}"
        raise ValueError(f"images must have {channels} channels, got {shape[1]} in the shape {shape}{advice}")
    if shape[2] < least or shape[3] < least:
        raise ValueError(
            f"images must be at least {least} x {least} pixels, got {shape[2]} x {shape[3]}; enlarge or pad them"
        )
    return x
