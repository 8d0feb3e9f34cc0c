"""The model side: find modules inside a diffusion model's denoiser, capture what they compute, edit
it, label every row.

    model = HookedDiffusionModel.from_pretrained("toy")                  # or .from_pipeline(pipe), for any pipeline
    model.hook_names("up_blocks.*.attentions.*")                         # what can be hooked
    output, cache = model.run_with_cache("up_blocks.1.attentions.1", ["a red star", "a blue ring"], output_type="latent")
    cache["output"]["up_blocks.1.attentions.1"]                          # (prompts, steps, tokens, d), conditional rows
    model.run_with_hooks({"mid_block": lambda module, input, output: 0 * output}, "a red star")

The user's own pipeline runs as it is, whatever its family. In diffusion/, `trace.py` watches its
denoiser and its scheduler, `guidance.py` tells which rows are conditional, `locate.py` finds where
the image's tokens are, `recorder.py` keeps them, and `edit.py` edits them.
"""

import inspect
import re
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from diffusion.edit import Edit
from diffusion.generate import Generation
from diffusion.guidance import Memory, Pass, RoleFinder, check_order
from diffusion.hook_names import check_hookable, find_modules, is_pattern, match_names
from diffusion.locate import NEVER_RAN, find_layouts, has_more_than_sample, note_sampled
from diffusion.recorder import CacheOptions, Recorder
from diffusion.repeated import RunWatch
from diffusion.sampling_loop import Loop
from diffusion.signatures import (
    count_prompts,
    other_prompts,
    outline,
    per_prompt,
    prompt_arguments,
    sample_name,
    tensors,
    time_parameter,
    unwrap,
)
from diffusion.token_layout import Layout, NotHookable
from diffusion.trace import DryRunOver, Sampling, undisturbed
from diffusion.unnoticed import processors_put_back, without_hooks
from errors import UsageError
from store.hook_point import HookPoint

__all__ = [
    "Edit", "Generation", "HookPoint", "HookedDiffusionModel", "Layout", "NotHookable", "find_model", "model_of", "per_prompt",
    "tensors", "unwrap",
]  # fmt: skip
OURS = (
    "self",
    "prompt",
    "negative_prompt",
    "generator",
    "output_type",
)  # pipeline arguments with options of their own


