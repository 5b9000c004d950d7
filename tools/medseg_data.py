"""vmamba medseg demo-data | plan | preprocess: from a data set in nnU-Net's layout to what training reads."""

import argparse
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.medseg import add_places, add_threads, command, threads

PLAN = """examples:
  vmamba medseg plan -d 900 --root demo
  vmamba medseg plan -d 900 --root demo -p nnUNetPlans_3mm -overwrite_target_spacing 3 3 3"""
PREPROCESS = "example:\n  vmamba medseg preprocess -d 900 -c 2d 3d_fullres --root demo"
PBAR = ("--no_pbar",)
DEMO = "example:\n  vmamba medseg demo-data demo"


def add_commands(commands: Any) -> None:
    """Adds the three commands."""
    text = "write pseudo-subjects made from the MRI in nilearn's wheel, as an nnU-Net data set"
    demo = command(commands, "demo-data", text, DEMO, run_demo_data)
    demo.add_argument("output", type=Path, metavar="DIR", help="gets nnUNet_raw/Dataset900_MNI152")
    demo.add_argument("--subjects", type=int, default=12, help="to train (default 12)")
    demo.add_argument("--test", type=int, default=3, help="and to test (default 3)")
    demo.add_argument("--spacing", type=float, default=2.0, help="side of a voxel in mm (default 2)")
    demo.add_argument("--seed", type=int, default=0, help="decides every deformation (default 0)")

    plan = command(commands, "plan", "check every case, write fingerprint and plans", PLAN, run_plan, silent=PBAR)
    _add_dataset(plan, "-overwrite_plans_name")
    add_threads(plan, "-npfp", "read")
    plan.add_argument("-gpu_memory_target", type=float, default=8.0, metavar="GB", help="to plan for (default 8)")
    spacing = (
        "voxels of 3d_fullres along z, y, x, and in their plane of 2d, in place of the rule's; take a -p of its own"
    )
    plan.add_argument("-overwrite_target_spacing", type=float, nargs="+", metavar="MM", help=spacing)
    checked = "cases are always checked, as nnU-Net does under this option"
    plan.add_argument("--verify_dataset_integrity", action="store_true", help=checked)
    plan.add_argument("--clean", action="store_true", help="the fingerprint is always made anew, as under this option")
    plan.add_argument("--dry-run", action="store_true", help="print the plans, write nothing")
    plan.add_argument("--overwrite", action="store_true", help="replace existing plans")

    prepare = command(
        commands, "preprocess", "crop, normalise and resample every case", PREPROCESS, run_preprocess, silent=PBAR
    )
    _add_dataset(prepare, "-plans_name")
    prepare.add_argument("-c", nargs="+", metavar="CONFIG", help="configurations (default: 2d and 3d_fullres)")
    add_threads(prepare, "-np", "worked on", nargs="+")
    prepare.add_argument("--overwrite", action="store_true", help="again, also cases that are up to date")


def _add_dataset(parser: argparse.ArgumentParser, plans: str) -> None:
    """``plans`` is nnU-Net's word for -p in this command."""
    parser.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="names or numbers of data sets")
    text = "name of the plans (default nnUNetPlans)"
    parser.add_argument("-p", plans, dest="p", default="nnUNetPlans", metavar="PLANS", help=text)
    add_places(parser)


def run_demo_data(args: argparse.Namespace) -> int:
    """vmamba medseg demo-data"""
    from vmamba.medical.demo_data import write_demo

    counts = {"subjects": args.subjects, "test": args.test}
    folder = write_demo(args.output, **counts, spacing=args.spacing, seed=args.seed, progress=not args.no_progress)
    print(f"{folder}: {args.subjects} + {args.test} pseudo-subjects, all made from one template")
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """vmamba medseg plan"""
    from vmamba.medical.fingerprint import fingerprint
    from vmamba.medical.jobs import describe, write_plans
    from vmamba.medical.plan import check_spacing, make_plans
    from vmamba.medical.raw import Places, find_dataset

    reading = {"progress": not args.no_progress, "threads": threads("-npfp", args.npfp)}
    places, memory, spacing = Places.find(args.root), args.gpu_memory_target, args.overwrite_target_spacing
    if spacing is not None:
        check_spacing(spacing)
    for which in args.d:
        if args.dry_run:
            dataset = find_dataset(places, which)
            found = fingerprint(dataset, **reading)
            path, plans = dataset.folder, make_plans(dataset, found, args.p, memory, spacing)
        else:
            options = {"overwrite": args.overwrite, "spacing": spacing, **reading}
            path, plans = write_plans(places, which, args.p, memory, **options)
        print(describe(plans, str(path)))
    return 0


def run_preprocess(args: argparse.Namespace) -> int:
    """vmamba medseg preprocess"""
    from vmamba.medical.jobs import open_plans
    from vmamba.medical.preprocess import preprocess
    from vmamba.medical.raw import Places

    counts = [threads("-np", count) for count in args.np or [None]]
    places = Places.find(args.root)
    options = {"overwrite": args.overwrite, "progress": not args.no_progress}
    for which in args.d:
        jobs = open_plans(places, which, args.c, args.p)
        if len(counts) not in (1, len(jobs)):
            names = ", ".join(job.configuration.name for job in jobs)
            raise UserError(f"-np {' '.join(map(str, counts))}: expected one number, or one for each of {names}")
        for job, count in zip(jobs, counts * len(jobs), strict=False):
            names = preprocess(job.dataset, job.plans, job.configuration, job.stored, threads=count, **options)
            print(f"{job.stored}: {len(names)} case(s)")
    return 0
