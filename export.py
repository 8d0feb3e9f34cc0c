"""Share an SAE, or activations: write another package's format, push folders to the hub.

    python export.py --export saelens                          # the newest SAE in saes/
    python export.py --sae saes/mine --export saelens --out_dir exported/mine
    python export.py --sae saes/mine --to_hub me/my-sae        # as it is
    python export.py --sae saes/mine --export saelens --to_hub me/my-sae    # what was exported
    python export.py --sae saes --to_hub me/my-saes            # all SAEs in saes/, in folders
    python export.py --activations activations --to_hub me/my-activations   # as a data set

In a notebook:

    [folder] = main(Config(sae="saes/mine", export="saelens"))

Reads   --sae, an SAE folder (ours, sparsify's, SAELens' or dictionary_learning's), or a folder
        with several below it; or --activations, a folder of collect.py.
Writes  <out_dir>/: cfg.json, sae_weights.safetensors. A folder that holds something else is never
        overwritten. batchtopk SAEs become jumprelu SAEs; sampletopk SAEs and those with
        input_unit_norm can't be written (store/foreign_saes.py).
Pushes  the files of the folder, and a README.md that says how to load them, if neither the folder
        nor the repository has one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli import answer_help, run_script
from errors import UsageError


@dataclass
class Config:
    # data
    sae: str | None = None
    """Share this SAE folder; with --to_hub it may be a folder of several. If not given, the newest
    SAE in saes/ is shared."""

    activations: str | None = None
    """Push this folder of activations instead of an SAE. It needs --to_hub."""

    # output
    export: Literal["saelens"] | None = None
    """Write the SAE in the format of this package. If not given, its files stay as they are."""

    out_dir: str | None = None
    """Write the exported files into this folder. If not given, it is exported/<name of the SAE
    folder>."""

    to_hub: str | None = None
    """Push to this repository of the Hugging Face hub: <user>/<name>. If not given, nothing is
    pushed."""

    private: bool = False
    """Make a new repository private. An existing repository stays as it is."""


if __name__ == "__main__":
    answer_help(Config)  # --help and a mistyped option are answered before torch is imported

from sae import Sae, find_sae_folders, newest_sae
from store.disk import check_empty
from store.foreign_saes import find_weights, is_saved_saelens, save_saelens
from store.hub import push


def main(cfg: Config) -> list[Path]:
    """Export and push what `cfg` names; return the folders that were written on this disk.

    Raises UsageError for options that don't go together, and for an SAE that can't be loaded or
    exported; OSError for whatever the hub says.
    """
    check_options(cfg)
    if cfg.activations:
        print(push(cfg.activations, cfg.to_hub, "activations", private=cfg.private or None))
        return []

    path = Path(cfg.sae) if cfg.sae else newest_sae()
    saes = find_saes(path)
    written = []
    if cfg.export:
        if None not in saes:
            names = ", ".join(saes)
            raise UsageError(f"--export: {path} has several SAEs, {names}; name one with --sae")
        folder = find_weights(path).parent
        out_dir = Path(cfg.out_dir or Path("exported") / folder.resolve().name)
        export_saelens(path, out_dir)
        written.append(out_dir)
        saes = {None: out_dir}

    if cfg.to_hub:
        push_saes(saes, cfg.to_hub, cfg.private)
    return written


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


def find_saes(path: Path) -> dict[str | None, Path]:
    """Return {None: path} if `path` is an SAE, else {path relative to it: SAE folder} of those
    below.

    Raises FileNotFoundError if there is none.
    """
    try:
        find_weights(path)
    except FileNotFoundError:
        several = find_sae_folders(path)
        if not several:
            raise
        return several
    return {None: path}


def export_saelens(path: Path, out_dir: Path) -> None:
    """Write the SAE at `path` into the folder `out_dir` in SAELens' format.

    The folder must be new or empty, or hold this very SAE, finished or not; else UsageError.
    """
    sae = Sae.load_from_disk(path)
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"--out_dir {out_dir} is a file; use another, or move it away")
    is_finished = (out_dir / "cfg.json").exists()  # it is written last
    if not is_finished:
        check_empty(out_dir, ("cfg.json", "sae_weights.safetensors"))
        save_saelens(sae.cfg, sae.state_dict(), out_dir)
    elif not is_saved_saelens(sae.cfg, sae.state_dict(), out_dir):
        raise UsageError(
            f"--out_dir {out_dir} is there already, with another SAE; use another, or move it away"
        )
    print(
        f"{out_dir}/: cfg.json, sae_weights.safetensors; "
        f"SAELens reads it by SAE.load_from_disk({str(out_dir)!r})"
    )


def push_saes(saes: dict[str | None, Path], repo_id: str, private: bool) -> None:
    """Push SAEs, each into its folder of the repository, and print their addresses.

    saes: {folder in the repository, None for its top: SAE folder}. All are loaded before one is
    pushed, so that a broken one stops this early.
    """
    for folder in saes.values():
        Sae.load_from_disk(folder)
    for name, folder in saes.items():
        weights_folder = find_weights(folder).parent
        # None leaves a new repository as private as the owner's are by default
        print(push(weights_folder, repo_id, "sae", name, private=private or None))


if __name__ == "__main__":
    run_script(main, Config)