class HookedDiffusionModel:
    """A diffusion model whose modules can be read and edited by name while it generates.

    model: nn.Module whose `forward(sample, timestep, ...)` predicts for a batch-first sample.
    scheduler: anything with `step(model_output, timestep, sample)`, and `scale_model_input` if it
    needs it. encode_prompt(prompt, device, num_images_per_prompt, do_classifier_free_guidance,
    negative_prompt) -> (prompt_embeds, negative_prompt_embeds). get_timesteps(num_inference_steps,
    device) -> timesteps (default: the scheduler's `set_timesteps`). vae: decodes the final sample.
    sample_shape: of one sample, without the batch axis (default: from `model.config`).
    """

    def __init__(
        self,
        model,
        scheduler,
        encode_prompt=None,
        get_timesteps=None,
        vae=None,
        *,
        sample_shape=None,
    ):
        self._hook(
            Loop(model, scheduler, encode_prompt, get_timesteps, vae, sample_shape),
            {"model": model},
            {"scheduler": scheduler},
        )

    @classmethod
    def from_pipeline(cls, pipe):
        """Hook a diffusers pipeline. Its denoisers are the components whose `forward` takes a time
        and that do not decode; one whose output does not reach the scheduler, a network that only
        conditions another, is left out when it runs.
        """
        modules = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
        denoisers = {
            n: m
            for n, m in modules.items()
            if time_parameter(m) and not hasattr(unwrap(m), "decode")
        }
        if not denoisers:
            raise UsageError(
                f"{type(pipe).__name__} has no component whose forward takes a timestep: {sorted(modules)}"
            )
        hooked = cls.__new__(cls)
        schedulers = {}
        for name, component in pipe.components.items():
            if callable(getattr(type(component), "step", None)):
                schedulers[name] = component
        hooked._hook(pipe, denoisers, schedulers)
        return hooked

    def _hook(self, pipe, denoisers, schedulers):
        self._watched = denoisers | schedulers  # {attribute of the pipeline: its component}
        schedulers = list(schedulers.values())
        if not all(callable(getattr(type(s), "step", None)) for s in schedulers) or not schedulers:
            raise UsageError(
                "the scheduler's class has no method `step(model_output, timestep, sample)`"
            )
        for denoiser in denoisers.values():
            sample_name(denoiser)
        self.pipe, self.denoisers, self.schedulers = pipe, denoisers, schedulers
        self._known = {}  # layouts found so far, see `locate.find_layouts`
        self._memories = {}  # {outline of a generation's options: `guidance.Memory`}
        self._repeatable = {}  # {outline of a generation's options: schedulers that were seen to repeat themselves with them}

    @classmethod
    def from_pretrained(cls, model_name, dtype=None, device=None, cpu_offload=False, **kwargs):
        """Load a diffusers folder or hub id; kwargs that are not None go to
        `DiffusionPipeline.from_pretrained`.

        dtype None is float32. `cpu_offload` keeps only the running component on `device`. Raises
        UsageError for a name that is no folder and can't be a hub id, and for weights that are not
        there.
        """
        from diffusers import DiffusionPipeline

        kwargs = {"use_safetensors": True} | {
            name: value for name, value in kwargs.items() if value is not None
        }  # no pickle
        name = find_model(model_name)
        try:
            pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype or torch.float32, **kwargs)
        except ValueError as error:
            raise UsageError(f"{model_name} can't be loaded: {error}") from error
        if cpu_offload:
            pipe.enable_model_cpu_offload(device=device)
        elif device is not None:
            pipe.to(device)
        return cls.from_pipeline(pipe)

    def _check_not_replaced(self):
        """Raise UsageError where the pipeline has another scheduler or denoiser than at hooking."""
        known = {id(component) for component in (*self.denoisers.values(), *self.schedulers)}
        for name, component in self._watched.items():
            current = getattr(self.pipe, name, component)
            if current is not component and id(current) not in known:
                raise UsageError(
                    f"{name} of {type(self.pipe).__name__} was replaced after hooking, so it is "
                    "not the one that is watched: hook the model again after such a change"
                )

    def modules(self):
        """{hook_name: (denoiser name, module)} of every module that can run; names that several
        denoisers have are long."""
        return find_modules(self.denoisers)

    def hook_names(self, pattern="*"):
        """Module names that match a glob. `*` stays within one part of the dotted name and `**`
        does not; a pattern without a dot is matched against the last part, at any depth; a name
        without a wildcard is itself.

        Raises UsageError, with the nearest names, if none does.
        """
        return match_names(pattern, self.modules())

    def _targets(self, positions):
        """Of a name, a glob or a list of them: ({hook_name: (denoiser, module)}, names that were
        spelt out)."""
        self._check_not_replaced()
        positions = [positions] if isinstance(positions, str) else list(positions)
        modules, targets, explicit = self.modules(), {}, set()
        for position in positions:
            names = match_names(position, modules)
            targets |= {name: modules[name] for name in names}
            explicit |= set() if is_pattern(position) else set(names)
        for denoiser in {denoiser for denoiser, _ in targets.values()}:
            check_hookable(denoiser, self.denoisers[denoiser])
        return targets, explicit

    def accepts(self, **options):
        """Those of the options that the pipeline takes."""
        takes = inspect.signature(self.pipe).parameters
        return {name: value for name, value in options.items() if name in takes}

    def arguments(self, num_images_per_prompt=1, output_type=None, extra=None, **options):
        """Keyword arguments for the pipeline: options that are None take the pipeline's own
        default, so that all are known.

        `output_type` is left out where the pipeline has none; `extra` is a dict of anything else.
        Raises UsageError for what the pipeline does not take, and for what is given twice.
        """
        pipeline, takes = type(self.pipe).__name__, inspect.signature(self.pipe).parameters
        for name in options:
            default = takes[name].default if name in takes else None
            if options[name] is None and default is not inspect.Parameter.empty:
                options[name] = default
        options = {name: value for name, value in options.items() if value is not None}
        if num_images_per_prompt > 1:
            name = next((p for p in takes if per_prompt(p)), "num_images_per_prompt")
            options[name] = num_images_per_prompt
        if output_type is not None and "output_type" in takes:
            options["output_type"] = output_type
        for name in extra or {}:
            if name in OURS or per_prompt(name):
                raise UsageError(f"{name} is set by an option of its own")
        options |= extra or {}
        size = [name for name in ("height", "width") if options.get(name) is not None]
        if len(size) == 1 and {"height", "width"} <= set(takes):
            raise UsageError(
                f"{size[0]} is given alone, and most pipelines take neither then; give height and width"
            )
        if unknown := [name for name in options if name not in takes]:
            raise UsageError(f"{pipeline} takes no argument {unknown[0]!r}")
        return options

    def __call__(self, prompt=None, **kwargs):
        """Generate. kwargs go to the pipeline, or to `loop.Loop` for a denoiser of one's own. Where
        a pipeline takes no prompt, it gets class numbers written as text, or only as many samples
        as there are prompts.
        """
        given = prompt_arguments(self.pipe, prompt) | kwargs
        own = {
            k: list(v) if isinstance(v, list) else v for k, v in given.items()
        }  # some pipelines write into lists
        with torch.no_grad():
            return self.pipe(**own)

    def run_with_cache(self, positions_to_cache, prompt=None, *, later=False, **kwargs):
        """Generate, and keep what the named modules computed: (output, cache). kwargs: those of
        `cache`, and the pipeline's.

        With `later` the cache is a function instead, which waits for the device's copies and
        returns it, on any thread.
        """
        options, kwargs = CacheOptions.take_from(kwargs)
        finder = self._ask(positions_to_cache, prompt, kwargs, options.order)
        with self._record(
            positions_to_cache, *count_prompts(prompt, kwargs), options, finder
        ) as result:
            output = self(prompt, **kwargs)
        return output, result if later else result()

    @contextmanager
    def cache(self, positions_to_cache, n_prompts, num_images_per_prompt=1, **options):
        """Keep what the named modules compute while the body of the `with` samples `n_prompts`
        prompts.

        options: save_input=False, save_output=True, rows="cond", stream="image",
        cache_every_n_timesteps=1, dtype=None, choose=None, order=None, see `recorder.CacheOptions`.

        Yields a dict that is complete when the context ends. `cache["output"][hook_name]` and, with
        `save_input`, `cache["input"][hook_name]` are CPU tensors (prompts, steps, tokens, d) of
        `dtype` (default: the model's own), with `rows="both"` also `cache["output_uncond"]`.
        `cache["timesteps"][hook_name]` (steps,) float64, `cache["grid"][hook_name]` a tuple whose
        product is `tokens`, `cache["sigmas"]` as `timesteps`, where known. With `stream="text"`
        tokens are those of the text, padded with zeros, and `cache["lengths"][hook_name]`
        (prompts,) says how many there are, `cache["lengths_uncond"]` for the unconditional rows.

        choose(step, tokens) -> (prompts, n) int64, or None for all: the image tokens of each prompt
        that are kept at a step, for all modules with so many; `cache["tokens"][hook_name]`
        (prompts, steps, n) says which.

        The prompts of what the body samples can't be changed to see which rows depend on them, as
        `run_with_cache` does: the guidance of the steps must tell, or else `order`, such as
        ("uncond", "cond") for the passes of each step. A scale below 0 needs the order: by its
        weights the two passes are exchanged.

        Raises UsageError where a named module does not run exactly once a forward (one found by a
        glob is left out), or not in every step, where what it takes or returns has no batch axis or
        no such tokens, where unconditional rows are asked for and there are none, and where nothing
        tells which rows are conditional.
        """
        cache = {}
        with self._record(
            positions_to_cache, n_prompts, num_images_per_prompt, CacheOptions(**options)
        ) as result:
            yield cache
        cache |= result()

    @contextmanager
    def _record(self, positions, n_prompts, num_images_per_prompt, options, finder=None):
        """Yields a function for the cache, to be called after the `with`."""
        if n_prompts is not None and not (isinstance(n_prompts, int) and n_prompts > 0):
            raise UsageError(f"n_prompts: expected how many there are, got {n_prompts!r}")
        targets, explicit = self._targets(positions)
        recorder = Recorder(targets, self.denoisers, self._known, options, finder)
        with ExitStack() as stack:
            on_forward, on_step, roles = recorder.on_forward, recorder.on_step, recorder.finder
            watching = self.watch(
                n_prompts, num_images_per_prompt, on_forward, on_step, roles=roles
            )
            recorder.listen(stack, stack.enter_context(watching))
            yield partial(recorder.result, explicit)

    def first_step(self, positions, prompt=None, **kwargs):
        """The cache of one step, which is thrown away with every random state put back, and in
        `cache["num_steps"]` how many steps the whole sampling has. Where denoisers take turns it
        goes on until each of those named has run.
        """
        targets, explicit = self._targets(positions)
        options, kwargs = CacheOptions.take_from(kwargs)
        finder = self._ask(positions, prompt, kwargs, options.order)
        recorder = Recorder(targets, self.denoisers, self._known, options, finder)
        denoisers = {denoiser for denoiser, _ in targets.values()}
        sampling = self._dry_run(
            denoisers,
            prompt,
            kwargs,
            recorder.on_forward,
            recorder.on_step,
            recorder.listen,
            finder,
        )
        return recorder.result(explicit) | {"num_steps": sampling.num_steps}

    def first_sample(self, prompt=None, **kwargs):
        """What the first step of the scheduler gets as its sample: (R, ...), the noise that a
        sampling begins with."""
        samples = []
        self._dry_run(set(), prompt, kwargs, on_step=lambda step: samples.append(step.sample))
        return samples[0]

    def layouts(self, positions="*", prompt=None, *, stream="image", **kwargs):
        """Where the tokens are in what modules return, from one step that is thrown away.

        Returns ({hook_name: Layout | NotHookable}, number of steps of the whole sampling).
        """
        targets, _ = self._targets(positions)
        finder = self._ask(positions, prompt, kwargs)
        places = {("output", name, stream): target for name, target in targets.items()}
        layouts = {}

        def on_forward(forward, module):
            with processors_put_back([module]):
                find_layouts(forward, module, places, self._known)
            for (_, name, _), layout in forward.layouts.items():
                layouts.setdefault(name, layout)

        denoisers = {denoiser for denoiser, _ in targets.values()}
        sampling = self._dry_run(
            denoisers, prompt, kwargs, on_forward, finder=finder, must_tell=False
        )
        return {
            name: layouts.get(name, NEVER_RAN) for name in self.modules() if name in targets
        }, sampling.num_steps

    def _ask(self, positions, prompt, kwargs, order=None):
        """A `RoleFinder` for the sampling that follows.

        Once for all samplings with such options, one step is run with other prompts and thrown
        away: the rows that it changes are conditional, and where a denoiser gets more than the
        sample, such as a picture to edit, it shows which part it is.
        """
        self._targets(positions)  # before anything is run for nothing
        key = outline(kwargs | {"prompt": prompt}), order and tuple(order)
        memory = self._memories.setdefault(key, Memory())
        passes = None if memory.asked else self._run_with_other_prompts(prompt, kwargs)
        memory.asked |= passes is None
        return RoleFinder(order, passes, memory)

    def _run_with_other_prompts(self, prompt, kwargs):
        """The first step's forwards as `guidance.Pass`; None where there are no prompts to change,
        or others are refused."""
        changed = other_prompts(prompt, kwargs)
        other, options = changed or (prompt, kwargs)
        options = {
            name: value for name, value in options.items() if not name.startswith("callback")
        }
        if options.get("num_inference_steps") == 1:
            options["num_inference_steps"] = (
                2  # the second shows what of the denoiser's input is sampled
            )
        passes, mixed = [], {}

        def on_forward(forward, module):
            if forward.denoiser in mixed:
                note_sampled(self._known, forward, mixed[forward.denoiser])
                raise DryRunOver

        def on_step(step):
            if passes:
                raise DryRunOver
            passes.extend(Pass(f.denoiser, f.rows, f.conditioning, f.output) for f in step.forwards)
            mixed.update(
                {
                    f.denoiser: f.sample
                    for f in step.forwards
                    if has_more_than_sample(f, step.sample)
                }
            )
            if not mixed:
                raise DryRunOver

        try:
            self._dry_run({None}, other, options, on_forward, on_step, must_repeat=False)
        except Exception:  # noqa: BLE001  it may know no such prompt; anything else that is wrong will show again
            return None
        return passes if changed else None

    def _dry_run(
        self,
        denoisers,
        prompt,
        kwargs,
        on_forward=None,
        on_step=None,
        listen=None,
        finder=None,
        must_tell=True,
        must_repeat=True,
    ):
        """Sample until each of `denoisers` has run in a step, if it `must_tell` one whose rows are
        told; then put all back.

        If it `must_repeat`, a scheduler whose random numbers no seed reaches is refused, looked at
        once for such options.

        The user's hooks in the denoisers do not see it, unless a denoiser can't run without them,
        and attention processors get their state back, see `diffusion/unnoticed.py`.

        on_step gets the first steps of each denoiser only. Returns the `Sampling` that watched: `P`
        the prompts, `R` the rows of each chunk, `num_steps` the length of the whole sampling;
        `finder` knows the roles of rows in these steps.
        """
        ran = set()
        repeatable = (
            self._repeatable.setdefault(outline(kwargs | {"prompt": prompt}), [])
            if must_repeat
            else None
        )

        def stop_when_all_ran(step):
            told = getattr(
                self.pipe, "_num_timesteps", None
            )  # by a pipeline that ends before its scheduler's list does
            if isinstance(told, int) and sampling.num_steps is not None:
                sampling.num_steps = min(told, sampling.num_steps)
            if on_step is not None and sampling.called - ran:
                on_step(step)
            if finder is None or not must_tell or not finder.undecided:
                ran.update(sampling.called)
            if denoisers <= ran:
                raise DryRunOver

        def sample():
            nonlocal sampling
            with ExitStack() as stack:
                stack.enter_context(processors_put_back(self.denoisers.values()))
                stack.enter_context(undisturbed(self.pipe, self.schedulers, self.denoisers, kwargs))
                labels = dict(roles=finder, rehearsal=True, repeatable=repeatable)
                watching = self.watch(
                    *count_prompts(prompt, kwargs), on_forward, stop_when_all_ran, **labels
                )
                sampling = stack.enter_context(watching)
                if listen is not None:
                    listen(stack, sampling)
                try:
                    self(prompt, **kwargs)
                except DryRunOver:
                    pass
                except (
                    ValueError
                ) as error:  # what a pipeline says of its arguments is the user's to mend
                    raise UsageError(f"{error}") from error
                sampling.tell_others()

        sampling = None
        try:
            with without_hooks(self.denoisers.values()):
                sample()
        except Exception:
            if sampling is None or sampling.called:
                raise
            sample()  # a denoiser may need a hook, such as one that fills in an argument
        if finder is not None and must_tell:
            finder.check_decided()
        if not sampling.called:
            raise UsageError(
                "the denoiser ran, or not even that, but its scheduler never made a step"
            )
        return sampling

    def run_with_hooks(self, position_hook_dict, prompt=None, *, order=None, **kwargs):
        """Generate with edits: {hook_name: fn or [fn]}, where fn is an `Edit`, or a function as in
        PyTorch.

        `fn(module, input, output) -> new output or None` sees the whole batch, conditional and
        unconditional rows alike; `input` is the tuple of positional arguments, or of the keyword
        ones where the module gets only those. An `Edit` needs to know which rows are conditional
        before the scheduler is called: one step is run first, unedited, and thrown away, and the
        plan found there is checked against every step. Hooks are removed afterwards, also after an
        exception. order: of the passes in a step, such as ("uncond", "cond"), where neither the
        prompts nor the guidance tell it.

        Raises UsageError if a named module never ran, or no edit of it took place, if unconditional
        rows are to be edited and there are none, and if a step does not fit the plan.
        """
        hooks = {}
        for position, functions in position_hook_dict.items():
            for name in self.hook_names(position):
                hooks.setdefault(name, []).extend(
                    functions if isinstance(functions, (list, tuple)) else [functions]
                )
        targets, _ = self._targets(list(hooks))
        explicit = {
            name
            for name in hooks
            if any(p in (name, f"{targets[name][0]}.{name}") for p in position_hook_dict)
        }
        edits = [
            (name, function)
            for name in hooks
            for function in hooks[name]
            if isinstance(function, Edit)
        ]
        places = {
            (side, name, edit.stream): targets[name] for name, edit in edits for side in edit.sides
        }
        (P, n), plan, finder = count_prompts(prompt, kwargs), None, None
        if edits:
            check_order(order)
            finder = self._ask(list(hooks), prompt, kwargs, order)
            P, n, plan = self._plan({edit.rows for _, edit in edits}, prompt, kwargs, finder)
            finder = (
                None if plan is None else RoleFinder(order, memory=finder.memory, known=dict(plan))
            )

        runs = RunWatch({name: targets[name] for name, _ in edits}, self.denoisers, self._known)

        def check_runs(step):
            for name, edit in edits:
                for forward in step.forwards:
                    is_met = forward.denoiser == targets[name][0] and edit.is_for(
                        step.index, forward.roles
                    )
                    if is_met and (reason := runs.check(name, forward, f"step {step.index}")):
                        raise UsageError(f"{name}: {reason}")

        def on_forward(forward, module):
            with processors_put_back([module]):
                find_layouts(forward, module, places, self._known)

        idle = dict.fromkeys(targets, "never ran")  # until it has been edited
        with ExitStack() as stack:
            if edits:
                sampling = stack.enter_context(
                    self.watch(P, n, on_forward, check_runs, plan=plan, roles=finder)
                )
                runs.listen(stack, sampling)
            for name, (_, module) in targets.items():
                for function in hooks[name]:
                    if isinstance(function, Edit):
                        function.listen(stack, module, name, sampling, idle, name in explicit)
                    else:
                        stack.callback(
                            module.register_forward_hook(
                                raw(function, name, idle), with_kwargs=True
                            ).remove
                        )
            output = self(prompt, **kwargs)
        if why := [
            f"{name}: {reason}"
            for name, reason in idle.items()
            if reason and (name in explicit or all(idle.values()))
        ]:
            raise UsageError("nothing was edited at " + "; ".join(why))
        return output

    def _plan(self, wanted, prompt, kwargs, finder):
        """Prompts, images per prompt and the roles of the rows that a generation will have, None if
        edits need no roles."""
        needs_roles = wanted != {"all"}
        first = self._dry_run(set(), prompt, kwargs, finder=finder, must_tell=needs_roles)
        roles = {
            role
            for of_step in finder.known.values()
            for of_forward in of_step
            for role in of_forward
        }
        if missing := wanted - roles - {"all"}:
            raise UsageError(
                f"there are no {missing.pop()}itional rows to edit in this generation; is guidance off?"
            )
        return first.P, first.R // first.P, finder.known if needs_roles else None

    def watch(self, P=1, n=1, on_forward=None, on_step=None, **options):
        """Context in which a sampling of P prompts x n images is followed; options: further fields
        of `trace.Sampling`, which it yields.
        """
        self._check_not_replaced()
        return Sampling(
            self.denoisers, self.schedulers, P, n, on_forward, on_step, **options
        ).watch()


