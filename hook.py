"""The model side: find modules inside a diffusion model's denoiser, capture what they compute, edit it, label every row.

    model = HookedDiffusionModel.from_pretrained("toy")                  # or .from_pipeline(pipe), for any pipeline
    model.hook_names("up_blocks.*.attentions.*")                         # what can be hooked
    output, cache = model.run_with_cache("up_blocks.1.attentions.1", ["a red star", "a blue ring"], output_type="latent")
    cache["output"]["up_blocks.1.attentions.1"]                          # (prompts, steps, tokens, d), conditional rows
    model.run_with_hooks({"mid_block": lambda module, input, output: 0 * output}, "a red star")

The user's own pipeline runs as it is. `rows.py` watches its denoiser and its scheduler to tell which rows are whose.
"""

import difflib
import inspect
import re
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import torch

from rows import Recorder, Sampling, first_tensor, time_parameter, unwrap

OURS = ("self", "prompt", "negative_prompt", "generator", "output_type")  # pipeline arguments with options of their own


class HookedDiffusionModel:
    """A diffusion model whose modules can be read and edited by name while it generates.

    model: nn.Module whose `forward(sample, timestep, ...)` predicts for a batch-first sample. scheduler: anything with
    `step(model_output, timestep, sample)`, and `scale_model_input` if it needs it. encode_prompt(prompt, device,
    num_images_per_prompt, do_classifier_free_guidance, negative_prompt) -> (prompt_embeds, negative_prompt_embeds).
    get_timesteps(num_inference_steps, device) -> timesteps (default: the scheduler's `set_timesteps`). vae: decodes the
    final sample. sample_shape: of one sample, without the batch axis (default: from `model.config`).
    """

    def __init__(self, model, scheduler, encode_prompt=None, get_timesteps=None, vae=None, *, sample_shape=None):
        self.pipe = None
        self.denoisers = {"model": model}
        self.scheduler, self.encode_prompt, self.get_timesteps, self.vae = scheduler, encode_prompt, get_timesteps, vae
        self.sample_shape = sample_shape

    @classmethod
    def from_pipeline(cls, pipe):
        """Hook a diffusers pipeline: its denoisers are the components whose `forward` takes a time and that do not decode."""
        modules = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
        denoisers = {n: m for n, m in modules.items() if time_parameter(m) and not hasattr(unwrap(m), "decode")}
        if not denoisers:
            raise ValueError(f"{type(pipe).__name__} has no component whose forward takes a timestep: {sorted(modules)}")
        hooked = cls(None, pipe.scheduler, vae=modules.get("vae"))
        hooked.pipe, hooked.denoisers = pipe, denoisers
        return hooked

    @classmethod
    def from_pretrained(cls, model_name, dtype=None, device=None, cpu_offload=False, **kwargs):
        """Load a diffusers folder or hub id; kwargs that are not None go to `DiffusionPipeline.from_pretrained`.

        dtype None is float32. `cpu_offload` keeps only the running component on `device`. Raises ValueError for a name that
        is no folder and can't be a hub id, and for weights that are not there.
        """
        from diffusers import DiffusionPipeline

        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        name = find_model(model_name)
        try:
            pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype or torch.float32, **kwargs)
        except ValueError as error:
            raise ValueError(f"{model_name} can't be loaded: {error}") from error
        if cpu_offload:
            pipe.enable_model_cpu_offload(device=device)
        elif device is not None:
            pipe.to(device)
        return cls.from_pipeline(pipe)

    def modules(self):
        """{hook_name: (denoiser name, module)} of every module that can run; long names where there are several denoisers."""
        found = {}
        for denoiser, root in self.denoisers.items():
            for name, module in unwrap(root).named_modules():
                if name and type(module).forward is not torch.nn.Module.forward:
                    found[name if len(self.denoisers) == 1 else f"{denoiser}.{name}"] = (denoiser, module)
        return found

    def hook_names(self, pattern="*"):
        """Module names that match a glob. `*` stays within one part of the dotted name and `**` does not; a pattern without
        a dot is matched against the last part, at any depth; a name without a wildcard is itself.

        Raises ValueError, with the nearest names, if none does.
        """
        names = list(self.modules())
        long = {f"{denoiser}.{name}": name for denoiser in self.denoisers for name in names}
        if not re.search(r"[*?\[]", pattern):
            if (exact := pattern if pattern in names else long.get(pattern)) is not None:
                return [exact]
            near = difflib.get_close_matches(pattern, names, 3, 0.5) or sorted(names)[:3]
            raise ValueError(f"no module is named {pattern!r}; the nearest names are {', '.join(near)}")
        token = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
        parts = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern)
        parts = [p.replace("[!", "[^", 1) if p[:1] == "[" else token.get(p) or re.escape(p) for p in parts]
        try:
            regex = re.compile("".join(parts))
        except re.error as error:
            raise ValueError(f"{pattern!r} is no pattern: {error}") from None
        short = "." not in pattern
        found = [n for n in names if regex.fullmatch(n.rpartition(".")[2] if short else n)]
        found += [n for full, n in long.items() if not short and regex.fullmatch(full) and n not in found]
        if not found:
            raise ValueError(f"no module matches {pattern!r}; `**` crosses dots, and hook_names() lists what there is")
        return found

    def _expand(self, positions):
        """Hook names for a name, a glob or a list of them: ({hook_name: (denoiser, module)}, names that were spelt out)."""
        positions = [positions] if isinstance(positions, str) else list(positions)
        modules, targets, explicit = self.modules(), {}, set()
        for position in positions:
            names = self.hook_names(position)
            targets |= {name: modules[name] for name in names}
            explicit |= set() if set(position) & set("*?[") else set(names)
        return targets, explicit

    def arguments(self, num_images_per_prompt=1, output_type=None, extra=None, **options):
        """Keyword arguments for the pipeline: options that are None take the pipeline's own default, so that all are known.

        `output_type` is left out where the pipeline has none; `extra` is a dict of anything else. Raises ValueError for
        what the pipeline does not take, and for what is given twice.
        """
        pipeline, takes = type(self.pipe).__name__, inspect.signature(type(self.pipe).__call__).parameters
        for name in options:
            default = takes[name].default if name in takes else None
            if options[name] is None and default is not inspect.Parameter.empty:
                options[name] = default
        options = {name: value for name, value in options.items() if value is not None}
        if num_images_per_prompt > 1:
            name = next((p for p in takes if p.startswith("num_") and p.endswith("_per_prompt")), "num_images_per_prompt")
            options[name] = num_images_per_prompt
        if output_type is not None and "output_type" in takes:
            options["output_type"] = output_type
        for name in extra or {}:
            if name in OURS or name.startswith("num_") and name.endswith("_per_prompt"):
                raise ValueError(f"{name} is set by an option of its own")
        options |= extra or {}
        if unknown := [name for name in options if name not in takes]:
            raise ValueError(f"{pipeline} takes no argument {unknown[0]!r}")
        return options

    def __call__(self, prompt=None, **kwargs):
        """Generate. kwargs go to the pipeline; for a denoiser of one's own they are those of `sample`."""
        with torch.no_grad():
            if self.pipe is None:
                return self.sample(prompt, **kwargs)
            return self.pipe(**({} if prompt is None else {"prompt": prompt}), **kwargs)

    def sample(
        self,
        prompt=None,
        *,
        num_inference_steps=50,
        guidance_scale=7.5,
        negative_prompt=None,
        num_images_per_prompt=1,
        batch_size=1,
        generator=None,
        latents=None,
        output_type="pt",
    ):
        """The built-in loop for a denoiser of one's own, with guidance if `guidance_scale > 1` and prompts can be encoded.

        Returns an object with `images`: decoded to [0, 1] by the VAE if there is one and `output_type` is not "latent".
        """
        model = self.denoisers["model"]
        weight = next(model.parameters())
        n = num_images_per_prompt * (batch_size if prompt is None or isinstance(prompt, str) else len(prompt))
        guided, embeds = False, []
        if self.encode_prompt is not None:
            guided = guidance_scale > 1
            cond, uncond = self.encode_prompt(prompt, weight.device, num_images_per_prompt, guided, negative_prompt)
            embeds = [torch.cat([uncond, cond]) if guided else cond]
        if self.get_timesteps is not None:
            timesteps = self.get_timesteps(num_inference_steps, weight.device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=weight.device)
            timesteps = self.scheduler.timesteps
        if latents is None:
            from diffusers.utils.torch_utils import randn_tensor

            latents = randn_tensor((n, *self._sample_shape()), generator=generator, device=weight.device, dtype=weight.dtype)
            latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for t in timesteps:
            x = torch.cat([latents] * 2) if guided else latents
            if hasattr(self.scheduler, "scale_model_input"):
                x = self.scheduler.scale_model_input(x, t)
            prediction = first_tensor(model(x, t, *embeds))
            if guided:
                uncond, cond = prediction.chunk(2)
                prediction = uncond + guidance_scale * (cond - uncond)
            latents = first_tensor(self.scheduler.step(prediction, t, latents))
        if self.vae is None or output_type == "latent":
            return SimpleNamespace(images=latents)
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        images = first_tensor(self.vae.decode(latents / self.vae.config.scaling_factor + shift))
        return SimpleNamespace(images=(images / 2 + 0.5).clamp(0, 1))

    def _sample_shape(self):
        if self.sample_shape is not None:
            return tuple(self.sample_shape)
        config = getattr(self.denoisers["model"], "config", None)
        channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
        if channels is None or size is None:
            raise ValueError(
                "the sample's shape is unknown: the model has no config.in_channels and sample_size; pass sample_shape"
            )
        return (channels, size, size) if isinstance(size, int) else (channels, *size)

    def run_with_cache(
        self,
        positions_to_cache,
        prompt=None,
        *,
        save_input=False,
        save_output=True,
        rows="cond",
        stream="image",
        cache_every_n_timesteps=1,
        dtype=None,
        **kwargs,
    ):
        """Generate, and keep what the named modules computed: (output, cache), see `cache`."""
        options = dict(save_input=save_input, save_output=save_output, rows=rows, stream=stream)
        options |= dict(cache_every_n_timesteps=cache_every_n_timesteps, dtype=dtype)
        with self.cache(positions_to_cache, count_rows(prompt, kwargs), **options) as cache:
            output = self(prompt, **kwargs)
        return output, cache

    @contextmanager
    def cache(
        self,
        positions_to_cache,
        n_prompts,
        *,
        save_input=False,
        save_output=True,
        rows="cond",
        stream="image",
        cache_every_n_timesteps=1,
        dtype=None,
    ):
        """Keep what the named modules compute while the body of the `with` samples `n_prompts` prompts.

        Yields a dict that is complete when the context ends. `cache["output"][hook_name]` and, with `save_input`,
        `cache["input"][hook_name]` are CPU tensors (prompts, steps, tokens, d) of `dtype` (default: the model's own), with
        `rows="both"` also `cache["output_uncond"]`. `cache["timesteps"][hook_name]` (steps,) float64,
        `cache["grid"][hook_name]` a tuple whose product is `tokens`, `cache["sigmas"]` as `timesteps`, where known.

        Raises ValueError where a named module does not run exactly once a forward (one found by a glob is left out), where
        what it returns has no batch axis, and where unconditional rows are asked for and there are none.
        """
        targets, explicit = self._expand(positions_to_cache)
        recorder = Recorder(targets, n_prompts, save_input, save_output, rows, stream, cache_every_n_timesteps, dtype)
        cache = {}
        with self.watch(n_prompts, recorder.on_step) as sampling, ExitStack() as stack:
            recorder.listen(stack, sampling, self.denoisers)
            yield cache
        cache |= recorder.result(explicit)

    def first_step(self, positions, prompt=None, *, save_input=False, save_output=True, rows="cond", stream="image", **kwargs):
        """The cache of one step, which is thrown away with every random state put back, and in `cache["num_steps"]` how many
        steps the whole sampling has.
        """

        class Enough(Exception):
            pass

        def on_step(step):
            recorder.on_step(step)
            recorder.num_steps = len(getattr(step.scheduler, "timesteps", ())) or None
            raise Enough

        targets, explicit = self._expand(positions)
        recorder = Recorder(targets, count_rows(prompt, kwargs), save_input, save_output, rows, stream)
        with (
            undisturbed(self.pipe, kwargs),
            suppress(Enough),
            self.watch(recorder.R, on_step) as sampling,
            ExitStack() as stack,
        ):
            recorder.listen(stack, sampling, self.denoisers)
            self(prompt, **kwargs)
        return recorder.result(explicit) | {"num_steps": recorder.num_steps}

    def run_with_hooks(self, position_hook_dict, prompt=None, **kwargs):
        """Generate with edits: {hook_name: fn or [fn]}, `fn(module, input, output) -> new output or None`, as in PyTorch.

        `input` is the tuple of positional arguments, or of the keyword ones where the module gets only those. The function
        sees the whole batch, conditional and unconditional rows alike. Raises ValueError if a named module never ran. Hooks
        are removed afterwards, also after an exception.
        """
        ran = dict.fromkeys(n for p in position_hook_dict for n in self.hook_names(p))
        modules = self.modules()
        with ExitStack() as stack:
            for position, functions in position_hook_dict.items():
                for name in self.hook_names(position):
                    for fn in functions if isinstance(functions, (list, tuple)) else [functions]:

                        def hook(module, args, kwargs, output, fn=fn, name=name):
                            ran[name] = True
                            return fn(module, args or tuple(kwargs.values()), output)

                        stack.callback(modules[name][1].register_forward_hook(hook, with_kwargs=True).remove)
            output = self(prompt, **kwargs)
        if idle := [name for name in ran if not ran[name]]:
            raise ValueError(f"never ran, so nothing was edited there: {', '.join(idle)}")
        return output

    def watch(self, R=1, on_step=None):
        """Context in which every scheduler step of R rows is reported to `on_step`; yields a `Sampling`."""
        components = [self.scheduler] if self.pipe is None else [self.pipe.scheduler, *self.pipe.components.values()]
        classes = {type(c) for c in components if callable(getattr(type(c), "step", None))}
        if not classes:
            raise ValueError("the scheduler's class has no method `step(model_output, timestep, sample)`")
        return Sampling(self.denoisers, classes, R, on_step).watch()


