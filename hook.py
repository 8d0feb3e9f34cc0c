"""Read and edit what any diffusion model computes while it generates.

    model = HookedDiffusionModel.from_pretrained("toy")         # or .from_pipeline(pipe)
    model.hook_names("up_blocks.*.attentions.*")                # which modules can be hooked

    # read: (prompts, steps, tokens, d), of the conditional rows
    output, cache = model.run_with_cache("mid_block", ["a red star", "a blue ring"])
    cache["output"]["mid_block"]

    # edit: a function of the tokens (prompts, tokens, d) of the conditional rows
    output = model.run_with_hooks({"mid_block": Edit(lambda x: x / 2)}, "a red star")

`HookedDiffusionModel` is the class for this, and `Edit` says which tokens to change. The user's own
pipeline runs as it is, whatever its family; a denoiser of one's own needs no pipeline. `HookPoint`
names what was recorded, and `Generation` says what is generated: prompts, seeds and options.

How it works, in diffusion/: `loading.py` loads models, `trace.py` watches the denoiser and its
scheduler, `guidance.py` tells which rows are conditional, `locate.py` finds where the image's
tokens are, `recorder.py` keeps them, `edit.py` changes them, and `dry_step.py` finds out beforehand
what an edit has to know.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.dry_step import DryStep, ask_which_rows
from diffusion.edit import Edit, Editor
from diffusion.generate import Generation
from diffusion.guidance import Memory, Pattern, RoleFinder, Roles, check_order
from diffusion.hook_names import (
    block_groups,
    check_hookable,
    find_modules,
    is_pattern,
    match_names,
)
from diffusion.loading import (
    find_model,
    fuse_lora,
    is_model_file,
    load_pipeline,
    loras_of,
    move,
    offload,
    parse_lora,
    recorded_model,
    run_model_file,
    say_changed_files,
)
from diffusion.locate import NEVER_RAN, find_layouts, not_stepped
from diffusion.recorder import CacheOptions, Recorder
from diffusion.sampling_loop import Loop
from diffusion.signatures import (
    Prompt,
    count_prompts,
    image_arguments,
    per_prompt,
    prompt_arguments,
    sample_name,
    tensors,
    time_parameter,
    unwrap,
)
from diffusion.text_padding import RealTokens, find_real_tokens
from diffusion.text_words import TextPart, find_parts
from diffusion.token_layout import Layout, NotHookable
from diffusion.trace import Forward, Sampling, Step
from diffusion.unnoticed import processors_put_back
from errors import UsageError
from store.hook_point import HookPoint
from store.identity import floating_dtype

__all__ = [
    "Edit",
    "Generation",
    "HookPoint",
    "HookedDiffusionModel",
    "Layout",
    "NotHookable",
    "find_model",
    "model_of",
    "per_prompt",
    "recorded_model",
    "tensors",
    "unwrap",
]

# Arguments of pipelines for which this project has options of its own
OUR_ARGUMENTS = ("self", "prompt", "negative_prompt", "generator", "output_type")

HookFunction = Edit | Callable[[nn.Module, tuple, Any], Any]
"""An `Edit`, or a function as in PyTorch: fn(module, input, output) -> new output or None."""


class HookedDiffusionModel:
    """A diffusion model whose modules can be read and edited by name while it generates.

    Make one with `from_pretrained`, with `from_pipeline`, or from a denoiser of your own:

    model: `forward(sample, timestep, ...)` predicts for a sample whose first axis is the batch.
    scheduler: anything with `step(model_output, timestep, sample)`, and with `scale_model_input`
    if the denoiser needs it. The step returns the next sample: a tensor, a tuple that begins with
    it, or an object with `prev_sample`.
    encode_prompt: encode_prompt(prompts) -> cond, or the pair (cond, uncond), with a row for each
    prompt. Each is a tensor, or a tuple or dict of several arguments of `forward`. It also gets
    those of device, num_images_per_prompt, do_classifier_free_guidance and negative_prompt that it
    takes. If not given, prompts are only counted.
    get_timesteps: get_timesteps(num_inference_steps) -> timesteps; it may take a device, too. If
    not given, the scheduler's `set_timesteps` is called.
    vae: `decode(sample)` returns images in [-1, 1]: a tensor, a tuple that begins with them, or an
    object with `sample`. If not given, the final sample is the image.
    sample_shape: the shape of one sample without the batch axis. If not given, it is read from
    `model.config`.

    Raises UsageError where the scheduler has no `step`, and where the denoiser's `forward` does not
    say what it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        encode_prompt: Callable | None = None,
        get_timesteps: Callable | None = None,
        vae: Any = None,
        *,
        sample_shape: tuple[int, ...] | None = None,
    ):
        loop = Loop(model, scheduler, encode_prompt, get_timesteps, vae, sample_shape)
        self._hook(loop, {"model": model}, {"scheduler": scheduler})

    @classmethod
    def from_pipeline(cls, pipe: Any) -> "HookedDiffusionModel":
        """Return the hooked model of a diffusers pipeline.

        Its denoisers are the components whose `forward` takes a time and that do not decode. One
        whose output does not reach the scheduler, such as a network that only conditions another,
        is left out when it runs. Raises UsageError where there is no denoiser or no scheduler.
        """
        networks = {}
        denoisers = {}
        schedulers = {}
        for name, component in pipe.components.items():
            if has_step(component):
                schedulers[name] = component
            if isinstance(component, nn.Module):
                networks[name] = component
                if time_parameter(component) and not hasattr(unwrap(component), "decode"):
                    denoisers[name] = component
        if not denoisers:
            raise UsageError(
                f"{type(pipe).__name__} has no component whose forward takes a timestep: "
                f"{sorted(networks)}"
            )
        hooked = cls.__new__(cls)
        hooked._hook(pipe, denoisers, schedulers)
        return hooked

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        cpu_offload: bool = False,
        lora: Sequence[str] = (),
        **kwargs,
    ) -> "HookedDiffusionModel":
        """Load a model, and hook it.

        model_name: a diffusers folder or hub id; a single .safetensors file; or a Python file with
        a function that makes the model, such as "my_model.py:build" (see `from_made`). The file is
        run. A function that takes `dtype` or `device` puts the model there itself; what another
        one makes is moved to `device`, and stays in its own dtype.

        dtype: of the weights; None is float32. cpu_offload: keep only the component that is running
        on `device`. lora: files or folders of LoRAs, such as "style.safetensors:0.8", which are
        added to the weights. kwargs that are not None go to `DiffusionPipeline.from_pretrained`.

        Raises UsageError for a name that is no path and can't be a hub id, for weights that are not
        there, and for all else that can't be loaded.
        """
        dtype = dtype or torch.float32
        loras = [parse_lora(text) for text in lora]
        loaded_from = {}
        if is_model_file(model_name):
            own = run_model_file(model_name, dtype, torch.device(device or "cpu"))
            model = cls.from_made(own.made, model_name)
            loaded_from["model_files"] = own.files
            if model.dtype != dtype and "dtype" not in own.taken:
                print(
                    f"note: {model_name} runs in {model.dtype}, not in {dtype}: its function takes "
                    "no dtype"
                )
            dtype = model.dtype
            if "device" in own.taken:
                device = None
        else:
            options = {name: value for name, value in kwargs.items() if value is not None}
            model = cls.from_pipeline(load_pipeline(model_name, dtype, **options))
            if options.get("trust_remote_code"):
                loaded_from["trust_remote_code"] = True
        for adapter in loras:
            fuse_lora(model.pipe, adapter)
        if loras:
            loaded_from["lora"] = [adapter.as_dict() for adapter in loras]

        if cpu_offload:
            offload(model.pipe, device)
        elif device is not None:
            move(model.pipe, device)
        model.dtype = dtype
        model.loaded_from = loaded_from
        return model

    @classmethod
    def from_made(cls, made: Any, name: str = "the function") -> "HookedDiffusionModel":
        """Return the hooked model of what a model file's function made.

        made: a HookedDiffusionModel; a dict of its arguments, such as {"model": ..., "scheduler":
        ...}; or an object that is called like a pipeline and has a dict `components`. Its networks
        are switched to evaluation. Raises UsageError for anything else, and for an object that
        takes no `generator`.
        """
        if isinstance(made, HookedDiffusionModel):
            model = made
        elif isinstance(made, dict):
            known = list(inspect.signature(cls).parameters)
            unknown = [key for key in made if key not in known]
            missing = [key for key in ("model", "scheduler") if key not in made]
            if unknown or missing:
                raise UsageError(
                    f"{name} returned a dict with the keys {', '.join(map(str, made)) or 'none'}; "
                    f"expected model and scheduler, and any of {', '.join(known[2:])}"
                )
            model = cls(**made)
        elif callable(made) and isinstance(getattr(made, "components", None), dict):
            model = cls.from_pipeline(made)
            parameters = inspect.signature(made).parameters.values()
            takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
            if not takes_any and "generator" not in [p.name for p in parameters]:
                raise UsageError(
                    f"{name}: {type(made).__name__} takes no argument generator, so a seed would "
                    "not decide what it makes; expected a list of torch.Generator, one per sample"
                )
        else:
            raise UsageError(
                f"{name} returned a {type(made).__name__}; expected a HookedDiffusionModel, a dict "
                "of its arguments, or an object that is called like a pipeline and has a dict "
                "`components`"
            )
        for component in model.pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval()
        return model

    def _hook(self, pipe: Any, denoisers: dict[str, nn.Module], schedulers: dict[str, Any]) -> None:
        """Set the attributes. pipe: what generates; the others are its components by name."""
        if not schedulers or not all(map(has_step, schedulers.values())):
            raise UsageError(
                "the scheduler's class has no method `step(model_output, timestep, sample)`; pass "
                "an object that has one"
            )
        for denoiser in denoisers.values():
            sample_name(denoiser)  # raises UsageError where it can't be told

        self.pipe = pipe
        self.dtype = floating_dtype(next(iter(denoisers.values())))
        # What a description says of the model beside its name: Python files, LoRAs
        self.loaded_from: dict[str, Any] = {}
        self.denoisers = denoisers
        self.schedulers = list(schedulers.values())
        # {attribute of the pipeline: component}, to see whether one is replaced later
        self._hooked_components: dict[str, Any] = denoisers | schedulers

        # What one generation finds out and the next ones use. The keys of the last two are outlines
        # of a generation's options, see `signatures.outline`
        self.known_layouts: dict = {}  # where tokens are, see `locate.find_layouts`
        self.role_memories: dict[tuple, Memory] = {}  # which rows are conditional
        self.repeatable: dict[tuple, list] = {}  # schedulers that were seen to repeat themselves

    def hide_progress_bar(self) -> None:
        """Let the pipeline show no progress bar, if it has one."""
        if hasattr(self.pipe, "set_progress_bar_config"):
            self.pipe.set_progress_bar_config(disable=True)

    # ------------------------------------------------------------------------------ names

    def hook_names(self, pattern: str = "*") -> list[str]:
        """Return the names of the modules that match a glob.

        `*` stays within one part of the dotted name and `**` does not. A pattern without a dot is
        matched against the last part of a name, at any depth. A name without a wildcard is itself.

        >>> model.hook_names("up_blocks.*.attentions.0")
        ['up_blocks.1.attentions.0', 'up_blocks.2.attentions.0']

        Raises UsageError, with the nearest names, if none matches.
        """
        return match_names(pattern, self.modules())

    def modules(self) -> dict[str, tuple[str, nn.Module]]:
        """Return {hook_name: (denoiser's name, module)} of every module that can run.

        Where several denoisers have a module of one name, the denoiser's name comes before it.
        """
        return find_modules(self.denoisers)

    # ------------------------------------------------------------------------------ read

    def run_with_cache(
        self,
        positions_to_cache: str | list[str],
        prompt: Prompt = None,
        *,
        later: bool = False,
        **kwargs,
    ) -> tuple[Any, dict | Callable[[], dict]]:
        """Generate, and keep what the named modules computed: (what the pipeline returned, cache).

        positions_to_cache: names or globs, see `hook_names`. kwargs: the options of `cache`, where
        the cache is described too, and arguments of the pipeline.

        With `later` the cache is a function instead. It waits until the device has made its copies
        and returns the cache, on any thread; meanwhile the next batch can be generated.
        """
        options, kwargs = CacheOptions.take_from(kwargs)
        targets, explicit = self._targets(positions_to_cache)
        finder = ask_which_rows(self, prompt, kwargs, options.order)
        real = self._real_tokens(options, prompt, kwargs, finder)
        recorder = Recorder(targets, self.denoisers, self.known_layouts, options, finder, real)
        num_prompts, num_images = count_prompts(prompt, kwargs)
        with self._recording(recorder, num_prompts, num_images):
            output = self(prompt, **kwargs)
        if later:
            return output, partial(recorder.result, explicit)
        return output, recorder.result(explicit)

    @contextmanager
    def cache(
        self,
        positions_to_cache: str | list[str],
        n_prompts: int | None,
        num_images_per_prompt: int = 1,
        **options,
    ) -> Iterator[dict]:
        """Keep what the named modules compute while the body of the `with` samples.

        The body samples `n_prompts` prompts in any way, for instance in a loop of your own. If
        `n_prompts` is None, the rows of the scheduler's sample are counted.

        options: save_input=False, save_output=True, rows="cond", stream="image",
        keep_padding=False, cache_every_n_timesteps=1, dtype=None, choose=None, order=None;
        `recorder.CacheOptions` says what they mean. Padding of text is always kept: to tell it, the
        pipeline has to run before, as `run_with_cache` lets it.

        Yields a dict that is complete when the context ends. Its tensors are on the CPU:

            cache["output"][hook_name]       (prompts, steps, tokens, d), of `dtype`
            cache["input"][hook_name]        likewise, with save_input
            cache["output_uncond"][hook_name], cache["input_uncond"][hook_name]
                                             the unconditional rows, with rows="both"
            cache["timesteps"][hook_name]    (steps,) float64
            cache["sigmas"][hook_name]       (steps,) float64, where they are known
            cache["grid"][hook_name]         a tuple whose product is `tokens`, such as (16, 16)
            cache["lengths"][hook_name]      (prompts,), with stream="text": how many of the tokens
                                             are text; the rest is zero. Also "lengths_uncond".
            cache["padding"][hook_name]      with stream="text": "" if padding is left out, or else
                                             why it is among the tokens. Also "padding_uncond".
            cache["num_padding"][hook_name]  (prompts,): how many tokens of padding are left out.
            cache["tokens"][hook_name]       (prompts, steps, n), with choose: which tokens are kept

        choose(step, tokens) -> (prompts, n) int64, or None for all: which image tokens of each
        prompt are kept in a step, for all modules with so many tokens.

        The prompts of what the body samples can't be changed to see which rows depend on them, as
        `run_with_cache` does. So the guidance of the steps must tell, or else `order`, such as
        ("uncond", "cond") for the passes of each step. A scale below 0 needs the order, since by
        its weights the two passes are exchanged.

        The cache holds what a module itself computed, before the edits that `run_with_hooks` makes
        to it in the body: hooks run in the order in which they were registered. Later modules
        compute with what was edited, and are recorded so. To read the edited tokens of a module,
        cache the input of the next one.

        Raises UsageError
        - where a named module does not run exactly once per forward, or not in every step (one that
          a glob found is left out);
        - where what it takes or returns has no batch axis or no such tokens;
        - where unconditional rows are asked for and there are none;
        - where nothing tells which rows are conditional.
        """
        targets, explicit = self._targets(positions_to_cache)
        recorder = Recorder(targets, self.denoisers, self.known_layouts, CacheOptions(**options))
        cache = {}
        with self._recording(recorder, n_prompts, num_images_per_prompt):
            yield cache
        cache.update(recorder.result(explicit))

    def _real_tokens(
        self, options: CacheOptions, prompt: Prompt, kwargs: dict, finder: RoleFinder
    ) -> RealTokens | None:
        """Return which text tokens of a generation are no padding; None if all are to be kept."""
        if options.stream != "text" or options.keep_padding:
            return None
        roles = {"cond", "uncond"} if options.rows == "both" else {options.rows}
        plan = self._plan(prompt, kwargs, finder)
        return find_real_tokens(self, prompt, kwargs, plan, roles)

    def _plan(self, prompt: Prompt, kwargs: dict, finder: RoleFinder) -> dict[Pattern, Roles]:
        """Return which rows are conditional in each kind of step.

        If no generation with these options has told it, a dry step does.
        """
        plan = {pattern: told.roles for pattern, told in finder.memory.sure.items()}
        if plan:
            return plan
        labels = RoleFinder(finder.order, finder.other_forwards, finder.memory)
        DryStep(self, prompt, kwargs, finder=labels, must_tell=False).run()
        return labels.known

    def text_parts(self, prompts: list[str], **kwargs) -> list[TextPart] | None:
        """Return from which tokenizers the real tokens of the text stream come, see text_words.py.

        kwargs: arguments of the pipeline. None if it can't be told.
        """
        finder = ask_which_rows(self, prompts, kwargs)
        return find_parts(self, prompts, kwargs, self._plan(prompts, kwargs, finder))

    @contextmanager
    def _recording(
        self, recorder: Recorder, num_prompts: int | None, num_images: int
    ) -> Iterator[None]:
        """Give a recorder all forwards and steps while the context lasts.

        Raises UsageError if `num_prompts` is neither None nor a positive integer.
        """
        if num_prompts is not None and not (isinstance(num_prompts, int) and num_prompts > 0):
            raise UsageError(f"n_prompts: expected the number of prompts, got {num_prompts!r}")
        with ExitStack() as stack:
            watching = self.watch(
                num_prompts,
                num_images,
                recorder.on_forward,
                recorder.on_step,
                roles=recorder.finder,
            )
            sampling = stack.enter_context(watching)
            recorder.listen(stack, sampling)
            yield

    # ------------------------------------------------------------------------------ edit

    def run_with_hooks(
        self,
        position_hook_dict: dict[str, HookFunction | list[HookFunction]],
        prompt: Prompt = None,
        *,
        order: tuple[str, ...] | None = None,
        **kwargs,
    ) -> Any:
        """Generate with edits, and return what the pipeline returns.

        position_hook_dict: {name or glob: function or a list of them}. A function is an `Edit`, or
        one as in PyTorch, `fn(module, input, output) -> new output or None`. That one sees the
        whole batch, conditional and unconditional rows alike; its `input` is the tuple of
        positional arguments, or of the keyword ones where the module gets only those. The hooks are
        removed afterwards, also after an exception.

        An `Edit` needs to know which rows are conditional before the scheduler is called. So one
        step is run first, unedited, and thrown away. The order of the passes in it is the plan for
        this generation, and every step is checked against it.

        order: the passes in a step, such as ("uncond", "cond"), where neither the prompts nor the
        guidance tell it. kwargs: arguments of the pipeline.

        Raises UsageError if a named module never ran or no edit of it took place, if unconditional
        rows are to be edited and there are none, and if a step does not fit the plan.
        """
        functions = self._functions(position_hook_dict)
        targets, explicit = self._targets(list(position_hook_dict))
        editor = Editor(functions, targets, explicit, self.denoisers, self.known_layouts)
        with ExitStack() as stack:
            sampling = None
            if editor.edits:
                check_order(order)
                watching = self._watch_edits(editor, prompt, kwargs, order)
                sampling = stack.enter_context(watching)
            editor.listen(stack, sampling)
            output = self(prompt, **kwargs)
        editor.check_edited()
        return output

    def _functions(
        self, position_hook_dict: dict[str, HookFunction | list[HookFunction]]
    ) -> dict[str, list[HookFunction]]:
        """Return {hook_name: its functions}, where the keys of the argument may be globs."""
        functions_of = {}
        for position, functions in position_hook_dict.items():
            if not isinstance(functions, (list, tuple)):
                functions = [functions]
            for name in self.hook_names(position):
                functions_of.setdefault(name, []).extend(functions)
        return functions_of

    def _watch_edits(
        self, editor: Editor, prompt: Prompt, kwargs: dict, order: tuple[str, ...] | None
    ) -> AbstractContextManager[Sampling]:
        """Return a context in which the rows of each forward are labelled while it runs.

        The labels (cond, uncond, other) come from a dry step; there are none if every edit is for
        all rows. Raises UsageError if unconditional rows are to be edited and there are none.
        """
        needs_roles = editor.rows != {"all"} or editor.leaves_padding
        finder = ask_which_rows(self, prompt, kwargs, order)
        dry_step = DryStep(self, prompt, kwargs, finder=finder, must_tell=needs_roles)
        first = dry_step.run()

        roles_met = set()
        for roles_of_step in finder.known.values():
            for roles_of_forward in roles_of_step:
                roles_met.update(roles_of_forward)
        missing = editor.rows - roles_met - {"all"}
        if missing:
            raise UsageError(
                f"there are no {missing.pop()}itional rows to edit in this generation; is guidance "
                "off?"
            )

        plan = None
        finder_of_run = None
        if needs_roles:
            plan = finder.known
            finder_of_run = RoleFinder(order, memory=finder.memory, known=dict(plan))
        if editor.leaves_padding:
            roles = roles_met & {"cond", "uncond"}
            if "all" not in editor.rows:
                roles &= editor.rows
            editor.real = find_real_tokens(self, prompt, kwargs, plan, roles)
        return self.watch(
            first.P,
            first.R // first.P,
            editor.on_forward,
            editor.on_step,
            plan=plan,
            roles=finder_of_run,
        )

    # ------------------------------------------------------------------------------ generate

    def __call__(self, prompt: Prompt = None, **kwargs) -> Any:
        """Generate, and return what the pipeline returns.

        kwargs go to the pipeline, or to `sampling_loop.Loop` for a denoiser of one's own. A
        pipeline that takes no prompt gets class numbers, for prompts that are numbers written as
        text, or only the number of prompts as its batch size. Raises UsageError where the pipeline
        can't do without a size.
        """
        arguments = prompt_arguments(self.pipe, prompt) | kwargs
        for name, value in arguments.items():
            if isinstance(value, list):
                arguments[name] = list(value)  # some pipelines write into lists
        with torch.no_grad():
            try:
                return self.pipe(**arguments)
            except TypeError as error:
                self._check_sample_size(arguments, error)
                raise

    def _check_sample_size(self, arguments: dict, error: TypeError) -> None:
        """Raise UsageError if a pipeline failed because it could not compute its default height and
        width.

        Some pipelines multiply `config.sample_size` of their denoiser, which may be (16, 64).
        """
        if arguments.get("height") is not None or "height" not in self.accepts(height=None):
            return
        for name, denoiser in self.denoisers.items():
            size = getattr(getattr(denoiser, "config", None), "sample_size", None)
            is_pair = isinstance(size, (tuple, list))
            blames_pair = "tuple" in str(error) or "list" in str(error)  # as in "'tuple' and 'int'"
            if is_pair and blames_pair:
                raise UsageError(
                    f"{type(self.pipe).__name__} can't use the sample_size {tuple(size)} of its "
                    f"{name} ({error}): give height and width"
                ) from None

    def arguments(
        self,
        num_images_per_prompt: int = 1,
        output_type: str | None = None,
        extra: dict | None = None,
        **options,
    ) -> dict:
        """Return keyword arguments for the pipeline.

        An option that is None gets the pipeline's own default, so that all values are known.
        `output_type` is left out where the pipeline has none. `extra` is a dict of any further
        arguments.

        >>> model.arguments(output_type="pt", num_inference_steps=None, guidance_scale=3.0)
        {'num_inference_steps': 50, 'guidance_scale': 3.0, 'output_type': 'pt'}

        Raises UsageError for what the pipeline does not take, for what is given twice, for a height
        without a width, and for a text where the pipeline takes an image.
        """
        extra = extra or {}
        parameters = inspect.signature(self.pipe).parameters
        arguments = {}
        for name, value in options.items():
            if value is None and name in parameters:
                value = parameters[name].default
            if value is not None and value is not inspect.Parameter.empty:
                arguments[name] = value

        if num_images_per_prompt > 1:
            names = [name for name in parameters if per_prompt(name)]
            name = names[0] if names else "num_images_per_prompt"
            arguments[name] = num_images_per_prompt
        if output_type is not None and "output_type" in parameters:
            arguments["output_type"] = output_type
        for name in extra:
            if name in OUR_ARGUMENTS or per_prompt(name):
                raise UsageError(f"{name} is set by an option of its own")
            values = extra[name] if isinstance(extra[name], list) else [extra[name]]
            is_text = any(isinstance(value, str) for value in values)
            if is_text and name in image_arguments(self.pipe):
                raise UsageError(
                    f"{name} is an image, and {extra[name]!r} is a text: name its file with "
                    f"--inputs {name}=..."
                )
        arguments.update(extra)

        sizes = [name for name in ("height", "width") if arguments.get(name) is not None]
        if len(sizes) == 1 and "height" in parameters and "width" in parameters:
            raise UsageError(
                f"{sizes[0]} is given alone, and most pipelines take neither then; give height and "
                "width"
            )
        for name in arguments:
            if name not in parameters:
                raise UsageError(f"{type(self.pipe).__name__} takes no argument {name!r}")
        return arguments

    def accepts(self, **options) -> dict:
        """Return those of the options that the pipeline takes."""
        parameters = inspect.signature(self.pipe).parameters
        return {name: value for name, value in options.items() if name in parameters}

    def check_image_arguments(self, names: Iterable[str]) -> None:
        """Raise UsageError for a name that is no argument of the pipeline which takes an image."""
        known = image_arguments(self.pipe)
        for name in names:
            if name not in known:
                takes = f"its images are {', '.join(known)}" if known else "it takes no image"
                raise UsageError(
                    f"--inputs {name}=...: {type(self.pipe).__name__} takes no image of this name; "
                    f"{takes}"
                )

    # ------------------------------------------------------------------------------ find out

    def layouts(
        self,
        positions: str | list[str] = "*",
        prompt: Prompt = None,
        *,
        side: str = "output",
        stream: str = "image",
        **kwargs,
    ) -> tuple[dict[str, Layout | NotHookable], dict[str, list[int] | None]]:
        """Find where the tokens are in what modules return, from a step that is thrown away.

        side: "input" for the tokens in what they take. Returns ({hook_name: Layout, or NotHookable
        with the reason}, {hook_name: the steps of the sampling in which its denoiser runs; None
        where the scheduler lists none}).
        """
        targets, _ = self._targets(positions)
        found, dry_step, _ = self._find_layouts(targets, prompt, side, stream, kwargs)
        in_order = {name: found[name] for name in self.modules() if name in targets}
        steps = {name: dry_step.steps_of(targets[name][0]) for name in in_order}
        return in_order, steps

    def _find_layouts(
        self,
        targets: dict[str, tuple[str, nn.Module]],
        prompt: Prompt,
        side: str,
        stream: str,
        kwargs: dict,
    ) -> tuple[dict[str, Layout | NotHookable], DryStep, list[str]]:
        """Return ({hook_name: its layout}, the dry step that was run, the hook names in the order
        in which the modules ran)."""
        finder = ask_which_rows(self, prompt, kwargs)
        wanted = {(side, name, stream): target for name, target in targets.items()}
        found = {}
        stepped = set()  # denoisers whose output reached the scheduler
        ran = {}  # hook names; a dict keeps their order

        def on_forward(forward: Forward, module: nn.Module) -> None:
            with processors_put_back([module]):
                find_layouts(forward, module, wanted, self.known_layouts)
            for (_, name, _), layout in forward.layouts.items():
                found.setdefault(name, layout)

        def on_step(step: Step) -> None:
            stepped.update(forward.denoiser for forward in step.forwards)

        def note_run(name: str, module: nn.Module, args: tuple) -> None:
            ran.setdefault(name)

        def listen(stack: ExitStack, sampling: Sampling) -> None:
            for name, (_, module) in targets.items():
                handle = module.register_forward_pre_hook(partial(note_run, name))
                stack.callback(handle.remove)

        dry_step = DryStep(
            self,
            prompt,
            kwargs,
            denoisers=denoisers_of(targets),
            on_forward=on_forward,
            on_step=on_step,
            listen=listen,
            finder=finder,
            must_tell=False,
            count_steps=True,
        )
        sampling = dry_step.run()
        for name, (denoiser, _) in targets.items():
            if denoiser in sampling.called - stepped:
                found[name] = not_stepped(denoiser)
            found.setdefault(name, NEVER_RAN)
        return found, dry_step, list(ran)

    def blocks(
        self, prompt: Prompt = None, *, side: str = "output", stream: str = "image", **kwargs
    ) -> dict[str, dict[str, Layout]]:
        """Return the blocks of each denoiser in which tokens can be hooked, as they run.

        Blocks are known by their place in the model, see `hook_names.block_groups`, and by the
        image tokens that run through them in a step that is thrown away. side, stream: as in
        `layouts`. Returns {denoiser's name: {hook_name: Layout}}; a denoiser without such blocks is
        left out.

        >>> model.blocks("a red star")
        {'unet': {'down_blocks.1.attentions.0': Layout(...), 'mid_block.attentions.0': ...}}
        """
        self._check_not_replaced()
        for name, denoiser in self.denoisers.items():
            check_hookable(name, denoiser)
        modules = self.modules()
        layouts, _, ran = self._find_layouts(modules, prompt, "output", "image", kwargs)
        names_of = {}
        for denoiser in self.denoisers:
            for group in block_groups(modules, denoiser):
                is_hookable = [isinstance(layouts[name], Layout) for name in group]
                if any(is_hookable):
                    names_of[denoiser] = [name for name in ran if name in group]
                    break

        if (side, stream) != ("output", "image"):
            targets = {name: modules[name] for names in names_of.values() for name in names}
            layouts, _, _ = self._find_layouts(targets, prompt, side, stream, kwargs)
        blocks = {}
        for denoiser, names in names_of.items():
            hookable = {n: layouts[n] for n in names if isinstance(layouts[n], Layout)}
            if hookable:
                blocks[denoiser] = hookable
        return blocks

    def first_step(self, positions: str | list[str], prompt: Prompt = None, **kwargs) -> dict:
        """Return the cache of one step, as `cache` describes it; the step is thrown away.

        Every random state is put back. `cache["num_steps"]` is the number of steps of the whole
        sampling, and `cache["steps"]` is {hook_name: the steps in which its denoiser runs}, None
        where the scheduler does not list them. Where denoisers take turns, it goes on until each of
        those named has run. kwargs: the options of `cache`, and arguments of the pipeline.
        """
        options, kwargs = CacheOptions.take_from(kwargs)
        targets, explicit = self._targets(positions)
        finder = ask_which_rows(self, prompt, kwargs, options.order)
        real = self._real_tokens(options, prompt, kwargs, finder)
        recorder = Recorder(targets, self.denoisers, self.known_layouts, options, finder, real)
        dry_step = DryStep(
            self,
            prompt,
            kwargs,
            denoisers=denoisers_of(targets),
            on_forward=recorder.on_forward,
            on_step=recorder.on_step,
            listen=recorder.listen,
            finder=finder,
            count_steps=True,
        )
        sampling = dry_step.run()
        cache = recorder.result(explicit)
        cache["num_steps"] = sampling.num_steps
        cache["steps"] = {name: dry_step.steps_of(targets[name][0]) for name in cache["grid"]}
        return cache

    def first_sample(self, prompt: Prompt = None, **kwargs) -> Tensor:
        """Return the noise that a sampling begins with, (R, ...), for R images.

        It is what the scheduler's first step gets as its sample. The step is thrown away.
        """
        samples = []

        def on_step(step: Step) -> None:
            samples.append(step.sample)

        DryStep(self, prompt, kwargs, on_step=on_step).run()
        return samples[0]

    def watch(
        self,
        P: int | None = 1,
        n: int = 1,
        on_forward: Callable | None = None,
        on_step: Callable | None = None,
        **options,
    ) -> AbstractContextManager[Sampling]:
        """Return a context in which a sampling of P prompts with n images each is followed.

        It yields the `trace.Sampling`, whose further fields are the options.
        """
        self._check_not_replaced()
        sampling = Sampling(self.denoisers, self.schedulers, P, n, on_forward, on_step, **options)
        return sampling.watch()

    # ------------------------------------------------------------------------------ checks

    def _targets(
        self, positions: str | list[str]
    ) -> tuple[dict[str, tuple[str, nn.Module]], set[str]]:
        """Return what names and globs mean: ({hook_name: (denoiser's name, module)}, the hook_names
        that were spelt out).

        Raises UsageError for a name that does not exist, and where hooks would not run.
        """
        self._check_not_replaced()
        if isinstance(positions, str):
            positions = [positions]
        modules = self.modules()
        targets = {}
        explicit = set()
        for position in positions:
            names = match_names(position, modules)
            for name in names:
                targets[name] = modules[name]
            if not is_pattern(position):
                explicit.update(names)
        for denoiser in denoisers_of(targets):
            check_hookable(denoiser, self.denoisers[denoiser])
        return targets, explicit

    def _check_not_replaced(self) -> None:
        """Raise UsageError where the pipeline has another scheduler or denoiser than at hooking."""
        watched = [*self.denoisers.values(), *self.schedulers]
        for name, component in self._hooked_components.items():
            current = getattr(self.pipe, name, component)
            if not any(current is other for other in (component, *watched)):
                raise UsageError(
                    f"{name} of {type(self.pipe).__name__} was replaced after hooking, so it is "
                    "not the one that is watched: hook the model again after such a change"
                )


