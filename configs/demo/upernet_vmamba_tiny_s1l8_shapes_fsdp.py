"""UPerNet with VMamba-T (s1l8) on shapes; FSDP shares out weights, gradients and the optimiser's state over the GPUs.

    vmamba shapes data/shapes
    tools/dist_train.sh configs/demo/upernet_vmamba_tiny_s1l8_shapes_fsdp.py 2

Hardware: 2 GPUs or more; FSDP does not run on CPUs.
Expected: about the losses of configs/demo/upernet_vmamba_tiny_s1l8_shapes.py, which clips gradients; mmengine would
clip each share by its own norm here.
Source: vmamba's own demonstration. For a network that does not fit otherwise, change variant and heads in the same way.
"""

_base_ = "upernet_vmamba_tiny_s1l8_shapes.py"
runner_type = "FlexibleRunner"
policy = dict(type="torch.distributed.fsdp.wrap.size_based_auto_wrap_policy", min_num_params=1_000_000)
strategy = dict(
    type="FSDPStrategy",
    model_wrapper=dict(use_orig_params=True, auto_wrap_policy=policy),
    state_dict_cfg="full",  # checkpoints are the usual files
)
optim_wrapper = dict(clip_grad=None)
train_dataloader = dict(batch_size=8)