def find_model(model_name):
    """A folder here, one beside this file (so that the toy is found from anywhere), or a hub id; ValueError for neither."""
    for folder in (Path(model_name), Path(__file__).parent / model_name):
        if folder.is_dir():
            return str(folder)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model_name)):
        raise ValueError(f"no folder {str(model_name)!r} here, and a hub id looks like owner/name")
    return str(model_name)


def count_rows(prompt, kwargs):
    """Rows of one chunk: prompts x images per prompt, from the arguments of a generation."""
    sized = (prompt, *(kwargs.get(name) for name in ("prompt_embeds", "class_labels")))
    n = next((1 if isinstance(v, str) else len(v) for v in sized if v is not None), kwargs.get("batch_size", 1))
    return n * next((v for k, v in kwargs.items() if k.startswith("num_") and k.endswith("_per_prompt")), 1)


@contextmanager
def undisturbed(pipe, kwargs):
    """Leave no trace of a generation: random states and the generators in `kwargs` are put back, no progress bar is shown."""
    generators = [g for v in kwargs.values() for g in (v if isinstance(v, list) else [v]) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    bar = vars(pipe).get("_progress_bar_config") if pipe is not None else None
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    with torch.random.fork_rng(devices=cuda):
        try:
            if pipe is not None:
                pipe._progress_bar_config = (bar or {}) | {"disable": True}
            yield
        finally:
            if mps is not None:
                torch.mps.set_rng_state(mps)
            for g, state in zip(generators, states):
                g.set_state(state)
            if bar is not None:
                pipe._progress_bar_config = bar
            elif pipe is not None:
                vars(pipe).pop("_progress_bar_config", None)
