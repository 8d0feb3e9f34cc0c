"""What a hook sees that is written as anybody would write it, to compare this project's hooks with."""


def map_tokens(x):
    """Turn a map (rows, d, H, W) into tokens (rows, H * W, d)."""
    return x.flatten(2).transpose(1, 2)


def watch_by_hand(pipe, denoiser, hook_name, prompt, options, pick=lambda output: output):
    """Run a pipeline and return what one module returned in each forward, in their order.

    denoiser: the name of the pipeline's component that has the module `hook_name`. pick: which part
    of the module's output is meant.
    """
    seen = []
    module = getattr(pipe, denoiser).get_submodule(hook_name)
    handle = module.register_forward_hook(
        lambda module, args, output: seen.append(pick(output).clone())
    )
    try:
        pipe(prompt=prompt, **options)
    finally:
        handle.remove()
    return seen
