"""Share an SAE, or activations: write an SAE in another package's format, push folders to the
Hugging Face Hub.

    python export.py --export saelens                                          # the newest SAE in saes/
    python export.py --sae saes/mine --export saelens --out_dir exported/mine
    python export.py --sae saes/mine --to_hub me/my-sae                        # as it is; with --export, what was exported
    python export.py --sae saes --to_hub me/my-saes                            # every SAE below saes/, each in its folder
    python export.py --activations activations --to_hub me/my-activations      # what collect.py wrote, as a data set

Reads   --sae, an SAE folder (ours, sparsify's, SAELens' or dictionary_learning's) or a folder that has some below it;
        --activations, a folder of collect.py.
Writes  <out_dir>/: cfg.json, sae_weights.safetensors; store/foreign_saes.py says how exact they are.
Pushes  the files of the folder, and a README.md that says how to load them, if neither the folder nor the repository has one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli import run
from errors import UsageError
from sae import Sae, newest_sae, sae_folders
from store.disk import check_empty
from store.foreign_saes import find_weights, is_saved_saelens, save_saelens
from store.hub import push


@dataclass
class Config:
    sae: str | None = None
    """An SAE folder, or with --to_hub a folder of several (None: the newest in saes/)."""

    activations: str | None = None
    """With --to_hub: push this folder of activations instead."""

    export: Literal["saelens"] | None = None
    """Write it in another package's format."""

    out_dir: str | None = None
    """The folder for it (None: exported/<name of the SAE folder>)."""

    to_hub: str | None = None
    """Push it to this repository on the Hugging Face Hub: <user>/<name>."""

    private: bool = False
    """If that repository is new, only you can see it."""


def find_saes(path: Path) -> dict[str | None, Path]:
    """{None: path} for an SAE, else {path relative to it: SAE folder} of those below;
    FileNotFoundError if there is none."""
    try:
        find_weights(path)
    except FileNotFoundError:
        several = sae_folders(path)
        if not several:
            raise
        return several
    return {None: path}


def export_saelens(path: Path, out_dir: Path) -> None:
    """Write the SAE at `path` into the folder `out_dir`, which must be new or empty, or hold this
    very SAE or a part of it."""
    sae = Sae.load_from_disk(path)
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"--out_dir {out_dir} is a file; use another, or move it away")
    is_finished = (out_dir / "cfg.json").exists()  # which is written last
    if not is_finished:
        check_empty(out_dir, ("cfg.json", "sae_weights.safetensors"))
        save_saelens(sae.cfg, sae.state_dict(), out_dir)
    elif not is_saved_saelens(sae.cfg, sae.state_dict(), out_dir):
        raise UsageError(
            f"--out_dir {out_dir} is there already, with another SAE; use another, or move it away"
        )
    print(
        f"{out_dir}/: cfg.json, sae_weights.safetensors; SAELens reads it by SAE.load_from_disk({str(out_dir)!r})"
    )


def check_options(cfg: Config) -> None:
    """Raise UsageError for options that ask for nothing, or for two things at once."""
    if cfg.activations and (cfg.sae or cfg.export):
        raise UsageError("--activations goes with --to_hub alone, without --sae and --export")
    if cfg.activations and not cfg.to_hub:
        raise UsageError(f"--activations {cfg.activations}: expected --to_hub <user>/<name> too")
    if not (cfg.export or cfg.to_hub):
        raise UsageError("nothing to do: expected --export saelens, --to_hub <user>/<name> or both")
    if cfg.out_dir and not cfg.export:
        raise UsageError(
            f"--out_dir {cfg.out_dir}: nothing is written there without --export saelens"
        )


def main(cfg: Config) -> list[Path]:
    """Export and push what `cfg` names; the folders that were written on this disk."""
    check_options(cfg)
    private = cfg.private or None
    if cfg.activations:
        print(push(cfg.activations, cfg.to_hub, "activations", private=private))
        return []

    path = Path(cfg.sae) if cfg.sae else newest_sae()
    saes = find_saes(path)
    written = []
    if cfg.export:
        if None not in saes:
            raise UsageError(
                f"--export: {path} has several SAEs, {', '.join(saes)}; name one with --sae"
            )
        folder = find_weights(path).parent
        out_dir = Path(cfg.out_dir or Path("exported") / folder.resolve().name)
        export_saelens(path, out_dir)
        written.append(out_dir)
        saes = {None: out_dir}

    if cfg.to_hub:
        for folder in saes.values():
            Sae.load_from_disk(
                folder
            )  # raises for one that can't be loaded, before anything is pushed
        for name, folder in saes.items():
            print(push(find_weights(folder).parent, cfg.to_hub, "sae", name, private))
    return written


if __name__ == "__main__":
    run(main, Config)
