"""`vlmedit export`: the student of a run on real models, as a pipeline of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from vlmedit.cli._shared import JsonFile, check_json, refuse
from vlmedit.errors import InputError

ORDER = 5


def export(
    run: Positional[Path],
    *,
    out: Path | None = None,
    kind: Literal["full", "adapter"] = "full",
    push: str = "",
    json: JsonFile = None,
) -> int:
    """Write the student of a run on real models as a diffusers pipeline that needs nothing of this package.

    Args:
        run: The folder of a finished run; with --push and no --out one that was exported before.
        out: A new folder.
        kind: full (a whole pipeline) or adapter (the LoRA weights alone).
        push: Also upload it to this repository of the Hub, OWNER/NAME; private.
    """
    from vlmedit.io import check_writable, disk_errors, save_json
    from vlmedit.networks.quiet import quiet
    from vlmedit.pipelines import export as real

    refuse(check_json(json))
    again = out is None and (run / "README.md").is_file()
    if again and not push:
        what = "upload it with --push OWNER/NAME, or name a run and a new folder with --out"
        raise InputError(f"{run}: exported already; {what}")
    if out is None and not again:
        raise InputError(f"--out is missing: name a new folder, vlmedit export {run} --out FOLDER")
    folder = run if again else out
    if push:
        real.check_name(push)
    if not again:
        check_writable(folder, "folder")
        with quiet(), disk_errors(folder):
            real.export(run, folder, kind)
    address = real.push_to_hub(folder, push) if push else None
    print(address or f"the pipeline is in {folder}; its README.md says how to run it")
    if json:
        save_json({"out": str(folder), "kind": real.read_about(folder).get("kind", kind), "address": address}, json)
    return 0
