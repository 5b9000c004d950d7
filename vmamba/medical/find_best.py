"""Which configuration, or which pair together, cross-validation finds best, and how to predict with it.

nnU-Net's rule: every trained model's folds are gathered, every pair's probabilities are averaged, all are scored by the
mean foreground Dice, and the post-processing of the best is chosen. What was found stands in
inference_information.json, the commands for new images in inference_instructions.txt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.medical.crossval import gather
from vmamba.medical.ensemble import ensemble
from vmamba.medical.evaluate import evaluate_pairs, write_csv
from vmamba.medical.model_folder import ModelFolder, open_model, write_plain
from vmamba.medical.postprocess import FILE, decide
from vmamba.medical.raw import RawDataset
from vmamba.medical.runs import read_json, write_json
from vmamba.medical.written import npz
from vmamba.safety import only_writer, replacing

INFORMATION, INSTRUCTIONS = "inference_information.json", "inference_instructions.txt"


@dataclass(frozen=True)
class Manner:
    """How it is done: progress bars, cases worked on ``threads`` at a time, a pair's masks made anew or kept."""

    progress: bool = True
    threads: int = 1
    overwrite: bool = True


@dataclass(frozen=True)
class Candidate:
    """One model or two, and the folder of their cross-validation's predictions."""

    models: tuple[ModelFolder, ...]
    folder: Path
    dice: float

    @property
    def name(self) -> str:
        """As nnU-Net calls it."""
        names = [model.folder.name for model in self.models]
        return names[0] if len(names) == 1 else "___".join(["ensemble", *names])


def trained_models(results: Path, trainers: Sequence[str], plans: str, configs: Sequence[str]) -> list[ModelFolder]:
    """The model folders of a data set, of those trainers and configurations if any are named.

    UserError if one that is named, or every one, is missing.
    """
    found = {path.name: path for path in sorted(results.glob(f"*__{plans}__*")) if list(path.glob("fold_*"))}
    wanted = [name for name in found if _fits(name, trainers, 0) and _fits(name, configs, 2)]
    for words, place in ((trainers, 0), (configs, 2)):
        lost = [word for word in words if not any(name.split("__")[place] == word for name in wanted)]
        if lost:
            raise UserError(f"{results}: {', '.join(lost)} not trained; there: {', '.join(found) or 'nothing'}")
    if not wanted:
        raise UserError(f"{results}: nothing trained by the plans {plans}; run vmamba medseg train")
    return [open_model(found[name]) for name in wanted]


def _fits(name: str, words: Sequence[str], place: int) -> bool:
    return not words or name.split("__")[place] in words


def find_best(
    results: Path,
    dataset: RawDataset,
    models: Sequence[ModelFolder],
    folds: Sequence[str],
    *,
    pairs: bool = True,
    manner: Manner | None = None,
) -> dict[str, Any]:
    """Scores models and pairs, chooses, and writes both files into ``results``; returns inference_information.json.

    UserError if a fold is not validated, or, with ``pairs``, its probabilities were not kept.
    """
    found, manner = [], manner or Manner()
    for model in models:
        summary = gather(model, dataset, folds, progress=manner.progress, threads=manner.threads)
        folder = model.folder / f"crossval_results_folds_{'_'.join(folds)}"
        found.append(Candidate((model,), folder, summary["foreground_mean"]["Dice"]))
    if pairs:
        found += [_pair(results, dataset, one, two, folds, manner) for one, two in combinations(found, 2)]
    best = max(found, key=lambda candidate: candidate.dice)
    after = _postprocessing(best, dataset, manner)
    information = {
        "folds": list(folds),
        "dataset_name_or_id": dataset.name,
        "considered_models": [_model(candidate.models[0]) for candidate in found if len(candidate.models) == 1],
        "ensembling_allowed": pairs,
        "all_results": {candidate.name: candidate.dice for candidate in found},
        "best_model_or_ensemble": {
            "result_on_crossval_pre_pp": best.dice,
            "result_on_crossval_post_pp": after,
            "postprocessing_file": str(best.folder / FILE),
            "some_plans_file": str(best.models[0].folder / "plans.json"),
            "selected_model_or_models": [_model(model) for model in best.models],
        },
    }
    with only_writer(results):
        write_plain(results / INFORMATION, information)
        with replacing(results / INSTRUCTIONS) as partial:
            partial.write_text(instructions(best, dataset, folds), encoding="utf-8")
    return information


