"""vmamba medseg demo-data | plan | preprocess: from a data set in nnU-Net's layout to what training reads."""

import argparse
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.medseg import add_places, command

PLAN = "example:\n  vmamba medseg plan -d 900 --root demo"
PREPROCESS = "example:\n  vmamba medseg preprocess -d 900 -c 2d 3d_fullres --root demo"
AT_ONCE = 4  # cases
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

    plan = command(commands, "plan", "check every case, write fingerprint and plans", PLAN, run_plan)
    _add_dataset(plan)
    plan.add_argument("-gpu_memory_target", type=float, default=8.0, metavar="GB", help="to plan for (default 8)")
    checked = "cases are always checked, as nnU-Net does under this option"
    plan.add_argument("--verify_dataset_integrity", action="store_true", help=checked)
    plan.add_argument("--dry-run", action="store_true", help="print the plans, write nothing")
    plan.add_argument("--overwrite", action="store_true", help="replace existing plans")

    prepare = command(commands, "preprocess", "crop, normalise and resample every case", PREPROCESS, run_preprocess)
    _add_dataset(prepare)
    prepare.add_argument("-c", nargs="+", metavar="CONFIG", help="configurations (default: 2d and 3d_fullres)")
    threads = f"cases worked on at a time (default: the CPUs, at most {AT_ONCE}); each takes memory"
    prepare.add_argument("-np", type=int, metavar="N", help=threads)
    prepare.add_argument("--overwrite", action="store_true", help="again, also cases that are up to date")


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="names or numbers of data sets")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="name of the plans (default nnUNetPlans)")
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
    from vmamba.medical.plan import make_plans
    from vmamba.medical.raw import Places, find_dataset

    places, progress, memory = Places.find(args.root), not args.no_progress, args.gpu_memory_target
    for which in args.d:
        if args.dry_run:
            dataset = find_dataset(places, which)
            path, plans = dataset.folder, make_plans(dataset, fingerprint(dataset, progress), args.p, memory)
        else:
            path, plans = write_plans(places, which, args.p, memory, overwrite=args.overwrite, progress=progress)
        print(describe(plans, str(path)))
    return 0


def run_preprocess(args: argparse.Namespace) -> int:
    """vmamba medseg preprocess"""
    from vmamba.machine import cpus
    from vmamba.medical.jobs import open_plans
    from vmamba.medical.preprocess import preprocess
    from vmamba.medical.raw import Places

    threads = min(cpus(), AT_ONCE) if args.np is None else args.np
    if threads < 1:
        raise UserError(f"-np {threads}: expected at least 1")
    places = Places.find(args.root)
    options = {"overwrite": args.overwrite, "progress": not args.no_progress, "threads": threads}
    for which in args.d:
        for job in open_plans(places, which, args.c, args.p):
            names = preprocess(job.dataset, job.plans, job.configuration, job.stored, **options)
            print(f"{job.stored}: {len(names)} case(s)")
    return 0
