"""UPerNet with VMamba-T (s1l8) on shapes; FSDP shares out weights, gradients and the optimiser's state over the GPUs.

    vmamba shapes data/shapes
    tools/dist_train.sh configs/demo/upernet_vmamba_tiny_s1l8_shapes_fsdp.py 2

Hardware: 2 GPUs or more.
Expected: about the losses of configs/demo/upernet_vmamba_tiny_s1l8_shapes.py, which clips gradients; mmengine would
clip each share by its own norm here.
Source: vmamba's own demonstration. For a network that does not fit otherwise, change variant and heads in the same way.
"""

_base_ = "upernet_vmamba_tiny_s1l8_shapes.py"
runner_type = "FlexibleRunner"
strategy = dict(
    type="FSDPStrategy",
    model_wrapper=dict(type="BlockwiseFSDP"),  # a block of the backbone at a time
    state_dict_cfg="full",  # checkpoints are the usual files
)
optim_wrapper = dict(clip_grad=None)
train_dataloader = dict(batch_size=8)