def _pair(
    results: Path, dataset: RawDataset, one: Candidate, two: Candidate, folds: Sequence[str], manner: Manner
) -> Candidate:
    models = (*one.models, *two.models)
    name = "___".join(["ensemble", *(model.folder.name for model in models), "_".join(folds)])
    folder = results / "ensembles" / name
    for part in (one.folder, two.folder):
        lost = [path.name for path in part.glob(f"*{dataset.ending}") if not npz(path).exists()]
        if lost:
            advice = "train with --npz (or --val --npz), or compare with --disable_ensembling"
            raise UserError(f"{part}: the probabilities of {lost[0]} were not kept; {advice}")
    options = {"progress": manner.progress, "threads": manner.threads}
    masks = ensemble([one.folder, two.folder], folder, keep=False, overwrite=manner.overwrite, **options)
    with only_writer(folder):
        summary = evaluate_pairs(_truths(dataset, masks), dataset.labels, **options)
        write_json(folder / "summary.json", summary)
        write_csv(folder / "summary.csv", summary)
    return Candidate(models, folder, summary["foreground_mean"]["Dice"])


def _truths(dataset: RawDataset, masks: Sequence[Path]) -> list[tuple[Path, Path]]:
    """(truth, mask) of each mask."""
    labels = {f"{case.name}{dataset.ending}": case.label for case in dataset.cases()}
    return [(truth, path) for path in masks if (truth := labels.get(path.name)) is not None]


def _postprocessing(best: Candidate, dataset: RawDataset, manner: Manner) -> float:
    """Chosen for a pair (a single model's cross-validation did); the mean Dice after it."""
    rule = best.folder / FILE
    if len(best.models) > 1:
        pairs = _truths(dataset, sorted(best.folder.glob(f"*{dataset.ending}")))
        with only_writer(best.folder):
            write_plain(rule, decide(pairs, dataset.labels, manner.progress, manner.threads))
    after = [dice for dice in read_json(rule)["Dice"]["after"].values() if dice is not None]
    return sum(after) / max(len(after), 1)


def _model(model: ModelFolder) -> dict[str, str]:
    trainer, plans, config = model.folder.name.split("__")
    return {"configuration": config, "trainer": trainer, "plans_identifier": plans}


def instructions(best: Candidate, dataset: RawDataset, folds: Sequence[str]) -> str:
    """The commands that predict new images as the best candidate does."""
    single = len(best.models) == 1
    outputs = ["OUTPUT_FOLDER"] if single else [f"OUTPUT_FOLDER_MODEL_{i + 1}" for i in range(len(best.models))]
    lines = []
    for model, output in zip(best.models, outputs, strict=True):
        named = _model(model)
        words = f"-d {dataset.name} -c {named['configuration']} -tr {named['trainer']} -p {named['plans_identifier']}"
        keep = "" if single else " --save_probabilities"
        lines.append(f"vmamba medseg predict -i INPUT_FOLDER -o {output} {words} -f {' '.join(folds)}{keep}")
    if not single:
        lines.append(f"vmamba medseg ensemble -i {' '.join(outputs)} -o OUTPUT_FOLDER")
    lines.append(f"vmamba medseg postprocess -i OUTPUT_FOLDER -o OUTPUT_FOLDER_PP -pp '{best.folder / FILE}'")
    head = f"Best in cross-validation: {best.name}, mean Dice {best.dice:.4f}. For new images (NAME_0000 ...):"
    return "\n".join([head, "", *lines, ""])