def raw(function, name, idle):
    """A user's function (module, input, output) as a forward hook that notes in `idle` that it
    ran."""

    def hook(module, args, kwargs, output):
        idle[name] = None
        return function(module, args or tuple(kwargs.values()), output)

    return hook


def find_model(model_name):
    """A folder here, one beside this file (so that the toy is found from anywhere), or a hub id;
    UsageError for neither."""
    for folder in (Path(model_name), Path(__file__).parent / model_name):
        if folder.is_dir():
            return str(folder)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model_name)):
        raise UsageError(f"no folder {str(model_name)!r} here, and a hub id looks like owner/name")
    return str(model_name)


def model_of(meta, model_name=None, device=None, dtype=None):
    """The model that made a file's activations, hooked, and the pipeline's options at that time:
    (model, options).

    meta: the description beside the file. model_name: another model, such as a copy of it in
    another place. What has an option of its own in every script, the kind of output and the number
    of images per prompt, is left out.
    """
    folder = meta.get(
        "model_folder"
    )  # which `read_description` found from the activations, whatever the current folder
    own = folder if folder is not None and Path(folder).is_dir() else meta["model"]
    model = HookedDiffusionModel.from_pretrained(
        model_name or own, dtype, device, variant=meta.get("variant"), revision=meta.get("revision")
    )
    model.pipe.set_progress_bar_config(disable=True)
    options = {}
    for name, value in meta["pipeline_kwargs"].items():
        if name != "output_type" and not per_prompt(name):
            options[name] = value
    return model, options
