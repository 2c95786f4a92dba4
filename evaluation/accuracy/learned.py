"""What the general network is worth: prediction, learned starts, and from scratch.

    python -m evaluation.accuracy.learned --data DIR --cases NAME --out learned.csv

One line for each case and way: ``affine`` (the start alone), ``prediction`` (nothing
optimised), ``learned 1/3`` and ``learned`` (a fit from it, with a third of the steps
and with all), ``scratch 1/3`` and ``scratch``. CPU seconds are those of the process,
on one thread with OMP_NUM_THREADS=1.
"""

import argparse
import time
from dataclasses import replace

import icon_nephi
from evaluation import csv_file, register, score, write_csv
from evaluation.accuracy.pairs import load_pairs
from icon_nephi.models import find_settings

COLUMNS = (
    *("case", "way", "cpu_seconds", "dice", "tre_fixed_to_moving_mean_mm"),
    *("tre_moving_to_fixed_mean_mm", "folds_voxels_percent", "file_kb", "warnings"),
)
WAYS = ("affine", "prediction", "learned 1/3", "learned", "scratch 1/3", "scratch")


def predicted(case):
    return icon_nephi.predict(
        case.moving,
        case.fixed,
        modality=case.modality,
        mask_A=case.moving_mask,
        mask_B=case.fixed_mask,
    )


def without_deformation(result):
    """The affine part of a registration."""
    code = result.fit.code
    still = replace(code, local_codes=tuple(0 * grid for grid in code.local_codes))
    fit = replace(result.fit, code=still)
    places = result.geometry_A, result.geometry_B
    return icon_nephi.Registration(fit, *places, itk=result.itk, images=result.images)


def result_of(case, way):
    if way in ("affine", "prediction"):
        result = predicted(case)
        return result if way == "prediction" else without_deformation(result)
    start, _, third = way.partition(" ")
    options = {"start": start}
    if third:
        size = [int(n) for n in case.fixed.GetLargestPossibleRegion().GetSize()]
        field = "grid" if start == "learned" else "auto"
        settings = find_settings(field, size, case.modality)
        options["field"] = replace(settings, steps=settings.steps // 3)
    return register(case, **options)


def main(argv=None):
    """Print and write a line for every case and way."""
    new = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    new.add_argument("--data", required=True, help="folder of cases")
    new.add_argument("--cases", nargs="*", help="names (default: all)")
    new.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    new.add_argument("--out", type=csv_file, required=True)
    args = new.parse_args(argv)
    rows = []
    for case in load_pairs(args.data, args.cases):
        for way in args.ways:
            began = time.process_time()
            result = result_of(case, way)
            seconds = time.process_time() - began
            row = {"case": case.name, "way": way, "cpu_seconds": round(seconds, 2)}
            rows.append(row | score(case, result))
            write_csv(args.out, COLUMNS, rows)
            said = [f"{k} {rows[-1].get(k)}" for k in COLUMNS[2:7] if k in rows[-1]]
            print(case.name, way, *said, sep=", ", flush=True)
    return rows


if __name__ == "__main__":
    main()
