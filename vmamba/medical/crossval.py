"""Cross-validation as a whole: the folds' predictions in one folder, scored together, post-processing chosen."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.medical.evaluate import evaluate_pairs, write_csv
from vmamba.medical.model_folder import ModelFolder, write_plain
from vmamba.medical.postprocess import FILE, decide
from vmamba.medical.raw import RawDataset
from vmamba.medical.runs import write_json
from vmamba.medical.written import drop_masks, npz
from vmamba.safety import only_writer, replacing


def gather(
    model: ModelFolder, dataset: RawDataset, folds: Sequence[str], *, progress: bool = True, threads: int = 1
) -> dict[str, Any]:
    """Writes crossval_results_folds_0_1_... with summary.json, its .csv and postprocessing.json; returns the summary.

    UserError if a fold has not been validated or two folds validated one case.
    """
    found: dict[str, Path] = {}
    for fold in folds:
        folder = model.folder / f"fold_{fold}" / "validation"
        masks = [p for p in sorted(folder.glob(f"*{model.ending}")) if not p.name.startswith(".")]
        if not (folder / "summary.json").exists() or not masks:
            raise UserError(f"{folder}: not validated; run vmamba medseg train ... {fold}, with --val if it is trained")
        for path in masks:
            if path.name in found:
                raise UserError(f"{path}: this case was validated by {found[path.name].parent.parent.name} too")
            found[path.name] = path
    output = model.folder / f"crossval_results_folds_{'_'.join(folds)}"
    truths = {f"{case.name}{dataset.ending}": case.label for case in dataset.cases() if case.label is not None}
    for name, path in found.items():
        if name not in truths:
            raise UserError(f"{path}: no such case in {dataset.folder}; was the fold trained on other data?")
    with only_writer(output):
        pairs = []
        drop_masks(output)
        for name, path in sorted(found.items()):
            for source in (path, npz(path)):
                if source.exists():
                    with replacing(output / source.name) as partial:
                        shutil.copy2(source, partial)  # with its time, by which an ensemble knows what is newer
            pairs.append((truths[name], output / name))
        summary = evaluate_pairs(pairs, dataset.labels, progress=progress, threads=threads)
        write_plain(output / "dataset.json", dataset.json)
        write_plain(output / FILE, decide(pairs, dataset.labels, progress, threads))
        write_json(output / "summary.json", summary)
        write_csv(output / "summary.csv", summary)
    return summary
