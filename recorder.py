"""What hooks on modules keep while a denoiser runs: the tokens of some rows."""

import torch

from errors import UsageError, check_choice
from hook_point import STREAMS
from probe import NEVER_RAN, SEVERAL_TIMES, find_layouts
from tokens import NotHookable

# What `rows` asks for: the role of the rows under each suffix of the cache's keys.
ROLES = {"cond": {"": "cond"}, "uncond": {"": "uncond"}, "both": {"": "cond", "_uncond": "uncond"}}


class Recorder:
    """Gathers, step by step, the wanted stream's tokens of the wanted rows from what the target modules saw.

    targets: {hook_name: (denoiser, module)}; known: layouts found so far, see tokens.py; the rest as in
    `HookedDiffusionModel.cache`.
    """

    def __init__(
        self,
        targets,
        known,
        save_input=False,
        save_output=True,
        rows="cond",
        stream="image",
        every=1,
        dtype=None,
        choose=None,
    ):
        check_choice("rows", rows, ROLES)
        check_choice("stream", stream, STREAMS)
        if not (save_input or save_output):
            raise UsageError("nothing to keep: save_input and save_output are both off")
        if every < 1:
            raise UsageError(f"cache_every_n_timesteps: expected at least 1, got {every}")
        if choose and stream != "image":
            raise UsageError("choose: of image tokens only; texts differ in length")
        self.targets, self.known, self.stream, self.every, self.dtype = targets, known, stream, every, dtype
        self.choose, self.chosen, self.copied = choose, {}, {}  # {as kept: [(prompts, n) indices]}, {GPU: its last copy's event}
        self.roles, self.sides = ROLES[rows], ["input"] * save_input + ["output"] * save_output
        self.places = {(side, name, stream): target for side in self.sides for name, target in targets.items()}
        self.kept = {}  # {(side + suffix, hook_name): [(prompts, tokens, d), one a step]}
        self.times = {}  # the same keys: [(timestep, sigma), one a step]
        self.lengths = {}  # {(suffix, hook_name): tokens of each prompt}
        self.called, self.stepped = set(), set()  # denoisers that ran, and those whose output reached the scheduler
        self.grids, self.failed = {}, {}  # {(side, hook_name): grid}, {hook_name: why}

    def listen(self, stack, sampling):
        """Register the hooks; `stack` removes them."""
        self.sampling = sampling

        def capture(name, side):
            def hook(module, args, kwargs, output=None):
                forward = sampling.current
                layout = None if forward is None else forward.layouts.get((side, name, self.stream))
                if layout is None or isinstance(layout, NotHookable):
                    return
                if (side, name) in forward.captured:
                    forward.captured[side, name] = None
                else:
                    x = layout.take(output if side == "output" else (args, kwargs), forward.rows)
                    forward.captured[side, name] = x.detach().clone()  # the model may go on in place

            return hook

        for (side, name, _), (_, module) in self.places.items():
            register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            stack.callback(register(capture(name, side), with_kwargs=True).remove)

    def on_forward(self, forward, module):
        self.called.add(forward.denoiser)
        if self.sampling.index % self.every == 0:
            find_layouts(forward, module, self.places, self.known)

    def on_step(self, step):
        if step.index % self.every:
            return
        at = (step.time(), step.sigma())
        here = {f.denoiser for f in step.forwards}
        if again := here & self.stepped if step.index == 0 else None:
            raise UsageError(f"a second sampling by {again.pop()} began inside one cache: give each its own")
        self.stepped |= here
        for name, (denoiser, _) in self.targets.items():
            forwards = [f for f in step.forwards if f.denoiser == denoiser]
            for suffix, role in self.roles.items():
                forward, chunk = next(((f, c) for f in forwards for c, r in enumerate(f.roles) if r == role), (None, 0))
                for side in self.sides if forward and name not in self.failed else ():
                    self._keep(name, side, suffix, forward, slice(chunk * step.R, (chunk + 1) * step.R), step.index)
                    self.times.setdefault((side + suffix, name), []).append(at)

    def _keep(self, name, side, suffix, forward, rows, index):
        layout = forward.layouts[side, name, self.stream]
        if isinstance(layout, NotHookable):
            self.failed[name] = layout.reason
        elif (side, name) not in forward.captured:
            self.failed[name] = NEVER_RAN.reason
        elif (x := forward.captured[side, name]) is None:
            self.failed[name] = SEVERAL_TIMES.reason
        elif self.stream == "image" and self.grids.setdefault((side, name), layout.grid) != layout.grid:
            self.failed[name] = f"has tokens on the grid {self.grids[side, name]}, then on {layout.grid}"
        else:
            self.grids[side, name] = max(self.grids.get((side, name), layout.grid), layout.grid)  # of text: the longest
            self.lengths[suffix, name] = layout.counts[rows]
            kept = self.kept.setdefault((side + suffix, name), [])
            x = x[rows]
            if self.choose and (tokens := self.choose(index, x.shape[1])) is not None:
                x = x.take_along_dim(tokens[:, :, None].to(x.device), 1)
                self.chosen.setdefault(name, {}).setdefault(side + suffix, []).append(tokens)
            kept.append(self._to_cpu(x, self.dtype or x.dtype))

    def _to_cpu(self, x, dtype):
        """A copy, since a view would keep the other chunks alive. From a GPU it is under way, into pinned memory."""
        if not x.is_cuda:
            return x.to("cpu", dtype, copy=True)
        copy = x.to(dtype).contiguous().to("cpu", non_blocking=True)
        self.copied[x.device] = torch.cuda.current_stream(x.device).record_event()
        return copy

    def result(self, explicit):
        """The cache, on any thread; raises UsageError for modules that failed, unless a glob found them among others."""
        for event in self.copied.values():
            event.synchronize()
        for name, (denoiser, _) in self.targets.items():
            times = [self.times.get((side + suffix, name)) for side in self.sides for suffix in self.roles]
            if name in self.failed:
                continue
            if denoiser not in self.stepped:
                unused = f"is part of {denoiser}, whose output does not reach the scheduler"
                self.failed[name] = unused if denoiser in self.called else NEVER_RAN.reason
            elif None in times:
                role = list(self.roles.values())[times.index(None) % len(self.roles)]
                self.failed[name] = f"has no {role}itional rows in this generation; is guidance off?"
            elif times.count(times[0]) < len(times):
                self.failed[name] = "has unconditional rows in part of the steps; ask for cond and uncond one after the other"
        for name, why in self.failed.items():
            if name in explicit or len(self.failed) == len(self.targets):
                raise UsageError(f"{name}: {why}")
        cache = {"timesteps": {}, "sigmas": {}, "grid": {}}
        for (key, name), steps in self.kept.items():
            if name not in self.failed:
                n = max(x.shape[1] for x in steps)  # of text, tokens may come and go
                steps = [torch.nn.functional.pad(x, (0, 0, 0, n - x.shape[1])) for x in steps]
                cache.setdefault(key, {})[name] = torch.stack(steps, 1)  # (prompts, steps, tokens, d)
                timesteps, sigmas = zip(*self.times[key, name])
                cache["timesteps"][name] = torch.tensor(timesteps, dtype=torch.float64)
                cache["grid"][name] = self.grids[self.sides[-1], name] if self.stream == "image" else (n,)
                if None not in sigmas:
                    cache["sigmas"][name] = torch.tensor(sigmas, dtype=torch.float64)
                if name in self.chosen:  # the same for cond and uncond
                    cache.setdefault("tokens", {})[name] = torch.stack(self.chosen[name][key], 1)
        if self.stream == "text":
            for (suffix, name), lengths in self.lengths.items():
                if name not in self.failed:
                    cache.setdefault("lengths" + suffix, {})[name] = torch.tensor(lengths)
        return cache
