"""VMamba checkpoints as the original code writes them, made from networks of the zoo."""

import re


def official(model, legacy=False):
    """The weights of ``model`` under the names and in the shapes of the original code, today's or January 2024's."""
    stem = ("proj", "norm") if legacy else ("0", "2")
    two_steps = hasattr(model.stem, "conv2")
    names = [
        (r"^stem\.conv1", f"patch_embed.{stem[0]}"),
        (r"^stem\.norm1", f"patch_embed.{stem[1]}"),
        (r"^stem\.conv2", "patch_embed.5"),
        (r"^stem\.norm2", "patch_embed.7"),
        (r"^stages\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample"),
        (r"downsample\.conv", "downsample.1"),
        (r"downsample\.norm", "downsample.3" if two_steps else "downsample.norm"),
        (r"^stages\.", "layers."),
        (r"(blocks\.\d+)\.norm1", r"\1.ln_1" if legacy else r"\1.norm"),
        (r"(blocks\.\d+)\.mixer", r"\1.self_attention" if legacy else r"\1.op"),
        (r"(op|self_attention)\.conv\.", r"\1.conv2d."),
        (r"(op|self_attention)\.norm\.", r"\1.out_norm."),
        (r"x_proj$", "x_proj_weight"),
        (r"dt_proj$", "dt_projs_weight"),
        (r"dt_bias$", "dt_projs_bias"),
        (r"A_log$", "A_logs"),
        (r"\.D$", ".Ds"),
        (r"^norm\.", "norm." if legacy else "classifier.norm."),
        (r"^head\.fc", "head" if legacy else "classifier.head"),
    ]
    state = {}
    for key, tensor in model.state_dict().items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        state[key] = tensor.flatten(0, 1) if key.endswith(("A_logs", "Ds")) else tensor.clone()
    return state


def single_file(state):
    """The newer single-file layout: flattened projections as modules, 1x1 convolutions in place of linear layers."""
    renamed = {}
    for key, tensor in state.items():
        if key.endswith(("x_proj_weight", "dt_projs_weight")):
            key, tensor = key.replace("_weight", ".weight"), tensor.flatten(0, 1)
        elif re.search(r"(in_proj|out_proj|fc1|fc2)\.weight$", key):
            tensor = tensor[..., None, None]
        renamed[key.replace("downsample.norm", "downsample.1").replace("downsample.reduction", "downsample.2")] = tensor
    return renamed