def has_step(component: Any) -> bool:
    """Return whether a component is a scheduler: its class has a method `step`."""
    return callable(getattr(type(component), "step", None))


def denoisers_of(targets: dict[str, tuple[str, nn.Module]]) -> set[str]:
    """Return the names of the denoisers in {hook_name: (denoiser's name, module)}."""
    return {denoiser for denoiser, _ in targets.values()}


def model_of(
    meta: dict,
    model_name: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    lora: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> tuple[HookedDiffusionModel, dict]:
    """Return (the model that made an activation file, hooked, and the pipeline's options then).

    meta: the description beside the file. model_name, lora: another model instead, such as a copy
    in another folder. The kind of output and the number of images per prompt are left out of the
    options, since every script has its own options for them.

    Prints one line if a Python file that makes the model has changed since. Raises UsageError if
    the model is such a file, or brings code of its own, and the caller does not name it: nothing is
    run because a description says so.
    """
    if not model_name:
        model_name = recorded_model(meta)
        lora = lora or loras_of(meta)
    elif meta.get("lora") and not lora:
        names = " ".join(f"{record['name']}:{record['scale']:g}" for record in meta["lora"])
        print(
            f"note: the activations were made with --lora {names}; {model_name} is loaded without"
        )
    model = HookedDiffusionModel.from_pretrained(
        model_name,
        dtype,
        device,
        lora=lora,
        variant=meta.get("variant"),
        revision=meta.get("revision"),
        trust_remote_code=trust_remote_code or None,
    )
    say_changed_files(meta.get("model_files"), model.loaded_from.get("model_files"))
    model.hide_progress_bar()
    options = {}
    for name, value in meta["pipeline_kwargs"].items():
        if name != "output_type" and not per_prompt(name):
            options[name] = value
    return model, options
